"""What a model card is written from: the files in a drafter's folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

RESULTS, RECIPE, PROGRESS = "results.json", "recipe.yaml", "trainer_state.json"


@dataclass(frozen=True)
class CardContent:
    """What a card is written from.

    Args:
        target: Description of the target as in `DreamConfig.target`.
        drafter: The Hub id, or the folder's name for a card that is not to be published.
        config: The drafter's config; None for a drafter that does not exist yet.
        recipe: Text of `recipe.yaml`.
        progress: Content of `trainer_state.json`.
        results: Content of `results.json`, as `dream-hf bench --output` writes it.
        paper: Markdown with published figures, marked as such.
        tags: Further tags.
    """

    target: Mapping[str, Any]
    drafter: str
    config: Any = None
    recipe: str | None = None
    progress: Mapping[str, Any] | None = None
    results: Mapping[str, Any] | None = None
    paper: str = ""
    tags: Iterable[str] = ()


def read_content(
    folder: str | os.PathLike, config: Any, drafter: str | None = None, tags: Iterable[str] = ()
) -> CardContent:
    """Collect what a folder says about its drafter; `drafter` is its Hub id, and the folder's name without one."""
    recipe = Path(folder, RECIPE)
    return CardContent(
        target=config.target or {},
        drafter=drafter or Path(folder).resolve().name,
        config=config,
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
        progress=_read_json(Path(folder, PROGRESS)),
        results=_check_results(_read_json(Path(folder, RESULTS)), folder),
        tags=tags,
    )


def parse_recipe(recipe: str | None) -> Mapping[str, Any]:
    """The recipe's keys; only `license` and `datasets` mean something to a card."""
    parsed = yaml.safe_load(recipe) if recipe else {}
    if not isinstance(parsed, Mapping):
        raise ValueError(f"`{RECIPE}` must be a mapping, not {type(parsed).__name__}; see model_cards/ for examples.")
    return parsed


def hub_id(name: Any) -> str | None:
    """The name where it has the form of a Hub id and is no folder here."""
    is_id = isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not os.path.exists(name)
    return name if is_id else None


def _check_results(results: Any, folder: str | os.PathLike) -> Mapping[str, Any] | None:
    needed = {"method", "temperature", "task"}
    if results is not None and not (
        isinstance(results, Mapping)
        and isinstance(results.get("rows"), list)
        and all(isinstance(row, Mapping) and needed <= row.keys() for row in results["rows"])
    ):
        raise ValueError(
            f"{Path(folder, RESULTS)} is not what `dream-hf bench --output` writes: it needs `rows`, each with "
            f"{sorted(needed)}. Remove it or write it anew."
        )
    return results


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
