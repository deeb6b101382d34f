"""What an engine takes of a GPU's memory while it samples, and what it would have: the part of sample/ in train/memory_items.py's
arithmetic. Without torch."""

from __future__ import annotations

from train.memory_setup import Setup

ENOUGH_IN_FLIGHT = 128
"""Sequences of a block model: twice as many gave 4% to 7% more tokens/s on an H200 (docs/results.md), not worth moving things."""
PAGE, PREFILL_TOKENS, SMALL_STEP, LOGITS, RESULT_POSITIONS, CANVAS_LOGITS_BYTES = 64, 16_384, 2048, 2**29, 2**24, 20 * 2**26
MEMORY_SHARE, ROWS_AT_A_TIME = 0.9, 32_768
"""Of the engines, in sample/: pages.py, paged_block.py (three), paged_state.py, canvas_cache.py; paged_cache.py,
canvas_cache.py. The rooms do not import each other; a test holds these equal."""


def engine_bytes(s: Setup) -> tuple[float, float, float]:
    """(what graphs and results keep, keys and values of the longest sequence alone, workspace of its largest forward)."""
    c = s.shape
    position = 2 * c.num_layers * c.num_kv_heads * c.head_dim * s.itemsize
    length = s.prompt + s.response
    if s.attention == "full":
        heads = c.num_heads + 2 * c.num_kv_heads
        row = s.itemsize * (6 * c.hidden_size + 4 * heads * c.head_dim + 4 * c.intermediate_size)
        return 0.0, length * position if s.caches else 0.0, length * row + CANVAS_LOGITS_BYTES
    columns = 1 << (s.response + s.block_size - 2).bit_length()
    slots = 1 << (s.max_active - 1).bit_length()
    results = 16 * columns * min(max(2 * slots, RESULT_POSITIONS // columns), 16 * slots)
    logits = 4 * min(LOGITS, slots * s.block_size * c.vocab_size)
    pages = 1 + -(-(length + s.block_size) // PAGE)
    return results + logits, pages * PAGE * position, max(PREFILL_TOKENS, s.prompt) * _row_bytes(s) + 2 * logits


def _row_bytes(s: Setup) -> int:
    """The widest activations of a row of a block model."""
    return s.itemsize * (6 * s.shape.intermediate_size + 4 * s.shape.num_heads * s.shape.head_dim + 8 * s.shape.hidden_size)


def engine_wants(s: Setup) -> float:
    """Bytes of free memory with which the engine has as many of the `max_active` sequences in flight as help, each as long as it
    may become."""
    graphs, cache, workspace = engine_bytes(s)
    num_active = s.max_active
    if s.attention == "full":  # forwards over as many canvases as come to so many rows
        length = s.prompt + s.response
        activations = workspace - CANVAS_LOGITS_BYTES
        workspace += activations * (max(1.0, min(num_active, ROWS_AT_A_TIME / length)) - 1)
    else:
        num_active = min(num_active, ENOUGH_IN_FLIGHT)
        workspace += max(0, 2 * num_active * s.block_size - SMALL_STEP) * _row_bytes(s)  # of a step in which each commits a block
    return graphs + (num_active * cache + workspace) / MEMORY_SHARE
