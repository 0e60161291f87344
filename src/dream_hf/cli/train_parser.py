"""The parser of `dream-hf train`: our options first and explained, transformers' own behind `--help-all`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from ..training.arguments import DreamTrainingArguments
from ..training.run import ModelDataArguments
from .options import Parser

# Of transformers' some hundred options, those that most trainings set.
USUAL = (
    "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "adam_beta2", "max_grad_norm", "bf16", "use_cpu", "seed",
    "logging_steps", "report_to", "eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit",
    "load_best_model_at_end", "metric_for_best_model", "resume_from_checkpoint", "push_to_hub", "hub_model_id",
)  # fmt: skip
USAGE = "dream-hf train [RECIPE.yaml] [--OPTION VALUE ...]"


class TrainParser(HfArgumentParser, Parser):
    """
    Reads [`ModelDataArguments`] and [`DreamTrainingArguments`]; whole names only.

    Args:
        description, epilog (`str`): Of the help.
    """

    def __init__(self, description: str, epilog: str) -> None:
        read: Any = [ModelDataArguments, DreamTrainingArguments]
        super().__init__(
            read,
            prog="dream-hf train",
            usage=USAGE,
            description=description,
            epilog=epilog,
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        nothing: Any = argparse.SUPPRESS
        self.add_argument("--help-all", action=_HelpAll, nargs=0, dest=nothing, default=nothing)

    @property
    def options(self) -> dict[str, argparse.Action]:
        """The option of every field, by its name; of `--bf16` and `--no_bf16` the former."""
        fields = {each.name for dtype in self.dataclass_types for each in dataclasses.fields(dtype)}
        found: dict[str, argparse.Action] = {}
        for action in self._actions:
            if action.dest in fields:
                found.setdefault(action.dest, action)
        return found

    def format_help(self, with_all: bool = False) -> str:
        """The options in groups; of transformers' only the usual ones, unless all are wanted."""
        options = self.options
        given = [each.name for each in dataclasses.fields(ModelDataArguments)]
        theirs = {each.name for each in dataclasses.fields(TrainingArguments)}
        groups = {
            "models and data": given,
            "training a drafter": [name for name in options if name not in {*given, *theirs}],
            "transformers' TrainingArguments, those most often set": USUAL,
        }
        rest = [name for name in options if name in theirs and name not in USUAL]
        more = f"and {len(rest)} more of transformers' TrainingArguments: `dream-hf train --help-all` shows them."
        if with_all:
            groups["the rest of transformers' TrainingArguments"] = rest
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        for title, names in groups.items():
            formatter.start_section(title)
            formatter.add_arguments([options[name] for name in names])
            formatter.end_section()
        formatter.add_text(None if with_all else more)
        formatter.add_text(self.epilog)
        return formatter.format_help()


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """One spelling and one placeholder for each option, and its default."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        choices = "{" + ",".join(map(str, action.choices or ())) + "}"
        return f"{action.option_strings[0]} {choices if 2 < len(choices) <= 60 else 'VALUE'}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.required:
            return f"{text} Needed."
        is_silent = action.default in (None, argparse.SUPPRESS) or "default" in text
        return text if is_silent else f"{text} (default: {getattr(action.default, 'value', action.default)})"


class _HelpAll(argparse.Action):
    def __call__(self, parser: Any, *_: Any) -> None:
        print(parser.format_help(with_all=True), end="")
        parser.exit()
