"""The decoder's forward on the kernels: the function of models/decoder.py, with what lies between its products fused.

    embed -> [norm -> qkv -> norm, rotate, store k and v -> attend -> out -> add, norm -> gate/up -> silu -> down -> add] -> norm

Products go through the decoder's own modules, so that adapters and sharded weights work; only plain linear layers with few rows
are taken by a kernel of their own (sample/kernels/matmul.py). Nothing here waits for the device, so a CUDA graph can hold it.

Shapes: N rows, h of them whose result is asked for, D hidden, L layers, H query heads, G key/value heads, K head_dim, E cache
entries.
"""

from __future__ import annotations

from typing import Callable, Sequence

from torch import Tensor

from models.decoder import Decoder
from sample.kernels.matmul import gate_up_silu, product
from sample.kernels.norms import add_rms_norm, rms_norm
from sample.kernels.rotary_store import rotary_store

AttendCached = Callable[[int, Tensor, "Tensor | None", "Tensor | None"], Tensor]
"""(layer, q [N, H, K], k [N, G, K], v [N, G, K]) -> attention output [N, H, K]; k and v are in the cache already and None unless
`keep_kv`."""


def fused_forward(
    decoder: Decoder,
    tokens: Tensor,
    positions: Tensor,
    entries: Tensor,
    k_cache: Sequence[Tensor],
    v_cache: Sequence[Tensor],
    table: Tensor,
    attend: AttendCached,
    keep_kv: bool = False,
    rows: Tensor | None = None,
) -> Tensor:
    """Hidden states [N, D] after the final norm, or [h, D]: those of `rows` int32 [h] alone, which the last layer, once it has
    attended, computes no others of.

    tokens int32 or int64 [N]; positions int32 [N]; entries int32 [N]: where the rows' keys and values go, -1: nowhere; k_cache,
    v_cache: per layer [E, G, K]; table: `rotary_store.rotary_table`, longer than every position; keep_kv: hand the rows' own
    keys and values to `attend` (prefill).
    """
    config = decoder.config
    residual = decoder.embed(tokens)  # [N, D]
    x = rms_norm(residual, decoder.layers[0].attention_norm.weight, config.rms_norm_eps)
    for n, layer in enumerate(decoder.layers):
        attention = layer.attention
        norms = (attention.q_norm.weight, attention.k_norm.weight) if config.qk_norm else (None, None)
        q, k, v = rotary_store(
            product(attention.qkv, x), positions, entries, k_cache[n], v_cache[n], table, config.num_heads, *norms,
            eps=config.rms_norm_eps, keep_kv=keep_kv,
        )  # fmt: skip
        attended, last = attend(n, q, k, v).flatten(1), n + 1 == len(decoder.layers)
        if last and rows is not None:
            attended, residual = attended.index_select(0, rows), residual.index_select(0, rows)
        out = product(attention.out, attended)
        x, residual = add_rms_norm(out, residual, layer.mlp_norm.weight, config.rms_norm_eps)
        out = product(layer.mlp.down, gate_up_silu(layer.mlp.gate_up, x))
        next_norm = decoder.norm if last else decoder.layers[n + 1].attention_norm
        x, residual = add_rms_norm(out, residual, next_norm.weight, config.rms_norm_eps)
    return x
