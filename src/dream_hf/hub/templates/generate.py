"""Entry point of `target.generate(**inputs, custom_generate="<this repo>", trust_remote_code=True)`.

transformers runs this file in place of `generate()`. It loads the drafter that lies next to it, once for each target, and
calls `generate()` again with that drafter as the assistant. Needs `dream-hf` installed; written by `save_pretrained`.
"""

import os
import re
import sys
import weakref
from pathlib import Path

from dream_hf import DreamDrafter

LOADING_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")

# target -> (key, drafter): a drafter is kept as long as its target, so that only the first call loads it.
_drafters: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def generate(model, drafter=None, **kwargs):
    """`model.generate(**kwargs)` with the drafter of this repo; any argument of `generate()`, and how to load the repo.

    Args:
        model (`PreTrainedModel`): The target.
        drafter (`DreamDrafter`, *optional*): A loaded drafter to use instead of the one in this repo.
        **kwargs: Arguments of `generate()`, and any of `LOADING_ARGUMENTS`.
    """
    loading = {name: kwargs.pop(name) for name in LOADING_ARGUMENTS if name in kwargs}
    if kwargs.pop("assistant_model", None) is not None:
        raise ValueError("`assistant_model` was given together with `custom_generate`; leave one of the two out.")
    if drafter is None:
        # transformers passes every argument but the name of this repo, which is still a local of its `generate()`.
        source = sys._getframe(1).f_locals.get("custom_generate")
        if not isinstance(source, (str, os.PathLike)):
            raise ValueError(
                "The repo of the drafter is unknown in this call; pass `drafter=DreamDrafter.from_pretrained(...)`."
            )
        drafter = _load_once(model, os.fspath(source), loading)
    return model.generate(assistant_model=drafter, **kwargs)


def _load_once(model, source, loading):
    if os.path.isdir(source):
        version = tuple(sorted((path.name, path.stat().st_mtime_ns) for path in Path(source).glob("*.safetensors")))
        loading = {}
    else:
        # This file is imported as transformers_modules.<owner>.<name>.<commit>.custom_generate.generate: the weights have
        # to come from the same commit.
        version = next(part for part in reversed(__name__.split(".")) if re.fullmatch("[0-9a-f]{40}", part))
        loading = {**loading, "revision": version}
    key = (source, version, model.dtype, model.device)
    if _drafters.get(model, (None,))[0] != key:
        drafter = DreamDrafter.from_pretrained(source, dtype=model.dtype, **loading).to(model.device)
        _drafters[model] = (key, drafter)
    return _drafters[model][1]
