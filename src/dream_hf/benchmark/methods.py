"""The ways of decoding that a benchmark compares, each as arguments of `generate()`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers.generation.configuration_utils import CompileConfig

from ..decoding import loop as generation
from ..drafters.dream.configuration import DreamConfig
from ..drafters.dream.drafter import DreamDrafter
from ..targets.target import VISUAL_TOKEN_IDS, unwrap

COMPILED_METHODS = ("plain_compiled", "dream_tree_compiled")
METHODS = ("plain", "plain_static", "prompt_lookup", "assisted", "dream_chain", "dream_tree", *COMPILED_METHODS)
PROMPT_LOOKUP_TOKENS = 10
BLIND = "dream_tree blind"
Tree = tuple[int, int, int]  # depth, top_k, size


@dataclass(frozen=True)
class Method:
    """
    One way of decoding.

    Args:
        name (`str`): What results call it.
        arguments (`Mapping`): For `generate()`.
        drafting (`Mapping`): Decoding defaults of the drafter that it changes while it runs.
        is_blind (`bool`): The drafter sees blanks in place of the prompt's visual tokens.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    drafting: Mapping[str, Any] = field(default_factory=dict)
    is_blind: bool = False

    @contextmanager
    def ready(
        self, target: Any, inputs: Mapping[str, Any], temperature: float, max_new_tokens: int
    ) -> Iterator[dict[str, Any]]:
        """All arguments for `generate()` at this temperature; the drafter is set up while in the block."""
        drafter = self.arguments.get("assistant_model")
        config = drafter.config if isinstance(drafter, DreamDrafter) else None
        before = {name: getattr(config, name) for name in self.drafting}
        for name, value in self.drafting.items():
            setattr(config, name, value)
        try:
            with blinded() if self.is_blind else nullcontext():
                yield {**self.arguments, **sampling(temperature), "max_new_tokens": max_new_tokens}
        finally:
            for name, value in before.items():
                setattr(config, name, value)


@contextmanager
def blinded() -> Iterator[None]:
    """Let drafters read zeros, embeddings and features alike, at the visual tokens of prompts.

    Not by hooks on the drafter's modules, which would make it decode more slowly.
    """
    original = generation.compress_text

    def blank(embeds: torch.Tensor, features: torch.Tensor, real: Any, is_visual: torch.Tensor, *how: Any) -> Any:
        is_text = ~is_visual[..., None]
        return original(embeds * is_text.to(embeds.device), features * is_text, real, is_visual, *how)

    generation.compress_text = blank  # type: ignore[assignment]
    try:
        yield
    finally:
        generation.compress_text = original


def sampling(temperature: float) -> dict[str, Any]:
    """Arguments for greedy decoding (0) or for drawing from the whole distribution at a temperature."""
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


def make_methods(
    names: Sequence[str],
    target: Any,
    drafter: DreamDrafter | None = None,
    assistant: Any = None,
    trees: Sequence[Tree] = (),
    keep_ratios: Sequence[float] = (),
    with_blind: bool = False,
) -> list[Method]:
    """The methods of a benchmark; plain decoding, which all are compared with, is always the first.

    Args:
        names (`Sequence[str]`): Out of `METHODS`.
        target (`PreTrainedModel`): What decodes.
        drafter (`DreamDrafter`, *optional*): For the DREAM methods; a `PeftModel` around one is looked through.
        assistant (`PreTrainedModel`, *optional*): For `"assisted"`, transformers' own assisted generation.
        trees (`Sequence[tuple]`): Further shapes (depth, top_k, size) to run the tree method with.
        keep_ratios (`Sequence[float]`): Further shares of the visual tokens to run the tree method with.
        with_blind (`bool`): Also run the tree method with the drafter's visual tokens blanked.

    Raises:
        ValueError: An unknown name, or a method whose model was not given.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ValueError(f"`methods` has {unknown}; there are {list(METHODS)}.")
    needs_drafter: list[Any] = [*(name for name in names if name.startswith("dream")), *trees, *keep_ratios]
    if with_blind:
        needs_drafter.append(BLIND)
    if needs_drafter and drafter is None:
        raise ValueError(f"`drafter` is needed for {needs_drafter}: name one, or leave these out.")
    if "assisted" in names and assistant is None:
        raise ValueError("`assistant` is needed for the method 'assisted': name one, or leave it out.")
    drafter = None if drafter is None else unwrap(drafter)  # type: ignore[assignment]
    methods = [_make(name, target, drafter, assistant) for name in METHODS if name in {*names, "plain"}]
    if drafter is not None:
        methods += [_tree(drafter, f"dream_tree {d}/{k}/{n}", _shape(drafter.config, d, k, n)) for d, k, n in trees]
        methods += [_tree(drafter, f"dream_tree keep={r:g}", _keep(drafter.config, r)) for r in keep_ratios]
    if with_blind:
        methods.append(replace(_tree(drafter, BLIND, {"visual_keep_ratio": 1.0}), is_blind=True))  # type: ignore[arg-type]
    return methods


def _make(name: str, target: Any, drafter: DreamDrafter | None, assistant: Any) -> Method:
    if name in ("plain_static", "plain_compiled"):
        compiling = {"compile_config": _compile_config()} if name == "plain_compiled" else {}
        return Method(name, {"cache_implementation": "static", **compiling})
    if name == "prompt_lookup":
        # It copies from the prompt, image placeholders included, which end in an error unless they are suppressed.
        suppressed = [*(target.generation_config.suppress_tokens or []), *_visual_token_ids(target)]
        return Method(name, {"prompt_lookup_num_tokens": PROMPT_LOOKUP_TOKENS, "suppress_tokens": suppressed or None})
    if name == "assisted":
        return Method(name, {"assistant_model": assistant})
    if name.startswith("dream"):
        assert drafter is not None  # checked by the caller
        depth = drafter.config.tree_depth
        if name == "dream_tree_compiled":
            return _tree(drafter, name, {"compile": True})
        return _tree(drafter, name, _shape(drafter.config, depth, 1, depth) if name == "dream_chain" else {})
    return Method(name)


def _compile_config() -> CompileConfig:
    """The default, on CPUs too, where transformers does not compile unless told so by a private attribute."""
    config = CompileConfig()
    config._compile_all_devices = True  # type: ignore[assignment]
    return config


def _visual_token_ids(target: Any) -> list[int]:
    token_ids = [getattr(unwrap(target).config, name, None) for name in VISUAL_TOKEN_IDS]
    return sorted({token_id for token_id in token_ids if isinstance(token_id, int)})


def _tree(drafter: DreamDrafter, name: str, drafting: Mapping[str, Any]) -> Method:
    return Method(name, {"assistant_model": drafter, "return_dict_in_generate": True}, drafting)


def _shape(config: DreamConfig, depth: int, top_k: int, size: int) -> dict[str, Any]:
    drafting = {"tree_depth": depth, "tree_top_k": top_k, "tree_size": size}
    _check(config, drafting)
    return drafting


def _keep(config: DreamConfig, ratio: float) -> dict[str, Any]:
    drafting = {"visual_keep_ratio": ratio}
    _check(config, drafting)
    return drafting


def _check(config: DreamConfig, drafting: Mapping[str, Any]) -> None:
    """Let the config judge values it would be given later on."""
    DreamConfig(**{**config.to_dict(), **drafting}).check_drafting()
