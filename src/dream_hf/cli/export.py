"""`dream-hf export`."""

from __future__ import annotations

import argparse

from .options import add_models, load

HELP = "Write an EAGLE-3 drafter as vLLM and SGLang load it."
EXAMPLE = "dream-hf export my-eagle out --target llava-hf/llava-1.5-7b-hf --format speculators"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dream-hf export`."""
    parser.add_argument("drafter", help="folder or Hub id of an EAGLE-3 drafter")
    parser.add_argument("output", help="folder to write")
    parser.add_argument(
        "--format", choices=["speculators", "eagle3"], default="speculators",
        help="speculators (the default), or that of SafeAILab and SpecForge",
    )  # fmt: skip
    add_models(parser, drafter=None)


def run(args: argparse.Namespace) -> None:
    """Load the drafter for its target, and write it."""
    from ..drafters.eagle.export import export_drafter

    models = load(args)
    print(export_drafter(models.drafter, args.output, args.format, models.target))
