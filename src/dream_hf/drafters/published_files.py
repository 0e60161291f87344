"""Reading checkpoints that others have published: a config.json and named tensors, whatever they are called."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Collection, Mapping, Set
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..hub.downloads import fetch_file
from .checkpoint_files import (
    INDEX,
    DamagedFileError,
    check_digest,
    fetch_shard,
    read_object,
    refuse_adapter,
    weight_map,
)

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def read_tensors(source: str, choose: Callable[[Set[str]], Set[str]] | None = None, **hub: Any) -> dict[str, Any]:
    """The checkpoint's entries, in memory; a pickle is read with `weights_only=True`, so that it can't run code.

    Args:
        source (`str`): A folder or a Hub id.
        choose (`Callable`, *optional*): Is shown the names of all entries and returns those that are wanted. Of safetensors no
            others are read, and of shards none is fetched that holds no wanted one.
        **hub: Any of `HUB_ARGUMENTS`.

    Raises:
        OSError: There are none, or they could not be fetched.
        ValueError: A file is damaged or holds something else.
    """
    for name in WEIGHTS:
        file = fetch_file(source, name, is_optional=True, **hub)
        if file is not None:
            return _read_single(source, file, choose)
    index = fetch_file(source, INDEX, is_optional=True, **hub)
    if index is None:
        fetch_file(source, INDEX, **hub)  # raises where the Hub could not be asked
        raise OSError(f"`source` ({source!r}) has none of {', '.join(WEIGHTS)}.")
    shard_of = weight_map(source, index)
    wanted = shard_of.keys() if choose is None else choose(shard_of.keys())
    entries: dict[str, Any] = {}
    for shard in sorted({shard_of[name] for name in wanted}):
        file = fetch_shard(source, shard, **hub)
        check_digest(source, file)
        entries |= _opened(source, file, partial(_load, names=[name for name in wanted if shard_of[name] == shard]))
    return entries


def _read_single(source: str, file: Path, choose: Callable[[Set[str]], Set[str]] | None) -> dict[str, Any]:
    check_digest(source, file)
    is_lazy = file.suffix == ".safetensors"
    found = _opened(source, file, _names_in if is_lazy else _unpickle)
    wanted = found.keys() if choose is None else choose(found.keys())
    if is_lazy:
        return _opened(source, file, partial(_load, names=wanted))
    return {name: found[name] for name in wanted}


def _opened(source: str, file: Path, read: Callable[[Path], Any]) -> dict[str, Any]:
    """What `read` makes of a file, with every refusal one line that names it."""
    try:
        entries = read(file)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise DamagedFileError(
            f"{file.name} of {source!r} can't be read as plain tensors: {error}. If it is a download, fetch it again; a pickle "
            "that holds anything but tensors is not loaded."
        ) from error
    if not isinstance(entries, Mapping):
        raise ValueError(f"{file.name} of {source!r} holds a {type(entries).__name__} instead of named tensors.")
    return dict(entries)


def _names_in(file: Path) -> dict[str, None]:
    with safe_open(file, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys())


def _load(file: Path, names: Collection[str]) -> dict[str, torch.Tensor]:
    with safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in names}


def _unpickle(file: Path) -> Any:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > 2 * file.stat().st_size:
            raise zipfile.BadZipFile(f"it unpacks to {size:,} bytes, although torch does not compress")
    return torch.load(file, map_location="cpu", weights_only=True)


def read_published_config(source: str, **hub: Any) -> dict[str, Any]:
    """The fields of its config.json.

    Raises:
        OSError: There is none, or it could not be fetched.
        ValueError: It is damaged, or there is an adapter instead.
    """
    file = fetch_file(source, "config.json", **hub)
    refuse_adapter(source, fetch_file(source, "adapter_config.json", is_optional=True, **hub))
    if file is None:
        raise OSError(f"{source!r} has no config.json: this is no saved drafter. Check the path.")
    return read_object(source, file)
