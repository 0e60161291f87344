"""DREAM speculative decoding for vision-language models, as a plugin of Hugging Face transformers (arXiv 2505.19201)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .registration import lazy_attribute, register, unregister
from .version import __version__

if TYPE_CHECKING:
    from .candidate_generator import DreamCandidateGenerator as DreamCandidateGenerator
    from .candidate_generator import dream_chain_generate as dream_chain_generate
    from .configuration_dream import DreamConfig as DreamConfig
    from .data import count_answer_tokens as count_answer_tokens
    from .draft_vocabulary import choose_draft_vocabulary as choose_draft_vocabulary
    from .generation import dream_generate as dream_generate
    from .modeling_dream import DreamDrafter as DreamDrafter
    from .outputs import DreamGenerateOutput as DreamGenerateOutput
    from .trainer import DreamTrainer as DreamTrainer
    from .training_args import DreamTrainingArguments as DreamTrainingArguments

_MODULES = {
    "DreamCandidateGenerator": "candidate_generator",
    "DreamConfig": "configuration_dream",
    "DreamDrafter": "modeling_dream",
    "DreamGenerateOutput": "outputs",
    "DreamTrainer": "trainer",
    "DreamTrainingArguments": "training_args",
    "choose_draft_vocabulary": "draft_vocabulary",
    "count_answer_tokens": "data",
    "dream_chain_generate": "candidate_generator",
    "dream_generate": "generation",
}

__all__ = [*_MODULES, "__version__", "register", "unregister"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    value = lazy_attribute(__name__, _MODULES, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])


register()
