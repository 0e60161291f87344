"""Compiled forwards: what can be compiled and how, the compiled functions themselves, and the shapes they see.

A compiled function belongs to a model and to settings; it is kept for as long as the model lives, so that only the first
`generate()` waits for the compiler. Where nothing can be compiled a warning says why, once, and the forward runs as it
would have without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.generation.configuration_utils import CompileConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Settings:
    """How to compile: what `torch.compile` takes.

    Args:
        backend (`str` or `Callable`): Compiler.
        mode (`str`, *optional*): What it aims for.
        fullgraph (`bool`): Whether code that needs more than one graph is an error.
        dynamic (`bool`, *optional*): Whether shapes may vary; by default those that do.
        options (`tuple`): Options of the backend, name and value each.
    """

    backend: str | Callable = "inductor"
    mode: str | None = "reduce-overhead"
    fullgraph: bool = True
    dynamic: bool | None = None
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def from_config(cls, config: CompileConfig) -> Settings:
        """The settings in transformers' `CompileConfig`."""
        options = tuple(sorted((config.options or {}).items()))
        return cls(config.backend, config.mode, config.fullgraph, config.dynamic, options)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `torch.compile`."""
        options = dict(self.options)
        if not options and self.backend == "inductor":  # other backends know no modes
            options = dict(torch._inductor.list_mode_options(self.mode or "default"))
        options.setdefault("guard_filter_fn", _matters)
        arguments = {"backend": self.backend, "fullgraph": self.fullgraph, "dynamic": self.dynamic, "options": options}
        if (
            "isolate_recompiles" in signature(torch.compile).parameters
        ):  # what was compiled for other models costs nothing
            arguments["isolate_recompiles"] = True
        return arguments


def _matters(guards: Any) -> list[bool]:
    """Which of dynamo's guards to keep: hundreds look at each call whether a drafter's parts are still what they were.

    A drafter's `forward` is made anew for every `generate()`, and out of plain parts only; its weights are read at each call.
    """
    return [not guard.name.startswith("forward.parts") for guard in guards]


@dataclass
class CompiledFunction:
    """A function of tensors, compiled at its first call; where the compiler fails, the function as it is.

    Args:
        function (`Callable`): What to compile. It must hold no reference to the model it belongs to.
        settings (`Settings`): How.
        watched (`set[str]`): Attention implementations with which the model was seen to use a tree's masks.
    """

    function: Callable
    settings: Settings
    is_broken: bool = False
    watched: set[str] = field(default_factory=set)
    compiled: Callable = field(init=False)

    def __post_init__(self):
        self.compiled = torch.compile(self.function, **self.settings.arguments())

    def __call__(self, *args: Any) -> Any:
        """Call the function; what an earlier call returned may be overwritten."""
        if not self.is_broken:
            torch.compiler.cudagraph_mark_step_begin()
            try:
                return self.compiled(*args)
            except compiler_errors() as error:
                self.is_broken = True
                reason = " ".join(str(error).split("\n")[:2])
                logger.warning(f"Decoding goes on uncompiled: {type(error).__name__}: {reason}")
        return self.function(*args)


def compiler_errors() -> tuple[type[Exception], ...]:
    """What a compiler raises that cannot cope, before anything has run."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return TorchDynamoException, FailOnRecompileLimitHit


_compiled: WeakKeyDictionary[nn.Module, dict[Any, CompiledFunction]] = WeakKeyDictionary()


def compiled_function(model: nn.Module, function: Callable, settings: Settings) -> CompiledFunction:
    """`function` compiled for a model, the same one at every call. It must not refer to the model, only take it.

    Compiled code looks at a module's weights and attributes before it runs, but not at its hooks: a model with other hooks
    gets another compiled function.
    """
    functions = _compiled.setdefault(model, {})
    key = (function, settings.backend, repr(settings), _hooks_of(model))
    if key not in functions:
        functions[key] = CompiledFunction(function, settings)
    return functions[key]


def _hooks_of(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Which modules have which hooks around their forward, by their ids."""
    return tuple(
        (id(module), hook)
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for hook in hooks
    )


def chosen_settings(is_wanted: bool, config: CompileConfig | None) -> Settings | None:
    """The settings to compile with, or None: those of `generate(compile_config=...)`, else the defaults if wanted."""
    if config is not None:
        return Settings.from_config(config)
    return Settings() if is_wanted else None


def missing_compiler(settings: Settings, device: torch.device) -> str | None:
    """Why the backend cannot compile for a device, or None."""
    if settings.backend != "inductor":
        return None
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "no C++ compiler was found (install g++ or clang, or name one in the environment variable CXX)"
    elif device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return "Triton, which compiles for this device, is not installed or does not support it"
    return None


def uncompilable(model: Any) -> str | None:
    """Why no forward of a model can be compiled, or None."""
    name = type(model).__name__
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return f"`{name}` is spread over several devices"
    if getattr(model, "hf_quantizer", None) is not None and not model.hf_quantizer.is_compileable:
        return f"the quantisation of `{name}` cannot be compiled"
    return None


def run_model(model: Any, inputs: dict[str, Any]) -> Any:
    """A forward that also returns the features: `hidden_states[-1]` is what the decoder's final norm makes."""
    return model(**inputs)
