"""Entry point of `target.generate(**inputs, custom_generate="<this repo>", trust_remote_code=True)`.

transformers runs this file in place of `generate()`. It loads the drafter that lies next to it, once for each target, and
calls `generate()` again with that drafter as the assistant. In a target's own folder or repo, where the drafter lies in
`drafter/`, a target that is loaded with `trust_remote_code=True` decodes with it by itself. Needs `dream-hf` installed; written
by `save_pretrained` and `dream-hf attach`.
"""

import json
import os
import re
import sys
import weakref
from pathlib import Path

from huggingface_hub import snapshot_download

from dream_hf import DreamDrafter, load_drafter

LOADING_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
BESIDE, SETTINGS = "drafter", "draft_settings.json"  # where a target's repo has its drafter, and how it is to draft

# target -> (key, drafter): a drafter is kept as long as its target, so that only the first call loads it.
_drafters: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def generate(inputs=None, *, model, drafter=None, **kwargs):
    """`model.generate(inputs, **kwargs)` with the drafter of this repo; any argument of `generate()`, and how to load the repo.

    Args:
        inputs (`torch.Tensor`, *optional*): As in `generate()`.
        model (`PreTrainedModel`): The target.
        drafter (`Drafter`, *optional*): A loaded drafter to use instead of the one in this repo.
        **kwargs: Arguments of `generate()`, and any of `LOADING_ARGUMENTS`.
    """
    loading = {name: kwargs.pop(name) for name in LOADING_ARGUMENTS if name in kwargs}
    if kwargs.pop("assistant_model", None) is not None:
        raise ValueError("`assistant_model` was given together with `custom_generate`; leave one of the two out.")
    if drafter is None:
        # transformers passes every argument but the name of this repo, which is still a local of its `generate()`. A target
        # that was loaded from this repo calls without: it knows itself where it is from.
        source = sys._getframe(1).f_locals.get("custom_generate")
        is_own = not isinstance(source, (str, os.PathLike))
        source = model.name_or_path if is_own else os.fspath(source)
        if not source:
            raise ValueError(
                "The repo of the drafter is unknown in this call; pass `drafter=DreamDrafter.from_pretrained(...)`."
            )
        drafter = _load_once(model, source, loading, is_own)
    return type(model).generate(model, inputs, assistant_model=drafter, **kwargs)


def _load_once(model, source, loading, is_beside):
    if os.path.isdir(source):
        is_beside = os.path.isdir(os.path.join(source, BESIDE))
        files = Path(source, BESIDE if is_beside else "").glob("*.safetensors")
        version, loading = tuple(sorted((path.name, path.stat().st_mtime_ns) for path in files)), {}
    else:
        # This file is imported as transformers_modules.<owner>.<name>.<commit>.custom_generate.generate: the weights have
        # to come from the same commit.
        version = next(part for part in reversed(__name__.split(".")) if re.fullmatch("[0-9a-f]{40}", part))
        loading = {**loading, "revision": version}
    key = (source, version, model.dtype, model.device)
    if _drafters.get(model, (None,))[0] != key:
        _drafters[model] = (key, _load(model, source, loading, is_beside))
    return _drafters[model][1]


def _load(model, source, loading, is_beside):
    if not is_beside:
        return DreamDrafter.from_pretrained(source, dtype=model.dtype, **loading).to(model.device)
    if not os.path.isdir(source):
        source = snapshot_download(source, allow_patterns=f"{BESIDE}/*", **loading)
    drafter, settings = load_drafter(os.path.join(source, BESIDE), model), Path(source, BESIDE, SETTINGS)
    return drafter.with_settings(**json.loads(settings.read_text("utf-8"))) if settings.is_file() else drafter
