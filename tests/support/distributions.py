"""Exact distributions of generated tokens on a tiny vocabulary, and the chi-square test against them."""

from __future__ import annotations

import itertools
from typing import Any

import family_configs as configs
import torch
import transformers as hf
from families import Inputs, Target, family
from families import _redraw_weights as redraw_weights
from family_configs import IMAGE, START, TEXT_IDS
from torch import Tensor

NUM_TOKENS = 6
SMALLEST_CELL = 5.0  # expected draws, as usual for Pearson's test


def tiny_llama() -> Target:
    """Text only, six tokens."""
    return _flat_target(hf.LlamaConfig(**configs.TEXT | {"vocab_size": NUM_TOKENS}), hf.LlamaForCausalLM)


def tiny_qwen2_vl() -> Target:
    """Pictures and M-RoPE; six tokens to write and three that stand for pictures."""
    config = configs.qwen2_vl(vocab_size=NUM_TOKENS + 3)
    config.image_token_id, config.video_token_id = 6, 7
    config.vision_start_token_id = config.vision_end_token_id = 8
    return _flat_target(config, hf.Qwen2VLForConditionalGeneration)


def tiny_prompt(target: Target) -> Inputs:
    """One short prompt, with a picture where the target takes one."""
    if not hasattr(target.config, "image_token_id"):
        ids = torch.tensor([[1, 3, 3, 1]])  # leaves tokens for a repetition penalty to prefer
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs = family("qwen2_vl").make_inputs(target)
    ids = inputs["input_ids"]
    text = (ids >= TEXT_IDS[0]) & (ids < TEXT_IDS[1])
    inputs["input_ids"] = torch.where(
        text, ids % NUM_TOKENS, torch.where(ids == IMAGE, 6, torch.where(ids >= START, 8, ids))
    )
    return inputs


def repeated(inputs: Inputs, num_rows: int) -> Inputs:
    """The same prompt in every row."""
    return {name: value.repeat(num_rows, *[1] * (value.ndim - 1)) for name, value in inputs.items()}


def extended(inputs: Inputs, continuations: Tensor) -> Inputs:
    """The prompt followed by each of `continuations` (rows, tokens)."""
    num_rows = continuations.shape[0]
    batch = repeated(inputs, num_rows // inputs["input_ids"].shape[0])
    batch["input_ids"] = torch.cat([batch["input_ids"], continuations], dim=1)
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in batch:
            batch[name] = torch.nn.functional.pad(batch[name], (0, continuations.shape[1]), value=value)
    return batch


def exact_joint(target: Target, inputs: Inputs, length: int, **settings: Any) -> Tensor:
    """Distribution of the next `length` tokens, (V,) * length: plain one-token `generate()` after every prefix."""
    size = target.config.get_text_config().vocab_size
    joint = torch.ones((), dtype=torch.float64)
    for step in range(length):
        prefixes = torch.tensor(list(itertools.product(range(NUM_TOKENS), repeat=step)), dtype=torch.long)
        out = target.generate(
            **extended(inputs, prefixes), **settings, max_new_tokens=1, do_sample=True,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        following = torch.zeros(*[size] * step, size, dtype=torch.float64)
        following[tuple(prefixes.T)] = (
            out.scores[0].double().softmax(-1).view(-1, size) if step else (out.scores[0][0].double().softmax(-1))
        )
        joint = joint[..., None] * following
    return joint


def draw(target: Target, inputs: Inputs, num_draws: int, length: int, batch_size: int, **settings: Any) -> Tensor:
    """`num_draws` continuations (draws, length) from `generate()`, many rows of the same prompt at a time."""
    batch = repeated(inputs, batch_size)
    parts = [
        target.generate(**batch, **settings, max_new_tokens=length, do_sample=True)[:, -length:]
        for _ in range(0, num_draws, batch_size)
    ]
    return torch.cat(parts)


def p_value(draws: Tensor, joint: Tensor) -> float:
    """How likely draws (n, k) from `joint` (V,) * k would fit it no better than these (Pearson's chi-square).

    Cells that expect few draws are pooled; a draw that cannot occur makes it 0.
    """
    size = joint.shape[0]
    cells = sum(draws[:, axis] * size ** (joint.ndim - 1 - axis) for axis in range(joint.ndim))
    observed = torch.bincount(cells, minlength=joint.numel()).double()
    expected = joint.flatten() * len(draws)
    if observed[expected == 0].any():
        return 0.0
    is_large = expected >= SMALLEST_CELL
    rest = torch.stack([observed[~is_large].sum(), expected[~is_large].sum()])
    observed, expected = observed[is_large], expected[is_large]
    if rest[1] >= SMALLEST_CELL:
        observed, expected = torch.cat([observed, rest[:1]]), torch.cat([expected, rest[1:]])
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(expected) - 1.0, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


def _flat_target(config: hf.PreTrainedConfig, model_class: Any) -> Target:
    """A target whose next-token distributions are neither flat nor certain."""
    target = model_class(config)
    redraw_weights(target, torch.Generator().manual_seed(0))
    with torch.no_grad():
        target.get_output_embeddings().weight.mul_(0.6)
    target.generation_config = hf.GenerationConfig(bos_token_id=1, pad_token_id=0)
    return target.requires_grad_(False).eval()
