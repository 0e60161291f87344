"""DREAM speculative decoding for vision-language models, as a plugin of Hugging Face transformers (arXiv 2505.19201)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register, unregister
from .version import __version__

if TYPE_CHECKING:
    from .data import count_answer_tokens as count_answer_tokens
    from .decoding.assisted import DreamCandidateGenerator as DreamCandidateGenerator
    from .decoding.assisted import dream_chain_generate as dream_chain_generate
    from .decoding.drafter import Drafter as Drafter
    from .decoding.drafter import DraftSession as DraftSession
    from .decoding.loop import dream_generate as dream_generate
    from .decoding.outputs import DreamGenerateOutput as DreamGenerateOutput
    from .decoding.settings import DraftSettings as DraftSettings
    from .decoding.tree import DraftTree as DraftTree
    from .drafters.combined import CombinedDrafter as CombinedDrafter
    from .drafters.dflash.configuration import DFlashConfig as DFlashConfig
    from .drafters.dflash.drafter import DFlashDrafter as DFlashDrafter
    from .drafters.dream.configuration import DreamConfig as DreamConfig
    from .drafters.dream.drafter import DreamDrafter as DreamDrafter
    from .drafters.dream.shape import suggested_shape as suggested_shape
    from .drafters.dream.shape import weight_ratio as weight_ratio
    from .drafters.eagle.configuration import EagleConfig as EagleConfig
    from .drafters.eagle.drafter import EagleDrafter as EagleDrafter
    from .drafters.eagle.export import export_drafter as export_drafter
    from .drafters.inspection import draft_log_probs as draft_log_probs
    from .drafters.model.drafter import ModelDrafter as ModelDrafter
    from .drafters.mtp.drafter import MTPDrafter as MTPDrafter
    from .drafters.retrieval.drafter import RetrievalDrafter as RetrievalDrafter
    from .drafters.retrieval.lookup import PromptLookupDrafter as PromptLookupDrafter
    from .drafters.retrieval.store import RetrievalStore as RetrievalStore
    from .drafters.skip.drafter import LayerSkipDrafter as LayerSkipDrafter
    from .drafters.vocabulary import choose_draft_vocabulary as choose_draft_vocabulary
    from .load_models import load_drafter as load_drafter
    from .load_models import probe_drafter as probe_drafter
    from .training.arguments import DreamTrainingArguments as DreamTrainingArguments
    from .training.trainer import DreamTrainer as DreamTrainer

_MODULES = {
    "CombinedDrafter": "drafters.combined",
    "DFlashConfig": "drafters.dflash.configuration",
    "DFlashDrafter": "drafters.dflash.drafter",
    "DraftSession": "decoding.drafter",
    "DraftSettings": "decoding.settings",
    "DraftTree": "decoding.tree",
    "Drafter": "decoding.drafter",
    "DreamCandidateGenerator": "decoding.assisted",
    "DreamConfig": "drafters.dream.configuration",
    "DreamDrafter": "drafters.dream.drafter",
    "DreamGenerateOutput": "decoding.outputs",
    "DreamTrainer": "training.trainer",
    "DreamTrainingArguments": "training.arguments",
    "EagleConfig": "drafters.eagle.configuration",
    "EagleDrafter": "drafters.eagle.drafter",
    "LayerSkipDrafter": "drafters.skip.drafter",
    "MTPDrafter": "drafters.mtp.drafter",
    "ModelDrafter": "drafters.model.drafter",
    "PromptLookupDrafter": "drafters.retrieval.lookup",
    "RetrievalDrafter": "drafters.retrieval.drafter",
    "RetrievalStore": "drafters.retrieval.store",
    "choose_draft_vocabulary": "drafters.vocabulary",
    "count_answer_tokens": "data",
    "dream_chain_generate": "decoding.assisted",
    "dream_generate": "decoding.loop",
    "draft_log_probs": "drafters.inspection",
    "export_drafter": "drafters.eagle.export",
    "load_drafter": "load_models",
    "probe_drafter": "load_models",
    "suggested_shape": "drafters.dream.shape",
    "weight_ratio": "drafters.dream.shape",
}

__all__ = [*_MODULES, "__version__", "register", "unregister"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])


register()
