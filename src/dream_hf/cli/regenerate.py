"""`dream-hf regenerate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import DRAFTERS, add_models, load, whole_number

HELP = "Replace the answers of a dataset by the target's own, which is what a drafter is trained on."
EXAMPLE = (
    "dream-hf regenerate --target llava-hf/llava-v1.6-vicuna-7b-hf --rows rows.jsonl --output answers.jsonl "
    "--batch-size 16\n  accelerate launch --num_processes 8 -m dream_hf regenerate --target llava-hf/llava-v1.6-vicuna-7b-hf "
    "--rows rows.jsonl --output answers.jsonl  # shared out over 8 devices\n"
    "  dream-hf regenerate --target TARGET --self-prompts 1000 --output answers.jsonl  # no data needed"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dream-hf regenerate`."""
    add_models(parser, drafter=f"decode with this drafter, the same answers sooner: {DRAFTERS}")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--rows", help="a .jsonl, .json or .parquet file, or a dataset on the Hub")
    prompts.add_argument(
        "--self-prompts", type=whole_number(1), metavar="N", help="no rows: a chat model writes N prompts itself"
    )
    parser.add_argument("--split", default="train", help="split of a dataset on the Hub (default: train)")
    parser.add_argument("--output", required=True, help="the .jsonl file to write; started again, it goes on")
    parser.add_argument("--batch-size", type=whole_number(1), default=8, help="prompts decoded together (default: 8)")
    parser.add_argument("--max-new-tokens", type=whole_number(1), default=1024, help="longest answer (default: 1024)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    parser.add_argument("--prompt-suffix", default="", help='appended to every question, "Answer in detail." for one')
    parser.add_argument("--seed", type=int, default=42, help="for sampling (default: 42)")
    parser.add_argument("--max-rows", type=whole_number(1), help="take only the first rows")
    parser.add_argument(
        "--max-bad-rows", type=whole_number(0), default=100, help="unusable rows to skip (default: 100)"
    )


def run(args: argparse.Namespace) -> None:
    """Regenerate, and say how many rows there are."""
    from accelerate import PartialState

    from ..regeneration.regenerate import regenerate

    is_cpu = args.device is not None and args.device.startswith("cpu")
    state = PartialState(cpu=is_cpu or not _has_accelerator())
    if state.num_processes > 1:
        args.device = str(state.device)
    models = load(args)
    report = regenerate(
        models.target,
        models.processor,
        args.rows if args.self_prompts is None else _self_prompts(args, models, state),
        args.output,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        prompt_suffix=args.prompt_suffix,
        drafter=models.drafter,
        seed=args.seed,
        max_rows=args.max_rows,
        max_bad_rows=args.max_bad_rows,
        split=args.split,
    )
    if state.is_main_process:
        print(report)


def _self_prompts(args: argparse.Namespace, models: Any, state: Any) -> list[dict[str, Any]]:
    """Prompts that the target writes; the first process writes them, the others read what it wrote."""
    from ..regeneration.self_prompts import write_prompts
    from ..regeneration.store import folder_of

    folder = folder_of(Path(args.output).expanduser()) / "prompts"
    with state.main_process_first():
        return write_prompts(models.target, models.processor, folder, args.self_prompts, seed=args.seed)


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()
