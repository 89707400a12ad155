"""Every command that the documentation shows is one that hmdiff takes: parsed by the real parsers, files looked up.

Commands in code blocks must parse whole; those within a sentence may leave arguments out, but every command and option
in them must be there.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from hmdiff.cli.arguments import checkpoint_folder
from hmdiff.cli.main import Parser, _joined, build_parser, main
from hmdiff.files.resources import config_path

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = sorted([REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").glob("*.md")])
SHIPPED = ("hmdiff_small", "direct_small")
OURS = ("configs/", "tools/", "assets/", "examples/", "tests/")  # paths of the repository; others are the reader's
MADE = ("assets/occluded.jpg",)  # by the command itself
QUICK = {"info", "doctor"}  # commands that look and do nothing


def blocks(text: str) -> Iterator[str]:
    """Lines of the fenced blocks of a shell, continuation lines joined."""
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if kind in ("", "bash", "sh", "console"):
            yield from block.replace("\\\n", " ").splitlines()


def commands(line: str) -> Iterator[list[str]]:
    """Words of each command of a line that calls us: what precedes hmdiff or python is left out."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return
    found: list[str] = []
    for word in [*words, ";"]:
        if word in ("&&", "|", ";", ">", "2>&1"):
            yield from _ours(found)
            found = []
        else:
            found.append(word)


def _ours(words: list[str]) -> Iterator[list[str]]:
    while words and words[0] not in ("hmdiff", "python") and words[0].removesuffix(".py") == words[0]:
        words = words[1:]
    if words and (words[0] == "hmdiff" or words[0].startswith("tools/")):
        yield words
    elif words[:2] == ["python", "-m"] and words[2].startswith("tools."):
        yield words[1:]
    elif words[:1] == ["python"] and len(words) > 1 and words[1].startswith(("tools/", "examples/")):
        yield words[1:]


SHOWN = [
    (page.name, line.strip(), words) for page in PAGES for line in blocks(page.read_text()) for words in commands(line)
]
CALLS = [each for each in SHOWN if each[2][0] != "-m"]  # of hmdiff, tools/ and examples/
# tools.campaign.offline hands all its words to pytest: it would run the whole suite.
MODULES = [each[2] for each in SHOWN if each[2][0] == "-m" and each[2][1] != "tools.campaign.offline"]
MENTIONED = [
    (page.name, " ".join(code.split()))
    for page in PAGES
    for code in re.findall(
        r"`(?:uv run )?(hmdiff [^`]+)`", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    )
]


def test_the_pages_are_read() -> None:
    assert len(SHOWN) > 60 and len(MENTIONED) > 30


def arguments_of(words: list[str]) -> list[str]:
    if words[0].startswith("tools/"):  # three lines each onto the command of its name
        return [Path(words[0]).stem, *words[1:]]
    return words[1:]


def parsed(arguments: list[str]) -> argparse.Namespace:
    options, rest = build_parser().parse_known_args(_joined(arguments))
    assert not rest or hasattr(options, "overrides"), rest
    options.overrides = [*getattr(options, "overrides", []), *rest]
    assert all("=" in each and each[0] != "-" for each in options.overrides), options.overrides
    return options


@pytest.mark.parametrize(("page", "line", "words"), CALLS, ids=[f"{page}-{line[:50]}" for page, line, _ in CALLS])
def test_a_shown_command_parses(page: str, line: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for word in words:
        if word.startswith(OURS) and word not in MADE:
            assert (REPOSITORY / word).exists(), f"{page}: {line}: {word} is not there"
    if words[0].startswith("examples/"):
        return
    try:
        options = parsed(arguments_of(words))
    except SystemExit:
        pytest.fail(f"{page}: {line}: {capsys.readouterr().err}")
    check(page, line, options)


def check(page: str, line: str, options: argparse.Namespace) -> None:
    """Shipped names are shipped, configs there, and an installed checkpoint is not asked to be rewritten."""
    config = getattr(options, "config", None)
    for name in config if isinstance(config, list) else [config] if config else []:
        if len(Path(name).parts) == 1:
            assert config_path(name).is_file(), f"{page}: {line}: no config {name}"
    checkpoint = getattr(options, "checkpoint", None)
    for name in checkpoint if isinstance(checkpoint, list) else [checkpoint] if checkpoint else []:
        if isinstance(name, str) and name in SHIPPED:
            checkpoint_folder(name)
    if getattr(options, "what", None) == "temperature" and options.source in SHIPPED:
        assert options.output is not None, f"{page}: {line}: a shipped checkpoint needs --output"


def leaf(words: list[str]) -> tuple[Parser, list[str]]:
    """The parser of a (sub)command, and what follows it."""
    parser: argparse.ArgumentParser = build_parser()
    while words:
        nested = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
        if not nested or words[0] in ("NAME", "DATASET", "COMMAND", "--version", "--help"):
            break
        assert words[0] in nested[0].choices, f"no command {words[0]!r}"
        parser, words = nested[0].choices[words[0]], words[1:]
    assert isinstance(parser, Parser)
    return parser, words


@pytest.mark.parametrize(("page", "code"), MENTIONED, ids=lambda value: value if value.endswith(".md") else "")
def test_what_a_mentioned_command_names_is_there(page: str, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(code.replace("...", ""))[1:]
    parser, rest = leaf(words)
    known = set(parser._option_string_actions)
    if parser.prog.split()[-1] == "prepare":  # `prepare DATASET`: the options of any
        nested = next(each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
        known |= {name for each in nested.choices.values() for name in each._option_string_actions}
    for word in rest:
        if word.startswith("--"):
            assert word.split("=")[0] in known | {"--version"}, f"{page}: {code}: no option {word}"
    if words[:2] == ["prepare", "temperature"] and len(words) > 2:
        check(page, code, parsed(words))


@pytest.mark.parametrize("words", MODULES, ids=lambda words: words[1])
def test_a_shown_module_takes_its_arguments(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Parsed(Exception):
        pass

    taken = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        taken(self, *args, **kwargs)
        raise Parsed

    module = importlib.import_module(words[1])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr("sys.argv", words[1:])
    with pytest.raises(Parsed):
        module.main()


def quick(words: list[str]) -> bool:
    return words[0] == "hmdiff" and len(words) > 1 and (words[1] in QUICK or "--list" in words)


@pytest.mark.slow
@pytest.mark.parametrize("words", [each[2] for each in SHOWN if quick(each[2])], ids=" ".join)
def test_a_quick_command_runs(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments_of(words)) == 0


@pytest.mark.parametrize(
    "line", ["hmdiff sample a.jpg --no-such-option", "hmdiff sampel a.jpg", "hmdiff train --config x y"]
)
def test_a_wrong_command_is_found(line: str) -> None:
    (words,) = commands(line)
    with pytest.raises((SystemExit, AssertionError)):
        parsed(arguments_of(words))


def test_a_rewritten_installed_checkpoint_is_found() -> None:
    options = parsed(["prepare", "temperature", "hmdiff_small"])
    with pytest.raises(AssertionError, match="needs --output"):
        check("page", "line", options)
    with pytest.raises(AssertionError, match="no_such_config"):
        check("page", "line", parsed(["train", "--config", "no_such_config"]))
