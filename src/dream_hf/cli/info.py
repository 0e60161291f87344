"""`dream-hf info`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .options import add_json, add_models, load

HELP = "Tell what a drafter is, for which target, whether it fits, how it drafts and what a step reads."
EXAMPLE = "dream-hf info my-drafter\n  dream-hf info my-drafter --target llava-hf/llava-v1.6-vicuna-7b-hf"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dream-hf info`."""
    parser.add_argument(
        "drafter", help='folder or Hub id; "demo" is the bundled one, and made drafters have their names'
    )
    add_models(parser, is_target_needed=False, drafter=None)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Load the drafter, with its target if one is named, and tell."""
    found = describe_alone(args.drafter, args.drafter_revision) if args.target is None else describe_with_target(args)
    if args.json:
        print(json.dumps(found))
        return
    width = max(map(len, found))
    for name, value in found.items():
        shown = ", ".join(f"{key} {each}" for key, each in value.items()) if isinstance(value, dict) else value
        print(f"{name.replace('_', ' '):{width}}  {shown}")


def describe_alone(source: str, revision: str | None) -> dict[str, Any]:
    """What is known of a drafter that was saved here, without its target."""
    from ..drafters.detection import OUR_MODEL_TYPES
    from ..drafters.published_files import read_published_config
    from ..load_models import load_saved, source_of

    place = str(source_of(source, "drafter"))
    config = read_published_config(place, revision=revision)
    if config.get("model_type") not in OUR_MODEL_TYPES:
        raise ValueError(
            f"`drafter` ({source!r}) was not saved by dream-hf; name its target with --target, which it is read for."
        )
    return describe(load_saved(place, config, "auto", revision))


def describe_with_target(args: argparse.Namespace) -> dict[str, Any]:
    """What is known of any drafter, and how it suits a target."""
    models = load(args)
    target, drafter = models.target, models.drafter
    try:
        drafter.check(target, drafter.settings)
        fits = "yes"
    except (ValueError, TypeError) as error:
        fits = f"no: {' '.join(str(error).split())}"
    return {**describe(drafter), "fits": fits, **_step(target.config, drafter)}


def describe(drafter: Any) -> dict[str, Any]:
    """Kind, size and settings."""
    found: dict[str, Any] = {"kind": type(drafter).__name__}
    if hasattr(drafter, "parameters"):
        weights = list(drafter.parameters())
        found["weights"] = sum(weight.numel() for weight in weights)
        found["megabytes"] = round(sum(weight.numel() * weight.element_size() for weight in weights) / 1e6, 1)
        found["dtype"] = str(drafter.dtype).removeprefix("torch.")
        made_for = getattr(drafter.config, "target", None) or {}
        found["made_for"] = {name: value for name, value in made_for.items() if value is not None} or "unknown"
    settings = drafter.settings
    return {**found, "settings": {name: getattr(settings, name) for name in settings.names()}}


def _step(target_config: Any, drafter: Any) -> dict[str, Any]:
    """What a step reads, where that can be counted."""
    from ..drafters.dream.drafter import DreamDrafter
    from ..drafters.dream.shape import weight_ratio

    if not isinstance(drafter, DreamDrafter):
        return {}
    return {"weights_read_in_plain_steps": round(weight_ratio(target_config, drafter.config), 2)}
