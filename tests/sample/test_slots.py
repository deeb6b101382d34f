"""Admission to slots by hand; the kernels' tests are in tests/sample/kernels."""

from __future__ import annotations

import pytest
import torch

from sample import noise
from sample.engine import Request, SamplingSettings
from sample.kernels.plan import make_plan
from sample.kernels.reveal import reveal_and_advance
from sample.kernels.sampler import draw_rows
from sample.slots import Constants, Plan, Results, Slots, empty_status
from tests.sample.kernels.test_plan import on

SETTINGS = SamplingSettings(max_tokens=7, mask_id=9, stop_ids=(3,), forbidden_ids=(9, 8), block_size=4, seed=5, steps_per_block=3)
REQUESTS = [Request("a", [1, 2, 3, 4, 5, 6], 2, max_tokens=(7, 1)), Request("b", [], 1), Request("c", [7, 7, 7, 7])]


def test_admission_starts_where_the_prompt_ends() -> None:
    slots = Slots.empty(5, 4, "cpu")
    slots.commit.fill_(True)  # left by those who were there before
    slots.forwards.fill_(3)
    slots.step_in_block.fill_(2)
    a, b, c = REQUESTS
    slots.admit([4, 0, 2, 1], [(a, 1), (b, 0), (c, 0), (a, 0)], [6, 7, 8, 9], SETTINGS)
    assert slots.active.tolist() == [True, True, True, False, True]
    there = [4, 0, 2, 1]
    assert slots.tokens[there, 1].tolist() == [[5, 6, 9, 9], [9] * 4, [9] * 4, [5, 6, 9, 9]]
    assert slots.masked[there].int().tolist() == [[0, 0, 1, 1], [1] * 4, [1] * 4, [0, 0, 1, 1]]
    assert slots.start[there].tolist() == [4, 0, 4, 4]
    assert slots.prompt_length[there].tolist() == [6, 0, 4, 6]
    assert slots.limit[there].tolist() == [7, 7, 11, 13]
    assert slots.end[there].tolist() == [8, 8, 12, 16]
    assert slots.result_row[there].tolist() == [6, 7, 8, 9]
    assert slots.commit.tolist() == [False, False, False, True, False]
    assert slots.forwards.tolist() == [0, 0, 0, 3, 0]
    assert slots.step_in_block.tolist() == [0, 0, 0, 2, 0]
    keys = [noise.sequence_key(5, *who) for who in [("a", 1), ("b", 0), ("c", 0), ("a", 0)]]
    assert slots.key[there].tolist() == [list(key) for key in keys]


def test_constants() -> None:
    constants = Constants.of(SETTINGS, 12, "cpu")
    assert constants.schedule.tolist() == [2, 1, 1] and constants.stop_ids.tolist() == [3]
    assert constants.forbidden.nonzero()[:, 0].tolist() == [8, 9]
    assert Constants.of(SamplingSettings(max_tokens=1, mask_id=0), 3, "cpu").stop_ids.tolist() == [-1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("changes", [dict(), dict(strategy="entropy_bounded", target="random"), dict(top_k=4, top_p=0.9)])
def test_a_step_is_captured_and_never_waits_for_the_gpu(changes: dict) -> None:
    """Admission and steps without one synchronisation; the steps replayed from a graph give the same as called one by one."""
    settings = SamplingSettings(max_tokens=40, mask_id=9, stop_ids=(3,), forbidden_ids=(9, 8), **changes)
    device, outcomes = torch.device("cuda"), []
    table = torch.arange(4, dtype=torch.int32, device=device)[:, None] + 1
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(0)).to(device)
    constants = Constants.of(settings, 50, device)
    for capture in [False, True]:
        slots, results = Slots.empty(4, 4, device), Results.empty(4, 48, device)
        plan, status = Plan.empty(4, 2, 16, 4, device), empty_status(4, device)
        order = torch.arange(4, dtype=torch.int32, device=device)

        def step(slots=slots, results=results, plan=plan, status=status) -> None:
            make_plan(slots, table, plan)
            draws = draw_rows(logits.clone(), plan.row_keys, settings, constants.forbidden, plan.num_head)
            reveal_and_advance(slots, plan, draws, constants, settings, results, status)

        step()  # compiles, with nobody there
        graph = torch.cuda.CUDAGraph()
        if capture:
            with torch.cuda.graph(graph):
                step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            slots.admit([2, 0, 1, 3], [(REQUESTS[0], 0), (REQUESTS[1], 0), (REQUESTS[2], 0), (REQUESTS[0], 1)], range(4), settings)
            plan.order.copy_(order)
            for _ in range(100):
                graph.replay() if capture else step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        outcomes.append(on("cpu", results))
    assert (outcomes[0].length > 0).all() and outcomes[0].step_map.max() > 4
    for name in ["tokens", "step_map", "logprobs", "entropy", "num_forwards", "length"]:
        assert torch.equal(getattr(outcomes[0], name), getattr(outcomes[1], name)), name
