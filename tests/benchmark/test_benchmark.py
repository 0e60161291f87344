"""The benchmark: figures from numbers worked out by hand, fair order, resuming, tasks in the schemas of their sets."""

import base64
import csv
import io
import json
import warnings
from dataclasses import replace
from itertools import pairwise
from threading import Thread

import datasets
import numpy as np
import pytest
import torch
from processors import make_image
from tiny_pair import picture_row, tiny_drafter, tiny_processor, tiny_target
from transformers import CompileConfig

from dream_hf import CombinedDrafter, EagleDrafter, RetrievalDrafter
from dream_hf.benchmark import METHODS, Settings, load_prompts, make_methods, run_benchmark
from dream_hf.benchmark import runner as runner_module
from dream_hf.benchmark.clocks import SYNC_MESSAGE, PhaseClock, clocked, count_syncs
from dream_hf.benchmark.measure import Measurement, measure
from dream_hf.benchmark.methods import COMPILED_METHODS
from dream_hf.benchmark.profiling import PHASES, profile_steps, time_shares
from dream_hf.benchmark.public_sets import PUBLIC_SETS, with_choices
from dream_hf.benchmark.statistics import bootstrap_interval, median_of, median_ratio, ratio_of_totals, summarize
from dream_hf.data.prompts import PromptEncoder
from dream_hf.decoding.drafter import DrafterAround, DraftSession
from dream_hf.demo import make_rows
from dream_hf.drafters.dream import state as drafter_state
from dream_hf.drafters.dream.functional import DecodingForward, decoding_forward
from dream_hf.hub.model_card import write_card
from dream_hf.runtime.compilation import _compiled
from dream_hf.runtime.phases import DRAFTER, TARGET, clocked_by, phase

KEEPS_DOUBLE = False  # some of these targets are compiled

SETTINGS = Settings(max_new_tokens=10, num_warmup=1)
GENERATE = {"do_sample": False, "max_new_tokens": 10, "return_dict_in_generate": True}
GREEDY = Settings(temperatures=(0.0,), max_new_tokens=10, num_warmup=1)


@pytest.fixture(scope="module")
def target():
    return tiny_target(2.6)


@pytest.fixture(scope="module")
def drafter(target):
    return tiny_drafter(target, tree_depth=3, tree_size=8)


def prompts(count=2):
    return load_prompts("scene", count)


def run(target, methods, output, settings=GREEDY, asked=None, **options):
    options = {"num_share_prompts": 0, "with_plots": False, **options}
    return run_benchmark(target, tiny_processor(), methods, asked or prompts(), output, settings, **options)


# -- figures ----------------------------------------------------------------------------------------------------------


def made(seconds, tokens, first=1.0, num_first=1, gains=(1,)):
    return Measurement([list(tokens)], seconds, first, num_first, list(gains))


def test_ratios():
    plain, method = np.array([4.0, 9.0]), np.array([2.0, 3.0])
    assert ratio_of_totals(plain, method) == pytest.approx(13 / 5)
    assert median_ratio(plain, method) == pytest.approx(2.5)


def test_the_bootstrap_is_paired():
    plain = [1.0, 10.0, 100.0, 1000.0]
    for statistic in (ratio_of_totals, median_ratio):
        # Times differ a thousandfold between prompts, their ratio never: resampling pairs sees that.
        assert bootstrap_interval(statistic, plain, [value / 2 for value in plain]) == pytest.approx([2.0, 2.0])
    low, high = bootstrap_interval(median_ratio, plain, [1.0, 5.0, 25.0, 1000.0])
    assert 1.0 <= low < 2.0 < high <= 4.0
    assert bootstrap_interval(median_ratio, [1.0], [1.0]) is None


def test_the_bootstrap_covers_the_truth():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(40):
        plain = generator.uniform(1, 2, size=60)
        low, high = bootstrap_interval(ratio_of_totals, plain, plain / generator.uniform(1, 3, size=60))
        hits += low <= 1 / np.mean(1 / generator.uniform(1, 3, size=100_000)) <= high
    assert hits >= 34


def test_summary():
    plain = [made(8.0, range(8)), made(4.0, range(4))]
    runs = [made(4.0, range(8), first=2.0, gains=[3, 4]), made(4.0, [9, 9, 9, 9], first=1.0, num_first=2, gains=[2])]
    figures = summarize(runs, plain, is_greedy=True)
    assert figures["speedup"] == pytest.approx(12 / 8)
    assert figures["speedup_median"] == pytest.approx((2.0 + 1.0) / 2)
    # 7 tokens in 7 s against 7 in 2 s; 3 in 3 s against 2 in 3 s
    assert figures["speedup_decode"] == pytest.approx((3.5 + 2 / 3) / 2)
    assert figures["match_rate"] == 0.5
    assert (figures["tau"], figures["tau_without_bonus"], figures["num_steps"]) == (3.0, 2.0, 3)
    assert figures["acceptance_by_depth"] == pytest.approx([1.0, 2 / 3, 1 / 3])
    assert figures["tokens_per_second"] == pytest.approx(12 / 8)
    assert figures["output_length"]["mean"] == 6.0 and sum(figures["output_length"]["histogram"]["counts"]) == 2
    assert summarize(runs, plain, is_greedy=False)["match_rate"] is None


