"""`dream-hf bench --tune`: the fastest settings for this machine, printed, written or saved."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .options import load_dream

FILE = "tuned.json"
NUM_PROMPTS, MAX_NEW_TOKENS = 3, 128  # unless given: tuning looks closely at a few answers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options for tuning."""
    group = parser.add_argument_group("tuning")
    group.add_argument(
        "--tune",
        action="store_true",
        help="find the tree (depth, top-k, size, thresholds) and the point below which not to draft that are fastest on "
        f"this machine; --output gets {FILE}, and started again after a stop it goes on. {NUM_PROMPTS} prompts of each task "
        f"and {MAX_NEW_TOKENS} tokens unless given",
    )
    group.add_argument(
        "--save",
        metavar="FOLDER",
        help="write the drafter with the tuned settings; in the drafter's own folder only config.json changes",
    )


def check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if args.save is not None and not args.tune:
        raise ValueError(f"`--save` ({args.save!r}) goes with `--tune`.")
    if args.output is None and not args.tune:
        raise ValueError("`--output` is needed: name a folder for the results.")
    if args.tune and args.drafter is None:
        raise ValueError("`--tune` needs a drafter: name one with `--drafter`.")


def run(args: argparse.Namespace) -> None:
    """Tune, write what was asked for and show the settings."""
    import torch

    from ..benchmark import Settings, load_prompts, save_tuned, tune
    from ..benchmark.tuning.journal import discard

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    num_prompts = args.num_prompts or NUM_PROMPTS
    settings = Settings(
        temperatures=tuple(args.temperatures),
        max_new_tokens=args.max_new_tokens or MAX_NEW_TOKENS,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    settings.check()
    prompts = [prompt for task in args.tasks for prompt in load_prompts(task, num_prompts, args.seed)]
    models = load_dream(args)
    report = tune(
        models.target, models.processor, models.drafter, prompts, settings, date=args.date, output=args.output
    )
    if args.output is not None:
        (Path(args.output).expanduser() / FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if args.save is not None:
        save_tuned(models.drafter, report, args.save)
    if args.output is not None:
        discard(Path(args.output).expanduser())
    print(render(report))


def render(report: Mapping[str, Any]) -> str:
    """What ran end to end, and the settings as lines of Python."""
    width = max(len(row["name"]) for row in report["measured"])
    lines = [f"{'':{width}}  ms/token  ms/step    tau  times plain"]
    for row in report["measured"]:
        figures = f"{row['ms_per_token']:8.2f} {row['step_ms']:8.2f} {row['tau']:6.2f} {row['speedup_decode']:12.2f}"
        lines.append(f"{row['name']:{width}}  {figures}")
    lines += ["", f"Fastest on {report['machine']} (decoding, the prompts' own time left out):"]
    lines += [f"drafter.config.{name} = {value!r}" for name, value in report["settings"].items()]
    return "\n".join(lines)
