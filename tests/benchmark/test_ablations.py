"""`benchmarks/ablations.py`: every variant can be trained and measured, and a stopped run goes on."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from processors import make_image
from tiny_pair import save_pair

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import ablations
from ablation_variants import BASE, VARIANTS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe of one step with a tiny pair, two rows and one prompt."""
    folder = tmp_path_factory.mktemp("ablations")
    target, _ = save_pair(folder)
    make_image().save(folder / "one.png")
    content = [{"type": "image"}, {"type": "text", "text": "hello"}]
    answer = {"role": "assistant", "content": "hello world, what is to be seen?"}
    row = {"messages": [{"role": "user", "content": content}, answer], "images": ["one.png"]}
    (folder / "rows.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    settings = {
        "target": str(target),
        "dtype": "float32",
        "train_dataset": str(folder / "rows.jsonl"),
        "eval_dataset": str(folder / "rows.jsonl"),
        "drafter_config": {"tree_depth": 2, "tree_top_k": 2, "tree_size": 4, "pause_below": 0.0},
        "arguments": {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
        "timed": {"rows": 1, "max_new_tokens": 4},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return folder / "recipe.yaml"


def run(monkeypatch, recipe, output, *options):
    work = str(recipe.parent / "work")
    command = ["ablations.py", str(recipe), "--work", work, "--output", str(output), *options]
    monkeypatch.setattr(sys, "argv", command)
    ablations.main()
    return json.loads((output / "results.json").read_text()), (output / "results.md").read_text()


def test_all_variants_are_measured_and_none_twice(recipe, tmp_path, monkeypatch, capsys):
    results, _ = run(monkeypatch, recipe, tmp_path, "--variants", BASE, "no_cross")
    first = results["variants"]
    capsys.readouterr()
    results, table = run(monkeypatch, recipe, tmp_path)
    printed = capsys.readouterr().out
    assert {name: results["variants"][name] for name in first} == first and "no_cross, seed 0" not in printed
    assert set(results["variants"]) == set(VARIANTS)
    weights = {}
    for name, seeds in results["variants"].items():
        (measured,) = seeds.values()
        weights[name] = measured["num_weights"]
        for which in ("tree", "chain"):
            assert len(measured[which]) == 2 and all(
                0 < steps <= tokens <= 3 * steps for steps, tokens in measured[which]
            )
        assert measured["timed"]["is_same"] == [True] and measured["timed"]["seconds"][0] > 0
    assert weights["no_cross"] < weights[BASE] < weights["two_cross"] and weights["mid_none"] == weights[BASE]
    assert table.count("\n| ") == len(VARIANTS) + 2 and VARIANTS["concat"].says in table


def test_other_settings_and_slips_are_refused(recipe, tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text(json.dumps({"recipe": {}, "variants": {}}))
    for options, message in (((), "another recipe"), (("--variants", "no_such"), r"\['no_such'\]")):
        with pytest.raises(SystemExit, match=message):
            run(monkeypatch, recipe, tmp_path, *options)
    (tmp_path / "slip.yaml").write_text("target: demo\n")
    with pytest.raises(SystemExit, match="a recipe has"):
        ablations.read_recipe(tmp_path / "slip.yaml")


def test_committed_recipes_are_recipes():
    for path in sorted((ROOT / "benchmarks/recipes").glob("ablations_*.yaml")):
        assert set(ablations.read_recipe(path)) == ablations.RECIPE_KEYS


def test_a_ratio_and_its_interval():
    base = [{"tree": [[10, 20], [10, 30]]}]
    better = [{"tree": [[5, 20], [5, 30]]}]
    assert ablations._tau(better, "tree") == 2 * ablations._tau(base, "tree") == 5.0
    assert ablations.tau_ratio_interval(better, base) == [2.0, 2.0]
