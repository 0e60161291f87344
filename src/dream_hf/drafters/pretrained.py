"""Saving, loading and publishing as every transformers model does it, but strict: `StrictPreTrainedModel`."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..hub.downloads import HUB_ARGUMENTS
from ..hub.model_card import library_versions, write_card
from ..hub.publishing import add_custom_generate, collect_files, commit_files, create_repo
from .checkpoint_files import (
    INDEX,
    WEIGHTS,
    check_shapes,
    load_config,
    open_checkpoint,
    read_tensor,
    refuse_keys,
    with_variant,
)
from .vocabulary import check_token_ids


class StrictPreTrainedModel(PreTrainedModel):
    """A `PreTrainedModel` that loads safetensors only, and only exactly the tensors its config asks for."""

    config_class: Any
    config: Any

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args: Any, config=None, **kwargs: Any):
        """Load a drafter from a folder or from the Hub.

        Takes every argument of [`~transformers.PreTrainedModel.from_pretrained`] that makes sense for safetensors:
        `revision`, `subfolder`, `variant`, `dtype`, `device_map`, `local_files_only`, `token`, `cache_dir`, ..., and
        the fields of its config to override.

        Raises:
            OSError: The Hub refused, could not be reached or broke off, or a file is damaged.
            ValueError: The checkpoint is no drafter, is pickled, or its tensors are not those of its config.
        """
        source = pretrained_model_name_or_path
        _refuse_other_formats(source, kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        if source is not None:
            hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            checkpoint = open_checkpoint(source, cls.config_class.model_type, kwargs.get("variant"), **hub)
            # What follows finds every file in the cache, at the very commit that has been checked.
            kwargs.update(revision=checkpoint.revision or "main", force_download=False)
            if not isinstance(config, PreTrainedConfig):
                hub.update(revision=checkpoint.revision, force_download=False)
                config = load_config(
                    cls.config_class, config or source, **hub, **_pop_config_fields(cls.config_class, kwargs)
                )
            # Checked once more, as overrides are set after the config has checked itself.
            config.check()
            check_shapes(source, checkpoint.shapes, cls.expected_shapes(config))
            if config.draft_vocab_size is not None:
                check_token_ids(read_tensor(checkpoint, "draft_token_ids"), config.vocab_size)
        loaded: Any = super().from_pretrained(
            source, *model_args, config=config, use_safetensors=True, output_loading_info=True, **kwargs
        )
        model, info = loaded
        refuse_keys(source or "state_dict", info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
        return (model, info) if wants_info else model

    def get_input_embeddings(self) -> Any:
        """The drafter's own table, which peft asks for; None where the target's is borrowed."""
        return getattr(self, "embed_tokens", None)

    def get_output_embeddings(self) -> Any:
        """The drafter's own head, which peft asks for; None where the target's is borrowed."""
        return getattr(self, "lm_head", None)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save the weights as safetensors, the config, a model card and `custom_generate/`.

        Takes every argument of [`~transformers.PreTrainedModel.save_pretrained`]. A README.md in the folder that was
        written by hand is left alone.
        """
        if kwargs.pop("safe_serialization", True) is not True:
            raise ValueError(
                "`safe_serialization` (False) would write a pickle; drafters are saved as safetensors only."
            )
        hub = {name: kwargs.pop(name) for name in ("commit_message", "create_pr") if name in kwargs}
        repo_id, private = kwargs.pop("repo_id", None), kwargs.pop("private", None)
        self.config.library_versions = library_versions()
        super().save_pretrained(save_directory, *args, **kwargs)
        is_main_process = args[0] if args else kwargs.get("is_main_process", True)
        if not is_main_process:
            return
        _remove_older_weights(save_directory, kwargs.get("variant"))
        write_card(save_directory, self.config, repo_id)
        add_custom_generate(save_directory)
        if push_to_hub:
            token = kwargs.get("token")
            repo_id = create_repo(repo_id or os.path.basename(os.path.normpath(save_directory)), private, token)
            commit_files(repo_id, collect_files(save_directory, repo_id), token=token, **hub)

    def push_to_hub(  # type: ignore[override]  # transformers' own is hidden behind a `*args, **kwargs` wrapper
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
    ) -> str:
        """Save the drafter and upload it; the arguments are those of `PreTrainedModel.push_to_hub`.

        Returns:
            `str`: Address of the commit, or of the pull request with `create_pr`.
        """
        repo_id = create_repo(repo_id, private, token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return commit_files(
                repo_id,
                collect_files(folder, repo_id, tags=tags or ()),
                commit_message=commit_message,
                commit_description=commit_description,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    @classmethod
    def expected_shapes(cls, config: PreTrainedConfig) -> dict[str, torch.Size]:
        """Shapes of the state dict of a model with this config, which is not given any memory.

        Raises:
            ValueError: No model can be built from the config.
        """
        try:
            with torch.device("meta"):
                return {name: tensor.shape for name, tensor in cls(config).state_dict().items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"No drafter can be built from this config: {type(error).__name__} {error}.") from error


def _refuse_other_formats(source: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.pop("use_safetensors", None) is False:
        raise ValueError(
            "`use_safetensors` (False) would read a pickle; drafters are loaded from safetensors only. A published "
            f"pickle has to go through `dream-hf convert {source} DESTINATION`."
        )
    for name in ("gguf_file", "key_mapping", "ignore_mismatched_sizes"):
        if kwargs.pop(name, None):
            raise ValueError(
                f"`{name}` is not for drafters: they are loaded from safetensors, with exactly their keys."
            )


def _remove_older_weights(folder: str | os.PathLike, variant: str | None) -> None:
    """Of a single weights file and an index of shards, remove what an earlier save left: loading would prefer the file."""
    both = [Path(folder, with_variant(name, variant)) for name in (WEIGHTS, INDEX)]
    if all(path.is_file() for path in both):
        min(both, key=lambda path: path.stat().st_mtime_ns).unlink()


def _pop_config_fields(config_class: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the arguments that override fields of the config, as transformers allows."""
    fields = {field.name for field in dataclasses.fields(config_class)} - {"dtype"}
    return {name: kwargs.pop(name) for name in sorted(fields & kwargs.keys())}
