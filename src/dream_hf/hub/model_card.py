"""The model card of a drafter. Every figure in it is read from a file; what no file holds is said to be missing."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..version import __version__
from . import card_sections as sections
from .card_content import CardContent, hub_id, parse_recipe, read_content

TEMPLATES = Path(__file__).with_name("templates")
MARKER = "<!-- Written by dream-hf."


def write_card(folder: str | os.PathLike, config: Any, drafter: str | None = None) -> None:
    """Write `folder/README.md` from the files in the folder, unless it was written or edited by hand."""
    path = Path(folder, "README.md")
    if is_generated(path.read_text(encoding="utf-8") if path.is_file() else None):
        path.write_text(render_card(read_content(folder, config, drafter)), encoding="utf-8")


def is_generated(card: str | None) -> bool:
    """Whether a card may be replaced: there is none, or it is ours."""
    return card is None or MARKER in card


def render_card(content: CardContent) -> str:
    """The card as Markdown with its metadata block."""
    snippet = "usage_image_text.txt" if _pipeline_tag(content) == "image-text-to-text" else "usage_text.txt"
    names = {"target": content.target.get("name") or "the-target", "drafter": content.drafter}
    return _template("model_card.md").substitute(
        metadata=card_metadata(content).to_yaml(),
        title=content.drafter.rsplit("/", 1)[-1],
        summary=sections.summary(content),
        usage=_template(snippet).substitute(names).strip(),
        custom_generate=_template("usage_custom_generate.txt").substitute(names).strip(),
        shape=sections.shape(content.config),
        training=sections.training(content),
        measured=sections.measured(content),
        paper=f"\n## The paper's figures\n\n{content.paper}\n" if content.paper else "",
    )


def card_metadata(content: CardContent) -> ModelCardData:
    """The metadata block, with a `model-index` where there are measurements."""
    recipe, target, results = parse_recipe(content.recipe), hub_id(content.target.get("name")), _eval_results(content)
    license_name = recipe.get("license") or "other"
    return ModelCardData(
        base_model=target,
        base_model_relation=None if target is None else "adapter",
        pipeline_tag=_pipeline_tag(content),
        library_name="dream-hf",
        tags=["dream", "drafter", "speculative-decoding", *content.tags],
        license=license_name,
        license_name="same-as-the-target" if license_name == "other" else None,
        datasets=[name for name in recipe.get("datasets") or () if hub_id(name)] or None,
        model_name=None if results is None else content.drafter.rsplit("/", 1)[-1],
        eval_results=results,
    )


def library_versions() -> dict[str, str]:
    """Versions of what a drafter is saved with."""
    return {"dream-hf": __version__} | {name: version(name) for name in ("transformers", "torch", "safetensors")}


def _eval_results(content: CardContent) -> list[EvalResult] | None:
    """The drafter's own rows, one entry per figure."""
    rows = [row for row in (content.results or {}).get("rows", ()) if str(row["method"]).startswith("dream")]
    return [
        EvalResult(
            task_type=_pipeline_tag(content),
            dataset_type=str(row["task"]),
            dataset_name=str(row["task"]),
            metric_type=metric,
            metric_value=row[metric],
            metric_name=f"{sections.COLUMNS[metric]} ({row['method']}, temperature {row['temperature']:g})",
        )
        for row in rows
        for metric in ("tau", "speedup", "match_rate")
        if row.get(metric) is not None
    ] or None


def _pipeline_tag(content: CardContent) -> str:
    # Imported here: importing this module of transformers imports the drafter, which imports this file.
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    model_type = content.target.get("model_type")
    takes_images = model_type is None or model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return "image-text-to-text" if takes_images else "text-generation"


def _template(name: str) -> Template:
    return Template((TEMPLATES / name).read_text(encoding="utf-8"))
