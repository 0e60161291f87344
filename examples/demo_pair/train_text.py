"""Train the text model to answer from what the encoder sees: `python train_text.py --help`.

The text model starts shallow and is deepened early: layers that add nothing yet are put between those there are. Apart
from the answers it is taught to look: the first head of two layers should point at what is being described.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from conversation import IGNORE, NUM_PREFIX, Batch, make_batch
from model import NUM_SHALLOW_LAYERS, NUM_TEXT_LAYERS, POINTER_LAYERS, build_target, deepen
from muon import build_optimizers
from session import (
    Clock,
    agree,
    average_gradients,
    load_checkpoint,
    rms,
    run_processes,
    save_checkpoint,
    set_learning_rate,
    trapezoid,
)
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dream_hf.demo.canvas import NUM_PATCHES
from dream_hf.demo.rows import TASKS

FIRST_EVAL_SEED = 1_500_001
POINTER_WEIGHT = 0.3
MINUTES_PER_SAVE = 4.0


# --- the model's forward, packed ---------------------------------------------------------------------------------


def see_picture(model: Any, pixels: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, patches, W)
    """The projected picture; the encoder is frozen."""
    with torch.no_grad():
        features = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    return model.model.multi_modal_projector(features)


def read_slots(model: Any, batch: Batch, bos_and_user: Tensor) -> Tensor:
    """Final text features of the slots, (B, S, W)."""
    embed = model.get_input_embeddings()
    start = embed(bos_and_user).expand(len(batch.pixels), -1, -1)
    visual = see_picture(model, batch.pixels)
    inputs_embeds = torch.cat([start, visual.to(start.dtype), embed(batch.slot_ids)], dim=1)
    output = model.model.language_model(
        inputs_embeds=inputs_embeds, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
    )
    return output.last_hidden_state[:, NUM_PREFIX:]


@contextmanager
def watched_attention(model: Any, layers: tuple[int, ...]) -> Iterator[list[Tensor]]:
    """Collect the queries-times-keys (B, T, T) of the first head of some text layers during a forward."""
    collected: list[Tensor] = []

    def hook(attention: Any, args: tuple, kwargs: dict) -> None:
        hidden, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        size = attention.head_dim
        query, key = (
            nn.functional.linear(hidden, projection.weight[:size])[:, None]
            for projection in (attention.q_proj, attention.k_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        collected.append((query @ key.mT)[:, 0] * attention.scaling)

    attentions = [model.model.language_model.layers[index].self_attn for index in layers]
    handles = [attention.register_forward_pre_hook(hook, with_kwargs=True) for attention in attentions]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()


def pointer_loss(scores: Tensor, batch: Batch) -> Tensor:
    """-log of the attention that falls on the right patches, mean over tokens read from the picture.

    `scores` (B, T, T) are one head's, unmasked.
    """
    is_read = batch.patches.any(-1)  # (B, S)
    rows = (scores + batch.mask[:, 0])[:, NUM_PREFIX:][is_read].float()  # (n, T)
    on_picture = rows[:, NUM_PREFIX - NUM_PATCHES : NUM_PREFIX]
    right = on_picture.masked_fill(~batch.patches[is_read], float("-inf"))
    return (rows.logsumexp(-1) - right.logsumexp(-1)).mean()


def answer_losses(
    model: Any, batch: Batch, bos_and_user: Tensor, pointer_layers: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy of the answers, mean pointer loss, and of each token (n, 2): is it right, is it read."""
    with watched_attention(model, pointer_layers) as scores:
        features = read_slots(model, batch, bos_and_user)
    is_answer = batch.labels != IGNORE
    logits = model.lm_head(features[is_answer]).float()
    labels = batch.labels[is_answer]
    answer = nn.functional.cross_entropy(logits, labels)
    pointers = torch.stack([pointer_loss(score, batch) for score in scores]).mean()
    is_right = torch.stack([logits.argmax(-1) == labels, batch.patches.any(-1)[is_answer]], dim=1)
    return answer, pointers, is_right


# --- training ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def scale_projector(model: Any, pixels: Tensor) -> None:
    """Bring the projected picture to the scale of the text embeddings."""
    scale = rms(model.get_input_embeddings().weight) / rms(see_picture(model, pixels))
    model.model.multi_modal_projector.linear_2.weight.mul_(scale)
    model.model.multi_modal_projector.linear_2.bias.mul_(scale)


