"""Drafters on the Hub: downloads, uploads and their model cards."""

from __future__ import annotations

from typing import Any

from ..registration import lazy_attribute

# What stands above this folder, and has always been importable from here.
_MODULES = {"PushReport": "drafters.push", "push_drafter": "drafters.push"}


def __getattr__(name: str) -> Any:
    return lazy_attribute("dream_hf", _MODULES, name)
