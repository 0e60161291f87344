"""The replay of retrieval on written answers: what it counts is what decoding would have gained."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from families import family
from family_configs import TEXT_IDS
from tokenizers import Tokenizer, models, pre_tokenizers

from dream_hf import RetrievalDrafter
from dream_hf.drafters.retrieval.drafter import DEFAULTS
from dream_hf.drafters.retrieval.text import Limits

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import replay

WORDS = [f"w{number}" for number in range(60)]


@pytest.fixture
def files(tmp_path):
    """Answers and a tokenizer of whole words."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    answer = " ".join(WORDS[5:25])
    rows = [{"turns": [{"question": "w1 w2", "answer": answer}, {"question": "w3", "answer": answer}]}] * 2
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [str(tmp_path / "answers.jsonl"), "--tokenizer", str(tmp_path / "tokenizer.json")]


def run(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["replay.py", *arguments])
    replay.main()
    return capsys.readouterr().out


def test_answers_seen_before_are_found_again(files, monkeypatch, capsys):
    results = json.loads(run([*files, "--json"], monkeypatch, capsys))
    assert set(results) == {"own", "store"}
    own, store = results["own"], results["store"]
    assert own["steps"] * own["tokens_per_step"] == pytest.approx(
        4 * 20, abs=0.01
    )  # the first token comes with the prompt
    assert 1.5 < own["tokens_per_step"] < store["tokens_per_step"] and 0 < own["nodes_per_step"] <= DEFAULTS.tree_size
    folder = str(Path(files[-1]).parent)
    assert run([*files[:-1], folder], monkeypatch, capsys).count("tokens per step") == 2
    half = json.loads(run([*files, "--json", "--part", "odd"], monkeypatch, capsys))
    assert half["own"]["steps"] == own["steps"] / 2


def test_a_replay_counts_the_steps_of_decoding():
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target, 1)
    drafter = RetrievalDrafter(num_likeliest=0)
    out = target.generate(
        **inputs, max_new_tokens=48, do_sample=False, assistant_model=drafter, return_dict_in_generate=True
    )
    prompt, answer = inputs["input_ids"][0].tolist(), out.sequences[0, -48:].tolist()
    limits = Limits(num_tokens=target.config.vocab_size)
    counts = replay.replay([[replay.Turn(prompt, answer)]], limits, DEFAULTS)
    assert TEXT_IDS[1] <= limits.num_tokens
    assert counts.num_tokens == 47 and counts.num_steps == out.accepted_lengths.shape[1]
    # Decoding knows how much may follow at most, and the last trees are not deeper than that.
    assert 0 <= counts.num_nodes - int(out.drafted_lengths.sum()) < DEFAULTS.tree_size
    assert torch.equal(out.sequences, target.generate(**inputs, max_new_tokens=48, do_sample=False))
