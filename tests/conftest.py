"""What holds for every test."""

import pytest
from double import keeping_double

from dream_hf.drafters.dream import configuration as configuration_dream


@pytest.fixture(autouse=True)
def drafting_in_every_step(monkeypatch):
    """New drafters pause soon if they are as bad as untrained ones; tests want them to draft (but for one in test_pausing)."""
    monkeypatch.setattr(configuration_dream, "NEW_DRAFTERS_PAUSE_BELOW", 0.0)


@pytest.fixture(scope="session", autouse=True)
def double_stays_double():
    """Models in float64 compute in float64 throughout; nothing changes for other models."""
    with keeping_double():
        yield
