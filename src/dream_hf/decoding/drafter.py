"""The seam between the loop and what drafts.

Verification asks nothing of a drafter: any legal [`DraftTree`] is lossless. So the loop knows no more of one than what stands
here, and a drafter knows nothing of the loop. B rows, T tokens, N nodes, H width of the target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..runtime.compilation import Settings as CompileSettings
from ..runtime.slots import Slots
from ..targets.target import Target
from .settings import DraftSettings
from .tree import DraftTree


@dataclass(frozen=True)
class Needs:
    """What a drafter wants to see of the target's forwards; what it does not name is not computed.

    Args:
        layers (`tuple[int, ...]`): Layers whose features it reads, side by side in this order: -1 for those after the final
            norm, i for what decoder layer i puts out. None at all by default.
        embeds (`bool`): The embeddings of the prompt as they entered the decoder, images merged.
        attention (`bool`): What each token of a prompt with pictures receives in the last layer's attention.
        num_likeliest (`int`): How many of the target's likeliest tokens it wants after every verified node.
        positions (`bool`): The positions of the prompt's tokens, where the target has given them any.
        inputs (`bool`): What the target reads beside the tokens, pictures above all, as `generate()` was given it.
        cache (`bool`): The target's own cache to draft in. The target's forwards are not compiled then.
    """

    layers: tuple[int, ...] = ()
    embeds: bool = False
    attention: bool = False
    num_likeliest: int = 0
    positions: bool = False
    inputs: bool = False
    cache: bool = False

    def last_features(self, features: torch.Tensor | None) -> torch.Tensor | None:
        """Of features (B, T, layers * H) those after the final norm, (B, T, H), if they are among them."""
        if features is None or -1 not in self.layers:
            return None
        return features.chunk(len(self.layers), dim=-1)[self.layers.index(-1)]


class NodeForward(Protocol):
    """A model's forwards over nodes behind what its cache holds, which are taken back afterwards."""

    slots: Slots

    def draft(self, tokens: torch.Tensor, depths: torch.Tensor, ancestors: torch.Tensor) -> Any:
        """The model's outputs for `tokens` (B, Q), the last of N nodes whose others stand in the tentative slots.

        `depths` are (N,), 0 for what follows the cache's last token, and `ancestors` (B, Q, N), themselves included.
        """

    def take_back(self) -> None:
        """Empty the tentative slots."""


@dataclass(frozen=True)
class Prefill:
    """What the target has just run over, and what a session starts with.

    Args:
        target (`Target`): Lends its embedding and head.
        token_ids (`torch.LongTensor` of shape `(B, T)`): The tokens of this prefill. They may continue a text.
        real (`torch.BoolTensor` of shape `(B, P + T)`): False at padding, in the P slots before these tokens as well.
        is_visual (`torch.BoolTensor` of shape `(B, T)`): True at image and video tokens.
        first_tokens (`torch.LongTensor` of shape `(B, 1)`): What the target says next.
        end_ids (`frozenset[int]`): Tokens that end a text; below them nothing need be drafted.
        embeds (`torch.Tensor` of shape `(B, T, H)`, *optional*): As `Needs` says.
        features (`torch.Tensor` of shape `(B, T, layers * H)`, *optional*): As `Needs` says.
        attention (`torch.Tensor` of shape `(B, T)`, *optional*): As `Needs` says.
        positions (`torch.LongTensor` of shape `(B, T)` or `(3, B, T)`, *optional*): As `Needs` says: of tokens, or of time,
            height and width.
        longest_text (`int`, *optional*): Slots that a text never exceeds, drafted tokens not counted.
        compilation (`CompileSettings`, *optional*): How forwards are to be compiled, where they can be.
        earlier (`DraftSession`, *optional*): The session that an earlier turn of this very text was left in. It has read all
            tokens before these and the first of these.
    """

    target: Target
    token_ids: torch.Tensor
    real: torch.Tensor
    is_visual: torch.Tensor
    first_tokens: torch.Tensor
    end_ids: frozenset[int] = frozenset()
    embeds: torch.Tensor | None = None
    features: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    longest_text: int | None = None
    compilation: CompileSettings | None = None
    earlier: DraftSession | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    forward: NodeForward | None = None

    @property
    def is_text(self) -> torch.Tensor:
        """False at tokens that are padding or pictures, (B, T), beside `token_ids`."""
        real = self.real[:, self.real.shape[1] - self.token_ids.shape[1] :]
        return real.to(self.token_ids.device) & ~self.is_visual


