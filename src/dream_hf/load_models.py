"""Targets, their processors and drafters, loaded by name: what every command starts with."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import find_adapter_config_file

from .decoding.drafter import Drafter
from .drafters.combined import CombinedDrafter
from .drafters.detection import DFLASH, EAGLE, MTP, OUR_MODEL_TYPES, kind_of, wanted_names
from .drafters.dflash.drafter import DFlashDrafter
from .drafters.dflash.loading import load_dflash
from .drafters.dflash.probe import probe_dflash
from .drafters.dream.conversion import convert_checkpoint
from .drafters.dream.drafter import DreamDrafter
from .drafters.eagle.drafter import EagleDrafter
from .drafters.eagle.loading import load_eagle
from .drafters.eagle.probe import probe_eagle
from .drafters.model.drafter import ModelDrafter
from .drafters.mtp.drafter import MTPDrafter
from .drafters.mtp.loading import load_mtp
from .drafters.mtp.probe import probe_mtp
from .drafters.probe import NUM_TOKENS, Probe, probe_as_it_is
from .drafters.published_files import read_published_config, read_tensors
from .drafters.retrieval.drafter import RetrievalDrafter
from .drafters.skip.drafter import LayerSkipDrafter
from .targets.quantized import check_quantization, quantization_config
from .targets.target import Target

DEMO = "demo"
RETRIEVAL, SKIP, MODEL = "retrieval", "skip", "model:"  # drafters that are made and not loaded
PUBLISHED: dict[str, Any] = {
    EAGLE: (load_eagle, probe_eagle),
    DFLASH: (load_dflash, probe_dflash),
}  # that can be wired
PROBE = "probe"  # a wiring that is to be found out
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's ways of spreading a model
BUNDLED = {name: Path(__file__).parent / "demo" / name for name in ("target", "drafter")}  # what `DEMO` stands for


@dataclass(frozen=True)
class Models:
    """A target, what writes its prompts, and a drafter if one was named."""

    target: Any
    processor: Any
    drafter: Any


def load_models(
    target: str,
    drafter: str | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    revision: str | None = None,
    drafter_revision: str | None = None,
    attn_implementation: str | None = None,
    quantization: str | None = None,
    device_map: str | None = None,
) -> Models:
    """Load a target, its processor and, where one is named, its drafter.

    Args:
        target (`str`): Folder or Hub id; `"demo"` for the bundled target. Of PEFT adapters (what trl saves) the model that
            they were trained on is loaded, and they are merged into it.
        drafter (`str`, *optional*): Folder or Hub id of what [`load_drafter`] loads; `"demo"` for the bundled drafter;
            `"mtp"` for the MTP head in the target's own files; `"retrieval"`, `"skip"` or `"model:"` with the folder or Hub
            id of another model for drafters without training; several of these with `+` between them for a [`CombinedDrafter`].
        dtype (`str` or `torch.dtype`): Of both; `"auto"` takes the target's own.
        device (`str`, *optional*): Of both; by default the accelerator where there is one. `"auto"` spreads the target over
            all accelerators; the drafter then goes to the first.
        revision (`str`, *optional*): Revision of the target.
        drafter_revision (`str`, *optional*): Revision of the drafter.
        attn_implementation (`str`, *optional*): The target's attention; transformers' choice by default.
        quantization (`str`, *optional*): `"4bit"` or `"8bit"`: the target's weights are rounded while they are loaded.
        device_map (`str`, *optional*): How to spread the target, instead of `device`: one of `DEVICE_MAPS`, which accelerate
            explains.

    Raises:
        ValueError: A dtype or device that does not exist, a drafter that does not fit the target, or adapters that cannot be
            merged.
        OSError: Nothing to load under one of the names.
        ImportError: The target's processor, or the quantisation, needs a package that is not installed.
    """
    place = _device_map(device, device_map)
    if quantization is not None:
        check_quantization(quantization)
    target_source = source_of(target, "target")
    for name in _drafter_names(drafter):
        source_of(name, "drafter")  # before the target is loaded for nothing
    options = {"dtype": pick_dtype(dtype), "device_map": place, "attn_implementation": attn_implementation}
    model, processor = _load_target(target_source, revision, options, quantization)
    models = Models(model.eval(), processor, None)
    return models if drafter is None else replace(models, drafter=make_drafter(drafter, models, drafter_revision))


def make_drafter(drafter: str, models: Models, revision: str | None = None) -> Drafter:
    """The drafter that a name stands for on the command line, for a target that is loaded; see [`load_models`]."""
    drafters = [_make_drafter(name, models, revision) for name in _drafter_names(drafter)]
    return CombinedDrafter(drafters) if len(drafters) > 1 else drafters[0]


def load_drafter(
    source: str | PathLike,
    target: Any,
    *,
    revision: str | None = None,
    wiring: Mapping[str, Any] | str | None = None,
) -> Drafter:
    """Load a drafter of any kind for a target, in its dtype and on its device.

    It is told from config.json and the names of the weights what a checkpoint holds: a drafter that was saved here, DREAM's as
    its authors publish them, EAGLE-1, EAGLE-2 and EAGLE-3 as SafeAILab, SpecForge, AngelSlim, speculators, ModelOpt and NeMo
    write them, MSD and ViSpec, DFlash as z-lab and speculators write it; and a target itself, whose MTP head (`mtp.*`, which
    transformers leaves out) is the drafter.
    Pickles are read as plain tensors only.

    Args:
        source (`str` or `os.PathLike`): A folder or a Hub id; `"demo"` for the bundled drafter; `"mtp"` for the MTP head in the
            files that `target` was loaded from.
        target (`PreTrainedModel`): The model to draft for.
        revision (`str`, *optional*): Revision of the drafter on the Hub.
        wiring (`Mapping`, *optional*): What the config of a published drafter leaves open or has wrong: fields of EAGLE's
            [`Wiring`], for example `{"feature_layers": (2, 18, 33), "norm_before_residual": True}`, or of [`DFlashWiring`]; of
            an MTP head what [`MTPDrafter`] takes. `"probe"` asks the target: of all wirings that the weights of an EAGLE or
            DFlash drafter allow the one that foretells 200 of its tokens best, see [`probe_drafter`].

    Returns:
        `Drafter`: What `target.generate(..., assistant_model=drafter)` takes.

    Raises:
        OSError: The Hub refused, could not be reached or broke off, or there is nothing.
        ValueError: A damaged file, a kind that is not read, tensors that are missing or unknown, another target than the
            drafter was made for.
    """
    if wiring is not None and wiring != PROBE and not isinstance(wiring, Mapping):
        raise ValueError(
            f"`wiring` ({wiring!r}) must be a mapping of names to values, {PROBE!r} to ask the target, or None to go "
            "by the config."
        )
    return _drafter_of(_open(source, target, revision), target, wiring)


def _drafter_of(found: _Checkpoint, target: Any, wiring: Mapping[str, Any] | str | None = None) -> Any:
    """The drafter that an open checkpoint holds."""
    name, config = found.name, found.config
    if found.kind is None:
        _refuse_wiring(name, wiring)
        return load_saved(name, config, target.dtype, found.revision).to(target.device).eval()
    if found.kind in PUBLISHED:
        load, probe = PUBLISHED[found.kind]
        if isinstance(wiring, str):
            return probe(name, config, found.tensors, target).drafter
        return load(name, config, found.tensors, target, wiring)
    if found.kind == MTP:  # of which texts without pictures, all that "probe" has here, tell nothing more
        return load_mtp(name, config, found.tensors, target, None if isinstance(wiring, str) else wiring)
    _refuse_wiring(name, wiring)
    with tempfile.TemporaryDirectory() as folder:
        convert_checkpoint(name, folder, revision=found.revision)
        drafter: Any = DreamDrafter.from_pretrained(folder, dtype=target.dtype)
    drafter.config.vocab_size = target.config.get_text_config(decoder=True).vocab_size  # it borrows embedding and head
    return drafter.to(target.device).eval()


def probe_drafter(
    source: str | PathLike,
    target: Any,
    inputs: Sequence[Mapping[str, Any]] | None = None,
    *,
    revision: str | None = None,
    num_tokens: int = NUM_TOKENS,
) -> Probe:
    """Ask a target how well a drafter foretells it, and of an EAGLE or DFlash drafter or an MTP head how it is to be wired.

    Of all wirings that the weights allow those are tried that differ from the best one so far in one thing, until none does
    better: which layers' features are read, where the norms are, how positions are turned, what is read of pictures.

    Args:
        source (`str` or `os.PathLike`): As for [`load_drafter`].
        target (`PreTrainedModel`): The model to draft for.
        inputs (`Sequence[Mapping]`, *optional*): Prompts of one row, as for `generate()`. Only pictures can tell what is read
            of them. By default the target writes texts of its own.
        revision (`str`, *optional*): Revision of the drafter on the Hub.
        num_tokens (`int`): How many tokens of the target's decide.

    Returns:
        `Probe`: All wirings with their agreement, the best first (`probe.best.wiring`, `print(probe.table())`), and
        `probe.drafter`, wired that way.

    Raises:
        OSError, ValueError: As [`load_drafter`]; a prompt of several rows, or texts that end at once.
        TypeError: A drafter that does not grow trees level by level, and so has no log-probabilities.
    """
    found = _open(source, target, revision)
    if found.kind in PUBLISHED:
        _, probe = PUBLISHED[found.kind]
        return probe(found.name, found.config, found.tensors, target, inputs, num_tokens)
    drafter = _drafter_of(found, target)
    if isinstance(drafter, MTPDrafter):
        return probe_mtp(found.name, drafter, target, inputs, num_tokens)
    return probe_as_it_is(found.name, drafter, target, inputs, num_tokens)


@dataclass(frozen=True)
class _Checkpoint:
    """A drafter's files: of what was saved here no more than its config, and no `kind`."""

    name: str
    config: Mapping[str, Any]
    revision: str | None
    kind: str | None = None
    tensors: Mapping[str, Any] = field(default_factory=dict)