def test_the_worst_prompt():
    plain = [made(8.0, range(8)), made(4.0, range(4)), made(2.0, range(2)), made(1.0, range(4))]
    runs = [made(4.0, range(8)), made(5.0, range(5)), made(2.1, range(2)), made(2.0, range(4))]
    figures = summarize(runs, plain, is_greedy=False)
    assert figures["worst_speedup"] == pytest.approx(0.5) and figures["worst_place"] == 3
    assert figures["slow_share"] == 0.25  # 0.952 of plain's speed is not yet slow; per token, the second is as fast


def test_the_median_of_repeats():
    repeats = [
        Measurement([[1, 2]], 3.0, 0.4, 1, [1], 10),
        Measurement([[1, 2]], 1.0, 0.6, 1, [1], 30),
        Measurement([[1, 2]], 8.0, 0.5, 1, [1], None),
    ]
    assert median_of(repeats) == Measurement([[1, 2]], 3.0, 0.5, 1, [1], 30)
    odd = Measurement([[1, 3]], 8.0, 0.5, 1, [1])
    assert median_of([*repeats, odd]).rows == [[1, 3]]  # so that it matches nobody who always wrote 1, 2
    assert median_of([odd]) == odd


def test_answers_of_one_token_have_no_decoding(target):
    figures = summarize([made(1.0, [5], gains=[])], [made(2.0, [5], gains=[])], is_greedy=True)
    assert figures["speedup"] == 2.0
    assert figures["speedup_decode"] is None and figures["tau"] is None


# -- measuring --------------------------------------------------------------------------------------------------------


def encoded(prompt):
    return PromptEncoder(tiny_processor()).encode([(prompt.messages, prompt.images)])


def test_a_measurement_agrees_with_generate(target, drafter):
    inputs = encoded(prompts(3)[2])
    options = {"do_sample": False, "max_new_tokens": 10}
    plain = target.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()
    drafted = {"assistant_model": drafter, "return_dict_in_generate": True}
    output = target.generate(**inputs, **options, **drafted)
    one, other = measure(target, inputs, options), measure(target, inputs, {**options, **drafted})
    assert one.tokens == other.tokens == plain
    assert one.gains == [1] * (len(plain) - 1)
    assert other.gains == [gain for gain in output.accepted_lengths[0].tolist() if gain > 0]
    assert 0 < other.first_token_seconds < other.seconds
    assert other.peak_bytes is None or other.peak_bytes > 1_000_000


def test_gains_of_assisted_generation_count_its_first_draft(target):
    methods = make_methods(["plain", "assisted"], target, assistant=tiny_target(2.6))
    inputs = encoded(prompts()[0])
    found = measure(target, inputs, methods[1].ready(0.0, 10))
    num_later = len(found.tokens) - 1
    assert sum(found.gains) == (num_later if found.num_first_tokens == 1 else len(found.tokens))


def test_methods_set_drafters_up_and_leave_the_one_they_are_given_as_it_is(target, drafter):
    before = drafter.config.to_dict()
    methods = {m.name: m for m in make_methods(METHODS, target, drafter, target, [(2, 2, 4)], [0.5], True)}
    assert list(methods) == [*METHODS, "dream_tree 2/2/4", "dream_tree keep=0.5", "dream_tree blind"]
    arguments = methods["dream_chain"].ready(0.0, 10)
    chain = arguments["assistant_model"].settings
    assert (chain.tree_top_k, chain.tree_size, chain.tree_depth) == (1, 3, 3)
    assert arguments["do_sample"] is False and arguments["max_new_tokens"] == 10
    arguments = methods["dream_tree keep=0.5"].ready(1.0, 10)
    assert arguments["assistant_model"].reading.visual_keep_ratio == 0.5
    assert arguments["assistant_model"].settings == drafter.settings
    assert (arguments["temperature"], arguments["top_k"], arguments["top_p"]) == (1.0, 0, 1.0)
    assert methods["dream_tree_compiled"].ready(0.0, 10)["assistant_model"].settings.compile is True
    assert methods["dream_tree"].ready(0.0, 10)["assistant_model"] is drafter
    assert not methods["dream_tree blind"].ready(0.0, 10)["assistant_model"].needs.attention
    assert drafter.config.to_dict() == before
    assert target.config.image_token_id in methods["prompt_lookup"].arguments["suppress_tokens"]


@pytest.mark.parametrize("importance", ["attention", "novelty"])
def test_a_reading_of_ones_own_is_that_of_a_config(target, importance):
    """Only as many visual tokens reach the blocks, and attention is asked for, as with a config that says so."""
    inputs, options = encoded(prompts()[0]), {"do_sample": False, "max_new_tokens": 4}
    kept = {"visual_keep_ratio": 0.5, "visual_importance": importance}
    own, made = tiny_drafter(target), tiny_drafter(target, **kept)
    seen = []
    for model, drafter in ((made, made), (own, own.with_reading(**kept)), (own, own.with_settings(tree_depth=6))):
        with model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0])):
            target.generate(**inputs, **options, assistant_model=drafter)
        assert drafter.needs.attention == (importance == "attention" or drafter.plain is own)
    first, num_calls = seen[0], len(seen) // 3
    assert torch.equal(seen[num_calls], first) and seen[2 * num_calls].shape[1] > first.shape[1]
    assert own.config.visual_keep_ratio == 0.75
    with pytest.raises(ValueError, match=r"`visual_importance` \('size'\)"):
        own.with_reading(visual_importance="size")


def test_plain_decoding_is_compiled_on_this_device(target):
    (_, method) = make_methods(["plain_compiled"], target)
    config = method.arguments["compile_config"]
    config.backend = "eager"  # the quickest of compilers
    inputs = encoded(prompts()[0])
    arguments = method.ready(0.0, 6)
    with torch._dynamo.config.patch(recompile_limit=64):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        out = target.generate(**inputs, **arguments)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    assert torch.equal(out, target.generate(**inputs, do_sample=False, max_new_tokens=6))


