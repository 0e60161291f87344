"""`dream-hf generate`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .options import DRAFTERS, add_json, add_models, load, open_picture, quiet, whole_number

HELP = "Answer one prompt about any number of pictures, with or without a drafter."
EXAMPLE = 'dream-hf generate --target demo --drafter demo --image chart.png --prompt "Put this chart into a table."'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dream-hf generate`."""
    add_models(parser, drafter=f"{DRAFTERS}; without one, decoding is plain")
    parser.add_argument("--prompt", required=True, help="what to ask")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; repeat for several")
    parser.add_argument("--max-new-tokens", type=whole_number(1), default=256, help="longest answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    parser.add_argument("--top-k", type=whole_number(0), default=0, help="sample from this many tokens; 0 for all")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens up to this mass")
    parser.add_argument("--seed", type=int, default=42, help="for sampling (default: 42)")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Generate, streaming the text unless JSON is wanted."""
    images = [open_picture(path, "--image") for path in args.image]
    if args.temperature < 0:
        raise ValueError(f"`--temperature` ({args.temperature}) must be 0 (greedy) or more.")
    if args.json:
        quiet()
    import torch
    from transformers import TextStreamer

    from ..benchmark.measure import measure
    from ..data.prompts import PromptEncoder

    models = load(args)
    encoder = PromptEncoder(models.processor)
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": args.prompt}]
    inputs = encoder.encode([([{"role": "user", "content": content}], images)])
    torch.manual_seed(args.seed)
    tokenizer: Any = encoder.tokenizer
    streamer = None if args.json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    arguments = {"max_new_tokens": args.max_new_tokens, **_sampling(args)}
    if models.drafter is not None:
        arguments |= {"assistant_model": models.drafter, "return_dict_in_generate": True}
    result = measure(models.target, inputs, arguments, streamer)
    gains = result.gains if models.drafter is not None else []
    report = {
        "text": encoder.decode(result.tokens),
        "num_tokens": result.num_tokens,
        "seconds": result.seconds,
        "tokens_per_second": result.num_tokens / result.seconds,
        "tau": sum(gains) / len(gains) if gains else None,
        "accepted_lengths": gains or None,
    }
    if args.json:
        print(json.dumps(report))
        return
    tau = "" if report["tau"] is None else f", tau {report['tau']:.2f} (bonus included)"
    print(
        f"\n[{report['num_tokens']} tokens in {result.seconds:.2f} s, {report['tokens_per_second']:.1f} tokens/s{tau}]"
    )


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    if args.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
