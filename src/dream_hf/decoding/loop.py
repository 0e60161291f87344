"""The decoding loop: draft a tree, verify it in one target forward, keep a path (paper, section 3.1).

The loop is reached from `generate(..., assistant_model=drafter)` through the hook in `registration`, or without any hook
as `generate(..., custom_generate=dream_generate, drafter=drafter)`. All its state lives in one `_Decoding`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_utils import PreTrainedModel

from ..compat import CACHE, cache_of
from ..drafters.dream.compression import compress_text
from ..drafters.dream.drafter import DreamDrafter
from ..drafters.dream.state import make_drafter_state
from ..drafters.growth import grow_tree
from ..drafters.levels import TargetHead
from ..targets.attention_statistics import attention_received, observe_attention
from ..targets.target import DecoderRecord, Target, sliding_windows, unwrap
from ..targets.tree_masks import TreeScope, tree_scope
from .draft_schedule import Pausing, Unread
from .outputs import DreamGenerateOutput, Recorder
from .requests import check_cache, check_length, check_request, compile_settings
from .sampling import Chooser, is_pure
from .sequences import Ends, Stream, Texts
from .target_forward import Forwards, make_forwards
from .tree import DraftTree
from .turns import recall, remember

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


def dream_generate(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    drafter: DreamDrafter | None = None,
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
        drafter (`DreamDrafter`): The drafter; a `PeftModel` around one is looked through.
        synced_gpus (`bool`): Keep running forwards until all processes are done. `generate()` hands it on with
            `assistant_model` only. A target whose embedding and head are spread over processes is refused.
        streamer (`BaseStreamer`, *optional*): Gets the tokens as they come.
        model_kwargs: What the target's forward takes.

    Returns:
        `DreamGenerateOutput` with `return_dict_in_generate=True`, else the sequences, (B, length).

    Raises:
        TypeError: `drafter` is not a `DreamDrafter`.
        ValueError: A combination that cannot be served; the message names the argument and the remedy.
    """
    plain_drafter: Any = drafter if drafter is None else unwrap(drafter)
    check_request(model, plain_drafter, generation_config)
    check_cache(model_kwargs.get(CACHE))
    check_length(model, input_ids.shape[1], generation_config.max_length)
    target = Target(model)
    with ExitStack() as recording, torch.no_grad():
        record = recording.enter_context(target.recording())
        settings = compile_settings(target, plain_drafter, generation_config, synced_gpus)
        forwards = make_forwards(target, plain_drafter.config, settings, input_ids.shape[0], record)
        decoding = _Decoding(
            target,
            plain_drafter,
            record,
            forwards,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            forwards.arguments(model_kwargs),
        )
        stream = Stream(streamer, decoding.texts)
        decoding.prefill()
        stream.send(decoding.texts, decoding.ends)
        if settings is not None:
            recording.close()  # compiled forwards take no hooks, and return what these would record
        with target.taking_trees(), decoding.verifying(), target.model._optimize_model_for_decode():
            while target.model._has_unfinished_sequences(decoding.is_done, synced_gpus, device=input_ids.device):
                if decoding.is_done:
                    decoding.idle()
                    continue
                decoding.step()
                stream.send(decoding.texts, decoding.ends)
            if decoding.is_cache_kept and not synced_gpus:  # other processes would wait for this one's forward
                decoding.read_padding()
        stream.close()
        return decoding.result()


