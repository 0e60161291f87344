"""`LayerSkipDrafter`: the target without some of its sublayers drafts for the whole (SWIFT, arXiv 2410.06916)."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from transformers.modeling_utils import PreTrainedModel

from ...decoding.drafter import Drafter, Needs, Prefill
from ...decoding.settings import DraftSettings
from ...targets.sublayers import sublayers
from ...targets.target import Target
from ..fit import check_top_k, describe_target
from .choice import SublayerChoice
from .search import SkipSearch
from .session import SkipSession

# A level costs half a step, so that only what is nearly certain is worth going on from; two levels have to gain a token.
DEFAULTS = DraftSettings(
    tree_depth=8,
    tree_top_k=2,
    tree_size=10,
    tree_min_level_probability=0.85,
    tree_min_node_probability=0.1,
    pause_below=2.0,
)


class LayerSkipDrafter(Drafter):
    """Drafts with the target's own weights and cache, leaving out attention and MLP of some layers. Needs no training.

    What to leave out is given, or found while the drafter works: each step tries one more set on the last tokens of the text
    that is being written, and the best is kept for all further calls. The target's forwards are not compiled.

    Args:
        target (`PreTrainedModel`): The target; it drafts for no other.
        skip (`Iterable`, *optional*): What to leave out: names as `"3.attention"` and `"3.mlp"`, or numbers of whole layers.
            By default it is searched for.
        ratio (`float`): Share of the sublayers that a search leaves out.
        max_tries (`int`): Sets of sublayers that a search tries.
        seed (`int`): Of the search.
        path (`str` or `os.PathLike`, *optional*): A JSON file for the set: read if it is there, and written when a search
            finds a better one.
        settings (`DraftSettings`, *optional*): How to draft.

    Raises:
        ValueError: Sublayers that the target does not have, a ratio without meaning, a file that is of another target, or a
            target whose layers cannot be left out.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        skip: Iterable[str | int] | None = None,
        ratio: float = 0.45,
        max_tries: int = 200,
        seed: int = 0,
        path: str | PathLike | None = None,
        settings: DraftSettings | None = None,
    ):
        self.target, self._settings = Target(target), settings or DEFAULTS
        found = sublayers(self.target.decoder)
        name = type(self.target.model).__name__
        if not found:
            raise ValueError(f"`target` (`{name}`) has no sublayers that could be found; use another drafter.")
        if self.target.length_dependent_rotaries:
            raise ValueError(
                f"`target` (`{name}`) keeps angles of its longest text (`rope_type` dynamic or longrope), which drafts would "
                "change; use another drafter."
            )
        if not 0.0 < ratio < 1.0:
            raise ValueError(f"`ratio` ({ratio}) must lie between 0 and 1, or give `skip`.")
        search = SkipSearch(list(found), ratio, seed, max_tries)
        self.choice = SublayerChoice(
            found, search, describe_target(self.target.model.config), None if path is None else Path(path)
        )
        if skip is not None:
            self.choice.settle(skip)
        else:
            self.choice.read_file()

    @property
    def settings(self) -> DraftSettings:
        return self._settings

    @property
    def needs(self) -> Needs:
        """The target's cache."""
        return Needs(cache=True)

    @property
    def skip(self) -> list[str]:
        """What is left out at present."""
        return [name for name in self.choice.sublayers if name in self.choice.search.best]

    def check(self, target: PreTrainedModel, settings: DraftSettings) -> None:
        """Refuse any other target, and trees wider than its vocabulary."""
        if target is not self.target.model:
            raise ValueError(
                f"The drafter was made of one `{type(self.target.model).__name__}` and is asked to draft for another model. "
                "Make one with `LayerSkipDrafter(target)`."
            )
        check_top_k(settings, self.target.text_config.vocab_size, "the target's `vocab_size`")

    def start(self, prefill: Prefill, settings: DraftSettings) -> SkipSession:
        return SkipSession(self.choice, prefill, settings)
