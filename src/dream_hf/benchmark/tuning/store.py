"""Where tuned settings go: into a drafter's config, with the machine they were measured on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...drafters.dream.configuration import DreamConfig
from ...drafters.dream.drafter import DreamDrafter

CONFIG = "config.json"
COPIED_FOLDERS = ("custom_generate",)


def machine_name(machine: Mapping[str, Any]) -> str:
    """A name for a machine as [`describe_machine`] describes it: the accelerator's, or the CPU's with its threads."""
    if machine["device"] != "cpu":
        return machine["device"]
    threads = machine["threads"]
    return f"{machine['cpu']}, {threads} thread{'s' if threads != 1 else ''}"


def apply_tuning(config: DreamConfig, report: Mapping[str, Any]) -> None:
    """Give a config the settings that [`tune`] found, and a note of where they are from; other machines' notes stay."""
    for name, value in report["settings"].items():
        setattr(config, name, value)
    config.check_drafting()
    note = {"settings": dict(report["settings"]), **report["speeds"]}
    config.tuned = {**(config.tuned or {}), report["machine"]: note}


def save_tuned(drafter: DreamDrafter, report: Mapping[str, Any], folder: str | Path) -> None:
    """Write a drafter with tuned settings.

    Args:
        drafter (`DreamDrafter`): The drafter, whose config gets the settings.
        report (`Mapping`): What [`tune`] returned.
        folder (`str` or `Path`): Where to. In the folder that the drafter was loaded from only `config.json` is changed; the
            files of another local folder are copied; what came from the Hub is saved anew.

    Raises:
        ValueError: The folder holds another drafter.
    """
    folder = Path(folder).expanduser()
    source = Path(drafter.config._name_or_path or "")
    apply_tuning(drafter.config, report)
    if not (source / CONFIG).is_file():
        _check_empty(folder)
        drafter.save_pretrained(folder)
        return
    if not _is_same(source, folder):
        _check_empty(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            if file.is_file():
                shutil.copy2(file, folder)
            elif file.name in COPIED_FOLDERS:
                shutil.copytree(file, folder / file.name)
    _change_config(folder / CONFIG, {**report["settings"], "tuned": drafter.config.tuned})


def _check_empty(folder: Path) -> None:
    if (folder / CONFIG).exists():
        raise ValueError(
            f"`save` ({str(folder)!r}) holds another model. Name the drafter's own folder, or one that does not exist yet."
        )


def _is_same(one: Path, other: Path) -> bool:
    return other.exists() and os.path.samefile(one, other)


def _change_config(file: Path, values: Mapping[str, Any]) -> None:
    """Set values in a config file, and leave what else it says as it is."""
    config = json.loads(file.read_text(encoding="utf-8"))
    text = json.dumps({**config, **values}, indent=2, sort_keys=True, ensure_ascii=False)
    partial = file.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(file)
