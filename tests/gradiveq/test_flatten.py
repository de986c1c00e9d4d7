from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradiveq.flatten import Layout, default_slice_size, slice_sizes


def gradient(p: torch.Tensor) -> torch.Tensor:
    assert p.grad is not None
    return p.grad


def numbered(model: nn.Module) -> None:
    """Different gradients in every element of every parameter."""
    count = 0
    for p in model.parameters():
        p.grad = torch.arange(count, count + p.numel(), dtype=torch.float32).view(p.shape).to(p.dtype)
        count += p.numel()


def test_order_is_figure_3a() -> None:
    linear, conv = nn.Linear(3, 2), nn.Conv2d(3, 4, (2, 5))
    model = nn.Sequential(linear, conv)
    numbered(model)
    layout = Layout(model)
    vector = np.empty(layout.length, np.float32)
    layout.pack(vector)
    block = layout.blocks[0]
    assert (block.name, block.filters, block.depth, block.compressed) == ("1.weight", 4, 3, True)
    grad = gradient(conv.weight)
    for f in range(4):
        for d in range(3):
            for h in range(2):
                for w in range(5):
                    assert vector[((h * 5 + w) * 3 + d) * 4 + f] == grad[f, d, h, w]
    rest = torch.cat([gradient(p).flatten() for p in (*linear.parameters(), conv.bias) if p is not None])
    np.testing.assert_array_equal(vector[block.stop :], rest.numpy())


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 5), min_size=3, max_size=5), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_unpack_inverts_pack(shapes: list[list[int]], dtype: torch.dtype) -> None:
    kinds: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
    model = nn.Sequential(
        *[kinds[len(shape)](shape[1], shape[0], tuple(shape[2:])) for shape in shapes], nn.BatchNorm2d(3)
    ).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    before = [gradient(p).clone() for p in model.parameters()]
    layout = Layout(model)
    assert [b.start for b in layout.blocks] == list(np.cumsum([0, *(b.length for b in layout.blocks)]))[:-1]
    vector = np.full(layout.length, np.nan, np.float32)
    layout.pack(vector)
    assert all(torch.equal(gradient(p), old) for p, old in zip(model.parameters(), before, strict=True))
    model.zero_grad(set_to_none=True)
    layout.unpack(vector)
    for p, old in zip(model.parameters(), before, strict=True):
        assert gradient(p).dtype == dtype
        assert torch.equal(gradient(p), old)


def test_unpack_keeps_the_vector() -> None:
    model = nn.Conv2d(2, 3, 3)
    numbered(model)
    layout = Layout(model)
    vector = np.arange(layout.length, dtype=np.float32)
    layout.unpack(vector)
    np.testing.assert_array_equal(vector, np.arange(layout.length))
    assert gradient(model.weight)[1, 1, 2, 0] == ((2 * 3 + 0) * 2 + 1) * 3 + 1


def test_grouped_transposed_and_frozen_parameters() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(2, 3, 2), nn.Conv2d(3, 5, 1), nn.Conv2d(1, 1, 1)
    )
    for p in model[3].parameters():
        p.requires_grad_(False)
    layout = Layout(model)
    assert [b.name for b in layout.blocks if b.compressed] == ["2.weight"]
    assert layout.length == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_shared_parameters_count_once() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3))
    model[1].weight = model[0].weight
    assert Layout(model).length == 2 * 2 * 9 + 2 + 2


def test_missing_gradient_is_zero_and_made() -> None:
    model = nn.Conv2d(2, 3, 1)
    layout = Layout(model)
    vector = np.ones(layout.length, np.float32)
    layout.pack(vector)
    assert not vector.any()
    assert model.weight.grad is None
    layout.unpack(np.ones(layout.length, np.float32))
    assert bool((gradient(model.weight) == 1).all())


def test_non_contiguous_gradient() -> None:
    model = nn.Conv2d(2, 3, 3)
    numbered(model)
    layout, plain, other = Layout(model), np.empty(57, np.float32), np.empty(57, np.float32)
    layout.pack(plain)
    model.weight.grad = gradient(model.weight).contiguous(memory_format=torch.channels_last)
    layout.pack(other)
    np.testing.assert_array_equal(plain, other)


def test_refused_vectors_and_gradients() -> None:
    layout = Layout(nn.Conv2d(2, 3, 1))
    bad: Any
    for bad in (np.zeros(8, np.float32), np.zeros(9), np.zeros(18, np.float32)[::2]):
        with pytest.raises(ValueError, match=r"contiguous float32 of shape \(9,\)"):
            layout.pack(bad)
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="must be dense, weight has"):
        Layout(embedding).pack(np.zeros(8, np.float32))


@pytest.mark.parametrize(
    ("filters", "depth", "expected"),
    [(16, 16, 256), (64, 64, 4096), (512, 512, 4096), (16, 3, 48), (100, 70, 3500), (5000, 7, 5000)],
)
def test_default_slice_size(filters: int, depth: int, expected: int) -> None:
    assert default_slice_size(filters, depth) == expected


def test_slice_sizes() -> None:
    blocks = Layout(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3), nn.Linear(8, 8))).blocks
    assert slice_sizes(blocks) == {"0.weight": 12, "1.weight": 32}
    assert slice_sizes(blocks, 100) == {"0.weight": 12, "1.weight": 100}
    with pytest.raises(ValueError, match=r"at most 288 \(F\*D\*H\*W of 1.weight, the largest layer\), got 289"):
        slice_sizes(blocks, 289)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        slice_sizes(blocks, 0)
