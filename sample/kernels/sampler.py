"""From logits to one drawn token per head row, with the numbers that are recorded of it, from one pass over the logits.

Two kernels. The first gives every program a row and a share of the vocabulary; each of its lanes keeps, of the ids that it has
seen, all that the answer needs:

    m, second        the largest and second largest logit x
    s = sum e^(x-m)  t = sum e^(x-m) (x-m)
    best, token      the largest x + Gumbel noise (greedy: x), and its id, the lowest where several are equal

so that nothing is summed over lanes before the end. The second kernel joins the shares of a row: log Z = m + log s, and the
entropy is log s - t/s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sample import noise, sampling
from sample.engine import SamplingSettings
from sample.kernels.launch import jit, tl, triton, use_kernel
from sample.kernels.noise import mix, random_bits, uniform
from sample.registry import TARGETS
from sample.sampling import Draws, draw

CONFIDENCE, MARGIN, NEG_ENTROPY, RANDOM = range(4)
TILE = 2048
SPLITS = 8
"""Shares of the vocabulary: as few rows as one leave most of a GPU idle otherwise."""


def kernel_target(settings: SamplingSettings) -> int | None:
    """Which of the kernel's targets the settings name; None: they want something that only torch does."""
    own = [sampling.confidence, sampling.margin_confidence, sampling.neg_entropy, sampling.random_score]
    target = TARGETS.get(settings.target, "rollout.target")
    if settings.top_k > 0 or settings.top_p < 1 or target not in own:
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
def exponential(v):
    """-log(1 - v), v on (0, 1): exponentially distributed where v is uniform. As a series where 1 - v would lose digits of v."""
    series = 1 / 6 + v * (1 / 7 + v * (1 / 8 + v * (1 / 9)))
    series = v * (1.0 + v * (0.5 + v * (1 / 3 + v * (0.25 + v * (0.2 + v * series)))))
    return tl.where(v < 0.125, series, -tl.log(1.0 - v))


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
    share,  # ids of a split, a multiple of TILE
    temperature,
    h,
    GREEDY: tl.constexpr,
    SCALED: tl.constexpr,  # the temperature is not 1
    TOP_TWO: tl.constexpr,
    LIMITED: tl.constexpr,  # num_rows is given
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
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
    m = tl.full([TILE], LOWEST, tl.float32)
    second = tl.full([TILE], LOWEST, tl.float32)
    s = tl.zeros([TILE], tl.float32)
    t = tl.zeros([TILE], tl.float32)
    best = tl.full([TILE], LOWEST, tl.float32)
    token = tl.zeros([TILE], tl.int32)
    k0 = tl.load(keys_ptr + row * 2).to(tl.uint32, bitcast=True)
    k1 = tl.load(keys_ptr + row * 2 + 1).to(tl.uint32, bitcast=True)
    logits_ptr += row.to(tl.int64) * logits_stride
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, num_ids), TILE):
        ids = first + tl.arange(0, TILE)
        inside = ids < num_ids
        banned = tl.load(forbidden_ptr + ids, mask=inside, other=1)
        x = tl.load(logits_ptr + ids, mask=inside, other=LOWEST)
        if SCALED:
            x = x / temperature
        x = tl.where((banned != 0) | (x < LOWEST), LOWEST, x)  # a NaN stays, in s
        # One exponential: d > 0 scales what is there to the new maximum, else x counts against the old one.
        d = x - m
        e = tl.exp(-tl.abs(d))
        rises = d > 0
        t = tl.where(rises, e * (t - d * s), t + e * d)
        s = tl.where(rises, e * s + 1.0, s + e)
        if TOP_TWO:
            second = tl.maximum(second, tl.minimum(m, x))
        m = tl.where(rises, x, m)
        if GREEDY:
            value = x
        else:
            bits = random_bits(k0, k1, mix(ids.to(tl.uint32, bitcast=True)))
            value = x - tl.log(exponential(uniform(bits)))
        token = tl.where(value > best, ids, token)
        best = tl.where(value > best, value, best)

    top = tl.max(m, 0)
    e = tl.exp(m - top)  # s is 0 in lanes that saw nothing, and huge nowhere
    at = row * SPLITS + split
    plane = h * SPLITS
    tl.store(numbers_ptr + at, top)
    tl.store(numbers_ptr + 2 * plane + at, tl.sum(e * s, 0))
    tl.store(numbers_ptr + 3 * plane + at, tl.sum(e * (t + s * (m - top)), 0))
    if TOP_TWO:
        lane = tl.arange(0, TILE)
        leader = tl.min(tl.where(m == top, lane, TILE), 0)
        tl.store(numbers_ptr + plane + at, tl.max(tl.where(lane == leader, second, m), 0))
    highest = tl.max(best, 0)
    tl.store(numbers_ptr + 4 * plane + at, highest)
    lowest = tl.min(tl.where(best == highest, token, num_ids - 1), 0)
    tl.store(token_ptr + at, lowest)


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
    temperature,
    h,
    random_id,
    SCALED: tl.constexpr,
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
    split = tl.arange(0, SPLITS)
    at = row * SPLITS + split
    plane = h * SPLITS
    m = tl.load(numbers_ptr + at)
    s = tl.load(numbers_ptr + 2 * plane + at)
    t = tl.load(numbers_ptr + 3 * plane + at)
    best = tl.load(numbers_ptr + 4 * plane + at)
    top = tl.max(m, 0)
    e = tl.exp(m - top)
    t = tl.sum(e * (t + s * (m - top)), 0)
    s = tl.sum(e * s, 0)
    highest = tl.max(best, 0)
    token = tl.min(tl.where(best == highest, tl.load(shares_token_ptr + at), num_ids - 1), 0)
    x = tl.load(logits_ptr + row.to(tl.int64) * logits_stride + token)
    if SCALED:
        x = x / temperature
    # Where no id has probability there is nothing to draw, as in a softmax of nothing.
    x = tl.where(top > LOWEST, x, float("nan"))
    logprob = x - top - tl.log(s)
    entropy = tl.log(s) - t / s
    tl.store(token_ptr + row, token)
    tl.store(logprob_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)
    if TARGET == 0:
        score = tl.exp(logprob)
    elif TARGET == 1:
        leader = tl.min(tl.where(m == top, split, SPLITS), 0)
        second = tl.max(tl.where(split == leader, tl.load(numbers_ptr + plane + at), m), 0)
        score = (1.0 - tl.exp(second - top)) / s
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
    tile = min(TILE, triton.next_power_of_2(num_ids))
    splits = min(SPLITS, triton.next_power_of_2(triton.cdiv(num_ids, tile)))
    share = triton.cdiv(triton.cdiv(num_ids, tile), splits) * tile
    empty = lambda *shape, dtype: torch.empty(shape, dtype=dtype, device=logits.device)  # noqa: E731
    numbers, tokens = empty(5, h, splits, dtype=torch.float32), empty(h, splits, dtype=torch.int32)
    drawn = Draws(empty(h, dtype=torch.int32), *(empty(h, dtype=torch.float32) for _ in range(3)), score_entropy=None)
    drawn.score_entropy = drawn.entropy
    temperature = float(settings.logits_temperature)
    scaled, limited = temperature != 1.0, num_rows is not None
    sample_share_kernel[(h, splits)](
        *(logits, logits.stride(0), keys, forbidden, num_rows, numbers, tokens),
        *(num_ids, share, temperature, h),
        GREEDY=settings.is_greedy,
        SCALED=scaled,
        TOP_TWO=target == MARGIN,
        LIMITED=limited,
        SPLITS=splits,
        TILE=tile,
        num_warps=4,
    )
    sample_join_kernel[(h,)](
        *(logits, logits.stride(0), keys, numbers, tokens, num_rows),
        *(drawn.tokens, drawn.logprobs, drawn.entropy, drawn.score),
        *(num_ids, temperature, h, noise.RANDOM_SCORE_ID),
        SCALED=scaled,
        TARGET=target,
        LIMITED=limited,
        SPLITS=splits,
        num_warps=1,
    )
    return drawn
