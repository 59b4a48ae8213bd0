"""Triton kernels for half-precision activations in channels-last memory: a fused 1x1 convolution, and max-pooling."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(  # noqa: PLR0917
    x, weight, bias, residual, out, places, columns, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """out[places, columns] = relu(x[places, depth] @ weight[columns, depth].T + bias + residual)."""
    program = tl.program_id(0)
    across = tl.cdiv(columns, COLUMNS)
    row = (program // across) * ROWS + tl.arange(0, ROWS)
    column = (program % across) * COLUMNS + tl.arange(0, COLUMNS)
    step = tl.arange(0, DEPTH)
    inside = (row < places)[:, None] & (column < columns)[None, :]
    wide = row.to(tl.int64)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for at in range(0, depth, DEPTH):
        left = tl.load(x + wide[:, None] * depth + (at + step)[None, :], mask=(row < places)[:, None], other=0.0)
        right = tl.load(
            weight + column[None, :] * depth + (at + step)[:, None], mask=(column < columns)[None, :], other=0.0
        )
        total += tl.dot(left, right)
    total += tl.load(bias + column, mask=column < columns, other=0.0)[None, :].to(tl.float32)
    where = wide[:, None] * columns + column[None, :]
    total += tl.load(residual + where, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + where, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def max_pool(  # noqa: PLR0917
    x, out, places, channels, height, width, tall, broad, step_y, step_x, pad_y, pad_x,
    TALL: tl.constexpr, BROAD: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out[places, channels]: the largest of TALL x BROAD values of x [n, height, width, channels]; NaN stays NaN."""
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    picture = place // (tall * broad)
    top = (place // broad) % tall * step_y - pad_y
    left = place % broad * step_x - pad_x
    known = (channel < channels)[None, :] & (place < places)[:, None]
    most = tl.full((PLACES, CHANNELS), float("-inf"), tl.float32)
    for down in tl.static_range(TALL):
        for right in tl.static_range(BROAD):
            y, across = top + down, left + right
            inside = (y >= 0) & (y < height) & (across >= 0) & (across < width)
            at = ((picture.to(tl.int64) * height + y) * width + across) * channels
            seen = tl.load(x + at[:, None] + channel[None, :], mask=known & inside[:, None], other=float("-inf"))
            most = tl.maximum(most, seen.to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
    where = place.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(out + where, most.to(out.dtype.element_ty), mask=known)
