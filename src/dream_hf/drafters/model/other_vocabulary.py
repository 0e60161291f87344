"""A model that drafts in a vocabulary of its own, at work in one `generate()`."""

from __future__ import annotations

import math

import torch

from ...decoding.drafter import DraftSession, Prefill, Verified
from ...decoding.settings import DraftSettings
from ...decoding.tree import DraftTree
from ...runtime.phases import DRAFTER, GROWTH, phase
from ...targets.target import Target, end_ids
from ..best_first import tree_of
from ..growth import grow_tree
from ..tentative import Draftable, TentativeLevels
from .bridge import Speller, Written
from .reading import read_rows
from .respelling import Ends, respell
from .text import ReadText

MOST_TOKENS = 4.0  # of the drafter's that are drafted for one of the target's
TAILS = (8, 16, 32, 4)  # last tokens that are encoded anew with what was added, tried in this order


class OwnText:
    """A text in the drafter's tokens.

    Args:
        speller (`Speller`): The drafter's.
        text (`str`): How it begins.
    """

    def __init__(self, speller: Speller, text: str):
        self.speller, self.num_characters = speller, len(text)
        opening = speller.tokenizer.bos_token_id
        self.opening = [] if opening is None else [opening]
        self.ids = [*self.opening, *speller.encode(text)] or [0]

    def follow(self, text: str) -> int:
        """Take in what `text` has gained; returns how many of the tokens from before are still right."""
        added = text[self.num_characters :]
        if not added:
            return len(self.ids)
        before, self.num_characters = self.ids, len(text)
        self.ids = self._with(added) or [*self.opening, *self.speller.encode(text)]
        same = (ours == theirs for ours, theirs in zip(before, self.ids, strict=False))
        return min(next((place for place, is_same in enumerate(same) if not is_same), len(before)), len(self.ids) - 1)

    def _with(self, added: str) -> list[int]:
        """The tokens with some more text behind them; none where the last ones do not say how to go on."""
        for size in TAILS:
            tail = self.ids[len(self.opening) :][-size:]
            text = self.speller.decode(tail)
            if tail and self.speller.encode(text) == tail:
                return self.ids[: len(self.ids) - len(tail)] + self.speller.encode(text + added)
        return []


class RespellingSession(DraftSession):
    """Reads and drafts the characters that the target writes, in other tokens.

    Where its own tokenizer splits the end of the text otherwise than before, the last tokens are taken back and read anew.

    Args:
        model (`Target`): The model that drafts.
        own, theirs (`Speller`): Its tokenizer and the target's.
        prefill (`Prefill`): What the target has read.
        settings (`DraftSettings`): How to draft, in tokens of the target's.
    """

    def __init__(self, model: Target, own: Speller, theirs: Speller, prefill: Prefill, settings: DraftSettings):
        self.model, self.own, self.settings = model, own, settings
        theirs_end = theirs.tokenizer.eos_token_id
        if theirs_end not in prefill.end_ids:
            theirs_end = min(prefill.end_ids, default=None)
        own_ends = end_ids(model.model.generation_config) | end_ids(own.tokenizer)
        self.ends = Ends(own_ends - {None}, theirs_end)
        unwanted = {theirs.tokenizer.bos_token_id, theirs.tokenizer.pad_token_id, theirs.tokenizer.eos_token_id}
        prompts = zip(prefill.token_ids.tolist(), prefill.is_text.tolist(), prefill.first_tokens.tolist(), strict=True)
        self.written = [
            Written(
                theirs, [*(id for id, is_text in zip(*row, strict=True) if is_text and id not in unwanted), *first]
            )
            for *row, first in prompts
        ]
        self.texts = [OwnText(own, written.text) for written in self.written]
        with phase(DRAFTER):
            prompt = read_rows(model, [text.ids for text in self.texts])
        self.read_text = ReadText(model, prompt, settings.tree_size)
        self.padding = [self.read_text.forward.prompt_slots - len(text.ids) for text in self.texts]
        self.draftable = Draftable(model.text_config.vocab_size, tuple(model.visual_ids))

    def draft(self, root_tokens: torch.Tensor, max_depth: int | None = None) -> DraftTree:
        if max_depth == 0:
            return DraftTree.chain(root_tokens)
        with self.model.taking_trees():
            self._catch_up()
            roots = torch.tensor([text.ids[-1:] for text in self.texts], device=self.read_text.device)
            tree = grow_tree(self.levels(), roots, self._own_settings(), self.ends.drafter)
        with phase(GROWTH):
            rows = [
                respell(tree, row, self.own, text.ids, written, self.ends, self.settings)
                for row, (text, written) in enumerate(zip(self.texts, self.written, strict=True))
            ]
            return tree_of(root_tokens, rows)

    def levels(self) -> TentativeLevels:
        """The levels below the last tokens, in the drafter's vocabulary."""
        return self.read_text.levels(self.draftable)

    def read(self, verified: Verified) -> None:
        for written, tokens, count in zip(self.written, verified.tokens.tolist(), verified.counts, strict=True):
            written.extend(tokens[:count])

    def _own_settings(self) -> DraftSettings:
        """Settings that count the target's tokens in tokens of the drafter's, by what they have needed for this text so far."""
        ratio = sum(len(text.ids) for text in self.texts) / max(sum(len(written.ids) for written in self.written), 1)
        ratio = min(max(ratio, 1.0), MOST_TOKENS)
        depth, size = (math.ceil(count * ratio) for count in (self.settings.tree_depth, self.settings.tree_size))
        return self.settings.changed(tree_depth=depth, tree_size=size)

    def _catch_up(self) -> None:
        """Read what was written since the last draft, and anew what is now spelt otherwise."""
        kept = [text.follow(written.text) for text, written in zip(self.texts, self.written, strict=True)]
        unread = [text.ids[count:] for text, count in zip(self.texts, kept, strict=True)]
        if not any(unread):
            return
        places = [padding + count for padding, count in zip(self.padding, kept, strict=True)]
        self.read_text.forward.slots.place(places)
        counts = [len(row) for row in unread]
        rows = [[*row, *[0] * (max(counts) - len(row))] for row in unread]
        self.read_text.read(torch.tensor(rows, device=self.read_text.device), counts, self.settings.draft_threads)
