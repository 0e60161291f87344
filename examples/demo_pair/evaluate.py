"""Measure a target on held-out pictures with greedy decoding: `python evaluate.py --help`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from dream_hf.demo import TASKS, Example, make_examples, score_answer
from dream_hf.demo.rows import TRAIN_SEED_LIMIT, to_messages


@torch.no_grad()
def answer_all(model: Any, processor: Any, examples: list[Example], batch_size: int) -> Iterator[str]:
    """Greedy answers, in order."""
    processor.tokenizer.padding_side = "left"
    for start in range(0, len(examples), batch_size):
        chunk = examples[start : start + batch_size]
        prompts = [
            processor.apply_chat_template(to_messages(example.turn.prompt), add_generation_prompt=True)
            for example in chunk
        ]
        images = [example.row["images"] for example in chunk]
        inputs = processor(text=prompts, images=images, return_tensors="pt", padding=True).to(model.device)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=256)
        yield from processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def blank_pictures(examples: list[Example]) -> None:
    """Replace every picture by a gray sheet: what the target then still gets right, it guesses."""
    for example in examples:
        example.row["images"] = [Image.new("RGB", image.size, "gray") for image in example.row["images"]]


def evaluate(
    model: Any, processor: Any, num_rows: int, seed: int, batch_size: int = 16, is_blank: bool = False
) -> dict[str, dict[str, float]]:
    """Shares right by task and kind, over `num_rows` pictures each.

    Of long answers: `stated_right` = right among the facts stated, `found` = right among the facts to state, and
    `perfect` = answers without a mistake. Of transcriptions the facts are characters; of questions, the answers.
    """
    results = {}
    for task in TASKS:
        for kind in ("long", "short"):
            examples = make_examples(task, num_rows, seed, kind)
            if is_blank:
                blank_pictures(examples)
            answers = answer_all(model, processor, examples, batch_size)
            scores = [score_answer(example, answer) for example, answer in zip(examples, answers, strict=True)]
            results[f"{task}/{kind}"] = {
                "stated_right": sum(score.right for score in scores) / max(1, sum(score.stated for score in scores)),
                "found": sum(score.found for score in scores) / sum(score.expected for score in scores),
                "perfect": sum(score.is_perfect for score in scores) / len(scores),
                "num_rows": num_rows,
            }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("--target", type=Path, default=Path("runs/target"), help="exported folder")
    parser.add_argument("--num-rows", type=int, default=100, help="pictures per task and kind")
    parser.add_argument("--seed", type=int, default=TRAIN_SEED_LIMIT, help="1,000,000 or more: held out")
    parser.add_argument("--blank", action="store_true", help="show gray sheets instead: what guessing gets")
    parser.add_argument("--dtype", default="float32", help="dtype to decode in")
    parser.add_argument("--device", default="cpu", help='"cpu" or "cuda"')
    parser.add_argument("--output", type=Path, help="JSON file to write the figures to")
    args = parser.parse_args()
    if args.seed < TRAIN_SEED_LIMIT:
        parser.error(f"--seed {args.seed} is a training seed: pass {TRAIN_SEED_LIMIT} or more.")
    processor = AutoProcessor.from_pretrained(args.target)
    model = AutoModelForImageTextToText.from_pretrained(args.target, dtype=args.dtype).to(args.device).eval()
    results = evaluate(model, processor, args.num_rows, args.seed, is_blank=args.blank)
    for name, figures in results.items():
        print(name, " ".join(f"{key} {value:.3f}" for key, value in figures.items() if key != "num_rows"))
    if args.output:
        args.output.write_text(
            json.dumps({"seed": args.seed, "dtype": args.dtype, "blank": args.blank, "results": results}, indent=2)
            + "\n"
        )


if __name__ == "__main__":
    main()
