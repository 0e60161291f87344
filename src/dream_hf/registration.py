"""Makes transformers know drafters: `generate(assistant_model=...)` and the Auto classes.

Importing transformers is cheap until its generation or Auto modules are touched, and importing dream_hf stays as cheap:
what is to be registered in a module is registered when that module is imported, or at once if it has been.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from os import PathLike
from types import ModuleType
from typing import Any

_GENERATION = "transformers.generation.utils"
_AUTO_CONFIG = "transformers.models.auto.configuration_auto"
_AUTO_MODEL = "transformers.models.auto.modeling_auto"

# Whether the drafter of the call that is being prepared reads its inputs.
_wants_inputs: ContextVar[bool] = ContextVar("dream_hf_wants_inputs", default=False)


def register() -> None:
    """Let transformers use drafters. Calling it twice is harmless."""
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
        for name, action in _ACTIONS.items():
            if name in sys.modules:
                action(sys.modules[name])


def unregister() -> None:
    """Take the hook out of `generate()` again. The Auto classes go on knowing drafters, which disturbs nobody."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    module = sys.modules.get(_GENERATION)
    if module is not None:
        for name in filter(lambda name: hasattr(module.GenerationMixin, name), _HOOKS):
            owner = _owner(module.GenerationMixin, name)
            hooked = owner.__dict__[name]
            if getattr(hooked, "_is_dream_hook", False):
                setattr(owner, name, hooked.__wrapped__)


def _hook_generation(module: ModuleType) -> None:
    for name, make in _HOOKS.items():
        if hasattr(module.GenerationMixin, name):
            _hook(_owner(module.GenerationMixin, name), name, make)


def _owner(mixin: type, name: str) -> type:
    """The class that defines a method of `GenerationMixin`."""
    return next(owner for owner in mixin.__mro__ if name in owner.__dict__)


def _hook(owner: type, name: str, make: Callable[[Callable], Callable]) -> None:
    original = owner.__dict__[name]
    if not getattr(original, "_is_dream_hook", False):
        hooked = wraps(original)(make(original))
        hooked._is_dream_hook = True  # type: ignore[attr-defined]
        setattr(owner, name, hooked)


def _dispatching(assisted_decoding: Callable) -> Callable:
    """`_assisted_decoding` that hands a drafter's calls to our loop and all others on."""

    def dispatch(self: Any, input_ids: Any, *args: Any, assistant_model: Any = None, **kwargs: Any) -> Any:
        drafter = _drafter_in(assistant_model)
        if drafter is None:
            return assisted_decoding(self, input_ids, *args, assistant_model=assistant_model, **kwargs)
        from .decoding.loop import dream_generate

        for name in ("inputs_tensor", "assistant_tokenizer", "tokenizer"):
            kwargs.pop(name, None)
        return dream_generate(self, input_ids, *args, **{**kwargs, "drafter": drafter})

    return dispatch


def _checking(validate_generation_mode: Callable) -> Callable:
    """`_validate_generation_mode` that first refuses what a drafter cannot serve, beam search among it."""

    def check(self: Any, generation_mode: Any, generation_config: Any, generation_mode_kwargs: dict[str, Any]) -> Any:
        assistant = generation_mode_kwargs.get("assistant_model")
        if isinstance(assistant, (str, PathLike)):
            raise TypeError(
                f"`assistant_model` ({str(assistant)!r}) is the name of a model; pass the model itself: "
                f"`DreamDrafter.from_pretrained({str(assistant)!r})` for a drafter."
            )
        drafter = _drafter_in(assistant)
        ours = drafter or _drafter_in(generation_mode_kwargs.get("drafter"))
        _wants_inputs.set(ours is not None and ours.needs.inputs)
        if drafter is not None:
            from .decoding.requests import check_request

            # What comes of it goes on to `_assisted_decoding`, which need not check again.
            generation_mode_kwargs["assistant_model"] = check_request(self, drafter, generation_config)
            # What follows asks an assistant for a config that drafters need not have.
            generation_mode_kwargs = {**generation_mode_kwargs, "assistant_model": None}
            if self._is_stateful:  # transformers' own assisted decoding takes no such target
                generation_mode = _unassisted(generation_mode, generation_config)
        return validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs)

    return check


