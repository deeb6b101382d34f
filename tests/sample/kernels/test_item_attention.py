"""Item attention against a loop over rows and heads in float64, with ragged contexts, scattered pages and commit items."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sample.kernels.item_attention import TILES, item_attention, item_attention_reference
from sample.pages import PAGE
from tests.sample.kernels.compare import assert_near, poisoned


@dataclass
class Case:
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    order: Tensor
    num_keys: Tensor
    commit_of: Tensor
    block_size: int

    def run(self, function, **options) -> Tensor:
        return function(*vars(self).values(), **options)

    def to(self, device: torch.device, dtype: torch.dtype) -> Case:
        floats = [x.to(device, dtype) for x in (self.q, self.k_cache, self.v_cache)]
        return Case(*floats, *(x.to(device) for x in list(vars(self).values())[3:7]), self.block_size)

    @property
    def rows(self) -> list[tuple[int, int, int]]:
        """(row of the forward, slot, keys it sees) of every defined row."""
        n, size = len(self.order), self.block_size
        rows = []
        for i, (slot, keys, commit) in enumerate(zip(self.order.tolist(), self.num_keys.tolist(), self.commit_of.tolist())):
            rows += [(i * size + j, slot, keys) for j in range(size)]
            rows += [((n + commit) * size + j, slot, keys - size) for j in range(size) if commit >= 0]
        return rows


def random_case(seed: int, block_size: int, heads: tuple[int, int, int], num_blocks: list[int], commits: list[int]) -> Case:
    """Items of so many whole blocks (0: does not run), in scattered slots and pages; `commits`: which of them commit."""
    g = torch.Generator().manual_seed(seed)
    (num_heads, num_kv_heads, head_dim), n = heads, len(num_blocks)
    num_slots, pages = n + 3, max(1, -(-max(num_blocks) * block_size // PAGE))
    table = (torch.randperm(num_slots * pages, generator=g) + 1).view(num_slots, pages).int()
    order = torch.randperm(num_slots, generator=g)[:n].int()
    order[[i for i, blocks in enumerate(num_blocks) if blocks == 0][:1]] = -1
    commit_of = torch.full((n,), -1, dtype=torch.int32)
    for k, i in enumerate(commits):
        commit_of[i] = k
    draw = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    caches = draw(2, (num_slots * pages + 1) * PAGE, num_kv_heads, head_dim)
    q = draw((n + len(commits) + 1) * block_size, num_heads, head_dim)  # one commit place that no item has
    num_keys = torch.tensor(num_blocks, dtype=torch.int32) * block_size
    return Case(q, *caches, table, order, num_keys, commit_of, block_size)


def brute_force(case: Case) -> Tensor:
    """Of the defined rows; NaN elsewhere."""
    out = torch.full_like(case.q, float("nan"), dtype=torch.float64)
    per_group = case.q.shape[1] // case.k_cache.shape[1]
    for row, slot, keys in case.rows:
        entries = [int(case.block_table[slot, t // PAGE]) * PAGE + t % PAGE for t in range(keys)]
        for head in range(case.q.shape[1]):
            k, v = (x[entries, head // per_group].double() for x in (case.k_cache, case.v_cache))
            scores = k @ case.q[row, head].double() / case.q.shape[2] ** 0.5
            out[row, head] = scores.softmax(0) @ v if keys else 0.0
    return out


CASES = {
    "one item": random_case(0, 4, (4, 2, 8), [3], []),
    "one item that commits": random_case(1, 4, (4, 2, 16), [20], [0]),
    "first block, empty, long": random_case(2, 4, (8, 2, 8), [1, 0, 37, 0, 2], [2, 4]),
    "block size 1": random_case(3, 1, (3, 1, 8), [1, 130, 64], [1]),
    "uneven block size": random_case(4, 5, (6, 2, 24), [30, 2, 13], [0, 1, 2]),
    "tiles of rows": random_case(5, 32, (4, 1, 8), [2, 1], [0]),
    "nobody runs": random_case(6, 2, (2, 2, 8), [0, 0], []),
}


TILED = {
    "less than a tile": random_case(8, 2, (2, 1, 8), [40, 3], [0]),
    "a tile that is not full": random_case(9, 20, (6, 2, 8), [4, 1], [0]),
    "two tiles of 128": random_case(10, 64, (4, 1, 8), [2, 1], [0]),
}


@pytest.mark.parametrize("name", CASES | TILED)
def test_the_reference_is_the_brute_force(name: str) -> None:
    case = (CASES | TILED)[name]
    rows = [row for row, _, _ in case.rows]
    got, want = case.run(item_attention_reference)[rows], brute_force(case)[rows]
    assert torch.allclose(got.double(), want, atol=1e-6)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # in numpy's hands: the rows of the commit place that no item has
@pytest.mark.parametrize("splits", [None, 1, 4])
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_brute_force(device: torch.device, name: str, splits: int | None, dtype: torch.dtype) -> None:
    case = CASES[name].to(device, dtype)
    rows = [row for row, _, _ in case.rows]
    with poisoned():
        got = case.run(item_attention, splits=splits)[rows]
    want = brute_force(case.to(torch.device("cpu"), dtype))[rows]  # of the inputs as they are rounded
    if not case.num_keys.any():
        assert (got == 0).all()
    else:
        assert_near(got, want, roundings=4)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize(
    "name, tile, splits",
    [
        ("less than a tile", 32, 2),
        ("less than a tile", 128, 1),
        ("a tile that is not full", 64, 2),
        ("a tile that is not full", 128, 1),
        ("two tiles of 128", 32, 1),
        ("two tiles of 128", 64, 1),
        ("two tiles of 128", 128, 1),
    ],
)
def test_tiles_of_bfloat16(device: torch.device, name: str, tile: int, splits: int) -> None:
    """Of the rows that bfloat16 takes at a time. The interpreter has float32 only, which takes 16 if it is not told otherwise."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    case = TILED[name].to(device, dtype)
    rows = [row for row, _, _ in case.rows]
    with poisoned():
        got = case.run(item_attention, splits=splits, tile=tile, keys_at_a_time=TILES[tile][0])[rows]
    assert_near(got, brute_force(case.to(torch.device("cpu"), dtype))[rows], roundings=4)


def test_large_entries_do_not_wrap(device: torch.device) -> None:
    """Entries times their size pass 2^31."""
    if device.type == "cpu":
        pytest.skip("takes 9 GB of GPU memory")
    heads = (8, 8, 128)
    case = random_case(7, 4, heads, [30, 2, 13], [0])
    far = 2**22  # entries of 8 heads of 128: 4.3e9 numbers behind the first
    k_cache, v_cache = (torch.zeros(far + len(case.k_cache), *heads[1:], dtype=torch.bfloat16, device=device) for _ in range(2))
    small = case.to(device, torch.bfloat16)
    k_cache[far:], v_cache[far:] = small.k_cache, small.v_cache
    large = Case(small.q, k_cache, v_cache, small.block_table + far // PAGE, *list(vars(small).values())[4:])
    rows = [row for row, _, _ in case.rows]
    assert torch.equal(large.run(item_attention)[rows], small.run(item_attention)[rows])
