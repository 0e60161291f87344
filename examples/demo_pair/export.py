"""Write a training checkpoint as a folder that stock transformers loads: `python export.py --help`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from model import build_target
from session import load_checkpoint
from transformers import AutoProcessor


def export(checkpoint: Path, processor_path: Path, output: Path) -> int:
    """Write weights (bfloat16), configuration and processor; returns the size of the weights in bytes."""
    state = load_checkpoint(checkpoint)
    if state is None:
        raise ValueError(f"`--checkpoint` is {checkpoint}, which does not exist: run train_text.py first.")
    processor = AutoProcessor.from_pretrained(processor_path)
    model = build_target(processor.tokenizer, state["num_text_layers"])
    model.load_state_dict(state["model"])
    model.generation_config.max_new_tokens = 256
    model.to(torch.bfloat16).save_pretrained(output)
    processor.save_pretrained(output)
    return sum(file.stat().st_size for file in output.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/text.pt"), help="from train_text.py")
    parser.add_argument("--processor", type=Path, default=Path("runs/processor"), help="from train_tokenizer.py")
    parser.add_argument("--output", type=Path, default=Path("runs/target"), help="folder to write")
    args = parser.parse_args()
    size = export(args.checkpoint, args.processor, args.output)
    print(f"{args.output}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()
