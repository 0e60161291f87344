"""Append-only JSON Lines that survive a kill: a line is written at once, so only the last one can be unfinished."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SETTINGS = "settings.json"  # in a folder: what it was begun with


def append(file: Path, entry: Mapping[str, Any]) -> None:
    """Write one entry behind the others."""
    with file.open("ab") as stream:
        stream.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")


def entries(file: Path) -> Iterator[tuple[int, Any]]:
    """Offset and content of every whole line; none where there is no file."""
    if not file.is_file():
        return
    offset = 0
    with file.open("rb") as stream:
        for line in stream:
            if line.endswith(b"\n"):
                yield offset, json.loads(line)
            offset += len(line)


def line_at(file: Path, offset: int) -> bytes:
    """The line that starts at an offset."""
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.readline()


def cut_unfinished_line(file: Path) -> None:
    """Cut off what a killed process left of a line, if there is such a file."""
    if not file.is_file():
        return
    with file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        end = size
        while end:
            start = max(end - 65536, 0)
            stream.seek(start)
            found = stream.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
    if end < size:
        os.truncate(file, end)


def difference(begun: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first setting, by name, that is not what a file was begun with, in words; None where all are the same."""
    now = json.loads(json.dumps(now))  # as the file has them
    for name in sorted(begun.keys() | now.keys()):
        if begun.get(name) != now.get(name):
            return f"`{name}` {begun.get(name)!r} and now it is {now.get(name)!r}"
    return None


def begin_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make a folder that says which settings it was begun with.

    Raises:
        ValueError: It was begun with others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / SETTINGS
    if not file.is_file():
        write_whole(file, json.dumps(settings, indent=2).encode())
        return
    changed = difference(json.loads(file.read_text(encoding="utf-8")), settings)
    if changed is not None:
        raise ValueError(
            f"`output` ({folder.name!r}) was begun with {changed}. Name another folder, or empty this one."
        )


def write_whole(file: Path, content: bytes) -> None:
    """Write a file in one go: it is there with all of `content` or not at all."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, file)
