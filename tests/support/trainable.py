"""A tiny LLaVA with its processor, rows with pictures, and a trainer for them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from family_configs import TEXT, VISION
from processors import make_image, make_processor

from dream_hf import DreamDrafter, DreamTrainer, DreamTrainingArguments

COLORS = ["red", "blue", "green", "yellow"]


@functools.cache
def processor() -> Any:
    return make_processor("llava")


def make_target(num_layers: int = 4, dtype: torch.dtype = torch.float32) -> Any:
    """A LLaVA with the tiny processor's vocabulary, of well-spread random weights."""
    tokenizer = processor().tokenizer
    text = TEXT | {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": num_layers,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**text),
        vision_config=hf.CLIPVisionConfig(**VISION | {"image_size": 28, "patch_size": 14}),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        target = hf.LlavaForConditionalGeneration(config).to(dtype).eval()
        for parameter in target.parameters():
            if parameter.ndim == 2:
                parameter.data.copy_(torch.randn_like(parameter) * 1.5 / parameter.shape[1] ** 0.5)
    target.generation_config.eos_token_id = None
    return target


def make_drafter(target: Any, **config: Any) -> DreamDrafter:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return DreamDrafter.for_target(target, **config)


def make_rows(
    num_rows: int = 8, answer: str = "A {color} circle is left of a blue square, number {index}."
) -> list[dict]:
    rows = []
    for index in range(num_rows):
        color = COLORS[index % len(COLORS)]
        question = {"type": "text", "text": "What is in the image? " * (1 + index % 3)}
        messages = [
            {"role": "user", "content": [{"type": "image"}, question]},
            {"role": "assistant", "content": answer.format(color=color, index=index)},
        ]
        rows.append({"messages": messages, "images": [make_image(28, 28, color)]})
    return rows


def arguments(folder: Path | str, **overrides: Any) -> DreamTrainingArguments:
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    short = {
        "max_steps": 4,
        "warmup_steps": 0,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "feature_noise": 0.0,
    }
    return DreamTrainingArguments(output_dir=str(folder), **quiet | short | overrides)


def make_trainer(folder: Path | str, target: Any = None, drafter: Any = None, **overrides: Any) -> DreamTrainer:
    """A trainer on eight rows; `overrides` are arguments of the trainer or of its `DreamTrainingArguments`."""
    target = make_target() if target is None else target
    names = ("train_dataset", "eval_dataset", "processing_class", "peft_config", "callbacks")
    own = {name: overrides.pop(name) for name in names if name in overrides}
    own = {"train_dataset": make_rows(), "processing_class": processor(), **own}
    drafter = make_drafter(target) if drafter is None else drafter
    return DreamTrainer(model=drafter, target=target, args=arguments(folder, **overrides), **own)


def make_able(target: Any, rows: list[dict], num_steps: int = 250) -> None:
    """Teach the target to give the rows' answers, so that they are its own."""
    from dream_hf.data import ConversationCollator, ConversationDataset

    dataset = ConversationDataset(rows)
    batch = ConversationCollator(processor())([dataset[index] for index in range(len(rows))])
    mask = batch.pop("answer_mask")
    labels = batch["input_ids"].masked_fill(~mask, -100)
    target.requires_grad_(True)
    optimizer = torch.optim.AdamW(target.parameters(), lr=5e-3)
    for _ in range(num_steps):
        loss = target(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if float(loss.detach()) < 0.01:
            break
    target.requires_grad_(False)
