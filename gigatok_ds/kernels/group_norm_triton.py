"""Group norm of channels_last maps in Triton: what `kernels.group_norm_ops`'s operators run on a GPU.

A map is (positions, channels) for each sample. A program has a tile of some positions and channels, walks down a chunk
of positions with it, and keeps what it adds up apart for each place in the tile until the chunk ends. Chunks depend on
the map's size only, and are added in order: a sample's result depends neither on the batch nor on the device, and
repeats to the bit. Arithmetic is float32, sums over chunks float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048  # elements
_CHUNKS = 256  # of a sample, about, if it is large
_MOST_TILES = 16  # of a chunk
_CHANNELS = 128  # of a tile, at most
_CHUNKS_AT_ONCE = 64  # in the sums over chunks


@triton.jit
def _tile(positions, channels, chunk, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, first_from_end: tl.constexpr):
    """This program's sample, chunk and channels. `first_from_end`: what an earlier kernel read last is read first."""
    chunks = tl.cdiv(positions, chunk * POSITIONS)
    program = tl.program_id(0)
    if first_from_end:
        program = tl.num_programs(0) - 1 - program
    sample = program // chunks
    index = program % chunks
    columns = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    return sample.to(tl.int64), index, chunks, columns, columns < channels


@triton.jit
def _affine(weight, bias, mean, rstd, sample, columns, inside, channels, groups, per_sample: tl.constexpr):
    """Each channel's group mean, and 1 / standard deviation; its weight and bias."""
    group = sample * groups + columns // (channels // groups)
    parameter = columns + (sample * channels if per_sample else 0)
    return (tl.load(mean + group, mask=inside, other=0.0)[None, :],
            tl.load(rstd + group, mask=inside, other=0.0)[None, :],
            tl.load(weight + parameter, mask=inside, other=0.0).to(tl.float32)[None, :],
            tl.load(bias + parameter, mask=inside, other=0.0).to(tl.float32)[None, :])


@triton.jit
def _of_norm(gradient, x, place, here, center, scale, gain, offset, SILU: tl.constexpr):
    """A tile's normalised x, and the gradient at the norm's output, from that behind SiLU if there is one."""
    normalized = (tl.load(x + place, mask=here, other=0.0).to(tl.float32) - center) * scale
    own = tl.load(gradient + place, mask=here, other=0.0).to(tl.float32)
    if SILU:
        z = normalized * gain + offset
        gate = tl.sigmoid(z)
        own = own * gate * (1.0 + z * (1.0 - gate))
    return normalized, own