def test_a_blind_drafter_is_not_shown_the_picture(target, drafter):
    """What the blind drafter computes is the same for any two pictures; what the other computes is not."""
    methods = make_methods(["dream_tree"], target, drafter, keep_ratios=[1.0], with_blind=True)
    read: dict[str, list] = {}
    for method in methods[2:]:
        for color in ("red", "blue"):
            inputs = PromptEncoder(tiny_processor()).encode([(prompts()[0].messages, [make_image(color=color)])])
            first = []
            with drafter.layers[0].register_forward_pre_hook(lambda _, args, first=first: first.append(args[:2])):
                measure(target, inputs, method.ready(0.0, 3))
            is_visual = inputs["input_ids"][0] == target.config.image_token_id
            read.setdefault(method.name, []).append(
                [states[0, : len(is_visual)][is_visual[: states.shape[1]]] for states in first[0]]
            )
    assert all(not states.any() for picture in read["dream_tree blind"] for states in picture)
    red, blue = read["dream_tree keep=1"]
    assert all(not torch.equal(one, other) for one, other in zip(red, blue, strict=True))
    assert not drafter._forward_pre_hooks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ["plain"], "with_blind": True}, "`drafter` is needed"),
        ({"names": ["dream_tre"]}, r"`methods` has \['dream_tre'\]"),
        ({"names": ["dream_tree"]}, "`drafter` is needed"),
        ({"names": ["plain"], "trees": [(2, 2, 2)]}, "`drafter` is needed"),
        ({"names": ["assisted"]}, "`assistant` is needed"),
        ({"names": ["model"]}, "`assistant` is needed for the method 'model'"),
        ({"names": ["retrieval+dream"]}, r"`drafter` is needed for \['retrieval\+dream'\]"),
    ],
)
def test_methods_that_cannot_be_made(target, options, message):
    with pytest.raises(ValueError, match=message):
        make_methods(target=target, **options)


def test_tree_shapes_and_ratios_are_checked_at_once(target, drafter):
    with pytest.raises(ValueError, match=r"`tree_size` \(0\)"):
        make_methods(["plain"], target, drafter, trees=[(2, 2, 0)])
    with pytest.raises(ValueError, match=r"`visual_keep_ratio` \(1.5\)"):
        make_methods(["plain"], target, drafter, keep_ratios=[1.5])


# -- the whole --------------------------------------------------------------------------------------------------------


def test_all_methods_side_by_side(target, drafter, tmp_path):
    names = [name for name in METHODS if name not in COMPILED_METHODS]
    methods = make_methods(names, target, drafter, tiny_target(2.6), [(2, 2, 4)], [1.0], True)
    asked = [*prompts(2), *load_prompts("chart", 1)]
    results = run(target, methods, tmp_path, SETTINGS, asked, with_plots=True, num_share_prompts=1)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results["failed_methods"] == {}
    assert len(results["rows"]) == len(methods) * 2 * 2  # temperatures, tasks
    assert len(results["overall"]) == len(methods) * 2
    for row in results["rows"]:
        assert row["num_prompts"] == {"scene": 2, "chart": 1}[row["task"]]
        assert row["match_rate"] == (1.0 if row["temperature"] == 0 else None)
        assert row["speedup"] > 0 and row["tau"] >= 1.0
        assert row["drafting"].get("tree_top_k") == {"dream_chain": 1, "dream_tree 2/2/4": 2}.get(row["method"])
        if row["method"] == "plain":
            assert row["speedup"] == row["speedup_decode"] == row["tau"] == 1.0
        if row["time_shares"] is not None:
            assert sum(row["time_shares"].values()) == pytest.approx(1.0)
    by_drafter = {row["method"]: row["time_shares"]["drafter"] for row in results["rows"] if row["time_shares"]}
    assert by_drafter["plain"] == 0 and by_drafter["dream_tree"] > 0.05
    table = (tmp_path / "results.md").read_text()
    assert "## Temperature 1" in table and "| all | dream_tree 2/2/4 |" in table
    assert len(list(tmp_path.glob("*.png"))) == 7
    text = json.dumps(results["provenance"])
    assert str(tmp_path) not in text and "/home" not in text and '"tree_depth": 3' in text
    assert results["provenance"]["target"]["weights"] != results["provenance"]["drafter"]["weights"]


def test_further_drafters_are_methods_of_their_names(target, drafter, tmp_path):
    torch.manual_seed(0)
    further = {"eagle": EagleDrafter.for_target(target), "both": CombinedDrafter([RetrievalDrafter(), drafter])}
    methods = make_methods(["dream_tree"], target, drafter, further=further)
    assert [method.name for method in methods] == ["plain", "dream_tree", "eagle", "both"]
    results = run(target, methods, tmp_path)
    assert not results["failed_methods"] and {row["method"] for row in results["rows"]} >= further.keys()
    told = results["provenance"]["further"]
    assert told["eagle"]["class"] == "EagleDrafter" and told["eagle"]["num_parameters"] > 0
    assert (
        told["both"]["class"] == "CombinedDrafter" and "eagle: EagleDrafter" in (tmp_path / "results.md").read_text()
    )
    with pytest.raises(ValueError, match="'plain', which is a method already"):
        make_methods([], target, further={"plain": drafter})


