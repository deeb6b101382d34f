"""The kernel that ends a step against its reference, on random states; test_step_loop.py has both against the eager engine."""

from __future__ import annotations

import pytest
import torch

from sample.engine import SamplingSettings
from sample.kernels.plan import make_plan_reference
from sample.kernels.reveal import GIVEN, kernel_strategy, reveal_and_advance, reveal_and_advance_reference
from sample.registry import UNMASKING
from sample.sampling import Draws
from sample.slots import DONE, EMPTY, RAN, STALLED, Constants, Plan, Results, empty_status
from tests.sample.kernels.test_plan import assert_equal, on, random_order, random_slots

STRATEGIES = ["low_confidence_static", "low_confidence_dynamic", "sequential", "entropy_bounded"]


def random_draws(h: int, seed: int) -> Draws:
    """Of few values, so that many tie; log-probs that no two rows share."""
    g = torch.Generator().manual_seed(seed)
    few = lambda: torch.randint(0, 5, (h,), generator=g) / 4  # noqa: E731
    return Draws(torch.randint(0, 9, (h,), generator=g), -torch.rand(h, generator=g), torch.rand(h, generator=g), few(), few())


def compare(slots, table, plan, draws, settings, device, seen: set) -> None:
    make_plan_reference(slots, table, plan)
    results = Results.empty(slots.num_slots, int((slots.end - slots.prompt_length).max()), "cpu")
    results.tokens.fill_(-7)
    constants = Constants.of(settings, 10, "cpu")
    ours = [on(device, state) for state in (slots, plan, draws, constants, results)]
    ours_status, status = (empty_status(plan.num_items, at) + 9 for at in (device, "cpu"))
    reveal_and_advance(*ours[:4], settings, ours[4], ours_status)
    reveal_and_advance_reference(slots, plan, draws, constants, settings, results, status)
    assert_equal(ours[0], slots)
    assert_equal(ours[4], results)
    assert torch.equal(ours_status.cpu(), status)
    seen.update((state, commit) for state, _, _, commit in status.tolist())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 16])
def test_kernel_equals_reference(size: int, strategy: str, device: torch.device) -> None:
    seen: set[tuple[int, int]] = set()
    for seed in range(2):
        num_slots, n = [(9, 9), (12, 13)][seed] if device.type == "cpu" else [(100, 120), (300, 300)][seed]
        settings = SamplingSettings(
            max_tokens=1,
            mask_id=5,
            stop_ids=[(), (3,), (1, 3, 8)][(seed + size) % 3],
            block_size=size,
            strategy=strategy,
            threshold=0.6,
            entropy_bound=0.5,
            steps_per_block=[size, max(1, size // 2)][seed],
        )
        slots, table = random_slots(num_slots, size, seed)
        slots.masked[::2] = torch.arange(size) == size // 2  # one is left of every second block
        slots.end[::4] = slots.start[::4] + size
        order = random_order(n, num_slots, seed)
        needed = int((slots.masked & slots.active[:, None])[order[order >= 0].long()].sum())
        plan = Plan.empty(n, *[(n, n * size), (n // 2, needed // 2)][seed], size, "cpu")
        plan.order.copy_(order)
        compare(slots, table, plan, random_draws(len(plan.head_rows), seed), settings, device, seen)
    assert {(EMPTY, 0), (STALLED, 0)} <= seen and {(RAN, 1), (DONE, 0)} & seen


def test_a_strategy_of_a_plugin(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    last = lambda c, s: c.masked & (c.masked.flip(1).cumsum(1).flip(1) <= c.count[:, None])  # noqa: E731
    monkeypatch.setattr(UNMASKING, "_entries", dict(UNMASKING._entries) | {"last": last})
    settings = SamplingSettings(max_tokens=1, mask_id=5, strategy="last")
    assert kernel_strategy(settings) == GIVEN
    slots, table = random_slots(9, 4, 1)
    plan = Plan.empty(9, 9, 36, 4, "cpu")
    plan.order.copy_(random_order(9, 9, 1))
    seen: set[tuple[int, int]] = set()
    compare(slots, table, plan, random_draws(36, 0), settings, device, seen)
    assert (RAN, 0) in seen


def test_scores_that_are_not_numbers_do_not_stop_a_sequence(device: torch.device) -> None:
    """Whatever a diverged model scores, every step reveals something: its log-probs tell in the end."""
    for strategy in STRATEGIES:
        settings = SamplingSettings(max_tokens=1, mask_id=5, strategy=strategy)
        slots, table = random_slots(6, 4, 2)
        plan = Plan.empty(6, 6, 24, 4, "cpu")
        plan.order.copy_(torch.arange(6))
        make_plan_reference(slots, table, plan)
        nan = torch.full((24,), torch.nan)
        draws = Draws(torch.zeros(24, dtype=torch.int32), nan, nan, nan, nan)
        status, results = empty_status(6, device), Results.empty(6, 600, device)
        state, constants = [on(device, x) for x in (slots, plan, draws)], Constants.of(settings, 10, device)
        reveal_and_advance(*state, constants, settings, results, status)
        assert (status[:, 1].cpu() > 0).tolist() == plan.runs.tolist() and plan.runs.any()
