"""Chains drafted inside transformers' own assisted decoding, for those who want its loop and not ours.

`target.generate(**inputs, custom_generate=dream_chain_generate, drafter=drafter)` runs transformers'
`_assisted_decoding`: batch 1, one chain of `tree_depth` tokens per step, everything else as that loop does it. Greedy
output is that of plain decoding on every attention-only family, those with several axes of positions included: the loop
extends their position ids rightly, and the drafter counts its own.
"""

from __future__ import annotations

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
from ..targets.attention_statistics import observe_attention
from ..targets.target import DecoderRecord, Target, end_ids, unwrap
from .drafter import Drafter, DraftSession, Verified
from .prompt import AttentionMeter, PromptWatch
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
        drafter (`Drafter`): The drafter; a `PeftModel` around one is looked through. `config.tree_depth` is the length
            of the chain.
        generation_config (`GenerationConfig`, *optional*): Its `max_length` keeps chains within the limit.
    """

    requires_model_outputs = True  # so that the loop says how many candidates it kept
    model_kwargs_overrides: dict[str, Any] = {}
    session: DraftSession | None

    def __init__(self, target: PreTrainedModel, drafter: Drafter, generation_config: GenerationConfig | None = None):
        plain_drafter: Any = unwrap(drafter)  # type: ignore[arg-type]
        self.target, self.drafter = Target(target), plain_drafter.plain
        self._chains = plain_drafter.with_settings(tree_top_k=1)
        self.max_length = None if generation_config is None else generation_config.max_length
        self._scopes = ExitStack()
        self._record: DecoderRecord | None = None
        self._start()

    def __enter__(self) -> DreamCandidateGenerator:
        needs = self._chains.needs
        self._record = self._scopes.enter_context(self.target.recording(needs.layers, needs.embeds, needs.positions))
        if needs.attention and self.target.visual_ids:
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
        positions = self._record.positions[0] if self._record.positions else None
        embeds, features = self._record.take_first()
        if self.session is None:
            self.session = self._read_prompt(input_ids, embeds, features, positions, model_kwargs, model_outputs)
        else:
            num_gained = int(n_last_matches) + 1
            features = None if features is None else features[:, :num_gained]
            self.session.read(Verified(input_ids[:, -num_gained:], [num_gained], features))
        return self._draft(input_ids, self.session), None

    def _start(self) -> None:
        self.session = None
        self._wants_attention = False
        self._unusable_ids = self.target.unusable_ids()
        self._meter = AttentionMeter(end=0)
        if self._record is not None:
            self._record.clear()

    def _observe(self, module: torch.nn.Module, chunks: Any) -> None:
        if self._wants_attention and self.session is None:
            self._meter.observe(module, chunks)

    def _read_prompt(
        self,
        input_ids: torch.Tensor,  # (1, P + 1)
        embeds: torch.Tensor | None,
        features: torch.Tensor | None,
        positions: torch.Tensor | None,
        model_kwargs: dict[str, Any],
        model_outputs: Any,
    ) -> DraftSession:
        """Begin with the prompt and the first token behind it."""
        last_features = self._chains.needs.last_features(features)
        if last_features is not None:
            self.target.learn_logit_rule(last_features[:, -1], model_outputs.logits[:, -1].to(last_features.device))
        watch = PromptWatch(self.target, self._chains, self._meter, embeds, features, positions)
        mask, ends = model_kwargs.get("attention_mask"), end_ids(self.target.model.generation_config)
        prefill = watch.prefill(input_ids[:, :-1], input_ids[:, -1:], mask, model_kwargs[CACHE], ends)
        return self._chains.start(prefill, self._chains.settings)

    def _draft(self, input_ids: torch.Tensor, session: DraftSession) -> torch.LongTensor:
        num_positions = getattr(self.target.text_config, "max_position_embeddings", None)
        length = input_ids.shape[1]
        limits = [self.max_length and self.max_length - length - 1, num_positions and num_positions - length]
        limits = [limit for limit in limits if limit is not None and limit >= 0]
        max_depth = min([self._chains.settings.tree_depth, *limits])
        chain = session.draft(input_ids[:, -1:], max_depth).likeliest_path(max_depth)
        if self._unusable_ids is not None:
            is_spoilt = torch.isin(chain, self._unusable_ids.to(chain.device))[0].nonzero().flatten().tolist()
            chain = chain[:, : is_spoilt[0]] if is_spoilt else chain
        return torch.cat([input_ids, chain.to(input_ids.device)], dim=1)  # type: ignore[return-value]


def dream_chain_generate(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    drafter: Drafter | None = None,
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
        drafter (`Drafter`): The drafter; a `PeftModel` around one is looked through. `tree_depth` is the length of the chain.
        kwargs: What the target's forward takes, and `streamer`.

    Returns:
        What `generate()` returns, without what `dream_generate` adds.

    Raises:
        TypeError: `drafter` is no [`Drafter`].
        ValueError: A combination that cannot be served; the message names the argument and the remedy.
    """
    drafter = check_request(model, drafter, generation_config)
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
    with DreamCandidateGenerator(model, drafter, generation_config) as generator:
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
