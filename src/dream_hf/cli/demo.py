"""`dream-hf demo`."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import DRAFTERS, add_compile, add_json, add_placement, draft_settings, open_picture, quiet, whole_number

if TYPE_CHECKING:
    from ..load_models import Models

HELP = "Answer a question about a picture, plainly and speculatively: the same answer, sooner."
EXAMPLE = (
    'dream-hf demo\n  dream-hf demo --image chart.png --prompt "Describe the chart." --save out.png\n'
    "  dream-hf demo --web  # a page at http://localhost:7860"
)
TASKS = ("scene", "chart", "text")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dream-hf demo`."""
    parser.add_argument("--task", choices=TASKS, default="scene", help="kind of the bundled picture (default: scene)")
    parser.add_argument(
        "--seed", type=whole_number(0), metavar="N", help="draw another held-out picture of that kind instead"
    )
    parser.add_argument("--image", metavar="FILE", help="a picture of your own; needs --prompt")
    parser.add_argument("--prompt", help="what to ask; by default the request that comes with the bundled picture")
    parser.add_argument("--max-new-tokens", type=whole_number(2), default=256, help="longest answer (default: 256)")
    parser.add_argument("--repeats", type=whole_number(1), default=3, help="timed runs of each, medians (default: 3)")
    parser.add_argument("--dtype", default="float32", help="float32 (the default), bfloat16 or float16")
    parser.add_argument("--device", help="cuda, ...; by default the CPU, unless --target-device-map is given")
    parser.add_argument("--target", help="a target of your own instead of the bundled one; needs --drafter")
    parser.add_argument("--drafter", help=f"its drafter: {DRAFTERS}")
    add_placement(parser)
    add_compile(parser)
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="default: auto")
    parser.add_argument("--save", metavar="FILE", help="write a picture of the image, the answer and each step's gain")
    parser.add_argument("--font", metavar="FILE", help="font of the saved picture; Pillow's own by default")
    add_json(parser)
    page = parser.add_argument_group("in a browser")
    page.add_argument("--web", action="store_true", help="serve a page that asks about any picture (extra `web`)")
    page.add_argument("--host", default="localhost", help="address to listen at (localhost)")
    page.add_argument("--port", type=int, default=7860, help="port to listen at (7860)")


def run(args: argparse.Namespace) -> None:
    """Stream both, compare, report."""
    if args.image is not None and args.prompt is None:
        raise ValueError("`--image` needs `--prompt`: say what to ask about the picture.")
    if args.image is not None and args.seed is not None:
        raise ValueError("`--seed` draws a picture and `--image` names one: give one of the two.")
    if args.target is not None and args.drafter is None:
        raise ValueError(
            "`--target` needs `--drafter`: name a drafter, for example retrieval, which fits all targets."
        )
    if args.web:
        _serve_page(args)
        return
    image, prompt = _picture(args)
    if args.save is not None:
        from .answer_card import check_card

        check_card(args.save, args.font)
    quiet()
    from ..benchmark.comparison import compare, encode

    models = _load(args)
    inputs = encode(models.processor, prompt, image)
    streams = (None, None) if args.json else _streams(models.target, models.processor, prompt, args.color)
    result = compare(
        models.target, models.drafter, models.processor, inputs, args.max_new_tokens, args.repeats, streams
    )
    report = {**result.report(), "prompt": prompt, "task": None if args.image else args.task}
    if args.json:
        print(json.dumps(report))
    else:
        print(summary(report))
    if args.save is not None:
        from .answer_card import draw_card

        draw_card(image, prompt, result, args.font).save(Path(args.save).expanduser())


def summary(report: dict[str, Any]) -> str:
    """The end of the demo."""
    lines = [
        "",
        f"identical    {'yes' if report['identical'] else 'NO'}",
        f"plain        {report['plain_seconds']:.2f} s, {report['plain_tokens_per_second']:.1f} tokens/s",
        f"speculative  {report['dream_seconds']:.2f} s, {report['dream_tokens_per_second']:.1f} tokens/s",
        f"speedup      {report['speedup']:.2f}x ({report['num_tokens']} tokens, medians of {report['repeats']} runs)",
    ]
    if report["tau"] is not None:
        lines.append(f"tau          {report['tau']:.2f} tokens per target forward, bonus included")
    return "\n".join(lines)


def _load(args: argparse.Namespace) -> Models:
    from ..load_models import DEMO, load_models, pick_dtype

    if args.target is None and isinstance(pick_dtype(args.dtype), str):
        raise ValueError(f"`--dtype` ({args.dtype!r}) must be float32, bfloat16 or float16 for the bundled pair.")
    is_here = args.device is None and args.target_device_map is None
    models = load_models(
        args.target or DEMO,
        args.drafter or DEMO,
        dtype=args.dtype,
        device="cpu" if is_here else args.device,
        quantization=args.target_quantization,
        device_map=args.target_device_map,
    )
    settings = draft_settings(args)
    return replace(models, drafter=models.drafter.with_settings(**settings)) if settings else models


def _serve_page(args: argparse.Namespace) -> None:
    """Serve the page until interrupted."""
    for name in ("json", "save"):
        if getattr(args, name):
            raise ValueError(
                f"`--web` shows a page, and `--{name}` writes what the terminal would get: leave one of them out."
            )
    from ..load_models import DEMO
    from ..page.app import check_gradio, launch, make_page

    check_gradio()
    is_demo = args.target in (None, DEMO)
    image, prompt = _picture(args) if is_demo or args.image is not None else (None, args.prompt or "")
    page = make_page(
        _load(args),
        picture=image,
        question=prompt,
        max_new_tokens=args.max_new_tokens,
        repeats=args.repeats,
        is_demo=is_demo,
    )
    launch(page, args.host, args.port)


def _picture(args: argparse.Namespace) -> tuple[Any, str]:
    """The picture to ask about and what to ask: the user's, one drawn for `--seed`, or the bundled one of the task."""
    if args.image is not None:
        return open_picture(args.image, "--image"), args.prompt
    from ..demo.pictures import bundled_picture, draw_picture
    from ..demo.rows import TRAIN_SEED_LIMIT

    if args.seed is not None:
        image, request = draw_picture(args.task, TRAIN_SEED_LIMIT + args.seed)
    else:
        file, request = bundled_picture(args.task)
        image = open_picture(file, "--task")
    return image, request if args.prompt is None else args.prompt


def _streams(target: Any, processor: Any, prompt: str, color: str) -> tuple[Any, Any]:
    """What shows the two answers as they come."""
    from ..data.chat import tokenizer_of
    from .streaming import StepStreamer, wants_color

    tokenizer = tokenizer_of(processor)
    print(f"prompt: {prompt}\n")
    return (
        StepStreamer(tokenizer, "plain:       "),
        StepStreamer(tokenizer, "speculative: ", target, wants_color(color)),
    )
