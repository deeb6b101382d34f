"""The forward on the kernels against the decoder's own, without a cache and under the block-causal mask.

On a CPU the references are compared here and, in the interpreter's process, the kernels; on a GPU the kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models.attention import masked_attention
from models.decoder import Decoder
from models.family import Piece
from models.lora import LoRA, LoRALinear
from sample.fused_forward import AttendCached, fused_forward
from sample.kernels import matmul
from sample.kernels.item_attention import item_attention
from sample.kernels.matmul import Tiles
from sample.kernels.prefill_attention import prefill_attention
from sample.kernels.rotary_store import rotary_table
from sample.pages import PAGE
from tests.sample.reference import random_decoder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = 4
VARIANTS = {
    "qk norm": dict(qk_norm=True),
    "bias": dict(qk_norm=False, qkv_bias=True),
    "groups of 3, head of 24": dict(num_heads=6, num_kv_heads=2, head_dim=24),
}


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def whole(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Hidden states of one sequence, nothing cached."""
    position = torch.arange(len(tokens), device=DEVICE)
    return decoder(tokens, position, masked_attention(position[:, None] // SIZE >= position // SIZE))


class Paged:
    """Two sequences' pages, scattered: sequence s has pages table[s]."""

    def __init__(self, decoder: Decoder) -> None:
        c = decoder.config
        self.decoder = decoder
        shape = (c.num_layers, 6 * PAGE, c.num_kv_heads, c.head_dim)
        self.k, self.v = (torch.randn(shape, dtype=decoder.dtype, device=DEVICE) for _ in range(2))
        self.table = torch.tensor([[3, 1], [5, 2]], dtype=torch.int32, device=DEVICE)
        self.rotary = rotary_table(2 * PAGE, c.head_dim, c.rope_theta, decoder.dtype, DEVICE)

    def entries(self, sequence: int, positions: Tensor) -> Tensor:
        return self.table[sequence][positions.long() // PAGE] * PAGE + positions % PAGE

    def run(self, tokens: Tensor, positions: Tensor, entries: Tensor, attend: AttendCached, **options: Any) -> Tensor:
        return fused_forward(self.decoder, tokens, positions, entries, self.k, self.v, self.rotary, attend, **options)


# In numpy's hands: rows of places that nobody has.
pytestmark = [pytest.mark.filterwarnings(f"ignore:{what}") for what in ("overflow", "invalid value", "All-NaN", "divide by zero")]


@pytest.fixture(autouse=True)
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time for every program."""
    monkeypatch.setattr("sample.kernels.item_attention.splits_of", lambda num_items: 2)


@torch.no_grad()
def check(decoder: Decoder) -> None:
    decoder = decoder.to(DEVICE)
    torch.manual_seed(0)
    first, second = 12, 4  # start of the current blocks
    a, b = (torch.randint(0, 20, (length + SIZE,), device=DEVICE) for length in (first, second))
    want_a, want_b = whole(decoder, a), whole(decoder, b)
    paged = Paged(decoder)

    # The prompts: of `a` all but the block that a commit item brings, of `b` all.
    known_a, known_b = first - SIZE, second
    starts, lengths = ints(0, known_a), ints(known_a, known_b)
    positions = [torch.arange(length, dtype=torch.int32, device=DEVICE) for length in (known_a, known_b)]
    prefilled = paged.run(
        torch.cat([a[:known_a], b[:known_b]]),
        torch.cat(positions),
        torch.cat([paged.entries(s, positions[s]) for s in (0, 1)]),
        lambda layer, q, k, v: prefill_attention(q, k, v, starts, lengths, SIZE, known_a),
        keep_kv=True,
    )
    torch.testing.assert_close(prefilled, torch.cat([want_a[:known_a], want_b[:known_b]]), rtol=1e-5, atol=2e-5)

    # Items: b's block, nobody, a's block, then a's finished block and a commit place that nobody needs.
    order, num_keys, commit_of = ints(1, -1, 0), ints(second + SIZE, 0, first + SIZE), ints(-1, -1, 0)
    nobody = torch.zeros(SIZE, dtype=a.dtype, device=DEVICE)
    offset = torch.arange(SIZE, dtype=torch.int32, device=DEVICE)
    tokens = torch.cat([b[second:], nobody, a[first:], a[first - SIZE : first], nobody])
    positions = torch.cat([second + offset, 0 * offset, first + offset, first - SIZE + offset, 0 * offset])
    entries = torch.full_like(positions, -1)
    for i, s in ((0, 1), (2, 0), (3, 0)):
        rows = slice(i * SIZE, (i + 1) * SIZE)
        entries[rows] = paged.entries(s, positions[rows])
    before = paged.k.clone()

    def attend(layer: int, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        return item_attention(q, paged.k[layer], paged.v[layer], paged.table, order, num_keys, commit_of, SIZE)

    got = paged.run(tokens.int(), positions, entries, attend)
    rows = [*range(SIZE), *range(2 * SIZE, 4 * SIZE)]
    want = torch.cat([want_b[second:], want_a[first:], want_a[first - SIZE : first]])
    torch.testing.assert_close(got[rows], want, rtol=1e-5, atol=2e-5)
    some = [2, 9, 2, 14]  # in any order, one twice, as places that nobody needs are filled
    torch.testing.assert_close(
        paged.run(tokens.int(), positions, entries, attend, rows=ints(*some)), got[some], rtol=1e-5, atol=2e-5
    )
    changed = (paged.k != before).flatten(2).any(2).any(0).nonzero().squeeze(1)
    assert sorted(changed.tolist()) == sorted(entries[entries >= 0].tolist())


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_decoder(variant: str) -> None:
    check(random_decoder(**VARIANTS[variant]))


def test_equals_the_decoder_with_products_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels run, products of few rows are theirs; here in float32 as well."""
    monkeypatch.setattr(matmul, "SKINNY_DTYPES", [torch.float32])
    monkeypatch.setattr(matmul, "tiles_of", lambda *shape, gated=False: Tiles(32, 16, 1 if gated else 2))
    check(random_decoder())


def test_adapters_are_applied() -> None:
    decoder = random_decoder()
    lora = LoRA("", 2, 4.0, ())
    torch.manual_seed(2)
    for layer in decoder.layers:
        for parent, name in [(layer.attention, "qkv"), (layer.attention, "out"), (layer.mlp, "gate_up"), (layer.mlp, "down")]:
            base = getattr(parent, name)
            adapted = LoRALinear(base, [Piece(f"{name}.weight", name, 4, base.out_features // 2)], lora)
            for pair in adapted.adapters.values():
                torch.nn.init.normal_(pair.A), torch.nn.init.normal_(pair.B, std=0.1)
            setattr(parent, name, adapted)
    check(decoder)
