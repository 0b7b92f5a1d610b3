"""FlexAttention's compiled kernel on the CPU reads the blocks that tree attention gives it: without a GPU the only thing that does."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from fst_kernels.tree_attention import TreeMask, flex, tree_attention
from tests.kernels.test_tree_attention import nested, qkv


def test_the_compiled_kernel_gives_the_output_of_the_reference_and_depends_on_the_blocks() -> None:
    ends = nested([2, 3, 4], [150, 40, 20])
    mask = TreeMask.from_subtree_end(ends)
    q, k, v = (x.detach() for x in qkv(1, len(ends), torch.float32, dim=32))
    run = torch.compile(flex_attention)
    with torch.no_grad():
        for window in (None, 40):
            blocks = flex.block_mask(mask, flex.KEYS, window)
            expected = tree_attention(q, k, v, mask, window=window, backend="reference")
            found = run(q, k, v, block_mask=blocks, enable_gqa=True)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        blocks.kv_num_blocks[0, 0, -1] -= 1
        with pytest.raises(AssertionError):
            torch.testing.assert_close(run(q, k, v, block_mask=blocks, enable_gqa=True), expected)
