"""Lengths that rows of tokens are filled up to, for FlexAttention's tiles and for few compiled sizes. Without torch: the memory
estimate counts with them too."""

from __future__ import annotations

TILE = 128
"""Tokens of a tile of FlexAttention's mask: those of 64 do not compile, those of 256 are slower."""


def whole_tiles(n: int) -> int:
    """At least n, a multiple of TILE."""
    return -(-n // TILE) * TILE


def padded_length(n: int) -> int:
    """At least n, of few sizes: multiples of an eighth of the power of two that is not below n."""
    multiple = max(TILE, (1 << (n - 1).bit_length()) // 8)
    return -(-n // multiple) * multiple
