"""LoRA adapters and the drafter they were trained on -> an ordinary drafter."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..drafters.detection import OUR_MODEL_TYPES
from ..drafters.published_files import read_published_config
from ..hub.card_content import PROGRESS, RECIPE
from ..load_models import load_saved

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as peft calls them


def merge_adapters(
    adapters: str | os.PathLike,
    destination: str | os.PathLike,
    base: str | os.PathLike | None = None,
    *,
    base_revision: str | None = None,
) -> Path:
    """Write the drafter that adapters make of their base, with its card; nothing of peft is needed to load it.

    Args:
        adapters (`str` or `os.PathLike`): Folder with what `dream-hf train --use_lora true` writes, or `DreamTrainer`
            with a `peft_config`. Its recipe and its record of the training go along, for the card.
        destination (`str` or `os.PathLike`): Folder to write; new or empty.
        base (`str` or `os.PathLike`, *optional*): Folder or Hub id of the drafter that they were trained on; what they name
            themselves by default.
        base_revision (`str`, *optional*): Revision of the base on the Hub.

    Returns:
        `Path`: The destination. Sums are made in float32; weights are saved in the dtype of the base.

    Raises:
        ValueError: No adapters, adapters that cannot be merged, of another drafter or of none that was saved here, or a
            destination that holds something.
        OSError: There is no such base.
    """
    source, destination = Path(adapters).expanduser(), Path(destination).expanduser()
    config = _read_config(source)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(
            f"`destination` ({str(destination)!r}) holds something already; name a folder that is new or empty."
        )
    named = config.base_model_name_or_path if base is None else os.fspath(base)
    if not named:
        raise ValueError(
            f"`adapters` ({str(source)!r}) do not name the drafter they were trained on; give it as `base`."
        )
    drafter = _load_base(os.fspath(named), base_revision)
    dtype = drafter.dtype
    merged = _merge(drafter.float(), source, str(named)).to(dtype)
    merged.config.name_or_path = str(destination)
    destination.mkdir(parents=True, exist_ok=True)
    for name in (RECIPE, PROGRESS):
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)
    merged.save_pretrained(destination)
    return destination


def _read_config(source: Path) -> Any:
    """What the adapters are."""
    from peft import PeftConfig

    for name in (CONFIG, WEIGHTS):
        if not (source / name).is_file():
            raise ValueError(f"`adapters` ({str(source)!r}) is no folder of LoRA adapters: it has no {name}.")
    config: Any = PeftConfig.from_pretrained(str(source))
    if config.is_prompt_learning:
        raise ValueError(
            f"`adapters` ({str(source)!r}) are of the kind {config.peft_type.value}, which changes no weights."
        )
    return config


def _load_base(source: str, revision: str | None) -> Any:
    """The drafter that adapters were trained on, of any kind that is saved here."""
    config = read_published_config(source, revision=revision)
    if config.get("model_type") not in OUR_MODEL_TYPES:
        raise ValueError(
            f"`base` ({source!r}) is of the kind {config.get('model_type')!r}, which no adapters are trained on here; load it "
            "with `load_drafter`, save it, and name that folder."
        )
    return load_saved(source, config, "auto", revision)


def _merge(drafter: Any, source: Path, base: str) -> Any:
    """`drafter` with the adapters in its weights; all of them, and no others."""
    from peft import PeftModel, get_peft_model_state_dict

    try:
        adapted: Any = PeftModel.from_pretrained(drafter, str(source), torch_device="cpu")
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"`adapters` ({str(source)!r}) do not fit `base` ({base!r}): {error}") from error
    with safe_open(source / WEIGHTS, "pt") as file:
        saved = set(file.keys())
    odd = sorted(saved.symmetric_difference(get_peft_model_state_dict(adapted)))
    if odd:
        raise ValueError(
            f"`adapters` ({str(source)!r}) are not of `base` ({base!r}): one of the two has no {odd[0]!r} ({len(odd)} in all)."
        )
    with torch.no_grad():
        return adapted.merge_and_unload()
