"""What `dream-hf train` runs: models and data by name, a [`DreamTrainer`], a drafter that describes its own training."""

# ruff: noqa: RUF009 - `_argument` is `dataclasses.field`

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Optional, Union

import torch
import yaml
from transformers import set_seed
from transformers.utils import logging

from ..drafters.dream.drafter import DreamDrafter
from ..drafters.dream.shape import MOST, suggested_shape, weight_ratio
from ..drafters.eagle.drafter import EagleDrafter
from ..drafters.new_drafters import check_config_names
from ..drafters.published_files import read_published_config
from ..load_models import load_models, load_saved
from .arguments import DreamTrainingArguments
from .trainer import DreamTrainer

logger = logging.get_logger(__name__)

RECIPE = "recipe.yaml"
NEW: dict[str, Any] = {"dream": DreamDrafter, "eagle3": EagleDrafter}  # by `drafter_type`


def _argument(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ModelDataArguments:
    """
    The models and the data of a training run; [`~transformers.HfArgumentParser`] reads them together with
    [`DreamTrainingArguments`].
    """

    target: str = field(metadata={"help": "Folder or Hub id of the target."})
    train_dataset: str = field(metadata={"help": "Rows to train on: a .jsonl, .json or .parquet file, or a Hub id."})
    eval_dataset: Optional[str] = _argument(None, "Rows to evaluate on.")  # noqa: UP045 - the parser wants this form
    drafter: Optional[str] = _argument(None, "Folder or Hub id of a drafter to go on from.")  # noqa: UP045
    drafter_type: str = _argument("dream", "Kind of a new drafter: dream or eagle3.")
    drafter_config: Union[dict, str, None] = _argument(  # noqa: UP007
        None, 'Fields of the config of a new drafter, as JSON: {"tree_depth": 8}.'
    )
    target_revision: Optional[str] = _argument(None, "Revision of the target on the Hub.")  # noqa: UP045
    target_dtype: str = _argument("auto", "Of the target: auto (its own), float32, bfloat16 or float16.")
    target_attn_implementation: Optional[str] = _argument(None, "The target's attention.")  # noqa: UP045
    target_quantization: Optional[str] = _argument(None, "4bit or 8bit: round the target's weights.")  # noqa: UP045
    target_device_map: Optional[str] = _argument(  # noqa: UP045
        None, "Spread the target over devices: auto, balanced, balanced_low_0 or sequential."
    )
    use_lora: bool = _argument(False, "Train LoRA adapters of `drafter` instead of its own weights.")
    lora_r: int = _argument(16, "Rank of the adapters.")
    lora_alpha: int = _argument(32, "Scale of the adapters.")
    lora_dropout: float = _argument(0.0, "Dropout of the adapters.")
    license: Optional[str] = _argument(None, "License of the drafter, for its card.")  # noqa: UP045
    datasets: Optional[list[str]] = _argument(None, "Hub ids of the data's sources, for the card.")  # noqa: UP045

    def __post_init__(self) -> None:
        if isinstance(self.drafter_config, str):
            try:
                self.drafter_config = json.loads(self.drafter_config)
            except json.JSONDecodeError as error:
                raise ValueError(f"`drafter_config` ({self.drafter_config!r}) is no JSON: {error}") from error
        if not isinstance(self.drafter_config, dict | None):
            raise ValueError(
                f'`drafter_config` ({self.drafter_config!r}) must be a mapping, like {{"tree_depth": 8}}.'
            )
        if self.drafter_type not in NEW:
            raise ValueError(f"`drafter_type` ({self.drafter_type!r}) must be {' or '.join(NEW)}.")
        check_config_names(NEW[self.drafter_type].config_class, self.drafter_config or {})
        if self.drafter_config and self.drafter is not None:
            raise ValueError(
                f"`drafter_config` ({self.drafter_config}) shapes a new drafter and `drafter` ({self.drafter!r}) names one "
                "there is; give one of them."
            )
        if self.use_lora and self.drafter is None:
            raise ValueError("`use_lora` (True) adapts a trained drafter; name it as `drafter`.")


def run_training(
    given: ModelDataArguments, args: DreamTrainingArguments, tell: Callable[[str], Any] = logger.info
) -> dict[str, float]:
    """Train, save to `args.output_dir` and evaluate.

    Args:
        given (`ModelDataArguments`): Models and data.
        args (`DreamTrainingArguments`): Everything else.
        tell (`Callable`): Hears what a step with a new drafter will read.

    Returns:
        `dict`: Metrics of the last evaluation; empty without `eval_dataset`.
    """
    set_seed(args.seed)
    models = load_models(
        given.target,
        dtype=given.target_dtype,
        device=None if given.target_device_map is not None and args.world_size == 1 else str(args.device),
        revision=given.target_revision,
        attn_implementation=given.target_attn_implementation,
        quantization=given.target_quantization,
        device_map=given.target_device_map,
    )
    shape: Any = given.drafter_config or {}  # JSON has been read
    drafter: Any = (
        NEW[given.drafter_type].for_target(models.target, **shape)
        if given.drafter is None
        else load_saved(given.drafter, read_published_config(given.drafter), torch.float32)
    )
    trainer = DreamTrainer(
        model=drafter.to(args.device),
        target=models.target,
        args=args,
        train_dataset=given.train_dataset,
        eval_dataset=given.eval_dataset,
        processing_class=models.processor,
        peft_config=_lora(given) if given.use_lora else None,
    )
    if isinstance(drafter, DreamDrafter) and given.drafter is None and trainer.is_world_process_zero():
        tell(shape_advice(models.target.config, drafter.config))
    trainer.train(resume_from_checkpoint=_resume(args))
    if trainer.is_world_process_zero():
        write_recipe(given, args)
    trainer.save_state()
    trainer.save_model()
    metrics = trainer.evaluate() if given.eval_dataset is not None else {}
    if metrics:
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    return metrics


def shape_advice(target_config: Any, config: Any) -> str:
    """What a step with a new drafter reads, and the options that make it read less where that is much."""
    try:
        ratio = weight_ratio(target_config, config)
    except ValueError as error:
        return f"What a step reads is not known: {error}"
    reads = f"A step with this drafter reads {ratio:.2f} times the weights of a plain one."
    if ratio <= MOST:
        return reads
    shape = suggested_shape(target_config)
    size = shape.pop("draft_vocab_size", None)
    options = f"--drafter_config '{json.dumps(shape)}'" + (f" --draft_vocab_size {size}" if size else "")
    return f"{reads} On an accelerator that is what it costs; {options} makes it cheaper (docs/speed.md)."


def write_recipe(given: ModelDataArguments, args: DreamTrainingArguments) -> Path:
    """Write what this run was started with as a recipe that starts it again; the drafter's card shows it."""
    # What other arguments would be by themselves, which for some depends on this machine.
    usual = vars(DreamTrainingArguments(output_dir=args.output_dir))
    values = _changed(given, {each.name: each.default for each in dataclasses.fields(given)})
    values |= {"output_dir": args.output_dir, **_changed(args, usual)}
    path = Path(args.output_dir or ".", RECIPE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def _changed(arguments: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that YAML can hold and that differ from `defaults`."""
    changed = {}
    for each in dataclasses.fields(arguments):
        value = getattr(arguments, each.name)
        is_plain = each.init and isinstance(value, str | int | float | list | dict)
        if is_plain and value != defaults.get(each.name):
            changed[each.name] = str(value.value) if isinstance(value, Enum) else value
    return changed


def _resume(args: DreamTrainingArguments) -> str | bool | None:
    """`resume_from_checkpoint`: a folder, or "true" for the last one of `output_dir`."""
    value = args.resume_from_checkpoint
    return True if str(value).lower() == "true" else value


def _lora(given: ModelDataArguments) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=given.lora_r, lora_alpha=given.lora_alpha, lora_dropout=given.lora_dropout, target_modules="all-linear"
    )
