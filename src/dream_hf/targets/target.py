"""All that drafting needs to know of a target: embeddings, head, features, visual tokens.

The only module that looks inside target models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .attention_statistics import ArgumentRecord, note_arguments
from .hooks import after_own_forwards
from .recurrence import STATE_KINDS, STATELESS_KINDS, state_mixers, trees_of_states
from .reduced_head import reduced_head
from .rotary import is_length_dependent, plain_angles
from .tree_masks import current_tree, takes_tree_masks, text_attentions, tree_masks_available

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
PER_TOKEN = ("input_ids", "position_ids", *TOKEN_TYPES)  # arguments with an entry for every token

ATTENTIONS = ("self_attn", "mixer")  # as families call it
VISUAL_TOKEN_IDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")

# Families that drop `position_ids` in decoding and then take a token's cache slot for its position, padding included.
PLACES_BY_SLOT = ("exaone4_5", "hyperclovax_vision_v2")


@dataclass
class DecoderRecord:
    """What went through a text decoder while recording, forward after forward.

    Args:
        embeds (`list[torch.Tensor]`): Embeddings that entered, images merged, each (B, T, H).
        features (`list[torch.Tensor]`): Features after the final norm, each (B, T, H).
        positions (`list[torch.Tensor]`): Positions, each (B, T) or (3, B, T).
    """

    embeds: list[torch.Tensor] = field(default_factory=list)
    features: list[torch.Tensor] = field(default_factory=list)
    positions: list[torch.Tensor] = field(default_factory=list)

    def take(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Embeddings and features of all tokens since the last call, (B, T, ...); None for what is not recorded."""
        embeds, features = _joined(self.embeds), _joined(self.features)
        self.clear()
        return embeds, features

    def take_positions(self) -> torch.Tensor | None:
        """Positions of all tokens since the last call of `take`; None where none were given or recorded."""
        return torch.cat(self.positions, dim=-1) if self.positions else None

    def take_first(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The same of the first forward since the last call; others are forgotten."""
        self.embeds, self.features = self.embeds[:1], self.features[:1]
        return self.take()

    def clear(self) -> None:
        """Forget what has been recorded."""
        self.embeds, self.features, self.positions = [], [], []


def _joined(parts: list[torch.Tensor]) -> torch.Tensor | None:
    if len(parts) < 2:
        return parts[0] if parts else None
    return torch.cat(parts, dim=1)


_record: ContextVar[DecoderRecord | None] = ContextVar("dream_hf_record", default=None)


class Target:
    """View of a target model, vision-language or text-only. Holds no weights and changes nothing.

    Args:
        model (`PreTrainedModel`): The model; a `PeftModel` is looked through.

    Raises:
        TypeError: The model has no text decoder, embedding or head to lend.
    """

    def __init__(self, model: PreTrainedModel):
        self.model: Any = unwrap(model)
        self.text_config: PreTrainedConfig = self.model.config.get_text_config(decoder=True)
        self.decoder: Any = text_decoder(self.model)
        self.embedding: nn.Module = self.model.get_input_embeddings()
        self.lm_head: nn.Module = self.model.get_output_embeddings()
        self.logit_rule = LogitRule()
        self.noted: ArgumentRecord | None = None
        missing = [
            name
            for name, part in (("input embedding", self.embedding), ("LM head", self.lm_head))
            if not isinstance(part, nn.Module)
        ]
        if missing:
            raise TypeError(
                f"`{type(self.model).__name__}` cannot be a target: it has no {' and no '.join(missing)}. "
                "Pass a decoder-only causal or image-text-to-text model."
            )

    @property
    def last_attention(self) -> nn.Module:
        """The attention module of the last decoder layer that attends."""
        mixers = state_mixers(self.decoder)
        modules = (getattr(layer, name, None) for layer in reversed(self.decoder.layers) for name in ATTENTIONS)
        return next(module for module in modules if module is not None and module not in mixers)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings (..., H) of text tokens, as they enter the decoder."""
        return self.embedding(token_ids)

    def unusable_ids(self) -> torch.Tensor | None:
        """Tokens (n,) whose embedding is NaN or infinite, or None: a draft of one would spoil the whole tree.

        A masked key counts nothing, but nothing times NaN is NaN. Embeddings that keep no plain weight are not looked at.
        """
        tables = [
            module for name, module in self.decoder.named_modules() if name.split(".")[-1].startswith("embed_tokens")
        ]
        spoilt = [ids for table in {self.embedding, *tables} if (ids := spoilt_rows(table)) is not None]
        return torch.cat([ids.cpu() for ids in spoilt]) if spoilt else None

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """The target's logits (..., V) for features (..., H) in float32, scaling and soft-capping included."""
        return self.logit_rule(self.lm_head(features).float())

    def draft_logits(self, drafter: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        """`logits` as a drafter drafts from them: of its `draft_token_ids` alone, (..., H) -> (..., R), or of all tokens.

        What is returned holds the head as it is now; ask again for the next `generate()`.
        """
        if drafter.draft_token_ids is None:
            return self.logits
        head = reduced_head(self.lm_head, drafter.draft_token_ids, drafter)
        return lambda features: self.logit_rule(head(features).float())

    def learn_logit_rule(self, features: torch.Tensor, logits: torch.Tensor) -> None:
        """Find out what the target does to its head's output, from features (B, H) and the logits (B, V) it made of them.

        Which class applies which setting of its configuration is not written down anywhere (Gemma3 soft-caps as a text
        model and does not as a vision-language model), but one prefill shows it.
        """
        rules = logit_rules(self.text_config)
        if len(rules) == 1:
            self.logit_rule = rules[0]
            return
        self.logit_rule = best_logit_rule(rules, self.lm_head(features).float(), logits.float())

    def is_visual(self, input_ids: torch.Tensor) -> torch.Tensor:
        """True at image and video tokens, same shape as `input_ids`."""
        return torch.isin(input_ids, torch.tensor(self.visual_ids, dtype=torch.long, device=input_ids.device))

    @property
    def visual_ids(self) -> list[int]:
        """Placeholders of images and videos; none in a text-only target."""
        token_ids = [getattr(self.model.config, name, None) for name in VISUAL_TOKEN_IDS]
        return [token_id for token_id in token_ids if isinstance(token_id, int)]

    def mark_answers(self, inputs: dict[str, Any], answer_mask: torch.Tensor) -> dict[str, Any]:
        """`inputs` of a whole conversation such that its answers (B, T) are read as generated text would be.

        PaliGemma reads its prompt both ways and tells what follows by token type; every other family needs nothing.
        """
        if not self.model.config.model_type.startswith("paligemma"):
            return inputs
        started = answer_mask.to(inputs["input_ids"].device).long().cumsum(-1).clamp(max=1)
        return {**inputs, "token_type_ids": started}

    def own_positions(self, slots: torch.Tensor) -> torch.Tensor:
        """Positions of tokens in cache `slots` (B, N) for a family that ignores the positions it is given."""
        if self.model.config.model_type not in PLACES_BY_SLOT:
            raise ValueError(
                f"`{type(self.model).__name__}` dropped the `position_ids` of a draft tree when preparing its inputs. Use "
                "another target, or generate without `assistant_model`."
            )
        return slots

    @property
    def rescaled_attentions(self) -> list[Any]:
        """Attention modules that need hooks to take trees (Llama4's).

        Raises:
            ValueError: Not all layers that the configuration has scaled were found.
        """
        if not getattr(self.text_config, "attn_temperature_tuning", False):
            return []
        modules: Iterator[Any] = self.decoder.modules()
        scaled = [m for m in modules if getattr(m, "attn_temperature_tuning", False) and not m.use_rope]
        num_wanted = sum(not has_rope for has_rope in self.text_config.no_rope_layers)
        if len(scaled) != num_wanted:
            raise ValueError(
                f"`{type(self.model).__name__}` has `attn_temperature_tuning` in {num_wanted} layers, and the queries of "
                f"{len(scaled)} could be found; use another target, or generate without `assistant_model`."
            )
        return scaled

    @property
    def length_dependent_rotaries(self) -> list[nn.Module]:
        """Rotary embeddings whose angles depend on the text's length (`rope_type="dynamic"`, `"longrope"`)."""
        return [module for module in self.decoder.modules() if is_length_dependent(module)]

    @contextmanager
    def taking_trees(self) -> Iterator[None]:
        """Let the model verify trees while in the block, whatever its attention implementation and family.

        Where another implementation has to stand in, which one depends on what was passed on while `recording`.
        """
        attentions = {module.q_proj: module for module in self.rescaled_attentions}
        with (
            tree_masks_available(self.decoder, self.text_config, self.noted),
            after_own_forwards(
                attentions, lambda q_proj, _, __, queries: rescale_tree_queries(attentions[q_proj], queries)
            ),
            plain_angles(self.length_dependent_rotaries),
            trees_of_states(self.decoder),
        ):
            yield

    @contextmanager
    def recording(
        self, layers: tuple[int, ...] = (-1,), embeds: bool = True, positions: bool = False
    ) -> Iterator[DecoderRecord]:
        """Record what passes through the decoder in this thread while in the block.

        Args:
            layers (`tuple[int, ...]`): Whose features, side by side: -1 for those after the final norm, i for layer i's output.
            embeds (`bool`): Whether to record the embeddings that enter.
            positions (`bool`): Whether to record where tokens stand.
        """
        record = DecoderRecord()
        token = _record.set(record)
        inner: dict[int, torch.Tensor] = {}  # of this forward

        def before(module, args, kwargs=None):  # which may be missing in other threads, see `hooks`
            if _record.get() is not record:
                return None
            if embeds:
                entering = kwargs.get("inputs_embeds")
                input_ids = kwargs.get("input_ids", args[0] if args else None)
                record.embeds.append(self.embed(input_ids) if entering is None else entering)
            if positions and kwargs.get("position_ids") is not None:
                found = kwargs["position_ids"]
                record.positions.append(
                    found[-3:] if found.ndim == 3 else found
                )  # a fourth plane, in front, is of masks
            # Layers that share keys and values (Gemma4) skip tokens whose logits nobody wants; their features are wanted.
            return args, {name: 0 if name == "logits_to_keep" else value for name, value in kwargs.items()}

        def after_layer(index, module, args, output):
            if _record.get() is record:
                inner[index] = output[0] if isinstance(output, tuple) else output

        def after(module, args, output):
            if _record.get() is record:
                last = output[0] if isinstance(output, tuple) else output.last_hidden_state
                parts = [last if layer == -1 else inner[layer] for layer in layers]
                inner.clear()
                record.features.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1))

        handles = []
        if layers or embeds or positions:
            handles.append(self.decoder.register_forward_pre_hook(before, with_kwargs=True))
        if layers:
            handles.append(self.decoder.register_forward_hook(after))
        for layer in set(layers) - {-1}:
            handles.append(self.decoder.layers[layer].register_forward_hook(partial(after_layer, layer)))
        try:
            with self._noting_arguments():
                yield record
        finally:
            for handle in handles:
                handle.remove()
            _record.reset(token)

    @contextmanager
    def _noting_arguments(self) -> Iterator[None]:
        """Note what attention is given, where another implementation has to stand in for trees."""
        with ExitStack() as stack:
            if not takes_tree_masks(self.text_config._attn_implementation):
                self.noted = stack.enter_context(note_arguments(text_attentions(self.decoder)))
            yield


