"""What holds for every test."""

import pytest
from double import keeping_double

from dream_hf.drafters import new_drafters


@pytest.fixture(autouse=True)
def drafting_in_every_step(monkeypatch):
    """New drafters pause soon if they are as bad as untrained ones; tests want them to draft (but for one in test_pausing)."""
    monkeypatch.setattr(new_drafters, "NEW_DRAFTERS", {})


@pytest.fixture(scope="module", autouse=True)
def double_stays_double(request):
    """Models in float64 compute in float64 throughout; nothing changes for other models.

    A module whose models are traced by torch.compile, which cannot look at callers, says `KEEPS_DOUBLE = False`.
    """
    if not getattr(request.module, "KEEPS_DOUBLE", True):
        yield
        return
    with keeping_double():
        yield
