"""The end of a step: which positions to reveal, what to record of them, and where each sequence goes from there."""

from __future__ import annotations

import torch
from torch import Tensor

from models.kernels.launch import jit, tl, triton, use_kernel
from sample import unmask
from sample.engine import SamplingSettings
from sample.registry import UNMASKING
from sample.sampling import Draws
from sample.slots import DONE, EMPTY, RAN, STALLED, Constants, Plan, Results, Slots
from sample.unmask import Candidates


def reveal_and_advance(
    slots: Slots, plan: Plan, draws: Draws, constants: Constants, settings: SamplingSettings, results: Results, status: Tensor
) -> None:
    """Reveal positions of the items that ran, write them to `results`, and move the slots on; `draws` are of the h head rows.

    A block that is whole now ends its sequence if it holds a stop token that counts, or is the last one; otherwise the slot goes
    to the next block, all masked, and this one waits to be committed.

    status int32 [n, 4], for the host, by item: EMPTY, RAN, DONE or STALLED; positions revealed; positions masked at the next
    forward; whether a commit goes along with it. After a step that RAN with commit 1 the slot is one block further.
    """
    step = reveal_and_advance_kernel if use_kernel(status) else reveal_and_advance_reference
    step(slots, plan, draws, constants, settings, results, status)


STATIC, DYNAMIC, SEQUENTIAL, ENTROPY_BOUNDED, GIVEN = range(5)
"""Strategies of the kernel; GIVEN: a plugin's, whose answer the kernel is handed."""


def kernel_strategy(settings: SamplingSettings) -> int:
    """Which of the kernel's strategies the settings name."""
    own = [unmask.low_confidence_static, unmask.low_confidence_dynamic, unmask.sequential, unmask.entropy_bounded]
    strategy = UNMASKING.get(settings.strategy)
    return own.index(strategy) if strategy in own else GIVEN


def candidates(slots: Slots, plan: Plan, draws: Draws, constants: Constants) -> Candidates:
    """What a strategy may look at, [n, B]; items that do not run have nothing masked."""
    slot = plan.order.clamp(min=0).long()
    at = plan.draw_of.clamp(min=0).long()
    step = slots.step_in_block[slot].clamp(max=len(constants.schedule) - 1).long()
    return Candidates(plan.draw_of >= 0, draws.score[at], draws.score_entropy[at], constants.schedule[step].long())


def reveal_and_advance_reference(
    slots: Slots, plan: Plan, draws: Draws, constants: Constants, settings: SamplingSettings, results: Results, status: Tensor
) -> None:
    size = plan.block_size
    reveal = UNMASKING.get(settings.strategy)(candidates(slots, plan, draws, constants), settings)  # [n, B]
    slot, state = plan.order.clamp(min=0).long(), torch.full_like(plan.order, EMPTY)
    state[(plan.order >= 0) & slots.active[slot] & ~plan.runs] = STALLED

    who = plan.runs.nonzero()[:, 0]  # [m]: from here on the items that ran
    slot, at, reveal = slot[who], plan.draw_of[who].clamp(min=0).long(), reveal[who]
    forwards = slots.forwards[slot] + 1
    tokens = torch.where(reveal, draws.tokens[at].int(), slots.tokens[slot, 1])  # [m, B]
    positions = slots.start[slot, None] + torch.arange(size, device=slot.device)
    rows = slots.result_row[slot].long()
    cell = rows[:, None].expand_as(reveal)[reveal], (positions - slots.prompt_length[slot, None])[reveal].long()
    results.tokens[cell] = tokens[reveal]
    results.step_map[cell] = forwards[:, None].expand_as(reveal)[reveal]
    results.logprobs[cell] = draws.logprobs[at][reveal]
    results.entropy[cell] = draws.entropy[at][reveal]

    left = slots.masked[slot] & ~reveal
    counts = (positions >= slots.prompt_length[slot, None]) & (positions < slots.limit[slot, None])
    stopped = (torch.isin(tokens, constants.stop_ids) & counts).any(1)
    block_done = ~left.any(1)
    done = block_done & (stopped | (positions[:, -1] + 1 >= slots.end[slot]))
    goes_on = block_done & ~done

    slots.tokens[slot, 0] = torch.where(goes_on[:, None], tokens, slots.tokens[slot, 0])
    slots.tokens[slot, 1] = torch.where(goes_on[:, None], settings.mask_id, tokens)
    slots.masked[slot] = left | goes_on[:, None]
    slots.active[slot] = ~done
    slots.commit[slot] = goes_on
    slots.start[slot] += goes_on * size
    slots.step_in_block[slot] = torch.where(goes_on, 0, slots.step_in_block[slot] + 1)
    slots.forwards[slot] = forwards
    results.num_forwards[rows[done]] = forwards[done]
    results.length[rows[done]] = (positions[:, -1] + 1 - slots.prompt_length[slot])[done].int()

    state[who] = torch.where(done, DONE, RAN).int()
    status.zero_()[:, 0] = state
    status[who, 1] = reveal.sum(1).int()
    status[who, 2] = slots.masked[slot].sum(1).int()
    status[who, 3] = goes_on.int()


