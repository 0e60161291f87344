"""The bundled pictures, one for each task, with the request that comes with each.

They are the first held-out pictures of the demo world, drawn once by `python -m dream_hf.demo.pictures`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from .rows import TASKS, TRAIN_SEED_LIMIT, make_rows

FOLDER = Path(__file__).with_name("pictures")
REQUESTS = "requests.json"
SEED = TRAIN_SEED_LIMIT  # the first that no training picture comes from


def bundled_picture(task: str) -> tuple[Path, str]:
    """The file of a task's picture, and the request that comes with it.

    Args:
        task (`str`): "scene", "chart" or "text".

    Raises:
        ValueError: A task that does not exist.
        OSError: This copy of the package has no such picture.
    """
    if task not in TASKS:
        raise ValueError(f"`task` ({task!r}) is unknown: use {', '.join(map(repr, TASKS))}.")
    picture, requests = FOLDER / f"{task}.png", FOLDER / REQUESTS
    for file in (picture, requests):
        if not file.is_file():
            raise FileNotFoundError(
                f"The bundled picture of `task` ({task!r}) is incomplete: this copy of the package came without "
                f"pictures/{file.name}. Draw it with `python -m dream_hf.demo.pictures`, or name a picture of your own "
                "with --image and --prompt."
            )
    return picture, json.loads(requests.read_text(encoding="utf-8"))[task]


def draw_picture(task: str, seed: int = SEED) -> tuple[Image.Image, str]:
    """What the world draws for a seed: a picture and its request."""
    row = make_rows(task, 1, seed)[0]
    return row["images"][0], row["messages"][0]["content"][1]["text"]


def write_pictures(folder: Path = FOLDER) -> Iterator[Path]:
    """Draw the pictures into a folder, with `requests.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    requests = {}
    for task in TASKS:
        image, requests[task] = draw_picture(task)
        image.save(folder / f"{task}.png", optimize=True)
        yield folder / f"{task}.png"
    (folder / REQUESTS).write_text(json.dumps(requests, indent=2) + "\n", encoding="utf-8")
    yield folder / REQUESTS


if __name__ == "__main__":
    for written in write_pictures():
        print(f"{written.name}: {written.stat().st_size} bytes")
