"""What holds for every test."""

import pytest
from double import keeping_double


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
