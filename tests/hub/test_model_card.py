"""Cards take their figures from files, and say so where there are none."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from dream_hf import DreamConfig
from dream_hf.cli.train import parse
from dream_hf.hub.card_content import CardContent, read_content
from dream_hf.hub.model_card import MARKER, TEMPLATES, render_card, write_card
from dream_hf.hub.publishing import collect_files

CARDS = Path(__file__).parents[2] / "model_cards"
NAMES = sorted(path.parent.name for path in CARDS.glob("*/recipe.yaml"))
TARGET = {"name": "org/target", "model_type": "llava", "revision": "abc"}
SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


@pytest.fixture
def config():
    return DreamConfig(**SHAPE, target=TARGET)


def results(**changes):
    """What `dream-hf bench` writes, with figures that nothing else contains."""
    plain = {"method": "plain", "temperature": 0.0, "task": "chart", "speedup": 1.0, "tau": None, "num_prompts": 17}
    tree = {
        **plain,
        "method": "dream_tree",
        "speedup": 1.8371,
        "speedup_interval": [1.71, 1.93],
        "tau": 3.4159,
        "match_rate": 1.0,
    }
    provenance = {"machine": {"cpu": "Abacus 9000", "cuda": None}, "date": "2026-01-02"}
    return {"provenance": provenance, "rows": [plain, {**tree, **changes}]}


def card_of(folder, config, drafter=None):
    write_card(folder, config, drafter)
    return ModelCard.load(folder / "README.md")


def test_nothing_measured(tmp_path, config):
    card = card_of(tmp_path, config, "org/dream-tiny")
    data = card.data.to_dict()
    assert data["base_model"] == "org/target" and data["base_model_relation"] == "adapter"
    assert data["pipeline_tag"] == "image-text-to-text" and data["library_name"] == "dream-hf"
    assert {"dream", "speculative-decoding"} <= set(data["tags"]) and data["license"] == "other"
    assert "model-index" not in data and "datasets" not in data
    assert "Not measured yet" in card.text and "Neither recipe nor data were recorded" in card.text
    assert "revision `abc`" in card.text and MARKER in card.text


def test_figures_come_from_results_json(tmp_path, config):
    (tmp_path / "results.json").write_text(json.dumps(results()))
    card = card_of(tmp_path, config, "org/dream-tiny")
    figures = {(one.metric_type, one.dataset_name): one.metric_value for one in card.data.eval_results}
    assert figures == {("tau", "chart"): 3.4159, ("speedup", "chart"): 1.8371, ("match_rate", "chart"): 1.0}
    assert card.data.model_name == "dream-tiny"
    assert "| chart | dream_tree | 0 | 1.84 [1.71, 1.93] | 3.42 |" in card.text
    assert "bonus token included" in card.text and "prefill included" in card.text
    assert "- machine.cpu: Abacus 9000" in card.text and "cuda" not in card.text
    (tmp_path / "results.json").write_text(json.dumps(results(tau=2.0)))
    assert "| 2 |" in card_of(tmp_path, config).text


@pytest.mark.parametrize("wrong", [[], {}, {"rows": 3}, {"rows": [{"method": "plain"}]}], ids=str)
def test_refuses_a_results_json_of_something_else(tmp_path, config, wrong):
    (tmp_path / "results.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match=r"results.json is not what `dream-hf bench --output` writes"):
        write_card(tmp_path, config)


def test_recipe_and_progress(tmp_path, config):
    recipe = "license: mit\ndatasets: [org/data, ./local/rows.jsonl]\nlearning_rate: 3.0e-5  # as is\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 1234, "epoch": 2.5}))
    card = card_of(tmp_path, config)
    assert card.data.license == "mit" and card.data.datasets == ["org/data"]
    assert recipe.strip() in card.text and "Trained for 1234 steps, 2.5 epochs" in card.text
    (tmp_path / "recipe.yaml").write_text("- a list")
    with pytest.raises(ValueError, match=r"`recipe.yaml` must be a mapping"):
        write_card(tmp_path, config)


def test_targets_that_are_no_hub_ids(tmp_path, monkeypatch):
    """A folder is no `base_model`; text-only targets get the text snippet."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "folder").mkdir(parents=True)
    for name in ("some/folder", "/an/absolute/path", None):
        card = card_of(tmp_path, DreamConfig(**SHAPE, target={**TARGET, "name": name}))
        assert "base_model" not in card.data.to_dict()
    card = card_of(tmp_path, DreamConfig(**SHAPE, target={**TARGET, "model_type": "llama"}))
    assert card.data.pipeline_tag == "text-generation" and "AutoModelForCausalLM" in card.text
    assert card_of(tmp_path, DreamConfig(**SHAPE)).data.pipeline_tag == "image-text-to-text"


