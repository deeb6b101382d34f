"""Which items and rows a forward has: from the slots' state to a `Plan`, on the device (sample/slots.py has the layout)."""

from __future__ import annotations

import torch
from torch import Tensor

from models.kernels.launch import jit, tl, triton, use_kernel
from sample import noise
from sample.kernels.noise import mix
from sample.pages import PAGE
from sample.slots import Plan, Slots

MOST_ITEMS, MOST_ROWS = 2**11, 2**18
"""A plan has fewer: the kernel keeps the commits among so many items, and the head rows among so many, in bits of one number."""
AT_A_TIME = 2**13
"""Places of all items together that a program counts at a time. Counting more takes minutes to compile, and registers that there
are not."""


def make_plan(slots: Slots, block_table: Tensor, plan: Plan) -> None:
    """Fill `plan` for the next forward of the slots in `plan.order`, within its capacities.

    block_table int32 [S, pages]: page ids by slot. Item by item in the order given: one that has to commit its finished block
    needs one of the c commit items; then its masked rows have to fit in what is left of the h head rows, and where they do not,
    no later item runs either.
    """
    (make_plan_kernel if use_kernel(plan.order) else make_plan_reference)(slots, block_table, plan)


def make_plan_reference(slots: Slots, block_table: Tensor, plan: Plan) -> None:
    n, size, c, h = plan.num_items, plan.block_size, plan.commit_capacity, plan.head_rows.shape[0]
    device = plan.order.device
    slot = plan.order.clamp(min=0).long()  # [n]
    active = (plan.order >= 0) & slots.active[slot]
    commits = active & slots.commit[slot]
    fits = active & (~commits | (commits.cumsum(0) <= c))
    masked = slots.masked[slot]  # [n, B]
    num_masked = torch.where(fits, masked.sum(1), 0)
    head_end = num_masked.cumsum(0)
    runs = fits & (head_end <= h)
    plan.runs.copy_(runs)
    plan.num_head.fill_(torch.where(runs, num_masked, 0).sum())
    plan.num_keys.copy_(torch.where(runs, slots.start[slot] + size, 0))
    commit_of = torch.where(runs & commits, commits.cumsum(0) - 1, -1)
    plan.commit_of.copy_(commit_of)

    def rows_of(at: Tensor, which: int, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, positions and entries [m, B] of slots `at` [m]; which: of the block before (0) or the current one (1)."""
        pages = block_table[at].gather(1, (positions // PAGE).long())
        return slots.tokens[at, which], positions, pages * PAGE + positions % PAGE

    offset = torch.arange(size, device=device)
    rows = [x.view(n + c, size) for x in (plan.row_tokens, plan.positions, plan.entries)]
    for x, nobody in zip(rows, (0, 0, -1)):
        x.fill_(nobody)
    who = runs.nonzero()[:, 0]
    for x, values in zip(rows, rows_of(slot[who], 1, slots.start[slot[who], None] + offset)):
        x[who] = values.int()
    committing = (commit_of >= 0).nonzero()[:, 0]
    before = slots.start[slot[committing], None] - size + offset
    for x, values in zip(rows, rows_of(slot[committing], 0, before)):
        x[n + commit_of[committing].long()] = values.int()

    head = masked & runs[:, None]  # [n, B]
    item, place = head.nonzero().unbind(1)  # [num_head]
    plan.head_rows.fill_(0)[: len(item)] = (item * size + place).int()
    plan.draw_of.fill_(-1)[item, place] = torch.arange(len(item), dtype=torch.int32, device=device)
    at = slot[item]
    keys = noise.row_keys(slots.key[at], slots.start[at] + place, slots.forwards[at] + 1)
    plan.row_keys.fill_(0)[: len(item)] = keys


@jit
def plan_kernel(
    order_ptr,
    active_ptr,
    commit_ptr,
    masked_ptr,
    start_ptr,
    forwards_ptr,
    key_ptr,
    tokens_ptr,
    table_ptr,
    table_stride,
    row_tokens_ptr,
    positions_ptr,
    entries_ptr,
    runs_ptr,
    num_keys_ptr,
    commit_of_ptr,
    head_rows_ptr,
    row_keys_ptr,
    draw_of_ptr,
    num_head_ptr,
    n,
    c,
    h,
    SIZE: tl.constexpr,  # B
    PAGE_SIZE: tl.constexpr,
    ITEMS: tl.constexpr,  # n, rounded up to a power of two
    PLACES: tl.constexpr,  # B, rounded up to a power of two
    STEP: tl.constexpr,  # of PLACES, how many are counted at a time
):
    """Program i writes what item i, commit item i and head rows [i*B, (i+1)*B) hold. Every program sums over all items for itself:
    that is less than what a second launch costs."""
    i = tl.program_id(0)
    items = tl.arange(0, ITEMS)
    place = tl.arange(0, PLACES)
    is_place = place < SIZE

    slots = tl.load(order_ptr + items, mask=items < n, other=-1)
    there = slots >= 0
    slots = tl.maximum(slots, 0)
    active = there & (tl.load(active_ptr + slots, mask=there, other=0) != 0)
    commits = active & (tl.load(commit_ptr + slots, mask=there, other=0) != 0)
    commits_until = tl.cumsum(commits.to(tl.int32), 0)
    fits = active & ((commits_until <= c) | (commits == 0))
    num_masked = tl.zeros([ITEMS], tl.int32)
    for first in range(0, PLACES, STEP):
        some = first + tl.arange(0, STEP)
        masked = tl.load(masked_ptr + slots[:, None] * SIZE + some[None, :], mask=fits[:, None] & (some < SIZE)[None, :], other=0)
        num_masked += tl.sum((masked != 0).to(tl.int32), 1)
    head_end = tl.cumsum(num_masked, 0)
    runs = fits & (head_end <= h)
    num_head = tl.sum(tl.where(runs, num_masked, 0), 0)
    num_commits = tl.sum((runs & commits).to(tl.int32), 0)

    # Of item i: where its head rows begin, which commit it is, and whether it commits and runs; in one number, for one sum.
    facts = ((head_end - num_masked) * 2048 + commits_until) * 4 + (runs & commits).to(tl.int32) * 2 + runs.to(tl.int32)
    facts = tl.sum(tl.where(items == i, facts, 0), 0)
    run = facts & 1
    has_commit = facts >> 1 & 1
    k = (facts >> 2 & 2047) - 1
    first_head = facts >> 13

    slot = tl.maximum(tl.load(order_ptr + i), 0)
    start = tl.load(start_ptr + slot)
    tl.store(runs_ptr + i, run > 0)
    tl.store(num_keys_ptr + i, (start + SIZE) * run)
    tl.store(commit_of_ptr + i, tl.where(has_commit > 0, k, -1))
    if i == 0:
        tl.store(num_head_ptr, num_head)

    # The rows of the denoising item.
    reads = place < SIZE * run
    position = start + place
    page = tl.load(table_ptr + slot * table_stride + position // PAGE_SIZE, mask=reads, other=0)
    row = i * SIZE + place
    tokens = tl.load(tokens_ptr + (slot * 2 + 1) * SIZE + place, mask=reads, other=0)
    tl.store(row_tokens_ptr + row, tokens, mask=is_place)
    tl.store(positions_ptr + row, tl.where(reads, position, 0), mask=is_place)
    tl.store(entries_ptr + row, tl.where(reads, page * PAGE_SIZE + position % PAGE_SIZE, -1), mask=is_place)

    # The rows of its commit item.
    writes = place < SIZE * has_commit
    before = position - SIZE
    page = tl.load(table_ptr + slot * table_stride + before // PAGE_SIZE, mask=writes, other=0)
    row = (n + k) * SIZE + place
    tokens = tl.load(tokens_ptr + slot * 2 * SIZE + place, mask=writes, other=0)
    tl.store(row_tokens_ptr + row, tokens, mask=writes)
    tl.store(positions_ptr + row, before, mask=writes)
    tl.store(entries_ptr + row, page * PAGE_SIZE + before % PAGE_SIZE, mask=writes)

    # Commit item i, if nobody's.
    unused = place < tl.where((i >= num_commits) & (i < c), SIZE, 0)
    row = (n + i) * SIZE + place
    tl.store(row_tokens_ptr + row, 0, mask=unused)
    tl.store(positions_ptr + row, 0, mask=unused)
    tl.store(entries_ptr + row, -1, mask=unused)

    # Its masked rows go to the head, with the noise of their next forward.
    masked = tl.load(masked_ptr + slot * SIZE + place, mask=reads, other=0) != 0
    draw = first_head + tl.cumsum(masked.to(tl.int32), 0) - 1
    tl.store(draw_of_ptr + i * SIZE + place, tl.where(masked, draw, -1), mask=is_place)
    tl.store(head_rows_ptr + draw, i * SIZE + place, mask=masked)
    forward = (tl.load(forwards_ptr + slot) + 1).to(tl.uint32, bitcast=True)
    at = position.to(tl.uint32, bitcast=True)
    a = tl.load(key_ptr + slot * 2).to(tl.uint32, bitcast=True)
    b = tl.load(key_ptr + slot * 2 + 1).to(tl.uint32, bitcast=True)
    tl.store(row_keys_ptr + draw * 2, mix(mix(at ^ a) + forward).to(tl.int32, bitcast=True), mask=masked)
    tl.store(row_keys_ptr + draw * 2 + 1, mix(mix(at + b) ^ forward).to(tl.int32, bitcast=True), mask=masked)

    # Head rows [i*B, (i+1)*B), where nobody's.
    row = i * SIZE + place
    unused = is_place & (row >= num_head) & (row < h)
    tl.store(head_rows_ptr + row, 0, mask=unused)
    tl.store(row_keys_ptr + row * 2, 0, mask=unused)
    tl.store(row_keys_ptr + row * 2 + 1, 0, mask=unused)


def make_plan_kernel(slots: Slots, block_table: Tensor, plan: Plan) -> None:
    n, size = plan.num_items, plan.block_size
    assert block_table.stride(1) == 1 and slots.block_size == size and n < MOST_ITEMS and n * size < MOST_ROWS
    state = (slots.active, slots.commit, slots.masked, slots.start, slots.forwards, slots.key, slots.tokens)
    made = (
        *(plan.row_tokens, plan.positions, plan.entries, plan.runs, plan.num_keys, plan.commit_of),
        *(plan.head_rows, plan.row_keys, plan.draw_of, plan.num_head),
    )
    assert all(x.is_contiguous() for x in (plan.order, *state, *made))
    num_items, num_places = triton.next_power_of_2(n), triton.next_power_of_2(size)
    plan_kernel[(n,)](
        plan.order,
        *state,
        block_table,
        block_table.stride(0),
        *made,
        n,
        plan.commit_capacity,
        plan.head_rows.shape[0],
        SIZE=size,
        PAGE_SIZE=PAGE,
        ITEMS=num_items,
        PLACES=num_places,
        STEP=max(1, min(num_places, AT_A_TIME // num_items)),
        num_warps=4,
    )
