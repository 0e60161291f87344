"""The Python snippets of the README and the guides run as they stand. Those of cards and docs/hub.md: test_hub.py."""

import re
from pathlib import Path

import pytest
import torch
from tiny_pair import picture_row, tiny_processor, tiny_target
from transformers import AutoModelForImageTextToText, AutoProcessor

import dream_hf
import dream_hf.benchmark
from dream_hf import DreamDrafter, DreamTrainingArguments
from dream_hf.demo import load_pair, make_rows
from dream_hf.training.merging import merge_adapters

ROOT = Path(__file__).parents[1]


def snippets(name):
    """The Python code blocks of a document."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    assert found, f"{name} has no snippet"
    return found


def run(name, namespace):
    for number, snippet in enumerate(snippets(name)):
        exec(compile(snippet, f"{name}, snippet {number + 1}", "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def pair():
    return load_pair()


def test_readme(pair, monkeypatch):
    target, drafter, processor = pair
    for owner, loaded in ((AutoModelForImageTextToText, target), (DreamDrafter, drafter), (AutoProcessor, processor)):
        monkeypatch.setattr(owner, "from_pretrained", lambda *args, loaded=loaded, **kwargs: loaded)
    row = make_rows("text", 1, 1_700_000)[0]
    prompt = processor.apply_chat_template(row["messages"][:1], add_generation_prompt=True)
    ran = run("README.md", {"prompt": prompt, "image": row["images"][0]})
    expected = target.generate(**ran["inputs"], max_new_tokens=256)
    assert torch.equal(ran["output"], expected)
    assert ran["tau"] > 2


def question_about_a_page(processor):
    row = make_rows("text", 1, 1_700_000)[0]
    prompt = processor.apply_chat_template(row["messages"][:1], add_generation_prompt=True)
    return processor(text=prompt, images=row["images"][0], return_tensors="pt")


def test_getting_started(pair, monkeypatch):
    target, drafter, processor = pair
    monkeypatch.setattr(dream_hf, "load_drafter", lambda name, loaded_for: drafter if loaded_for is target else None)
    inputs = question_about_a_page(processor)
    ran = run("docs/index.md", {"target": target, "inputs": inputs})
    assert torch.equal(ran["output"], target.generate(**inputs, max_new_tokens=256))
    assert ran["tau"] > 1.1 and ran["drafter"] is drafter


def test_retrieval_guide(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target, _, processor = pair
    inputs = question_about_a_page(processor)
    ran = run("docs/retrieval.md", {"target": target, "processor": processor, "inputs": inputs})
    assert torch.equal(ran["output"], target.generate(**inputs, max_new_tokens=64))
    assert len(ran["store"]) == 1 and Path("answers.jsonl").is_file() and len(ran["drafter"].draft_ids) > 9


def test_untrained_guide(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target, _, processor = pair
    inputs = question_about_a_page(processor)
    ran = run("docs/untrained.md", {"target": target, "small_model": target, "inputs": inputs})
    assert torch.equal(ran["output"], target.generate(**inputs, max_new_tokens=64))
    assert Path("skip.json").is_file() and ran["drafter"].drafters[1].skip


def test_training_guide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = tiny_target()
    rows = [picture_row(f"What is it {number}?") for number in range(2)]
    drafter = DreamDrafter.for_target(target)
    drafter.save_pretrained("base")
    args = DreamTrainingArguments(output_dir="lora", max_steps=1, report_to=[])
    given = {"target": target, "rows": rows, "held_out": rows, "processor": tiny_processor()}
    run("docs/training.md", {**given, "drafter": drafter, "args": args})
    merge_adapters("adapter", "merged", "base")
    DreamDrafter.from_pretrained("merged")


def test_drafters_guide(pair, monkeypatch):
    target, drafter, processor = pair
    monkeypatch.setattr(dream_hf, "load_drafter", lambda source, target, wiring=None: drafter, raising=False)
    row = make_rows("text", 1, 1_700_000)[0]
    prompt = processor.apply_chat_template(row["messages"][:1], add_generation_prompt=True)
    inputs = processor(text=prompt, images=row["images"], return_tensors="pt")
    ran = run("docs/drafters.md", {"target": target, "inputs": inputs})
    assert torch.equal(ran["output"], target.generate(**inputs, max_new_tokens=256))
    assert ran["log_probs"].shape == (3, target.config.get_text_config().vocab_size)


def test_benchmarking_guide(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load_prompts = dream_hf.benchmark.load_prompts
    monkeypatch.setattr(dream_hf.benchmark, "load_prompts", lambda task, _: load_prompts(task, 1))
    target, drafter, processor = pair
    run("docs/benchmarking.md", {"target": target, "drafter": drafter, "processor": processor})
    assert Path("results/results.json").is_file()
