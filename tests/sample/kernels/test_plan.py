"""Plans by hand, and the kernel against its reference on random states."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sample import noise
from sample.kernels import plan as plan_module
from sample.kernels.plan import make_plan, make_plan_reference
from sample.pages import PAGE
from sample.slots import Plan, Slots


def random_slots(num_slots: int, size: int, seed: int, num_pages: int = 4) -> tuple[Slots, torch.Tensor]:
    """Slots in any state that the engine can reach, and a block table [S, pages]; on the CPU."""
    g = torch.Generator().manual_seed(seed)
    number = lambda high, *shape: torch.randint(0, high, shape, generator=g, dtype=torch.int32)  # noqa: E731
    slots = Slots.empty(num_slots, size, "cpu")
    slots.tokens.copy_(number(100, num_slots, 2, size))
    slots.masked.copy_(number(2, num_slots, size))
    slots.masked[torch.arange(num_slots), number(size, num_slots).long()] = True
    slots.active.copy_(number(5, num_slots) > 0)
    slots.start.copy_(number(num_pages * PAGE // size, num_slots) * size)
    slots.commit.copy_((number(2, num_slots) > 0) & (slots.start > 0))
    slots.step_in_block.copy_(number(size + 2, num_slots))
    slots.forwards.copy_(number(1000, num_slots))
    slots.prompt_length.copy_((slots.start - number(3 * size, num_slots)).clamp(min=0))
    slots.limit.copy_(slots.prompt_length + 1 + number(4 * size, num_slots))
    slots.end.copy_(-(-torch.maximum(slots.limit, slots.start + 1) // size) * size)
    slots.result_row.copy_(torch.randperm(num_slots, generator=g))
    slots.key.copy_(torch.randint(-(2**31), 2**31, (num_slots, 2), generator=g))
    table = torch.randperm(num_slots * num_pages, generator=g).view(num_slots, num_pages).int() + 1
    return slots, table


def on(device: torch.device | str, state):
    """A copy of a dataclass of tensors."""
    return type(state)(*(getattr(state, f.name).to(device, copy=True) for f in dataclasses.fields(state)))


def assert_equal(ours, theirs) -> None:
    for field in dataclasses.fields(theirs):
        one, other = getattr(ours, field.name).cpu(), getattr(theirs, field.name).cpu()
        assert one.dtype == other.dtype and torch.equal(one, other), (field.name, one, other)


def random_order(n: int, num_slots: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(max(n, num_slots), generator=g)[:n]
    return torch.where(order < num_slots, order, -1).int()


def test_plan_by_hand(device: torch.device) -> None:
    """Blocks of 2; slots 0 to 4, of which 3 is idle. The third to commit finds no place, and the last no head rows."""
    slots = Slots.empty(5, 2, device)
    slots.active.copy_(torch.tensor([1, 1, 1, 0, 1]))
    slots.commit.copy_(torch.tensor([1, 0, 1, 1, 0]))
    slots.start.copy_(torch.tensor([64, 6, 4, 8, 2]))
    slots.masked.copy_(torch.tensor([[1, 1], [0, 1], [1, 1], [1, 1], [1, 0]]))
    slots.tokens.copy_(torch.arange(20).view(5, 2, 2) + 100)
    slots.forwards.copy_(torch.tensor([5, 0, 0, 0, 9]))
    slots.key.copy_(torch.arange(10).view(5, 2))
    table = torch.tensor([[7, 3], [2, 0], [1, 0], [4, 0], [5, 0]], dtype=torch.int32, device=device)
    plan = Plan.empty(6, 1, 4, 2, device)
    plan.order.copy_(torch.tensor([3, 1, 0, -1, 2, 4]))
    make_plan(slots, table, plan)
    rows = lambda x: x.view(7, 2).tolist()  # noqa: E731
    assert plan.runs.tolist() == [False, True, True, False, False, True]
    assert plan.num_keys.tolist() == [0, 8, 66, 0, 0, 4]
    assert plan.commit_of.tolist() == [-1, -1, 0, -1, -1, -1]
    assert rows(plan.row_tokens) == [[0, 0], [106, 107], [102, 103], [0, 0], [0, 0], [118, 119], [100, 101]]
    assert rows(plan.positions) == [[0, 0], [6, 7], [64, 65], [0, 0], [0, 0], [2, 3], [62, 63]]
    entries = [[-1, -1], [134, 135], [192, 193], [-1, -1], [-1, -1], [322, 323], [510, 511]]
    assert rows(plan.entries) == entries
    assert plan.head_rows.tolist() == [3, 4, 5, 10]
    assert plan.draw_of.tolist() == [[-1, -1], [-1, 0], [1, 2], [-1, -1], [-1, -1], [3, -1]]
    assert plan.num_head.item() == 4
    keys = torch.tensor([[2, 3], [0, 1], [0, 1], [8, 9]], dtype=torch.int32)
    expected = noise.row_keys(keys, torch.tensor([7, 64, 65, 2]), torch.tensor([1, 6, 6, 10]))
    assert plan.row_keys.tolist() == expected.tolist()

    plan = Plan.empty(6, 2, 3, 2, device)  # now the second commit finds a place, but no head rows: neither does who comes later
    plan.order.copy_(torch.tensor([3, 1, 0, -1, 2, 4]))
    make_plan(slots, table, plan)
    assert plan.runs.tolist() == [False, True, True, False, False, False]
    assert plan.commit_of.tolist() == [-1, -1, 0, -1, -1, -1]
    assert plan.entries.view(8, 2)[5:].tolist() == [[-1, -1], [510, 511], [-1, -1]]
    assert plan.num_head.item() == 3


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16])
def test_kernel_equals_reference(size: int, device: torch.device) -> None:
    stalled = 0
    for seed, (n, num_slots) in enumerate([(1, 1), (9, 12)] if device.type == "cpu" else [(1, 1), (9, 12), (13, 8), (40, 40)]):
        slots, table = random_slots(num_slots, size, seed)
        g = torch.Generator().manual_seed(seed)
        for c, h in [(n, n * size), (n // 3, n * size), (n // 2, max(1, n * size // 3))]:
            plan = Plan.empty(n, c, h, size, "cpu")
            for field in dataclasses.fields(plan):  # garbage from the step before
                x = getattr(plan, field.name)
                x.copy_(torch.randint(0, 2, x.shape, generator=g))
            plan.order.copy_(random_order(n, num_slots, seed))
            ours, theirs = on(device, plan), on("cpu", plan)
            make_plan(on(device, slots), table.to(device), ours)
            make_plan_reference(slots, table, theirs)
            assert_equal(ours, theirs)
            stalled += int((slots.active[plan.order[plan.order >= 0].long()]).sum() - theirs.runs.sum())
    assert stalled > 0


@pytest.mark.parametrize("size, at_a_time", [(3, 16), (8, 32), (16, 1)])
def test_places_are_counted_some_at_a_time(
    size: int, at_a_time: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 9 items, in a tile of 16: one place at a time, the last of four being nobody's; two; and no less than one."""
    monkeypatch.setattr(plan_module, "AT_A_TIME", at_a_time)
    slots, table = random_slots(12, size, 5)
    for commits, head_rows in [(9, 9 * size), (3, 9 * size), (4, 4 * size)]:
        plan = Plan.empty(9, commits, head_rows, size, "cpu")
        plan.order.copy_(random_order(9, 12, 5))
        ours = on(device, plan)
        make_plan(on(device, slots), table.to(device), ours)
        make_plan_reference(slots, table, plan)
        assert_equal(ours, plan)


def test_many_items(device: torch.device) -> None:
    n = 8 if device.type == "cpu" else 512
    slots, table = random_slots(n, 4, 3)
    plan = Plan.empty(n, n // 2, 3 * n, 4, "cpu")
    plan.order.copy_(random_order(n, n, 3))
    ours = on(device, plan)
    make_plan(on(device, slots), table.to(device), ours)
    make_plan_reference(slots, table, plan)
    assert_equal(ours, plan)
