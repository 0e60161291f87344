"""The benchmark of full-size shapes, on a tiny one: what it plants is accepted, what it counts is there, rows survive."""

import json
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from dream_hf import DreamConfig, DreamDrafter
from dream_hf.benchmark.launches import count_launches
from dream_hf.decoding.acceptance import accept_greedy
from dream_hf.decoding.tree import DraftTree
from dream_hf.drafters.dream import state as drafter_state
from dream_hf.runtime.phases import STEP, TARGET, clocked_by, phase
from dream_hf.targets.target import Target

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import context_growth
import engine
import engine_floor
import engine_rows
import engine_ways
import prompt_memory
import recurrent_step
import tree_attention
from engine_planting import accept_probability, make_plan, plant
from engine_shapes import SHAPES, TINY, make_drafter, make_prompt, make_target

DEPTH, TOP_K, SIZE = 4, 2, 8
TAUS = (3.0, 4.0, 5.0)
TINY_RUN = ["--tiny", "--device", "cpu", "--prompts", "12", "--steps", "4", "--tree", "4/2/8", "--no-compiled"]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def pair(request):
    target = make_target(TINY, torch.device("cpu"), request.param)
    return target, make_drafter(target, DEPTH, TOP_K, SIZE)


@pytest.fixture
def small_copies(monkeypatch):
    monkeypatch.setattr(engine_floor, "COPY_BYTES", {"cpu": 2**20})


# -- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [4, 6])
@pytest.mark.parametrize("tau", [1.0, *TAUS])
def test_a_step_gains_tau_tokens_in_expectation(tau, depth):
    probability = accept_probability(tau, depth)
    assert sum(probability**level for level in range(depth + 1)) == pytest.approx(tau)


def test_tau_beyond_the_tree_is_refused():
    with pytest.raises(ValueError, match=r"`tau` \(6\).*5"):
        accept_probability(6, depth=4)


@pytest.mark.parametrize("tau", TAUS)
def test_a_plan_follows_the_probabilities_and_rows_end_together(tau):
    plan = make_plan(tau, depth=6, num_tokens=600, batch=3)
    assert (plan + 1).sum(-1).tolist() == [600] * 3
    assert plan.shape[1] == round(600 / tau) and plan.min() >= 0 and plan.max() <= 6
    assert not torch.equal(plan[0], plan[1]) and torch.equal(plan[0].sort().values, plan[1].sort().values)
    probability = accept_probability(tau, depth=6)
    for level in range(1, 7):
        assert float((plan[0] >= level).float().mean()) == pytest.approx(probability**level, abs=0.02)


# -- the planting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_a_planted_tree_is_accepted_as_far_as_planned(seed):
    """Few token values, so that the drafter is often right by accident, off the path too."""
    generator = torch.Generator().manual_seed(seed)
    parents = torch.stack([torch.randint(max(node, 1), (5,), generator=generator) for node in range(16)], dim=1)
    tree = DraftTree.from_parents(torch.randint(3, (5, 16), generator=generator), parents, max_depth=15)
    deepest = tree.depths.max(-1).values
    continuation = torch.randint(3, (5, 17), generator=generator)
    continuation[:, 0] = tree.tokens[:, 0]
    accepted = (torch.rand(5, generator=generator) * (deepest + 1)).long()
    planted = plant(tree, continuation, accepted, vocab_size=3)
    choices = continuation.gather(1, planted.depths + 1)
    assert accept_greedy(planted, choices).lengths.tolist() == (accepted + 1).tolist()
    assert torch.equal(planted.parents, tree.parents) and torch.equal(planted.tokens[:, 0], tree.tokens[:, 0])


@pytest.mark.parametrize("batch", [1, 3])
def test_a_run_gains_what_was_planned_and_pays_for_everything(pair, batch, monkeypatch):
    target, drafter = pair
    texts = engine_ways.run_plain(target, make_prompt(target, 10, batch), 30).sequences
    plan = make_plan(3.0, DEPTH, 30, batch)
    calls = Counter()
    for name in ("beams", "read_on"):
        original = getattr(drafter_state.DrafterState, name)

        def counted(self, *args, _name=name, _original=original):
            calls[_name] += 1
            return _original(self, *args)

        monkeypatch.setattr(drafter_state.DrafterState, name, counted)
    run = engine_ways.run_dream(target, drafter, texts, 10, plan)
    assert torch.equal(run.gains, plan + 1) and torch.equal(run.sequences, texts)
    num_steps = plan.shape[1]
    # The last step is read when a next turn begins, and none does.
    assert calls == {"beams": (DEPTH - 1) * num_steps, "read_on": num_steps - 1}
    assert run.num_forwards == num_steps - engine_ways.NUM_SKIPPED and run.decode_seconds > 0


