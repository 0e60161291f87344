"""The model card of a drafter as Markdown. Every figure in it is read from a file; what no file holds is said to be missing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

from ..version import __version__
from .card_content import COLUMNS, PROGRESS, RECIPE, RESULTS, CardContent, card_metadata, hub_id, read_content

TEMPLATES = Path(__file__).with_name("templates")
MARKER = "<!-- Written by dream-hf."
FORM = "[More Information Needed]"  # in cards that peft writes
CONVENTIONS = (
    "tau is the mean number of tokens gained by a verification forward, the target's own bonus token included; the prefill is "
    "no such forward. speedup is the total time of plain `generate()` over the total time of the method on the same prompts, "
    "prefill included; its median is over prompts, by time per token. Square brackets: 95% bootstrap interval over prompts."
)


def write_card(folder: str | os.PathLike, config: Any, drafter: str | None = None) -> None:
    """Write `folder/README.md` from the files in the folder, unless it was written or edited by hand."""
    path = Path(folder, "README.md")
    if is_generated(path.read_text(encoding="utf-8") if path.is_file() else None):
        path.write_text(render_card(read_content(folder, config, drafter)), encoding="utf-8")


def write_adapter_card(folder: str | os.PathLike, config: Any, base: str) -> None:
    """Write `folder/README.md` for adapters of the drafter `base`, in place of peft's form; what was written by hand stays."""
    path = Path(folder, "README.md")
    card = path.read_text(encoding="utf-8") if path.is_file() else None
    if not is_generated(card) and FORM not in str(card):
        return
    content = read_content(folder, config, tags=("lora",))
    metadata = card_metadata(replace(content, target={**content.target, "name": base}))
    metadata.library_name = "peft"
    text = _template("adapter_card.md").substitute(
        metadata=metadata.to_yaml(),
        base=base or "the-drafter",
        summary=_summary(content),
        training=_training(content),
    )
    path.write_text(text, encoding="utf-8")


def is_generated(card: str | None) -> bool:
    """Whether a card may be replaced: there is none, or it is ours."""
    return card is None or MARKER in card


def render_card(content: CardContent) -> str:
    """The card as Markdown with its metadata block."""
    snippet = "usage_image_text.txt" if content.pipeline_tag == "image-text-to-text" else "usage_text.txt"
    names = {"target": content.target.get("name") or "the-target", "drafter": content.drafter}
    return _template("model_card.md").substitute(
        metadata=card_metadata(content).to_yaml(),
        title=content.title,
        summary=_summary(content),
        usage=_template(snippet).substitute(names).strip(),
        custom_generate=_template("usage_custom_generate.txt").substitute(names).strip(),
        shape=_shape(content.config),
        training=_training(content),
        measured=_measured(content),
        paper=f"\n## The paper's figures\n\n{content.paper}\n" if content.paper else "",
    )


def library_versions() -> dict[str, str]:
    """Versions of what a drafter is saved with."""
    return {"dream-hf": __version__} | {name: version(name) for name in ("transformers", "torch", "safetensors")}


def _template(name: str) -> Template:
    return Template((TEMPLATES / name).read_text(encoding="utf-8"))


def _summary(content: CardContent) -> str:
    """What this is and for which target."""
    name, revision = content.target.get("name"), content.target.get("revision")
    target = f"[{name}](https://huggingface.co/{name})" if hub_id(name) else f"`{name}`" if name else "one target"
    at = f" (revision `{revision}`)" if revision else ""
    plan = "**A plan: this drafter has not been trained.** " if content.config is None else ""
    return (
        f"{plan}A [DREAM](https://arxiv.org/abs/2505.19201) drafter for {target}{at}: a small model that drafts several tokens "
        "at a time, which the target then verifies in one forward."
    )


def _shape(config: Any) -> str:
    """Shape, drafting defaults and versions."""
    if config is None:
        return "Not trained yet. Its shape will follow the target's text decoder (`DreamConfig.from_target`)."
    heads = f"{config.num_attention_heads} query and {config.num_key_value_heads} key/value heads of {config.head_dim}"
    library_versions = getattr(config, "library_versions", None) or {}
    num_drafted = config.draft_vocab_size
    drafted = "" if num_drafted is None else f", {num_drafted:,} of the {config.vocab_size:,} tokens may be drafted"
    versions = ", ".join(f"{name} {number}" for name, number in library_versions.items())
    return (
        f"Blocks {', '.join(config.block_types)}; hidden size {config.hidden_size}, MLP {config.intermediate_size}, {heads}; "
        f"{config.num_parameters:,} weights beside the norms. It has neither embeddings nor a head: it uses the "
        f"target's.\n\nDrafting defaults: depth {config.tree_depth}, top-k {config.tree_top_k}, {config.tree_size} drafted "
        f"tokens per step, {config.visual_keep_ratio:.0%} of the visual tokens kept in the drafter's prompt{drafted}. They can "
        f"be changed: `drafter.config.tree_depth = 8`.\n\nSaved with {versions or 'unrecorded versions'}."
    )


def _training(content: CardContent) -> str:
    """Where the weights come from, as far as it was recorded."""
    parts = []
    origin = getattr(content.config, "converted_from", None)
    if origin:
        parts.append(
            f"Not trained with dream-hf: converted with `dream-hf convert` from `{origin}`, a checkpoint in the layout that "
            "DREAM's authors published, with their arithmetic (`legacy`)."
        )
    if content.progress:
        steps, epochs = content.progress.get("global_step"), content.progress.get("epoch")
        parts.append(f"Trained for {steps} steps, {_cell(epochs)} epochs (`{PROGRESS}`).")
    if content.recipe:
        parts.append(f"Recipe (`{RECIPE}`):\n\n```yaml\n{content.recipe.strip()}\n```")
    return "\n\n".join(parts) or "Neither recipe nor data were recorded with this drafter."


def _measured(content: CardContent) -> str:
    """The benchmark's rows with conventions and hardware."""
    if content.config is None:
        return "Not measured yet: dream-hf has trained no drafter for this target."
    if content.results is None:
        return f"Not measured yet: there was no `{RESULTS}` of `dream-hf bench` beside the weights."
    rows = content.results["rows"]
    columns = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    lines = [[COLUMNS[name] for name in columns], ["---"] * len(columns)]
    lines += [[_cell(row.get(name), row.get(f"{name}_interval")) for name in columns] for row in rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    made_on = "\n".join(f"- {name}: {value}" for name, value in _flat(content.results.get("provenance", {})))
    return f"{table}\n\n{CONVENTIONS}\n\n{made_on or 'Hardware and software were not recorded.'}"


def _cell(value: Any, interval: Any = None) -> str:
    if value is None:
        return ""
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text if interval is None else f"{text} [{_cell(interval[0])}, {_cell(interval[1])}]"


def _flat(values: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested facts as (dotted name, value), unknown ones left out."""
    if not isinstance(values, Mapping):
        return [] if values is None else [(prefix, values)]
    pairs = []
    for name, value in values.items():
        pairs += _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return pairs
