"""What holds for every test."""

import os

import pytest
import torch
from double import keeping_double

from dream_hf.drafters import new_drafters

DEVICE = os.environ.get(
    "DREAM_HF_TEST_DEVICE"
)  # where models and tensors are made, such as "cuda"; by default on the CPU

if DEVICE is not None:
    torch.set_default_device(DEVICE)

    class _Generator(torch.Generator):
        """One of the device where tensors are made, which those of a CPU cannot fill."""

        def __new__(cls, device=DEVICE):
            return super().__new__(cls, device)

    torch.Generator = _Generator


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
