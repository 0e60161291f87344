"""The decoding loop: draft a tree, verify it in one target forward, keep a path (paper, section 3.1).

The loop is reached from `generate(..., assistant_model=drafter)` through the hook in `registration`, or without any hook
as `generate(..., custom_generate=dream_generate, drafter=drafter)`. It knows drafters by their protocol alone. All its state
lives in one `_Decoding`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_utils import PreTrainedModel

from ..compat import CACHE, cache_of
from ..runtime.phases import ACCEPTANCE, PREFILL, STEP, TARGET, phase
from ..targets.target import Target, sliding_windows
from .acceptance import Acceptance
from .draft_schedule import DraftSchedule
from .drafter import Drafter, DraftSession, Verified
from .outputs import DreamGenerateOutput, Recorder
from .prompt import inputs_of, watching_prompt
from .requests import check_cache, check_length, check_request, compile_settings
from .sampling import Accepted, Sampler, is_pure
from .sequences import Sequences
from .stopping import Stopping
from .streaming import Stream
from .target_forward import TargetForward, make_target_forward
from .tree import DraftTree
from .turns import remember


def dream_generate(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    drafter: Drafter | None = None,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> DreamGenerateOutput | torch.Tensor:
    """Generate the target's output, several tokens per target forward (DREAM, arXiv 2505.19201).

    Called by `generate()`: `target.generate(**inputs, custom_generate=dream_generate, drafter=drafter)`. Greedy output
    is token-identical to plain `generate()`; sampled output has the same distribution.

    Args:
        model (`PreTrainedModel`): The target.
        input_ids (`torch.LongTensor` of shape `(B, P)`): Prompts, padded on the left.
        logits_processor (`LogitsProcessorList`): As prepared by `generate()`.
        stopping_criteria (`StoppingCriteriaList`): As prepared by `generate()`.
        generation_config (`GenerationConfig`): As prepared by `generate()`.
        drafter (`Drafter`): The drafter; a `PeftModel` around one is looked through.
        synced_gpus (`bool`): Keep running forwards until all processes are done (FSDP, DeepSpeed ZeRO-3).
        streamer (`BaseStreamer`, *optional*): Gets the tokens as they come.
        model_kwargs: What the target's forward takes.

    Returns:
        `DreamGenerateOutput` with `return_dict_in_generate=True`, else the sequences, (B, length).

    Raises:
        TypeError: `drafter` is no [`Drafter`].
        ValueError: A combination that cannot be served; the message names the argument and the remedy.
    """
    drafter = check_request(model, drafter, generation_config)
    check_cache(model_kwargs.get(CACHE))
    check_length(model, input_ids.shape[1], generation_config.max_length)
    target, needs = Target(model), drafter.needs
    with ExitStack() as ending, ExitStack() as recording, torch.no_grad():
        record = recording.enter_context(target.recording(needs.layers, needs.embeds, needs.positions))
        compilation = compile_settings(target, drafter, generation_config, synced_gpus)
        forward = make_target_forward(target, drafter, compilation, input_ids.shape[0], record)
        judges, arguments = (logits_processor, stopping_criteria), forward.arguments(model_kwargs)
        decoding = _Decoding(target, drafter, forward, input_ids, *judges, generation_config, arguments)
        ending.callback(decoding.close)  # whatever it ends by
        stream = Stream(streamer, decoding.sequences)
        with phase(PREFILL):
            decoding.prefill()
        stream.send(decoding.sequences, decoding.stopping)
        if compilation is not None:
            recording.close()  # compiled forwards take no hooks, and return what these would record
        with target.taking_trees(), decoding.verifying(), target.model._optimize_model_for_decode():
            _take_steps(decoding, stream, synced_gpus)
        stream.close()
        return decoding.result()


def _take_steps(decoding: _Decoding, stream: Stream, synced_gpus: bool) -> None:
    """Step by step to the end of all rows, and of all processes."""
    model, device = decoding.target.model, decoding.sequences.ids.device
    while model._has_unfinished_sequences(decoding.is_done, synced_gpus, device=device):
        if decoding.is_done:
            decoding.idle()
            continue
        with phase(STEP):
            decoding.step()
        stream.send(decoding.sequences, decoding.stopping)
    if decoding.is_cache_kept and not synced_gpus:  # other processes would wait for this one's forward
        decoding.read_padding()


class _Decoding:
    """One `generate()` call: the texts so far, the target's cache, the drafter's session."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        forward: TargetForward,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ):
        batch = input_ids.shape[0]
        self.target, self.drafter, self.forward = target, drafter, forward
        self.config: Any = generation_config  # its prepared, private fields are not typed
        self.model_kwargs = model_kwargs
        pad = self.config._pad_token_tensor
        self.sequences = Sequences(input_ids, 0 if pad is None else int(pad))
        self.stopping = Stopping(stopping_criteria, batch)
        judges = (*logits_processor, *stopping_criteria)
        in_step = batch > 1 and (self.stopping.is_open or not all(is_pure(judge) for judge in judges))
        self.sampler = Sampler(logits_processor, generation_config.do_sample, in_step)
        self.recorder = Recorder(generation_config, batch, sliding_windows(target.text_config))
        self.cache: Cache = model_kwargs[CACHE]
        self.schedule = DraftSchedule(drafter.settings.pause_below)
        self.unusable_ids = target.unusable_ids()
        self.session = DraftSession()  # of nobody, until the drafter has one
        self.begun: _Begun | None = None

    # --- the phases ---

    def prefill(self) -> None:
        """Run the target over the prompt, take its first token, let the drafter read all of it."""
        prompt_ids, kwargs = self.sequences.ids, self.model_kwargs
        past_length = int(self.cache.get_seq_length())
        with watching_prompt(self.target, self.drafter, self.forward.record, prompt_ids, past_length) as watch:
            config = copy(self.config)
            config.compile_config = None  # it is for the forwards that follow
            with phase(TARGET):
                outputs = self.target.model._prefill(
                    prompt_ids, config, kwargs, is_first_iteration=not config.is_assistant
                )
        self.cache = cache_of(outputs)
        check_cache(self.cache)
        logits = outputs.logits[:, -1]
        last_features = self.drafter.needs.last_features(watch.features)
        if last_features is not None:
            self.target.learn_logit_rule(last_features[:, -1], logits.to(last_features.device))

        raw = logits.to(copy=True, dtype=torch.float32, device=prompt_ids.device)
        scores = self.sampler.process(prompt_ids, raw)
        self.recorder.add_prefill(scores, raw, outputs)
        limit = self.stopping.max_length
        self.forward.begin(self.cache, kwargs, None if limit is None else limit - prompt_ids.shape[1])
        first_tokens = self.sampler.pick(scores)
        self.roots = first_tokens[:, None]
        self._begin_sequences(first_tokens.tolist())
        if not self.is_done or self.is_cache_kept:
            prefill = watch.prefill(
                prompt_ids,
                first_tokens[:, None],
                kwargs.get("attention_mask"),
                self.cache,
                self.stopping.eos_token_ids,
                longest_text=self.forward.longest_text,
                compilation=self.forward.compilation,
                inputs=inputs_of(kwargs) if self.drafter.needs.inputs and not past_length else {},
                forward=self.forward if self.drafter.needs.cache else None,
            )
            self.session = self.drafter.start(prefill, self.drafter.settings)

    def step(self) -> None:
        """Draft a tree, verify it, keep a path, tell the drafter what was gained."""
        is_resting = [self.stopping.is_resting(row) for row in range(len(self.sequences.lengths))]
        tree, outputs = self._verifiable()
        features = self.forward.features(outputs)
        logits = outputs.logits[:, : tree.num_nodes].to(dtype=torch.float32, device=self.sequences.ids.device)
        starts = [length - self.sequences.prompt_length for length in self.sequences.lengths]
        along: torch.Tensor | None = None  # features along the path, where they are known before it is

        def look_ahead(acceptance: Acceptance) -> None:
            nonlocal along
            if features is not None and self._may_look_ahead(is_resting):
                along = _at(features, acceptance.path)
                drafted = self.session.look_ahead(acceptance.tokens, along, acceptance.lengths)
                self.begun = self._begin(drafted, acceptance)

        with phase(ACCEPTANCE):
            accepted = self.sampler.verify(tree, logits, self.sequences, self.stopping, self.recorder, look_ahead)
        if features is not None:
            features = _at(features, accepted.path) if along is None else along[:, : accepted.path.shape[1]]
        going_on = [count for row, count in enumerate(accepted.counts) if not self.stopping.is_resting(row)]
        if going_on:  # an end says nothing about the drafter
            self.schedule.note(going_on)

        slots = self.forward.slots
        self.recorder.add_states(outputs, accepted.path, starts, accepted.counts, slots.lengths)
        self.recorder.add_step(accepted.counts, tree.num_nodes - 1, is_resting)
        self.forward.commit(accepted.path, accepted.counts)
        self.roots = accepted.last_tokens(self.roots)
        self.session.read(self._verified(tree, accepted, features, logits))

    def idle(self) -> None:
        """Run a forward whose result nobody needs, for processes that wait for this one."""
        self.forward(DraftTree.chain(self.roots))
        self.forward.record.clear()

    def read_padding(self) -> None:
        """Feed rows that ended early their last token and padding, as plain decoding does: the next turn needs the former."""
        slots, sequences = self.forward.slots, self.sequences
        missing = [slots.longest - length for length in slots.lengths]
        if not any(missing):
            return
        first = slots.tensor(sequences.ids.device) - self.forward.prompt_slots + sequences.prompt_length
        unread = first[:, None] + torch.arange(max(missing), device=sequences.ids.device)
        ids = sequences.at(max(sequences.lengths))
        self.forward(DraftTree.chain(ids.gather(1, unread.clamp(max=ids.shape[1] - 1))))
        self.forward.record.clear()
        self.forward.commit(None, missing)

    def result(self) -> DreamGenerateOutput | torch.Tensor:
        """What `generate()` returns."""
        sequences = self.sequences
        if self.is_cache_kept and self.forward.prompt_mask is None and len(set(sequences.lengths)) == 1:
            remember(self.cache, self.drafter, self.session, self.roots)
        ids = sequences.at(max(sequences.lengths)).clone()  # without the room for more
        return self.recorder.result(ids, ids.shape[1] - sequences.prompt_length, self.cache)

    def close(self) -> None:
        """Tell the drafter that it is over."""
        self.session.close()

    @property
    def is_done(self) -> bool:
        """Whether no row needs another token."""
        return self.stopping.is_done(self.sequences)

    @property
    def is_cache_kept(self) -> bool:
        """Whether the caller can go on from the target's cache."""
        return self.config.return_dict_in_generate or getattr(self.cache, "_is_user_defined", False)

    @contextmanager
    def verifying(self) -> Iterator[None]:
        """While in the block the target's cache takes trees; after it, it is as plain decoding would have left it."""
        with self.forward.using(self.cache, self.is_cache_kept):
            yield

    # --- the parts ---

    def _verifiable(self) -> tuple[DraftTree, Any]:
        """A tree below the last tokens, no deeper than can be of use, and the target's outputs for it."""
        begun, self.begun = self.begun, None
        tree = DraftTree.chain(self.roots)
        if not self.schedule.is_paused:
            depth, schedule = self.drafter.settings.tree_depth, self.schedule.max_depth
            limits = [depth, self.forward.positions_left(), self.stopping.levels_left(min(self.sequences.lengths))]
            most = min(limit for limit in limits if limit is not None)
            drafted = self.session.draft(self.roots, most if schedule is None else min(most, schedule))
            if begun is not None and drafted is begun.drafted:
                return begun.tree, begun.outputs
            tree = self._usable(drafted).cut(most)
        self.forward.record.clear()  # of what processors made the target do (guidance)
        return tree, self.forward(tree)

    def _usable(self, drafted: DraftTree) -> DraftTree:
        """A drafted tree where the target can read it, of tokens that the target can take."""
        return drafted.to(self.roots.device).without(self.unusable_ids)

    def _begin(self, drafted: DraftTree, acceptance: Acceptance) -> _Begun | None:
        """The next step, if it may begin: whatever is gained in this one, its tree must not be too deep."""
        forward = self.forward
        if not forward.looks_ahead:
            return None
        limits = [forward.positions_left(), self.stopping.levels_left(max(self.sequences.lengths))]
        needed = acceptance.path.shape[1] + drafted.max_depth
        if any(limit is not None and limit < needed for limit in limits):
            return None
        tree = self._usable(drafted)
        return _Begun(drafted, tree, forward.look_ahead(tree, acceptance.path, acceptance.lengths))

    def _may_look_ahead(self, is_resting: Sequence[bool]) -> bool:
        """Whether the next draft may begin now: if it wants to, will be asked for, and nobody looks at outputs any more.

        A compiled draft may overwrite what a compiled forward has returned.
        """
        recorder = self.recorder
        is_seen = recorder.wants_choices or recorder.wants_states or self.drafter.needs.num_likeliest
        return self.session.looks_ahead and not (is_seen or any(is_resting) or self.schedule.is_paused)

    def _verified(
        self, tree: DraftTree, accepted: Accepted, features: torch.Tensor | None, logits: torch.Tensor
    ) -> Verified:
        """What was gained, `features` (B, P, H) along the path among it, with what the drafter needs to see of it."""
        num_likeliest = self.drafter.needs.num_likeliest
        if not num_likeliest:
            return Verified(accepted.tokens, accepted.counts, features)
        likeliest = logits.topk(num_likeliest, dim=-1).indices
        return Verified(accepted.tokens, accepted.counts, features, tree, likeliest)

    def _begin_sequences(self, tokens: list[int]) -> None:
        """Append the first token of each row, which may be the last one."""
        rows = range(len(tokens))
        self.sequences.append(rows, tokens)
        scores = self.recorder.scores if self.recorder.wants_scores else None
        self.stopping.look(self.sequences, rows, tokens, rows, scores)


@dataclass(frozen=True)
class _Begun:
    """A step that began before the host heard what the last one gained: its tree as drafted and as verified, the outputs."""

    drafted: DraftTree
    tree: DraftTree
    outputs: Any


def _at(features: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
    """Features (B, N, H) at the nodes `path` (B, P), (B, P, H)."""
    return features.gather(1, path.to(features.device)[..., None].expand(-1, -1, features.shape[-1]))