def _open(source: str | PathLike, target: Any, revision: str | None) -> _Checkpoint:
    if source == MTP:
        source, revision = _own_files(target, revision)
    name = fspath(source_of(source, "drafter"))
    config = read_published_config(name, revision=revision)
    if config.get("model_type") in OUR_MODEL_TYPES:
        return _Checkpoint(name, config, revision)
    tensors = read_tensors(name, partial(wanted_names, name, config), revision=revision)
    return _Checkpoint(name, config, revision, kind_of(name, config, tensors.keys()), tensors)


def load_saved(source: str, config: Mapping[str, Any], dtype: str | torch.dtype, revision: str | None = None) -> Any:
    """A drafter that was saved here, whose config.json has these fields, on the CPU."""
    kinds: tuple[Any, ...] = (EagleDrafter, DFlashDrafter, DreamDrafter)
    model_class = next(kind for kind in kinds if kind.config_class.model_type == config["model_type"])
    return model_class.from_pretrained(source, dtype=dtype, revision=revision)


def _drafter_names(drafter: str | None) -> list[str]:
    """The names of drafters that are joined by `+`; a folder whose own name has one stays whole."""
    if drafter is None:
        return []
    return [drafter] if Path(drafter).exists() else drafter.split("+")


def _make_drafter(name: str, models: Models, revision: str | None) -> Drafter:
    """One drafter by its name on a command line."""
    if name == RETRIEVAL:
        return RetrievalDrafter()
    if name == SKIP:
        return LayerSkipDrafter(models.target)
    if name.startswith(MODEL):
        target = models.target
        source = name.removeprefix(MODEL)
        model, processor = _load_target(source, revision, {"dtype": target.dtype, "device_map": {"": target.device}})
        return ModelDrafter(model.eval(), processor, models.processor)
    return load_drafter(name, models.target, revision=revision)


