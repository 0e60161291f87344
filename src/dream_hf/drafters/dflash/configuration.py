"""`DFlashConfig`: the shape of a DFlash drafter, what a row of a block sees, and how it drafts."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ..layer_config import LayerConfig

MAX_BLOCK = 1024


@strict
class DFlashConfig(LayerConfig):
    r"""Configuration of a [`DFlashDrafter`] (arXiv 2602.06036). It takes the arguments of [`LayerConfig`], too.

    Args:
        block_size (`int`): Rows of a block: the last token and masks.
        mask_token_id (`int`): What stands in a block for tokens that are not known.
        drafts_from_anchor (`bool`): The row of the last token drafts the token behind it, and so on, so that a block drafts
            `block_size` tokens. Otherwise each mask's row drafts the token in its own place.
        causal_layers (`list[int]`): Layers in which a row of a block sees no row of it behind itself.
        sliding_layers (`list[int]`): Layers that look back `sliding_window` tokens only.
        sliding_window (`int`, *optional*): Tokens that a row sees in these, itself included; by default all.
        is_window_anchored (`bool`): The window is measured from the start of the block, which is seen whole, and holds as many
            tokens before it (speculators).
        embedding_scale (`float`): What embeddings are multiplied by.
        logit_scale, logit_softcap (`float`): What the head's logits are multiplied by, and the number that they stay below.
    """

    model_type = "dflash_drafter"
    keys_to_ignore_at_inference = ["past_key_values"]

    block_size: int = 16
    mask_token_id: int = 0
    drafts_from_anchor: bool = False
    causal_layers: list[int] | tuple[int, ...] = ()
    sliding_layers: list[int] | tuple[int, ...] = ()
    sliding_window: int | None = None
    is_window_anchored: bool = False
    embedding_scale: float | int = 1.0
    logit_scale: float | int = 1.0
    logit_softcap: float | int | None = None

    has_qk_norm: bool = True
    has_head: bool = False
    tree_depth: int = 15

    def __post_init__(self, **kwargs):
        self.causal_layers, self.sliding_layers = list(self.causal_layers), list(self.sliding_layers)
        super().__post_init__(**kwargs)

    @property
    def num_drafted(self) -> int:
        """How many tokens a block drafts, which is how deep a tree can be."""
        return self.block_size if self.drafts_from_anchor else self.block_size - 1

    def _check_reading(self) -> None:
        super()._check_reading()
        if not 2 <= self.block_size <= MAX_BLOCK:
            raise ValueError(f"`block_size` ({self.block_size}) must lie between 2 and {MAX_BLOCK}.")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"`mask_token_id` ({self.mask_token_id}) must be a token of the target's, of which there are "
                f"{self.vocab_size} (`vocab_size`)."
            )
        if self.draft_vocab_size is not None and not self.has_head:
            raise ValueError(
                f"`draft_vocab_size` ({self.draft_vocab_size}) is of a head, and the drafter has no head of its own."
            )
        for name in ("causal_layers", "sliding_layers"):
            layers = getattr(self, name)
            if layers and not 0 <= min(layers) <= max(layers) < self.num_hidden_layers:
                raise ValueError(
                    f"`{name}` ({layers}) must name some of the {self.num_hidden_layers} layers (`num_hidden_layers`)."
                )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"`sliding_window` ({self.sliding_window}) must be at least 1, or None.")
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise ValueError(f"`logit_softcap` ({self.logit_softcap}) must be above 0, or None.")
