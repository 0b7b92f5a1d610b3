"""The kernels' tests look at every value, as FST_CHECK=1 asks on any device; those that emulate a GPU are marked."""

import os

import pytest

# Minutes each: Triton kernels in its interpreter, CUDA kernels on host threads. `make emulated` runs them, `.ci/run` too.
EMULATED_FILES = ("test_tree_attention_triton.py", "test_sample_tokens_kernel.py")
EMULATED_TESTS = (
    "test_in_the_interpreter",
    "test_every_claim_holds_under_the_interpreter",
    "test_every_claim_about_triton_holds_in_its_interpreter",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":  # the inner process of such a test
        return
    for item in items:
        if (
            item.path.name in EMULATED_FILES
            or getattr(item, "originalname", None) in EMULATED_TESTS
            or "[host]" in item.name
        ):
            item.add_marker("emulated")


@pytest.fixture(autouse=True)
def _values_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FST_CHECK", "1")