@jit
def rank(score, masked, place):
    """[B]: how many masked positions come before each; by descending score, ties from left to right, as sample/unmask.py does."""
    other, one = score[None, :], score[:, None]
    before = (other > one) | ((other == one) & (place[None, :] < place[:, None]))
    return tl.sum((before & masked[None, :]).to(tl.int32), 1)


@jit
def reveal_kernel(
    order_ptr,
    runs_ptr,
    draw_of_ptr,
    tokens_ptr,
    masked_ptr,
    active_ptr,
    commit_ptr,
    start_ptr,
    step_in_block_ptr,
    forwards_ptr,
    prompt_length_ptr,
    limit_ptr,
    end_ptr,
    result_row_ptr,
    drawn_tokens_ptr,
    drawn_logprobs_ptr,
    drawn_entropy_ptr,
    drawn_score_ptr,
    drawn_score_entropy_ptr,
    given_ptr,
    schedule_ptr,
    num_steps,
    stop_ids_ptr,
    num_stop_ids,
    threshold,
    entropy_bound,
    mask_id,
    result_tokens_ptr,
    result_step_map_ptr,
    result_logprobs_ptr,
    result_entropy_ptr,
    result_num_forwards_ptr,
    result_length_ptr,
    result_stride,
    status_ptr,
    STRATEGY: tl.constexpr,
    SIZE: tl.constexpr,  # B
    PLACES: tl.constexpr,  # B, rounded up to a power of two
    STOPS: tl.constexpr,  # stop ids, rounded up to a power of two
):
    """Program i: item i."""
    i = tl.program_id(0)
    place = tl.arange(0, PLACES)
    is_place = place < SIZE
    slot = tl.load(order_ptr + i)
    runs = tl.load(runs_ptr + i) != 0
    # An item that does not run is stalled if its slot is active. (EMPTY 0, RAN 1, DONE 2, STALLED 3)
    active = tl.load(active_ptr + tl.maximum(slot, 0), mask=slot >= 0, other=0) != 0
    tl.store(status_ptr + i * 4, tl.where(active, 3, 0))
    tl.store(status_ptr + i * 4 + 1, 0)
    tl.store(status_ptr + i * 4 + 2, 0)
    tl.store(status_ptr + i * 4 + 3, 0)
    if runs:
        draw = tl.load(draw_of_ptr + i * SIZE + place, mask=is_place, other=-1)
        masked = draw >= 0
        score = tl.load(drawn_score_ptr + draw, mask=masked, other=0.0)
        step = tl.load(step_in_block_ptr + slot)
        count = tl.load(schedule_ptr + tl.minimum(step, num_steps - 1))
        if STRATEGY == 0:
            reveal = masked & (rank(score, masked, place) < count)
        elif STRATEGY == 1:
            reveal = masked & ((score > threshold) | (rank(score, masked, place) < count))
        elif STRATEGY == 2:
            reveal = masked & (tl.cumsum(masked.to(tl.int32), 0) <= count)
        elif STRATEGY == 3:
            entropy = tl.load(drawn_score_entropy_ptr + draw, mask=masked, other=0.0)
            first = rank(-entropy, masked, place)
            other, one = entropy[None, :], entropy[:, None]  # all pairs once more: the sum of what comes before
            before = (other < one) | ((other == one) & (place[None, :] < place[:, None]))
            spent = tl.sum(tl.where(before & masked[None, :], other, 0.0), 1)
            reveal = masked & ((spent <= entropy_bound) | (first == 0))
        else:
            reveal = masked & (tl.load(given_ptr + i * SIZE + place, mask=is_place, other=0) != 0)

        start = tl.load(start_ptr + slot)
        forwards = tl.load(forwards_ptr + slot) + 1
        prompt_length = tl.load(prompt_length_ptr + slot)
        row = tl.load(result_row_ptr + slot)
        position = start + place
        drawn = tl.load(drawn_tokens_ptr + draw, mask=reveal, other=0).to(tl.int32)
        tokens = tl.load(tokens_ptr + (slot * 2 + 1) * SIZE + place, mask=is_place, other=0)
        tokens = tl.where(reveal, drawn, tokens)
        cell = row.to(tl.int64) * result_stride + (position - prompt_length)
        tl.store(result_tokens_ptr + cell, tokens, mask=reveal)
        tl.store(result_step_map_ptr + cell, forwards, mask=reveal)
        tl.store(result_logprobs_ptr + cell, tl.load(drawn_logprobs_ptr + draw, mask=reveal, other=0.0), mask=reveal)
        tl.store(result_entropy_ptr + cell, tl.load(drawn_entropy_ptr + draw, mask=reveal, other=0.0), mask=reveal)

        left = masked & (reveal == 0)
        num_left = tl.sum(left.to(tl.int32), 0)
        num_revealed = tl.sum(reveal.to(tl.int32), 0)
        stop = tl.arange(0, STOPS)
        stop_ids = tl.load(stop_ids_ptr + stop, mask=stop < num_stop_ids, other=-1)
        counts = is_place & (position >= prompt_length) & (position < tl.load(limit_ptr + slot))
        stops = (tokens[:, None] == stop_ids[None, :]) & counts[:, None]
        stopped = tl.sum(tl.sum(stops.to(tl.int32), 1), 0)
        ends = (stopped > 0) | (start + SIZE >= tl.load(end_ptr + slot))
        done = (num_left == 0) & ends
        goes_on = (num_left == 0) & (ends == 0)
        num_masked = tl.where(goes_on, SIZE, num_left)

        # To the next block: this one becomes the one before, and the new one is all masked.
        finished = place < tl.where(goes_on, SIZE, 0)
        tl.store(tokens_ptr + slot * 2 * SIZE + place, tokens, mask=finished)
        tl.store(tokens_ptr + (slot * 2 + 1) * SIZE + place, tl.where(finished, mask_id, tokens), mask=is_place)
        tl.store(masked_ptr + slot * SIZE + place, left | finished, mask=is_place)
        tl.store(active_ptr + slot, done == 0)
        tl.store(commit_ptr + slot, goes_on)
        tl.store(start_ptr + slot, tl.where(goes_on, start + SIZE, start))
        tl.store(step_in_block_ptr + slot, tl.where(goes_on, 0, step + 1))
        tl.store(forwards_ptr + slot, forwards)
        if done:
            tl.store(result_num_forwards_ptr + row, forwards)
            tl.store(result_length_ptr + row, start + SIZE - prompt_length)
        tl.store(status_ptr + i * 4, tl.where(done, 2, 1))
        tl.store(status_ptr + i * 4 + 1, num_revealed)
        tl.store(status_ptr + i * 4 + 2, num_masked)
        tl.store(status_ptr + i * 4 + 3, tl.where(goes_on, 1, 0))


