"""What the REPL does, apart from the terminal: a line in, a reply out. A mistake is a reply too.

Every command is a call of the library: `nsp.experiments.discover` finds a circuit, `nsp.experiments.steering` ablates,
amplifies and sweeps it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import xarray as xr

from nsp.datasets.tokens import single_token, token_texts
from nsp.errors import InputError, NspError, suggestion
from nsp.experiments import discover
from nsp.experiments.circuits import Circuit, CircuitUnit
from nsp.experiments.functions import door
from nsp.experiments.steering.recipe import neuron_place
from nsp.experiments.steering.target import SCALE_MULTIPLIERS
from nsp.model import Model
from nsp.report.summary import Summary, SummaryTable

_TOP = re.compile(r"top(\d+)", re.IGNORECASE)
_ROWS, _NEXT = 10, 5
_TEXT = 200  # characters of a generated text that are shown


@dataclass(frozen=True)
class Reply:
    """What a command answers: sentences and tables, or what went wrong.

    Attributes:
        summary: what to show; ``error`` what was wrong instead; ``done`` whether the session ends.
    """

    summary: Summary | None = None
    error: str = ""
    done: bool = False


@dataclass(frozen=True)
class Command:
    """One command: what follows its name, and what it does in a few words."""

    usage: str
    meaning: str
    run: Callable[[str], Reply]


class Session:
    """A model, a prompt and a circuit, changed by commands.

    Attributes:
        prompt: the text at hand; ``circuit`` what was discovered or loaded; ``multiplier`` that of ``amplify``.
    """

    def __init__(self, model: Model, *, max_new_tokens: int = 20, top_k: int = 50, method: str = "relp") -> None:
        self.model = model
        self.max_new_tokens, self.top_k, self.method = max_new_tokens, top_k, method
        self.prompt = ""
        self.circuit: Circuit | None = None
        self.multiplier = 2.0
        self.commands: dict[str, Command] = {
            "prompt": Command("TEXT", "set the prompt, and show what the model says next", self._prompt),
            "discover": Command("[TARGET]", "find the neurons that carry the answer (or TARGET)", self._discover),
            "top": Command("[K]", "show the circuit's K strongest neurons", self._show_top),
            "ablate": Command("[WHAT]", "scale neurons to zero: L23/N8079, top10, or all of the circuit", self._ablate),
            "amplify": Command("[WHAT] [MULTIPLIER]", "scale neurons by the multiplier", self._amplify),
            "sweep": Command("[WHAT]", "scale neurons by several multipliers side by side", self._sweep),
            "multiplier": Command("[NUMBER]", "show or set the multiplier of amplify", self._multiplier),
            "save": Command("FILE", "keep the circuit as JSON", self._save),
            "load": Command("FILE", "take a circuit from JSON", self._load),
            "info": Command("", "show model, prompt and circuit", self._info),
            "help": Command("[COMMAND]", "show the commands", self._help),
            "quit": Command("", "end the session", lambda _rest: Reply(done=True)),
        }

    def handle(self, line: str) -> Reply:
        """Do what one line says. Whatever goes wrong is in the reply; nothing is raised but Ctrl-C."""
        word, _, rest = line.strip().partition(" ")
        if not word:
            return Reply()
        name = "quit" if word.lower() in ("exit", "q") else word.lower()
        command = self.commands.get(name)
        if command is None:
            return Reply(error=f"no command {word!r}{suggestion(name, self.commands) or '; help shows the commands'}")
        try:
            return command.run(rest.strip())
        except NspError as error:
            return Reply(error=str(error))
        except Exception as error:
            # The session holds what took minutes to find: it outlives whatever this is.
            return Reply(error=f"{type(error).__name__}: {str(error).strip() or 'no further message'} (this was not foreseen)")

    def completions(self, text: str) -> list[str]:
        """Words that may stand where the text ends: commands, then what the command takes."""
        words = text.split(" ")
        if len(words) == 1:
            return [name for name in self.commands if name.startswith(words[0].lower())]
        first, last = words[0].lower(), words[-1]
        if first in ("ablate", "amplify", "sweep"):
            known = ["all", "top5", "top10", "top20"] + ([self._name(unit) for unit in self.circuit.top(50)] if self.circuit else [])
        elif first == "help":
            known = list(self.commands)
        else:
            known = []
        return [name for name in dict.fromkeys(known) if name.lower().startswith(last.lower())]

    # --- commands ---------------------------------------------------------------------------------------------------

    def _prompt(self, rest: str) -> Reply:
        text = _unquoted(rest)
        if not text:
            raise InputError("prompt takes a text: prompt The capital of France is")
        self.model.encode(text)
        self.prompt = text
        with self.model.trace(text) as t:
            t.record("logits @ last")
            t.generate(self.max_new_tokens)
        log_p = torch.log_softmax(torch.as_tensor(t.results["logits"].values[0]).double(), dim=0)
        best = log_p.topk(_NEXT)
        texts = token_texts(self.model.tokenizer, best.indices.tolist())
        rows = tuple((repr(one), float(value.exp())) for one, value in zip(texts, best.values, strict=True))
        tables = (SummaryTable("next token", ("token", "probability"), rows),)
        lost = ("the circuit of the prompt before is kept; discover finds this one's",) if self.circuit else ()
        return Reply(Summary(f"prompt {text!r}", (f"continues: {_shown(t.results['text'].item())}", *lost), tables))

    def _discover(self, rest: str) -> Reply:
        prompt = self._needs_prompt()
        target = self._target(rest) if rest else None
        self.circuit = discover(self.model, prompt, target=target, method=self.method, top_k=self.top_k)
        title = f"{len(self.circuit)} neurons for {self.circuit.target!r}"
        if self.circuit.counterfactual:
            title += f" over {self.circuit.counterfactual!r}"
        lines = (f"{self.circuit.metric} {self.circuit.metric_value:.3f}; contributions by {self.method}",)
        return Reply(Summary(title, lines, (self._neurons(_ROWS),)))

    def _show_top(self, rest: str) -> Reply:
        self._needs_circuit()
        count = _whole(rest, "top") if rest else _ROWS
        return Reply(Summary("", (), (self._neurons(count),)))

    def _ablate(self, rest: str) -> Reply:
        return self._steered(self._chosen(rest or "all"), (0.0,), f"ablate {rest or 'all'}")

    def _amplify(self, rest: str) -> Reply:
        words = rest.split()
        factor = self.multiplier
        if words and (number := _number(words[-1])) is not None:
            factor = number
            words = words[:-1]
        what = " ".join(words) or "all"
        return self._steered(self._chosen(what), (factor,), f"amplify {what} {factor:g}")

    def _sweep(self, rest: str) -> Reply:
        return self._steered(self._chosen(rest or "all"), SCALE_MULTIPLIERS, f"sweep {rest or 'all'}")

    def _multiplier(self, rest: str) -> Reply:
        if rest:
            number = _number(rest)
            if number is None:
                raise InputError(f"multiplier takes a number, such as 2.5; got {rest!r}")
            self.multiplier = number
        return Reply(Summary(f"multiplier {self.multiplier:g}"))

    def _save(self, rest: str) -> Reply:
        path = _path(rest, "save")
        circuit = self._needs_circuit()
        try:
            circuit.save(path)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from None
        return Reply(Summary(f"kept {len(circuit)} units in {path}"))

    def _load(self, rest: str) -> Reply:
        circuit = Circuit.load(_path(rest, "load"))
        layers, units = self.model.geometry.n_layers, self.model.geometry.unit_count(circuit.component)
        for unit in circuit:
            if unit.layer >= layers or unit.unit >= units:
                raise InputError(f"the circuit has {_named(circuit, unit)}; {self.model.name} has {layers} layers of {units} units")
        self.circuit = circuit
        said = [f"found on {circuit.prompt!r}"] if circuit.prompt else []
        if circuit.prompt and not self.prompt:
            self.prompt = circuit.prompt
            said.append("its prompt is the prompt now")
        return Reply(Summary(f"{len(circuit)} units of {circuit.component}", tuple(said), (self._neurons(_ROWS),)))

    def _info(self, _rest: str) -> Reply:
        circuit = "none; discover finds one" if self.circuit is None else f"{len(self.circuit)} units for {self.circuit.target!r}"
        lines = (
            f"prompt: {self.prompt!r}" if self.prompt else "prompt: none",
            f"circuit: {circuit}",
            f"multiplier {self.multiplier:g}, {self.max_new_tokens} tokens generated, attribution {self.method}",
        )
        return Reply(Summary(repr(self.model), lines))

    def _help(self, rest: str) -> Reply:
        name = rest.lower()
        if name and name not in self.commands:
            raise InputError(f"no command {rest!r}{suggestion(name, self.commands)}")
        chosen = {name: self.commands[name]} if name else self.commands
        rows = tuple((f"{key} {command.usage}".strip(), command.meaning) for key, command in chosen.items())
        return Reply(Summary("", (), (SummaryTable("commands", ("command", "what it does"), rows),)))

    # --- parts ------------------------------------------------------------------------------------------------------

    def _steered(self, circuit: Circuit, multipliers: tuple[float, ...], title: str) -> Reply:
        prompt = self._needs_prompt()
        answer = [self.circuit.target] if self.circuit is not None and self._is_token(self.circuit.target) else []
        tree = door("steering")(
            self.model, [prompt], circuit=circuit, multipliers=multipliers, tokens=answer, decoding=self._decoding()
        )
        effects, made = _parts(tree)
        answered = tree["effects/tokens"].to_dataset()["prob"].values if answer else None
        rows = []
        for row, multiplier in enumerate(made["multiplier"].values.tolist()):
            name = "unchanged" if multiplier == 1.0 and 1.0 not in multipliers else f"{multiplier:g}"
            cells: list[object] = [name]
            if answered is not None:
                cells.append(float(answered[0, row, 0]))
            token, probability = _next(effects, row)[0]
            cells += [f"{token} {probability:.3f}", float(made["perplexity"].values[row]), _shown(made["text"].values[row])]
            rows.append(tuple(cells))
        columns = ("multiplier", *(f"P({text!r})" for text in answer), "next token", "perplexity", "text")
        lines = (f"{len(circuit.unique_neurons())} unit(s), at every position, after {_shown(prompt)}",)
        return Reply(Summary(title, lines, (SummaryTable("", columns, tuple(rows)),)))

    def _chosen(self, what: str) -> Circuit:
        """The units that a command names: ``all``, ``top10``, or neurons such as ``L23/N8079``."""
        if what.lower() == "all":
            return self._needs_circuit()
        if match := _TOP.fullmatch(what):
            count = int(match[1])
            if count < 1:
                raise InputError("top0 names no neuron; write top10")
            return self._needs_circuit().top(count)
        geometry, units = self.model.geometry, []
        for name in what.replace(",", " ").split():
            try:
                layer, unit = neuron_place(name)
            except ValueError:
                raise InputError(f"{name!r} is neither all, nor top10, nor a neuron such as L2/N345") from None
            if layer >= geometry.n_layers or unit >= geometry.d_mlp:
                raise InputError(
                    f"{self.model.name} has no neuron {name}; layers are 0 to {geometry.n_layers - 1}, neurons 0 to {geometry.d_mlp - 1}"
                )
            units.append(CircuitUnit(layer, None, unit, 0.0))
        return Circuit(tuple(dict.fromkeys(units)))

    def _target(self, rest: str) -> str:
        text = _unquoted(rest)
        if text != rest:
            return text
        # An answer inside a sentence begins with a space, which nobody types.
        for spelling in (f" {text}", text):
            if self._is_token(spelling):
                return spelling
        single_token(self.model.tokenizer, text, what="target")
        return text

    def _is_token(self, text: str) -> bool:
        try:
            single_token(self.model.tokenizer, text)
        except InputError:
            return False
        return True

    def _needs_prompt(self) -> str:
        if not self.prompt:
            raise InputError("there is no prompt yet: prompt The capital of France is")
        return self.prompt

    def _needs_circuit(self) -> Circuit:
        if self.circuit is None or not len(self.circuit):
            raise InputError("there is no circuit yet: discover finds one, load takes one from a file; or name a neuron, such as L2/N345")
        return self.circuit

    def _decoding(self) -> dict[str, int]:
        return {"max_new_tokens": self.max_new_tokens}

    def _name(self, unit: CircuitUnit) -> str:
        return _named(self._needs_circuit(), unit)

    def _neurons(self, count: int) -> SummaryTable:
        circuit = self._needs_circuit().top(count)
        rows = tuple((self._name(unit), "every" if unit.position is None else unit.position, unit.value, unit.label) for unit in circuit)
        return SummaryTable(f"the {len(circuit)} strongest of {len(self._needs_circuit())}", ("unit", "position", "contribution", "label"), rows)


def _parts(tree: xr.DataTree) -> tuple[xr.Dataset, xr.Dataset]:
    """The next-token effects and the texts of a run of one prompt."""
    effects = tree["effects/next_token"].to_dataset().isel(prompt=0)
    return effects, tree["generations"].to_dataset().isel(prompt=0)


def _next(effects: xr.Dataset, direction: int) -> tuple[tuple[str, float], ...]:
    one = effects.isel(direction=direction)
    return tuple((repr(str(text)), float(prob)) for text, prob in zip(one["top_text"].values, one["top_prob"].values, strict=True))


def _named(circuit: Circuit, unit: CircuitUnit) -> str:
    return f"L{unit.layer}/{'N' if circuit.component == 'mlp_neurons' else 'H'}{unit.unit}"


def _shown(text: object) -> str:
    said = str(text)
    return repr(said if len(said) <= _TEXT else f"{said[:_TEXT]}…")


def _unquoted(text: str) -> str:
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if quoted else text


def _number(text: str) -> float | None:
    try:
        found = float(text)
    except ValueError:
        return None
    return found if abs(found) < float("inf") else None


def _whole(text: str, command: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"{command} takes a whole number from 1 up, not {text!r}")
    return int(text)


def _path(rest: str, command: str) -> Path:
    name = _unquoted(rest)
    if not name:
        raise InputError(f"{command} takes a file: {command} circuit.json")
    return Path(name).expanduser()
