"""The paper's attention patterns, each drawn by hand, and attention in parts against attention whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zoo.blocks.grid_attention import PATTERNS, attend, image_mask, paper_patterns, visible, whole_mask
from zoo.errors import SettingsError

GRID = 5


def sees(pattern: str, grid: int, kernel: int, query: int, key: int) -> bool:
    """Whether one image token looks at another, from the paper's words and ruDALL-E's, one case at a time."""
    if key > query:
        return False
    (row, column), (key_row, key_column), half = divmod(query, grid), divmod(key, grid), kernel // 2
    if pattern == "row":
        return key in range(query - grid, query + 1)
    if pattern == "column":
        return column == key_column
    if pattern == "conv":  # "with wraparound behavior similar to the row attention": counted in raster order
        return any(key == query - down * grid + across for down in range(half + 1) for across in range(-half, half + 1))
    if pattern == "conv_torus":
        rows = {(row + i) % grid for i in range(-half, half + 1)}
        columns = {(column + i) % grid for i in range(-half, half + 1)}
        return key_row in rows and key_column in columns
    if pattern == "conv_clamped":
        return abs(row - key_row) <= half and abs(column - key_column) <= half
    return True


@pytest.mark.parametrize("grid,kernel", [(5, 3), (4, 3), (8, 5)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_mask_is_the_pattern_drawn_by_hand(pattern, grid, kernel):
    n = grid * grid
    drawn = [[sees(pattern, grid, kernel, query, key) for key in range(n)] for query in range(n)]
    assert image_mask(pattern, grid, kernel).tolist() == drawn


def test_text_is_causal_and_every_image_token_sees_all_of_it():
    mask = whole_mask("row", 3, 4)
    assert mask[:3, :3].equal(torch.ones(3, 3, dtype=torch.bool).tril()) and not mask[:3, 3:].any()
    assert mask[3:, :3].all() and mask[3:, 3:].equal(image_mask("row", 4))


def test_the_published_row_extent_is_33_and_conv_sees_at_most_60_before_itself():
    assert int(image_mask("row", 32).sum(1).max()) == 33
    assert int(image_mask("column", 32).sum(1).max()) == 32
    assert int(image_mask("conv", 32).sum(1).max()) == 61


def test_the_order_of_the_64_layers_is_the_papers():
    patterns = paper_patterns(64)
    for layer, pattern in enumerate(patterns, 1):  # the paper counts from 1
        assert pattern == ("conv" if layer == 64 else "column" if (layer - 2) % 4 == 0 else "row")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_visible_lists_what_the_mask_allows(pattern):
    mask, (places, hidden) = image_mask(pattern, GRID, 3), visible(pattern, GRID, 3)
    for query in range(GRID * GRID):
        listed = places[query][hidden[query] == 0].tolist()
        assert listed == mask[query].nonzero()[:, 0].tolist()
        assert set(hidden[query].tolist()) <= {0.0, float("-inf")}


@pytest.mark.parametrize("pattern", PATTERNS[1:])
@pytest.mark.parametrize("text", [1, 7])
def test_in_parts_equals_the_whole_forward_and_backward(pattern, text):
    torch.manual_seed(0)
    shape = (2, 3, text + 256, 8)
    q, k, v, grad = (torch.randn(shape) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    parts = attend(*inputs, pattern, text, 16, 5)
    whole = F.scaled_dot_product_attention(*inputs, attn_mask=whole_mask(pattern, text, 16, 5))
    assert type(parts.grad_fn).__name__ == "_SplitBackward"
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    found, wanted = (torch.autograd.grad(out, inputs, grad) for out in (parts, whole))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_small_grids_and_double_precision_equal_a_softmax_by_hand():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 3 + GRID**2, 4, dtype=torch.float64) for _ in range(3))
    for pattern in PATTERNS:
        scores = (q @ k.transpose(-1, -2) / 2).masked_fill(~whole_mask(pattern, 3, GRID, 3), float("-inf"))
        torch.testing.assert_close(attend(q, k, v, pattern, 3, GRID, 3), scores.softmax(-1) @ v)


def test_an_unknown_pattern_is_named():
    with pytest.raises(SettingsError, match="rows"):
        image_mask("rows", 4)