@pytest.mark.parametrize("pair", [torch.float32], indirect=True)
def test_a_step_is_split_without_remainder(pair):
    target, drafter = pair
    texts = engine_ways.run_plain(target, make_prompt(target, 10, 1), 20).sequences
    split = engine_ways.split_step(target, drafter, texts, 10, make_plan(4.0, DEPTH, 20, 1))
    assert split.keys() == {"target", "drafter", "rest", "planting"}
    assert sum(split.values()) == pytest.approx(1) and all(share > 0 for share in split.values())


# -- shapes and bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions"),  # of the text model, as its authors give it; SmolVLM's head is one of its own
    [
        ("llava-1.6-7b", 6.74),
        ("llava-1.6-13b", 13.02),
        ("smolvlm-2b", 1.81),
        ("gemma3-12b", 11.77),
        ("qwen2.5-vl-7b", 7.62),
    ],
)
def test_shapes_are_full_size(name, billions):
    with torch.device("meta"):
        target = SHAPES[name].model_class._from_config(SHAPES[name].make_config(), dtype=torch.bfloat16)
        DreamDrafter._from_config(DreamConfig.from_target(target.config))
    view = Target(target)
    weights = {id(weight): weight.numel() for part in (view.decoder, view.lm_head) for weight in part.parameters()}
    assert sum(weights.values()) / 1e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize("pair", [torch.float32], indirect=True)
def test_prompts_hold_no_picture(pair):
    target, _ = pair
    prompt = make_prompt(target, 500, 2)
    assert prompt.shape == (2, 500) and not Target(target).is_visual(prompt).any()


def test_bytes_are_those_of_the_tensors(pair):
    target, drafter = pair
    count = engine_floor.count_bytes(target, drafter)
    size = target.dtype.itemsize
    embedding = target.get_input_embeddings().weight.numel()
    assert count.head == size * embedding == size * target.lm_head.weight.numel()
    assert count.decoder == size * (sum(w.numel() for w in target.model.language_model.parameters()) - embedding)
    assert count.tree_step(2) - count.plain_step() == 2 * (count.drafter + count.head)
    cache = DynamicCache()
    target(input_ids=make_prompt(target, 7, 2), past_key_values=cache)
    held = sum(states.numel() * size for layer in cache.layers for states in (layer.keys, layer.values))
    assert engine_floor.cache_bytes(target, 7, 2) == held