def rescale_tree_queries(module: Any, queries: torch.Tensor) -> torch.Tensor:
    """Give the nodes of a tree the query scale of their position.

    Llama4 scales the queries (B, N, size) of its layers without rotary embedding by a function of their cache slot. In
    plain decoding that is the position; in a tree it is not, so the two scales' ratio is applied beforehand.
    """
    scope = current_tree()
    if scope is None:
        return queries
    if queries.shape[:2] != scope.ancestors.shape[:2]:
        raise RuntimeError(
            f"`{type(module).__name__}` scales queries of shape {tuple(queries.shape)} in a forward over "
            f"{tuple(scope.ancestors.shape[:2])} nodes; use another target, or generate without `assistant_model`."
        )

    def scale(slots: torch.Tensor) -> torch.Tensor:
        return torch.log1p(torch.floor((slots.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0

    scope = scope.to(queries.device)
    places = torch.arange(scope.depths.shape[1], device=scope.lengths.device)[-scope.num_queries :]
    ratio = scale(scope.lengths[:, None] + scope.depths[:, places]) / scale(scope.lengths.max() + places)
    return (queries * ratio[..., None]).to(queries.dtype)


@dataclass(frozen=True)
class LogitRule:
    """What comes after the head: `logits = softcap * tanh(scale * raw / softcap)`, or `scale * raw` without a cap."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, raw: torch.Tensor) -> torch.Tensor:
        scaled = raw if self.scale == 1.0 else raw * self.scale
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap


def logit_rules(text_config: PreTrainedConfig) -> list[LogitRule]:
    """The rules that a configuration allows."""
    rules = [LogitRule()]
    if softcap := getattr(text_config, "final_logit_softcapping", None):
        rules.append(LogitRule(softcap=softcap))
    if scale := getattr(text_config, "logit_scale", None):
        rules.append(LogitRule(scale=scale))
    if divisor := getattr(text_config, "logits_scaling", None):
        rules.append(LogitRule(scale=1.0 / divisor))
    return rules


def best_logit_rule(rules: list[LogitRule], raw: torch.Tensor, logits: torch.Tensor) -> LogitRule:
    """The rule that best turns the head's output `raw` (B, V) into `logits`."""
    return min(rules, key=lambda rule: (rule(raw) - logits).abs().mean().item())


_spoilt: WeakKeyDictionary[nn.Module, tuple[int, torch.Tensor | None]] = WeakKeyDictionary()


def spoilt_rows(table: nn.Module) -> torch.Tensor | None:
    """Rows of an embedding that are NaN or infinite, looked for again only after the weight has changed; None if none is."""
    weight = getattr(table, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.device.type == "meta":
        return None
    version = 0 if weight.is_inference() else weight._version
    if table not in _spoilt or _spoilt[table][0] != version:
        rows = weight.detach().sum(-1, dtype=torch.float32).isfinite().logical_not().nonzero().flatten()
        _spoilt[table] = version, rows if len(rows) else None
    return _spoilt[table][1]


def end_ids(config: Any) -> frozenset[int]:
    """Tokens that end a text, by whatever has an `eos_token_id`: a generation config, a drafter's config, a tokenizer."""
    ends = config.eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or ())


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself; adapters stay in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator,return-value]


def text_decoder(model: Any) -> nn.Module:
    """The module whose output is the features: `get_decoder()`, without the head some families leave on it."""
    decoder = model.get_decoder()
    if decoder is model.get_output_embeddings():  # ModernBertDecoder calls its head `decoder`
        decoder = model.base_model
    while isinstance(getattr(decoder, "lm_head", None), nn.Module) and hasattr(decoder, "model"):
        decoder = decoder.model
    return decoder


def sliding_windows(text_config: PreTrainedConfig) -> list[int | None]:
    """How many tokens each decoder layer that attends looks back, itself included; None for all."""
    types = getattr(text_config, "layer_types", None)
    window = getattr(text_config, "sliding_window", None)
    chunk = getattr(text_config, "attention_chunk_size", None)
    if types is None:
        return [window or chunk] * text_config.num_hidden_layers
    attending = (kind for kind in types if kind not in (*STATE_KINDS, *STATELESS_KINDS))
    return [window if "sliding" in kind else chunk if "chunked" in kind else None for kind in attending]
