"""What a decoding step asks of a device, counted: launches, graphs, read-backs, copies, bytes; on a CPU too.

Counts do not depend on widths, so a target of full depth and narrow layers stands for a large one.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from engine_planting import PLANTING, make_plan
from engine_rows import Settings, attempt
from engine_shapes import make_drafter, make_prompt
from engine_ways import run_dream, run_plain
from transformers import CompileConfig

from dream_hf.benchmark.launches import Launches, count_launches
from dream_hf.runtime import crossings
from dream_hf.runtime.phases import CACHE_WORK, DRAFTER, STEP, TARGET

TAU = 3.0  # of the counted runs
NUM_TOKENS = 40
LEVELS_LESS = 2  # of the run that tells what a level adds
Counts = dict[str, Any]
Tree = tuple[int, int, int]  # depth, top-k, size


def count_row(target: Any, prompt_length: int, batch: int, settings: Settings) -> Counts:
    """What a step counts in all ways, by phase; a way that fails has an `error` instead."""
    prompt = make_prompt(target, prompt_length, batch)
    texts = run_plain(target, prompt, NUM_TOKENS).sequences
    row: Counts = {"plain": {"operations": _count_plain(target, prompt)}}
    for way in ("dream", "dream_compiled")[: 1 + settings.with_compiled]:
        options = {"compile_config": CompileConfig()} if way == "dream_compiled" else {}
        row[way] = attempt(partial(_count_trees, target, texts, prompt_length, settings.tree, options))
        if "error" not in row[way]:
            row[way]["target_over_plain"] = row[way]["target"] / row["plain"]["operations"]
    return row


def describe_counts(row: Counts) -> str:
    """A row's counts, by way."""
    lines = [f"plain: {row['plain']['operations']:.0f} launches a step"]
    for way, counts in row.items():
        if "error" in counts:
            lines.append(f"{way}: {counts['error']}")
        elif way != "plain":
            parts = ", ".join(f"{name} {count:.0f}" for name, count in counts["by_phase"]["operations"].items())
            lines += [
                f"{way}: {counts['operations']:.0f} launches a step: target {counts['target']:.0f}, "
                f"{counts['target_over_plain']:.2f} plain steps; {counts['per_level']:.0f} a level",
                f"  {counts['graphs']:.1f} graphs, {counts['reads']:.1f} reads, {counts['made']:.1f} tensors made of lists, "
                f"{counts['allocated'] / 2**20:.1f} MiB set aside",
                f"  launches by phase: {parts}",
            ]
    return "\n".join(lines)


def _count_plain(target: Any, prompt: torch.Tensor) -> float:
    """Launches of a plain step: what more tokens add."""
    few, many = (
        sum(count_launches(partial(run_plain, target, prompt, num_tokens)).operations.values())
        for num_tokens in (NUM_TOKENS // 2, NUM_TOKENS)
    )
    return (many - few) / (NUM_TOKENS - NUM_TOKENS // 2)


def _count_trees(target: Any, texts: torch.Tensor, prompt_length: int, tree: Tree, options: dict[str, Any]) -> Counts:
    """What a step has of each kind; what a level adds; what is the target's."""
    depth, top_k, size = tree
    counted = _count_tree(target, texts, prompt_length, tree, options)
    flatter = _count_tree(target, texts, prompt_length, (depth - LEVELS_LESS, top_k, size), options)
    levels = [each.per_step("operations", DRAFTER) + each.per_step("graphs", DRAFTER) for each in (counted, flatter)]
    keeping = counted.operations[STEP, CACHE_WORK]  # a path, by itself
    kinds = ("operations", "graphs", "reads", "made", "allocated")
    return {
        **{kind: counted.per_step(kind) - counted.per_step(kind, PLANTING) for kind in kinds},
        "per_level": (levels[0] - levels[1]) / LEVELS_LESS,
        "target": counted.per_step("operations", TARGET) + keeping / counted.num_steps,
        "by_phase": counted.by_phase(),
    }


def _count_tree(target: Any, texts: torch.Tensor, prompt_length: int, tree: Tree, options: dict[str, Any]) -> Launches:
    """A run with trees of a shape, behind one that warms up."""
    drafter = make_drafter(target, *tree)
    plan = make_plan(TAU, tree[0], texts.shape[1] - prompt_length - 1, len(texts))
    run = partial(run_dream, target, drafter, texts, prompt_length, plan, **options)
    with patch.object(crossings, "reads_wait", lambda device: True):  # as on an accelerator
        run()
        return count_launches(run)
