"""Tuning keeps what it has: killed anywhere it goes on where it was, and no round is measured twice."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from test_tune import SMALL
from tiny_pair import save_pair, tiny_drafter, tiny_processor, tiny_target

from dream_hf.benchmark import Settings, Space, load_prompts, tune
from dream_hf.benchmark.tuning import costs as tune_costs
from dream_hf.benchmark.tuning import rounds, tuner
from dream_hf.benchmark.tuning.choice import Trace
from dream_hf.benchmark.tuning.journal import FOLDER, ROUNDS, Journal
from dream_hf.cli import main
from dream_hf.regeneration.journal import begin_folder, difference

SETTINGS = Settings(temperatures=(0.0, 1.0), max_new_tokens=8)


class Killed(BaseException):
    """What ends a process, so to speak."""


class Killer:
    """Notes measurements by name, and kills in the one that comes after `left` others."""

    def __init__(self):
        self.calls: list[str] = []
        self.left = 10**9

    def call(self, name, function, *args):
        if not self.left:
            raise Killed
        self.left -= 1
        self.calls.append(name)
        return function(*args)


@pytest.fixture
def killer(monkeypatch):
    """On one thread, so that there is none to choose."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(tune_costs, "STEPS_PER_RUN", 3)
    monkeypatch.setattr(tuner, "Space", lambda **given: Space(**{**vars(SMALL), **given}))
    killer = Killer()
    for module, name in ((tune_costs, "step_seconds"), (rounds, "trace_answer"), (rounds, "measure")):
        monkeypatch.setattr(module, name, partial(killer.call, name, getattr(module, name)))
    yield killer
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def pair():
    target = tiny_target(2.0)
    return target, tiny_drafter(target, tree_depth=2, tree_size=3)


def run(pair, output=None, **changes):
    target, drafter = pair
    options = {"settings": SETTINGS, "space": SMALL, "date": "2026-01-02", "output": output} | changes
    return tune(target, tiny_processor(), drafter, load_prompts("scene", 2), **options)


def test_a_killed_tuning_goes_on(pair, killer, tmp_path):
    """Killed after a round of timed steps, in the next, after a trace, and in the finalists."""
    whole = run(pair)
    counts = {name: killer.calls.count(name) for name in ("step_seconds", "trace_answer", "measure")}
    num_points, killer.calls[:] = counts["step_seconds"] // 3, []  # a warm-up and two prompts
    killer.left = 2 * num_points + 1
    with pytest.raises(Killed):
        run(pair, tmp_path)
    with (tmp_path / FOLDER / ROUNDS).open("a") as file:
        file.write('{"name": "costs 1", "va')  # what a kill leaves of a line
    killer.left = 2 * num_points + 3  # a warm-up, the second prompt, traces of three answers
    with pytest.raises(Killed):
        run(pair, tmp_path)
    assert killer.calls.count("step_seconds") == 4 * num_points + 1 and killer.calls.count("trace_answer") == 3
    killer.left = 1 + 20  # the last trace, the warm-up and a round or more of the finalists
    with pytest.raises(Killed):
        run(pair, tmp_path)
    killer.left = 10**9
    report = run(pair, tmp_path)
    num_ways = len(report["measured"])
    assert killer.calls.count("trace_answer") == counts["trace_answer"] == 4
    assert killer.calls.count("step_seconds") == 4 * num_points + 1
    num_missing = 4 - (20 - num_ways) // num_ways  # the round that was cut off is run anew
    assert killer.calls.count("measure") == 20 + num_ways + num_missing * num_ways
    assert report.keys() == whole.keys() and json.loads(json.dumps(report))["measured"][0]["tau"] == 1
    killer.left = 0
    assert run(pair, tmp_path) == report


def test_other_arguments_are_refused(pair, killer, tmp_path):
    killer.left = 0
    with pytest.raises(Killed):
        run(pair, tmp_path)
    with pytest.raises(ValueError, match="was begun with `max_new_tokens` 8 and now it is 9"):
        run(pair, tmp_path, settings=Settings(temperatures=(0.0, 1.0), max_new_tokens=9))
    with pytest.raises(ValueError, match="was begun with `space`"):
        run(pair, tmp_path, space=Space(max_depth=2, top_ks=(1,), sizes=(1, 2)))
    other = tiny_drafter(pair[0], tree_depth=2, tree_size=4)
    with pytest.raises(ValueError, match="was begun with `drafter`"):
        run((pair[0], other), tmp_path)


def test_the_command_goes_on_and_then_measures_anew(killer, tmp_path):
    target, drafter = save_pair(tmp_path, tree_depth=2, tree_size=3)
    arguments = ["--target", str(target), "--drafter", str(drafter), "--device", "cpu", "--tasks", "scene"]
    arguments += ["--num-prompts", "1", "--max-new-tokens", "8", "--temperatures", "0", "--tune"]
    arguments += ["--output", str(tmp_path / "out"), "--save", str(drafter)]
    killer.left = 25  # a warm-up, a prompt, and the traces
    with pytest.raises(Killed):
        main(["bench", *arguments])
    kept = (tmp_path / "out" / FOLDER / ROUNDS).read_text()
    killer.left = 10**9
    num_calls = len(killer.calls)
    assert kept and main(["bench", *arguments]) == 0
    assert 0 < len(killer.calls) - num_calls < num_calls
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["tuned.json"]
    assert main(["bench", *arguments]) == 0  # with the drafter that has been changed


def test_traces_come_back_as_they_were(tmp_path):
    """Empty ones, and none at all, included."""
    numbers = iter(np.random.default_rng(0).normal(size=(10, 2, 3)))
    traces = {top_k: Trace(*(next(numbers) for _ in range(5))) for top_k in (1, 6)}
    traces[6].path[0] = -np.inf
    journal = Journal(tmp_path)
    assert journal.traces_once("trace 0", lambda: traces) is traces and journal.traces_once("trace 1", dict) == {}
    again = Journal(tmp_path)
    found = again.traces_once("trace 0", lambda: pytest.fail("made twice"))
    assert list(found) == [1, 6] and not again.traces_once("trace 1", lambda: pytest.fail("made twice"))
    for top_k, trace in traces.items():
        assert all(np.array_equal(getattr(found[top_k], name), values) for name, values in vars(trace).items())


def test_settings_are_compared_in_one_way(tmp_path):
    begun = {"seed": 1, "prompts": [["scene", 0]], "gone": None}
    assert difference(begun, {"seed": 1, "prompts": [("scene", 0)]}) is None  # as JSON has them
    assert difference(begun, {**begun, "seed": 2, "new": 3}) == "`new` None and now it is 3"
    assert difference(begun, {**begun, "seed": 2}) == "`seed` 1 and now it is 2"
    begin_folder(tmp_path / "a" / "b", begun)
    begin_folder(tmp_path / "a" / "b", begun)
    with pytest.raises(ValueError, match=r"`output` \('b'\) was begun with `seed` 1 and now it is 2. Name another"):
        begin_folder(tmp_path / "a" / "b", {**begun, "seed": 2})
