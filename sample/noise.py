"""Counter-based random numbers: a function of (seed, task, sample, position, forward number, vocabulary id) and of nothing else.

The recipe, in unsigned 32-bit arithmetic that wraps (a kernel can follow it bit for bit; `>>` shifts zeros in):

    mix(x):    x ^= x >> 16; x *= 0x21F0AAAD; x ^= x >> 15; x *= 0xD35A2D97; x ^= x >> 15
    sequence:  (a, b) = the two little-endian words of blake2b-64 of the text "seed/sample/task id"
    row:       k0 = mix(mix(a ^ position) + forward)        k1 = mix(mix(b + position) ^ forward)
    id:        x = mix(id) ^ k0; x ^= x >> 16; x *= 0x21F0AAAD; x ^= k1; x ^= x >> 15; x *= 0xD35A2D97; x ^= x >> 15
    uniform:   v = ((x >> 1) + 0.5) * 2^-31, in float32, at most 1 - 2^-24
    gumbel:    -log(-log1p(-v))

`mix` is the two-round integer hash with the least known bias (github.com/skeeto/hash-prospector). v is finest near 0, which is
where large Gumbel values, the winners, come from. torch has no unsigned 32-bit arithmetic: int32 has the same bits.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

FIRST, SECOND = 0x21F0AAAD, 0xD35A2D97 - 2**32
"""The multipliers as int32."""
RANDOM_SCORE_ID = -1
"""The "vocabulary id" of the random number that ranks positions (target `random`): no token has it."""
CHOICE_ID = -2
"""The one of the noise on the choice of positions (`alg_temp`)."""


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int32: torch's own copies the sign."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """The hash of int32 `x`, elementwise; a bijection."""
    x = (x ^ shift_right(x, 16)) * FIRST
    x = (x ^ shift_right(x, 15)) * SECOND
    return x ^ shift_right(x, 15)


def sequence_key(seed: int, task_id: str, sample: int) -> tuple[int, int]:
    """(a, b) of one sequence, as two int32 numbers; equal on every machine."""
    digest = hashlib.blake2b(f"{seed}/{sample}/{task_id}".encode(), digest_size=8).digest()
    return tuple(int.from_bytes(digest[i : i + 4], "little", signed=True) for i in (0, 4))


def row_keys(sequence: Tensor, position: Tensor, forward: Tensor) -> Tensor:
    """int32 [M, 2]: (k0, k1) of rows of the sequences whose keys are `sequence` int32 [M, 2], at `position` [M] in their
    `forward`-th [M] denoising forward."""
    a, b = sequence.unbind(1)
    position, forward = position.int(), forward.int()
    return torch.stack([mix(mix(a ^ position) + forward), mix(mix(b + position) ^ forward)], dim=1)


def random_bits(keys: Tensor, ids: Tensor) -> Tensor:
    """int32 [M, V], the 32 random bits of row keys [M, 2] at vocabulary ids [V]."""
    k0, k1 = keys[:, :1], keys[:, 1:]
    x = mix(ids.int()) ^ k0
    x = x.bitwise_xor_(shift_right(x, 16)).mul_(FIRST).bitwise_xor_(k1)
    x = x.bitwise_xor_(shift_right(x, 15)).mul_(SECOND)
    return x.bitwise_xor_(shift_right(x, 15))


def uniform(keys: Tensor, ids: Tensor) -> Tensor:
    """float32 [M, V], uniform on (0, 1)."""
    return shift_right(random_bits(keys, ids), 1).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)


def gumbel(keys: Tensor, vocab_size: int) -> Tensor:
    """float32 [M, V] standard Gumbel noise: argmax(log p + gumbel) is a sample of p."""
    return gumbel_at(keys, torch.arange(vocab_size, dtype=torch.int32, device=keys.device))


def gumbel_at(keys: Tensor, ids: Tensor) -> Tensor:
    """float32 [M, V] standard Gumbel noise of row keys [M, 2] at vocabulary ids [V]."""
    return uniform(keys, ids).neg_().log1p_().neg_().log_().neg_()
