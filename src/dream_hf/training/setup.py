"""What a `DreamTrainer` makes of its arguments, and what it refuses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.trainer_utils import SaveStrategy, SchedulerType
from transformers.utils import logging

from ..data import ConversationDataset, count_answer_tokens
from ..decoding.requests import check_target
from ..drafters.dream.checks import check_fit
from ..drafters.eagle.drafter import EagleDrafter
from ..drafters.fit import describe_target
from ..drafters.vocabulary import check_draft_vocabulary, choose_draft_vocabulary
from ..targets.target import Target, end_ids, unwrap
from .arguments import DreamTrainingArguments
from .feature_cache import fingerprint_rows, fingerprint_weights
from .objective import Objective
from .target_features import FeatureExtractor, LayerSelection
from .ways import PAIRS, Way, way_of

logger = logging.get_logger(__name__)


def whole_weight(weight: Any) -> Any:
    """All of a weight that FSDP or ZeRO-3 spreads over processes; any other weight as it is."""
    if hasattr(weight, "full_tensor"):
        return weight.full_tensor()
    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()
    return weight


def check_models(drafter: Any, target: Any) -> None:
    """Refuse a drafter or a target that is none, and a pair that does not fit."""
    drafter = unwrap(drafter)
    way_of(drafter)
    if not isinstance(unwrap(target), PreTrainedModel):
        raise TypeError(f"`target` is a `{type(target).__name__}`; pass the loaded model that the drafter drafts for.")
    check_target(unwrap(target))
    if isinstance(drafter, EagleDrafter):
        check_trainable(drafter, unwrap(target))
        return
    check_fit(drafter, unwrap(target))
    drafter.config.check_drafting()


def check_trainable(drafter: EagleDrafter, target: PreTrainedModel) -> None:
    """Refuse an EAGLE drafter that is not trained here, or one that was made for another target."""
    config = drafter.config
    drafter.check(target, drafter.settings)
    if config.generation != 3 or config.image_rows != "token" or config.mrope_section is not None:
        raise ValueError(
            "Of EAGLE drafters those of `generation` 3 are trained, with `image_rows` 'token' and without `mrope_section`; "
            f"this one has {config.generation}, {config.image_rows!r} and {config.mrope_section}. Make one with "
            "`EagleDrafter.for_target(target)`."
        )


def prepare_drafter(drafter: Any, args: DreamTrainingArguments, peft_config: Any) -> Any:
    """The drafter as it is trained: float32 weights, the arguments' share of visual tokens, adapters if wanted."""
    config = unwrap(drafter).config
    asked = [name for name in ("visual_keep_ratio", "visual_importance") if getattr(args, name) is not None]
    if asked and isinstance(unwrap(drafter), EagleDrafter):
        raise ValueError(
            f"`{asked[0]}` ({getattr(args, asked[0])!r}) is for DREAM; an EAGLE drafter reads every token."
        )
    if args.visual_keep_ratio is not None:
        config.visual_keep_ratio = args.visual_keep_ratio  # so that decoding leaves out what training left out
    if args.visual_importance is not None:
        config.visual_importance = args.visual_importance
    if unwrap(drafter).dtype in (torch.float16, torch.bfloat16):
        logger.warning(
            f"The drafter's weights ({unwrap(drafter).dtype}) are trained and saved in float32, in which small updates are "
            "not lost; load them with `dtype=...` for decoding."
        )
        drafter = drafter.float()
    if peft_config is not None:
        from peft import get_peft_model

        drafter = get_peft_model(drafter, peft_config)
    return drafter


def check_vocabulary_request(drafter: Any, args: DreamTrainingArguments, train_dataset: Any, peft_config: Any) -> None:
    """Refuse a draft vocabulary that cannot be chosen, and a drafter whose own was never set."""
    drafter = unwrap(drafter)
    config, size = drafter.config, args.draft_vocab_size
    if size is None:
        check_draft_vocabulary(drafter.draft_token_ids, config.draft_vocab_size, config.vocab_size)
        return
    if size > config.vocab_size:
        raise ValueError(f"`draft_vocab_size` ({size}) exceeds the target's vocabulary ({config.vocab_size}).")
    if train_dataset is None:
        raise ValueError(f"`draft_vocab_size` ({size}) is chosen from the training answers; pass `train_dataset`.")
    if peft_config is not None:
        raise ValueError(
            f"`draft_vocab_size` ({size}) cannot be saved with adapters (`peft_config`): call `set_draft_vocabulary` on the "
            "drafter that they are merged into."
        )