def test_batches(target, drafter, tmp_path):
    methods = make_methods(["prompt_lookup", "dream_tree"], target, drafter)
    settings = Settings((0.0,), 12, 1, batch_size=2)
    asked = [*prompts(3), *load_prompts("chart", 2)]
    results = run(target, methods, tmp_path / "batched", settings, asked)
    alone = run(target, methods, tmp_path / "alone", Settings((0.0,), 12, 1), asked)
    assert set(results["failed_methods"]) == {"prompt_lookup"}  # it takes one prompt at a time
    assert [(row["task"], row["num_prompts"]) for row in results["rows"]] == [("scene", 3)] * 2 + [("chart", 2)] * 2
    kept = [row for row in alone["rows"] if row["method"] != "prompt_lookup"]
    for row, single in zip(results["rows"], kept, strict=True):
        assert row["match_rate"] == 1.0
        for name in ("tau", "num_steps", "output_length", "acceptance_by_depth"):
            assert row[name] == single[name]
    lines = [json.loads(line) for line in (tmp_path / "batched" / "samples.jsonl").open()]
    assert [[len(run["rows"]) for (run,) in line["runs"].values()] for line in lines] == [[2, 2], [1, 1], [2, 2]]


def test_a_blind_drafter_runs_as_fast_a_way_as_any_and_in_batches(target, drafter, tmp_path, monkeypatch):
    made = []
    make = drafter_state.decoding_forward
    monkeypatch.setattr(drafter_state, "decoding_forward", lambda drafter: made.append(make(drafter)) or made[-1])
    results = run(
        target,
        make_methods(["dream_tree"], target, drafter, with_blind=True),
        tmp_path,
        Settings((0.0,), 6, 1, batch_size=2),
    )
    assert made and all(type(forward) is DecodingForward for forward in made)
    assert not results["failed_methods"] and all(row["match_rate"] == 1.0 for row in results["rows"])


def test_every_prompt_goes_through_all_methods_before_the_next(target, drafter, tmp_path, monkeypatch):
    order = []
    original = runner_module.measure

    def watched(target, inputs, arguments):
        order.append(("dream" if "assistant_model" in arguments else "plain", inputs["input_ids"].tolist()))
        return original(target, inputs, arguments)

    monkeypatch.setattr(runner_module, "measure", watched)
    run(target, make_methods(["dream_tree"], target, drafter), tmp_path, asked=prompts(3))
    counted = order[2:]  # without the warm-up
    assert [ids for _, ids in counted[0::2]] == [ids for _, ids in counted[1::2]]
    assert [name for name, _ in counted] == ["plain", "dream", "dream", "plain", "dream", "plain"]


def test_the_order_of_methods_is_fair():
    """In as many turns as two rounds take, each method stands at each place, and before and behind each other one."""
    orders = [runner_module._ordered("abc", turn) for turn in range(6)]
    for place in range(3):
        assert sorted(order[place] for order in orders) == sorted("abc" * 2)
    follows = {pair for order in orders for pair in pairwise(order)}
    assert follows == {(one, other) for one in "abc" for other in "abc" if one != other}


def test_repeats_take_turns_and_their_median_counts(target, drafter, tmp_path, monkeypatch):
    methods = make_methods(["dream_tree"], target, drafter)
    seconds = iter(
        [9.0, 9.0, 4.0, 1.0, 2.0, 8.0, 8.0, 1.0]
    )  # the warm-up; then plain, dream; dream, plain; dream, plain
    original, order = runner_module.measure, []

    def timed(target, inputs, arguments):
        order.append("dream" if "assistant_model" in arguments else "plain")
        return replace(original(target, inputs, arguments), seconds=next(seconds), first_token_seconds=0.5)

    monkeypatch.setattr(runner_module, "measure", timed)
    results = run(target, methods, tmp_path, Settings((0.0,), 10, 1, repeats=3), asked=prompts(1))
    assert order[2:] == ["plain", "dream", "dream", "plain", "dream", "plain"]
    plain, dream = results["rows"]
    assert plain["seconds_median"] == 4.0 and dream["seconds_median"] == 2.0
    assert dream["speedup"] == dream["worst_speedup"] == 2.0 and dream["num_prompts"] == 1
    assert results["provenance"]["repeats"] == 3
    (line,) = (tmp_path / "samples.jsonl").open()
    assert [len(repeats) for repeats in json.loads(line)["runs"].values()] == [3, 3]
    again = run(target, methods, tmp_path, Settings((0.0,), 10, 1, repeats=3), asked=prompts(1))
    assert again["rows"] == results["rows"]
    with pytest.raises(ValueError, match="`repeats` 3 and now it is 2"):
        run(target, methods, tmp_path, Settings((0.0,), 10, 1, repeats=2), asked=prompts(1))


def test_a_method_that_fails_in_a_later_repeat_is_left_out(target, drafter, tmp_path, monkeypatch):
    methods = make_methods(["plain_static", "dream_tree"], target, drafter)
    original, calls = runner_module.measure, []

    def failing(target, inputs, arguments):
        calls.append("cache_implementation" in arguments)
        if calls[-1] and sum(calls) == 3:  # the warm-up, the first repeat, the second
            raise RuntimeError("too late")
        return original(target, inputs, arguments)

    monkeypatch.setattr(runner_module, "measure", failing)
    settings = Settings((0.0,), 10, 1, repeats=2)
    for _ in range(2):  # and it stays left out when the benchmark is started again
        results = run(target, methods, tmp_path, settings, asked=prompts(1))
        assert list(results["failed_methods"]) == ["plain_static"]
        assert [row["method"] for row in results["rows"]] == ["plain", "dream_tree"]


