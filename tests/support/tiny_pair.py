"""A tiny Llava, its processor and an untrained drafter that fit together, for tests that start from pictures and text."""

import functools

import torch
import transformers
from families import _redraw_weights
from processors import make_image, train_tokenizer

from dream_hf import DreamDrafter

# Plain turns and an end-of-sequence token, so that prompts, answers and their ends are easy to tell apart.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@functools.cache
def tiny_processor():
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return transformers.LlavaProcessor(
        images,
        train_tokenizer(["<image>"]),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def tiny_target(eos_bias=0.0):
    """A Llava with random weights; `eos_bias` makes it end its answers sooner."""
    tokenizer = tiny_processor().tokenizer
    text = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        target = transformers.LlavaForConditionalGeneration(config)
    _redraw_weights(target, torch.Generator().manual_seed(0))
    with torch.no_grad():
        head, features = target.lm_head.weight, target.model.language_model.norm.weight
        head[config.image_token_index] *= 0.01
        head[tokenizer.eos_token_id] += eos_bias * features / features.norm()
    target.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return target.requires_grad_(False).eval()


def tiny_drafter(target, **overrides):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DreamDrafter.for_target(target, **overrides)


def save_pair(folder, **overrides):
    """Write a pair as folders `target` and `drafter`; returns them."""
    target = tiny_target()
    target.save_pretrained(folder / "target")
    tiny_processor().save_pretrained(folder / "target")
    tiny_drafter(target, **overrides).save_pretrained(folder / "drafter")
    return folder / "target", folder / "drafter"


def picture_row(question, answer="a red circle", color="red"):
    """A row of the demo's shape."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
        "images": [make_image(color=color)],
    }
