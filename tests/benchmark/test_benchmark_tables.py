"""Tables and plots of results: what they show, and that they can be written anew."""

import json

from PIL import Image

from dream_hf.benchmark.measure import Measurement
from dream_hf.benchmark.plots import SUMMARY, method_colors, write_plots
from dream_hf.benchmark.report import make_rows, write_results
from dream_hf.benchmark.rewrite import rewrite
from dream_hf.benchmark.runner import Samples
from dream_hf.benchmark.tables import overview, render

MODEL = {"name": "model", "revision": "abc", "dtype": "float32", "num_parameters": 1234}
TREE = {"tree_depth": 3, "tree_top_k": 2, "tree_size": 8, "visual_keep_ratio": 0.5}


def made(seconds):
    return [Measurement([[1, 2, 3]], seconds, seconds / 10, 1, [2])]


def results(batch_size=1, profile=None):
    """Two tasks of three prompts; the method is 2, 2 and 0.5 times as fast on the one, 4 times on the other."""
    runs = {}
    for task, ratios in (("scene", (2.0, 2.0, 0.5)), ("chart", (4.0, 4.0, 4.0))):
        for index, ratio in enumerate(ratios):
            methods = {"plain": made(8.0), "dream_tree": made(8.0 / ratio), "dream_tree 2/2/3": made(8.0)}
            runs[0.0, task, 10 + index] = methods
    rows, overall = make_rows(Samples(runs), "plain")
    provenance = {
        "machine": {"cpu": "CPU", "threads": 2, "device": "cpu"},
        "versions": {"dream_hf": "1", "torch": "2", "transformers": "5"},
        **{"target": MODEL, "drafter": {**MODEL, **TREE}, "assistant": None},
        **{"batch_size": batch_size, "repeats": 3, "max_new_tokens": 9, "date": "2026-01-02"},
    }
    return {
        "provenance": provenance, "rows": rows, "overall": overall,
        "failed_methods": {"assisted": "TypeError: no"}, "profile": profile,
    }  # fmt: skip


def line_of(text, *starts):
    """Cells of the first row of a table that starts with these."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return next(cells for cells in lines if cells[: len(starts)] == list(starts))


def test_every_task_stands_against_every_method():
    table = render(results())
    heads = line_of(table, "task", "method")
    scene = dict(zip(heads, line_of(table, "scene", "dream_tree"), strict=True))
    assert scene["speedup, median"].startswith("2.00x [")
    assert scene["worst prompt"] == "0.50x (scene 12)" and scene["prompts below 0.95x"] == "33.3%"
    everything = dict(zip(heads, line_of(table, "all", "dream_tree"), strict=True))
    assert everything["worst prompt"] == "0.50x (scene 12)" and everything["prompts below 0.95x"] == "16.7%"
    chart = dict(zip(heads, line_of(table, "chart", "dream_tree"), strict=True))
    assert chart["worst prompt"].startswith("4.00x") and chart["prompts below 0.95x"] == "0.0%"
    assert line_of(table, "dream_tree")[1:] == [scene["speedup, median"], *line_of(table, "dream_tree")[2:]]
    for fact in (
        "model at abc",
        "3/2/8, 50% of",
        "Batch size 1, medians of 3 runs, at most 9 tokens",
        "assisted: TypeError",
    ):
        assert fact in table


def test_the_overview_has_a_column_for_each_task():
    made_results = results()
    lines = overview([*made_results["rows"], *made_results["overall"]]).splitlines()
    assert lines[0] == "| method | scene | chart | all |" and len(lines) == 2 + 3
    assert line_of("\n".join(lines), "plain") == ["plain", "1.00x", "1.00x", "1.00x"]


def test_batches_are_called_batches():
    table = render(results(batch_size=4))
    assert "Batch size 4" in table and "worst batch" in table and "prompts below" not in table


def test_a_step_taken_apart():
    parts = {
        "milliseconds_per_step": {"target forward": 3.0, "rest": 1.0},
        "share_of_step": {"target forward": 0.75, "rest": 0.25},
    }
    table = render(results(profile={"dream_tree": {**parts, "host_device_syncs": None}}))
    assert line_of(table, "target forward") == ["target forward", "3 ms, 75.0%"] and "syncs" not in table
    on_gpu = render(results(profile={"dream_tree": {**parts, "host_device_syncs": {"mean": 1.5, "most": 2}}}))
    assert line_of(on_gpu, "host-device syncs")[1] == "1.5 on average, 2 at most"


def test_tables_and_plots_can_be_written_anew(tmp_path):
    write_results(results(), tmp_path)
    table = (tmp_path / "results.md").read_text()
    (tmp_path / "results.md").write_text("edited by hand")
    rewrite(tmp_path)
    assert (
        (tmp_path / "results.md").read_text() == table == render(json.loads((tmp_path / "results.json").read_text()))
    )
    with Image.open(tmp_path / SUMMARY) as plot:
        assert plot.width == 1600 and plot.height < plot.width  # twice what a README shows
        colors = {color for _, color in plot.convert("RGB").getcolors(1_000_000)}
    shown = method_colors(["dream_tree"])["dream_tree"]
    assert tuple(int(shown[i : i + 2], 16) for i in (1, 3, 5)) in colors


def test_plain_decoding_alone_can_be_drawn(tmp_path):
    alone = results()
    alone["rows"] = [row for row in alone["rows"] if row["method"] == "plain"]
    alone["overall"] = []
    assert all(file.stat().st_size for file in write_plots(alone, tmp_path))
