"""What holds for every test."""

import pytest
from double import keeping_double


@pytest.fixture(scope="session", autouse=True)
def double_stays_double():
    """Models in float64 compute in float64 throughout; nothing changes for other models."""
    with keeping_double():
        yield
