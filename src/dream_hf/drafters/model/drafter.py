"""`ModelDrafter`: a smaller model drafts for a larger one."""

from __future__ import annotations

from typing import Any

from transformers.modeling_utils import PreTrainedModel

from ...decoding.drafter import Drafter, DraftSession, Needs, Prefill
from ...decoding.settings import DraftSettings
from ...targets.pictures import other_pictures
from ...targets.recurrence import keeps_state
from ...targets.suitability import unsuitable
from ...targets.target import Target
from ..fit import check_top_k
from ..tentative import Draftable
from .bridge import Speller
from .other_vocabulary import RespellingSession
from .session import ModelSession

DEFAULTS = DraftSettings(tree_depth=5, tree_top_k=4, tree_size=20, tree_min_level_probability=0.4)
PADDING = 1024  # by which the vocabularies of two models with one tokenizer may differ


class ModelDrafter(Drafter):
    """Drafts trees with another model on its own cache: a smaller vision-language model of the target's family, or a
    text-only model, which drafts from the text alone.

    Its forwards are not compiled, whatever `compile` says; the target's are. Where a later turn of a chat has pictures of its
    own, the text is read anew without any.

    Args:
        model (`PreTrainedModel`): The model that drafts.
        tokenizer, target_tokenizer (*optional*): The model's tokenizer or processor and the target's, where the vocabularies
            differ: then it drafts characters, from the text alone.
        use_pictures (`bool`): Let a vision-language model read the target's pictures, too.
        settings (`DraftSettings`, *optional*): How to draft.

    Raises:
        ValueError: A model that trees cannot be drafted with, or one tokenizer without the other.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        target_tokenizer: Any = None,
        use_pictures: bool = True,
        settings: DraftSettings | None = None,
    ):
        reason = unsuitable(model)
        if reason is None and keeps_state(model.config.get_text_config(decoder=True)):
            reason = f"`{type(model).__name__}` keeps a state in some layers, which a draft would change. Use another model."
        if reason is not None:
            raise ValueError(f"`model` cannot draft: {reason}")
        if (tokenizer is None) != (target_tokenizer is None):
            raise ValueError(
                "`tokenizer` and `target_tokenizer` belong together: pass both, or neither for one vocabulary."
            )
        self.model, self.use_pictures = Target(model), use_pictures
        self.spellers: tuple[Speller, Speller] | None = None  # where the vocabularies differ
        if tokenizer is not None:
            own, theirs = Speller(tokenizer), Speller(target_tokenizer)
            if own.tokenizer.get_vocab() != theirs.tokenizer.get_vocab():
                self.spellers = own, theirs
        self._settings = settings or DEFAULTS

    @property
    def settings(self) -> DraftSettings:
        return self._settings

    @property
    def needs(self) -> Needs:
        """The pictures."""
        return Needs(inputs=self._reads_pictures)

    def check(self, target: PreTrainedModel, settings: DraftSettings) -> None:
        """Refuse a target of another vocabulary, or one that takes other numbers of tokens for a picture."""
        name, view = type(self.model.model).__name__, Target(target)
        ours, theirs = self.model.text_config.vocab_size, view.text_config.vocab_size
        if self.spellers is not None:
            theirs = ours
        if abs(ours - theirs) > PADDING:
            raise ValueError(
                f"`model` (`{name}`) has a vocabulary of {ours} tokens and the target one of {theirs}. Pass `tokenizer` "
                "and `target_tokenizer`, so that it drafts in its own, or use a model of the target's family."
            )
        check_top_k(settings, min(ours, theirs), "the model's `vocab_size`")
        if self.model.model is target and self.model.length_dependent_rotaries:
            raise ValueError(
                f"`{name}` keeps angles of its longest text (`rope_type` dynamic or longrope), so that it cannot draft for "
                "itself. Load `model` a second time."
            )
        reason = other_pictures(self.model.model.config, view.model.config) if self._reads_pictures else None
        if reason is not None:
            raise ValueError(
                f"`model` (`{name}`) cannot read the target's pictures: {reason}. Pass `use_pictures=False`, so that it "
                "drafts from the text alone, or use a model of the target's family."
            )

    @property
    def _reads_pictures(self) -> bool:
        return self.use_pictures and self.spellers is None and bool(self.model.visual_ids)

    def start(self, prefill: Prefill, settings: DraftSettings) -> DraftSession:
        if self.spellers is not None:
            return RespellingSession(self.model, *self.spellers, prefill, settings)
        num_tokens = min(self.model.text_config.vocab_size, prefill.target.text_config.vocab_size)
        draftable = Draftable(num_tokens, tuple(prefill.target.visual_ids))
        return ModelSession(self.model, prefill, settings, draftable, self._reads_pictures)
