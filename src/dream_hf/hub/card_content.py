"""What a model card is written from, the files in a drafter's folder, and the metadata block that follows from them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

RESULTS, RECIPE, PROGRESS = "results.json", "recipe.yaml", "trainer_state.json"

# A benchmark's figures and what a card calls them.
COLUMNS = {
    "task": "task",
    "method": "method",
    "temperature": "temperature",
    "speedup": "speedup",
    "speedup_median": "speedup, median",
    "speedup_decode": "speedup, decoding only",
    "tau": "tau, bonus included",
    "match_rate": "same tokens as plain",
    "num_prompts": "prompts",
}


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

    @property
    def title(self) -> str:
        """The drafter's name without its owner."""
        return self.drafter.rsplit("/", 1)[-1]

    @property
    def pipeline_tag(self) -> str:
        """What the Hub calls what the target does."""
        # Imported here: importing this module of transformers imports the drafter, which imports this file.
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

        model_type = self.target.get("model_type")
        takes_images = model_type is None or model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        return "image-text-to-text" if takes_images else "text-generation"


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


def card_metadata(content: CardContent) -> ModelCardData:
    """The metadata block, with a `model-index` where there are measurements."""
    recipe, target, results = parse_recipe(content.recipe), hub_id(content.target.get("name")), _eval_results(content)
    license_name = recipe.get("license") or "other"
    return ModelCardData(
        base_model=target,
        base_model_relation=None if target is None else "adapter",
        pipeline_tag=content.pipeline_tag,
        library_name="dream-hf",
        tags=["dream", "drafter", "speculative-decoding", *content.tags],
        license=license_name,
        license_name="same-as-the-target" if license_name == "other" else None,
        datasets=[name for name in recipe.get("datasets") or () if hub_id(name)] or None,
        model_name=None if results is None else content.title,
        eval_results=results,
    )


def _eval_results(content: CardContent) -> list[EvalResult] | None:
    """The drafter's own rows, one entry per figure."""
    rows = [row for row in (content.results or {}).get("rows", ()) if str(row["method"]).startswith("dream")]
    return [
        EvalResult(
            task_type=content.pipeline_tag,
            dataset_type=str(row["task"]),
            dataset_name=str(row["task"]),
            metric_type=metric,
            metric_value=row[metric],
            metric_name=f"{COLUMNS[metric]} ({row['method']}, temperature {row['temperature']:g})",
        )
        for row in rows
        for metric in ("tau", "speedup", "match_rate")
        if row.get(metric) is not None
    ] or None


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
