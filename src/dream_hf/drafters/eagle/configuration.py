"""`EagleConfig`: the shape of an EAGLE drafter, what it reads of its target, and how it drafts."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from ...decoding.settings import DraftSettings
from ..new_drafters import check_config_names, derived_from

MAX_PARAMETERS = 20_000_000_000
MAX_LAYERS = 64
MAX_IMAGE_QUERIES = 1024
IMAGE_ROWS = ("token", "merged", "direct", "compressed")
# Angles that depend on how long the text is: a level of a tree would have others than the same tokens read later.
LENGTH_DEPENDENT_ROPES = ("dynamic", "longrope")


@strict
class EagleConfig(PreTrainedConfig):
    r"""Configuration of an [`EagleDrafter`] (EAGLE, arXiv 2401.15077; EAGLE-3, arXiv 2503.01840; ViSpec, arXiv 2509.15235; MSD,
    arXiv 2505.14260).

    Args:
        vocab_size (`int`): Size of the target's vocabulary.
        hidden_size (`int`): Width of the drafter.
        target_hidden_size (`int`, *optional*): Width of the target's features; defaults to `hidden_size`.
        feature_layers (`list[int]`): Which features are read, by their place in the target's `hidden_states`: i for what
            enters decoder layer i, the number of layers for those after the final norm.
        generation (`int`): 1 for EAGLE-1 and EAGLE-2, whose every row is made of an embedding and a feature by `fc`; 3 for
            EAGLE-3, where `fc` makes one feature of several, and attention reads an embedding beside it.
        num_hidden_layers (`int`): Layers of the drafter.
        intermediate_size, num_attention_heads, num_key_value_heads, head_dim, hidden_act, rms_norm_eps, rope_parameters,
            max_position_embeddings: As in Llama.
        attention_bias, attention_output_bias, mlp_bias, fc_bias (`bool`): Which projections have a bias.
        has_qk_norm (`bool`): RMS norm of queries and keys, head by head, before the rotary embedding.
        has_input_norm (`bool`): Whether layers of a drafter of generation 1 have an input norm; the published ones have none.
        has_final_norm (`bool`): Whether features are normed for the head.
        is_feedback_normed (`bool`): The next level reads normed features, too (EAGLE-3.1).
        norm_before_residual (`bool`): The residual stream of the first layer starts behind the norm of the features.
        norm_before_fc (`bool`): One norm of all features before `fc`.
        has_fc_norm (`bool`): A norm for each layer's features before `fc`.
        has_embedding (`bool`): Whether the drafter has an embedding of its own or borrows the target's.
        has_head (`bool`): Whether the drafter has a head of its own or borrows the target's.
        mrope_section (`list[int]`, *optional*): Rotary channels of time, height and width, for a drafter that stands at the
            target's three-dimensional positions; by default it counts tokens.
        is_mrope_interleaved (`bool`): Channels of the three alternate (Qwen3-VL) instead of standing in blocks (Qwen2-VL).
        image_rows (`str`): What is read where a token stands for a piece of a picture. `"token"`: the embedding of the
            placeholder. `"merged"`: what the target's towers made of that piece, in its place. `"direct"`: the same, and it
            enters the layer as it is, without `fc` and feature (MSD). `"compressed"`: a few vectors for a whole picture, and
            one that all text behind it reads beside its features (ViSpec).
        num_image_queries (`int`): Learned queries of ViSpec's adaptor, one of which is for text; 0 for a drafter without.
        has_image_bias (`bool`): Whether keys and values of that adaptor have a bias.
        draft_vocab_size (`int`, *optional*): How many tokens its head knows; by default the whole vocabulary.
        target (`dict`, *optional*): What the drafter was made for, as in [`DreamConfig`].
        tree_depth, tree_top_k, tree_size, tree_min_level_probability, tree_min_node_probability, pause_below, compile,
            draft_threads: How to draft, as in [`DreamConfig`].

    Raises:
        ValueError: An inconsistent or out-of-range value; the message names the argument and its value.
    """

    model_type = "eagle_drafter"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 32000
    hidden_size: int = 4096
    target_hidden_size: int | None = None
    feature_layers: list[int] | tuple[int, ...] = (2, 16, 29)
    generation: int = 3
    num_hidden_layers: int = 1
    intermediate_size: int = 11008
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    attention_dropout: float | int = 0.0
    mlp_bias: bool = False
    fc_bias: bool = False
    has_qk_norm: bool = False
    has_input_norm: bool = False
    has_final_norm: bool = True
    is_feedback_normed: bool = False
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    has_fc_norm: bool = False
    has_embedding: bool = False
    has_head: bool = True
    mrope_section: list[int] | tuple[int, ...] | None = None
    is_mrope_interleaved: bool = False
    image_rows: str = "token"
    num_image_queries: int = 0
    has_image_bias: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    draft_vocab_size: int | None = None
    target: dict | None = None

    tree_depth: int = 6
    tree_top_k: int = 4
    tree_size: int = 32
    tree_min_level_probability: float | int = 0.0
    tree_min_node_probability: float | int = 0.0
    pause_below: float | int = 0.0
    compile: bool = False
    draft_threads: int | None = None

    def __post_init__(self, **kwargs):
        self.feature_layers = list(self.feature_layers)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.target_hidden_size is None:
            self.target_hidden_size = self.hidden_size
        super().__post_init__(**kwargs)
        self.check()

    @property
    def feature_size(self) -> int:
        """Width of all features that are read, side by side."""
        return len(self.feature_layers) * self.target_hidden_size  # type: ignore[operator]

    @property
    def num_parameters(self) -> int:
        """Weights of the projections and MLPs, norms, embedding and head left out."""
        projected = self.head_dim * (self.num_attention_heads + self.num_key_value_heads)  # type: ignore[operator]
        per_layer = 2 * self.hidden_size * projected + 3 * self.hidden_size * self.intermediate_size
        return (
            per_layer * self.num_hidden_layers
            + 2 * self.hidden_size * projected
            + self.hidden_size * self.feature_size
        )

    def check(self) -> None:
        """Raise a `ValueError` for a shape no drafter can have, or defaults that draft nothing."""
        positive = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        for name in (*positive, "head_dim", "num_hidden_layers", "target_hidden_size", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` ({getattr(self, name)}) must be at least 1.")
        if self.num_attention_heads % self.num_key_value_heads:  # type: ignore[operator]
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of "
                f"`num_key_value_heads` ({self.num_key_value_heads})."
            )
        if self.head_dim % 2:  # type: ignore[operator]
            raise ValueError(f"`head_dim` ({self.head_dim}) must be even: rotary embeddings rotate pairs.")
        if self.num_hidden_layers > MAX_LAYERS or self.num_parameters > MAX_PARAMETERS:
            raise ValueError(
                f"The shape in this config has {self.num_hidden_layers} layers and {self.num_parameters:,} parameters, more "
                f"than the {MAX_LAYERS} and {MAX_PARAMETERS:,} a drafter may have. Check `hidden_size` and "
                "`intermediate_size`."
            )
        self._check_reading()
        self._check_image_rows()
        self._check_rope()
        self.check_width(DraftSettings.of(self))

    def _check_reading(self) -> None:
        if self.generation not in (1, 3):
            raise ValueError(f"`generation` ({self.generation}) must be 1 (EAGLE-1 and EAGLE-2) or 3.")
        if not self.feature_layers or min(self.feature_layers) < 1:
            raise ValueError(f"`feature_layers` ({self.feature_layers}) must name decoder layers, from 1 on.")
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
        if self.target_hidden_size != self.hidden_size and not (self.has_embedding and self.has_head):
            raise ValueError(
                f"A drafter of width {self.hidden_size} cannot borrow the embedding or head of a target of width "
                f"{self.target_hidden_size}; `has_embedding` and `has_head` must be true."
            )
        if self.draft_vocab_size is not None and not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"`draft_vocab_size` ({self.draft_vocab_size}) must lie between 1 and `vocab_size` ({self.vocab_size})."
            )

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
        kind = (self.rope_parameters or {}).get("rope_type", "default")
        if kind in LENGTH_DEPENDENT_ROPES:
            raise ValueError(
                f"`rope_parameters` ({self.rope_parameters}): {kind!r} angles depend on the text's length."
            )
        if self.mrope_section is None:
            return
        self.mrope_section = list(self.mrope_section)
        if len(self.mrope_section) != 3 or 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(
                f"`mrope_section` ({self.mrope_section}) must be three numbers whose sum is half of `head_dim` "
                f"({self.head_dim})."
            )

    def check_width(self, settings: DraftSettings) -> None:
        """Raise a `ValueError` for settings that want more children than there are tokens to draft."""
        size = self.draft_vocab_size or self.vocab_size
        if settings.tree_top_k > size:
            raise ValueError(
                f"`tree_top_k` ({settings.tree_top_k}) must not exceed the {size} tokens that are drafted."
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
        return cls(**{**derived, "feature_layers": _three_layers(derived["target"]["num_hidden_layers"]), **overrides})

    def layers_of(self, num_target_layers: int) -> tuple[int, ...]:
        """`feature_layers` as [`Needs`] counts them: i - 1 for what layer i - 1 puts out, -1 behind the final norm."""
        return tuple(-1 if index == num_target_layers else index - 1 for index in self.feature_layers)


def _three_layers(num_layers: int) -> tuple[int, int, int]:
    """A low, a middle and a high one, as EAGLE-3's authors take them of targets that are deep enough."""
    return (2, num_layers // 2, num_layers - 3) if num_layers >= 8 else (1, (num_layers + 1) // 2, num_layers)
