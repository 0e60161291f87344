"""Look a saved drafter over before any weight is loaded: safetensors only, whole files, exactly the expected tensors."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import extract_commit_hash

from ..hub.downloads import fetch_file

Shapes = dict[str, tuple[int, ...]]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
VERIFIED = ".dream_hf_verified"  # folder of notes on blobs, beside them in the Hub library's cache
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Tensors that are no floating point numbers, and what they are.
INTEGERS = {"draft_token_ids": "I64"}
# What transformers would follow to other files, other code or another architecture; `save_pretrained` writes none of it.
FOREIGN_FIELDS = {
    "attn_implementation",
    "auto_map",
    "distributed_config",
    "experts_implementation",
    "fusion_config",
    "per_layer_config",
    "quantization_config",
    "transformers_weights",
}


class DamagedFileError(OSError, ValueError):
    """A file of a checkpoint is not what it should be."""


@dataclass(frozen=True)
class Checkpoint:
    """A drafter as found on disk.

    Args:
        files: The safetensors files, whole and untampered.
        revision: The commit they belong to; what was asked for where the source is a folder.
        shapes: The shape of every tensor in them.
    """

    files: tuple[Path, ...]
    revision: str | None
    shapes: Shapes


def open_checkpoint(source: str | os.PathLike, model_type: str, variant: str | None = None, **hub: Any) -> Checkpoint:
    """Find a drafter's files and read their headers; no weight is read.

    Args:
        source (`str` or `os.PathLike`): A folder or a Hub id.
        model_type (`str`): What its config.json has to say.
        variant (`str`, *optional*): As in `from_pretrained`: `model.<variant>.safetensors`.
        **hub: Any of `HUB_ARGUMENTS`.

    Raises:
        OSError: The Hub refused or the download failed.
        ValueError: The folder or repo holds something else than a drafter in safetensors, or a damaged file.
    """
    source = os.fspath(source)
    config_file = fetch_file(source, "config.json", **hub)
    adapter_file = fetch_file(source, "adapter_config.json", is_optional=True, **hub)
    _check_kind(source, model_type, config_file, adapter_file)
    revision = extract_commit_hash(None if config_file is None else config_file.as_posix(), None)
    hub = {**hub, "revision": revision or hub.get("revision")}
    files = _find_weights(source, variant, **hub)
    shapes: Shapes = {}
    for file in files:
        check_digest(source, file)
        header = _read_header(source, file)
        if twice := sorted(header.keys() & shapes.keys()):
            raise ValueError(f"{source}: more than one shard holds {_listed(twice)}. Save the drafter again.")
        shapes.update(header)
    return Checkpoint(tuple(files), hub["revision"], shapes)


def read_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """One tensor of a checkpoint that has it."""
    for file in checkpoint.files:
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 - no dict
                return tensors.get_tensor(name)
    raise KeyError(name)


def read_object(source: str | os.PathLike, file: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFileError(f"{file.name} of {os.fspath(source)!r} is no JSON: {error}. Get it again.") from error
    if not isinstance(fields, dict):
        raise DamagedFileError(f"{file.name} of {os.fspath(source)!r} is no JSON object. Get it again.")
    return fields


def load_config(config_class: Any, source: str | os.PathLike, **arguments: Any) -> Any:
    """`config_class.from_pretrained` with every refusal a `ValueError` that names the source."""
    try:
        return config_class.from_pretrained(source, **arguments)
    except (StrictDataclassError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"config.json of {os.fspath(source)!r} does not describe a drafter. {error}") from error


def check_shapes(
    source: str | os.PathLike,
    found: Mapping[str, Iterable[int]],
    expected: Mapping[str, Any],
    remedy: str | None = None,
) -> None:
    """Raise a `ValueError` naming every tensor that is missing, unexpected or of another shape than `expected`."""
    wrong = [
        f"{name} is {tuple(found[name])} in the file and {tuple(expected[name])} by the config"
        for name in sorted(found.keys() & expected.keys())
        if tuple(found[name]) != tuple(expected[name])
    ]
    refuse_keys(source, expected.keys() - found.keys(), found.keys() - expected.keys(), wrong, remedy)


def refuse_keys(
    source: str | os.PathLike,
    missing: Iterable[str],
    unexpected: Iterable[str],
    mismatched: Iterable[str],
    remedy: str | None = None,
) -> None:
    """Raise a `ValueError` naming the keys and what to do, by default for a saved drafter, unless there are none."""
    kinds = {"missing": missing, "unexpected": unexpected, "mismatched": mismatched}
    problems = [f"{kind}: {_listed(sorted(names))}" for kind, names in kinds.items() if names]
    remedy = remedy or (
        "Save the drafter again with `save_pretrained`; a checkpoint in the published DREAM layout has to go "
        f"through `dream-hf convert {os.fspath(source)} DESTINATION`."
    )
    if problems:
        raise ValueError(
            f"The weights of {os.fspath(source)!r} are not those its config.json describes ({'; '.join(problems)}). "
            + remedy
        )


def _check_kind(source: str, model_type: str, config_file: Path | None, adapter_file: Path | None) -> None:
    """Refuse what is no drafter, with the way to use it where there is one."""
    refuse_adapter(source, adapter_file)
    if config_file is None:
        raise OSError(f"{source!r} has no config.json: this is no saved drafter. Check the path.")
    fields = read_object(source, config_file)
    if fields.get("model_type") != model_type:
        raise ValueError(
            f"config.json of {source!r} describes a {fields.get('model_type')!r} model, not a "
            f"{model_type!r}. A checkpoint in the published DREAM layout has to go through "
            f"`dream-hf convert {source} DESTINATION`."
        )
    if foreign := sorted(FOREIGN_FIELDS & {name for name, value in fields.items() if value is not None}):
        raise ValueError(
            f"config.json of {source!r} sets {', '.join(foreign)}, which no saved drafter has. Do not use this "
            "checkpoint unless you know why; remove them from the file, or pass them to `from_pretrained`."
        )


def refuse_adapter(source: str, adapter_file: Path | None) -> None:
    """Raise a `ValueError` where there is an adapter of PEFT."""
    if adapter_file is not None:
        raise ValueError(
            f"{source!r} holds an adapter. Merge it into the drafter it was trained on with `dream-hf merge`, or load that one "
            f"and then `peft.PeftModel.from_pretrained(drafter, {source!r})`."
        )


def _find_weights(source: str, variant: str | None, **hub: Any) -> list[Path]:
    """The one weights file, or the shards that the index names."""
    weights, index = with_variant(WEIGHTS, variant), with_variant(INDEX, variant)
    single = fetch_file(source, weights, is_optional=True, **hub)
    if single is not None:
        return [single]
    index_file = fetch_file(source, index, is_optional=True, **hub)
    if index_file is None:
        raise _no_weights(source, weights, **hub)
    return [fetch_shard(source, name, **hub) for name in sorted(set(weight_map(source, index_file).values()))]


def weight_map(source: str, index_file: Path) -> dict[str, str]:
    """Which file holds each tensor by an index, refused where it could lead out of the checkpoint's own folder."""
    try:
        shard_of = dict(read_object(source, index_file)["weight_map"].items())
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"{index_file.name} of {source!r} is no index of shards: {error}.") from error
    for name in shard_of.values():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors", name):
            raise ValueError(
                f"{index_file.name} of {source!r} names the shard {name!r}; a shard is a *.safetensors file "
                "next to the index. Do not use this checkpoint."
            )
    return shard_of


