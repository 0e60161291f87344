"""The ways of decoding that a benchmark compares, each as arguments of `generate()`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from transformers.generation.configuration_utils import CompileConfig

from ..decoding.drafter import Drafter
from ..drafters.combined import CombinedDrafter
from ..drafters.dream.drafter import DreamDrafter
from ..drafters.dream.reading import Reading
from ..drafters.model.drafter import ModelDrafter
from ..drafters.retrieval.drafter import RetrievalDrafter
from ..drafters.skip.drafter import LayerSkipDrafter
from ..targets.target import VISUAL_TOKEN_IDS, unwrap
from .blind import BlindDrafter

COMPILED_METHODS = ("plain_compiled", "dream_tree_compiled")
RETRIEVAL, RETRIEVAL_DREAM, MODEL, SKIP = "retrieval", "retrieval+dream", "model", "skip"
UNTRAINED_METHODS = (RETRIEVAL, RETRIEVAL_DREAM, MODEL, SKIP)
METHODS: tuple[str, ...] = ("plain", "plain_static", "prompt_lookup", "assisted", "dream_chain", "dream_tree")
METHODS += COMPILED_METHODS + UNTRAINED_METHODS
PROMPT_LOOKUP_TOKENS = 10
BLIND = "dream_tree blind"
READING = [field.name for field in fields(Reading)]
Tree = tuple[int, int, int]  # depth, top_k, size


@dataclass(frozen=True)
class Method:
    """
    One way of decoding.

    Args:
        name (`str`): What results call it.
        arguments (`Mapping`): For `generate()`.
        drafting (`Mapping`): How its drafter drafts and what it reads, where that is not as the drafter's config says.
        is_blind (`bool`): The drafter sees blanks in place of the prompt's visual tokens.
        is_further (`bool`): Its drafter is not the benchmark's own, and is described under the method's name.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    drafting: Mapping[str, Any] = field(default_factory=dict)
    is_blind: bool = False
    is_further: bool = False

    def ready(self, temperature: float, max_new_tokens: int) -> dict[str, Any]:
        """All arguments for `generate()` at this temperature; the drafter among them drafts as the method says."""
        arguments = {**self.arguments, **sampling(temperature), "max_new_tokens": max_new_tokens}
        drafter = arguments.get("assistant_model")
        if isinstance(drafter, DreamDrafter):
            arguments["assistant_model"] = self._set_up(drafter)
        return arguments

    def _set_up(self, drafter: DreamDrafter) -> Drafter:
        """The drafter as this method has it; the one it was made from is not changed."""
        reading = {name: value for name, value in self.drafting.items() if name in READING}
        settings = {name: value for name, value in self.drafting.items() if name not in READING}
        made: Drafter = drafter.with_reading(**reading) if reading else drafter
        made = made.with_settings(**settings) if settings else made
        return BlindDrafter(made) if self.is_blind else made


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
    further: Mapping[str, Drafter] | None = None,
) -> list[Method]:
    """The methods of a benchmark; plain decoding, which all are compared with, is always the first.

    Args:
        names (`Sequence[str]`): Out of `METHODS`.
        target (`PreTrainedModel`): What decodes.
        drafter (`DreamDrafter`, *optional*): For the DREAM methods; a `PeftModel` around one is looked through.
        assistant (`PreTrainedModel`, *optional*): For `"assisted"`, transformers' own assisted generation, and `"model"`.
        trees (`Sequence[tuple]`): Further shapes (depth, top_k, size) to run the tree method with.
        keep_ratios (`Sequence[float]`): Further shares of the visual tokens to run the tree method with.
        with_blind (`bool`): Also run the tree method with the drafter's visual tokens blanked.
        further (`Mapping`, *optional*): Drafters of any kind, each a method of its name that drafts as its config says.

    Raises:
        ValueError: An unknown name, a method whose model was not given, or a further one whose name is taken.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ValueError(f"`methods` has {unknown}; there are {list(METHODS)}.")
    needs_drafter: list[Any] = [*(name for name in names if "dream" in name), *trees, *keep_ratios]
    if with_blind:
        needs_drafter.append(BLIND)
    if needs_drafter and drafter is None:
        raise ValueError(f"`drafter` is needed for {needs_drafter}: name one, or leave these out.")
    for name in ("assisted", MODEL):
        if name in names and assistant is None:
            raise ValueError(f"`assistant` is needed for the method {name!r}: name one, or leave it out.")
    drafter = None if drafter is None else unwrap(drafter)  # type: ignore[assignment]
    methods = [_make(name, target, drafter, assistant) for name in METHODS if name in {*names, "plain"}]
    if drafter is not None:
        methods += [_tree(drafter, f"dream_tree {d}/{k}/{n}", _shape(d, k, n)) for d, k, n in trees]
        methods += [_tree(drafter, f"dream_tree keep={r:g}", {"visual_keep_ratio": r}) for r in keep_ratios]
    if with_blind:
        methods.append(replace(_tree(drafter, BLIND, {"visual_keep_ratio": 1.0}), is_blind=True))  # type: ignore[arg-type]
    for name, other in (further or {}).items():
        if name in METHODS or any(method.name == name for method in methods):
            raise ValueError(f"`further` has {name!r}, which is a method already; choose another name.")
        other.check(target, other.settings)
        methods.append(Method(name, drafted(other), is_further=True))
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
        return _tree(drafter, name, _shape(depth, 1, depth) if name == "dream_chain" else {})
    untrained = _untrained(name, target, drafter, assistant)
    return Method(name) if untrained is None else Method(name, drafted(untrained))


def _untrained(name: str, target: Any, drafter: DreamDrafter | None, assistant: Any) -> Drafter | None:
    """The drafter of a method that needs no training of its own; None for a method that is none of these."""
    if name == RETRIEVAL:
        return RetrievalDrafter()
    if name == RETRIEVAL_DREAM:
        assert drafter is not None  # checked by the caller
        return CombinedDrafter([RetrievalDrafter(), drafter])
    if name == MODEL:
        return ModelDrafter(unwrap(assistant))
    return LayerSkipDrafter(target) if name == SKIP else None


def drafted(drafter: Drafter) -> dict[str, Any]:
    """Arguments for decoding with a drafter that are there whatever the temperature."""
    return {"assistant_model": drafter, "return_dict_in_generate": True}


def _compile_config() -> CompileConfig:
    """The default, on CPUs too, where transformers does not compile unless told so by a private attribute."""
    config = CompileConfig()
    config._compile_all_devices = True  # type: ignore[assignment]
    return config


def _visual_token_ids(target: Any) -> list[int]:
    token_ids = [getattr(unwrap(target).config, name, None) for name in VISUAL_TOKEN_IDS]
    return sorted({token_id for token_id in token_ids if isinstance(token_id, int)})


def _tree(drafter: DreamDrafter, name: str, drafting: Mapping[str, Any]) -> Method:
    """A method with the drafter; a `ValueError` for values that it cannot draft with."""
    method = Method(name, drafted(drafter), drafting)
    drafter.config.check_width(method._set_up(drafter).settings)
    return method


def _shape(depth: int, top_k: int, size: int) -> dict[str, Any]:
    return {"tree_depth": depth, "tree_top_k": top_k, "tree_size": size}