def choose_vocabulary(
    drafter: Any,
    target: PreTrainedModel,
    processor: Any,
    dataset: ConversationDataset,
    args: DreamTrainingArguments,
    add_up: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Let a drafter draft the ends of answers and what is most frequent in those of `dataset`.

    Every process counts its share of the rows; `add_up` adds the counts of all.
    """
    size: Any = args.draft_vocab_size  # it has been asked for
    share = range(args.process_index, len(dataset), args.world_size)
    counts = add_up(count_answer_tokens(dataset, processor, drafter.config.vocab_size, share))
    tokenizer = getattr(processor, "tokenizer", processor)
    ends = end_ids(tokenizer) | end_ids(target.generation_config) | end_ids(drafter.config)
    token_ids = choose_draft_vocabulary(counts, size, sorted(ends))
    drafter.set_draft_vocabulary(token_ids)
    covered = counts[token_ids].sum() / counts.sum().clamp(min=1)
    logger.info(f"The {size:,} tokens that may be drafted make up {covered:.2%} of the training answers.")


def freeze(target: Any, args: DreamTrainingArguments) -> Any:
    """The target in evaluation mode, without gradients, on the device of training unless it has its own place."""
    if target.training:
        logger.warning("`target` was in training mode; it is put into evaluation mode, as in decoding.")
    target.eval().requires_grad_(False)
    is_placed = getattr(target, "hf_device_map", None) or getattr(target, "is_quantized", False)
    return target if is_placed else target.to(args.device)


def check_best_metric(args: DreamTrainingArguments, eval_dataset: Any) -> None:
    """With several evaluation sets the metric of the best checkpoint names one of them, as in transformers' Trainer.

    The default, which names none, is dropped where nothing asks for a best checkpoint.

    Raises:
        ValueError: A best checkpoint is wanted, or a metric is named, and it is of none of the sets.
    """
    metric = args.metric_for_best_model
    if not isinstance(eval_dataset, Mapping) or metric is None:
        return
    if any(metric.removeprefix("eval_").startswith(f"{name}_") for name in eval_dataset):
        return
    follows_metric = args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU
    is_wanted = args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST or follows_metric
    if is_wanted or metric != "eval_tau":
        raise ValueError(
            f"`metric_for_best_model` ({metric!r}) is of none of the sets in `eval_dataset` ({list(eval_dataset)}); name one, "
            f"for instance 'eval_{next(iter(eval_dataset))}_tau'."
        )
    args.metric_for_best_model = args.greater_is_better = None


def make_objective(args: DreamTrainingArguments, way: Way) -> Objective:
    """The objective that the arguments describe. What EAGLE puts out is compared with no feature of the target's."""
    values = {name: getattr(args, name) for name in Objective.__dataclass_fields__ if name != "way"}
    if args.feature_selection == "none" or way is PAIRS:
        values["mid_feature_loss_weight"] = 0.0
    if way is PAIRS:
        values["final_feature_loss_weight"] = 0.0
    return Objective(**values, way=way)


def make_selection(args: DreamTrainingArguments, target: Target, way: Way) -> LayerSelection:
    """The selection of intermediate features that the arguments describe; none where no loss wants them."""
    mode = args.feature_selection if make_objective(args, way).mid_feature_loss_weight else "none"
    return LayerSelection.make(
        mode, len(target.decoder.layers), args.candidate_depth, args.static_layer_index, args.static_layer_depth
    )


def describe_features(
    extractor: FeatureExtractor, processor: Any, max_length: int | None, data: Any
) -> dict[str, Any]:
    """Everything that cached features depend on, by the name a mismatch is reported under."""
    target = extractor.target.model
    tokenizer = getattr(processor, "tokenizer", processor)
    writes = [type(processor).__name__, getattr(processor, "chat_template", None), tokenizer.chat_template]
    writes += [sorted(tokenizer.get_vocab().items()), getattr(processor, "image_processor", None)]
    return {
        "target": describe_target(target.config) | {"weights": fingerprint_weights(target)},
        "processor": hashlib.blake2b(repr(writes).encode(), digest_size=16).hexdigest(),
        "data": fingerprint_rows(data.source.rows, len(data)),
        "feature_selection": [extractor.selection.mode, *extractor.selection.layers],
        "visual_keep_ratio": extractor.keep_ratio,
        "visual_importance": extractor.importance,
        **({"layers": extractor.layers} if extractor.has_placeholders else {}),
        "max_length": max_length,
    }
