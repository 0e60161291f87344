"""`DreamConfig`: the shape of a drafter, the target it belongs to, and how it drafts."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from ...decoding.settings import DraftSettings
from ..fit import check_top_k
from ..new_drafters import check_config_names, derived_from
from .reading import Reading

BLOCK_TYPES = ("initial", "cross", "final")
MAX_PARAMETERS = 20_000_000_000
MAX_BLOCKS = 64


@strict
class DreamConfig(PreTrainedConfig):
    r"""Configuration of a [`DreamDrafter`] (DREAM, arXiv 2505.19201, section 3.1).

    Args:
        vocab_size (`int`): Size of the target's vocabulary; the drafter borrows the target's embedding and head.
        hidden_size (`int`): Width of the drafter, equal to the width of the target's text decoder.
        intermediate_size (`int`): Width of the MLPs.
        num_attention_heads (`int`): Query heads of every block.
        num_key_value_heads (`int`, *optional*): Key/value heads; defaults to `num_attention_heads`.
        head_dim (`int`, *optional*): Width of a head; defaults to `hidden_size // num_attention_heads`.
        hidden_act (`str`): Activation of the MLPs.
        max_position_embeddings (`int`): Longest position the rotary embedding is meant for.
        rms_norm_eps (`float`): Epsilon of every RMS norm.
        rope_parameters (`dict`, *optional*): Rotary embedding of the self-attention blocks.
        block_types (`list[str]`): The blocks in order, out of `"initial"` (causal self-attention without input norm),
            `"cross"` (cross-attention to features) and `"final"` (causal self-attention with input norm). The paper's
            drafter is the default; leaving one out or doubling `"cross"` gives the ablations of its Table 2.
        normalize_inputs (`bool`): RMS-normalise the embeddings that enter the first block. Merged visual embeddings
            are often tens of times larger than text embeddings. Off for published checkpoints.
        normalize_features (`bool`): RMS-normalise the features that the cross-attention reads. Off for published
            checkpoints.
        initial_gate (`float`): Where the gates of the cross-attention start in a new drafter; the paper's code starts them
            closed, at 0, and a drafter then learns at first without the features. Open ones, at 1, learned
            sooner (docs/training.md).
        legacy (`bool`): Reproduce the published code where nothing is visible to a cross-attention query (the first
            token): a uniform average over the features instead of zeros. Set by the checkpoint converter.
        target (`dict`, *optional*): What the drafter was trained for: `model_type`, `hidden_size`, `vocab_size`,
            `num_hidden_layers`, `name`, `revision`.
        tree_depth (`int`): Levels of the draft tree.
        tree_top_k (`int`): Beams per level and children per beam; 1 drafts a chain.
        tree_size (`int`): Drafted nodes verified per step, the root not counted.
        tree_min_level_probability (`float`): Stop growing a tree when the beams of a level, by the drafter's estimate,
            are reached with less than this probability together. Saves drafting where it hardly pays, and costs one
            transfer to the host per level; 0 grows every tree to its full depth, with shapes that never change.
        tree_min_node_probability (`float`): Leave out nodes that, by the drafter's estimate, are reached with less than
            this probability. Saves verification; 0 verifies `tree_size` nodes whatever they promise.
        pause_below (`float`): Stop drafting for a while where the last few drafted steps gained fewer tokens than this
            on average, bonus included: set it to what a drafted step costs, in steps of plain decoding. Trees are then also
            no deeper than twice what the best of these steps gained. With 0 every step drafts a full tree; anything up to 1
            never pauses, for every step gains a token. The output stays exact. New drafters
            ([`DreamDrafter.for_target`]) start with 2.0, a least probability of 0.2 for levels and of 0.02 for nodes, so that
            one that knows nothing yet costs little; saved values stay.
        visual_keep_ratio (`float`): Share of the visual tokens kept in the drafter's prompt (paper, section 3.3); 0 for none.
        visual_importance (`str`): Which visual tokens are kept: `"attention"` ranks them by the attention they receive from
            the prompt in the target's last layer (paper), `"novelty"` by how unlike those before them their features are,
            which takes no attention maps and first leaves out backgrounds; `"uniform"` keeps the last of each of even runs,
            `"pool"` the means of such runs (SpecVLM, arXiv 2509.11815).
        compile (`bool`): Compile the forwards of decoding where that is possible; the first `generate()` waits for it.
            How is said by `generate(..., compile_config=...)`, which also switches it on.
        draft_threads (`int`, *optional*): CPU threads that draft; by default as many as PyTorch uses. The levels of a small
            drafter are many small operations, which one thread often finishes sooner than several.
        tuned (`dict`, *optional*): Machines that the settings above were tuned on with `dream-hf bench --tune`, by name, with
            what was found and measured there. A note: loading a drafter elsewhere changes nothing.
        draft_vocab_size (`int`, *optional*): How many tokens may be drafted; by default the whole vocabulary. Which ones is
            saved with the weights as `draft_token_ids`; set both with [`DreamDrafter.set_draft_vocabulary`].

    Raises:
        ValueError: An inconsistent or out-of-range value; the message names the argument and its value.
    """

    model_type = "dream_drafter"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    default_theta = 10000.0

    vocab_size: int = 32000
    hidden_size: int = 4096
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
    attention_dropout: float | int = 0.0
    mlp_bias: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    block_types: list[str] | tuple[str, ...] = BLOCK_TYPES
    num_hidden_layers: int | None = None
    normalize_inputs: bool = True
    normalize_features: bool = True
    initial_gate: float | int = 0.0
    legacy: bool = False
    target: dict | None = None

    tree_depth: int = 6
    tree_top_k: int = 4
    tree_size: int = 32
    tree_min_level_probability: float | int = 0.0
    tree_min_node_probability: float | int = 0.0
    pause_below: float | int = 0.0
    visual_keep_ratio: float | int = 0.75
    visual_importance: str = "attention"
    compile: bool = False
    draft_threads: int | None = None
    tuned: dict | None = None
    draft_vocab_size: int | None = None

    def __post_init__(self, **kwargs):
        self.block_types = list(self.block_types)
        self.num_hidden_layers = len(self.block_types)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Raise a `ValueError` for a shape no drafter can have, or defaults that draft nothing."""
        self.check_shape()
        self.check_drafting()

    def check_shape(self) -> None:
        """Raise a `ValueError` for a shape no drafter can have."""
        positive = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        for name in (*positive, "head_dim", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` ({getattr(self, name)}) must be at least 1.")
        if self.draft_vocab_size is not None and not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"`draft_vocab_size` ({self.draft_vocab_size}) must lie between 1 and `vocab_size` ({self.vocab_size}), or be "
                "None to draft from the whole vocabulary."
            )
        if self.num_attention_heads % self.num_key_value_heads:  # type: ignore[operator]
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of "
                f"`num_key_value_heads` ({self.num_key_value_heads})."
            )
        if self.head_dim % 2:  # type: ignore[operator]
            raise ValueError(f"`head_dim` ({self.head_dim}) must be even: rotary embeddings rotate pairs.")
        if len(self.block_types) > MAX_BLOCKS:
            raise ValueError(f"`block_types` has {len(self.block_types)} blocks, more than the {MAX_BLOCKS} allowed.")
        unknown = [block for block in self.block_types if block not in BLOCK_TYPES]
        if unknown or not self.block_types:
            raise ValueError(
                f"`block_types` ({self.block_types}) must be a non-empty list out of {list(BLOCK_TYPES)}."
            )
        if set(self.block_types) == {"cross"}:
            raise ValueError(
                f'`block_types` ({self.block_types}) needs an "initial" or a "final" block: without self-attention no '
                "token sees the ones before it."
            )
        if self.num_parameters > MAX_PARAMETERS:
            raise ValueError(
                f"The shape in this config has {self.num_parameters:,} parameters, more than the {MAX_PARAMETERS:,} a "
                "drafter may have. Check `hidden_size`, `intermediate_size`, `num_attention_heads` and `head_dim`."
            )

    def check_drafting(self) -> None:
        """Raise a `ValueError` for decoding defaults that draft nothing; checked again at every `generate()`."""
        self.check_width(DraftSettings.of(self))
        Reading(self.visual_keep_ratio, self.visual_importance)  # refuses what has no meaning

    def check_width(self, settings: DraftSettings) -> None:
        """Raise a `ValueError` for settings that want more children than there are tokens to draft."""
        for name in ("vocab_size", "draft_vocab_size"):
            check_top_k(settings, getattr(self, name), f"`{name}`")

    @property
    def reading(self) -> Reading:
        """What a drafter reads of a prompt; a `ValueError` for what has no meaning."""
        return Reading(self.visual_keep_ratio, self.visual_importance)

    @property
    def needs_attention(self) -> bool:
        """Whether visual tokens are left out by the attention they receive."""
        return self.reading.needs_attention

    @property
    def num_parameters(self) -> int:
        """Weights of the attention projections and MLPs: what a drafter of this shape costs, norms left out."""
        projected = self.head_dim * (self.num_attention_heads + self.num_key_value_heads)  # type: ignore[operator]
        per_block = 2 * self.hidden_size * projected + 3 * self.hidden_size * self.intermediate_size
        return per_block * len(self.block_types)

    @classmethod
    def from_target(cls, target_config: PreTrainedConfig, **overrides: Any) -> DreamConfig:
        """Derive a drafter's configuration from its target's.

        Args:
            target_config (`PreTrainedConfig`): Configuration of the target, vision-language or text-only.
            **overrides: Any argument of [`DreamConfig`], replacing the derived value.

        Returns:
            `DreamConfig`: Same width, heads and vocabulary as the target's text decoder, one MLP width. For a drafter that is
                cheaper on an accelerator see [`suggested_shape`].

        Raises:
            ValueError: An override that is no argument.
        """
        check_config_names(cls, overrides)
        return cls(**{**derived_from(target_config), **overrides})
