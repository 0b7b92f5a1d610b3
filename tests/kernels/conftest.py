"""The kernels' tests look at every value, as FST_CHECK=1 asks on any device."""

import pytest


@pytest.fixture(autouse=True)
def _values_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FST_CHECK", "1")