class Training:
    """Model, optimizers and where the training stands."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace):
        self.args, self.tokenizer = args, tokenizer
        self.model: Any
        self.bos_and_user = torch.tensor([tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")])
        self.bos_and_user = self.bos_and_user.to(args.device)
        self.step, self.minutes, self.steps_since_start = 0, 0.0, 0
        state = load_checkpoint(args.output)
        if state:
            self.model = build_target(tokenizer, state["num_text_layers"])
            self.model.load_state_dict(state["model"])
            self.pointer_layers = tuple(state["pointer_layers"])
            self.step, self.minutes = state["step"], state["minutes"]
            self.steps_since_start = state["steps_since_start"]
        elif args.init_from:
            self.model = LlavaForConditionalGeneration.from_pretrained(args.init_from, dtype=torch.float32)
            num_layers = self.model.config.text_config.num_hidden_layers
            self.pointer_layers = tuple(i * (num_layers // NUM_SHALLOW_LAYERS) for i in POINTER_LAYERS)
        else:
            self.model = build_target(tokenizer, NUM_SHALLOW_LAYERS)
            self._load_encoder(args.encoder)
            scale_projector(self.model, make_batch(tokenizer, 0, 16).pixels)
            self.pointer_layers = POINTER_LAYERS
        self._prepare()
        if state:
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)

    def _load_encoder(self, path: Path) -> None:
        state = load_checkpoint(path)
        if state is None:
            raise ValueError(f"`--encoder` is {path}, which does not exist: run pretrain_encoder.py first.")
        prefix = "vision_tower."
        weights = {name[len(prefix) :]: w for name, w in state["model"].items() if name.startswith(prefix)}
        self.model.model.vision_tower.load_state_dict(weights)

    def _prepare(self) -> None:
        self.model.to(self.args.device)
        self.model.model.vision_tower.requires_grad_(False)
        self.optimizers = build_optimizers(self.model, self.args.matrix_lr, self.args.other_lr)

    @property
    def num_text_layers(self) -> int:
        return self.model.config.text_config.num_hidden_layers

    def deepen(self) -> None:
        factor = NUM_TEXT_LAYERS // self.num_text_layers
        self.model = deepen(self.model, NUM_TEXT_LAYERS)
        self.pointer_layers = tuple(layer * factor for layer in self.pointer_layers)
        self.steps_since_start = 0
        self._prepare()

    def losses(self, seed: int, num_pictures: int, offset: int = 0, task: str | None = None):
        batch = make_batch(self.tokenizer, seed, num_pictures, offset, task).to(self.args.device)
        with torch.autocast(self.args.device, torch.bfloat16):
            return answer_losses(self.model, batch, self.bos_and_user, self.pointer_layers)

    def update(self, progress: float, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """One step on this process's share of the batch."""
        set_learning_rate(self.optimizers, trapezoid(progress, self.steps_since_start))
        batch_size = self.args.batch_size
        answer, pointers, is_right = self.losses(self.args.first_seed + self.step, batch_size, rank * batch_size)
        (answer + POINTER_WEIGHT * pointers).backward()
        average_gradients(self.model)
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.steps_since_start += 1
        return answer.detach(), pointers.detach(), is_right

    @torch.no_grad()
    def evaluate(self, num_pictures: int = 24) -> str:
        """Held-out loss, and the share of tokens right among those that only the picture tells, by task."""
        parts = []
        for task in TASKS:
            answer, pointers, is_right = self.losses(FIRST_EVAL_SEED, num_pictures, task=task)
            read = is_right[is_right[:, 1], 0].float().mean().item()
            parts.append(f"{task}: loss {answer.item():.3f} pointer {pointers.item():.3f} read right {read:.3f}")
        return "; ".join(parts)

    def save(self, minutes: float) -> None:
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        state |= {"num_text_layers": self.num_text_layers, "pointer_layers": list(self.pointer_layers)}
        state |= {"step": self.step, "steps_since_start": self.steps_since_start, "minutes": minutes}
        save_checkpoint(self.args.output, state)


def train(rank: int, num_processes: int, args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    training = Training(AutoProcessor.from_pretrained(args.processor).tokenizer, args)
    clock, saved_at = Clock(args.minutes, training.minutes), training.minutes
    while (spent := agree(clock.spent)) < args.minutes:
        if training.num_text_layers < NUM_TEXT_LAYERS and spent >= args.deepen_at * args.minutes:
            training.deepen()
        answer, pointers, is_right = training.update(spent / args.minutes, rank)
        if rank == 0 and training.step % 25 == 0:
            read = is_right[is_right[:, 1], 0].float().mean().item()
            print(
                f"{spent:.1f} min, step {training.step}, {training.num_text_layers} layers, loss {answer.item():.3f}, "
                f"pointer {pointers.item():.3f}, read right {read:.3f}",
                flush=True,
            )
        if spent - saved_at > MINUTES_PER_SAVE:
            saved_at = spent
            _report(training, clock.spent, rank)
    _report(training, clock.spent, rank)


def _report(training: Training, minutes: float, rank: int) -> None:
    if rank == 0:
        training.save(minutes)
        print(training.evaluate(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--processor", type=Path, default=Path("runs/processor"), help="from train_tokenizer.py")
    parser.add_argument("--encoder", type=Path, default=Path("runs/encoder.pt"), help="from pretrain_encoder.py")
    parser.add_argument("--output", type=Path, default=Path("runs/text.pt"), help="checkpoint; resumed if it exists")
    parser.add_argument("--init-from", type=Path, help="start from the weights of an exported target instead")
    parser.add_argument("--minutes", type=float, default=120, help="budget, earlier runs of this checkpoint included")
    parser.add_argument("--deepen-at", type=float, default=0.3, help="share of the budget spent on the shallow model")
    parser.add_argument("--batch-size", type=int, default=10, help="pictures per step and process")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first step; below 500,000")
    parser.add_argument("--matrix-lr", type=float, default=0.02, help="learning rate of Muon")
    parser.add_argument("--other-lr", type=float, default=3e-3, help="learning rate of AdamW")
    parser.add_argument("--processes", type=int, default=2, help="one per CPU core; 1 on a GPU")
    parser.add_argument("--device", default="cpu", help='"cpu" or "cuda"')
    args = parser.parse_args()
    run_processes(train, args.processes, args)


if __name__ == "__main__":
    main()
