"""`dream-hf bench`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import tuning
from .options import DRAFTERS, add_models, load, whole_number

HELP = "Compare ways of decoding side by side on the same prompts: results.json, a table and plots."
EXAMPLE = (
    "dream-hf bench --target demo --drafter demo --tasks scene chart text --num-prompts 50 --output results\n"
    "  dream-hf bench --target TARGET --drafter DRAFTER --tasks chart_qa math_vista --trees 6/4/32 8/4/60 "
    "--keep-ratios 1 0.5 --output results\n"
    "  dream-hf bench --target TARGET --drafter FOLDER --tune --save FOLDER"
)
METHODS = ("plain", "plain_static", "prompt_lookup", "dream_chain", "dream_tree")
FURTHER = ("plain_compiled", "dream_tree_compiled", "retrieval", "retrieval+dream", "model", "skip")
NUM_PROMPTS, MAX_NEW_TOKENS = 50, 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dream-hf bench`."""
    add_models(parser, drafter=f"{DRAFTERS}; one that is not DREAM's is a method of its own, eagle_tree for instance")
    parser.add_argument("--assistant", help="a small model for the methods assisted and model")
    parser.add_argument(
        "--also",
        nargs="+",
        type=named_drafter,
        default=[],
        metavar="NAME=DRAFTER",
        help=f"further drafters of any kind, each a method of its name, with the tree in its config: {DRAFTERS}",
    )
    parser.add_argument("--output", help="folder for the results; started again, it goes on")
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--tasks",
        nargs="+",
        default=["scene", "chart", "text"],
        help="demo tasks (scene, chart, text: the default), public sets (mmt_bench, seed_bench_2, science_qa, ocrbench_v2, "
        "chart_qa, math_vista, mmspec; or NAME=FILE), files of rows",
    )
    what.add_argument("--num-prompts", type=whole_number(1), help=f"prompts of each task (default: {NUM_PROMPTS})")
    what.add_argument(
        "--methods",
        nargs="+",
        default=list(METHODS),
        help=f"default: {' '.join(METHODS)}; further ones: {' '.join(FURTHER)}",
    )
    what.add_argument("--trees", nargs="*", type=tree_shape, default=[], help="further shapes, as DEPTH/TOP_K/SIZE")
    what.add_argument("--keep-ratios", nargs="*", type=float, default=[], help="further shares of the visual tokens")
    what.add_argument("--blind", action="store_true", help="also blank the visual tokens in what the drafter sees")
    what.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0], help="default: 0 1")
    what.add_argument("--max-new-tokens", type=whole_number(2), help=f"longest answer (default: {MAX_NEW_TOKENS})")
    how = parser.add_argument_group("how")
    how.add_argument("--seed", type=int, default=42, help="for shuffling and sampling (default: 42)")
    how.add_argument("--warmup", type=whole_number(1), default=2, help="prompts before anything counts (default: 2)")
    how.add_argument("--batch-size", type=whole_number(1), default=1, help="prompts decoded together (default: 1)")
    how.add_argument(
        "--repeats",
        type=whole_number(1),
        default=1,
        help="runs of each method on a prompt; medians count (default: 1)",
    )
    how.add_argument("--threads", type=whole_number(1), help="CPU threads; PyTorch's choice by default")
    how.add_argument("--profile", action="store_true", help="also split a step into its parts, with a profiler trace")
    how.add_argument("--no-plots", action="store_true", help="write no PNG plots")
    how.add_argument("--date", help="date to put into the results; today by default")
    tuning.add_arguments(parser)


def tree_shape(text: str) -> tuple[int, int, int]:
    """`6/4/32` -> depth, top-k, size."""
    parts = text.split("/")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no tree shape; write DEPTH/TOP_K/SIZE, for instance 6/4/32")
    depth, top_k, size = map(int, parts)
    return depth, top_k, size


def named_drafter(text: str) -> tuple[str, str]:
    """`eagle=runs/eagle` -> name, drafter."""
    name, equals, drafter = text.partition("=")
    if not (name and equals and drafter):
        raise argparse.ArgumentTypeError(
            f"{text!r} names no drafter; write NAME=DRAFTER, for instance eagle=runs/eagle"
        )
    return name, drafter


def method_name(drafter: Any) -> str:
    """What the method of a drafter is called that is not DREAM's: `eagle_tree` for instance."""
    return f"{type(drafter.plain).__name__.removesuffix('Drafter').lower()}_tree"


def run(args: argparse.Namespace) -> None:
    """Measure, write the results and show the table."""
    import torch

    from ..benchmark import METHODS as KNOWN
    from ..benchmark import Settings, load_prompts, make_methods, run_benchmark
    from ..benchmark.report import render
    from ..drafters.dream.drafter import DreamDrafter
    from ..load_models import load_models, make_drafter

    tuning.check(args)
    if args.tune:
        tuning.run(args)
        return
    max_new_tokens = args.max_new_tokens or MAX_NEW_TOKENS
    settings = Settings(
        tuple(args.temperatures), max_new_tokens, args.warmup, args.seed, args.batch_size, args.repeats
    )
    settings.check()
    unknown = [name for name in args.methods if name not in KNOWN]
    if unknown:
        raise ValueError(f"`--methods` has {unknown}; there are {list(KNOWN)}.")
    if Path(args.output).expanduser().is_file():
        raise ValueError(f"`--output` ({args.output!r}) is a file; name a folder.")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    prompts = [
        prompt for task in args.tasks for prompt in load_prompts(task, args.num_prompts or NUM_PROMPTS, args.seed)
    ]
    models, further = load(args), {}
    if models.drafter is not None and not isinstance(models.drafter, DreamDrafter):
        further[method_name(models.drafter)] = models.drafter
        models = replace(models, drafter=None)
    assistant = None
    if args.assistant is not None:
        assistant = load_models(args.assistant, dtype=args.dtype, device=args.device).target
    names = [name for name in args.methods if models.drafter is not None or "dream" not in name]
    if models.drafter is None and args.methods != list(METHODS):
        names = args.methods  # asked for by name: say what is missing
    if assistant is not None and not {"assisted", "model"} & set(names):
        names = [*names, "assisted"]
    further |= {name: make_drafter(drafter, models) for name, drafter in args.also}
    methods = make_methods(
        names, models.target, models.drafter, assistant, args.trees, args.keep_ratios, args.blind, further
    )
    results = run_benchmark(
        models.target,
        models.processor,
        methods,
        prompts,
        args.output,
        settings,
        with_profile=args.profile,
        with_plots=not args.no_plots,
        date=args.date,
    )
    print(render(results))
