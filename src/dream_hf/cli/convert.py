"""`dream-hf convert`."""

from __future__ import annotations

import argparse

HELP = "Turn a checkpoint in the layout that DREAM's authors published into a drafter."
EXAMPLE = (
    "dream-hf convert HideonBed12138/DREAM-llava-v1.6-vicuna-7b my-drafter --target llava-hf/llava-v1.6-vicuna-7b-hf"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dream-hf convert`."""
    parser.add_argument("source", help="folder or Hub id of the published checkpoint")
    parser.add_argument("destination", help="folder to write; DreamDrafter.from_pretrained loads it")
    parser.add_argument("--target", help="folder or Hub id of the target that it was trained for")
    parser.add_argument("--revision", help="revision of the source on the Hub")


def run(args: argparse.Namespace) -> None:
    """Convert, and say what became of every tensor."""
    from ..drafters.dream.conversion import convert_checkpoint

    print(convert_checkpoint(args.source, args.destination, target=args.target, revision=args.revision))
