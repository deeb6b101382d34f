"""From logits to one drawn token per head row, with the numbers that are recorded of it, from one pass over the logits.

Two kernels. The first gives every program a row and a share of the vocabulary; each of its lanes keeps, of the ids that it has
seen, all that the answer needs, with y = log2(e) * logit / temperature:

    m, second          the largest and the second largest y
    s = sum 2^(y-m)    t = sum 2^(y-m) (y-m)
    best, token        Gumbel-max as a race: an id arrives after an exponential time E / 2^(y-m), and the first, the one of the
                       largest 2^(y-m) / E, is drawn. Greedy: the largest logit. The lowest id where several are equal

so that nothing is summed over lanes before the end. The second kernel joins the shares of a row: log Z = log(2) m + log s, and the
entropy is log s - log(2) t/s.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.kernels.launch import INTERPRET, jit, tl, triton, use_kernel
from sample import noise, sampling
from sample.engine import SamplingSettings
from sample.kernels.noise import mix, random_bits, uniform
from sample.registry import TARGETS
from sample.sampling import Draws, draw

CONFIDENCE, MARGIN, NEG_ENTROPY, RANDOM = range(4)
LANES, WARPS = 256, 4
"""Of a program; a lane takes four ids at a time."""
SPLITS, MOST_SPLITS = 8, 64
"""Shares of a row's vocabulary; the more, the fewer rows there are, up to PROGRAMS in all: one row on one core takes long."""
PROGRAMS = 1024


def kernel_target(settings: SamplingSettings) -> int | None:
    """Which of the kernel's targets the settings name; None: they want something that only torch does."""
    own = [sampling.confidence, sampling.margin_confidence, sampling.neg_entropy, sampling.random_score]
    target = TARGETS.get(settings.target, "rollout.target")
    has_two = settings.score_temperature != settings.logits_temperature  # distributions: one to draw from, one to rank by
    if settings.top_k > 0 or settings.top_p < 1 or target not in own or has_two:
        return None
    return own.index(target)


def draw_rows(
    logits: Tensor, keys: Tensor, settings: SamplingSettings, forbidden: Tensor, num_rows: Tensor | None = None
) -> Draws:
    """Draw one token for each row of `logits` float32 [h, V], raw from the head, with noise keys int32 [h, 2].

    forbidden bool [V]: never drawn, without probability. num_rows int32 [1]: rows from there on are nobody's, and what the
    answer holds for them means nothing. `logits` may be overwritten. A NaN among a row's logits makes its log-prob NaN.
    """
    target = kernel_target(settings)
    if target is None or not use_kernel(logits):
        return draw_rows_reference(logits, keys, settings, forbidden)
    return draw_rows_kernel(logits, keys, settings, forbidden, num_rows, target)


def draw_rows_reference(logits: Tensor, keys: Tensor, settings: SamplingSettings, forbidden: Tensor) -> Draws:
    if settings.logits_temperature != 1.0:
        logits /= settings.logits_temperature
    return draw(logits.masked_fill_(forbidden, -torch.inf), keys, settings)


