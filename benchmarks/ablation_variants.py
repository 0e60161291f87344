"""The ablations of the paper and a few beyond it: what each changes in a drafter's shape or in its training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Args:
        says (`str`): What it is, for the table.
        config (`dict`): Fields of the drafter's config that differ from the recipe's.
        arguments (`dict`): Training arguments that differ from the recipe's.
        kind (`str`): `drafter_type` as `dream-hf train` takes it.
        paper (`tuple[float, float]`, *optional*): Speedup and tau over DREAM's own, where the paper gives them (tables 2, 3).
        needs_pictures (`bool`): Whether it changes nothing for a target without pictures.
    """

    says: str
    config: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    kind: str = "dream"
    paper: tuple[float, float] | None = None
    needs_pictures: bool = False


def _static(depth: float) -> Variant:
    arguments = {"feature_selection": "static", "static_layer_depth": depth}
    return Variant(f"mid feature: the layer at {depth:.0%} of the depth", arguments=arguments)


def _keep(ratio: float, importance: str, paper: tuple[float, float] | None = None) -> Variant:
    config = {"visual_keep_ratio": ratio, "visual_importance": importance}
    return Variant(f"{ratio:.0%} of the visual tokens, by {importance}", config, paper=paper, needs_pictures=True)


BASE = "dream"
VARIANTS = {
    BASE: Variant("DREAM: three blocks, mid feature by entropy per token, one step", paper=(1.0, 1.0)),
    "no_initial": Variant("without the initial block", {"block_types": ["cross", "final"]}, paper=(0.60, 0.59)),
    "no_cross": Variant("without cross-attention", {"block_types": ["initial", "final"]}, paper=(0.48, 0.44)),
    "no_final": Variant("without the final block", {"block_types": ["initial", "cross"]}, paper=(0.73, 0.63)),
    "two_cross": Variant(
        "two cross-attention blocks", {"block_types": ["initial", "cross", "cross", "final"]}, paper=(0.99, 1.09)
    ),
    "mid_none": Variant("no mid feature", arguments={"feature_selection": "none"}),
    "mid_static_25": _static(0.25),
    "mid_static_50": _static(0.5),
    "mid_static_75": _static(0.75),
    "mid_sample": Variant("mid feature by entropy per sample", arguments={"feature_selection": "sample"}),
    "kl_only": Variant(
        "KL only, no feature losses", arguments={"feature_selection": "none", "final_feature_loss_weight": 0.0}
    ),
    "concat": Variant("EAGLE-3: features concatenated to embeddings, one layer", kind="eagle3"),
    "open_gates": Variant("the cross-attention's gates start open, at 1", {"initial_gate": 1.0}),
    "multi_step": Variant("trained on its own features for three steps", arguments={"rollout_steps": 3}),
    # The paper's Table 3 is relative to all tokens; its rows are here relative to 75%, which is DREAM's own setting.
    "keep_100": _keep(1.0, "attention", (3.53 / 3.68, 5.67 / 5.58)),
    "keep_50": _keep(0.5, "attention", (3.19 / 3.68, 4.96 / 5.58)),
    "keep_25": _keep(0.25, "attention", (2.44 / 3.68, 4.78 / 5.58)),
    "novelty_75": _keep(0.75, "novelty"),
    "uniform_75": _keep(0.75, "uniform"),
    "novelty_25": _keep(0.25, "novelty"),
    "uniform_25": _keep(0.25, "uniform"),
}
