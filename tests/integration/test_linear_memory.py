"""The fused losses never hold whole logits: peak memory against eager PyTorch, each in a fresh process, on the same inputs.

The size is a quarter of a real vocabulary and of a real micro-batch, so that it takes seconds; the full one is a benchmark
(`python -m benchmarks.linear_policy_loss 4096,256,151936`, docs/benchmarks.md).
"""

import sys

import pytest

from benchmarks import measure

SIZE = (1024, 64, 37984)  # N, H, V: 156 MB of logits
CHUNK_ROWS = 64  # of 9.7 MB, in place of the default of 64 MB

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux tells a process's peak"
)


def small(name, variant, size):
    """For the child: as benchmarks.linear_policy_loss.in_child, with chunks in proportion."""
    import functools

    import fst_kernels
    from benchmarks import head_peers, linear_policy_loss

    for op in ("linear_policy_loss", "linear_logprob"):
        setattr(head_peers, op, functools.partial(getattr(fst_kernels, op), chunk_rows=CHUNK_ROWS))
    return linear_policy_loss.in_child(name, variant, size)


@pytest.fixture(scope="module")
def eager_bytes():
    report = measure.in_child("tests.integration.test_linear_memory", "small", "torch eager", "step", SIZE)
    n, _, v = SIZE
    assert report.peak_bytes > 2 * 4 * n * v  # logits and their gradient at least: the measure works
    return report.peak_bytes


@pytest.mark.parametrize("name", ["ours, reference", "ours, mode A + policy_loss"])
def test_forward_and_backward_take_less_than_an_eighth_of_eager_memory(name, eager_bytes):
    report = measure.in_child("tests.integration.test_linear_memory", "small", name, "step", SIZE)
    _, h, v = SIZE
    assert 4 * v * h < report.peak_bytes < eager_bytes / 8  # the weight's gradient at least