def reveal_and_advance_kernel(
    slots: Slots, plan: Plan, draws: Draws, constants: Constants, settings: SamplingSettings, results: Results, status: Tensor
) -> None:
    n, size, strategy = plan.num_items, plan.block_size, kernel_strategy(settings)
    given = None
    if strategy == GIVEN:
        given = UNMASKING.get(settings.strategy)(candidates(slots, plan, draws, constants), settings)
        assert given.shape == (n, size) and given.dtype == torch.bool
        given = given.contiguous()
    state = (
        *(slots.tokens, slots.masked, slots.active, slots.commit, slots.start, slots.step_in_block, slots.forwards),
        *(slots.prompt_length, slots.limit, slots.end, slots.result_row),
    )
    drawn = (draws.tokens, draws.logprobs, draws.entropy, draws.score, draws.score_entropy)
    written = (*(results.tokens, results.step_map, results.logprobs, results.entropy), results.num_forwards, results.length)
    assert all(x.is_contiguous() for x in (plan.order, plan.runs, plan.draw_of, *state, *drawn, *written, status))
    assert status.shape == (n, 4) and (DONE, EMPTY, RAN, STALLED) == (2, 0, 1, 3)
    reveal_kernel[(n,)](
        plan.order,
        plan.runs,
        plan.draw_of,
        *state,
        *drawn,
        given,
        constants.schedule,
        len(constants.schedule),
        constants.stop_ids,
        len(constants.stop_ids),
        float(settings.threshold),
        float(settings.entropy_bound),
        settings.mask_id,
        *written,
        results.tokens.stride(0),
        status,
        STRATEGY=strategy,
        SIZE=size,
        PLACES=triton.next_power_of_2(size),
        STOPS=triton.next_power_of_2(len(constants.stop_ids)),
        num_warps=1,
    )
