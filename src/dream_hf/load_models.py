"""Targets, their processors and drafters, loaded by name: what every command starts with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import find_adapter_config_file

from .drafters.dream.drafter import DreamDrafter

DEMO = "demo"
BUNDLED = {name: Path(__file__).parent / "demo" / name for name in ("target", "drafter")}  # what `DEMO` stands for


@dataclass(frozen=True)
class Models:
    """A target, what writes its prompts, and a drafter if one was named."""

    target: Any
    processor: Any
    drafter: DreamDrafter | None


def load_models(
    target: str,
    drafter: str | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    revision: str | None = None,
    drafter_revision: str | None = None,
    attn_implementation: str | None = None,
) -> Models:
    """Load a target, its processor and, where one is named, its drafter.

    Args:
        target (`str`): Folder or Hub id; `"demo"` for the bundled target. Of PEFT adapters (what trl saves) the model that
            they were trained on is loaded, and they are merged into it.
        drafter (`str`, *optional*): Folder or Hub id; `"demo"` for the bundled drafter.
        dtype (`str` or `torch.dtype`): Of both; `"auto"` takes the target's own.
        device (`str`, *optional*): Of both; by default the accelerator where there is one. `"auto"` spreads the target over
            all accelerators; the drafter then goes to the first.
        revision (`str`, *optional*): Revision of the target.
        drafter_revision (`str`, *optional*): Revision of the drafter.
        attn_implementation (`str`, *optional*): The target's attention; transformers' choice by default.

    Raises:
        ValueError: A dtype or device that does not exist, a drafter that does not fit the target, or adapters that cannot be
            merged.
        OSError: Nothing to load under one of the names.
        ImportError: The target's processor needs a package that is not installed.
    """
    device_map: Any = "auto" if device == "auto" else {"": pick_device(device)}
    target_source, drafter_source = _source(target, "target"), _source(drafter, "drafter")
    model, processor = _load_target(target_source, pick_dtype(dtype), revision, attn_implementation, device_map)
    model = model.eval()
    if drafter is None:
        return Models(model, processor, None)
    loaded: Any = DreamDrafter.from_pretrained(drafter_source, dtype=model.dtype, revision=drafter_revision)
    return Models(model, processor, loaded.to(model.device).eval())


def pick_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """`"auto"`, or a floating-point dtype from its name."""
    if dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"`dtype` ({dtype!r}) is no floating-point dtype: use auto, float32, bfloat16 or float16.")
    return found


def pick_device(device: str | None) -> torch.device:
    """The device of this name, or the accelerator where there is one."""
    if device is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`device` ({device!r}) cannot be used here: {reason}") from error
    return place


def _load_target(
    source: str | Path,
    dtype: str | torch.dtype,
    revision: str | None,
    attn_implementation: str | None,
    device_map: Any,
) -> tuple[Any, Any]:
    adapter = _read_adapter(source, revision)
    base, base_revision = (
        (source, revision) if adapter is None else (adapter.base_model_name_or_path, adapter.revision)
    )
    config = AutoConfig.from_pretrained(base, revision=base_revision)
    takes_images = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    model_class: Any = AutoModelForImageTextToText if takes_images else AutoModelForCausalLM
    processor = _load_processor(AutoProcessor if takes_images else AutoTokenizer, base, base_revision)
    options: dict[str, Any] = {"dtype": dtype, "revision": base_revision, "device_map": device_map}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    model = model_class.from_pretrained(base, **options)
    return (model, processor) if adapter is None else _merge(model, processor, str(source), revision)


def _read_adapter(source: str | Path, revision: str | None) -> Any:
    """The config of the PEFT adapters that `source` holds; None where it holds a model of its own."""
    if (Path(source) / "config.json").is_file() or find_adapter_config_file(str(source), revision=revision) is None:
        return None
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(str(source), revision=revision)
    if config.is_prompt_learning or config.base_model_name_or_path is None:
        raise ValueError(
            f"`target` ({str(source)!r}) holds PEFT adapters ({config.peft_type.value}) that cannot be merged into a model: "
            "only adapters of weights that name their model (LoRA and its kin) can."
        )
    return config


def _merge(model: Any, processor: Any, source: str, revision: str | None) -> tuple[Any, Any]:
    """`model` with the adapters of `source` merged into its weights, and the processor that was saved beside them."""
    from peft import PeftModel

    try:
        own = type(processor).from_pretrained(source, revision=revision)
    except (OSError, ValueError, TypeError):  # there is none, or only a part of one
        own = processor
    vocab_size = len(getattr(own, "tokenizer", own))
    if vocab_size > model.get_input_embeddings().num_embeddings:  # tokens were added for the adapters
        model.resize_token_embeddings(vocab_size)
    merged: Any = PeftModel.from_pretrained(model, source, revision=revision).merge_and_unload()
    merged.config._name_or_path, merged.config._commit_hash = source, None  # another target than its base
    return merged, own


def _load_processor(processor_class: Any, source: str | Path, revision: str | None) -> Any:
    try:
        return processor_class.from_pretrained(source, revision=revision)
    except ImportError as error:
        if "torchvision" not in str(error).lower():
            raise
        raise ImportError(
            f"The processor of `target` ({str(source)!r}) needs torchvision, which is not installed. It is the extra "
            '`vision` of dream-hf: `pip install ".[vision]"` in a clone, or `pip install torchvision`.'
        ) from error


def _source(name: Any, kind: str) -> Any:
    """What to load a target or a drafter from: `name`, and the bundled folder for `DEMO`."""
    if name != DEMO:
        return name
    for file in ("config.json", "model.safetensors"):
        if not (BUNDLED[kind] / file).is_file():
            raise FileNotFoundError(
                f"The bundled demo {kind} is incomplete: this copy of the package came without demo/{kind}/{file}. "
                f"Install a released package, train the pair with examples/demo_pair, or name your own with --{kind}."
            )
    return BUNDLED[kind]
