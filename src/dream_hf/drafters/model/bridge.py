"""From the tokens of one vocabulary to those of another, over the characters that both spell.

A drafted path is a string; whatever the target's tokenizer makes of that string behind the text so far is a path of the
target's, which may be verified like any other (TokenTiming, arXiv 2510.15545, warps token sequences instead). What does not
spell the beginning of the drafted string is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"  # what decoders write for a part of a character
CONTEXT = 8  # tokens before a piece of text that decide how its beginning is decoded
TAILS = (4, 8, 16, 2, 1)  # last tokens that a drafted string may be encoded behind, tried in this order


class Speller:
    """A tokenizer as a pair of functions between tokens and characters that add and leave out nothing.

    Args:
        tokenizer: A tokenizer, or a processor that has one.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self.special_ids = frozenset(self.tokenizer.all_special_ids)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without any that open or close it."""
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def spell(self, before: Sequence[int], ids: Sequence[int]) -> str | None:
        """What `ids` add to the text of the tokens `before`; None where that text itself changes by it."""
        context = list(before[-CONTEXT:])
        known = self.decode(context).rstrip(BROKEN)
        whole = self.decode([*context, *ids])
        return whole[len(known) :] if whole.startswith(known) else None


class Written:
    """A text of the target's: its tokens, and its characters as far as they are whole.

    Args:
        speller (`Speller`): The target's.
        ids (`Sequence[int]`): The first tokens.
    """

    def __init__(self, speller: Speller, ids: Sequence[int]):
        self.speller, self.ids = speller, list(ids)
        self.text = speller.decode(self.ids).rstrip(BROKEN)
        self.num_whole = len(self.ids)  # tokens whose characters are all in `text`
        if speller.decode(self.ids[-CONTEXT:]).endswith(BROKEN):
            self._find_whole()

    def extend(self, ids: Sequence[int]) -> None:
        """Write on. A character whose bytes are still incomplete waits."""
        self.ids.extend(ids)
        added = self.speller.spell(self.ids[: self.num_whole], self.ids[self.num_whole :])
        if added is not None and not added.endswith(BROKEN):
            self.text += added
            self.num_whole = len(self.ids)

    def paths(self, drafted: str) -> tuple[list[int], list[int]]:
        """The tokens that `drafted` has behind this text, and the number of its characters that are spelt after each.

        No tokens where the target's tokenizer spells something else.
        """
        for size in TAILS:
            tail = self.ids[max(self.num_whole - size, 0) :]
            whole = tail[: len(tail) - (len(self.ids) - self.num_whole)]
            text = self.speller.decode(whole)
            encoded = self.speller.encode(text + drafted)
            if encoded[: len(tail)] == tail:
                return self._spelt(encoded[len(tail) :], drafted)
        return self._spelt(self.speller.encode(drafted), drafted) if self.num_whole == len(self.ids) else ([], [])

    def _spelt(self, ids: list[int], drafted: str) -> tuple[list[int], list[int]]:
        """The first of `ids` that spell a beginning of `drafted`, and how much of it after each."""
        before = self.ids[-2 * CONTEXT :]
        ends: list[int] = []
        begun = len(self.speller.decode(before[: len(before) - len(self.ids) + self.num_whole]))
        for count in range(1, len(ids) + 1):
            whole = self.speller.decode([*before, *ids[:count]])
            spelt = whole[begun:].rstrip(BROKEN)
            if ids[count - 1] in self.speller.special_ids or not drafted.startswith(spelt):
                return ids[: count - 1], ends
            ends.append(max([len(spelt), *ends[-1:]]))  # a broken character may break the whole ones before it
        return ids, ends

    def _find_whole(self) -> None:
        """Leave out the last tokens, which end within a character."""
        while self.num_whole and self.speller.decode(self.ids[: self.num_whole][-CONTEXT:]).endswith(BROKEN):
            self.num_whole -= 1
        self.text = self.speller.decode(self.ids[: self.num_whole])
