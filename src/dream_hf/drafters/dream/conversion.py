"""Turn a checkpoint in the layout that DREAM's authors published into a `DreamDrafter`."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from ...hub.downloads import fetch_file
from ..checkpoint_files import read_object
from ..fit import describe_target
from ..published_files import read_tensors
from .configuration import DreamConfig
from .drafter import DreamDrafter

# Wrappers that prefix every name: torch's DistributedDataParallel and compile.
WRAPPERS = ("module.", "_orig_mod.")
DROPPED = {
    r"head_weight|head_weight\..*": "the target's head",
    r"embed_model|embed_model\..*": "the target's embedding",
    r".*rotary_emb\.inv_freq": "computed from the config",
}
# Published config fields that our config has under the same name, and those without which nothing can be built.
SHARED_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "attention_bias",
    "mlp_bias",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
NEEDED_FIELDS = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class ConversionReport:
    """What became of every key of a published checkpoint.

    Args:
        source: Folder or Hub id.
        destination: Folder the drafter was written to.
        kept: Names that stayed as they were.
        renamed: New name by old name.
        dropped: Reason by name.
        missing: Names the drafter needs and the checkpoint lacks.
        unexpected: Names the converter does not understand. A conversion with any of these two is refused.
    """

    source: str
    destination: str
    kept: tuple[str, ...]
    renamed: Mapping[str, str]
    dropped: Mapping[str, str]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.source} -> {self.destination}: {len(self.kept)} tensors kept under their names"]
        lines += [f"  renamed     {old} -> {new}" for old, new in self.renamed.items()]
        lines += [f"  dropped     {name}: {reason}" for name, reason in self.dropped.items()]
        lines += [f"  missing     {name}" for name in self.missing]
        lines += [f"  unexpected  {name}" for name in self.unexpected]
        return "\n".join(lines)


def convert_checkpoint(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    target: str | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
) -> ConversionReport:
    """Convert a published checkpoint (config.json and pytorch_model.bin or model.safetensors).

    The drafter computes what the published code computes: `legacy=True` (the first token's cross-attention averages all
    features), inputs and features not normalised.

    Args:
        source (`str` or `os.PathLike`): A folder or a Hub id.
        destination (`str` or `os.PathLike`): The folder to write; `DreamDrafter.from_pretrained(destination)` loads it.
        target (`str`, *optional*): Folder or Hub id of the target it was trained for. Its config goes into the drafter's,
            and its vocabulary size replaces the published one (the drafter borrows the target's embedding and head).
        revision (`str`, *optional*): Revision of `source`.
        token (`str` or `bool`, *optional*): As in the Hub library.

    Returns:
        `ConversionReport`

    Raises:
        OSError: The source could not be read.
        ValueError: Something in it is not understood; the message lists every such key.
    """
    source, destination = os.fspath(source), os.fspath(destination)
    if os.path.realpath(source) == os.path.realpath(destination):
        raise ValueError(f"`destination` ({destination!r}) is `source`; name another folder.")
    hub: dict[str, Any] = {"revision": revision, "token": token}
    config = _read_config(source, target, **hub)
    tensors = read_tensors(source, **hub)
    expected = DreamDrafter.expected_shapes(config)
    report, named = _sort_keys(source, destination, tensors, expected)
    _refuse(report, named, expected)

    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in named.values()})
    with torch.device("meta"):
        drafter = DreamDrafter(config)
    # Cloned, because entries of a pickle may share memory, which safetensors does not allow.
    drafter.load_state_dict({name: tensor.to(dtype).clone() for name, tensor in named.items()}, assign=True)
    drafter.save_pretrained(destination)
    return report


def _read_config(source: str, target: str | None, **hub: Any) -> DreamConfig:
    """The published config in our terms; what would change the arithmetic in an unknown way is refused."""
    file = fetch_file(source, "config.json", **hub)
    if file is None:
        raise OSError(
            f"`source` ({source!r}) has no config.json. Name the folder or repo of a published DREAM checkpoint."
        )
    published = read_object(source, file)
    if published.get("model_type") == DreamConfig.model_type:
        raise ValueError(f"`source` ({source!r}) is a drafter already; load it with `DreamDrafter.from_pretrained`.")
    missing = [name for name in NEEDED_FIELDS if not isinstance(published.get(name), int)]
    if missing:
        raise ValueError(
            f"config.json of {source!r} lacks {missing}; is it the config of a published DREAM checkpoint?"
        )
    fields = {name: published[name] for name in SHARED_FIELDS if published.get(name) is not None}
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": _rope_theta(source, published)}
    fields.update(_describe(target, fields, **hub))
    origin = os.path.basename(os.path.normpath(source)) if os.path.isdir(source) else source
    try:
        config = DreamConfig(**fields, legacy=True, normalize_inputs=False, normalize_features=False)
    except (StrictDataclassError, TypeError) as error:
        raise ValueError(f"config.json of {source!r} describes no drafter. {error}") from error
    config.converted_from = origin  # type: ignore[attr-defined]  # for the model card
    return config


def _rope_theta(source: str, published: Mapping[str, Any]) -> float:
    rope = published.get("rope_parameters") or published.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(
            f"config.json of {source!r} scales its rotary embedding ({rope}). The published layout has none that does; the "
            "converter would have to guess."
        )
    return float(rope.get("rope_theta") or published.get("rope_theta") or DreamConfig.default_theta)


def _describe(
    target: str | None, fields: Mapping[str, Any], token: bool | str | None = None, **_: Any
) -> dict[str, Any]:
    """`target` and `vocab_size` of the drafter's config."""
    if target is None:
        return {}
    description = describe_target(AutoConfig.from_pretrained(target, token=token))
    if description["hidden_size"] != fields["hidden_size"]:
        raise ValueError(
            f"`target` ({target!r}) has hidden size {description['hidden_size']} and the checkpoint {fields['hidden_size']}: "
            "it was trained for another target."
        )
    return {"target": {**description, "name": target}, "vocab_size": description["vocab_size"]}


def _sort_keys(
    source: str, destination: str, entries: Mapping[str, Any], expected: Mapping[str, torch.Size]
) -> tuple[ConversionReport, dict[str, torch.Tensor]]:
    """Give every key its place in the report, and return the tensors under our names."""
    ours: dict[str, torch.Tensor] = {}
    renamed, dropped, unexpected = {}, {}, []
    for key, value in entries.items():
        name = _unwrapped(str(key))
        reason = next((why for pattern, why in DROPPED.items() if re.fullmatch(pattern, name)), None)
        if reason is not None:
            dropped[str(key)] = reason
        elif name not in expected or name in ours or not isinstance(value, torch.Tensor):
            unexpected.append(str(key))
        else:
            ours[name] = value
            if name != key:
                renamed[str(key)] = name
    report = ConversionReport(
        source=source,
        destination=destination,
        kept=tuple(name for name in ours if name not in renamed.values()),
        renamed=renamed,
        dropped=dropped,
        missing=tuple(sorted(expected.keys() - ours.keys())),
        unexpected=tuple(unexpected),
    )
    return report, ours


def _unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def _refuse(report: ConversionReport, tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Raise unless every key is understood and every tensor has the shape of the config and finite numbers."""
    problems = [
        f"{kind} {', '.join(names)}"
        for kind, names in (("missing", report.missing), ("unexpected", report.unexpected))
        if names
    ]
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            problems.append(f"{name} is {tuple(tensor.shape)} and {tuple(expected[name])} by config.json")
        elif not tensor.is_floating_point() or not tensor.isfinite().all():
            problems.append(f"{name} ({tensor.dtype}) holds no finite floating point numbers")
    if problems:
        raise ValueError(
            f"`source` ({report.source!r}) is not in the published DREAM layout: {'; '.join(problems)}. Nothing was written."
        )
