"""The whole step around a fake forward, with capacities that are too small, against the eager engine with the same logits."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from common.records import Rollout
from models.family import DecoderConfig
from models.logits import matmul_float32
from models.registry import FAMILIES
from sample.block import BlockEngine, whole_length
from sample.engine import Request, SamplingSettings, make_rollout
from sample.kernels.plan import make_plan
from sample.kernels.reveal import reveal_and_advance
from sample.kernels.sampler import draw_rows
from sample.pages import PAGE
from sample.slots import DONE, EMPTY, RAN, STALLED, Constants, Plan, Results, Slots, empty_status
from tests.sample.kernels.conftest import INTERPRET
from tests.sample.kernels.test_plan import on
from tests.sample.reference import MASK, STOPS, VOCAB_SIZE, random_requests

NUM_STATES = 97


class FakeDecoder:
    """Logits that depend on a row's position and on its whole block's tokens."""

    config = DecoderConfig(
        vocab_size=VOCAB_SIZE, hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, intermediate_size=8
    )
    dtype = torch.float32

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.weight = 1.5 * torch.randn(VOCAB_SIZE, NUM_STATES, generator=torch.Generator().manual_seed(3))
        self.weight[STOPS[0]] -= 0.5 * size.bit_length()  # or hardly a response would be longer than a block of 16
        self.weight = self.weight.to(device)

    def __call__(self, tokens: Tensor, positions: Tensor, attend: object = None) -> Tensor:
        blocks = tokens.view(-1, self.size).long() + 1
        weight = 7 ** torch.arange(self.size, device=tokens.device) % 1009
        state = (blocks * weight).sum(1).repeat_interleave(self.size) + 31 * positions.long()
        return torch.nn.functional.one_hot(state % NUM_STATES, NUM_STATES).float()

    def lm_head(self, hidden: Tensor, use) -> Tensor:
        return use(hidden, self.weight)


class Loop:
    """A minimal engine: admission to free slots, steps in random order with random capacities, pages by slot."""

    def __init__(self, requests: list[Request], settings: SamplingSettings, num_slots: int, device: torch.device) -> None:
        self.settings, self.device, self.size = settings, device, settings.block_size
        self.decoder = FakeDecoder(self.size, device)
        self.waiting = [(request, sample) for request in requests for sample in range(request.num_samples)]
        self.all = list(self.waiting)
        self.slots = Slots.empty(num_slots, self.size, device)
        longest = max(whole_length(request, sample, settings) for request, sample in self.all)
        self.results = Results.empty(len(self.all), longest, device)
        self.constants = Constants.of(settings, VOCAB_SIZE, device)
        max_pages = -(-longest // PAGE)
        pages = torch.randperm(num_slots * max_pages, generator=torch.Generator().manual_seed(0)) + 1
        self.block_table = pages.view(num_slots, max_pages).int().to(device)
        self.cache = torch.full(((len(pages.flatten()) + 1) * PAGE,), -1, dtype=torch.int32, device=device)
        self.occupant: dict[int, int] = {}  # row of the results, by slot
        self.start: dict[int, int] = {}
        self.random = random.Random(4)
        self.stalls = 0

    def entries(self, slot: int, positions: list[int]) -> list[int]:
        table = self.block_table[slot].tolist()
        return [table[p // PAGE] * PAGE + p % PAGE for p in positions]

    def admit(self) -> None:
        free = [slot for slot in range(self.slots.num_slots) if slot not in self.occupant]
        self.random.shuffle(free)
        chosen = free[: self.random.randint(0, len(free))] if self.occupant else free
        chosen = chosen[: len(self.waiting)]
        rows, sequences = [], []
        for slot in chosen:
            request, sample = self.waiting.pop(0)
            rows.append(self.all.index((request, sample)))
            sequences.append((request, sample))
            self.occupant[slot] = rows[-1]
            self.start[slot] = start = len(request.prompt_ids) // self.size * self.size
            self.cache[self.entries(slot, list(range(start)))] = torch.tensor(
                request.prompt_ids[:start], dtype=torch.int32, device=self.device
            )
        if chosen:
            self.slots.admit(chosen, sequences, rows, self.settings)

    def step(self) -> None:
        order = [*self.occupant, *[-1] * self.random.randint(0, 2)]
        idle = [slot for slot in range(self.slots.num_slots) if slot not in self.occupant]
        order += idle[:1]  # a slot that is done keeps its place for a step
        self.random.shuffle(order)
        n = len(order)
        c, h = self.random.randint(1, -(-n // 2)), self.random.randint(self.size, n * self.size)
        plan = Plan.empty(n, c, h, self.size, self.device)
        plan.order.copy_(torch.tensor(order, dtype=torch.int32))
        status = empty_status(n, self.device) + 9
        make_plan(self.slots, self.block_table, plan)
        hidden = self.decoder(plan.row_tokens, plan.positions)
        written = plan.entries >= 0
        self.cache[plan.entries[written].long()] = plan.row_tokens[written]
        self.check_cache(plan)
        logits = matmul_float32(hidden[plan.head_rows], self.decoder.weight.t())
        draws = draw_rows(logits, plan.row_keys, self.settings, self.constants.forbidden, plan.num_head)
        reveal_and_advance(self.slots, plan, draws, self.constants, self.settings, self.results, status)
        for slot, (state, _, num_masked, commit) in zip(order, status.tolist()):
            assert (state == EMPTY) == (slot not in self.occupant)
            self.stalls += state == STALLED
            if state == RAN:
                self.start[slot] += self.size * commit
                assert self.start[slot] == int(self.slots.start[slot]) and int(self.slots.masked[slot].sum()) == num_masked > 0
            if state == DONE:
                del self.occupant[slot], self.start[slot]

    def check_cache(self, plan: Plan) -> None:
        """Every item that runs finds the final tokens of all earlier positions."""
        for slot, runs, num_keys in zip(plan.order.tolist(), plan.runs.tolist(), plan.num_keys.tolist()):
            if runs:
                start, row = self.start[slot], self.occupant[slot]
                assert num_keys == start + self.size
                prompt = self.all[row][0].prompt_ids
                expected = prompt + self.results.tokens[row, : max(0, start - len(prompt))].tolist()
                assert self.cache[self.entries(slot, list(range(start)))].tolist() == expected[:start]

    def run(self) -> list[Rollout]:
        while self.waiting or self.occupant:
            self.admit()
            self.step()
        results, rollouts = on("cpu", self.results), []
        for row, (request, sample) in enumerate(self.all):
            length, forwards = int(results.length[row]), int(results.num_forwards[row])
            response = [x[row, :length] for x in (results.tokens, results.step_map, results.logprobs, results.entropy)]
            rollouts.append(make_rollout(request, sample, self.settings, *response, forwards, 0))
        return rollouts


STRATEGIES = ["low_confidence_static", "low_confidence_dynamic", "sequential", "entropy_bounded"]
TARGETS = {"confidence": 0.4, "margin_confidence": 0.2, "neg_entropy": -1.6, "random": 0.6}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_equals_the_eager_engine(size: int, strategy: str, any_device: torch.device) -> None:
    if INTERPRET and (size, strategy) not in [(1, "low_confidence_static"), (4, "low_confidence_dynamic")]:
        pytest.skip("the interpreter is slow; other tests compare every kernel with its reference")
    target = list(TARGETS)[(size.bit_length() + STRATEGIES.index(strategy)) % 4]
    settings = SamplingSettings(
        max_tokens=19 if size < 16 else 37,
        mask_id=MASK,
        stop_ids=STOPS,
        forbidden_ids=(MASK, 22),
        seed=2,
        block_size=size,
        strategy=strategy,
        target=target,
        threshold=TARGETS[target],
        entropy_bound=1.0,
        steps_per_block=max(1, size // 2),
        temperature=[0.7, 0.0, 1.0][size.bit_length() % 3],
        top_k=7 if size == 8 else 0,
    )
    requests = random_requests([3, 61, 0, size, 2 * size + 1], num_samples=1 if INTERPRET else 2)[: 3 if INTERPRET else None]
    requests[1] = dataclasses.replace(requests[1], max_tokens=(2, 5)[: requests[1].num_samples])
    family = SimpleNamespace(name="fake", logit_shift=FAMILIES.get("sdar").logit_shift)
    expected = BlockEngine(FakeDecoder(size, torch.device("cpu")), family, max_active=3).generate(requests, settings)
    loop = Loop(requests, settings, 5, any_device)
    for ours, theirs in zip(loop.run(), expected, strict=True):
        for name in ["logprobs", "entropy"]:
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=1e-5), name
            setattr(ours, name, getattr(theirs, name))
        assert ours == theirs
    if INTERPRET:
        return  # too few requests for all of what follows
    assert loop.stalls > 0 and {rollout.finish for rollout in expected} == {"stop", "length"}
