"""The sublayers that are left out at present, as modules, and where that is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ...targets.sublayers import ATTENTION, MLP
from .search import SkipSearch, read_skip, write_skip


@dataclass
class SublayerChoice:
    """What to leave out, found by a search or settled.

    Args:
        sublayers (`Mapping[str, nn.Module]`): What there is.
        search (`SkipSearch`): Knows the best set so far.
        identity (`Mapping`): Of the target, for the file.
        path (`Path`, *optional*): The file.
    """

    sublayers: Mapping[str, nn.Module]
    search: SkipSearch
    identity: dict[str, Any]
    path: Path | None = None

    def modules(self, names: frozenset[str] | None = None) -> frozenset[nn.Module]:
        """The modules of sublayers, by default of the best set so far."""
        return frozenset(self.sublayers[name] for name in (self.search.best if names is None else names))

    def note(self, candidate: frozenset[str], match: float) -> None:
        """Take note of a set that was tried, and keep it in the file if it is the best."""
        if self.search.note(candidate, match) and self.path is not None:
            write_skip(self.path, candidate, match, self.identity)

    def settle(self, skip: Iterable[Any]) -> None:
        """Leave these out, named or by numbers of layers, and search no more."""
        self.search.settle(self._names(skip))

    def read_file(self) -> None:
        """Leave out what the file says, if it is there."""
        if self.path is not None and self.path.is_file():
            self.search.settle(*read_skip(self.path, self.sublayers, self.identity))

    def _names(self, skip: Iterable[Any]) -> frozenset[str]:
        found: set[str] = set()
        for entry in skip:
            names = [f"{entry}.{part}" for part in (ATTENTION, MLP)] if isinstance(entry, int) else [entry]
            known = [name for name in names if name in self.sublayers]
            if not known:
                raise ValueError(
                    f"`skip` names {entry!r}; the target's sublayers are {', '.join(self.sublayers)}, or numbers of layers."
                )
            found.update(known)
        return frozenset(found)
