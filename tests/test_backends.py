"""Remote backends against local runs: the dry run, and a server that has no nsp."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_models as tiny
import numpy as np
import pytest
import torch
import xarray as xr
from ndif_server import Double, checkpoint, start_double

import nsp
from nsp.backends.options import backend_options
from nsp.engine.recording import record
from nsp.engine.slots import BOUNDARY
from nsp.errors import BackendError, InputError

BASE, DONOR = tiny.text(tiny.CORRUPT), tiny.text(tiny.CLEAN)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("weights") / request.param, request.param)


@pytest.fixture(scope="module")
def here(weights: Path) -> nsp.Model:
    return nsp.load(weights, device="cpu", dtype="float32")


@pytest.fixture(scope="module", params=["local-sim", "ndif"])
def there(request: pytest.FixtureRequest, weights: Path, double: Double) -> nsp.Model:
    if request.param == "local-sim":
        return nsp.load(weights, device="cpu", dtype="float32", backend="local-sim")
    return remote(weights, double)


def remote(weights: Path, double: Double, **options: Any) -> nsp.Model:
    backend = {"kind": "ndif", "host": double.address, "model": str(weights), **options}
    return nsp.load(weights, dtype="float32", backend=backend)


def sweep_residual(t: Any) -> None:
    t.sweep(nsp.patch("resid_post[*] @ *", donor=DONOR))
    t.measure(nsp.logit_diff("w7", "w9"), nsp.kl(), nsp.kl(reference="base", name="moved"))


def sweep_heads(t: Any) -> None:
    t.sweep(nsp.ablate("z[*][*] @ *", "mean"), axes=("layer", "unit"))
    t.measure(nsp.logit_diff("w7", "w9"), nsp.logprob("w7"))


def sweep_plain(t: Any) -> None:
    t._path = "plain"
    t.sweep(nsp.patch("resid_pre[*] @ 2:6", donor=DONOR))
    t.measure(nsp.logit_diff("w7", "w9"))


def single(t: Any) -> None:
    t.patch("mlp_out[1] @ 3", donor=DONOR)
    t.ablate("z[0][1] @ *", "noise", seed=3)
    t.record("resid_post[0, 1] @ 1, 4", "z[1][*] @ last", "logits @ last")
    t.measure(nsp.logit_diff("w7", "w9"))


def pattern(t: Any) -> None:
    t.record("pattern[0] @ *")
    t.patch("pattern[1] @ *", donor=DONOR)
    t.measure(nsp.logit_diff("w7", "w9"))


def doubled(value: torch.Tensor) -> torch.Tensor:
    return 2 * value


def own_function(t: Any) -> None:
    t.apply("resid_post[0] @ 4", lambda value: doubled(value) - 1)
    t.measure(nsp.logit_diff("w7", "w9"))


def generated(t: Any) -> None:
    t.patch("resid_post[0] @ 4", donor=DONOR)
    t.generate(6, when="both", stop=False)


def sampled(t: Any) -> None:
    t.inject("resid_post[1] @ *", torch.ones(tiny.WIDTH))
    t.generate(5, temperature=1.0, top_k=20, top_p=0.9, seed=4)


STATEMENTS = [sweep_residual, sweep_heads, sweep_plain, single, pattern, own_function, generated, sampled]


def run(model: nsp.Model, state: Callable[[Any], None]) -> Any:
    with model.trace(BASE) as t:
        state(t)
    return t.results


def leaves(results: Any) -> dict[str, xr.Dataset]:
    if isinstance(results, xr.DataTree):
        return {node.path: node.to_dataset() for node in results.subtree}
    return {"": results}


def assert_same(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert set(leaves(found)) == set(leaves(expected))
    for path, dataset in leaves(expected).items():
        for name, array in dataset.data_vars.items():
            other = leaves(found)[path][name].values
            if array.dtype.kind == "f":
                np.testing.assert_allclose(other, array.values, atol=tolerance, rtol=0, err_msg=f"{path}/{name}")
            else:
                assert (other == array.values).all(), name


@pytest.mark.parametrize("state", STATEMENTS, ids=lambda one: one.__name__)
def test_a_trace_gives_the_local_numbers(here: nsp.Model, there: nsp.Model, state: Callable[[Any], None]) -> None:
    assert_same(run(there, state), run(here, state))


def test_no_weights_are_loaded(weights: Path, double: Double) -> None:
    model = remote(weights, double)
    assert {parameter.device.type for parameter in model.module.parameters()} == {"meta"}
    assert model.provenance.weights_hash == f"remote:{weights}@main"
    assert model.provenance.device == "ndif"


def test_a_sweep_is_few_jobs_and_brings_back_numbers_only(weights: Path, double: Double) -> None:
    model = remote(weights, double)
    run(model, sweep_residual)
    model.jobs()
    run(model, sweep_residual)
    jobs = model.jobs()
    assert len(jobs) <= 2
    assert all(job["id"] and 0 < job["received"] < 20_000 for job in jobs)


def test_a_large_recording_comes_by_its_address(here: nsp.Model, weights: Path, double: Double) -> None:
    # More than the double sends inline.
    ids = [[(7 * row + column) % 50 for column in range(40)] for row in range(64)]
    slots = {(BOUNDARY, 1), ("mlp_out", 1)}
    found, expected = (record(model.runtime, ids, slots) for model in (remote(weights, double), here))
    for slot in slots:
        assert type(found.values[slot]) is torch.Tensor
        torch.testing.assert_close(found.values[slot], expected.values[slot])


def test_payloads_say_nothing_of_this_machine(weights: Path, double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSP_TEST_SECRET", "swordfish")
    monkeypatch.setenv("NDIF_API_KEY", "a-key-of-mine")
    model = remote(weights, double)
    for state in (sweep_residual, pattern, generated):
        run(model, state)
    for item in double.seen()[-4:]:
        texts = item["payload"] + item["envelope"].replace(str(weights), "")
        assert len(item["payload"]) > 1000
        for secret in (
            "swordfish",
            "a-key-of-mine",
            str(Path.home()),
            str(Path(__file__).parent),
            sys.prefix,
            "site-packages",
        ):
            assert secret not in texts, secret
        found = re.search(r".{0,60}/(work|home|root|usr|tmp)/.{0,60}", texts, re.DOTALL)
        assert found is None, found.group(0)


def test_the_double_has_no_nsp() -> None:
    code = "import runpy, sys; sys.argv = ['x', 'y']; import tests"
    script = Path(__file__).with_name("ndif_double.py")
    code = f"exec(open({str(script)!r}).read().split('import torch')[0]); import nsp"
    ended = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError" in ended.stderr


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("kind", ["busy", "drop", "evicted"])
def test_transient_faults_are_tried_again(
    kind: str, llama: Path, double: Double, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    model = remote(llama, double)
    double.fault(kind, 2)
    local = nsp.load(llama, device="cpu", dtype="float32")
    assert_same(run(model, single), run(local, single))
    assert max(job["attempts"] for job in model.jobs()) == 3
    assert "trying again in" in capsys.readouterr().err


def test_what_does_not_pass_is_not_tried_again(llama: Path, double: Double) -> None:
    double.fault("version", 1)
    with pytest.raises(BackendError, match=r"does not take this client: .*0\.8\.1 is below"):
        run(remote(llama, double), single)
    run(remote(llama, double), single)


def test_a_deployment_that_takes_too_long(llama: Path, double: Double) -> None:
    double.fault("deploying", 1)
    with pytest.raises(BackendError, match=r"'deploying' after .*nsp status"):
        run(remote(llama, double, deadline=1.5), single)


def test_a_server_that_is_not_there(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    model = nsp.load(
        llama, dtype="float32", backend={"kind": "ndif", "host": "http://127.0.0.1:9", "model": "x", "retries": 1}
    )
    with pytest.raises(BackendError, match=r"no connection to the server http://127.0.0.1:9 .*refused"):
        run(model, single)


def test_a_wrong_key(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = start_double(tmp_path, key="right")
    try:
        monkeypatch.setenv("NDIF_API_KEY", "wrong")
        with pytest.raises(BackendError, match=r"refused the key .*NDIF_API_KEY"):
            run(remote(llama, guarded), single)
        model = nsp.load(
            llama, dtype="float32", backend={"kind": "ndif", "host": guarded.address, "model": str(llama)}, key="right"
        )
        run(model, single)
    finally:
        guarded.stop()


def test_a_job_that_fails_says_the_servers_words(llama: Path, double: Double) -> None:
    model = nsp.load(
        llama, dtype="float32", backend={"kind": "ndif", "host": double.address, "model": str(llama.parent / "no")}
    )
    with pytest.raises(BackendError, match=r"the job failed on the server: ") as caught:
        run(model, single)
    assert "Traceback" in str(caught.value.__cause__)


def test_a_function_that_does_not_fit_is_the_users_fault(llama: Path, double: Double) -> None:
    def wrong(t: Any) -> None:
        t.apply("resid_post[0] @ 4", lambda value: value[:, :3])
        t.measure(nsp.logit_diff("w7", "w9"))

    with pytest.raises(InputError, match=r"^the applied function at resid_post\[0\] @ 4 got"):
        run(remote(llama, double), wrong)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "host"),
    [
        ("local", "local", None),
        ("ndif", "ndif", None),
        ("ndif://box:8001", "ndif", "http://box:8001"),
        ("ndif://api.ndif.us", "ndif", "https://api.ndif.us"),
        ("ndif+https://box:8001", "ndif", "https://box:8001"),
        ("ray", "ray", None),
        ("ray://head", "ray", "ray://head:10001"),
    ],
)
def test_backends_in_short(text: str, kind: str, host: str | None) -> None:
    made = backend_options(text)
    assert (made.kind, made.host) == (kind, host)


def test_a_recipes_models_have_names_of_their_own_on_the_server() -> None:
    made = backend_options({"kind": "ndif", "model": "main", "models": {"./a": "there/a"}})
    assert made.server_name("./a") == made.server_name(str(Path("a").resolve())) == "there/a"
    assert made.server_name("b") == "main"
    assert made.for_another().server_name("b") is None
    assert made.for_another().server_name("./a") == "there/a"
    assert backend_options(made.model_dump(mode="json")) == made
    assert hash(made) == hash(backend_options(made))
    workers = backend_options({"kind": "ray", "inner": {"kind": "ndif", "model": "main"}}).for_another()
    assert workers.inner is not None
    assert workers.inner.model is None
    with pytest.raises(InputError, match="local takes no 'models'"):
        backend_options({"kind": "local", "models": {"a": "b"}})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nidf", "unknown backend 'nidf'; there are local, local-sim, ndif, ray"),
        ({"kind": "ndif", "workers": 4}, "ndif takes no 'workers'"),
        ({"kind": "ndif", "retries": -1}, "retries: Input should be greater"),
    ],
)
def test_backends_that_cannot_be_meant(given: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        backend_options(given)