def test_a_stopped_benchmark_goes_on(target, drafter, tmp_path, monkeypatch):
    methods = make_methods(["dream_tree"], target, drafter)
    calls = []
    original = runner_module.measure

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 6:  # two of the warm-up, the first prompt, half of the second
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(runner_module, "measure", failing)
    with pytest.raises(KeyboardInterrupt):
        run(target, methods, tmp_path, asked=prompts(3))
    first = (tmp_path / "samples.jsonl").read_text()
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"temperature": 0.0, "ta')
    results = run(target, methods, tmp_path, asked=prompts(3))
    assert len(calls) == 6 + 2 + 4
    assert (tmp_path / "samples.jsonl").read_text().startswith(first)
    assert [row["num_prompts"] for row in results["rows"]] == [3, 3]
    again = run(target, methods, tmp_path, asked=prompts(3))
    assert len(calls) == 12 and again["rows"] == results["rows"]
    with pytest.raises(ValueError, match=r"`max_new_tokens` 10 and now it is 11"):
        run(target, methods, tmp_path, Settings((0.0,), 11, 1), asked=prompts(3))
    other = tiny_drafter(target, tree_depth=3, tree_size=8)
    other.norm.weight.data.mul_(2)  # as if it had been trained on: the same name and shape
    with pytest.raises(ValueError, match="was begun with `drafter`"):
        run(target, make_methods(["dream_tree"], target, other), tmp_path, asked=prompts(3))


def test_a_method_that_fails_late_is_left_out_and_named(target, drafter, tmp_path, monkeypatch):
    methods = make_methods(["plain_static", "dream_tree"], target, drafter)
    original, calls = runner_module.measure, []

    def failing(target, inputs, arguments):
        calls.append(arguments)
        if "cache_implementation" in arguments and len(calls) > 5:
            raise RuntimeError("no such luck")
        return original(target, inputs, arguments)

    monkeypatch.setattr(runner_module, "measure", failing)
    results = run(target, methods, tmp_path, asked=prompts(3))
    assert results["failed_methods"] == {"plain_static": "RuntimeError: no such luck"}
    assert [row["method"] for row in results["rows"]] == ["plain", "dream_tree"]
    assert "plain_static: RuntimeError: no such luck" in (tmp_path / "results.md").read_text()


def test_plain_decoding_that_fails_is_an_error(target, drafter, tmp_path, monkeypatch):
    def failing(*_):
        raise RuntimeError("broken target")

    monkeypatch.setattr(runner_module, "measure", failing)
    with pytest.raises(RuntimeError, match="broken target"):
        run(target, make_methods(["dream_tree"], target, drafter), tmp_path)


def test_arguments_out_of_range(target, tmp_path):
    methods = make_methods(["plain"], target)
    for settings, message in (
        (Settings(max_new_tokens=1), r"`max_new_tokens` \(1\)"),
        (Settings(num_warmup=0), r"`num_warmup` \(0\)"),
        (Settings(batch_size=0), r"`batch_size` \(0\)"),
        (Settings(repeats=0), r"`repeats` \(0\)"),
        (Settings(temperatures=(-1.0,)), r"`temperatures` \(\[-1.0\]\)"),
    ):
        with pytest.raises(ValueError, match=message):
            run(target, methods, tmp_path, settings)
    with pytest.raises(ValueError, match="`prompts` is empty"):
        run_benchmark(target, tiny_processor(), methods, [], tmp_path)
    with pytest.raises(ValueError, match="holds a prompt twice"):
        run(target, methods, tmp_path, asked=prompts(1) * 2)


def test_the_model_card_shows_the_results(target, drafter, tmp_path):
    drafter.save_pretrained(tmp_path)
    results = run(target, make_methods(["dream_tree"], target, drafter), tmp_path)
    write_card(tmp_path, drafter.config)
    row = next(row for row in results["rows"] if row["method"] == "dream_tree")
    assert f"{row['speedup']:.3g}" in (tmp_path / "README.md").read_text()


# -- where the time goes ----------------------------------------------------------------------------------------------


def test_time_shares(target, drafter):
    plain, tree = make_methods(["dream_tree"], target, drafter)
    encoder = PromptEncoder(tiny_processor())
    time_shares(target, encoder, tree, prompts(1), 10)  # transformers leaves hooks of its own at the first decoding
    hooks = [len(module._forward_hooks) for module in target.modules()]
    shares = time_shares(target, encoder, tree, prompts(), 10)
    assert all(0 < share < 1 for share in shares.values())
    assert time_shares(target, encoder, plain, prompts(), 10)["drafter"] == 0
    assert [len(module._forward_hooks) for module in target.modules()] == hooks


def test_clocks_leave_the_drafter_its_fast_path(target, drafter, tmp_path, monkeypatch):
    """A hook would send the drafter through its modules, which is not what is to be measured."""
    found = []

    def watched(model):
        found.append(decoding_forward(model))
        return found[-1]

    monkeypatch.setattr(drafter_state, "decoding_forward", watched)
    tree = make_methods(["dream_tree"], target, drafter)[1]
    encoder = PromptEncoder(tiny_processor())
    time_shares(target, encoder, tree, prompts(1), 10)
    profile_steps(target, encoder, tree, prompts(1)[0], 10, tmp_path / "trace.json")
    # One run for the shares; for the profile one to warm up, one that is clocked and one that is traced.
    assert len(found) == 4 and all(type(forward) is DecodingForward for forward in found)


