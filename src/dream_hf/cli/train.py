"""`dream-hf train`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .train_parser import TrainParser

HELP = "Train a drafter for a target, from flags or one YAML recipe."
EXAMPLE = (
    "dream-hf train recipe.yaml\n"
    "  dream-hf train recipe.yaml --output_dir runs/second --learning_rate 5e-5  # flags win over the recipe\n"
    "  dream-hf train --target llava-hf/llava-v1.6-vicuna-7b-hf --train_dataset answers.jsonl --output_dir my-drafter\n"
    "  accelerate launch -m dream_hf train recipe.yaml"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing: `dream-hf train` reads its own arguments, see [`parse`]."""


def run(arguments: Sequence[str]) -> None:
    """Train, save, and report the last evaluation."""
    given, training_args = parse(arguments)
    from ..training.run import run_training

    run_training(given, training_args, tell=print)


def parse(arguments: Sequence[str]) -> tuple[Any, Any]:
    """`ModelDataArguments` and `DreamTrainingArguments` from flags, a YAML file, or both."""
    from .train_parser import TrainParser

    parser = TrainParser(
        description=HELP + " The first argument may be a YAML file that maps names of options to values.",
        epilog=f"example:\n  {EXAMPLE}",
    )
    arguments = list(arguments)
    if arguments[:1] == ["--config"]:
        arguments.pop(0)
    if arguments and not arguments[0].startswith("-"):
        _apply_recipe(parser, Path(arguments.pop(0)))
    given, training_args, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return given, training_args


def _apply_recipe(parser: TrainParser, path: Path) -> None:
    """Take the values of a YAML file as defaults, so that flags win over them."""
    values = read_recipe(path)
    actions = parser.options
    unknown = sorted(values.keys() - actions.keys())
    if unknown:
        raise ValueError(f"`recipe` ({path}) has {unknown}, which are no options; see `dream-hf train --help`.")
    for name, value in values.items():
        action = actions[name]
        # Plain text goes through the option's own type, as a flag would; YAML reads 3e-5 as text, for one.
        convert: Any = action.type if isinstance(value, str) and action.type is not None else lambda same: same
        try:
            action.default = convert(value)
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"`{name}` ({value!r}) in {path.name} cannot be read: {error}") from error
        action.required = False


def read_recipe(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        import yaml
    except ImportError as error:
        raise ImportError("Recipes need PyYAML: `pip install pyyaml`.") from error
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"`recipe` ({str(path)!r}) cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`recipe` ({str(path)!r}) is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"`recipe` ({str(path)!r}) must map names of options to values.")
    return values
