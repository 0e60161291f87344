"""`dream-hf attach`."""

from __future__ import annotations

import argparse

from .options import add_compile, draft_settings, files_of_drafter

HELP = "Write a target's folder with a drafter in it, which `transformers serve` and others then decode with."
EXAMPLE = (
    "dream-hf attach llava-hf/llava-v1.6-vicuna-7b-hf my-drafter llava-with-drafter\n"
    "  transformers serve llava-with-drafter --trust-remote-code"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dream-hf attach`."""
    parser.add_argument("target", help='folder or Hub id of the target; "demo" is the bundled one')
    parser.add_argument(
        "drafter", help='folder or Hub id of a drafter of any kind; "demo" is the bundled one, "mtp" the target\'s own'
    )
    parser.add_argument("folder", help="folder to write")
    parser.add_argument("--revision", help="revision of the target on the Hub")
    parser.add_argument("--drafter-revision", help="revision of the drafter on the Hub")
    parser.add_argument("--copy", action="store_true", help="copy the files instead of linking to them")
    add_compile(parser)


def run(args: argparse.Namespace) -> None:
    """Write the folder, and say how to use it."""
    from ..hub.attaching import attach
    from ..load_models import source_of

    target, (drafter, drafter_revision) = source_of(args.target, "target"), files_of_drafter(args)
    folder = attach(
        target,
        drafter,
        args.folder,
        revision=args.revision,
        drafter_revision=drafter_revision,
        copies=args.copy,
        settings=draft_settings(args),
    )
    print(f"Written: {folder}. Whatever loads it with trust_remote_code=True decodes with the drafter, for instance:")
    print(f"  transformers serve {folder} --trust-remote-code")
