"""Teach the vision encoder, alone, to name what is on every patch: `python pretrain_encoder.py --help`."""

from __future__ import annotations

import argparse
from pathlib import Path

import labels
import numpy as np
import torch
from model import WIDTH, build_target
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
from transformers import AutoProcessor

from dream_hf.demo.rows import TASKS, sample_truth

FIRST_TRAIN_SEED, FIRST_EVAL_SEED = 500_000, 1_500_000
SCALE_WEIGHT = 0.02


def make_batch(seed: int, num_pictures: int, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, H, W) in [-1, 1] and labels (B, labels, patches) of pictures of all tasks."""
    pixels, targets = [], []
    tasks = tuple(TASKS)
    for index in range(offset, offset + num_pictures):
        task = tasks[index % len(tasks)]
        truth, _ = sample_truth(task, seed, index)
        pixels.append(np.asarray(TASKS[task].draw(truth)))
        targets.append(labels.patch_labels(truth))
    return to_pixel_values(pixels), torch.from_numpy(np.stack(targets))


def to_pixel_values(pictures: list[np.ndarray]) -> Tensor:
    """What the processor makes of pictures of the right size: (B, 3, H, W), scaled to [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


class PatchNamer(nn.Module):
    """The encoder with one linear head per label."""

    def __init__(self, vision_tower: nn.Module):
        super().__init__()
        self.vision_tower = vision_tower
        self.heads = nn.Linear(WIDTH, labels.NUM_LOGITS)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        features = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-1]  # (B, patches, W)
        return features, self.heads(features)


def label_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, tuple[int, int]]]:
    """Sum over labels of the mean cross-entropy over labelled patches; also (right, labelled) per label."""
    total, counts = logits.new_zeros(()), {}
    for index, (name, num_classes) in enumerate(labels.NUM_CLASSES.items()):
        truth = targets[:, index]
        is_labelled = truth != labels.IGNORE
        number = int(is_labelled.sum())
        if number:
            start = labels.OFFSETS[name]
            chosen = logits[is_labelled][:, start : start + num_classes].float()
            total = total + nn.functional.cross_entropy(chosen, truth[is_labelled])
            counts[name] = (int((chosen.argmax(-1) == truth[is_labelled]).sum()), number)
    return total, counts


@torch.no_grad()
def evaluate(namer: PatchNamer, device: str, num_pictures: int = 300) -> str:
    """Share of held-out patches named rightly, per label."""
    pixels, targets = make_batch(FIRST_EVAL_SEED, num_pictures)
    _, logits = namer(pixels.to(device))
    _, counts = label_losses(logits, targets.to(device))
    return " ".join(f"{name} {right / number:.3f}" for name, (right, number) in counts.items())


def train(rank: int, num_processes: int, args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    tokenizer = AutoProcessor.from_pretrained(args.processor).tokenizer
    namer = PatchNamer(build_target(tokenizer, num_text_layers=1).model.vision_tower).to(args.device)
    optimizers = build_optimizers(namer, matrix_lr=0.02, other_lr=3e-3)
    state = load_checkpoint(args.output) or {"step": 0, "minutes": 0.0}
    if state["step"]:
        namer.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    clock, step, saved_at = Clock(args.minutes, state["minutes"]), state["step"], state["minutes"]
    while (spent := agree(clock.spent)) < args.minutes:
        set_learning_rate(optimizers, trapezoid(spent / args.minutes, step))
        pixels, targets = make_batch(FIRST_TRAIN_SEED + step, args.batch_size, offset=rank * args.batch_size)
        with torch.autocast(args.device, torch.bfloat16):
            features, logits = namer(pixels.to(args.device))
        loss, _ = label_losses(logits, targets.to(args.device))
        (loss + SCALE_WEIGHT * (features.float().pow(2).mean() - 1.0).pow(2)).backward()
        average_gradients(namer)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if rank == 0 and step % 50 == 0:
            rate = step * args.batch_size * num_processes / (clock.spent * 60)
            print(
                f"{spent:.1f} min, step {step}, loss {loss.item():.3f}, {rate:.0f} pictures/s, rms {rms(features):.2f}"
            )
        if spent - saved_at > 2:
            saved_at = spent
            if rank == 0:
                print(evaluate(namer, args.device), flush=True)
                _save(args.output, namer, optimizers, step, clock.spent)
    if rank == 0:
        print(evaluate(namer, args.device), flush=True)
        _save(args.output, namer, optimizers, step, clock.spent)


def _save(path: Path, namer: PatchNamer, optimizers: list[torch.optim.Optimizer], step: int, minutes: float) -> None:
    saved = [optimizer.state_dict() for optimizer in optimizers]
    save_checkpoint(path, {"model": namer.state_dict(), "optimizers": saved, "step": step, "minutes": minutes})


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("--processor", type=Path, default=Path("runs/processor"), help="from train_tokenizer.py")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/encoder.pt"), help="checkpoint; resumed if it exists"
    )
    parser.add_argument("--minutes", type=float, default=10, help="budget, earlier runs of this checkpoint included")
    parser.add_argument("--batch-size", type=int, default=20, help="pictures per step and process")
    parser.add_argument("--processes", type=int, default=2, help="one per CPU core; 1 on a GPU")
    parser.add_argument("--device", default="cpu", help='"cpu" or "cuda"')
    args = parser.parse_args()
    run_processes(train, args.processes, args)


if __name__ == "__main__":
    main()
