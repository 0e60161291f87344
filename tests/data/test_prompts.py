"""Prompts at decoding time: what the processor's own template gives, and the beginning of what training saw."""

import importlib.util

import pytest
import torch
from processors import PROCESSOR_FAMILIES, make_image, make_processor, train_tokenizer

from dream_hf.data import ConversationCollator, ConversationDataset
from dream_hf.data.prompts import PromptEncoder, on_model


def available(family):
    missing = family.needs is not None and importlib.util.find_spec(family.needs) is None
    return pytest.param(family.name, id=family.name, marks=pytest.mark.skipif(missing, reason=f"needs {family.needs}"))


FAMILIES = pytest.mark.parametrize("name", [available(family) for family in PROCESSOR_FAMILIES])


def question(text="What is in the image?", num_images=1):
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


@FAMILIES
def test_prompts_are_what_the_processor_writes(name):
    processor = make_processor(name)
    encoder = PromptEncoder(processor)
    text = processor.apply_chat_template(question(), add_generation_prompt=True)
    assert encoder.text(question()) == text
    inputs = encoder.encode([(question(), [make_image()])])
    bos = processor.tokenizer.bos_token
    usual = processor(
        text=[text], images=[[make_image()]], return_tensors="pt", add_special_tokens=not text.startswith(bos)
    )
    assert inputs.keys() == usual.keys()
    assert all(torch.equal(inputs[key], usual[key]) for key in usual if isinstance(usual[key], torch.Tensor))


@FAMILIES
def test_training_goes_on_where_the_prompt_ends(name):
    processor = make_processor(name)
    prompt = PromptEncoder(processor).encode([(question(), [make_image()])])["input_ids"][0]
    row = {"messages": [*question(), {"role": "assistant", "content": "A red circle."}], "images": [make_image()]}
    batch = ConversationCollator(processor)([ConversationDataset([row])[0]])
    start = int(batch["answer_mask"][0].int().argmax())
    assert batch["input_ids"][0, :start].tolist() == prompt[:start].tolist()
    # A space that ends the prompt may have become part of the answer's first token.
    assert processor.tokenizer.decode(prompt[start:].tolist()).strip() == ""


@FAMILIES
def test_batches_are_padded_on_the_left(name):
    encoder = PromptEncoder(make_processor(name))
    alone = [
        encoder.encode([(question(text), [make_image()])])["input_ids"][0].tolist() for text in ("x", "hello world")
    ]
    together = encoder.encode([(question(text), [make_image()]) for text in ("x", "hello world")])
    for row, mask, ids in zip(together["input_ids"], together["attention_mask"], alone, strict=True):
        assert row[-len(ids) :].tolist() == ids
        assert mask.sum() == len(ids) and bool(mask[-len(ids) :].all())


def test_faults():
    with pytest.raises(ValueError, match="has no chat template"):
        PromptEncoder(train_tokenizer(["<image>"]))
    tokenizer = train_tokenizer(["<image>"], chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(ValueError, match="pass the target's processor"):
        PromptEncoder(tokenizer).encode([(question(), [make_image()])])
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        PromptEncoder(tokenizer)


def test_only_floating_point_tensors_change_dtype():
    model = torch.nn.Linear(1, 1, dtype=torch.bfloat16)
    model.device, model.dtype = torch.device("cpu"), torch.bfloat16
    moved = on_model({"ids": torch.ones(1, dtype=torch.long), "pixels": torch.ones(1), "names": ["x"]}, model)
    assert moved["ids"].dtype == torch.long and moved["pixels"].dtype == torch.bfloat16 and moved["names"] == ["x"]
