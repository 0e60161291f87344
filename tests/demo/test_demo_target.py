"""The bundled target is what its card says: stock classes, deep and small, and it reads pictures it has never seen."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from dream_hf.demo import make_examples, score_answer
from dream_hf.demo.rows import TRAIN_SEED_LIMIT

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "src" / "dream_hf" / "demo" / "target"
HELD_OUT_SEED = TRAIN_SEED_LIMIT + 77


@pytest.fixture(scope="module")
def target():
    return AutoModelForImageTextToText.from_pretrained(TARGET, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TARGET)


@pytest.fixture(scope="module")
def answer_all():
    sys.path.insert(0, str(ROOT / "examples" / "demo_pair"))
    from evaluate import answer_all

    sys.path.pop(0)
    return answer_all


def share_right(examples, answers) -> float:
    scores = [score_answer(example, answer) for example, answer in zip(examples, answers, strict=True)]
    return sum(score.found for score in scores) / sum(score.expected for score in scores)


def test_it_is_a_stock_model_deep_and_small(target, processor):
    assert type(target) is LlavaForConditionalGeneration and type(processor) is LlavaProcessor
    assert 24 <= target.config.text_config.num_hidden_layers <= 32
    assert sum(file.stat().st_size for file in TARGET.glob("*.safetensors")) < 30e6
    assert len(processor.tokenizer) == target.config.text_config.vocab_size


@pytest.mark.parametrize("task", ["scene", "chart", "text"])
def test_it_reads_pictures_it_has_never_seen(target, processor, answer_all, task):
    examples = make_examples(task, 6, HELD_OUT_SEED)
    assert share_right(examples, answer_all(target, processor, examples, batch_size=6)) >= 0.85


def test_it_answers_from_the_picture(target, processor, answer_all):
    examples = make_examples("scene", 6, HELD_OUT_SEED)
    for example in examples:
        example.row["images"] = [Image.new("RGB", (128, 128), "gray")]
    assert share_right(examples, answer_all(target, processor, examples, batch_size=6)) < 0.4