class _Decoding:
    """One `generate()` call: the texts so far, the target's cache, the drafter's state."""

    def __init__(
        self,
        target: Target,
        drafter: DreamDrafter,
        record: DecoderRecord,
        forwards: Forwards,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ):
        batch = input_ids.shape[0]
        self.target, self.drafter, self.record = target, drafter, record
        self.config: Any = generation_config  # its prepared, private fields are not typed
        self.model_kwargs = model_kwargs
        pad = self.config._pad_token_tensor
        self.texts = Texts(input_ids, 0 if pad is None else int(pad))
        self.ends = Ends(stopping_criteria, batch)
        judges = (*logits_processor, *stopping_criteria)
        in_step = batch > 1 and (self.ends.is_open or not all(is_pure(judge) for judge in judges))
        self.chooser = Chooser(logits_processor, generation_config.do_sample, in_step)
        self.recorder = Recorder(generation_config, batch, sliding_windows(target.text_config))
        self.cache: Cache = model_kwargs[CACHE]
        self.forwards, self.slots = forwards, forwards.slots
        self.state = make_drafter_state(drafter, batch, forwards.settings)
        self.pausing = Pausing(drafter.config.pause_below)
        self.unread = Unread()
        self.longest_text: int | None = None  # slots of the prompt and of what may follow it, if that has a limit

    # --- the phases ---

    def prefill(self) -> None:
        """Run the target over the prompt, take its first token, let the drafter read all of it."""
        model, kwargs = self.target.model, self.model_kwargs
        past_length = self.cache.get_seq_length()
        with self._measuring_attention(past_length) as received:
            config = copy(self.config)
            config.compile_config = None  # it is for the forwards that follow
            outputs = model._prefill(self.texts.ids, config, kwargs, is_first_iteration=not config.is_assistant)
        self.cache = cache_of(outputs)
        check_cache(self.cache)
        embeds, features = self.record.take()
        self.head = _target_head(self.target, self.drafter, embeds.device, features, self.ends)
        last_logits = outputs.logits[:, -1]
        self.target.learn_logit_rule(features[:, -1], last_logits.to(features.device))

        raw = last_logits.to(copy=True, dtype=torch.float32, device=self.texts.ids.device)
        scores = self.chooser.process(self.texts.ids, raw)
        self.recorder.add_prefill(scores, raw, outputs)
        self.prompt_mask = kwargs.get("attention_mask")
        self.slots.place([self.cache.get_seq_length()] * self.texts.ids.shape[0])
        self._start_decoding_kwargs()
        prompt_ids = self.texts.ids
        first = self.chooser.pick(scores)[:, None]
        self._begin_texts(first[:, 0].tolist())
        if not self.is_done or self.is_cache_kept:
            self._read_prompt(prompt_ids, first, embeds, features, received)

    def step(self) -> None:
        """Draft a tree, verify it, keep a path, let the drafter read what was gained."""
        is_resting = [self.ends.is_resting(row) for row in range(len(self.texts.lengths))]
        tree = self._draft()
        self.record.clear()  # of what processors made the target do (guidance)
        outputs = self._forward(tree)
        features = self.forwards.features(outputs)
        logits = outputs.logits[:, : tree.num_nodes].to(dtype=torch.float32, device=self.texts.ids.device)
        starts = [length - self.texts.prompt_length for length in self.texts.lengths]
        verdict = self.chooser.verify(tree, logits, self.texts, self.ends, self.recorder)
        path, tokens, kept = verdict.path, verdict.tokens, verdict.counts
        going_on = [count for row, count in enumerate(kept) if not self.ends.is_resting(row)]
        if going_on:  # an end says nothing about the drafter
            self.pausing.note(going_on)

        num_kept = max(kept)
        self.recorder.add_states(outputs, path, starts, kept, self.slots.lengths)
        self.recorder.add_step(kept, tree.num_nodes - 1, is_resting)
        if num_kept > 1:  # the root is where it belongs
            self.forwards.keep(path)
        self.slots.commit(kept)
        if not self.is_done or self.is_cache_kept:
            nodes = path.to(features.device)[..., None].expand(-1, -1, features.shape[-1])
            self.unread.add(tokens, features.gather(1, nodes), kept)
            if not self.is_done and not self.pausing.is_paused:
                self._read_on()

    def idle(self) -> None:
        """Run a forward whose result nobody needs, for processes that wait for this one."""
        root = self._last_tokens()
        self._forward(DraftTree.chain(root))
        self.record.clear()

    def read_padding(self) -> None:
        """Feed rows that ended early their last token and padding, as plain decoding does: the next turn needs the former."""
        slots, texts = self.slots, self.texts
        missing = [slots.longest - length for length in slots.lengths]
        if not any(missing):
            return
        first = slots.tensor(texts.ids.device) - self.prompt_slots + texts.prompt_length
        unread = first[:, None] + torch.arange(max(missing), device=texts.ids.device)
        ids = texts.at(max(texts.lengths))
        self._forward(DraftTree.chain(ids.gather(1, unread.clamp(max=ids.shape[1] - 1))))
        self.record.clear()
        slots.commit(missing)

    def result(self) -> DreamGenerateOutput | torch.Tensor:
        """What `generate()` returns."""
        if self.is_cache_kept and self.prompt_mask is None and len(set(self.texts.lengths)) == 1:
            remember(self.cache, self.state, self.unread, self._last_tokens())
        sequences = self.texts.at(max(self.texts.lengths)).clone()  # without the room for more
        return self.recorder.result(sequences, sequences.shape[1] - self.texts.prompt_length, self.cache)

    @property
    def is_done(self) -> bool:
        """Whether no row needs another token."""
        return self.ends.is_done(self.texts)

    @property
    def is_cache_kept(self) -> bool:
        """Whether the caller can go on from the target's cache."""
        return self.config.return_dict_in_generate or getattr(self.cache, "_is_user_defined", False)

    @contextmanager
    def verifying(self) -> Iterator[None]:
        """While in the block the target's cache takes trees; after it, it is as plain decoding would have left it."""
        with self.forwards.using(self.cache):
            yield

    # --- the parts ---

    def _draft(self) -> DraftTree:
        root = self._last_tokens()
        if self.pausing.is_paused:
            return DraftTree.chain(root)
        room = self.ends.room(self.texts)
        limits = [
            self.pausing.max_depth,
            None if room is None else room - 1,
            self._positions_left(),
        ]  # the target adds a token
        max_depth = min((limit for limit in limits if limit is not None), default=None)
        tree = grow_tree(self.state, self.head, root, self.drafter.config, max_depth)
        return tree.to(self.texts.ids.device)

    def _positions_left(self) -> int | None:
        """How deep a tree may grow below the longest row while the target knows the positions; past them it is its affair."""
        if self.last_position is None:
            return None
        left = self.last_position - (self.slots.longest - self.prompt_slots)
        return left if left >= 0 else None

    def _read_on(self) -> None:
        """Let the drafter read what was gained since it last did."""
        tokens, features, counts = self.unread.take()
        self.state.read_on(self.head.embed(tokens), features, counts)

    def _forward(self, tree: DraftTree) -> Any:
        """Run the target over all nodes at once, each seeing the verified text and its own ancestors."""
        tree = self.forwards.pad(tree)
        model, num_nodes = self.target.model, tree.num_nodes
        device = tree.tokens.device
        lengths = self.slots.tensor(device)
        kwargs = dict(self.decoding_kwargs)
        if self.prompt_mask is not None:
            num_new = self.slots.longest + num_nodes - self.prompt_mask.shape[1]
            kwargs["attention_mask"] = torch.nn.functional.pad(self.prompt_mask, (0, num_new), value=1)
        if self.root_positions is not None:
            ahead = (lengths - self.prompt_slots)[:, None] + tree.depths
            if (
                self.longest_text is not None
            ):  # what lies behind the last token that is ever read need not have a place
                ahead = ahead.clamp(max=self.longest_text - self.prompt_slots - 2)
            kwargs["position_ids"] = self.root_positions + ahead
        for name in TOKEN_TYPES:
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name].expand(-1, num_nodes)
        with tree_scope(TreeScope(lengths, tree.depths, tree.ancestors)):
            inputs = model.prepare_inputs_for_generation(
                tree.tokens, next_sequence_length=num_nodes, is_first_iteration=False, **kwargs
            )
            if inputs.get("position_ids") is None:
                inputs["position_ids"] = self.target.own_positions(lengths[:, None] + tree.depths)
            return self.forwards(inputs, num_nodes)

    def _begin_texts(self, tokens: list[int]) -> None:
        """Append the first token of each row, which may be the last one."""
        rows = range(len(tokens))
        self.texts.append(rows, tokens)
        scores = self.recorder.scores if self.recorder.wants_scores else None
        self.ends.look(self.texts, rows, tokens, rows, scores)

    def _last_tokens(self) -> torch.Tensor:
        """The last token of each row, (B, 1)."""
        lengths = torch.tensor(self.texts.lengths, device=self.texts.ids.device)
        return self.texts.ids.gather(1, lengths[:, None] - 1)

    def _start_decoding_kwargs(self) -> None:
        """Set aside what changes with every tree; the rest of the target's arguments stays the same from here on."""
        kwargs = dict(self.model_kwargs)
        kwargs[CACHE] = self.cache
        kwargs.pop("attention_mask", None)
        positions = kwargs.pop("position_ids", None)
        self.root_positions = None if positions is None else positions[..., -1:] + 1
        num_positions = getattr(self.target.text_config, "max_position_embeddings", None)
        self.last_position: int | None = None  # the last one the target was made for, counted from the first root's
        if positions is not None and num_positions is not None:
            self.last_position = num_positions - 2 - int(positions[..., -1].max())
        self.prompt_slots = self.slots.longest
        if self.ends.max_length is not None:  # never more slots than the longest text and a tree need
            self.longest_text = self.prompt_slots + self.ends.max_length - self.texts.prompt_length
            self.slots.limit = self.longest_text + self.drafter.config.tree_size + 1
        for name in TOKEN_TYPES:
            if kwargs.get(name) is not None:  # new tokens are text
                kwargs[name] = torch.zeros_like(kwargs[name][:, :1])
        self.decoding_kwargs = kwargs

    @contextmanager
    def _measuring_attention(self, past_length: int) -> Iterator[list[tuple[int, torch.Tensor]]]:
        """Collect what each key of the last layer receives: entries of (last key + 1, attention received (B, K))."""
        received: list[tuple[int, torch.Tensor]] = []
        is_wanted = self.drafter.config.needs_attention and bool(self.target.is_visual(self.texts.ids).any())

        def observe(module: Any, chunks: Iterator[torch.Tensor]) -> None:
            end = received[-1][0] if received else past_length
            sizes: list[int] = []  # of chunks that have passed, none of which is kept
            part = attention_received(_counted(chunks, sizes))
            received.append((end + sum(sizes), part))

        with ExitStack() as stack:
            if is_wanted:
                stack.enter_context(observe_attention([self.target.last_attention], observe))
            yield received

    def _read_prompt(
        self,
        prompt_ids: torch.Tensor,
        first: torch.Tensor,
        embeds: torch.Tensor,
        features: torch.Tensor,
        received: list[tuple[int, torch.Tensor]],
    ) -> None:
        """Let the drafter read the prompt, without the visual tokens the target hardly attends to, and the first token."""
        num_tokens, total = features.shape[1], self.prompt_slots
        device = features.device
        real = torch.ones(first.shape[0], total, dtype=torch.bool, device=device)
        if self.prompt_mask is not None:
            real = self.prompt_mask.to(device).bool()
        attention = None
        if received:
            attention = torch.zeros(first.shape[0], total, device=device)
            for end, part in received:
                attention[:, end - part.shape[1] : end] += part.to(device)
            attention = attention[:, -num_tokens:]
        is_visual = self.target.is_visual(prompt_ids[:, -num_tokens:]).to(device)
        config = self.drafter.config
        # A drafter that goes on has read the first of these tokens, and not its feature.
        unread = slice(1 if self._continue_last_turn(prompt_ids, num_tokens) else 0, None)
        text = compress_text(
            embeds[:, unread],
            features[:, unread],
            real,
            is_visual[:, unread],
            config.visual_keep_ratio,
            config.visual_importance,
            None if attention is None else attention[:, unread],
        )
        if self.longest_text is not None:
            self.state.limit(self.longest_text + config.tree_depth * config.tree_top_k + 1)
        self.state.read_prompt(text, self.head.embed(first), real.sum(-1, keepdim=True), features[:, : unread.start])

    def _continue_last_turn(self, prompt_ids: torch.Tensor, num_tokens: int) -> bool:
        """Take over the drafter's state, up to date, if the last `num_tokens` of the prompt continue a remembered text."""
        if self.prompt_mask is not None or prompt_ids.shape[1] < num_tokens:
            return False
        last_tokens = prompt_ids[:, -num_tokens:][:, :1]
        turn = recall(self.cache, self.drafter, self.prompt_slots - num_tokens, last_tokens)
        if turn is None:
            return False
        self.state, self.unread = turn.state, turn.unread
        if self.unread:
            self._read_on()
        return True


def _target_head(
    target: Target, drafter: DreamDrafter, embed_device: torch.device, like: torch.Tensor, ends: Ends
) -> TargetHead:
    """The ends of the target that a drafter borrows, for features `like` these; it holds nothing of a decoding."""
    device, dtype = like.device, like.dtype
    draft_logits = target.draft_logits(drafter)
    return TargetHead(
        embed=lambda token_ids: target.embed(token_ids.to(embed_device)),
        logits=lambda features: draft_logits(features.to(device, dtype)),
        token_ids=drafter.draft_token_ids,
        ends=ends.eos_token_ids,
        barred=target.unusable_ids(),
    )


def _counted(chunks: Iterator[torch.Tensor], sizes: list[int]) -> Iterator[torch.Tensor]:
    """The same chunks (B, heads, Q, K); `sizes` gets how many queries each has."""
    for chunk in chunks:
        sizes.append(chunk.shape[2])
        yield chunk
