"""Results -> Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

NUM_DEPTHS = 4  # of the acceptance by depth, in the table; all of it is in the JSON
NOTES = (
    "Square brackets: 95% bootstrap interval over prompts. Speedups are over plain `generate()` on the same prompts, prefill "
    "included unless it says decode only; tau and the accepted shares are per forward of the target after the prefill. "
    "Definitions: docs/benchmarking.md."
)


def render(results: Mapping[str, Any]) -> str:
    """The results as Markdown: an overview, every task against every method, and where the time goes."""
    rows = [*results["rows"], *results["overall"]]
    speed = SPEED if results["provenance"]["batch_size"] == 1 else [*map(_of_batches, SPEED)]
    parts = ["# Benchmark", "  \n".join(_facts(results["provenance"]))]
    for temperature in dict.fromkeys(row["temperature"] for row in rows):
        own = [row for row in rows if row["temperature"] == temperature]
        parts += [f"## Temperature {temperature:g}", "Speedup, median over prompts:", overview(own)]
        parts += ["Every task against every method:", _table(own, speed)]
        parts += ["What it rests on:", _table(own, DETAILS)]
    if results.get("profile"):
        parts += ["## A decoding step", *_profiles(results["profile"])]
    if results["failed_methods"]:
        failed = [f"- {name}: {reason}" for name, reason in results["failed_methods"].items()]
        parts += ["Left out, because they cannot run on this target:", "\n".join(failed)]
    return "\n\n".join([*parts, NOTES]) + "\n"


def overview(rows: Sequence[Row]) -> str:
    """Methods down, tasks across: the median speedup with its interval."""
    tasks, methods = (list(dict.fromkeys(row[name] for row in rows)) for name in ("task", "method"))
    found = {(row["task"], row["method"]): row for row in rows}
    lines = [
        [method, *(_times(found.get((task, method), {}), "speedup_median") for task in tasks)] for method in methods
    ]
    return _lines(["method", *tasks], lines)


def _facts(provenance: Mapping[str, Any]) -> list[str]:
    machine, target, drafter = (provenance[name] for name in ("machine", "target", "drafter"))
    facts = [f"Target {_model(target)}, {target['dtype']}, {target['num_parameters']:,} parameters"]
    if drafter is not None:
        tree = f"{drafter['tree_depth']}/{drafter['tree_top_k']}/{drafter['tree_size']}"
        keep = f"{drafter['visual_keep_ratio']:.0%} of the visual tokens kept"
        if drafter["visual_keep_ratio"] < 1 and "visual_importance" in drafter:
            keep += f" by {drafter['visual_importance']}"
        facts += [f"Drafter {_model(drafter)}, {drafter['dtype']}, tree depth/top-k/size {tree}, {keep}"]
    if provenance.get("assistant"):
        facts += [f"Assistant {_model(provenance['assistant'])}"]
    for name, each in provenance.get("further", {}).items():
        shape = "/".join(str(each["settings"][part]) for part in ("tree_depth", "tree_top_k", "tree_size"))
        size = f", {each['num_parameters']:,} parameters" if "num_parameters" in each else ""
        facts += [f"{name}: {each['class']}{size}, tree depth/top-k/size {shape}"]
    versions = provenance["versions"]
    software = ", ".join(f"{name} {versions[name]}" for name in ("dream_hf", "torch", "transformers"))
    facts += [f"Machine {machine['cpu']}, {machine['threads']} threads, device {machine['device']}; {software}"]
    runs = "" if provenance.get("repeats", 1) == 1 else f", medians of {provenance['repeats']} runs"
    how = f"Batch size {provenance['batch_size']}{runs}, at most {provenance['max_new_tokens']} tokens"
    return [*facts, f"{how}; {provenance['date']}"]


def _model(model: Mapping[str, Any]) -> str:
    return model["name"] + (f" at {model['revision']}" if model.get("revision") else "")


def _number(row: Row, name: str) -> str:
    value, interval = row.get(name), row.get(f"{name}_interval")
    if value is None:
        return ""
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text if interval is None else f"{text} [{interval[0]:.3g}, {interval[1]:.3g}]"


def _times(row: Row, name: str) -> str:
    """A ratio to two decimals, with its interval."""
    value, interval = row.get(name), row.get(f"{name}_interval")
    if value is None:
        return ""
    return f"{value:.2f}x" + (
        "" if interval is None or interval == [1.0, 1.0] else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    )


def _percent(row: Row, name: str) -> str:
    return "" if row.get(name) is None else f"{row[name]:.1%}"


def _worst(row: Row, name: str) -> str:
    prompt = row.get("worst_prompt")
    return _times(row, name) + (
        f" ({prompt['task']} {prompt['index']})" if prompt and row["method"] != "plain" else ""
    )


def _depths(row: Row, name: str) -> str:
    return ", ".join(f"{share:.0%}" for share in row.get(name, [])[:NUM_DEPTHS])


def _shares(row: Row, name: str) -> str:
    shares = row.get(name)
    return "" if shares is None else " / ".join(f"{shares[part]:.0%}" for part in ("target", "drafter", "rest"))


def _megabytes(row: Row, name: str) -> str:
    return "" if row.get(name) is None else f"{row[name] / 1e6:,.0f}"


def _median_length(row: Row, name: str) -> str:
    return f"{row[name]['median']:g}"


Column = tuple[str, str, Callable[[Row, str], str]]  # field, heading, how a cell is written
NAMES: list[Column] = [("task", "task", _number), ("method", "method", _number)]
SPEED: list[Column] = [
    *NAMES,
    ("speedup_median", "speedup, median", _times),
    ("speedup", "speedup, totals", _times),
    ("speedup_decode", "speedup, decode only", _times),
    ("worst_speedup", "worst prompt", _worst),
    ("slow_share", "prompts below 0.95x", _percent),
    ("tau", "tau, bonus included", _number),
    ("match_rate", "same tokens as plain", _percent),
    ("num_prompts", "prompts", _number),
]
DETAILS: list[Column] = [
    *NAMES,
    ("tau_without_bonus", "tau without bonus", _number),
    ("acceptance_by_depth", f"steps that accept a token at depth 1 to {NUM_DEPTHS}", _depths),
    ("tokens_per_second", "tokens/s", _number),
    ("first_token_seconds_median", "first token, s", _number),
    ("output_length", "tokens in the median answer", _median_length),
    ("peak_bytes", "peak memory, MB", _megabytes),
    ("time_shares", "time in target / drafter / the rest", _shares),
]


def _of_batches(column: Column) -> Column:
    """The column where times are those of batches."""
    name, heading, write = column
    changed = {"worst_speedup": "worst batch", "slow_share": "batches below 0.95x"}
    return name, changed.get(name, heading), write


def _table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A table of the columns that any row has something in."""
    shown = [column for column in columns if any(row.get(column[0]) not in (None, []) for row in rows)]
    return _lines(
        [heading for _, heading, _ in shown], [[write(row, name) for name, _, write in shown] for row in rows]
    )


def _profiles(profiles: Mapping[str, Any]) -> list[str]:
    """Milliseconds of a step by part; parts down, methods across."""
    methods = list(profiles)
    parts = dict.fromkeys(part for method in methods for part in profiles[method]["milliseconds_per_step"])
    lines = []
    for part in parts:
        figures = [
            (profiles[m]["milliseconds_per_step"].get(part), profiles[m]["share_of_step"].get(part)) for m in methods
        ]
        lines.append([part, *("" if value is None else f"{value:.3g} ms, {share:.1%}" for value, share in figures)])
    syncs = [profiles[method].get("host_device_syncs") for method in methods]
    if any(syncs):
        cells = [
            "" if count is None else f"{count['mean']:.3g} on average, {count['most']} at most" for count in syncs
        ]
        lines.append(["host-device syncs", *cells])
    return [_lines(["part of a step", *methods], lines)]


def _lines(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *lines])
