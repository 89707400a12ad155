"""The command `hmdiff`: runs a subcommand, and reports user errors as one line with exit code 2.

Each subcommand is a file of `hmdiff.cli` with `add_parser` and `run`. Heavy imports wait until a subcommand runs, so
that `hmdiff --help` is quick. Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from hmdiff import __version__
from hmdiff.errors import UserError

COMMANDS = (
    "demo",
    "sample",
    "view",
    "export",
    "heatmaps",
    "stress",
    "train",
    "evaluate",
    "sweep",
    "ablate",
    "bench",
    "info",
    "card",
    "prepare",
    "doctor",
)
TRACEBACK_VARIABLE = "HMDIFF_TRACEBACK"  # any value: print tracebacks


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, defaults in the help, and examples printed verbatim."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"hmdiff: error: {_one_line(message)} (see {self.prog} --help)\n")


def build_parser() -> Parser:
    parser = Parser(
        prog="hmdiff",
        description="Human mesh recovery by reverse diffusion: several 3D bodies of every person in a photo.",
        epilog="Start with: hmdiff demo",
    )
    parser.add_argument("--version", action="version", version=f"hmdiff {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for name in COMMANDS:
        import_module(f"hmdiff.cli.{name}").add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code. Only argparse raises `SystemExit` (--help, wrong arguments)."""
    parser = build_parser()
    arguments = _joined(sys.argv[1:] if arguments is None else arguments)
    for text in arguments:
        if not text or _NO_VALUE.fullmatch(text):
            parser.error(f"{text or 'an argument'} is empty; leave it out, or give a value")
    options, rest = parser.parse_known_args(arguments)
    if rest:
        # Accept key=value after options too; argparse accepts positionals in one place only.
        if not hasattr(options, "overrides") or any(text.startswith("-") for text in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        options.overrides = [*options.overrides, *rest]
    try:
        return options.run(options) or 0
    except UserError as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        print("hmdiff: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `hmdiff info ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = str(error.filename or "a file")
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            why = "no space left on the disk; nothing already saved was touched: free some, run again"
            return _failed(f"{where}: {why}")
        if error.errno is None or not error.filename:  # not about a user's file
            raise
        from hmdiff.files.reading import read_failure

        return _failed(str(read_failure(where, error)))
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        return _failed("not enough memory; ask for fewer hypotheses or people, a smaller batch, or another --device")


def _joined(arguments: Sequence[str]) -> list[str]:
    """`--box -3,1,5,9` as `--box=-3,1,5,9`: argparse takes a leading minus for an option."""
    found: list[str] = []
    for text in arguments:
        if found and found[-1].startswith("--") and "=" not in found[-1] and _NEGATIVE.fullmatch(text):
            found[-1] += f"={text}"
        else:
            found.append(text)
    return found


_NO_VALUE = re.compile(r"--[a-z-]+=")
_NEGATIVE = re.compile(r"-[\d.][^,]*(,[^,]*)+")


def _out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _failed(message: str) -> int:
    if os.environ.get(TRACEBACK_VARIABLE):
        traceback.print_exc()
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()
    report(message)
    return 2


def report(message: str) -> None:
    """Print an error: one line on stderr. An active progress bar continues below it."""
    _line(f"hmdiff: error: {_one_line(message)}")


def warn(message: str) -> None:
    """Print a warning about something fixed, skipped or doubtful: one line on stderr; the command continues."""
    _line(f"hmdiff: warning: {_one_line(message)}")


def _line(text: str) -> None:
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr)


def _one_line(message: str) -> str:
    return " ".join(message.split())


if __name__ == "__main__":
    sys.exit(main())
