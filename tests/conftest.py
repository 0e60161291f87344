"""What holds for all tests."""

import pytest

from dream_hf import configuration_dream


@pytest.fixture(autouse=True)
def drafting_in_every_step(monkeypatch):
    """New drafters pause soon if they are as bad as untrained ones; tests want them to draft (but for one in test_pausing)."""
    monkeypatch.setattr(configuration_dream, "NEW_DRAFTERS_PAUSE_BELOW", 0.0)
