"""Results -> PNG plots: speedup, tau, acceptance by depth, lengths of the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

SUMMARY = "speedup.png"
BASELINE = "plain"
DPI = 200  # 1600 pixels for a width of 8 inches: sharp, and still readable when shown at 800
OTHERS = ("#8a8a93", "#b3b3ba", "#d3d3d8")  # ways of decoding without a drafter of ours
OURS = ("#9cc9de", "#2f7ea6", "#f0a35e", "#c96b3b", "#7fae6f", "#a58cc4", "#d9b44a", "#5f6f94")


def write_plots(results: Mapping[str, Any], output: Path) -> list[Path]:
    """Draw `results` into a folder; returns the files. Raises an `ImportError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: `pip install matplotlib`, or run with --no-plots.") from error
    temperatures = list(dict.fromkeys(row["temperature"] for row in results["rows"]))
    by_temperature = {t: [row for row in results["rows"] if row["temperature"] == t] for t in temperatures}
    figure = Figure(figsize=(8, 0.9 + 2.7 * len(temperatures)), layout="constrained")
    _draw_summary(figure, results)
    files = [output / SUMMARY]
    figure.savefig(files[0], dpi=DPI)
    plots: dict[str, Callable] = {
        "speedup": _draw_speedups,
        "acceptance": _draw_acceptance,
        "lengths": _draw_lengths,
    }
    for temperature, rows in by_temperature.items():
        for name, draw in plots.items():
            figure = Figure(figsize=(8, 4.5), layout="constrained")
            draw(figure.subplots(), rows)
            figure.suptitle(f"Temperature {temperature:g}")
            files.append(output / f"{name}_t{temperature:g}.png")
            figure.savefig(files[-1], dpi=120)
    return files


def _draw_summary(figure: Any, results: Mapping[str, Any]) -> None:
    """Speedup of each task and method, a panel for each temperature; shapes and shares that were swept are left out."""
    rows = [*results["rows"], *results["overall"]]
    rows = [row for row in rows if row["method"] != BASELINE and " " not in row["method"]]
    temperatures = list(dict.fromkeys(row["temperature"] for row in results["rows"]))
    panels = figure.subplots(len(temperatures), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    for axes, temperature in zip(panels, temperatures, strict=True):
        own = [row for row in rows if row["temperature"] == temperature]
        if own:
            _draw_bars(axes, own, with_values=True)
        axes.set_title(
            "greedy" if temperature == 0 else f"sampling, temperature {temperature:g}", fontsize=11, loc="left"
        )
        axes.set_ylabel("speedup", fontsize=11)
        axes.tick_params(labelsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    if labels:
        figure.legend(
            handles, labels, loc="outside upper center", ncols=min(len(labels), 3), fontsize=10, frameon=False
        )
    figure.supxlabel("speedup over plain generate(), median over prompts; lines: 95% intervals", fontsize=10)


def _draw_speedups(axes: Any, rows: Sequence[Row]) -> None:
    _draw_bars(axes, [row for row in rows if row["method"] != BASELINE])
    axes.set_ylabel("speedup over plain generate(), median")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def _draw_bars(axes: Any, rows: Sequence[Row], with_values: bool = False) -> None:
    """Bars grouped by task, one for each method, with 95% intervals; the line at 1 is plain decoding."""
    tasks, methods = _names(rows, "task"), _names(rows, "method")
    colors = method_colors(methods)
    width = 0.84 / max(len(methods), 1)
    for place, method in enumerate(methods):
        own = {row["task"]: row for row in rows if row["method"] == method}
        shown = [(index, own[task]) for index, task in enumerate(tasks) if task in own]
        heights = [row["speedup_median"] for _, row in shown]
        places = [index + (place - (len(methods) - 1) / 2) * width for index, _ in shown]
        axes.bar(
            places, heights, width * 0.94, yerr=_errors(shown), capsize=2, label=method, color=colors[method],
            error_kw={"elinewidth": 0.9, "ecolor": "#303036"},
        )  # fmt: skip
        if with_values:
            for x, (_, row) in zip(places, shown, strict=True):
                top = (row["speedup_median_interval"] or [row["speedup_median"]])[-1]
                text = f"{row['speedup_median']:.1f}"
                axes.annotate(text, (x, top), (0, 2), textcoords="offset points", ha="center", fontsize=9)
    axes.axhline(1.0, color="#303036", linewidth=0.9, linestyle="--", label="plain")
    axes.set_xticks(range(len(tasks)), tasks)
    axes.margins(y=0.12)


def _errors(shown: Sequence[tuple[int, Row]]) -> list[list[float]]:
    """How far the intervals reach below and above the bars."""
    middles = [row["speedup_median"] for _, row in shown]
    intervals = [row["speedup_median_interval"] or [row["speedup_median"]] * 2 for _, row in shown]
    below = [max(middle - low, 0) for middle, (low, _) in zip(middles, intervals, strict=True)]
    return [below, [max(high - middle, 0) for middle, (_, high) in zip(middles, intervals, strict=True)]]


def method_colors(methods: Sequence[str]) -> dict[str, str]:
    """Grey for what transformers has without us, colours for the DREAM methods."""
    ours = [method for method in methods if method.startswith("dream")]
    others = [method for method in methods if method not in ours]
    colors = {method: OURS[index % len(OURS)] for index, method in enumerate(ours)}
    return colors | {method: OTHERS[index % len(OTHERS)] for index, method in enumerate(others)}


def _draw_acceptance(axes: Any, rows: Sequence[Row]) -> None:
    for method in _names(rows, "method"):
        curves = [row["acceptance_by_depth"] for row in rows if row["method"] == method and row["acceptance_by_depth"]]
        if not curves:
            continue
        depths = range(1, max(map(len, curves)) + 1)
        means = [sum(curve[d - 1] if d <= len(curve) else 0.0 for curve in curves) / len(curves) for d in depths]
        axes.plot(depths, means, marker="o", label=method)
    axes.set_xlabel("depth of the drafted token")
    axes.set_ylabel("share of steps that accept it")
    axes.set_ylim(0, 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if axes.lines:
        axes.legend(fontsize="small")


def _draw_lengths(axes: Any, rows: Sequence[Row]) -> None:
    for row in rows:
        if row["method"] == rows[0]["method"]:
            histogram = row["output_length"]["histogram"]
            axes.stairs(histogram["counts"], histogram["edges"], fill=True, alpha=0.5, label=row["task"])
    axes.set_xlabel("tokens in the answer, plain decoding")
    axes.set_ylabel("prompts")
    axes.legend(fontsize="small")


def _names(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))
