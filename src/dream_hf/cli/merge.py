"""`dream-hf merge`."""

from __future__ import annotations

import argparse

HELP = "Merge LoRA adapters into the drafter they were trained on, and write an ordinary drafter."
EXAMPLE = "dream-hf merge my-adapter merged-drafter --base my-drafter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dream-hf merge`."""
    parser.add_argument("adapters", help="folder of adapters, as `dream-hf train --use_lora true` writes it")
    parser.add_argument("destination", help="folder to write; new or empty")
    parser.add_argument(
        "--base", help="folder or Hub id of the drafter they were trained on; what they name by default"
    )
    parser.add_argument("--base-revision", help="revision of the base on the Hub")


def run(args: argparse.Namespace) -> None:
    """Merge, and say where the drafter is."""
    from ..load_models import source_of
    from ..training.merging import merge_adapters

    base = None if args.base is None else source_of(args.base, "drafter")
    folder = merge_adapters(args.adapters, args.destination, base, base_revision=args.base_revision)
    card = f" Its card is {folder / 'README.md'}." if (folder / "README.md").is_file() else ""
    print(f"Written: {folder}, a drafter like any other.{card}")
