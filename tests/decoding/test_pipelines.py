"""transformers' pipelines take drafters."""

from __future__ import annotations

import family_configs as configs
import pytest
import torch
import transformers as hf
from families import Target
from families import _redraw_weights as redraw_weights
from oracle import make_oracle, make_plan
from processors import make_image, make_processor, train_tokenizer
from transformers import pipeline

from dream_hf import DreamDrafter
from dream_hf.decoding import loop as generation

NUM_NEW = 20
CHAT = [
    {
        "role": "user",
        "content": [{"type": "image", "image": make_image()}, {"type": "text", "text": "What is in the image?"}],
    }
]
TEXT_CHAT = [{"role": "user", "content": [{"type": "text", "text": "Hello world"}]}]


def finished(target: Target, tokenizer) -> Target:
    redraw_weights(target, torch.Generator().manual_seed(0))
    target.generation_config = hf.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return target.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([], style="byte")


@pytest.fixture(scope="module")
def text_target(tokenizer) -> Target:
    config = hf.LlamaConfig(**configs.TEXT | {"vocab_size": len(tokenizer)})
    return finished(hf.LlamaForCausalLM(config), tokenizer)


@pytest.fixture(scope="module")
def processor():
    return make_processor("llava")


@pytest.fixture(scope="module")
def target(processor) -> Target:
    tokenizer = processor.tokenizer
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**configs.TEXT | {"vocab_size": len(tokenizer)}),
        vision_config=hf.CLIPVisionConfig(**configs.VISION | {"image_size": 28, "patch_size": 14}),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    target = finished(hf.LlavaForConditionalGeneration(config), tokenizer)
    target.get_output_embeddings().weight[config.image_token_index] *= 0.01
    return target


@pytest.fixture
def calls(monkeypatch) -> list[bool]:
    """One entry for each time our loop has run."""
    entries: list[bool] = []
    run = generation._Decoding.prefill
    monkeypatch.setattr(generation._Decoding, "prefill", lambda self: entries.append(True) or run(self))
    return entries


def test_text_generation(text_target, tokenizer, calls):
    drafter = DreamDrafter.for_target(text_target)
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False}
    plain = pipeline("text-generation", model=text_target, tokenizer=tokenizer)
    drafted = pipeline("text-generation", model=text_target, tokenizer=tokenizer, assistant_model=drafter)
    assert drafted.assistant_tokenizer is None  # the drafter's config has the target's special tokens
    expected = plain("hello world", **settings)
    assert not calls
    assert drafted("hello world", **settings) == expected
    assert len(calls) == 1 and len(expected[0]["generated_text"]) > len("hello world")


def test_text_generation_in_batches(text_target, tokenizer, calls):
    tokenizer.padding_side = "left"
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False, "batch_size": 3}
    prompts = ["hello world", "A red circle is left of a blue square.", "Thanks!"]
    plain = pipeline("text-generation", model=text_target, tokenizer=tokenizer)
    drafter = DreamDrafter.for_target(text_target)
    drafted = pipeline("text-generation", model=text_target, tokenizer=tokenizer, assistant_model=drafter)
    assert drafted(prompts, **settings) == plain(prompts, **settings)
    assert len(calls) == 1


def test_text_generation_with_a_saved_drafter(text_target, tokenizer, calls, tmp_path):
    # A path as `assistant_model` is looked up by the pipeline among transformers' own classes; a loaded model is not.
    DreamDrafter.for_target(text_target).save_pretrained(tmp_path)
    drafter = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    plain = pipeline("text-generation", model=text_target, tokenizer=tokenizer)
    drafted = pipeline("text-generation", model=text_target, tokenizer=tokenizer, assistant_model=drafter)
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False}
    assert drafted("hello world", **settings) == plain("hello world", **settings)
    assert len(calls) == 1


def test_text_generation_samples(text_target, tokenizer, calls):
    drafter = DreamDrafter.for_target(text_target)
    drafted = pipeline("text-generation", model=text_target, tokenizer=tokenizer, assistant_model=drafter)
    torch.manual_seed(0)
    first = drafted("hello world", max_new_tokens=NUM_NEW, do_sample=True, temperature=1.5)
    assert first != drafted("hello world", max_new_tokens=NUM_NEW, do_sample=True, temperature=1.5)
    assert len(calls) == 2


@pytest.mark.parametrize("chat", [CHAT, TEXT_CHAT], ids=["picture", "text"])
@pytest.mark.parametrize("is_passed_whole", [False, True])
def test_image_text_to_text(target, processor, calls, chat, is_passed_whole):
    describe = pipeline("image-text-to-text", model=target, processor=processor)
    expected = describe(chat, max_new_tokens=NUM_NEW, generate_kwargs={"do_sample": False})
    assert not calls
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    sequences = target.generate(**inputs, max_new_tokens=NUM_NEW, do_sample=False)
    oracle = make_oracle(target, make_plan(sequences, inputs["attention_mask"], 6, decoys=False))
    for drafter in (DreamDrafter.for_target(target), oracle):
        arguments = {"assistant_model": drafter, "do_sample": False}
        if is_passed_whole:
            arguments["max_new_tokens"] = NUM_NEW
            got = describe(chat, generate_kwargs=arguments)
        else:
            got = describe(chat, max_new_tokens=NUM_NEW, generate_kwargs=arguments)
        assert got == expected
    assert len(calls) == 2
    assert expected[0]["generated_text"][-1]["role"] == "assistant" and expected[0]["generated_text"][-1]["content"]


def test_image_text_to_text_with_text_and_images(target, processor, calls):
    describe = pipeline("image-text-to-text", model=target, processor=processor)
    arguments = {
        "text": "USER: <image>\nHow many? ASSISTANT:",
        "images": make_image(color="blue"),
        "max_new_tokens": NUM_NEW,
    }
    expected = describe(**arguments, generate_kwargs={"do_sample": False})
    drafter = DreamDrafter.for_target(target)
    assert describe(**arguments, generate_kwargs={"do_sample": False, "assistant_model": drafter}) == expected
    assert len(calls) == 1
