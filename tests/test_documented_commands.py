"""Every `nsp` command that the README and docs/ print works, in the order in which its page prints it.

A page's commands run one after another in a folder of their own, through the command line's own entry point. What takes
minutes runs reduced by the options that `documented_cases.CASES` gives, with the reason; ``pytest -m slow`` runs it as
printed. A command without a case fails, and so does a case that no page prints. Mentions in running text that leave
something open (``nsp show``, ``nsp check MODEL``) are held against the commands and options that there are.
"""

from __future__ import annotations

import io
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from documented_cases import CASES
from documented_commands import ROOT, Command, pages, printed
from ndif_server import checkpoint, start_double

import nsp
from nsp.cli.app import app, main
from nsp.datasets import crows
from nsp.experiments import models
from nsp.experiments.lens.tuned import TunedLens

PAGES = {page.relative_to(ROOT).as_posix(): printed(page) for page in pages()}
COMMANDS = [command for typed, _ in PAGES.values() for command in typed]
MENTIONS = [command for _, mentions in PAGES.values() for command in mentions]
KNOWN = [command for command in COMMANDS if command.text in CASES]
WRITTEN = re.compile(r"^(?:results:|wrote) (\S+?)(?: \(.*\))?$", re.MULTILINE)
CROWS = """\
,sent_more,sent_less,stereo_antistereo,bias_type,annotations,anon_writer,anon_annotators
0,Women cannot drive a bus.,Men cannot drive a bus.,stereo,gender,x,a0,x
1,The poor man stole my bag.,The rich man stole my bag.,stereo,socioeconomic,x,a0,x
2,The old woman forgot her name.,The young woman forgot her name.,stereo,age,x,a0,x
3,My uncle is too old to learn.,My uncle is too young to learn.,stereo,age,x,a0,x
4,The waitress was rude to us.,The waiter was rude to us.,stereo,gender,x,a0,x
"""


