"""What a result depends on, so that it can be judged and repeated."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..decoding.drafter import Drafter
from ..drafters.dream.drafter import DreamDrafter
from ..training.feature_cache import fingerprint_weights
from ..version import __version__

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "numpy", "pillow")


def describe_run(
    target: Any,
    drafter: DreamDrafter | None,
    assistant: Any = None,
    further: Mapping[str, Drafter] | None = None,
    date: str | None = None,
) -> dict:
    """Versions, machine and models, `further` drafters by name; `date` is today's (UTC) unless given."""
    return {
        "date": date or datetime.now(UTC).date().isoformat(),
        "versions": {"dream_hf": __version__, "python": platform.python_version(), **_versions()},
        "machine": describe_machine(target.device),
        "target": describe_model(target),
        "drafter": None if drafter is None else {**describe_model(drafter), **_drafting(drafter)},
        "assistant": None if assistant is None else describe_model(assistant),
        "further": {name: _any_drafter(each) for name, each in (further or {}).items()},
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The device, the CPU and how many threads it works with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": name,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }


def describe_model(model: Any) -> dict[str, Any]:
    """Name, revision, a digest of the weights, size and dtype of a model; of a folder only its own name."""
    is_elsewhere = any(weight.is_meta for weight in model.parameters())  # offloaded: not to be read as they are
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return {
        "name": Path(name).name if os.path.isdir(name) else name,
        "revision": getattr(model.config, "_commit_hash", None),
        "weights": None if is_elsewhere else fingerprint_weights(model),
        "class": type(model).__name__,
        "num_parameters": sum(weight.numel() for weight in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": getattr(model.config, "_attn_implementation", None),
    }


def _any_drafter(drafter: Drafter) -> dict[str, Any]:
    """A drafter of any kind: what it is, and how it drafts."""
    model = describe_model(drafter) if isinstance(drafter, PreTrainedModel) else {"class": type(drafter).__name__}
    return {**model, "settings": asdict(drafter.settings)}


def _drafting(drafter: DreamDrafter) -> dict[str, Any]:
    """Everything in the drafter's config that decoding depends on."""
    names = ("visual_keep_ratio", "visual_importance", "pause_below", "compile", "draft_threads", "draft_vocab_size")
    trees = [name for name in drafter.config.to_dict() if name.startswith("tree_")]
    return {name: getattr(drafter.config, name) for name in (*trees, *names)}


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