def test_compiled_forwards_are_clocked_and_stay_compiled(target, drafter, tmp_path):
    methods = make_methods(["dream_tree"], target, drafter)
    arguments = {**methods[1].arguments, "compile_config": CompileConfig(backend="eager", fullgraph=True)}
    tree, encoder = replace(methods[1], arguments=arguments), PromptEncoder(tiny_processor())
    inputs = encoded(prompts(1)[0])
    for _ in range(2):
        with torch._dynamo.config.patch(recompile_limit=64):
            measure(target, inputs, tree.ready(0.0, 10))
    with torch._dynamo.config.patch(error_on_recompile=True):  # what the clocks see holds no compiling
        shares = time_shares(target, encoder, tree, prompts(1), 10)
        profile = profile_steps(target, encoder, tree, prompts(1)[0], 10)
    assert shares["drafter"] > 0 and shares["target"] > 0
    assert profile["milliseconds_per_step"]["drafter forward"] > profile["milliseconds_per_step"]["tree growth"]
    compiled = [*_compiled[drafter].values(), *_compiled[target].values()]
    assert len(compiled) >= 2 and not any(each.is_broken for each in compiled)


def test_every_forward_is_clocked(target, drafter):
    """As many forwards of the target as steps and a prefill; of the drafter one to read on and one for each level."""
    drafting = {**GENERATE, "assistant_model": drafter.with_settings(pause_below=0.0)}
    names = []
    clock = PhaseClock(target.device)

    def noted(name):
        names.append(name)
        return clock(name)

    with clocked_by(noted):
        found = measure(target, encoded(prompts(1)[0]), drafting)
    num_steps = len(found.gains)
    assert names.count(TARGET) == 1 + num_steps
    assert 2 * num_steps <= names.count(DRAFTER) <= (1 + 3) * num_steps
    owners = clock.by_owner()
    assert all(seconds > 0 for seconds in owners.values()) and sum(owners.values()) < found.seconds


def test_a_phase_costs_nothing_without_a_clock():
    assert phase(TARGET) is phase(DRAFTER)  # a context that does nothing, made once
    with clocked_by(PhaseClock(torch.device("cpu"))):
        assert phase(TARGET) is not phase(TARGET)
    assert phase(TARGET) is phase(DRAFTER)


