"""Reading checkpoints that others have published: a config.json and named tensors, whatever they are called."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..hub.downloads import fetch_file
from .checkpoint_files import INDEX, DamagedFileError, check_digest, fetch_shard, read_object, shard_names

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def read_tensors(source: str, **hub: Any) -> dict[str, Any]:
    """The checkpoint's entries, in memory; a pickle is read with `weights_only=True`, so that it can't run code.

    Raises:
        OSError: There are none, or they could not be fetched.
        ValueError: A file is damaged or holds something else.
    """
    entries: dict[str, Any] = {}
    for file in _find_files(source, **hub):
        check_digest(source, file)
        entries.update(_read(source, file))
    return entries


def _find_files(source: str, **hub: Any) -> list[Path]:
    for name in WEIGHTS:
        file = fetch_file(source, name, **hub)
        if file is not None:
            return [file]
    index = fetch_file(source, INDEX, **hub)
    if index is None:
        raise OSError(f"`source` ({source!r}) has none of {', '.join(WEIGHTS)}.")
    return [fetch_shard(source, name, **hub) for name in shard_names(source, index)]


def _read(source: str, file: Path) -> dict[str, Any]:
    try:
        entries = load_file(file) if file.name.endswith(".safetensors") else _unpickle(file)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise DamagedFileError(
            f"{file.name} of {source!r} can't be read as plain tensors: {error}. If it is a download, fetch it again; a pickle "
            "that holds anything but tensors is not loaded."
        ) from error
    if not isinstance(entries, Mapping):
        raise ValueError(f"{file.name} of {source!r} holds a {type(entries).__name__} instead of named tensors.")
    return dict(entries)


def _unpickle(file: Path) -> Any:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > 2 * file.stat().st_size:
            raise zipfile.BadZipFile(f"it unpacks to {size:,} bytes, although torch does not compress")
    return torch.load(file, map_location="cpu", weights_only=True)


def read_published_config(source: str | os.PathLike, **hub: Any) -> dict[str, Any]:
    """The fields of its config.json."""
    file = fetch_file(source, "config.json", **hub)
    if file is None:
        raise OSError(f"{os.fspath(source)!r} has no config.json: this is no saved drafter. Check the path.")
    return read_object(source, file)