@triton.jit
def _moments(x, part_mean, part_squares, positions, channels, chunk, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """For each chunk and channel, (sample, chunk, channel), the mean, and the sum of squared distances from it.

    Every place in the tile sums around the first value that it sees: maps far from zero lose no digits.
    """
    sample, index, chunks, columns, inside = _tile(positions, channels, chunk, POSITIONS, CHANNELS, False)
    start = index * chunk * POSITIONS
    rows = start + tl.arange(0, POSITIONS)
    x += sample * positions * channels
    here = (rows < positions)[:, None] & inside[None, :]
    first = tl.load(x + rows.to(tl.int64)[:, None] * channels + columns[None, :], mask=here, other=0.0).to(tl.float32)
    count = (rows < positions).to(tl.float32)[:, None]
    total = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    squares = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    for _step in range(1, chunk):
        rows += POSITIONS
        here = (rows < positions)[:, None] & inside[None, :]
        value = tl.load(x + rows.to(tl.int64)[:, None] * channels + columns[None, :], mask=here,
                        other=0.0).to(tl.float32)
        distance = tl.where(here, value - first, 0.0)
        total += distance
        squares += distance * distance
        count += (rows < positions).to(tl.float32)[:, None]
    # Together, around the first row's first value.
    top = (tl.arange(0, POSITIONS) == 0)[:, None]
    reference = tl.sum(tl.where(top, first, 0.0), axis=0)[None, :]
    own = total / tl.maximum(count, 1.0)
    squares -= total * own
    own = tl.where(count > 0, own + (first - reference), 0.0)
    number = tl.minimum(positions - start, chunk * POSITIONS).to(tl.float32)
    mean = tl.sum(count * own, axis=0)[None, :] / number
    squares += count * (own - mean) * (own - mean)
    place = (sample * chunks + index) * channels + columns
    tl.store(part_mean + place, tl.sum(mean + reference, axis=0), mask=inside)
    tl.store(part_squares + place, tl.sum(squares, axis=0), mask=inside)


@triton.jit
def _statistics(part_mean, part_squares, mean, rstd, positions, channels, groups, span, eps, CHUNKS: tl.constexpr,
                MEMBERS: tl.constexpr):
    """Mean and 1 / standard deviation (sample, group) from the chunks' moments. span: positions of a chunk."""
    sample = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    members = channels // groups
    chunks = tl.cdiv(positions, span)
    column = group * members + tl.arange(0, MEMBERS)
    inside = tl.arange(0, MEMBERS) < members
    base = sample * chunks * channels
    total = tl.zeros((CHUNKS, MEMBERS), tl.float64)
    for start in range(0, chunks, CHUNKS):
        rows = start + tl.arange(0, CHUNKS)
        here = (rows < chunks)[:, None] & inside[None, :]
        own = tl.load(part_mean + base + rows[:, None] * channels + column[None, :], mask=here,
                      other=0.0).to(tl.float64)
        total += own * tl.minimum(positions - rows * span, span).to(tl.float64)[:, None]
    number = (positions * members).to(tl.float64)
    center = tl.sum(tl.sum(total, axis=1), axis=0) / number
    squares = tl.zeros((CHUNKS, MEMBERS), tl.float64)
    for start in range(0, chunks, CHUNKS):
        rows = start + tl.arange(0, CHUNKS)
        here = (rows < chunks)[:, None] & inside[None, :]
        place = base + rows[:, None] * channels + column[None, :]
        distance = tl.load(part_mean + place, mask=here, other=0.0).to(tl.float64) - center
        own = tl.load(part_squares + place, mask=here, other=0.0).to(tl.float64)
        number_here = tl.minimum(positions - rows * span, span).to(tl.float64)[:, None]
        squares += tl.where(here, own + number_here * distance * distance, 0.0)
    variance = tl.sum(tl.sum(squares, axis=1), axis=0) / number
    tl.store(mean + sample * groups + group, center.to(tl.float32))
    tl.store(rstd + sample * groups + group, (1.0 / tl.sqrt(variance + eps)).to(tl.float32))


@triton.jit
def _normalize(x, y, weight, bias, mean, rstd, positions, channels, groups, chunk, POSITIONS: tl.constexpr,
               CHANNELS: tl.constexpr, PER_SAMPLE: tl.constexpr, SILU: tl.constexpr):
    sample, index, _chunks, columns, inside = _tile(positions, channels, chunk, POSITIONS, CHANNELS, True)
    center, scale, gain, offset = _affine(weight, bias, mean, rstd, sample, columns, inside, channels, groups,
                                          PER_SAMPLE)
    base = sample * positions * channels
    rows = index * chunk * POSITIONS + tl.arange(0, POSITIONS)
    for _step in range(chunk):
        here = (rows < positions)[:, None] & inside[None, :]
        place = base + rows.to(tl.int64)[:, None] * channels + columns[None, :]
        z = (tl.load(x + place, mask=here, other=0.0).to(tl.float32) - center) * scale * gain + offset
        if SILU:
            z *= tl.sigmoid(z)
        tl.store(y + place, z.to(y.dtype.element_ty), mask=here)
        rows += POSITIONS


@triton.jit
def _gradient_sums(gradient, x, weight, bias, mean, rstd, part_sums, positions, channels, groups, chunk,
                   POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, PER_SAMPLE: tl.constexpr, SILU: tl.constexpr):
    """Sums over each chunk, (2, sample, chunk, channel): of the gradient at the norm's output, times the normalised x
    and alone.
    """
    sample, index, chunks, columns, inside = _tile(positions, channels, chunk, POSITIONS, CHANNELS, False)
    center, scale, gain, offset = _affine(weight, bias, mean, rstd, sample, columns, inside, channels, groups,
                                          PER_SAMPLE)
    base = sample * positions * channels
    rows = index * chunk * POSITIONS + tl.arange(0, POSITIONS)
    times = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    plain = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    for _step in range(chunk):
        here = (rows < positions)[:, None] & inside[None, :]
        place = base + rows.to(tl.int64)[:, None] * channels + columns[None, :]
        normalized, own = _of_norm(gradient, x, place, here, center, scale, gain, offset, SILU)
        times += own * normalized
        plain += own
        rows += POSITIONS
    place = (sample * chunks + index) * channels + columns
    tl.store(part_sums + place, tl.sum(times, axis=0), mask=inside)
    part_sums += tl.num_programs(0).to(tl.int64) * channels
    tl.store(part_sums + place, tl.sum(plain, axis=0), mask=inside)


@triton.jit
def _group_sums(part_sums, weight, sums, means, samples, positions, channels, groups, span, CHUNKS: tl.constexpr,
                MEMBERS: tl.constexpr, PER_SAMPLE: tl.constexpr):
    """Both sums over all chunks, (2, sample, channel); and the means (2, sample, group) of their products with the
    weight.
    """
    sample = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    members = channels // groups
    chunks = tl.cdiv(positions, span)
    column = group * members + tl.arange(0, MEMBERS)
    inside = tl.arange(0, MEMBERS) < members
    gain = tl.load(weight + column + (sample * channels if PER_SAMPLE else 0), mask=inside, other=0.0).to(tl.float64)
    for which in tl.static_range(2):
        total = tl.zeros((CHUNKS, MEMBERS), tl.float64)
        base = (which * samples + sample) * chunks * channels
        for start in range(0, chunks, CHUNKS):
            rows = start + tl.arange(0, CHUNKS)
            here = (rows < chunks)[:, None] & inside[None, :]
            total += tl.load(part_sums + base + rows[:, None] * channels + column[None, :], mask=here,
                             other=0.0).to(tl.float64)
        of_channel = tl.sum(total, axis=0)
        tl.store(sums + (which * samples + sample) * channels + column, of_channel.to(tl.float32), mask=inside)
        of_group = tl.sum(of_channel * gain, axis=0) / (positions * members).to(tl.float64)
        tl.store(means + (which * samples + sample) * groups + group, of_group.to(tl.float32))


@triton.jit
def _input_gradient(gradient, x, result, weight, bias, mean, rstd, means, samples, positions, channels, groups, chunk,
                    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, PER_SAMPLE: tl.constexpr, SILU: tl.constexpr):
    """rstd * (weight g - mean(weight g) - normalised x * mean(weight g * normalised x)), g the gradient at the norm's
    output.
    """
    sample, index, _chunks, columns, inside = _tile(positions, channels, chunk, POSITIONS, CHANNELS, True)
    center, scale, gain, offset = _affine(weight, bias, mean, rstd, sample, columns, inside, channels, groups,
                                          PER_SAMPLE)
    group = sample * groups + columns // (channels // groups)
    times = tl.load(means + group, mask=inside, other=0.0)[None, :]
    plain = tl.load(means + samples * groups + group, mask=inside, other=0.0)[None, :]
    base = sample * positions * channels
    rows = index * chunk * POSITIONS + tl.arange(0, POSITIONS)
    for _step in range(chunk):
        here = (rows < positions)[:, None] & inside[None, :]
        place = base + rows.to(tl.int64)[:, None] * channels + columns[None, :]
        normalized, own = _of_norm(gradient, x, place, here, center, scale, gain, offset, SILU)
        own = scale * (gain * own - plain - normalized * times)
        tl.store(result + place, own.to(result.dtype.element_ty), mask=here)
        rows += POSITIONS


@triton.jit
def _parameter_gradients(sums, of_weight, of_bias, samples, channels, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr):
    """Both sums (2, sample, channel) over the samples."""
    columns = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = columns < channels
    times = tl.zeros((SAMPLES, CHANNELS), tl.float32)
    plain = tl.zeros((SAMPLES, CHANNELS), tl.float32)
    for start in range(0, samples, SAMPLES):
        rows = start + tl.arange(0, SAMPLES)
        here = (rows < samples)[:, None] & inside[None, :]
        place = rows[:, None] * channels + columns[None, :]
        times += tl.load(sums + place, mask=here, other=0.0)
        plain += tl.load(sums + samples * channels + place, mask=here, other=0.0)
    tl.store(of_weight + columns, tl.sum(times, axis=0).to(of_weight.dtype.element_ty), mask=inside)
    tl.store(of_bias + columns, tl.sum(plain, axis=0).to(of_bias.dtype.element_ty), mask=inside)


class _Plan:
    """How maps (B, C, H, W) are cut: `grid` of the programs that walk over them, and what these are told."""

    def __init__(self, x: Tensor):
        self.samples, self.channels = x.shape[:2]
        self.positions = x.shape[2] * x.shape[3]
        # As many channels as divide all, so that no place of a tile lies idle; of few or odd ones, all.
        dividing = min(self.channels & -self.channels, _CHANNELS)
        width = dividing if dividing >= 16 else min(triton.next_power_of_2(self.channels), _CHANNELS)
        rows = _TILE // width
        across = triton.cdiv(self.channels, width)
        tiles = triton.cdiv(self.positions, rows) * across
        self.chunk = min(max(tiles // _CHUNKS, 1), _MOST_TILES)
        self.span = self.chunk * rows
        self.chunks = triton.cdiv(self.positions, self.span)
        self.grid = (self.samples * self.chunks, across)
        self.tile = {"POSITIONS": rows, "CHANNELS": width}

    def over_chunks(self, groups: int) -> dict[str, int]:
        """The tile of kernels that add up chunks, of which each has a sample and a group."""
        members = triton.next_power_of_2(self.channels // groups)
        return {"CHUNKS": max(2, min(_CHUNKS_AT_ONCE, triton.next_power_of_2(self.chunks))), "MEMBERS": members}


def statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of each group, float32 (B, groups), of channels_last maps (B, C, H, W)."""
    plan = _Plan(x)
    parts = x.new_empty(2, plan.samples, plan.chunks, plan.channels, dtype=torch.float32)
    mean, rstd = (x.new_empty(plan.samples, groups, dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(x):
        _moments[plan.grid](x, *parts, plan.positions, plan.channels, plan.chunk, **plan.tile)
        _statistics[plan.samples, groups](*parts, mean, rstd, plan.positions, plan.channels, groups, plan.span, eps,
                                          **plan.over_chunks(groups))
    return mean, rstd


def normalized(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
    """(x - mean) * rstd * weight + bias, then SiLU if asked for. weight and bias are (C,) or (B, C)."""
    plan = _Plan(x)
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _normalize[plan.grid](x, y, weight, bias, mean, rstd, plan.positions, plan.channels, mean.shape[1], plan.chunk,
                              PER_SAMPLE=weight.ndim == 2, SILU=silu, **plan.tile)
    return y


def sums(gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
         silu: bool) -> tuple[Tensor, Tensor]:
    """Of g, the gradient at the norm's output: sums over positions of g * normalised x and of g, float32 (2, B, C); and
    the means (2, B, groups) over each group of their products with the weight."""
    plan, groups, per_sample = _Plan(x), mean.shape[1], weight.ndim == 2
    parts = x.new_empty(2, plan.samples, plan.chunks, plan.channels, dtype=torch.float32)
    total = x.new_empty(2, plan.samples, plan.channels, dtype=torch.float32)
    means = x.new_empty(2, plan.samples, groups, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _gradient_sums[plan.grid](gradient, x, weight, bias, mean, rstd, parts, plan.positions, plan.channels, groups,
                                  plan.chunk, PER_SAMPLE=per_sample, SILU=silu, **plan.tile)
        _group_sums[plan.samples, groups](parts, weight, total, means, plan.samples, plan.positions, plan.channels,
                                          groups, plan.span, PER_SAMPLE=per_sample, **plan.over_chunks(groups))
    return total, means


def gradients(gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, total: Tensor,
              means: Tensor, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients at x, weight and bias, from what `sums` gives."""
    plan, per_sample = _Plan(x), weight.ndim == 2
    result, of_weight, of_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    with torch.cuda.device_of(x):
        _input_gradient[plan.grid](gradient, x, result, weight, bias, mean, rstd, means, plan.samples, plan.positions,
                                   plan.channels, mean.shape[1], plan.chunk, PER_SAMPLE=per_sample, SILU=silu,
                                   **plan.tile)
        if per_sample:
            of_weight.copy_(total[0])
            of_bias.copy_(total[1])
        else:
            _parameter_gradients[triton.cdiv(plan.channels, 32),](total, of_weight, of_bias, plan.samples,
                                                                  plan.channels, SAMPLES=16, CHANNELS=32)
    return result, of_weight, of_bias
