"""The noise of sample/noise.py inside kernels, bit for bit: uint32 arithmetic wraps and its shifts bring zeros in."""

from __future__ import annotations

from models.kernels.launch import jit, tl


@jit
def mix(x):
    """The hash of uint32 `x`."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)


@jit
def random_bits(k0, k1, mixed_id):
    """The 32 random bits of row key (k0, k1) at an id whose `mix` is `mixed_id`; all uint32."""
    x = mixed_id ^ k0
    x = (x ^ (x >> 16)) * 0x21F0AAAD ^ k1
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)


@jit
def uniform(bits):
    """float32 on (0, 1) of uint32 bits."""
    # (n + 0.5) * 2^-31 as one multiply-add, which rounds alike: the factor is a power of two.
    return tl.minimum((bits >> 1).to(tl.int32).to(tl.float32) * 4.656612873077393e-10 + 2.3283064365386963e-10, 1 - 2.0**-24)