def _unassisted(generation_mode: Any, generation_config: Any) -> Any:
    """The mode that a call would have without its assistant; others than assisted decoding stay what they are."""
    modes = type(generation_mode)
    if generation_mode != modes.ASSISTED_GENERATION:
        return generation_mode
    return modes.SAMPLE if generation_config.do_sample else modes.GREEDY_SEARCH


def _keeping_inputs(prepare: Callable) -> Callable:
    """`generate()` of transformers 5.24 encodes pictures and drops them; drafters that read them get them all the same."""

    def prepare_and_keep(self: Any, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        if not _wants_inputs.get():
            return prepare(self, model_kwargs)
        from .decoding.prompt import EncodedInputs

        given = dict(model_kwargs)
        prepared = prepare(self, model_kwargs)
        if given.get("mm_encoder_outputs") is None:
            encoded = prepared["mm_encoder_outputs"] = EncodedInputs(prepared["mm_encoder_outputs"])
            encoded.given = {name: value for name, value in given.items() if name not in prepared}
        return prepared

    return prepare_and_keep


def _refusing(generate_batch: Callable) -> Callable:
    """`generate_batch` (continuous batching) that refuses drafters; it would leave them unused without a word."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _drafter_in(kwargs.get("assistant_model")) is not None:
            name = type(kwargs["assistant_model"]).__name__
            raise ValueError(
                f"`assistant_model` is a `{name}`, and `generate_batch` (continuous batching) takes no assistant. Use "
                "`generate(assistant_model=drafter)`, which takes batches, or leave `assistant_model` out."
            )
        return generate_batch(self, *args, **kwargs)

    return refuse


_HOOKS: dict[str, Callable[[Callable], Callable]] = {
    "_assisted_decoding": _dispatching,
    "_validate_generation_mode": _checking,
    "_prepare_multimodal_encoder_kwargs_for_generation": _keeping_inputs,
    "generate_batch": _refusing,
}


def _drafter_in(model: Any) -> Any:
    """The drafter a user passed, be it wrapped by PEFT, or None for another assistant."""
    protocol = sys.modules.get(f"{__package__}.decoding.drafter")  # which every drafter's module has imported
    if protocol is None:
        return None
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return model if isinstance(model, protocol.Drafter) else None


def _register_config(module: ModuleType) -> None:
    from .drafters.dream.configuration import DreamConfig

    module.AutoConfig.register(DreamConfig.model_type, DreamConfig, exist_ok=True)


def _register_model(module: ModuleType) -> None:
    """Let the Auto classes know drafters.

    The drafter's module imports transformers' models, one of which may be what is being imported right now, so a stand-in
    is registered. When the module is imported, it registers the drafter itself.
    """
    if f"{__package__}.drafters.dream.drafter" in sys.modules:
        return
    from .drafters.dream.configuration import DreamConfig

    class DreamDrafterOnDemand:
        config_class = DreamConfig

        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            return _drafter_class().from_pretrained(*args, **kwargs)

        @classmethod
        def _from_config(cls, *args: Any, **kwargs: Any) -> Any:
            return _drafter_class()._from_config(*args, **kwargs)

    for auto_class in (module.AutoModel, module.AutoModelForCausalLM):
        auto_class.register(DreamConfig, DreamDrafterOnDemand, exist_ok=True)


def _drafter_class() -> Any:
    return importlib.import_module(f"{__package__}.drafters.dream.drafter").DreamDrafter


_ACTIONS: dict[str, Callable[[ModuleType], None]] = {
    _GENERATION: _hook_generation,
    _AUTO_CONFIG: _register_config,
    _AUTO_MODEL: _register_model,
}


class _AfterImport(MetaPathFinder):
    """Runs an action right after one of the modules in `_ACTIONS` has been imported.

    Importing these modules here instead would import torch, a second or more, for programs that need neither.
    """

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in _ACTIONS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            loader.exec_module = _followed_by(loader.exec_module, _ACTIONS[fullname])
        return spec


def _followed_by(exec_module: Callable[[ModuleType], None], action: Callable[[ModuleType], None]) -> Callable:
    def exec_and_act(module: ModuleType) -> None:
        exec_module(module)
        action(module)

    return exec_and_act


_finder = _AfterImport()
