"""What the target makes of a batch of conversations, in one forward without gradients.

B rows, T tokens, H width, V vocabulary; N predictions: the positions whose next token belongs to an answer, row by row in
order. Whatever is only needed there (the selected intermediate feature) is (N, H), and logits are made from features in
chunks, when a loss wants them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..drafters.dream.compression import DrafterText, compress_text
from ..drafters.dream.reading import Reading
from ..drafters.paired_session import embed_from
from ..targets.attention_statistics import attention_entropy, attention_received, observe_attention
from ..targets.target import Target


@dataclass(frozen=True)
class Places:
    """What the tokens of a batch are, each (B, T) bool: no padding, visual, and those whose next token belongs to an answer."""

    real: torch.Tensor
    is_visual: torch.Tensor
    predicts: torch.Tensor

    def to(self, device: torch.device) -> Places:
        """The same on a device."""
        return Places(self.real.to(device), self.is_visual.to(device), self.predicts.to(device))


@dataclass(frozen=True)
class TargetFeatures:
    """A target's view of a batch.

    Args:
        places (`Places`): Which tokens are what.
        embeds (`torch.Tensor` of shape `(B, T, H)`): Input embeddings, images merged.
        features (`torch.Tensor` of shape `(B, T, layers * H)`): Of the layers that are wanted, the last ones after the final
            norm.
        mid (`torch.Tensor` of shape `(N, H)`, *optional*): Selected intermediate features of the predictions.
        received (`torch.Tensor` of shape `(B, T)`, *optional*): Attention each token gets from the prompt's queries in
            the last layer.
    """

    places: Places
    embeds: torch.Tensor
    features: torch.Tensor
    mid: torch.Tensor | None
    received: torch.Tensor | None


@dataclass(frozen=True)
class DrafterBatch:
    """The drafter's side of a batch: the same inputs it would get in decoding, answers included.

    Args:
        text (`DrafterText`): Embeddings, features and positions of the tokens it sees.
        token_ids (`torch.LongTensor` of shape `(B, K)`): The tokens; 0 at padding.
        predicts (`torch.BoolTensor` of shape `(B, K)`): True at the N predictions.
        mid (`torch.Tensor` of shape `(N, H)`, *optional*): Selected intermediate features.
    """

    text: DrafterText
    token_ids: torch.Tensor
    predicts: torch.Tensor
    mid: torch.Tensor | None

    @property
    def mask(self) -> torch.Tensor:
        """True at tokens, False at padding, (B, K)."""
        slots = torch.arange(self.predicts.shape[1], device=self.predicts.device)
        return slots < self.text.counts[:, None]

    def to(self, device: torch.device) -> DrafterBatch:
        """The same on a device."""
        mid = None if self.mid is None else self.mid.to(device)
        return DrafterBatch(self.text.to(device), self.token_ids.to(device), self.predicts.to(device), mid)


@dataclass(frozen=True)
class LayerSelection:
    """Which layer's feature the drafter's intermediate feature is compared with (paper, section 3.2).

    Args:
        mode (`str`): `"token"` or `"sample"` for the candidate of least attention entropy for each position or each row,
            `"static"` for one layer, `"none"`.
        layers (`tuple[int, ...]`): The candidates, 1 being the first layer; its feature is that layer's output.
    """

    mode: str
    layers: tuple[int, ...] = ()

    @classmethod
    def make(
        cls,
        mode: str,
        num_layers: int,
        candidate_depth: float = 0.4,
        static_layer_index: int | None = None,
        static_layer_depth: float | None = None,
    ) -> LayerSelection:
        """The selection that `DreamTrainingArguments` describe, for a target with `num_layers` layers."""
        if mode == "none":
            return cls(mode)
        if mode == "static":
            index = static_layer_index or max(1, round((static_layer_depth or 0.0) * num_layers))
            if index > num_layers:
                raise ValueError(f"`static_layer_index` ({index}) is beyond the target's {num_layers} layers.")
            return cls(mode, (index,))
        last = max(1, int(candidate_depth * num_layers) - 1)
        return cls(mode, tuple(range(1, last + 1)))


def predictions(answer_mask: torch.Tensor, is_visual: torch.Tensor) -> torch.Tensor:
    """Positions (B, T) whose next token belongs to an answer; a visual token drafts nothing."""
    following = torch.nn.functional.pad(answer_mask[:, 1:].bool(), (0, 1), value=False)
    return following & ~is_visual


def last_prompts(answer_mask: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Tokens (B, T) in front of each row's last answer: its prompt, as decoding would get it."""
    answer = answer_mask.bool()
    is_start = answer & ~torch.nn.functional.pad(answer[:, :-1], (1, 0), value=False)
    columns = torch.arange(answer.shape[1], device=answer.device)
    last_start = torch.where(is_start, columns, -1).amax(-1, keepdim=True)
    return real & ((columns < last_start) | (last_start < 0))


