"""Chains drafted inside transformers' own assisted decoding, for those who want its loop and not ours.

`target.generate(**inputs, custom_generate=dream_chain_generate, drafter=drafter)` runs transformers'
`_assisted_decoding`: batch 1, one chain of `tree_depth` tokens per step, everything else as that loop does it. Greedy
output is that of plain decoding on every attention-only family, those with several axes of positions included: the loop
extends their position ids rightly, and the drafter counts its own.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import torch
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_utils import PreTrainedModel

from ..compat import CACHE
from ..drafters.dream.compression import compress_text
from ..drafters.dream.drafter import DreamDrafter
from ..drafters.dream.state import DrafterState
from ..drafters.growth import grow_tree
from ..drafters.levels import TargetHead
from ..targets.attention_statistics import attention_received, observe_attention
from ..targets.target import DecoderRecord, Target, end_ids, unwrap
from .requests import check_cache, check_chains, check_length, check_request
from .sampling import STATEFUL


class DreamCandidateGenerator(CandidateGenerator):
    """Drafts a chain for each step of transformers' `_assisted_decoding`.

    The features it drafts from are recorded in the target's forwards, so these have to happen in its `with` block:

    ```python
    with DreamCandidateGenerator(target, drafter) as generator:
        ...  # a loop that calls generator.get_candidates(...), for example an overridden `_get_candidate_generator`
    ```

    It drafts the drafter's likeliest chain and returns no logits for it, so the loop picks the target's token at every
    position (argmax, or a sample with `do_sample=True`) and keeps candidates as long as they are what was picked: the
    output is the target's. One generator serves one `generate()` call at a time, call after call.

    Args:
        target (`PreTrainedModel`): The model that verifies.
        drafter (`DreamDrafter`): The drafter; a `PeftModel` around one is looked through. `config.tree_depth` is the length
            of the chain.
        generation_config (`GenerationConfig`, *optional*): Its `max_length` keeps chains within the limit.
    """

    requires_model_outputs = True  # so that the loop says how many candidates it kept
    model_kwargs_overrides: dict[str, Any] = {}

    def __init__(
        self, target: PreTrainedModel, drafter: DreamDrafter, generation_config: GenerationConfig | None = None
    ):
        plain_drafter: Any = unwrap(drafter)
        self.target, self.drafter = Target(target), plain_drafter
        self.max_length = None if generation_config is None else generation_config.max_length
        self._scopes = ExitStack()
        self._record: DecoderRecord | None = None
        self._start()

    def __enter__(self) -> DreamCandidateGenerator:
        self._record = self._scopes.enter_context(self.target.recording())
        if self.drafter.config.needs_attention and self.target.visual_ids:
            self._scopes.enter_context(observe_attention([self.target.last_attention], self._observe))
        return self

    def __exit__(self, *error: Any) -> None:
        self._record = None
        self._scopes.close()

    def get_candidates(  # type: ignore[override]
        self,
        input_ids: torch.LongTensor,
        model_kwargs: dict[str, Any],
        model_outputs: Any,
        is_first_iteration: bool,
        n_last_matches: int,
        **kwargs: Any,
    ) -> tuple[torch.LongTensor, None]:
        """Extend the text (1, L) by a chain: (1, L + drafted). Nothing is drafted before the prompt has been read.

        Raises:
            RuntimeError: Not in the `with` block, so that nothing has been recorded.
            ValueError: More than one row.
        """
        if self._record is None:
            raise RuntimeError(
                "`DreamCandidateGenerator` works in its `with` block only, where it sees the target's forwards."
            )
        if input_ids.shape[0] != 1:
            raise ValueError(
                f"`input_ids` has {input_ids.shape[0]} rows; transformers' assisted decoding takes one. Use "
                "`generate(assistant_model=drafter)`, which takes batches."
            )
        if is_first_iteration:
            self._start()
            self._wants_attention = bool(self.target.is_visual(input_ids).any())
            return input_ids, None
        # The target's forward is the first in the record; processors may have made it do more since (guidance).
        embeds, features = self._record.embeds[0], self._record.features[0]
        self._record.clear()
        if self.state.root_features is None:
            self.head = _target_head(self.target, self.drafter, features)
            self.target.learn_logit_rule(features[:, -1], model_outputs.logits[:, -1].to(features.device))
            self._read_prompt(input_ids, embeds, features, model_kwargs)
        else:
            self._read_matches(input_ids, features, n_last_matches)
        return self._draft(input_ids), None

    def _start(self) -> None:
        self.state = DrafterState(self.drafter, batch_size=1)
        self._wants_attention = False
        self._received: torch.Tensor | None = None  # attention each key received in the prefill, (1, K)
        if self._record is not None:
            self._record.clear()

    def _observe(self, module: torch.nn.Module, chunks: Any) -> None:
        if self._wants_attention and self.state.root_features is None:
            self._received = attention_received(chunks)

    def _read_prompt(
        self, input_ids: torch.Tensor, embeds: torch.Tensor, features: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> None:
        """Read the prompt's tokens (embeds and features (1, T, H)), visual ones by their attention, and the first new one."""
        num_tokens, device = features.shape[1], features.device
        total, mask = model_kwargs[CACHE].get_seq_length(), model_kwargs.get("attention_mask")
        real = torch.ones(1, total, dtype=torch.bool, device=device)
        if mask is not None:
            real = mask[:, :total].to(device).bool()
        received = self._received
        if received is not None:
            received = received[:, -num_tokens:].to(device)  # a sliding layer does not show the first keys
            received = torch.nn.functional.pad(received, (num_tokens - received.shape[1], 0))
        is_visual = self.target.is_visual(input_ids[:, -num_tokens - 1 : -1]).to(device)
        config = self.drafter.config
        text = compress_text(
            embeds, features, real, is_visual, config.visual_keep_ratio, config.visual_importance, received
        )
        self.state.read_prompt(text, self.head.embed(input_ids[:, -1:]), real.sum(-1, keepdim=True))

    def _read_matches(self, input_ids: torch.Tensor, features: torch.Tensor, num_matches: int) -> None:
        """Read the candidates that were kept and the token that came after them."""
        num_gained = int(num_matches) + 1
        self.state.read_on(self.head.embed(input_ids[:, -num_gained:]), features[:, :num_gained], [num_gained])

    def _draft(self, input_ids: torch.Tensor) -> torch.LongTensor:
        config = copy.copy(self.drafter.config)
        config.tree_top_k = 1
        num_positions = getattr(self.target.text_config, "max_position_embeddings", None)
        length = input_ids.shape[1]
        limits = [self.max_length and self.max_length - length - 1, num_positions and num_positions - length]
        max_depth = min((limit for limit in limits if limit is not None and limit >= 0), default=None)
        chain = grow_tree(self.state, self.head, input_ids[:, -1:], config, max_depth)
        return torch.cat([input_ids, chain.tokens[:, 1:].to(input_ids.device)], dim=1)  # type: ignore[return-value]


