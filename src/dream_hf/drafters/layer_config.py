"""`LayerConfig`: what configs of drafters made of Llama's layers have in common, whoever published them."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from ..decoding.settings import DraftSettings

MAX_PARAMETERS = 20_000_000_000
MAX_LAYERS = 64
# Angles that depend on how long the text is: a level of a tree would have others than the same tokens read later.
LENGTH_DEPENDENT_ROPES = ("dynamic", "longrope")


@strict
class LayerConfig(PreTrainedConfig):
    r"""Shape of a drafter with Llama's layers that reads features of its target.

    Args:
        vocab_size (`int`): Size of the target's vocabulary.
        hidden_size (`int`): Width of the drafter.
        target_hidden_size (`int`, *optional*): Width of the target's features; defaults to `hidden_size`.
        feature_layers (`list[int]`): Which features are read, by their place in the target's `hidden_states`: i for what
            enters decoder layer i, the number of layers for those after the final norm.
        num_hidden_layers (`int`): Layers of the drafter.
        intermediate_size, num_attention_heads, num_key_value_heads, head_dim, hidden_act, rms_norm_eps, rope_parameters,
            max_position_embeddings: As in Llama.
        attention_bias, attention_output_bias, mlp_bias, fc_bias (`bool`): Which projections have a bias.
        has_qk_norm (`bool`): RMS norm of queries and keys, head by head, before the rotary embedding.
        has_embedding (`bool`): Whether the drafter has an embedding of its own or borrows the target's.
        has_head (`bool`): Whether the drafter has a head of its own or borrows the target's.
        draft_vocab_size (`int`, *optional*): How many tokens its head knows; by default the whole vocabulary.
        target (`dict`, *optional*): What the drafter was made for, as in [`DreamConfig`].
        tree_depth, tree_top_k, tree_size, tree_min_level_probability, tree_min_node_probability, pause_below, compile,
            draft_threads: How to draft, as in [`DreamConfig`].

    Raises:
        ValueError: An inconsistent or out-of-range value; the message names the argument and its value.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    target_hidden_size: int | None = None
    feature_layers: list[int] | tuple[int, ...] = (2, 16, 29)
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
    has_embedding: bool = False
    has_head: bool = True
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
        return per_layer * self.num_hidden_layers + self.hidden_size * self.feature_size

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
        self._check_rope()
        self.check_width(DraftSettings.of(self))

    def _check_reading(self) -> None:
        if not self.feature_layers or min(self.feature_layers) < 1:
            raise ValueError(f"`feature_layers` ({self.feature_layers}) must name decoder layers, from 1 on.")
        if self.target_hidden_size != self.hidden_size and not (self.has_embedding and self.has_head):
            raise ValueError(
                f"A drafter of width {self.hidden_size} cannot borrow the embedding or head of a target of width "
                f"{self.target_hidden_size}; `has_embedding` and `has_head` must be true."
            )
        if self.draft_vocab_size is not None and not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"`draft_vocab_size` ({self.draft_vocab_size}) must lie between 1 and `vocab_size` ({self.vocab_size})."
            )

    def _check_rope(self) -> None:
        kind = (self.rope_parameters or {}).get("rope_type", "default")
        if kind in LENGTH_DEPENDENT_ROPES:
            raise ValueError(
                f"`rope_parameters` ({self.rope_parameters}): {kind!r} angles depend on the text's length."
            )

    def check_width(self, settings: DraftSettings) -> None:
        """Raise a `ValueError` for settings that want more children than there are tokens to draft."""
        size = self.draft_vocab_size or self.vocab_size
        if settings.tree_top_k > size:
            raise ValueError(
                f"`tree_top_k` ({settings.tree_top_k}) must not exceed the {size} tokens that are drafted."
            )

    def layers_of(self, num_target_layers: int) -> tuple[int, ...]:
        """`feature_layers` as [`Needs`] counts them: i - 1 for what layer i - 1 puts out, -1 behind the final norm."""
        return tuple(-1 if index == num_target_layers else index - 1 for index in self.feature_layers)