@jit
def exp2(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.exp2(x)


@jit
def log2(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


@jit
def reciprocal(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return 1.0 / x


@jit
def exponential(v, APPROXIMATE: tl.constexpr):
    """-log2(1 - v), v on (0, 1): exponentially distributed where v is uniform. As a series where 1 - v would lose digits of v."""
    series = 0.28853900817779268 + v * 0.24044917348149390  # log2(e) / k
    series = 0.48089834696298783 + v * (0.36067376022224085 + v * series)
    series = v * (1.44269504088896341 + v * (0.72134752044448170 + v * series))
    return tl.where(v < 0.0625, series, -log2(1.0 - v, APPROXIMATE))


@jit
def sample_share_kernel(
    logits_ptr,
    logits_stride,
    keys_ptr,
    forbidden_ptr,
    num_rows_ptr,
    numbers_ptr,  # float32 [5, h, SPLITS]: m, second, s, t, best
    token_ptr,  # int32 [h, SPLITS]
    num_ids,
    share,  # ids of a split, a multiple of 4 * LANES
    scale,  # log2(e) / temperature
    h,
    GREEDY: tl.constexpr,
    TOP_TWO: tl.constexpr,
    LIMITED: tl.constexpr,  # num_rows is given
    APPROXIMATE: tl.constexpr,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0)
    split = tl.program_id(1)
    num_rows = h
    if LIMITED:
        num_rows = tl.load(num_rows_ptr)
    if row >= num_rows:
        return
    # Finite, so that differences are: whatever is this low has no probability.
    LOWEST: tl.constexpr = -1.0e30
    m = tl.full([LANES], LOWEST, tl.float32)
    second = tl.full([LANES], LOWEST, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    t = tl.zeros([LANES], tl.float32)
    best = tl.zeros([LANES], tl.float32)
    if GREEDY:
        best += LOWEST
    token = tl.zeros([LANES], tl.int32)
    k0 = tl.load(keys_ptr + row * 2).to(tl.uint32, bitcast=True)
    k1 = tl.load(keys_ptr + row * 2 + 1).to(tl.uint32, bitcast=True)
    logits_ptr += row.to(tl.int64) * logits_stride
    begin = split * share
    four = tl.arange(0, 4)  # neighbours, which one thread holds: a lane takes them together
    offsets = tl.arange(0, LANES)[:, None] * 4 + four[None, :]
    for first in range(begin, tl.minimum(begin + share, num_ids), 4 * LANES):
        ids = first + offsets  # [LANES, 4]
        banned = tl.load(forbidden_ptr + ids, mask=ids < num_ids, other=1) != 0
        x = tl.load(logits_ptr + ids, mask=ids < num_ids, other=LOWEST)
        y = x * scale
        y = tl.where(banned | (y < LOWEST), LOWEST, y)  # a NaN stays, in s
        highest = tl.max(y, 1)
        if TOP_TWO:
            leader = tl.min(tl.where(y == highest[:, None], four[None, :], 4), 1)
            next_highest = tl.max(tl.where(four[None, :] == leader[:, None], LOWEST, y), 1)
            second = tl.maximum(tl.maximum(second, next_highest), tl.minimum(m, highest))
        rise = m
        m = tl.maximum(m, highest)
        rise -= m
        d = y - m[:, None]
        e = exp2(d, APPROXIMATE)
        shrink = exp2(rise, APPROXIMATE)
        t = shrink * (t + s * rise) + tl.sum(e * d, 1)
        s = shrink * s + tl.sum(e, 1)
        if GREEDY:
            value = tl.where(banned, LOWEST, x)
        else:
            bits = random_bits(k0, k1, mix(ids.to(tl.uint32, bitcast=True)))
            value = e * reciprocal(exponential(uniform(bits), APPROXIMATE), APPROXIMATE)
            best *= shrink
        highest = tl.max(value, 1)
        candidate = tl.min(tl.where(value == highest[:, None], ids, num_ids), 1)
        token = tl.where(highest > best, candidate, token)
        best = tl.where(highest > best, highest, best)

    top = tl.max(m, 0)
    fall = m - top
    e = exp2(fall, APPROXIMATE)
    if not GREEDY:
        best = m + tl.log2(best)
    highest = tl.max(best, 0)
    at = row * SPLITS + split
    plane = h * SPLITS
    tl.store(numbers_ptr + at, top)
    tl.store(numbers_ptr + 2 * plane + at, tl.sum(e * s, 0))
    tl.store(numbers_ptr + 3 * plane + at, tl.sum(e * (t + s * fall), 0))
    tl.store(numbers_ptr + 4 * plane + at, highest)
    tl.store(token_ptr + at, tl.min(tl.where(best == highest, token, num_ids - 1), 0))
    if TOP_TWO:
        lane = tl.arange(0, LANES)
        leader = tl.min(tl.where(m == top, lane, LANES), 0)
        tl.store(numbers_ptr + plane + at, tl.max(tl.where(lane == leader, second, m), 0))


@jit
def sample_join_kernel(
    logits_ptr,
    logits_stride,
    keys_ptr,
    numbers_ptr,
    shares_token_ptr,
    num_rows_ptr,
    token_ptr,
    logprob_ptr,
    entropy_ptr,
    score_ptr,
    num_ids,
    scale,
    h,
    random_id,
    TARGET: tl.constexpr,
    LIMITED: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Program: a row."""
    row = tl.program_id(0)
    num_rows = h
    if LIMITED:
        num_rows = tl.load(num_rows_ptr)
    if row >= num_rows:
        return
    LOWEST: tl.constexpr = -1.0e30
    LOG_2: tl.constexpr = 0.6931471805599453
    split = tl.arange(0, SPLITS)
    at = row * SPLITS + split
    plane = h * SPLITS
    m = tl.load(numbers_ptr + at)
    s = tl.load(numbers_ptr + 2 * plane + at)
    t = tl.load(numbers_ptr + 3 * plane + at)
    best = tl.load(numbers_ptr + 4 * plane + at)
    top = tl.max(m, 0)
    e = tl.exp2(m - top)
    t = tl.sum(e * (t + s * (m - top)), 0)
    s = tl.sum(e * s, 0)
    highest = tl.max(best, 0)
    token = tl.min(tl.where(best == highest, tl.load(shares_token_ptr + at), num_ids - 1), 0)
    y = tl.load(logits_ptr + row.to(tl.int64) * logits_stride + token) * scale
    y = tl.where(top > LOWEST, y, float("nan"))  # where no id has probability there is nothing to draw
    logprob = (y - top) * LOG_2 - tl.log(s)
    entropy = tl.log(s) - t / s * LOG_2
    tl.store(token_ptr + row, token)
    tl.store(logprob_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)
    if TARGET == 0:
        score = tl.exp(logprob)
    elif TARGET == 1:
        leader = tl.min(tl.where(m == top, split, SPLITS), 0)
        second = tl.max(tl.where(split == leader, tl.load(numbers_ptr + plane + at), m), 0)
        score = (1.0 - tl.exp2(second - top)) / s
    elif TARGET == 2:
        score = -entropy
    else:
        k0 = tl.load(keys_ptr + row * 2).to(tl.uint32, bitcast=True)
        k1 = tl.load(keys_ptr + row * 2 + 1).to(tl.uint32, bitcast=True)
        score = uniform(random_bits(k0, k1, mix(random_id.to(tl.uint32, bitcast=True))))
    tl.store(score_ptr + row, score)


def draw_rows_kernel(
    logits: Tensor, keys: Tensor, settings: SamplingSettings, forbidden: Tensor, num_rows: Tensor | None, target: int
) -> Draws:
    h, num_ids = logits.shape
    assert logits.dtype == torch.float32 and logits.stride(1) == 1
    assert keys.shape == (h, 2) and keys.dtype == torch.int32 and keys.is_contiguous()
    assert forbidden.shape == (num_ids,) and forbidden.dtype == torch.bool and forbidden.is_contiguous()
    lanes = min(LANES, triton.next_power_of_2(triton.cdiv(num_ids, 4)))
    num_tiles = triton.cdiv(num_ids, 4 * lanes)
    splits = min(max(SPLITS, triton.next_power_of_2(PROGRAMS // h)), MOST_SPLITS, triton.next_power_of_2(num_tiles))
    share = triton.cdiv(num_tiles, splits) * 4 * lanes
    empty = lambda *shape, dtype: torch.empty(shape, dtype=dtype, device=logits.device)  # noqa: E731
    numbers, tokens = empty(5, h, splits, dtype=torch.float32), empty(h, splits, dtype=torch.int32)
    drawn = Draws(empty(h, dtype=torch.int32), *(empty(h, dtype=torch.float32) for _ in range(3)), score_entropy=None)
    drawn.score_entropy = drawn.entropy
    scale = 1 / math.log(2) / settings.logits_temperature
    limited = num_rows is not None
    sample_share_kernel[(h, splits)](
        *(logits, logits.stride(0), keys, forbidden, num_rows, numbers, tokens),
        *(num_ids, share, scale, h),
        GREEDY=settings.is_greedy,
        TOP_TWO=target == MARGIN,
        LIMITED=limited,
        APPROXIMATE=not INTERPRET and torch.version.hip is None,
        SPLITS=splits,
        LANES=lanes,
        num_warps=WARPS,
    )
    sample_join_kernel[(h,)](
        *(logits, logits.stride(0), keys, numbers, tokens, num_rows),
        *(drawn.tokens, drawn.logprobs, drawn.entropy, drawn.score),
        *(num_ids, scale, h, noise.RANDOM_SCORE_ID),
        TARGET=target,
        LIMITED=limited,
        SPLITS=splits,
        num_warps=1,
    )
    return drawn