def fetch_shard(source: str, name: str, **hub: Any) -> Path:
    """One shard that an index names."""
    shard = fetch_file(source, name, **hub)
    if shard is None:
        raise OSError(f"{source!r} lacks the shard {name!r} that its index names. Upload or copy it again.")
    return shard


def _no_weights(source: str, name: str, **hub: Any) -> Exception:
    """Why there are no weights: not cached, pickled, or not there at all."""
    fetch_file(source, name, **hub)  # raises where the Hub could not be asked
    pickled = os.path.isdir(source) and [pickle for pickle in PICKLES if Path(source, pickle).is_file()]
    if pickled or not os.path.isdir(source):
        return ValueError(
            f"{source!r} has no {name}; drafters are loaded from safetensors only. A published pickle "
            f"({PICKLES[0]}) has to go through `dream-hf convert {source} DESTINATION`."
        )
    return OSError(f"The folder {source!r} has no {name}. Save the drafter with `save_pretrained`.")


def check_digest(source: str | os.PathLike, file: Path) -> None:
    """Compare a cached file with the SHA-256 the Hub announced for it, which is the name of its blob in the cache.

    That reads all of it, so a note in the cache's folder of the repo says which file, as it is, has been found right.
    """
    digest = Path(os.readlink(file)).name if file.is_symlink() else ""
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        return
    blob = file.resolve()
    note, state = blob.parents[1] / VERIFIED / digest, f"{blob.stat().st_size} bytes at {blob.stat().st_mtime_ns}"
    if note.is_file() and note.read_text(encoding="utf-8") == state:
        return
    if _sha256(blob) != digest:
        raise _discard(os.fspath(source), file, "its content does not have the SHA-256 that the Hub announced")
    with suppress(OSError):  # a cache that may not be written to is checked each time
        note.parent.mkdir(exist_ok=True)
        note.write_text(state, encoding="utf-8")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_header(source: str, file: Path) -> Shapes:
    """Shapes by name. safetensors itself checks the header against the size of the file."""
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - no dict
            kinds = {name: entry.get_dtype() for name, entry in slices.items()}
            shapes = {name: tuple(entry.get_shape()) for name, entry in slices.items()}
    except SafetensorError as error:
        raise _discard(source, file, f"it is no whole safetensors file ({error})") from error
    wrong = [name for name in kinds.keys() & INTEGERS.keys() if kinds[name] != INTEGERS[name]]
    if wrong:
        raise ValueError(f"{wrong[0]} in {file.name} of {source!r} is {kinds[wrong[0]]}; it must be int64.")
    if integers := [
        f"{name} ({kind})" for name, kind in kinds.items() if not kind.startswith(("F", "BF")) and name not in INTEGERS
    ]:
        raise ValueError(f"{file.name} of {source!r} holds no floating point numbers in {_listed(integers)}.")
    return shapes


def _discard(source: str, file: Path, reason: str) -> DamagedFileError:
    """The error for a damaged file; a copy in the cache is removed, so that the next load fetches it anew."""
    message = f"{file.name} of {source!r} is damaged: {reason}."
    if os.path.isdir(source):
        return DamagedFileError(f"{message} Copy or save it again.")
    try:
        file.resolve().unlink(missing_ok=True)
        file.unlink(missing_ok=True)
    except OSError:
        return DamagedFileError(f"{message} Load again with `force_download=True`.")
    return DamagedFileError(
        f"{message} The copy in the cache was removed: load again to download it anew. If that fails too, the repo "
        "itself is damaged; tell its owner."
    )


def with_variant(name: str, variant: str | None) -> str:
    """`model.safetensors` -> `model.<variant>.safetensors`, as transformers names them."""
    stem, extension = name.rsplit(".", 1)
    return f"{stem}.{variant}.{extension}" if variant else name


def _listed(names: Iterable[str], limit: int = 12) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
