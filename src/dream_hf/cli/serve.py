"""`dream-hf serve`."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from pathlib import Path

from .options import add_compile, add_models, draft_settings, files_of_drafter

HELP = "Serve a target with a drafter: transformers' own server, with an API like OpenAI's."
EXAMPLE = (
    "dream-hf serve --target llava-hf/llava-v1.6-vicuna-7b-hf --drafter my-drafter --port 8000\n"
    "  dream-hf serve --target demo --drafter demo  # then: POST http://localhost:8000/v1/chat/completions"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dream-hf serve`."""
    add_models(
        parser,
        is_drafter_needed=True,
        drafter='folder or Hub id of a drafter; "demo" is the bundled one, "mtp" the target\'s own',
    )
    add_compile(parser)
    parser.add_argument("--host", default="localhost", help="address to listen at (localhost)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (8000)")
    parser.add_argument("--log-level", default="info", help="info shows the tokens and tau of each answer (info)")


def run(args: argparse.Namespace) -> None:
    """Serve until interrupted."""
    from transformers.cli.serve import Serve

    from ..hub.attaching import attach
    from ..load_models import source_of
    from ..targets.quantized import check_quantization

    if args.target_quantization is not None:
        check_quantization(args.target_quantization)
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("dream_hf").setLevel(args.log_level.upper())
    target, (drafter, drafter_revision) = source_of(args.target, "target"), files_of_drafter(args)
    # The server calls a model by the path that it finds it under, and clients have to.
    name = Path(args.target).resolve().name if Path(args.target).is_dir() else args.target
    with tempfile.TemporaryDirectory(prefix="dream-hf-") as place:
        attach(
            target,
            drafter,
            Path(place, name),
            revision=args.revision,
            drafter_revision=drafter_revision,
            settings=draft_settings(args),
        )
        os.chdir(place)
        Serve(
            force_model=name,
            trust_remote_code=True,  # which is ours, just written
            host=args.host,
            port=args.port,
            dtype=args.dtype,
            device=args.target_device_map or args.device or "auto",
            quantization=None if args.target_quantization is None else f"bnb-{args.target_quantization}",
            attn_implementation=args.attn_implementation,
            log_level="warning",
        )
