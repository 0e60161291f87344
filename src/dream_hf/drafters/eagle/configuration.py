"""`EagleConfig`: the shape of an EAGLE drafter, what it reads of its target, and how it drafts."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from ..layer_config import LayerConfig
from ..new_drafters import check_config_names, derived_from
from ..published_fields import three_layers

MAX_IMAGE_QUERIES = 1024
IMAGE_ROWS = ("token", "merged", "direct", "compressed")


@strict
class EagleConfig(LayerConfig):
    r"""Configuration of an [`EagleDrafter`] (EAGLE, arXiv 2401.15077; EAGLE-3, arXiv 2503.01840; ViSpec, arXiv 2509.15235; MSD,
    arXiv 2505.14260). It takes the arguments of [`LayerConfig`], too.

    Args:
        generation (`int`): 1 for EAGLE-1 and EAGLE-2, whose every row is made of an embedding and a feature by `fc`; 3 for
            EAGLE-3, where `fc` makes one feature of several, and attention reads an embedding beside it.
        has_input_norm (`bool`): Whether layers of a drafter of generation 1 have an input norm; the published ones have none.
        has_final_norm (`bool`): Whether features are normed for the head.
        is_feedback_normed (`bool`): The next level reads normed features, too (EAGLE-3.1).
        norm_before_residual (`bool`): The residual stream of the first layer starts behind the norm of the features.
        norm_before_fc (`bool`): One norm of all features before `fc`.
        has_fc_norm (`bool`): A norm for each layer's features before `fc`.
        mrope_section (`list[int]`, *optional*): Rotary channels of time, height and width, for a drafter that stands at the
            target's three-dimensional positions; by default it counts tokens.
        is_mrope_interleaved (`bool`): Channels of the three alternate (Qwen3-VL) instead of standing in blocks (Qwen2-VL).
        image_rows (`str`): What is read where a token stands for a piece of a picture. `"token"`: the embedding of the
            placeholder. `"merged"`: what the target's towers made of that piece, in its place. `"direct"`: the same, and it
            enters the layer as it is, without `fc` and feature (MSD). `"compressed"`: a few vectors for a whole picture, and
            one that all text behind it reads beside its features (ViSpec).
        num_image_queries (`int`): Learned queries of ViSpec's adaptor, one of which is for text; 0 for a drafter without.
        has_image_bias (`bool`): Whether keys and values of that adaptor have a bias.

    Raises:
        ValueError: An inconsistent or out-of-range value; the message names the argument and its value.
    """

    model_type = "eagle_drafter"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    generation: int = 3
    has_input_norm: bool = False
    has_final_norm: bool = True
    is_feedback_normed: bool = False
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    has_fc_norm: bool = False
    mrope_section: list[int] | tuple[int, ...] | None = None
    is_mrope_interleaved: bool = False
    image_rows: str = "token"
    num_image_queries: int = 0
    has_image_bias: bool = False

    @property
    def num_parameters(self) -> int:
        """Those of [`LayerConfig`], and what a layer of double width has more."""
        projected = self.head_dim * (self.num_attention_heads + self.num_key_value_heads)  # type: ignore[operator]
        return super().num_parameters + 2 * self.hidden_size * projected

    def _check_reading(self) -> None:
        if self.generation not in (1, 3):
            raise ValueError(f"`generation` ({self.generation}) must be 1 (EAGLE-1 and EAGLE-2) or 3.")
        super()._check_reading()
        if self.generation == 1 and (len(self.feature_layers) > 1 or self.target_hidden_size != self.hidden_size):
            raise ValueError(
                f"A drafter of `generation` 1 reads one layer of its own width; `feature_layers` is {self.feature_layers}, "
                f"`target_hidden_size` {self.target_hidden_size} and `hidden_size` {self.hidden_size}."
            )
        if self.norm_before_fc and self.has_fc_norm:
            raise ValueError("`norm_before_fc` and `has_fc_norm` exclude each other; set one of them.")
        if self.is_feedback_normed and not self.has_final_norm:
            raise ValueError(
                "`is_feedback_normed` needs the norm that `has_final_norm` (False) says there is none of."
            )
        self._check_image_rows()

    def _check_image_rows(self) -> None:
        if self.image_rows not in IMAGE_ROWS:
            raise ValueError(f"`image_rows` ({self.image_rows!r}) must be one of {', '.join(IMAGE_ROWS)}.")
        if not 0 <= self.num_image_queries <= MAX_IMAGE_QUERIES:
            raise ValueError(
                f"`num_image_queries` ({self.num_image_queries}) must lie between 0 and {MAX_IMAGE_QUERIES}."
            )
        if self.image_rows == "compressed" and not self.num_image_queries:
            raise ValueError("`image_rows` 'compressed' needs an adaptor; `num_image_queries` (0) must be at least 1.")
        if self.generation == 3 and (self.image_rows in ("direct", "compressed") or self.num_image_queries):
            raise ValueError(
                f"A drafter of `generation` 3 has no rows past its `fc` and no adaptor; `image_rows` is "
                f"{self.image_rows!r} and `num_image_queries` {self.num_image_queries}."
            )
        if self.image_rows != "token" and self.target_hidden_size != self.hidden_size:
            raise ValueError(
                f"`image_rows` ({self.image_rows!r}) needs the target's width; `hidden_size` is {self.hidden_size} and "
                f"`target_hidden_size` {self.target_hidden_size}."
            )

    def _check_rope(self) -> None:
        super()._check_rope()
        if self.mrope_section is None:
            return
        self.mrope_section = list(self.mrope_section)
        if len(self.mrope_section) != 3 or 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(
                f"`mrope_section` ({self.mrope_section}) must be three numbers whose sum is half of `head_dim` "
                f"({self.head_dim})."
            )

    @classmethod
    def from_target(cls, target_config: PreTrainedConfig, **overrides: Any) -> EagleConfig:
        """The configuration of a new EAGLE-3 drafter: one layer of the target's shape with a head of its own.

        Args:
            target_config (`PreTrainedConfig`): Configuration of the target, vision-language or text-only.
            **overrides: Any argument of [`EagleConfig`], replacing the derived value. By default features of a low, a middle
                and a high layer are read (arXiv 2503.01840).

        Raises:
            ValueError: An override that is no argument.
        """
        check_config_names(cls, overrides)
        derived = derived_from(target_config)
        return cls(
            **{**derived, "feature_layers": _layers_to_read(derived["target"]["num_hidden_layers"]), **overrides}
        )


def _layers_to_read(num_layers: int) -> tuple[int, int, int]:
    """A low, a middle and a high one, as EAGLE-3's authors take them of targets that are deep enough."""
    return three_layers(num_layers) if num_layers >= 8 else (1, (num_layers + 1) // 2, num_layers)
