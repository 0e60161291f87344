"""Committed results are named with their commands, and their tables are what their JSON says: no figure is edited by hand."""

import json
import re
import shlex
from pathlib import Path

import pytest

from dream_hf.benchmark.tables import render
from dream_hf.cli.bench import MAX_NEW_TOKENS, NUM_PROMPTS
from dream_hf.cli.main import make_parser

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ENTRY = re.compile(r"^\| \[`(?P<name>[^`]+)`\]\((?P<link>[^)]+)\) \|.*\| `(?P<command>[^`]+)` \|$", re.MULTILINE)


def listed():
    """Name -> link and command of every result in benchmarks/README.md."""
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    return {match["name"]: (match["link"], match["command"]) for match in ENTRY.finditer(text)}


def of_bench():
    """Names of the results that `dream-hf bench` wrote."""
    return [name for name, (_, command) in listed().items() if command.startswith("dream-hf bench ")]


def test_every_result_is_listed():
    committed = {file.parent.name for file in RESULTS.glob("*/results.json")} | {
        file.name for file in RESULTS.glob("*.json")
    }
    assert committed == set(listed())
    assert of_bench()
    for link, command in listed().values():
        assert (ROOT / "benchmarks" / link).is_file()
        assert f"--output benchmarks/{link.removesuffix('/results.md')}" in command


def test_every_json_can_be_read():
    for file in RESULTS.rglob("*.json"):
        json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", of_bench())
def test_tables_are_what_the_json_says(name):
    results = json.loads((RESULTS / name / "results.json").read_text(encoding="utf-8"))
    assert (RESULTS / name / "results.md").read_text(encoding="utf-8") == render(results)


@pytest.mark.parametrize("name", of_bench())
def test_the_command_is_the_one_that_was_run(name):
    """As far as results tell: methods, tasks, temperatures, number of prompts, and how they were run."""
    results = json.loads((RESULTS / name / "results.json").read_text(encoding="utf-8"))
    args = make_parser().parse_args(shlex.split(listed()[name][1])[1:])
    rows, provenance = results["rows"], results["provenance"]
    asked = {"plain", *args.methods}
    asked |= {f"dream_tree {depth}/{top_k}/{size}" for depth, top_k, size in args.trees}
    asked |= {f"dream_tree keep={ratio:g}" for ratio in args.keep_ratios} | (
        {"dream_tree blind"} if args.blind else set()
    )
    assert asked == {row["method"] for row in rows} | set(results["failed_methods"])
    assert set(args.temperatures) == {row["temperature"] for row in rows}
    assert set(args.tasks) == {row["task"] for row in rows}
    assert {args.num_prompts or NUM_PROMPTS} == {row["num_prompts"] for row in rows}
    run = {
        "seed": args.seed,
        "max_new_tokens": args.max_new_tokens or MAX_NEW_TOKENS,
        "num_warmup": args.warmup,
        "batch_size": args.batch_size,
    }
    assert run.items() <= provenance.items() and args.repeats == provenance.get("repeats", 1)
    assert args.dtype in ("auto", provenance["target"]["dtype"])
    assert args.threads in (None, provenance["machine"]["threads"])
    assert (results.get("profile") is not None) == args.profile