def _target_head(target: Target, drafter: DreamDrafter, like: torch.Tensor) -> TargetHead:
    """The ends of the target that a drafter borrows, for features `like` these; it holds nothing of a decoding."""
    device, dtype, draft_logits = like.device, like.dtype, target.draft_logits(drafter)
    return TargetHead(
        embed=lambda token_ids: target.embed(token_ids.to(target.model.device)),
        logits=lambda features: draft_logits(features.to(device, dtype)),
        token_ids=drafter.draft_token_ids,
        ends=end_ids(target.model.generation_config),
        barred=target.unusable_ids(),
    )


def dream_chain_generate(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    drafter: DreamDrafter | None = None,
    **kwargs: Any,
) -> GenerateDecoderOnlyOutput | torch.LongTensor:
    """Run transformers' own `_assisted_decoding` with a drafter's chains as candidates.

    Called by `generate()`: `target.generate(**inputs, custom_generate=dream_chain_generate, drafter=drafter)`. What that
    loop cannot do, it cannot do here: batches, and stopping exactly at a stop string (it adds whole steps).

    Args:
        model (`PreTrainedModel`): The target.
        input_ids (`torch.LongTensor` of shape `(1, P)`): The prompt.
        logits_processor (`LogitsProcessorList`): As prepared by `generate()`.
        stopping_criteria (`StoppingCriteriaList`): As prepared by `generate()`.
        generation_config (`GenerationConfig`): As prepared by `generate()`.
        drafter (`DreamDrafter`): The drafter; a `PeftModel` around one is looked through. `config.tree_depth` is the length of
            the chain.
        kwargs: What the target's forward takes, and `streamer`.

    Returns:
        What `generate()` returns, without what `dream_generate` adds.

    Raises:
        TypeError: `drafter` is not a `DreamDrafter`.
        ValueError: A combination that cannot be served; the message names the argument and the remedy.
    """
    plain_drafter: Any = drafter if drafter is None else unwrap(drafter)
    check_request(model, plain_drafter, generation_config)
    check_cache(kwargs.get(CACHE))
    check_length(model, input_ids.shape[1], generation_config.max_length)
    check_chains(model)
    for processor in logits_processor:
        if type(processor) in STATEFUL:
            raise ValueError(
                f"`{type(processor).__name__}` remembers every token it is asked about, and transformers' assisted decoding "
                "asks about rejected ones too. Use `custom_generate=dream_generate`, which does not."
            )
    model_class: Any = type(model)
    with DreamCandidateGenerator(model, plain_drafter, generation_config) as generator:
        return model_class._assisted_decoding(
            _WithGenerator(model, generator),
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            **kwargs,
        )


class _WithGenerator:
    """A model as `_assisted_decoding` sees it, with a candidate generator of our choice; the model is not touched."""

    def __init__(self, model: PreTrainedModel, generator: CandidateGenerator):
        self._model, self._generator = model, generator

    def _get_candidate_generator(self, **_: Any) -> CandidateGenerator:
        return self._generator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        return self._model(**inputs)
