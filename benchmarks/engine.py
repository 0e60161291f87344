"""What a decoding step costs on full-size targets with random weights, with simulated acceptance.

    python benchmarks/engine.py --output engine.json
    python benchmarks/engine.py --shapes llava-1.6-7b --prompts 1500 --batches 1
    python benchmarks/engine.py --count --prompts 100 --batches 1
    python benchmarks/engine.py --tiny --device cpu --no-compiled

Needs torch, transformers and dream_hf, and no download. A stopped run goes on where it was when it is started again with the
same settings and `--output`. docs/benchmarking.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from engine_counts import count_row, describe_counts
from engine_floor import measure_bandwidth
from engine_report import NOTE, Results, describe, describe_source, table
from engine_rows import WAYS, Settings, attempt, measure_row, parse_tree, release_memory
from engine_shapes import NARROW, SHAPES, TINY, TINY_RECURRENT, Shape, make_drafter, make_target
from tqdm.auto import tqdm

from dream_hf import suggested_shape
from dream_hf.regeneration.journal import write_whole

Key = tuple[int, int]  # prompt length, batch size


def main(arguments: Sequence[str] | None = None) -> Results | dict[str, Any]:
    options = parse_options(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    settings = Settings(
        tree=options.tree,
        num_steps=options.steps,
        repeats=options.repeats,
        with_compiled=not options.no_compiled,
        is_suggested=options.suggested,
    )
    if options.count:
        return count(options, settings, dtype, device)
    bandwidth = measure_bandwidth(device)
    results = Results(describe(device, dtype, settings, bandwidth), options.output)
    shapes = (
        [TINY, TINY_RECURRENT][: 1 + options.recurrent] if options.tiny else [SHAPES[name] for name in options.shapes]
    )
    keys = [(prompt, batch) for prompt in options.prompts for batch in options.batches]
    print(NOTE)
    with tqdm(total=len(shapes) * len(keys), unit="row") as progress:
        for shape in shapes:
            todo = [key for key in keys if not results.has(shape.name, *key)]
            progress.update(len(keys) - len(todo))
            if todo:
                measure_shape(shape, todo, settings, results, progress, dtype, device)
    print(table(results.rows, settings.taus))
    return results


def count(options: argparse.Namespace, settings: Settings, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Count instead of timing, for a narrow target: widths change no count."""
    shape = TINY if options.tiny else NARROW
    target = make_target(shape, device, dtype)
    found: dict[str, Any] = {**describe_source(device), "shape": shape.name, "tree": list(settings.tree), "rows": []}
    for batch in options.batches:
        row = count_row(target, options.prompts[0], batch, settings)
        found["rows"].append({"prompt_length": options.prompts[0], "batch": batch, **row})
        print(f"{shape.name}, batch {batch}\n{describe_counts(row)}")
        if options.output is not None:
            write_whole(options.output, json.dumps(found, indent=2).encode())
    return found


def measure_shape(
    shape: Shape,
    keys: Sequence[Key],
    settings: Settings,
    results: Results,
    progress: Any,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Make one pair of models and measure its rows."""
    models: dict[str, Any] = {}
    config: dict[str, int] = {}
    if settings.is_suggested:
        config = suggested_shape(shape.make_config())
        depth = config.pop("tree_depth")
        taus = [tau for tau in settings.taus if tau <= depth]
        settings = replace(settings, tree=(depth, *settings.tree[1:]), taus=taus)

    def make_models() -> dict[str, Any]:
        models["target"] = make_target(shape, device, dtype)
        models["drafter"] = make_drafter(models["target"], *settings.tree, **config)
        return {}

    progress.set_description(f"{shape.name}: making weights")
    failure = attempt(make_models)
    for prompt_length, batch in keys:
        progress.set_description(f"{shape.name}, prompt {prompt_length}, batch {batch}")
        if failure:
            figures: dict[str, Any] = dict.fromkeys(WAYS, failure)
        else:
            bandwidth = results.provenance["copy_bytes_per_second"]
            figures = measure_row(
                **models, prompt_length=prompt_length, batch=batch, settings=settings, bandwidth=bandwidth
            )
        figures["tree"], figures["drafter"] = list(settings.tree), config
        row = results.add(shape.name, prompt_length, batch, figures)
        tqdm.write(table([row], settings.taus))
        progress.update()
    models.clear()
    release_memory()


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), metavar="NAME",
                        help=f"targets, out of {', '.join(SHAPES)} (all)")  # fmt: skip
    parser.add_argument("--prompts", nargs="+", type=int, default=[500, 1500, 6000], help="prompt lengths in tokens")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4], help="batch sizes")
    parser.add_argument("--tree", type=parse_tree, default=(6, 4, 32), help="depth/top_k/size (6/4/32)")
    parser.add_argument("--suggested", action="store_true",
                        help="drafters and depths that `suggested_shape` gives for each target")  # fmt: skip
    parser.add_argument(
        "--steps", type=int, default=32, help="steps at tau 5; all runs make 5 x this many tokens (32)"
    )
    parser.add_argument("--repeats", type=int, default=1, help="timed runs of each kind, the median counts (1)")
    parser.add_argument("--device", default=default_device, help=f"({default_device})")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--no-compiled", action="store_true", help="leave the compiled ways out")
    parser.add_argument("--count", action="store_true",
                        help="count launches, graphs, reads and copies of a step instead of timing it")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="one tiny shape instead, to see whether the script runs")
    parser.add_argument("--recurrent", action="store_true", help="with --tiny: one whose layers keep a state, too")
    parser.add_argument("--output", type=Path, help="JSON file, written after every row")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
