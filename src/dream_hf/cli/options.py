"""Options that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

DRAFTERS = (
    "a folder or Hub id, demo (the bundled one), mtp (the head in the target's own files), retrieval, skip (the target without "
    "some layers), model:PATH (a smaller model), or several of these with + between them"
)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage of some commands fills a screen."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; `{self.prog} --help` shows the options\n")


def add_models(
    parser: argparse.ArgumentParser,
    *,
    is_target_needed: bool = True,
    is_drafter_needed: bool = False,
    drafter: str | None,
) -> None:
    """`--target`, `--drafter` and how to load them; `drafter` is the help text of that option, None where it is no option."""
    group = parser.add_argument_group("models")
    group.add_argument(
        "--target", required=is_target_needed, help='folder or Hub id of the target; "demo" is the bundled one'
    )
    if drafter is not None:
        group.add_argument("--drafter", required=is_drafter_needed, help=drafter)
    group.add_argument("--revision", help="revision of the target on the Hub")
    group.add_argument("--drafter-revision", help="revision of the drafter on the Hub")
    group.add_argument("--dtype", default="auto", help="auto (the target's own), float32, bfloat16 or float16")
    group.add_argument(
        "--device",
        help="cpu, cuda, cuda:1, ..., or auto to spread the target over all accelerators; by default the accelerator",
    )
    group.add_argument("--attn-implementation", help="the target's attention: sdpa, eager, flash_attention_2, ...")
    add_placement(group)


def add_placement(group: Any) -> None:
    """How the target is to fit into memory: `--target-quantization` and `--target-device-map`."""
    group.add_argument(
        "--target-quantization",
        metavar="BITS",
        help="4bit or 8bit: round the target's weights while they are loaded (extra `quantization`)",
    )
    group.add_argument(
        "--target-device-map",
        metavar="MAP",
        help="auto, balanced, balanced_low_0 or sequential: spread the target over devices, instead of --device",
    )


def add_compile(parser: Any) -> None:
    """`--compile`."""
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile decoding: the first answers wait for the compiler, later ones are faster, on accelerators several times",
    )


def draft_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of a drafter that arguments change."""
    return {"compile": True} if args.compile else {}


def load(args: argparse.Namespace) -> Any:
    """The models that the options of [`add_models`] name."""
    from ..load_models import load_models

    return load_models(
        args.target,
        args.drafter,
        dtype=args.dtype,
        device=args.device,
        revision=args.revision,
        drafter_revision=args.drafter_revision,
        attn_implementation=args.attn_implementation,
        quantization=args.target_quantization,
        device_map=args.target_device_map,
    )


def files_of_drafter(args: argparse.Namespace) -> tuple[Any, str | None]:
    """Where the drafter lies that arguments name, and its revision; `mtp` lies in the target's own files."""
    from ..drafters.detection import MTP
    from ..load_models import source_of

    if args.drafter == MTP:
        return source_of(args.target, "target"), args.drafter_revision or args.revision
    return source_of(args.drafter, "drafter"), args.drafter_revision


def load_dream(args: argparse.Namespace) -> Any:
    """The same, where the drafter has to be one of DREAM's."""
    from ..drafters.dream.drafter import DreamDrafter

    models = load(args)
    if models.drafter is not None and not isinstance(models.drafter, DreamDrafter):
        raise ValueError(
            f"`--drafter` ({args.drafter!r}) is a `{type(models.drafter).__name__}`, and `--tune` measures DREAM drafters "
            "only; without it any are measured."
        )
    return models


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def open_picture(path: str | Path, name: str) -> Any:
    """A picture of the user's; `name` is the option it came with."""
    from ..data.images import load_image

    try:
        return load_image(path)
    except (OSError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"`{name}` ({str(path)!r}) cannot be read as a picture: {reason}") from error


def whole_number(least: int) -> Any:
    """An argparse type: a whole number of at least `least`."""

    def parse(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return number

    parse.__name__ = "whole number"
    return parse


def quiet() -> None:
    """No progress bars and only errors from the libraries, for output that machines read."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
