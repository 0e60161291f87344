"""`dream-hf probe`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .options import add_json, add_models, load, quiet, whole_number

HELP = (
    "Ask a target how well a drafter foretells it, and how an EAGLE or DFlash drafter or an MTP head is to be wired."
)
EXAMPLE = "dream-hf probe demo --target demo --num-tokens 60"
PROMPTS_OF_A_TASK = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dream-hf probe`."""
    parser.add_argument("drafter", help='folder or Hub id; "demo" is the bundled one, "mtp" the target\'s own')
    add_models(parser, drafter=None)
    parser.add_argument(
        "--task",
        help="what to ask the target, as for `dream-hf bench --tasks`; by default the demo's pictures, and where the target "
        "reads none, nothing: it writes texts of its own",
    )
    parser.add_argument(
        "--num-tokens", type=whole_number(3), default=200, help="tokens of the target's that decide (default: 200)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Probe, and tell every wiring that was tried."""
    if args.json:
        quiet()
    from ..load_models import probe_drafter

    drafter, args.drafter = args.drafter, None  # the target alone is loaded here
    models = load(args)
    probe = probe_drafter(
        drafter, models.target, _inputs(models, args.task), revision=args.drafter_revision, num_tokens=args.num_tokens
    )
    if args.json:
        found = [
            {"wiring": trial.wiring, "changes": trial.changes, **asdict(trial.agreement)} for trial in probe.trials
        ]
        print(json.dumps({"best": found[0]["wiring"], "trials": found}))
        return
    print(probe.table())
    if probe.best.changes:
        print(f"\nload_drafter({drafter!r}, target, wiring={probe.best.changes})")


def _inputs(models: Any, task: str | None) -> Sequence[Mapping[str, Any]] | None:
    """Prompts of a task, one row each, where there is one."""
    from transformers import ProcessorMixin

    from ..benchmark.tasks import load_prompts
    from ..data.prompts import PromptEncoder, on_model

    if task is None and not isinstance(models.processor, ProcessorMixin):
        return None
    encoder = PromptEncoder(models.processor)
    prompts = load_prompts(task or "scene", PROMPTS_OF_A_TASK)
    return [on_model(encoder.encode([(prompt.messages, prompt.images)]), models.target) for prompt in prompts]