def test_cards_by_hand_are_kept(tmp_path, config):
    write_card(tmp_path, config)
    ours = (tmp_path / "README.md").read_text()
    theirs = re.sub(rf"{MARKER}.*\n", "", ours) + "My own words.\n"
    (tmp_path / "README.md").write_text(theirs)
    write_card(tmp_path, config)
    config.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == theirs
    assert collect_files(tmp_path, "org/elsewhere")["README.md"] == tmp_path / "README.md"


# -- model_cards/ -----------------------------------------------------------------------------------------------------


@pytest.fixture
def render(monkeypatch):
    monkeypatch.syspath_prepend(str(CARDS))
    import render

    yield render
    sys.modules.pop("render")


def test_the_template_is_the_one_in_the_package():
    assert (CARDS / "template.md").read_text() == (TEMPLATES / "model_card.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_cards_are_up_to_date_and_honest(render, name):
    card = (CARDS / name / "README.md").read_text()
    assert card == render.render(name), "run `python model_cards/render.py`"
    assert "Not measured yet" in card and "has not been trained" in card
    assert "model-index" not in card


def test_the_papers_figures_are_quoted_as_the_papers(render):
    paper = json.loads((CARDS / "paper.json").read_text())["targets"]
    recipes = {yaml.safe_load((CARDS / name / "recipe.yaml").read_text())["target"]: name for name in NAMES}
    assert len(paper) == 5 and paper.keys() < recipes.keys() and len(recipes) == 7
    for target, name in recipes.items():
        section = render.render(name).split("## The paper's figures")[1].split("\n## ")[0]
        assert "arXiv 2505.19201" in section
        for row in paper.get(target, {}).values():
            assert f"{row['speedup']:.2f} | {row['tau']:.2f}" in section


@pytest.mark.parametrize("name", NAMES)
def test_recipes_are_training_arguments(name, tmp_path):
    """`dream-hf train recipe.yaml` takes them as they are, but for what this machine may not have."""
    path = CARDS / name / "recipe.yaml"
    given, arguments = parse([str(path), "--bf16", "False", "--output_dir", str(tmp_path)])
    for key, value in yaml.safe_load(path.read_text()).items():
        if key not in ("bf16", "output_dir"):
            assert getattr(given, key, getattr(arguments, key, None)) == value, key
    assert (
        given.train_dataset.endswith(f"{name}.jsonl")
        and path.parent.name in yaml.safe_load(path.read_text())["output_dir"]
    )


@pytest.mark.parametrize("name", NAMES)
def test_snippets_differ_from_the_executed_ones_in_names_only(render, config, name, tmp_path):
    """tests/hub/test_hub.py runs the snippets of a card; these are the same."""
    executed = render_card(dataclasses.replace(read_content(tmp_path, config), drafter="org/dream"))
    target = yaml.safe_load((CARDS / name / "recipe.yaml").read_text())["target"]
    renamed = render.render(name).replace(target, "org/target").replace(f"your-name/dream-{name}", "org/dream")
    blocks = [re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL) for card in (executed, renamed)]
    assert blocks[0] == blocks[1] and len(blocks[0]) == 2


def test_content_without_a_drafter_claims_nothing():
    card = render_card(CardContent(target={}, drafter="x"))
    assert "has not been trained" in card and "one target" in card
