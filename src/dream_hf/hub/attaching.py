"""A target's folder with a drafter in it: whoever loads it with `trust_remote_code=True` decodes with the drafter."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ..decoding.settings import DraftSettings
from .downloads import HUB_ERRORS, explain_failure
from .publishing import add_custom_generate

BESIDE = "drafter"  # the folder that custom_generate/generate.py looks into
SETTINGS = "draft_settings.json"  # a file in it
# Of a target, which has safetensors.
NOT_NEEDED = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "original/*", "*.gguf"]


def attach(
    target: str | os.PathLike,
    drafter: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    revision: str | None = None,
    drafter_revision: str | None = None,
    copies: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write a folder that holds a target, a drafter, and the code by which the first decodes with the second.

    `transformers serve FOLDER --trust-remote-code` serves it, `AutoModelForImageTextToText.from_pretrained(FOLDER,
    trust_remote_code=True)` loads it, and so does any program that loads targets so.

    Args:
        target (`str` or `os.PathLike`): Folder or Hub id.
        drafter (`str` or `os.PathLike`): Folder or Hub id of a drafter of any kind that [`load_drafter`] reads; the target's
            again for the MTP head in its own files.
        folder (`str` or `os.PathLike`): What to write; it must not exist, or be empty.
        revision (`str`, *optional*): Revision of the target on the Hub.
        drafter_revision (`str`, *optional*): Revision of the drafter on the Hub.
        copies (`bool`): Copy the files; by default they are linked to where they are.
        settings (`Mapping`, *optional*): Fields of [`DraftSettings`] to draft by instead of the drafter's own, for example
            `{"compile": True}`.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: The folder holds something already, one of the others holds no model, or a setting has no meaning.
        OSError: The Hub refused or could not be reached.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`folder` ({str(folder)!r}) holds something already; name one that is new or empty.")
    own = _files_of(target, "target", revision)
    DraftSettings().changed(**settings or {})  # before anything is downloaded or written
    is_own = (drafter, drafter_revision) == (target, revision)  # a target that brings a drafter of its own
    theirs = own if is_own else _files_of(drafter, "drafter", drafter_revision)
    for destination, source in ((folder, own), (folder / BESIDE, theirs)):
        _put(source, destination, copies)
    shutil.rmtree(folder / "custom_generate", ignore_errors=True)  # a link to the target's own, if it has one
    add_custom_generate(folder)
    if settings:
        file = folder / BESIDE / SETTINGS
        file.unlink(missing_ok=True)  # a link to the drafter's own, if it has one
        file.write_text(json.dumps(dict(settings), indent=2) + "\n", encoding="utf-8")
    return folder


def _files_of(source: str | os.PathLike, argument: str, revision: str | None) -> Path:
    """The folder of a model, downloaded if it is on the Hub."""
    path = Path(source)
    if not path.is_dir():
        unwanted = NOT_NEEDED if argument == "target" else None
        try:
            path = Path(snapshot_download(os.fspath(source), revision=revision, ignore_patterns=unwanted))
        except HUB_ERRORS as error:
            raise OSError(explain_failure(os.fspath(source), "the files", error, revision)) from error
    if not (path / "config.json").is_file():
        raise ValueError(f"`{argument}` ({os.fspath(source)!r}) holds no config.json, and so no model.")
    return path


def _put(source: Path, destination: Path, copies: bool) -> None:
    """Copy a folder's files, or link to them; folders inside it come along."""
    for path in sorted(source.rglob("*")):
        if not path.is_file() or any(part.startswith(".") for part in path.relative_to(source).parts):
            continue
        place = destination / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if copies:
            shutil.copyfile(path, place)
        else:
            place.symlink_to(path.resolve())
