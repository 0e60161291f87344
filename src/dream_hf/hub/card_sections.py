"""The sections of a model card as Markdown. What is not known is said to be unknown, never left to be guessed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .card_content import PROGRESS, RECIPE, RESULTS, CardContent, hub_id

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
CONVENTIONS = (
    "tau is the mean number of tokens gained by a verification forward, the target's own bonus token included; the prefill is "
    "no such forward. speedup is the total time of plain `generate()` over the total time of the method on the same prompts, "
    "prefill included; its median is over prompts, by time per token. Square brackets: 95% bootstrap interval over prompts."
)


def summary(content: CardContent) -> str:
    """What this is and for which target."""
    name, revision = content.target.get("name"), content.target.get("revision")
    target = f"[{name}](https://huggingface.co/{name})" if hub_id(name) else f"`{name}`" if name else "one target"
    at = f" (revision `{revision}`)" if revision else ""
    plan = "**A plan: this drafter has not been trained.** " if content.config is None else ""
    return (
        f"{plan}A [DREAM](https://arxiv.org/abs/2505.19201) drafter for {target}{at}: a small model that drafts several tokens "
        "at a time, which the target then verifies in one forward."
    )


def shape(config: Any) -> str:
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


def training(content: CardContent) -> str:
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


def measured(content: CardContent) -> str:
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