def _own_files(target: Any, revision: str | None) -> tuple[str, str | None]:
    """Where a target was loaded from, and the revision."""
    config = Target(target).model.config
    name = getattr(config, "_name_or_path", "")
    if not name:
        raise ValueError(
            f"`drafter` ({MTP!r}) is read from the target's own files, and this target was not loaded from any. Name the "
            "folder or Hub id that they are in."
        )
    return name, revision or getattr(config, "_commit_hash", None)


def _refuse_wiring(source: str, wiring: Mapping[str, Any] | str | None) -> None:
    if wiring:
        raise ValueError(
            f"`wiring` ({wiring!r}) is for published EAGLE and DFlash drafters and MTP heads; the config of {source!r} says "
            "all."
        )


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


def _device_map(device: str | None, device_map: str | None) -> Any:
    """Where `from_pretrained` is to put the target."""
    if device_map is None:
        return "auto" if device == "auto" else {"": pick_device(device)}
    if device_map not in DEVICE_MAPS:
        raise ValueError(f"`device_map` ({device_map!r}) is unknown: use {', '.join(map(repr, DEVICE_MAPS))}.")
    if device is not None:
        raise ValueError(
            f"`device_map` ({device_map!r}) spreads the target over devices and `device` ({device!r}) names one: give one of "
            "the two. (Several processes have a device each.)"
        )
    return device_map


def _load_target(
    source: str | Path, revision: str | None, options: Mapping[str, Any], quantization: str | None = None
) -> tuple[Any, Any]:
    """A model and its processor; `options` are `from_pretrained`'s, None for what it decides."""
    adapter = _read_adapter(source, revision)
    base, base_revision = (
        (source, revision) if adapter is None else (adapter.base_model_name_or_path, adapter.revision)
    )
    config = AutoConfig.from_pretrained(base, revision=base_revision)
    takes_images = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    model_class: Any = AutoModelForImageTextToText if takes_images else AutoModelForCausalLM
    processor = _load_processor(AutoProcessor if takes_images else AutoTokenizer, base, base_revision)
    given = {name: value for name, value in options.items() if value is not None}
    if quantization is not None:
        if adapter is not None:
            raise ValueError(
                f"`target` ({str(source)!r}) holds PEFT adapters, which would be merged into rounded weights: merge them, save "
                f"the model, and load that with `quantization` ({quantization!r})."
            )
        dtype = config.get_text_config(decoder=True).dtype if given["dtype"] == "auto" else given["dtype"]
        given["quantization_config"] = quantization_config(quantization, dtype)
    model = model_class.from_pretrained(base, revision=base_revision, **given)
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


def source_of(name: Any, kind: str) -> Any:
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
