"""Fuzzers: FST_FUZZ_EXAMPLES inputs of each, 200 unless it says more; `make fuzz` takes 20,000. An input that hangs is an error, too."""

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

HANG_S = 60
"""No input may take so long; most take milliseconds."""

settings.register_profile(
    "fuzz",
    max_examples=int(os.environ.get("FST_FUZZ_EXAMPLES", "200")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def bounded():
    """A function that calls a function of no arguments and raises TimeoutError when it does not return."""

    def call(function):
        signal.setitimer(signal.ITIMER_REAL, HANG_S)
        try:
            return function()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def hang(*_):
        raise TimeoutError(f"no answer within {HANG_S} s")

    before = signal.signal(signal.SIGALRM, hang)
    yield call
    signal.signal(signal.SIGALRM, before)
