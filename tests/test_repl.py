"""`nsp repl`: each command as a pure reply, then a session typed into a real terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from engine_models import CLEAN, NEURONS, both, module, one_thread, text, tokenizer

from nsp.cli.repl_session import Reply, Session
from nsp.experiments import discover, steering
from nsp.experiments.circuits import Circuit, CircuitUnit

__all__ = ["one_thread"]
ENTRY = Path(sys.executable).with_name("nsp")


@pytest.fixture
def session() -> Session:
    return Session(both("llama").model, max_new_tokens=4, top_k=12)


def said(reply: Reply) -> str:
    assert not reply.error, reply.error
    assert reply.summary is not None
    return str(reply.summary)


def discovered(session: Session) -> Session:
    said(session.handle(f"prompt {text(CLEAN)}"))
    said(session.handle("discover w3"))
    return session


def test_prompt_shows_what_comes_next(session: Session) -> None:
    shown = said(session.handle(f"prompt {text(CLEAN)}"))
    logits = both("llama").reference.logits(CLEAN)[-1]
    assert f"w{int(logits.argmax())}" in shown
    assert f"{float(logits.softmax(0).max()):.3f}" in shown
    assert session.prompt == text(CLEAN)


def test_discover_is_the_librarys(session: Session) -> None:
    shown = said(discovered(session).handle("top 3"))
    assert session.circuit is not None
    expected = discover(session.model, text(CLEAN), target=" w3", top_k=12)
    assert session.circuit.units == expected.units
    assert f"the 3 strongest of {len(expected)}" in shown
    assert f"L{expected.units[0].layer}/N{expected.units[0].unit}" in shown


@pytest.mark.parametrize(
    ("line", "count"),
    [("ablate", None), ("ablate all", None), ("ablate top3", 3), ("ablate L1/N7", 1), ("ablate L1/N7, L0/N2", 2)],
)
def test_ablate_scales_to_zero(session: Session, line: str, count: int | None) -> None:
    reply = discovered(session).handle(line)
    assert reply.summary is not None
    assert session.circuit is not None
    if count == 1:
        circuit = Circuit((CircuitUnit(1, None, 7, 0.0),))
    elif count == 2:
        circuit = Circuit((CircuitUnit(1, None, 7, 0.0), CircuitUnit(0, None, 2, 0.0)))
    else:
        circuit = session.circuit if count is None else session.circuit.top(count)
    tree = steering(session.model, text(CLEAN), circuit=circuit, multipliers=[0.0], tokens=[" w3"], decoding={"max_new_tokens": 4})
    for row, name in ((0, "0"), (1, "unchanged")):
        found = reply.summary.tables[0].rows[row]
        assert found[:2] == (name, float(tree["effects/tokens"]["prob"].values[0, row, 0]))
        assert found[-1] == repr(tree["generations"]["text"].values[0, row])


def test_amplify_takes_a_multiplier_or_the_sessions(session: Session) -> None:
    discovered(session)
    assert "amplify all 2" in said(session.handle("amplify"))
    assert "multiplier 5" in said(session.handle("multiplier 5"))
    by_default, named = said(session.handle("amplify top4")), said(session.handle("amplify top4 5"))
    assert by_default == named
    assert by_default != said(session.handle("amplify top4 1.5"))
    assert "sweep" in said(session.handle("sweep top2"))


def test_save_and_load_keep_the_circuit(session: Session, tmp_path: Path) -> None:
    discovered(session)
    said(session.handle(f"save {tmp_path / 'c.json'}"))
    other = Session(both("llama").model)
    assert "12 units" in said(other.handle(f'load "{tmp_path / "c.json"}"'))
    assert other.circuit == session.circuit
    assert other.prompt == text(CLEAN)


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("promt x", "did you mean 'prompt'"),
        ("prompt", "takes a text"),
        ("discover", "no prompt yet"),
        ("top", "no circuit yet"),
        ("ablate", "no circuit yet"),
        ("ablate top5", "no circuit yet"),
        ("ablate L1/N7", "no prompt yet"),
        ("ablate somewhere", "neither all, nor top10"),
        (f"ablate L1/N{NEURONS}", f"0 to {NEURONS - 1}"),
        ("multiplier much", "takes a number"),
        ("multiplier nan", "takes a number"),
        ("save", "takes a file"),
        ("load /no/such/file.json", "cannot read"),
        ("help me", "no command"),
    ],
)
def test_a_mistake_is_a_reply(session: Session, line: str, hint: str) -> None:
    reply = session.handle(line)
    assert hint in reply.error
    assert not reply.done
    assert not session.handle("info").error


def test_mistakes_with_a_circuit_leave_it_as_it_was(session: Session, tmp_path: Path) -> None:
    before = discovered(session).circuit
    (tmp_path / "bad.json").write_text("{")
    Circuit((CircuitUnit(99, 0, 1, 1.0),)).save(tmp_path / "large.json")
    for line in ("discover a target of many words", "top none", "top 0", "ablate top0", "save /no/such/folder/x.json"):
        assert session.handle(line).error, line
    for name in ("bad", "large"):
        assert session.handle(f"load {tmp_path / name}.json").error
    assert session.circuit == before


def test_what_was_not_foreseen_does_not_end_the_session(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.model, "encode", lambda _text: 1 / 0)
    reply = session.handle("prompt x")
    assert "ZeroDivisionError" in reply.error
    assert not reply.done


def test_completion_knows_commands_and_neurons(session: Session) -> None:
    assert session.completions("a") == ["ablate", "amplify"]
    assert "top10" in session.completions("ablate ")
    discovered(session)
    assert session.circuit is not None
    first = session.circuit.units[0]
    assert f"L{first.layer}/N{first.unit}" in session.completions(f"ablate l{first.layer}/")
    assert session.completions("help sw") == ["sweep"]


def test_empty_lines_and_quit(session: Session) -> None:
    assert session.handle("   ") == Reply()
    assert session.handle("quit").done
    assert session.handle("EXIT").done
    shown = said(session.handle("help"))
    assert all(name in shown for name in session.commands)


# --- a real terminal ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    module("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def environment(home: Path) -> dict[str, str]:
    settings = {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONUTF8": "1", "TERM": "xterm", "XDG_DATA_HOME": str(home)}
    return {**os.environ, **settings}


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_a_session_in_a_terminal(tiny: Path, tmp_path: Path) -> None:
    arguments = ["repl", "--model", str(tiny), "--max-new-tokens", "3", "--top-k", "8"]
    child = pexpect.spawn(
        str(ENTRY), arguments, env=environment(tmp_path), cwd=str(tmp_path), encoding="utf-8", timeout=60, dimensions=(50, 160)
    )
    transcript = (tmp_path / "transcript.txt").open("w", encoding="utf-8")
    child.logfile_read = transcript
    try:
        child.expect("help shows the commands")
        child.expect("nsp>")

        def typed(line: str, expected: str) -> None:
            child.send(line + "\r")
            child.expect(expected)
            child.expect("nsp>")

        typed("ablate all", "error: there is no circuit yet")
        typed(f"prompt {text(CLEAN)}", "next token")
        typed("dicsover", "did you mean 'discover'")
        typed("discover w3", "8 neurons for")
        typed("sweep top3", "perplexity")
        typed("save kept.json", "kept 8 units")
        child.send("ablate to\t")  # completion offers top5, top10, top20
        child.expect("top10")
        child.sendcontrol("c")  # takes the line back, not the session
        child.expect("nsp>")
        typed("load kept.json", "8 units of mlp_neurons")
        typed("ablate L1/N3", "unchanged")
        child.send("\x1b[A")  # the line before, from history
        child.expect("ablate L1/N3")
        child.send("\r")
        child.expect("unchanged")
        child.expect("nsp>")
        child.send("quit\r")
        child.expect(pexpect.EOF)
    finally:
        child.close()
        transcript.close()
    assert child.exitstatus == 0
    assert (tmp_path / "kept.json").is_file()
    history = next(tmp_path.rglob("repl_history")).read_text(encoding="utf-8")
    assert "+discover w3" in history
    assert "Traceback" not in (tmp_path / "transcript.txt").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_ctrl_d_ends_the_session(tiny: Path, tmp_path: Path) -> None:
    child = pexpect.spawn(str(ENTRY), ["repl", "--model", str(tiny)], env=environment(tmp_path), encoding="utf-8", timeout=60)
    child.expect("nsp>")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_lines_from_a_pipe(tiny: Path, tmp_path: Path) -> None:
    lines = f"prompt {text(CLEAN)}\nnonsense\nablate L0/N1\ninfo\n"
    made = subprocess.run(
        [str(ENTRY), "repl", "--model", str(tiny), "--max-new-tokens", "2"],
        input=lines, capture_output=True, text=True, env=environment(tmp_path), timeout=200, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "error: no command 'nonsense'" in made.stderr
    assert "circuit: none; discover finds one" in made.stdout
