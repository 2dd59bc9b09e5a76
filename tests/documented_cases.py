"""How each documented command is tried: see `test_documented_commands.py`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """How a printed command is tried.

    Attributes:
        reduced: options that the default test run adds, and ``why`` it does not run the command as printed.
        files: what the reader has (see `test_documented_commands.make_file`).
        small: what stands in the command in place of something large in the default test run, by the printed text.
        swap: what stands in place of something that only a reader has, in both runs. ``{tiny}`` is a tiny checkpoint,
            ``{server}`` the address of a server that speaks NDIF's protocol.
        after: commands that the page takes for granted.
        typed: what is typed into it.
        codes: the exit codes that are right.
    """

    reduced: str = ""
    why: str = ""
    files: tuple[str, ...] = ()
    small: dict[str, str] = field(default_factory=dict)
    swap: dict[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    typed: str = ""
    codes: tuple[int, ...] = (0,)

    @property
    def shortened(self) -> bool:
        """Whether the default test run leaves something out that can be run."""
        return bool(self.small or self.reduced) and not self.swap


_HEADS = "--set layers=22:24 --set statistics.resamples=99"
_QUESTION = (
    "--set prompts.size=1 --set methods=[relp] --set verify.exact=top --set verify.top=5 --set verify.ablations=[mean] "
    "--set verify.sizes=[0.01,1] --set verify.curve_draws=0 --set verify.draws=1"
)
_SCAN = "--set pairs.num_prompts=4 --set components=[mlp_out] --set layers=[11,12]"
_FIVE = (
    """--set 'positive=["Who are you?", "Where are you?", "How are you?", "What is it?", "Why not?"]' """
    """--set 'negative=["I am here.", "You are there.", "It is late.", "We are two.", "So what."]' """
    "--set positions=2 --set layers=[10]"
)
_EIGHT = """--set 'harmful_txt=["Steal it", "Break it", "Hit him", "Cheat her"]' --set 'normal_txt=["Buy it", "Mend it", "Help him", "Thank her"]'"""
_CELL = "--set sources.entities=[Paris] --set generation.max_new_tokens=3"
_WORDS = '--set \'pairs=[{clean: "w5 w11 w23", corrupt: "w5 w11 w50", answer: w4, distractor: w9}]\''
_STORE = {"STORE": "runs/ioi.zarr"}
_SERVED = {"gpt2": "{tiny}", "ndif://127.0.0.1:8001": '\'{kind: ndif, host: "http://{server}", model: "{tiny}"}\''}
_NO_HUB = "the tests reach no hub: a model that is here stands in, with words that it knows"

CASES: dict[str, Case] = {
    "nsp run recipes/ioi.yaml": Case(files=("recipes",)),
    "nsp run ioi": Case(),
    "nsp run ioi-heads": Case("--set layers=22:24", "half a minute: two layers' heads"),
    "nsp run ioi-set": Case(f"--set pairs.size=4 {_HEADS}", "two minutes: four pairs, two layers' heads"),
    "nsp run layer-recovery": Case("--set pairs.size=2 --set layers=[3,20]", "20 s: two pairs, two layers"),
    "nsp run causal-tracing": Case(
        "--set limit=1 --set noise.draws=1 --set layers=[5,20]", "six minutes: one fact, one draw of noise, two layers"
    ),
    "nsp run path-patching": Case(
        "--set pairs.size=1 --set 'senders=[\"z[22][*]\"]'", "a minute: one pair, one layer's heads"
    ),
    "nsp run direction": Case(
        f"{_FIVE} --set generate.max_new_tokens=2", "minutes: five prompts a set, one layer, replies of two tokens"
    ),
    "nsp run refusal": Case(
        f"{_FIVE} --set generate.max_new_tokens=2 --set patch.components=[resid_post] --set patch.layers=[12] --set patch.pairs=1",
        "four minutes: five prompts a set, one layer, replies of two tokens, sites of one pair",
    ),
    "nsp run refusal --set model=OWNER/NAME": Case(
        f"{_FIVE} --set generate=null --set patch=null",
        "minutes, and of a model of the reader's: smollm2 stands in",
        swap={"OWNER/NAME": "smollm2"},
    ),
    "nsp run neuron-circuit": Case(_QUESTION, "six minutes: one question, one method, the strongest neurons patched"),
    "nsp run contrast": Case("--set components=[resid_post] --set layers=[10,14]", "two layers of one component"),
    "nsp run steering": Case(
        "--set multipliers=[2] --set decoding.max_new_tokens=4", "a minute: one strength, four tokens"
    ),
    "nsp run patchscope": Case(
        f"{_CELL} --set layers=[2] --set target_layers=[2]", "minutes: one entity, one cell of the grid, three tokens"
    ),
    "nsp run patchscope --set preset=quick --set layers=all --set target_layers=all --out runs/quick.zarr": Case(
        f"{_CELL} --set templates=[few_shot] --set controls=[]", "minutes: one entity, one template, three tokens"
    ),
    "nsp run logit-lens": Case("--set layers=[5,20,29]", "ten seconds: three layers"),
    "nsp run logit-lens --set method=patchscope --out runs/patchscope-lens.zarr": Case(
        "--set layers=[5,20]", "a minute: two layers"
    ),
    "nsp run logit-lens --set method=tuned --set weights=lenses/smollm2 --out runs/tuned-lens.zarr": Case(
        files=("lenses/smollm2",)
    ),
    "nsp run logit-attribution": Case(),
    "nsp run logit-attribution --set by=neuron --out runs/neurons.zarr": Case(),
    "nsp run bias-scan": Case(
        f"{_SCAN} --set neurons.prompts=2 --set neurons.layer=12 --set alignment=null",
        "four minutes: two pairs, two layers",
    ),
    "nsp run bias-scan --set models.aligned=NAME --set models.base=NAME --set 'ablate=[]' --out runs/two-models.zarr": Case(
        f"{_SCAN} --set alignment=null --set neurons=null",
        "minutes, and of two models of the reader's: smollm2 stands in for both",
        swap={"NAME": "smollm2"},
    ),
    "nsp run bias-scan-crows --set pairs.path=crows.csv": Case(
        f"{_SCAN} --set neurons=null --set alignment=null", "minutes: two pairs, two layers", files=("crows.csv",)
    ),
    "nsp run bias-scan-crows --set pairs.path=crows_pairs_anonymized.csv": Case(
        f"{_SCAN} --set neurons=null --set alignment=null",
        "minutes: two pairs, two layers",
        files=("crows_pairs_anonymized.csv",),
    ),
    "nsp data pull crows-pairs": Case(files=("the CrowS-Pairs repository",)),
    "nsp run alignment-scan": Case(_EIGHT, "half a minute: eight prompts"),
    "nsp export runs/bias-scan.zarr --csv tables": Case(),
    "nsp run capture": Case(),
    "nsp run capture --set prompts.path=mine.txt --set keep=summary --out runs/mine.zarr": Case(files=("mine.txt",)),
    "nsp run capture --store-dtype float16 --out runs/half.zarr": Case(),
    "nsp run mean-activations": Case(),
    "nsp run mean-activations --set components=mlp_neurons --set drop_first=1 --out runs/means.zarr": Case(),
    "nsp run ioi --dry-run": Case(),
    "nsp run ioi --set layers=0:6 --set mode=noising --out runs/early.zarr": Case(),
    "nsp run ioi --set model=gpt2 --out runs/gpt2.zarr": Case(_WORDS, _NO_HUB, swap={"gpt2": "{tiny}"}),
    "nsp run ioi --backend local-sim": Case("--set layers=[20]", "half a minute: one layer"),
    "nsp run ioi --set model=gpt2 --backend ndif://127.0.0.1:8001 --out runs/remote.zarr": Case(
        _WORDS, _NO_HUB, swap=_SERVED
    ),
    "nsp run ioi --backend ndif://127.0.0.1:8001 --set model=gpt2 --detach": Case(_WORDS, _NO_HUB, swap=_SERVED),
    "nsp jobs runs/ioi.zarr": Case(),
    "nsp jobs runs/ioi.zarr --collect": Case(),
    "nsp jobs": Case(),
    "nsp run ioi --backend ndif://127.0.0.1:8001 --set model=gpt2": Case(_WORDS, _NO_HUB, swap=_SERVED),
    "nsp status --backend ndif://127.0.0.1:8001": Case(swap={"127.0.0.1:8001": "{server}"}),
    "nsp status --backend ndif://host:port": Case(swap={"host:port": "{server}"}),
    "nsp jobs runs/remote.zarr": Case(),
    "nsp run ioi-set --set pairs.size=12": Case(_HEADS, "20 s: two layers' heads"),
    "nsp show runs/ioi.zarr": Case(),
    "nsp plot runs/ioi.zarr": Case(),
    "nsp plot runs/ioi.zarr --out docs/images/ioi.png": Case(after=("nsp run ioi",)),
    "nsp plot runs/ioi-set.zarr --what bars -o bars.png": Case(),
    "nsp report runs/ioi.zarr": Case(),
    "nsp report runs/ioi-set.zarr -o report.html": Case(),
    "nsp report runs/logit-lens.zarr -o lens.html": Case(),
    "nsp report runs/ioi-set.zarr runs/layer-recovery.zarr -o compared.html": Case(after=("nsp run layer-recovery",)),
    "nsp plot STORE": Case(swap=_STORE, after=("nsp run ioi",)),
    "nsp plot STORE --what bars -o bars.pdf": Case(swap=_STORE),
    "nsp plot STORE -o figure.html": Case(swap=_STORE),
    "nsp plot runs/ioi-set.zarr --pair mean -o docs/images/heads.png": Case(),
    "nsp plot runs/logit-lens.zarr -o docs/images/lens.png": Case(),
    "nsp ls runs": Case(),
    "nsp repl": Case(typed="prompt The capital of France is\nquit\n"),
    "nsp repl --model smollm2": Case(typed="prompt The capital of France is\nquit\n"),
    "nsp doctor": Case(codes=(0, 1)),
    "nsp recipes": Case(),
    "nsp recipes ioi": Case(),
    "nsp recipes ioi > mine.yaml": Case(),
    "nsp run mine.yaml --out runs/mine.zarr": Case(),
    "nsp run ioi-set --set pairs.size=100 --dry-run": Case("--set pairs.size=4", "a set of 100 pairs is made: four"),
    "nsp plot runs/ioi.zarr --out ioi.png": Case(),
    "nsp report runs/ioi.zarr -o ioi.html": Case(),
    "nsp validate runs/ioi.zarr --deep": Case(after=("nsp run ioi",)),
    "nsp rerun runs/ioi.zarr": Case(),
    "nsp export runs/ioi.zarr --zip -o ioi.zip": Case(),
    "nsp export runs/ioi.zarr --csv tables": Case(),
    "nsp check smollm2": Case(why="half a minute: a tiny model", small={"smollm2": "{tiny}"}),
    "nsp schema -o recipe.schema.json": Case(),
    "nsp models list": Case(),
}
"""By the command as it is printed, comment and prompt left out."""