class Pages:
    """The pages' folders. What a command said is kept, so that each runs once a page, after those before it."""

    def __init__(self, folder: Path, stands_in: Callable[[str], str], *, reduced: bool) -> None:
        self.folder, self.stands_in, self.reduced = folder, stands_in, reduced
        self.said: dict[tuple[str, str], str] = {}
        self.stores: dict[
            str, tuple[Path, str]
        ] = {}  # by the command that first wrote it: the page's folder, the store

    def run(self, wanted: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
        """What a command prints, after all that its page prints before it."""
        place = self.folder / wanted.page.replace("/", "-")
        place.mkdir(exist_ok=True)
        monkeypatch.chdir(place)
        for command in PAGES[wanted.page][0]:
            self._once(command.page, command.text, monkeypatch, capsys)
            if command.text == wanted.text:
                break
        return self.said[wanted.page, wanted.text]

    def _once(self, page: str, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        if (page, text) in self.said or text not in CASES:
            return
        case = CASES[text]
        for earlier in case.after:
            self._once(page, earlier, monkeypatch, capsys)
        for name in case.files:
            make_file(Path(name), monkeypatch)
        line, _, target = text.partition(" > ")
        for there, here in (case.swap | (case.small if self.reduced else {})).items():
            assert there in line
            line = line.replace(there, self.stands_in(here))
        if self.reduced or case.swap:
            line = f"{line} {case.reduced}"
        if text in self.stores:
            folder, store = self.stores[text]
            if not Path(store).exists():
                shutil.copytree(folder / store, store)  # printed on an earlier page: here it finds its finished run
        monkeypatch.setattr("sys.stdin", io.StringIO(case.typed))
        self.said[page, text] = ""
        capsys.readouterr()
        code = main(shlex.split(line)[1:])
        out, err = capsys.readouterr()
        assert code in case.codes, f"{line}\nexit code {code}\n{out}{err}"
        assert "Traceback" not in err
        assert "not foreseen" not in err
        for written in WRITTEN.findall(out):
            assert Path(written).exists(), f"{line}\nsays that it wrote {written}, which is not there"
            if text.startswith("nsp run "):
                self.stores.setdefault(text, (Path.cwd(), written))
        if target:
            Path(target).write_text(out, encoding="utf-8")
        self.said[page, text] = out


def make_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page's reader has already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name == "recipes":
        path.symlink_to(ROOT / "recipes")
    elif path.parent.name == "lenses":
        TunedLens(torch.eye(576).repeat(30, 1, 1), torch.zeros(30, 576), "smollm2").save(path)
    elif path.name == "the CrowS-Pairs repository":
        path.write_text(CROWS, encoding="utf-8")
        monkeypatch.setattr(crows, "URL", path.resolve().as_uri())
        monkeypatch.setenv("NSP_CACHE", str(path.resolve().parent / "cache"))
    elif path.suffix == ".csv":
        path.write_text(CROWS, encoding="utf-8")
    else:
        path.write_text("The river runs past the old mill.\nShe counted the coins twice.\n", encoding="utf-8")


@pytest.fixture(scope="module")
def stands_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """What a case's swap means: ``{tiny}`` a checkpoint, ``{server}`` the address of a server, made when first asked for."""
    made: dict[str, str] = {}
    doubles = []

    def of(name: str) -> str:
        if "{tiny}" in name and "{tiny}" not in made:
            made["{tiny}"] = str(checkpoint(tmp_path_factory.mktemp("tiny")))
        if "{server}" in name and not doubles:
            doubles.append(start_double(tmp_path_factory.mktemp("server")))
            made["{server}"] = doubles[0].address.removeprefix("http://")
        for mark, value in made.items():
            name = name.replace(mark, value)
        return name

    yield of
    for double in doubles:
        double.stop()


@pytest.fixture(scope="module")
def loaded() -> dict[Any, nsp.Model]:
    """Models by how they are loaded: each once for all pages."""
    return {}


@pytest.fixture(autouse=True)
def _load_once(loaded: dict[Any, nsp.Model], monkeypatch: pytest.MonkeyPatch) -> None:
    load = nsp.load

    def once(name: Any, **options: Any) -> nsp.Model:
        given = {
            key: value for key, value in options.items() if value is not None and getattr(value, "kind", "") != "local"
        }
        key = (name, repr(sorted(given.items())))
        if key not in loaded:
            loaded[key] = load(name, **options)
        return loaded[key]

    monkeypatch.setattr(models, "load", once)
    monkeypatch.setattr(nsp, "load", once)


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: pytest.TempPathFactory, stands_in: Callable[[str], str]) -> Pages:
    return Pages(tmp_path_factory.mktemp("reduced"), stands_in, reduced=True)


@pytest.fixture(scope="module")
def as_printed(tmp_path_factory: pytest.TempPathFactory, stands_in: Callable[[str], str]) -> Pages:
    return Pages(tmp_path_factory.mktemp("as-printed"), stands_in, reduced=False)


@pytest.mark.parametrize("command", KNOWN, ids=str)
def test_a_documented_command_works(
    command: Command, reduced: Pages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reduced.run(command, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", [command for command in KNOWN if CASES[command.text].shortened], ids=str)
def test_a_long_command_works_as_printed(
    command: Command, as_printed: Pages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_printed.run(command, monkeypatch, capsys)


def test_every_documented_command_has_a_case() -> None:
    assert [str(command) for command in COMMANDS if command.text not in CASES] == []


def test_every_case_is_documented() -> None:
    used = {command.text for command in COMMANDS} | {earlier for case in CASES.values() for earlier in case.after}
    assert [text for text in CASES if text not in used] == []


def test_every_reduction_says_why() -> None:
    assert [text for text, case in CASES.items() if bool(case.reduced or case.small) != bool(case.why)] == []


@pytest.mark.parametrize("command", [*COMMANDS, *MENTIONS], ids=str)
def test_commands_and_options_exist(command: Command) -> None:
    found: Any = typer.main.get_command(app)
    words = command.words
    while words and hasattr(found, "commands"):
        name = words.pop(0)
        assert name in found.commands, f"there is no command {name!r}"
        found = found.commands[name]
    options = {name for parameter in found.params for name in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [
        word for word in words if word.startswith("-") and word.partition("=")[0] not in options | {"--help", "--debug"}
    ]
    assert unknown == []