@dataclass
class _Selected:
    """The selected feature so far: of all candidates seen, only the best is kept."""

    selection: LayerSelection
    columns: torch.Tensor  # (n,) columns with a prediction in some row
    predicts: torch.Tensor  # (B, n)
    features: torch.Tensor | None = None  # (B, n, H)
    entropy: torch.Tensor | None = None  # (B, n), the least so far
    current: torch.Tensor | None = None  # (B, n), of the layer that is running

    def observe(self, module: nn.Module, chunks: Iterator[torch.Tensor]) -> None:
        """Take the attention of the running layer."""
        entropy = attention_entropy(chunks)
        if self.selection.mode == "sample":
            predicts = self.predicts.to(entropy.device)
            total = entropy.masked_fill(~predicts, 0.0).sum(-1, keepdim=True)
            entropy = (total / predicts.sum(-1, keepdim=True).clamp(min=1)).expand_as(entropy)
        self.current = entropy

    def take(self, module: nn.Module, args: Any, output: Any) -> None:
        """Take the output of the running layer, where it is better than what there is."""
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden[:, self.columns.to(hidden.device)]
        if self.features is None or self.entropy is None or self.current is None:
            self.features, self.entropy = hidden, self.current
            return
        device = self.features.device
        current = self.current.to(device)
        is_better = current < self.entropy
        self.features = torch.where(is_better[..., None], hidden.to(device), self.features)
        self.entropy = torch.minimum(current, self.entropy)

    def result(self) -> torch.Tensor | None:
        """The selected features of the predictions, (N, H)."""
        return None if self.features is None else self.features[self.predicts.to(self.features.device)]


@dataclass
class FeatureExtractor:
    """Runs a target and takes what training needs.

    Args:
        target (`Target`): The target; frozen, in evaluation mode.
        selection (`LayerSelection`): Which intermediate features to take.
        keep_ratio (`float`): Share of the visual tokens the drafter keeps.
        importance (`str`): How visual tokens are ranked, as `DreamConfig.visual_importance` says.
        layers (`tuple[int, ...]`): Whose features to take, side by side, as [`Needs`] names them; the last is -1.
        has_placeholders (`bool`): Whether pictures are embedded as their placeholders, and not as they entered the target.
    """

    target: Target
    selection: LayerSelection
    keep_ratio: float
    importance: str = "attention"
    layers: tuple[int, ...] = (-1,)
    has_placeholders: bool = False
    _knows_logits: bool = field(default=False, init=False)

    @torch.no_grad()
    def run(self, inputs: dict[str, Any], answer_mask: torch.Tensor) -> TargetFeatures:
        """One target forward over a right-padded batch.

        Args:
            inputs (`dict`): What the processor returned, on the target's device.
            answer_mask (`torch.BoolTensor` of shape `(B, T)`): True at tokens of answers.

        Returns:
            `TargetFeatures`
        """
        is_visual = self.target.is_visual(inputs["input_ids"])
        predicts = predictions(answer_mask, is_visual)
        places = Places(real_tokens(inputs), is_visual, predicts)
        columns = predicts.any(0).nonzero().flatten()
        selected = _Selected(self.selection, columns, predicts[:, columns])
        inputs = self.target.mark_answers(inputs, answer_mask)
        with self._watching(selected), self._measuring(places, answer_mask) as received:
            with (
                self.target.recording(layers=self.layers) as record,
                torch.autocast(predicts.device.type, enabled=False),
            ):
                outputs = self.target.model(**inputs, logits_to_keep=1, use_cache=False, return_dict=True)
        embeds, features = record.take()
        assert embeds is not None and features is not None  # both are recorded
        if self.has_placeholders:
            plain = embed_from(self.target.embedding, inputs["input_ids"]).to(embeds.device)
            embeds = torch.where(is_visual.to(embeds.device)[..., None], plain, embeds)
        if not self._knows_logits:
            self.target.learn_logit_rule(
                features[:, -1, -embeds.shape[-1] :], outputs.logits[:, -1].to(features.device)
            )
            self._knows_logits = True
        return TargetFeatures(places, embeds, features, selected.result(), received[0] if received else None)

    @torch.no_grad()
    def drafter_batch(
        self, inputs: dict[str, Any], answer_mask: torch.Tensor, made: TargetFeatures | None = None
    ) -> DrafterBatch:
        """What the drafter reads of a batch, exactly as in decoding (see [`compress_text`])."""
        made = self.run(inputs, answer_mask) if made is None else made
        device = made.features.device
        places = made.places.to(device)
        text = compress_text(
            made.embeds.to(device),
            made.features,
            places.real,
            places.is_visual,
            self.keep_ratio,
            self.importance,
            made.received,
        )
        is_there = torch.arange(text.order.shape[1], device=device) < text.counts[:, None]
        predicts = places.predicts.gather(1, text.order) & is_there
        if self.has_placeholders:  # rows are pairs: below a text's first token there is no feature
            predicts[:, 0] = False
        token_ids = inputs["input_ids"].to(device).gather(1, text.order).masked_fill(~is_there, 0)
        return DrafterBatch(text, token_ids, predicts, made.mid)

    @contextmanager
    def _watching(self, selected: _Selected) -> Iterator[None]:
        """Let `selected` see the candidate layers, their attention only where there is a choice."""
        layers = [self.target.decoder.layers[index - 1] for index in self.selection.layers]
        with ExitStack() as stack:
            if len(layers) > 1:
                modules = [layer.self_attn for layer in layers]
                stack.enter_context(observe_attention(modules, selected.observe, selected.columns))
            for layer in layers:
                stack.callback(layer.register_forward_hook(selected.take).remove)
            yield

    @contextmanager
    def _measuring(self, places: Places, answer_mask: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        """Collect the attention received in the last layer, if visual tokens are to be left out by it."""
        received: list[torch.Tensor] = []
        is_wanted = Reading(self.keep_ratio, self.importance).needs_attention
        if not (is_wanted and bool(places.is_visual.any())):
            yield received
            return
        prompts = last_prompts(answer_mask, places.real)
        columns = prompts.any(0).nonzero().flatten()

        def observe(module, chunks):
            received.append(attention_received(chunks, prompts[:, columns]))

        with observe_attention([self.target.last_attention], observe, columns):
            yield received


def real_tokens(inputs: dict[str, Any]) -> torch.Tensor:
    """True at tokens, False at padding, (B, T)."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
