"""Reading the command, running it, and turning what the user can mend into one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from ..version import __version__
from . import attach, bench, convert, demo, export, generate, info, merge, probe, push, regenerate, serve, train
from .options import Parser

COMMANDS: dict[str, ModuleType] = {
    "demo": demo,
    "generate": generate,
    "bench": bench,
    "train": train,
    "regenerate": regenerate,
    "convert": convert,
    "merge": merge,
    "push": push,
    "export": export,
    "info": info,
    "probe": probe,
    "attach": attach,
    "serve": serve,
}
USER_ERRORS = (ValueError, TypeError, OSError, ImportError)
TRACEBACK = "DREAM_HF_TRACEBACK"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dream-hf`; returns the exit code: 0, or 2 after an error of the user's."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["train"]:  # its flags are those of a dataclass that is costly to import
        name: str | None = "train"
        given: Any = arguments[1:]
    else:
        given = parse(arguments)
        name = given.command
    if name is None:
        make_parser().print_help()
        return 0
    try:
        COMMANDS[name].run(given)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except USER_ERRORS as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"dream-hf {name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command and its options; what no option takes is refused by the command it was given to."""
    parser = make_parser()
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        owner = given.owner if arguments[0] in COMMANDS else parser
        owner.error(f"unrecognized arguments: {' '.join(unknown)}")
    return given


def make_parser() -> Parser:
    """The parser of all commands but `train`, which reads its own arguments."""
    parser = Parser(
        prog="dream-hf",
        allow_abbrev=False,
        description="Speculative decoding for vision-language models: the target's own output, several tokens at a time.",
        epilog="`dream-hf COMMAND --help` shows a command's options and an example. Set DREAM_HF_TRACEBACK=1 to see "
        "where an error comes from.",
    )
    parser.add_argument("--version", action="version", version=f"dream-hf {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.set_defaults(owner=command)
        module.add_arguments(command)
    return parser