@dataclass(frozen=True)
class Verified:
    """What a step has gained: the first `counts[b]` entries of row b, the drafted tokens that were kept and one more.

    Args:
        tokens (`torch.LongTensor` of shape `(B, T)`): The tokens, as the target chose them.
        counts (`Sequence[int]`): How many each row gained; 0 for one that rests.
        features (`torch.Tensor` of shape `(B, T, layers * H)`, *optional*): The features each of them was chosen from.
        tree (`DraftTree`, *optional*): All nodes that were verified, where `likeliest` is wanted.
        likeliest (`torch.LongTensor` of shape `(B, N, num_likeliest)`, *optional*): The target's likeliest tokens after every
            node, best first.
    """

    tokens: torch.Tensor
    counts: Sequence[int]
    features: torch.Tensor | None = None
    tree: DraftTree | None = None
    likeliest: torch.Tensor | None = None


class DraftSession:
    """A drafter at work in one `generate()`."""

    @property
    def looks_ahead(self) -> bool:
        """Whether [`look_ahead`] is wanted now."""
        return False

    def look_ahead(self, tokens: torch.Tensor, features: torch.Tensor, counts: torch.Tensor) -> DraftTree:
        """Begin the next draft while the host has yet to hear what a step gains; [`read`] says it afterwards.

        Most likely the first `counts` (B,) of `tokens` (B, T), with the `features` (B, T, layers * H) they were chosen from:
        then `read` gets these very counts. It may be less, where a text ends.

        Returns:
            `DraftTree`: What [`draft`] returns then, the same object, if it is that.
        """
        raise NotImplementedError

    def draft(self, root_tokens: torch.Tensor, max_depth: int | None = None) -> DraftTree:
        """A tree below the last token of each row, (B, 1), of at most `max_depth` levels; 0 for the root alone.

        All that has been verified was read before. Any device will do.
        """
        raise NotImplementedError

    def read(self, verified: Verified) -> None:
        """Take in what a step has gained, or take note of it for later: several steps may pass between two drafts."""
        raise NotImplementedError

    def suspend(self) -> DraftSession | None:
        """What a next turn of this text can go on from, or None if that has to start anew."""
        return None

    def close(self) -> None:
        """The `generate()` is over, whether or not all rows were finished; a next turn may go on all the same."""


class Drafter:
    """What `generate(..., assistant_model=drafter)` takes."""

    @property
    def plain(self) -> Drafter:
        """The drafter itself, without settings put around it."""
        return self

    @property
    def settings(self) -> DraftSettings:
        """How it drafts where a call says nothing else."""
        raise NotImplementedError

    @property
    def needs(self) -> Needs:
        """What it wants to see of the target."""
        return Needs()

    def check(self, target: Any, settings: DraftSettings) -> None:
        """Refuse a target model or settings that it cannot draft for, with a `ValueError` that says why."""

    def start(self, prefill: Prefill, settings: DraftSettings) -> DraftSession:
        """Begin a `generate()` whose prompt the target has just read."""
        raise NotImplementedError

    def with_settings(self, **changes: Any) -> Drafter:
        """The same drafter with other settings, for a call or a thread of its own; this one is not changed.

        Args:
            **changes: Fields of [`DraftSettings`].

        Raises:
            ValueError: A name that is no setting, or a value that has no meaning.
        """
        return DrafterWithSettings(self, self.settings.changed(**changes))


class DrafterAround(Drafter):
    """A drafter around another one: as it stands it does what the other does, and it is a drafter of its own.

    What is to differ is overridden: what the other gets to see, its session, its settings. Neither it nor any global is
    changed.

    Args:
        drafter (`Drafter`): The other; shared, not copied.
    """

    def __init__(self, drafter: Drafter):
        self.inner = drafter

    @property
    def settings(self) -> DraftSettings:
        return self.inner.settings

    @property
    def needs(self) -> Needs:
        return self.inner.needs

    def check(self, target: Any, settings: DraftSettings) -> None:
        self.inner.check(target, settings)

    def start(self, prefill: Prefill, settings: DraftSettings) -> DraftSession:
        return self.inner.start(prefill, settings)


class DrafterWithSettings(DrafterAround):
    """A drafter and settings of one's own for it.

    Args:
        drafter (`Drafter`): The drafter; shared, not copied.
        settings (`DraftSettings`): How to draft.
    """

    def __init__(self, drafter: Drafter, settings: DraftSettings):
        super().__init__(drafter.plain)
        self._settings = settings

    @property
    def plain(self) -> Drafter:
        return self.inner

    @property
    def settings(self) -> DraftSettings:
        return self._settings