def test_windows_bound_the_cache():
    with torch.device("meta"):
        config = SHAPES["gemma3-12b"].make_config()
        config.text_config.update({"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64})
        target = SHAPES["gemma3-12b"].model_class._from_config(config, dtype=torch.bfloat16)
    per_slot = 2 * 8 * 256 * 2
    assert engine_floor.cache_bytes(target, 6000, 1) == per_slot * (8 * 6000 + 40 * 1024)


# -- the script -------------------------------------------------------------------------------------------------------


def test_rows_are_written_and_a_stopped_run_goes_on(small_copies, tmp_path, monkeypatch, capsys):
    output = tmp_path / "results" / "engine.json"
    engine.main([*TINY_RUN, "--batches", "1", "--output", str(output)])
    printed = capsys.readouterr().out
    assert "Simulated acceptance" in printed and "tau 5" in printed
    first = json.loads(output.read_text())
    assert "Simulated acceptance" in first["note"]
    assert first["provenance"]["settings"]["tree"] == "4/2/8" and first["provenance"]["machine"]["device"] == "cpu"
    (row,) = first["rows"]
    at_tau = row["dream"]["at_tau"]
    assert [entry["tau"] for entry in at_tau.values()] == pytest.approx([20 / 7, 4, 5])
    for entry in at_tau.values():
        assert entry["is_as_planned"] and entry["is_plain_text"] and entry["speedup_over_compiled"] is None
        speedup = entry["tau"] * row["plain"]["step_ms"] / entry["step_ms"]
        assert entry["speedup_over_plain"] == pytest.approx(speedup)
    assert row["plain_compiled"] == row["dream_compiled"] == {"error": "not measured"}
    assert 0 < row["floor"]["plain_ms"] < row["floor"]["tree_ms"]

    measured, measure_row = [], engine.measure_row
    monkeypatch.setattr(engine, "measure_row", lambda **given: measured.append(given["batch"]) or measure_row(**given))
    engine.main([*TINY_RUN, "--batches", "1", "2", "--output", str(output)])
    second = json.loads(output.read_text())
    assert measured == [2] and second["rows"][0] == row and second["provenance"] == first["provenance"]
    with pytest.raises(ValueError, match=r"engine.json.*`settings`"):
        engine.main([*TINY_RUN, "--batches", "1", "--repeats", "2", "--output", str(output)])


def test_a_target_with_state_has_a_row_of_its_own(small_copies):
    results = engine.main([*TINY_RUN, "--recurrent", "--batches", "1", "--dtype", "float32"])
    assert [row["shape"] for row in results.rows] == ["tiny", "tiny, recurrent"]
    entries = results.rows[1]["dream"]["at_tau"].values()
    assert all(entry["is_as_planned"] and entry["is_plain_text"] for entry in entries)


def test_steps_on_targets_with_state():
    small = ["--width", "256", "--layers", "2", "--repeats", "1", "--nodes", "17", "--device", "cpu"]
    rows = recurrent_step.main(small)
    assert [row["kind"] for row in rows] == list(recurrent_step.KINDS)
    assert all(row["ratio"] > 0 for row in rows)
    noted = {row["kind"]: row["kilobytes"] for row in rows}
    # The convolution's inputs; with the delta rule 2 heads of keys, 4 of values and decays.
    assert noted["convolution"] == 256 * 4 / 1e3 and noted["attention"] == 0
    assert noted["delta"] == pytest.approx((8 * 128 + 2 * 128 + 4 * 128 + 4) * 4 / 1e3)


def test_a_row_without_memory_is_reported_and_the_run_goes_on(small_copies, monkeypatch, capsys):
    def no_memory(*_):
        raise torch.OutOfMemoryError("too large")

    run_dream = engine_rows.run_dream
    monkeypatch.setattr(
        engine_rows, "run_dream", lambda *given: no_memory() if len(given[2]) > 1 else run_dream(*given)
    )
    results = engine.main([*TINY_RUN, "--batches", "2", "1"])
    assert results.rows[0]["dream"] == {"error": "out of memory"} and "step_ms" in results.rows[0]["plain"]
    assert "step_ms" in results.rows[1]["dream"]
    monkeypatch.setattr(engine, "make_target", no_memory)
    results = engine.main([*TINY_RUN, "--batches", "1", "2"])
    assert [row[way] for row in results.rows for way in engine_rows.WAYS] == [{"error": "out of memory"}] * 8
    assert "out of memory" in capsys.readouterr().out


def test_unplanned_acceptance_shows(small_copies, monkeypatch, capsys):
    monkeypatch.setattr("engine_planting.plant", lambda tree, *_: tree)
    results = engine.main([*TINY_RUN, "--batches", "1"])
    at_tau = results.rows[0]["dream"][
        "at_tau"
    ]  # the drafter is right all the time, which only tau 5 asks of this tree
    assert [entry["is_as_planned"] for entry in at_tau.values()] == [False, False, True]
    assert "got tau" in capsys.readouterr().out


@pytest.mark.parametrize("pair", [torch.float32], indirect=True)
def test_compiled_rows_say_so_if_nothing_was_compiled(pair, monkeypatch):
    target, drafter = pair
    run_plain = engine_rows.run_plain
    monkeypatch.setattr(engine_rows, "run_plain", lambda *given: run_plain(*given[:3]))
    for module in ("dream_hf.decoding.requests", "engine_ways"):
        monkeypatch.setattr(f"{module}.missing_compiler", lambda *_: "no compiler was found")
    settings = engine_rows.Settings((DEPTH, TOP_K, SIZE), num_steps=4)
    row = engine_rows.measure_row(target, drafter, 10, 1, settings, bandwidth=1e9)
    assert row["dream_compiled"] == {"error": "not compiled: no compiler was found"}
    assert not drafter.config.compile
    ratio = row["plain_compiled"]["step_ms"] / row["plain"]["step_ms"]
    entry = row["dream"]["at_tau"]["5"]
    assert entry["speedup_over_compiled"] / entry["speedup_over_plain"] == pytest.approx(ratio)


def test_trees_and_steps_are_checked():
    assert engine_rows.parse_tree("6/4/32") == (6, 4, 32)
    with pytest.raises(SystemExit):
        engine.parse_options(["--tree", "6/4"])
    with pytest.raises(ValueError, match=r"`num_steps` \(3\)"):
        engine_rows.Settings(num_steps=3)


def test_launches_of_a_step_are_few(tmp_path, capsys):
    """What a GPU waits for: launches, read-backs, and what is copied to it, a level's apart from the target's."""
    output = tmp_path / "counts.json"
    run = ["--count", *TINY_RUN, "--tree", "6/4/32", "--batches", "1", "--output", str(output)]
    (row,) = engine.main(run)["rows"]
    assert json.loads(output.read_text())["rows"] == [row] and "launches a step" in capsys.readouterr().out
    assert row["plain"]["operations"] > 100 and row["dream"]["per_level"] <= 60
    # Of so few layers the mask and what is kept are a large share: with 32 of them they are 0.14.
    assert row["dream"]["target_over_plain"] < 1.6 and row["dream"]["graphs"] == 0
    assert row["dream"]["made"] < 1 and row["dream"]["allocated"] > 0


def test_both_ways_of_attending_are_timed(capsys):
    run = [
        "--slots",
        "40",
        "--dtypes",
        "float64",
        "--layers",
        "2",
        "--width",
        "64",
        "--repeats",
        "2",
        "--device",
        "cpu",
    ]
    rows = tree_attention.main(run)
    assert [row["attention"] for row in rows] == ["sdpa", "eager"] and "times as fast" in capsys.readouterr().out
    for row in rows:
        assert row["speedup"] == pytest.approx(row["repeated_ms"] / row["grouped_ms"]) and row["difference"] < 1e-6


def test_launches_are_counted_by_phase():
    weight, compiled = torch.rand(4, 4), torch.compile(lambda x: (x + 1).relu(), backend="eager")
    compiled(weight)

    def run():
        for _ in range(2):
            with phase(STEP):
                (weight.view(2, 8).t() @ weight.view(2, 8)).sum().item()
                with phase(TARGET):
                    torch.tensor([1, 2]).add_(1).tolist()
                    compiled(weight)
        weight.exp()  # outside of all steps

    counts = count_launches(run)
    assert [counts.per_step(kind) for kind in ("operations", "graphs", "reads", "made")] == [3, 1, 2, 1]
    assert [counts.per_step(kind, TARGET) for kind in ("operations", "graphs", "reads", "made")] == [1, 1, 1, 1]
    assert counts.by_phase()["operations"] == {STEP: 2, TARGET: 1} and counts.operations[()] == 1


# -- growth with the context ------------------------------------------------------------------------------------------

GROWTH_RUN = [
    "--contexts",
    "10",
    "20",
    "--steps",
    "8",
    "--repeats",
    "1",
    "--generated",
    "90",
    "--samples",
    "5",  # the last one where the room for tokens, which doubles, is nearly filled
    "--tree",
    "4/2/8",
]


def test_only_caches_grow_with_the_text(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(context_growth, "SMALL", context_growth.Shape("small", TINY.model_class, TINY.make_config))
    result = context_growth.main([*GROWTH_RUN, "--output", str(tmp_path / "growth.json")])
    assert "simulated" in json.loads((tmp_path / "growth.json").read_text())["note"]
    assert [row["context"] for row in result["time"]] == [10, 20] and all(
        row["is_as_planned"] for row in result["time"]
    )
    memory = result["memory"]
    assert memory["plain_cache_bytes_per_token"] == 2 * 3 * 64 * 4  # keys and values of three layers in float32
    assert memory["other_bytes_per_generated_token"] <= 8  # the token itself
    slots = memory["context"] + 91 + memory["tree_slots"]
    assert all(sample["target_cache_bytes"] <= slots * 2 * 3 * 64 * 4 for sample in memory["samples"])
    assert "as planned" in capsys.readouterr().out


def test_what_else_grows_is_seen(monkeypatch):
    monkeypatch.setattr(context_growth, "SMALL", context_growth.Shape("small", TINY.model_class, TINY.make_config))
    kept = []

    def leak(name):
        if name == STEP:
            kept.append(torch.zeros(75))
        return nullcontext()

    with clocked_by(leak):
        result = context_growth.main(GROWTH_RUN)
    assert result["memory"]["other_bytes_per_generated_token"] > 50


def test_a_prompt_s_memory_grows_with_its_length(tmp_path, capsys):
    """The figures are there, what grows with the square would show, and training has a limit of its own."""
    run = ["--contexts", "128", "512", "--longest_training", "128", "--width", "64"]
    result = prompt_memory.main([*run, "--output", str(tmp_path / "memory.json")])
    assert json.loads((tmp_path / "memory.json").read_text())["rows"] == result["rows"]
    first, second = result["rows"]
    assert "training_bytes" in first and "training_bytes" not in second
    assert set(second["growth"]) == set(prompt_memory.PARTS) - {"training"}
    assert second["growth"]["target_prefill"] < 1.1 and second["growth"]["drafter_prompt"] < 1.1
    assert second["prompt_over_prefill"] < second["limit"] == 2
    assert "(1.0" in capsys.readouterr().out