def test_phases_count_without_what_runs_inside_them(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dream_hf.benchmark.clocks.time.perf_counter", lambda: now[0])
    clock = PhaseClock(torch.device("cpu"))

    def take(seconds):
        now[0] += seconds

    with clocked_by(clock):
        take(100)
        for outer in ("prefill", "step", "step"):
            with phase(outer):
                take(1)
                with phase(TARGET):
                    take(10)
                    with phase("cache work"), pytest.raises(KeyError), phase(DRAFTER):  # left by an error
                        take(3)
                        raise KeyError
                with phase(DRAFTER):
                    take(5)
    assert clock.by_innermost("step") == {"step": 2, TARGET: 20, "cache work": 0, DRAFTER: 16}
    assert clock.by_innermost("prefill") == {"prefill": 1, TARGET: 10, "cache work": 0, DRAFTER: 8}
    assert clock.by_owner() == {"target": 39, "drafter": 15}


def test_profile(target, drafter, tmp_path):
    tree = make_methods(["dream_tree"], target, drafter)[1]
    parts = profile_steps(target, PromptEncoder(tiny_processor()), tree, prompts()[1], 10, tmp_path / "trace.json")
    assert "forward" not in vars(target) and "forward" not in vars(drafter)
    assert set(parts["milliseconds_per_step"]) == set(PHASES)
    assert parts["host_device_syncs"] is None  # on a CPU there is nothing to wait for
    assert all(value > 0 for value in parts["milliseconds_per_step"].values())
    assert sum(parts["share_of_step"].values()) == pytest.approx(1.0)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert {f"dream_hf: {name}" for name in PHASES if name != "rest"} <= names


class NoisyDrafter(DrafterAround):
    """Syncs once when the prompt has been read, three times in the second step, and once in the others."""

    def __init__(self, drafter):
        super().__init__(drafter)
        self.num_steps = 0

    def start(self, prefill, settings):
        sync()
        return NoisySession(self, super().start(prefill, settings))


class NoisySession(DraftSession):
    def __init__(self, noisy, inner):
        self.noisy, self.inner = noisy, inner

    def draft(self, root_tokens, max_depth=None):
        self.noisy.num_steps += 1
        for _ in range(3 if self.noisy.num_steps == 2 else 1):
            sync()
        warnings.warn("something else", UserWarning, stacklevel=1)
        return self.inner.draft(root_tokens, max_depth)

    def read(self, verified):
        self.inner.read(verified)


def sync():
    """What PyTorch says of each."""
    warnings.warn(f"called a {SYNC_MESSAGE}", UserWarning, stacklevel=1)


def test_syncs_are_counted_step_by_step(target, drafter, monkeypatch):
    modes, noisy = [], NoisyDrafter(drafter.with_settings(pause_below=0.0))
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    arguments = {**GENERATE, "assistant_model": noisy}
    counts = count_syncs(lambda: measure(target, encoded(prompts(1)[0]), arguments))
    assert noisy.num_steps >= 2 and counts == {"mean": pytest.approx(1 + 2 / noisy.num_steps), "most": 3}
    assert modes == ["warn", 0]


def test_clocks_count_inner_phases_once(target, drafter):
    tree = make_methods(["dream_tree"], target, drafter)[1]
    inputs, arguments = encoded(prompts()[0]), tree.ready(0.0, 10)
    expected = measure(target, inputs, arguments).tokens
    with clocked(target, drafter) as clock:
        found = measure(target, inputs, arguments)
    assert found.tokens == expected
    assert 0 < sum(clock.seconds.values()) <= found.seconds


# -- tasks ------------------------------------------------------------------------------------------------------------


def test_demo_tasks_are_held_out_and_repeatable():
    for task in ("scene", "chart", "text"):
        asked = load_prompts(task, 3, seed=7)
        rows = make_rows(task, 3, 1_000_007)
        assert [prompt.images[0].tobytes() for prompt in asked] == [row["images"][0].tobytes() for row in rows]
        assert [prompt.messages for prompt in asked] == [row["messages"][:-1] for row in rows]


def test_a_file_of_rows(tmp_path):
    make_image().save(tmp_path / "picture.png")
    rows = [{**picture_row(f"question {i}"), "images": ["picture.png"]} for i in range(5)]
    rows[0]["messages"] += [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "that"}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = load_prompts(str(tmp_path / "mine.jsonl"), 9)
    assert len(asked) == 5 and {prompt.task for prompt in asked} == {"mine"}
    assert all(prompt.messages[-1]["role"] == "user" for prompt in asked)
    assert len(next(prompt for prompt in asked if prompt.index == 0).messages) == 3
    assert [prompt.index for prompt in load_prompts(str(tmp_path / "mine.jsonl"), 2)] == [
        prompt.index for prompt in asked[:2]
    ]
    assert [prompt.index for prompt in load_prompts(str(tmp_path / "mine.jsonl"), 5, seed=1)] != [
        prompt.index for prompt in asked
    ]


def as_bytes(color):
    buffer = io.BytesIO()
    make_image(color=color).save(buffer, format="PNG")
    return buffer.getvalue()


PICTURE = {"bytes": as_bytes("blue"), "path": None}
TEXT, INTEGER, IMAGE = datasets.Value("string"), datasets.Value("int64"), datasets.Image()

# Rows in the columns of the public sets; None in `usable` marks the row that the adapter leaves out.
TINY_SETS = {
    "seed_bench_2": (
        {
            **dict.fromkeys(("answer", "choice_a", "choice_b", "choice_c", "choice_d", "data_type", "question"), TEXT),
            "image": datasets.List(IMAGE),
            "question_id": TEXT,
        },
        [
            {"choice_a": "a cat", "choice_b": "a dog", "choice_c": "a bird", "choice_d": "none", "answer": "A",
             "data_type": "Multiple Images", "question": "What is it? <img>", "image": [PICTURE, PICTURE], "question_id": "1"},
            {"choice_a": "1.jpg", "choice_b": "2.jpg", "choice_c": "3.jpg", "choice_d": "4.jpg", "answer": "A",
             "data_type": "Image Generation", "question": "Which?", "image": [PICTURE], "question_id": "2"},
        ],
        ("What is it?\nA. a cat\nB. a dog\nC. a bird\nD. none\n", 2),
    ),
    "science_qa": (
        {
            "image": IMAGE, "question": TEXT, "choices": datasets.List(TEXT), "answer": datasets.Value("int8"), "hint": TEXT,
            "task": TEXT, "grade": TEXT, "subject": TEXT, "topic": TEXT, "category": TEXT, "skill": TEXT, "lecture": TEXT,
            "solution": TEXT,
        },
        [
            {"image": PICTURE, "question": "Which is colder?", "choices": ["ice", "fire"], "answer": 0, "hint": "Look."},
            {"image": None, "question": "No picture", "choices": ["x", "y"], "answer": 0, "hint": ""},
        ],
        ("Look.\nWhich is colder?\nA. ice\nB. fire\n", 1),
    ),
    "ocrbench_v2": (
        {
            "id": datasets.Value("int32"), "dataset_name": TEXT, "question": TEXT, "type": TEXT, "answers": datasets.List(TEXT),
            "image": IMAGE, "eval": TEXT,
        },
        [{"id": 1, "dataset_name": "x", "question": "Read the text.", "type": "t", "answers": ["a"], "image": PICTURE}],
        ("Read the text.", 1),
    ),
    "chart_qa": (
        {"image": IMAGE, "query": TEXT, "label": datasets.List(TEXT), "human_or_machine": INTEGER},
        [{"image": PICTURE, "query": "How high is the bar?", "label": ["3"], "human_or_machine": 0}],
        ("How high is the bar?\n", 1),
    ),
    "math_vista": (
        {
            "pid": TEXT, "question": TEXT, "image": TEXT, "decoded_image": IMAGE, "choices": datasets.List(TEXT), "unit": TEXT,
            "precision": datasets.Value("float64"), "answer": TEXT, "question_type": TEXT, "answer_type": TEXT, "query": TEXT,
        },
        [{"pid": "1", "question": "x?", "image": "1.jpg", "decoded_image": PICTURE, "query": "Hint: count.\nQuestion: x?"}],
        ("Hint: count.\nQuestion: x?", 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TINY_SETS)
def test_public_sets_in_their_own_columns(name, tmp_path):
    columns, rows, (question, num_images) = TINY_SETS[name]
    rows = [{column: row.get(column) for column in columns} for row in rows]
    split = PUBLIC_SETS[name].split
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(rows, features=datasets.Features(columns)).to_parquet(
        str(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    )
    asked = load_prompts(f"{name}={tmp_path}", 5)
    assert len(asked) == 1  # and not the row that cannot be used
    assert asked[0].task == name
    content = asked[0].messages[0]["content"]
    assert [part["type"] for part in content] == ["image"] * num_images + ["text"]
    assert content[-1]["text"].startswith(question)
    assert asked[0].images[0].tobytes() == make_image(color="blue").tobytes()


def test_mmt_bench_is_tab_separated_with_pictures_in_base64(tmp_path, monkeypatch):
    encoded_picture = base64.b64encode(as_bytes("blue")).decode()
    columns = ["index", "question", "hint", "A", "B", "C", "answer", "image", "category", "l2-category", "split"]
    rows = [
        [1, "What colour?", "", "red", "blue", "", "B", encoded_picture, "c", "l", "val"],
        [2, "The same one", "", "red", "blue", "", "B", "1", "c", "l", "val"],
        [3, "Which two?", "Compare.", "x", "y", "z", "A", repr([encoded_picture, encoded_picture]), "c", "l", "val"],
    ]
    with (tmp_path / "MMT-Bench_VAL.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([columns, *rows])
    public = PUBLIC_SETS["mmt_bench"]
    monkeypatch.setitem(PUBLIC_SETS, "mmt_bench", type(public)(public.to_row, str(tmp_path), "train", public.files))
    asked = {prompt.index: prompt for prompt in load_prompts("mmt_bench", 5)}
    assert set(asked) == {0, 2}
    assert [len(asked[index].images) for index in (0, 2)] == [1, 2]
    assert asked[0].messages[0]["content"][-1]["text"].startswith("What colour?\nA. red\nB. blue\nAnswer")
    assert asked[2].messages[0]["content"][-1]["text"].startswith("Compare.\nWhich two?\nA. x\nB. y\nC. z\n")
    assert asked[0].images[0].tobytes() == make_image(color="blue").tobytes()


def test_mmspec_from_a_clone(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(as_bytes("blue"))
    row = {"id": "1", "image": "images/1.png", "turns": ["Describe it.", "And now?"], "category": "c", "topic": "t"}
    (tmp_path / "mmspec.jsonl").write_text(json.dumps(row) + "\n")
    asked = load_prompts(f"mmspec={tmp_path / 'mmspec.jsonl'}", 3)
    assert asked[0].messages[0]["content"][-1]["text"] == "Describe it." and len(asked[0].images) == 1
    with pytest.raises(ValueError, match="no known Hub id"):
        load_prompts("mmspec", 3)


def test_tasks_that_do_not_exist(tmp_path):
    with pytest.raises(ValueError, match=r"`task` \('poem'\) is unknown"):
        load_prompts("poem", 1)
    with pytest.raises(ValueError, match=r"`num_prompts` \(0\)"):
        load_prompts("scene", 0)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_prompts(f"chart_qa={tmp_path / 'nothing'}", 1)
    (tmp_path / "columns.jsonl").write_text(json.dumps({"picture": "x", "query": "y"}) + "\n")
    with pytest.raises(ValueError, match=r"no column 'image', only \['picture', 'query'\]"):
        load_prompts(f"chart_qa={tmp_path / 'columns.jsonl'}", 1)
    (tmp_path / "broken.jsonl").write_text(json.dumps({"image": "none.png", "query": "y"}) + "\n")
    with pytest.raises(ValueError, match=r"row 0 cannot be used.*none\.png"):
        load_prompts(f"chart_qa={tmp_path / 'broken.jsonl'}", 1)
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"`task` \('.*cut\.parquet'\) cannot be read: "):
        load_prompts(str(tmp_path / "cut.parquet"), 1)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": "x"}]}) + "\n")
    with pytest.raises(ValueError, match="no usable row"):
        load_prompts(str(tmp_path / "rows.jsonl"), 1)


def test_choices_are_lettered():
    assert with_choices("q", ["x", "y"], "h").splitlines()[:4] == ["h", "q", "A. x", "B. y"]


def test_torch_is_deterministic_across_methods_at_a_temperature(target, drafter, tmp_path):
    """Each method starts from the same seed, so the same method twice gives the same sample."""
    methods = make_methods(["dream_tree"], target, drafter)
    results = [run(target, methods, tmp_path / name, Settings((1.0,), 10, 1)) for name in ("one", "two")]
    tokens = [
        [json.loads(line)["runs"]["dream_tree"][0]["rows"] for line in (tmp_path / name / "samples.jsonl").open()]
        for name in ("one", "two")
    ]
    assert tokens[0] == tokens[1] and results[0]["rows"][0]["match_rate"] is None
    assert torch.is_grad_enabled()


def test_other_threads_decode_as_ever_while_methods_are_measured(target, drafter):
    """A benchmark changes nothing that a call elsewhere could see, in the very middle of its own."""
    inputs, seen = encoded(prompts(1)[0]), []
    before = drafter.config.to_dict()

    class Looking(DrafterAround):
        def start(self, prefill, settings):
            assert settings.tree_depth == 1 and drafter.config.to_dict() == before
            other = Thread(target=lambda: seen.append(target.generate(**inputs, **GENERATE, assistant_model=drafter)))
            with clocked_by(PhaseClock(torch.device("cpu"))):
                other.start()
                other.join()
            return super().start(prefill, settings)

    method = make_methods(["dream_tree"], target, drafter, trees=[(1, 1, 1)], with_blind=True)[2]
    expected = target.generate(**inputs, **GENERATE, assistant_model=drafter)
    arguments = method.ready(0.0, 10)
    measure(target, inputs, {**arguments, "assistant_model": Looking(arguments["assistant_model"])})
    assert torch.equal(seen[0].accepted_lengths, expected.accepted_lengths)
    assert torch.equal(seen[0].sequences, expected.sequences)
