"""Tuning: the choice from planted costs and traces, forecasts that `generate()` keeps, and where the result goes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import refusal
from families import family
from lossless import gains, generate, oracle
from tiny_pair import save_pair, tiny_drafter, tiny_processor, tiny_target

from dream_hf import DreamConfig, DreamDrafter
from dream_hf.benchmark import Settings, Space, apply_tuning, load_prompts, save_tuned, tune
from dream_hf.benchmark import measure as measure_module
from dream_hf.benchmark.methods import Method
from dream_hf.benchmark.tuning import costs as tune_costs
from dream_hf.benchmark.tuning import tuner
from dream_hf.benchmark.tuning.choice import (
    Shape,
    StepCosts,
    Trace,
    forecast,
    num_candidates,
    pick_finalists,
    rank_shapes,
)
from dream_hf.benchmark.tuning.costs import fit_costs, step_seconds
from dream_hf.benchmark.tuning.traces import trace_answer
from dream_hf.cli import main

NEVER = -np.inf
SMALL = Space(
    max_depth=3, top_ks=(1, 2), sizes=(1, 2, 4), level_probabilities=(0.0, 0.2), node_probabilities=(0.0, 0.1)
)


# --- the choice ---


def trace(positions: Sequence[tuple[float, Sequence[float]]], num_nodes: int = 16) -> Trace:
    """A trace of D levels from, for every position, what each level promises and the scores of the answer's own nodes.

    Every level has one other node, that scores just as much as the answer's would at the second position of the path.
    """
    depth = len(positions[0][1])
    promise = np.array([[share] * depth for share, _ in positions])
    path = np.array([scores for _, scores in positions], dtype=float)
    ranked = np.full((len(positions), depth, num_nodes), NEVER)
    for at, (_, scores) in enumerate(positions):
        for level in range(depth):
            others = [-2.0 - other for other in range(level + 1)]
            best = sorted([*(score for score in scores[: level + 1] if np.isfinite(score)), *others], reverse=True)
            ranked[at, level, : len(best)] = best
    return Trace(promise, ranked, path, ranked, path)


def costs(level: float = 0.1, node: float = 0.0, base: float = 1.0, **kwargs: float) -> StepCosts:
    """Costs in plain steps, that rise evenly."""
    return StepCosts(1.0, base, dict.fromkeys((1, 2), level), [(1, 0.0), (64, 63 * node)], **kwargs)


SURE = (1.0, [-0.1, -0.2, -0.3, -0.4])  # the answer's tokens are the likeliest, four levels down
LATE = (1.0, [-2.5, -3.5, NEVER, NEVER])  # they are, but behind others; two levels down
LOST = (0.01, [NEVER] * 4)  # they are not there


def test_a_forecast_walks_from_tree_to_tree():
    traced = trace([SURE, SURE, LOST, SURE, LOST, LATE, LOST, SURE])
    planted = costs(level=0.1, node=0.01)
    found = forecast(Shape(4, 1, 6), {1: [traced]}, planted)
    # Five tokens from the first position, three from the sixth (its nodes rank third and fifth), none is left.
    assert found.gains == [[5, 3]]
    assert found.tau == 4
    assert found.seconds_per_token == pytest.approx(2 * (1.0 + 3 * 0.1 + 5 * 0.01) / 8)
    narrow = forecast(Shape(2, 1, 2), {1: [traced]}, planted)
    assert narrow.gains == [[3, 3, 1, 1]]
    assert narrow.seconds_per_token == pytest.approx(4 * (1.0 + 0.1 + 0.01) / 8)


def test_nothing_is_gained_beyond_the_end():
    assert forecast(Shape(4, 1, 4), {1: [trace([SURE, SURE]), trace([SURE])]}, costs()).gains == [[2], [1]]


def test_thresholds_spare_hopeless_levels_and_nodes():
    traced = trace([LOST, SURE, LOST, LOST, LOST, LOST])
    planted = costs(level=0.5, level_check=0.25, node_check=0.125)
    shape = Shape(4, 1, 4, tree_min_level_probability=0.1)
    found = forecast(shape, {1: [traced]}, planted)
    assert found.gains == [[1, 5]]
    # A step that stops after one level has asked once; one that grows to the end has asked before every further level.
    assert found.seconds_per_token == pytest.approx((1.0 + 0.25 + 1.0 + 3 * 0.5 + 3 * 0.25) / 6)
    few = Shape(4, 1, 6, tree_min_node_probability=0.2)  # leaves out what scores below -1.6, all but the sure path
    found = forecast(few, {1: [traced]}, costs(level=0.5, node=0.01, node_check=0.125))
    assert found.gains == [[1, 5]]
    assert found.seconds_per_token == pytest.approx((2 * (1.0 + 1.5 + 0.125) + 0.03) / 6)


ANSWER = [SURE] * 20


@pytest.mark.parametrize(
    ("planted", "depth", "size"),
    [
        (costs(level=0.01, node=0.001), 4, 4),  # all four levels, and not a node more than their path
        (costs(level=0.6, node=0.001), 1, 1),  # a level costs more than the token it may gain
        (costs(level=0.01, node=0.6), 1, 1),  # and so does a node
    ],
    ids=["cheap", "dear levels", "dear nodes"],
)
def test_the_best_shape_follows_the_costs(planted, depth, size):
    space = Space(4, (1,), (1, 2, 3, 4, 8), (0.0,), (0.0,))
    best = rank_shapes(space, {1: [trace(ANSWER)]}, planted)[0].shape
    assert (best.tree_depth, best.tree_size) == (depth, size)


def test_wide_trees_where_they_catch_more():
    """With two beams the answer is there, with one it is not."""
    space = Space(4, (1, 2), (4, 8), (0.0,), (0.0,))
    traces = {1: [trace([LOST] * 20)], 2: [trace(ANSWER)]}
    assert rank_shapes(space, traces, costs())[0].shape.tree_top_k == 2
    dear = StepCosts(1.0, 1.0, {1: 0.0, 2: 3.0}, [(1, 0.0), (64, 0.1)])
    best = rank_shapes(space, traces, dear)[0]
    assert best.shape.tree_depth == 1 and best.shape.tree_top_k == 2


def test_thresholds_win_where_answers_are_uneven():
    space = Space(4, (1,), (4,), (0.0, 0.1), (0.0,))
    best = rank_shapes(space, {1: [trace([LOST, LOST, LOST, SURE, LOST, LOST, LOST, LOST] * 3)]}, costs(level=0.4))[
        0
    ].shape
    assert (best.tree_depth, best.tree_min_level_probability) == (4, 0.1)
    even = rank_shapes(space, {1: [trace(ANSWER)]}, costs(level=0.01, level_check=0.01))[0].shape
    assert even.tree_min_level_probability == 0


def test_finalists_differ_in_more_than_thresholds():
    space = Space(4, (1, 2), (1, 2, 4, 8), (0.0, 0.1, 0.2), (0.0, 0.1))
    traces = {1: [trace(ANSWER)], 2: [trace([SURE, LATE, LOST, SURE])]}
    ranking = rank_shapes(space, traces, costs())
    assert [each.seconds_per_token for each in ranking] == sorted(each.seconds_per_token for each in ranking)
    chosen = pick_finalists(ranking, 2, 3)
    thresholds = [bool(shape.tree_min_level_probability or shape.tree_min_node_probability) for shape in chosen]
    assert thresholds == [False] * 2 + [True] * 3
    assert chosen[0] == next(each.shape for each in ranking if not each.shape.tree_min_level_probability)
    assert len({(shape.tree_depth, shape.tree_top_k, shape.tree_size) for shape in chosen[2:]}) == 3


def test_shapes_can_be_filled_and_reached():
    shapes = list(Space().shapes())
    assert len(shapes) == len(set(shapes))
    assert all(
        shape.tree_depth <= shape.tree_size <= num_candidates(shape.tree_depth, shape.tree_top_k) for shape in shapes
    )
    assert all(shape.tree_depth <= shape.tree_size for start in shapes for shape in Space().refined(start))


# --- costs ---


def test_costs_are_told_apart():
    def seconds(shape: Shape) -> float:
        return 5.0 + 0.5 * shape.tree_top_k * (shape.tree_depth - 1) + 0.125 * shape.tree_size

    by_level = [Shape(depth, top_k, min(8, num_candidates(depth, top_k))) for top_k in (1, 2, 4) for depth in (2, 10)]
    by_size = [Shape(3, 4, size) for size in (1, 4, 16, 32)]
    found = fit_costs(2.0, {s: seconds(s) for s in by_level}, {s: seconds(s) for s in by_size}, -0.5, 0.25)
    assert found.level == pytest.approx({1: 0.5, 2: 1.0, 4: 2.0})
    for shape in (Shape(1, 1, 1), Shape(6, 4, 20), Shape(3, 2, 5)):
        got = found.of_steps(shape, np.array([shape.tree_depth]), np.array([shape.tree_size]))
        assert got == pytest.approx([seconds(shape)])
    assert (found.plain, found.level_check, found.node_check) == (2.0, 0.0, 0.25)


def test_noise_does_not_make_more_cost_less():
    by_level = {Shape(2, 1, 2): 3.0, Shape(10, 1, 10): 2.0, Shape(2, 2, 6): 3.0, Shape(10, 2, 10): 2.5}
    found = fit_costs(4.0, by_level, {Shape(2, 2, 1): 3.0, Shape(2, 2, 4): 2.0, Shape(2, 2, 6): 5.0})
    assert found.base == 4.0 and found.level == {1: 0.0, 2: 0.0}
    assert found.nodes == [(1, 0.0), (4, 0.0), (6, 2.5)]  # the first two share their mean


@pytest.mark.parametrize("drafting", [None, {"tree_depth": 2, "tree_top_k": 2, "tree_size": 4}])
def test_steps_are_timed_one_by_one(monkeypatch, drafting):
    """By a clock that only the target moves: one second per forward, and a hundred for the prompt."""
    target = family("llava_clip_llama").make_target()
    inputs = family("llava_clip_llama").make_inputs(target)
    now = [0.0]

    def tick(module, args, kwargs, output):
        now[0] += 1.0 if now[0] else 100.0

    method = Method("plain")
    if drafting is not None:
        drafter, _ = oracle(target, inputs, generate(target, inputs).sequences, **drafting)
        method = Method("tree", {"assistant_model": drafter, "return_dict_in_generate": True})
    target.get_decoder().register_forward_hook(tick, with_kwargs=True)
    monkeypatch.setattr(measure_module.time, "perf_counter", lambda: now[0])
    seconds = step_seconds(target, inputs, method)
    assert len(seconds) >= 2 and set(seconds) == {1.0}


# --- traces ---


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generate_does_what_traces_foretell(temperature):
    """Any shape, from one run over the answer."""
    target = family("llava_clip_llama").make_target()
    inputs = family("llava_clip_llama").make_inputs(target)
    torch.manual_seed(3)
    answer = generate(target, inputs, do_sample=temperature > 0, top_k=0)
    drafter, _ = oracle(target, inputs, answer.sequences)
    before = drafter.config.to_dict()
    space = Space(max_depth=6, top_ks=(1, 2, 3), sizes=(1, 2, 4, 8, 32))
    torch.manual_seed(3)
    traces = trace_answer(target, drafter, inputs, temperature, 64, space)
    assert drafter.config.to_dict() == before
    shapes = [Shape(6, 1, 6), Shape(6, 3, 32), Shape(3, 2, 4), Shape(6, 2, 8), Shape(1, 3, 2), Shape(6, 3, 4)]
    shapes += [
        Shape(6, 3, 32, 0.3),
        Shape(6, 2, 8, 0.7),
        Shape(6, 3, 32, 0.9),
        Shape(6, 2, 8, 0.0, 0.2),
        Shape(5, 3, 8, 0.2, 0.1),
    ]
    planted = StepCosts(1.0, 1.0, dict.fromkeys(space.top_ks, 0.1), [(1, 0.0), (64, 0.1)])
    found = {shape: forecast(shape, {k: [t] for k, t in traces.items()}, planted).gains for shape in shapes}
    assert len({str(each) for each in found.values()}) > 3
    if temperature:  # what is drawn in `generate()` depends on the shape; what is traced is as likely
        assert all(sum(map(sum, each)) == 63 for each in found.values())
        return
    for shape, foretold in found.items():
        drafting = drafter.with_settings(**shape.settings())
        assert gains(generate(target, inputs, assistant_model=drafting)) == foretold, shape


def test_an_answer_of_one_token_has_no_trace():
    target = family("llava_clip_llama").make_target()
    inputs = family("llava_clip_llama").make_inputs(target)
    assert trace_answer(target, tiny_drafter(target), inputs, 0.0, 1, SMALL) is None


# --- all of it ---


@pytest.fixture(scope="module")
def report():
    target = tiny_target(2.0)
    drafter = tiny_drafter(target, tree_depth=2, tree_size=3, pause_below=1.5)
    before = drafter.config.to_dict()
    settings = Settings(temperatures=(0.0, 1.0), max_new_tokens=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune_costs, "STEPS_PER_RUN", 3)
        found = tune(target, tiny_processor(), drafter, load_prompts("scene", 1), settings, SMALL, date="2026-01-02")
    assert drafter.config.to_dict() == before
    return found


def test_the_fastest_of_what_ran_is_the_result(report):
    names = [row["name"] for row in report["measured"]]
    assert names[0] == "plain" and names[1].startswith("2/4/3") and len(names) >= 5
    drafted = [row for row in report["measured"] if row["settings"]]
    best = min(drafted, key=lambda row: row["ms_per_token"])
    assert {**report["settings"], **best["settings"]} == report["settings"]
    plain = report["measured"][0]
    assert plain["tau"] == 1 and plain["speedup_decode"] == 1
    assert report["settings"]["pause_below"] == pytest.approx(best["step_ms"] / plain["step_ms"], abs=0.01)
    assert report["speeds"]["tokens_per_second"] == pytest.approx(1e3 / best["ms_per_token"], abs=0.01)
    assert report["provenance"]["date"] == report["speeds"]["date"] == "2026-01-02"
    assert "thread" in report["machine"] and report["predicted"] and report["costs"]["plain_step_ms"] > 0
    assert json.loads(json.dumps(report))["settings"] == report["settings"]


def test_what_cannot_be_tuned():
    target = tiny_target()
    drafter = tiny_drafter(target)
    with pytest.raises(ValueError, match="`prompts` is empty"):
        tune(target, tiny_processor(), drafter, [])
    with pytest.raises(ValueError, match=r"`batch_size` \(2\) must be 1"):
        tune(target, tiny_processor(), drafter, load_prompts("scene", 1), Settings(batch_size=2))


def test_a_config_notes_every_machine(report):
    config = DreamConfig(tuned={"another": {"settings": {}}})
    apply_tuning(config, report)
    assert set(config.tuned) == {"another", report["machine"]}
    assert config.tuned[report["machine"]]["settings"] == report["settings"]
    assert all(getattr(config, name) == value for name, value in report["settings"].items())


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.mark.parametrize("place", ["own folder", "new folder"])
def test_saving_changes_the_config_and_nothing_else(report, tmp_path, place):
    _, source = save_pair(tmp_path)
    before = contents(source)
    folder = source if place == "own folder" else tmp_path / "tuned"
    save_tuned(DreamDrafter.from_pretrained(source), report, folder)
    after = contents(folder)
    assert {name for name in before if before[name] != after[name]} == {"config.json"} and set(before) == set(after)
    was, config = json.loads(before["config.json"]), json.loads(after["config.json"])
    changed = {name for name in config if config[name] != was.get(name)}
    assert "tuned" in changed and changed <= {"tuned", *report["settings"]} and set(was) <= set(config)
    loaded = DreamDrafter.from_pretrained(folder).config
    assert all(getattr(loaded, name) == value for name, value in report["settings"].items())
    assert loaded.tuned[report["machine"]]["tau"] == report["speeds"]["tau"]
    if place == "new folder":
        assert contents(source) == before


def test_another_model_is_not_overwritten(report, tmp_path):
    target, source = save_pair(tmp_path)
    with pytest.raises(ValueError, match="holds another model"):
        save_tuned(DreamDrafter.from_pretrained(source), report, target)


def test_a_drafter_without_a_folder_is_saved(report, tmp_path):
    save_tuned(tiny_drafter(tiny_target()), report, tmp_path / "drafter")
    assert DreamDrafter.from_pretrained(tmp_path / "drafter").config.tuned.keys() == {report["machine"]}


def test_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tuner, "Space", lambda **given: Space(**{**vars(SMALL), **given}))
    monkeypatch.setattr(tune_costs, "STEPS_PER_RUN", 3)
    target, drafter = save_pair(tmp_path, tree_depth=2, tree_size=3)
    arguments = ["--target", str(target), "--drafter", str(drafter), "--device", "cpu", "--tasks", "scene"]
    arguments += ["--num-prompts", "1", "--max-new-tokens", "8", "--temperatures", "0"]
    assert main(["bench", *arguments, "--tune", "--save", str(drafter), "--output", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "tuned.json").read_text())
    printed = capsys.readouterr().out
    config = DreamDrafter.from_pretrained(drafter).config
    for name, value in written["settings"].items():
        assert f"drafter.config.{name} = {value!r}" in printed and getattr(config, name) == value
    assert set(config.tuned) == {written["machine"]}


def test_the_command_refuses(tmp_path, capsys):
    target, drafter = save_pair(tmp_path)
    models = ["--target", str(target), "--drafter", str(drafter)]
    assert "`--save`" in refusal(capsys, "bench", *models, "--output", str(tmp_path / "out"), "--save", str(drafter))
    assert "`--output` is needed" in refusal(capsys, "bench", *models)
    assert "`--tune` needs a drafter" in refusal(capsys, "bench", "--target", str(target), "--tune")
