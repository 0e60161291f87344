"""Drafters on the Hub: downloads, uploads and their model cards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..drafters.dream.push import PushReport as PushReport
    from ..drafters.dream.push import push_drafter as push_drafter


def __getattr__(name: str) -> Any:
    """What stands above this folder, and has always been importable from here."""
    if name not in ("PushReport", "push_drafter"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ..drafters.dream import push

    return getattr(push, name)
