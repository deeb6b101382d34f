"""One optimizer step is the same step in one process and in two, under DDP and ZeRO, however it is cut into micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import probe
from tests.distributed.harness import run_on_ranks

TOLERANCE = 1e-6  # of the tensor's largest entry, float32
MODES: dict[str, dict[str, Any]] = {
    "ddp": {"deepspeed_file": None},
    "zero1": {"deepspeed_file": "1_node_2_gpus_deepspeed_zero1"},
    "zero2": {"deepspeed_file": "1_node_2_gpus_deepspeed_zero2"},
    "zero3": {"deepspeed_file": "1_node_2_gpus_deepspeed_zero3"},
    "zero2, optimizer offloaded": {"deepspeed_file": "1_node_2_gpus_deepspeed_zero2_offload"},
    "zero2, not clipped": {"deepspeed_file": "1_node_2_gpus_deepspeed_zero2", "max_grad_norm": None},
}
BFLOAT16 = {
    name: {"deepspeed_file": f"1_node_2_gpus_deepspeed_{name}", "dtype": "bfloat16"}
    for name in ("zero1", "zero2", "zero3", "zero2_offload")
}


def by_hand(max_grad_norm: float | None = probe.MAX_GRAD_NORM, dtype: torch.dtype = torch.float64) -> list[dict[str, Any]]:
    """The steps in plain torch: all micro-batches of all ranks in one sum, the norm and the SGD step written out."""
    net = probe.make_net().to(dtype)
    records = []
    for of_ranks, learning_rate in zip(probe.make_steps(2), probe.LEARNING_RATES, strict=True):
        micro_batches = [m for own in of_ranks for m in own]
        loss = sum((net(m["ids"], m["targets"]).double().sum() * m["scale"] for m in micro_batches), start=torch.zeros(()))
        names, parameters = zip(*net.named_parameters(), strict=True)
        gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        norm = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
        # torch and DeepSpeed both add 1e-6 to the norm that they divide by.
        factor = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6))
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter -= learning_rate * factor * gradients[name]
        weights = {name: value.detach().clone() for name, value in net.named_parameters()}
        records.append({"gradients": gradients, "norm": norm, "weights": weights})
    return records


@pytest.fixture(scope="module")
def of_two_ranks() -> list[dict[str, Any]]:
    bfloat16 = {f"{name}, bfloat16": arguments for name, arguments in BFLOAT16.items()}
    return run_on_ranks("tests.distributed.probe:run_modes", 2, {"modes": MODES | bfloat16})


def check(records: list[dict[str, Any]], expected: list[dict[str, Any]], weights_too: bool = True) -> None:
    for step, (record, right) in enumerate(zip(records, expected, strict=True)):
        assert not record["moved_early"], f"step {step}: the weights moved before the last micro-batch was in"
        assert record["num_steps"] == step + 1, "the optimizer did not step exactly once per group of micro-batches"
        assert record["norm"] == pytest.approx(right["norm"], rel=1e-5)
        assert record["gradients"].keys() == right["gradients"].keys()
        for kind in ("gradients", "weights") if weights_too else ("gradients",):
            for name, value in right[kind].items():
                error = float((record[kind][name].double() - value).abs().max() / value.abs().max())
                assert error < TOLERANCE, f"step {step}, {kind} of {name}: {error:.1e} of the largest entry"


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_equal_one_process(of_two_ranks, mode):
    expected = by_hand(MODES[mode].get("max_grad_norm", probe.MAX_GRAD_NORM))
    assert expected[0]["norm"] > probe.MAX_GRAD_NORM, "clipping is not tested"
    for rank, result in enumerate(of_two_ranks):
        records = result[mode]
        assert [record["num_processes"] for record in records] == [2, 2, 2]
        check(records, expected, weights_too=bool(records[0]["weights"]) or rank == 0)
        assert [r["norm"] for r in records] == [r["norm"] for r in of_two_ranks[0][mode]], "ranks disagree on the gradient norm"


def test_one_process_equals_one_sum(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    check(probe.run_mode(None), by_hand())
    probe.forget_accelerator()


@pytest.mark.parametrize(
    "job, modes, variables",
    [
        ("run_modes", ("zero1", "zero3"), {}),
        ("alone_in_an_operators_environment", ("ddp", "zero1"), {}),
        ("alone_in_an_operators_environment", ("ddp",), {"rank": "", "size": ""}),
        ("alone_in_an_operators_environment", ("zero1",), {"rank": "", "size": ""}),
    ],
)
def test_without_a_launcher(job, modes, variables):
    (result,) = run_on_ranks(f"tests.distributed.probe:{job}", 1, {"modes": {m: MODES[m] for m in modes}, **variables})
    for records in result.values():
        assert records[0]["num_processes"] == 1
        check(records, by_hand())


@pytest.mark.parametrize("mode", BFLOAT16)
def test_bfloat16_weights_step_as_float32_ones(of_two_ranks, mode):
    """Norms within bfloat16's 3 digits of those by hand."""
    for result in of_two_ranks:
        for step, (record, right) in enumerate(zip(result[f"{mode}, bfloat16"], by_hand(), strict=True)):
            assert not record["moved_early"] and record["num_steps"] == step + 1
            assert record["norm"] == pytest.approx(right["norm"], rel=0.03)
            for name, value in right["gradients"].items():
                assert float((record["gradients"][name].double() - value).abs().max() / value.abs().max()) < 0.1, name


STAGES = {f"zero{stage}": {"deepspeed_file": f"1_node_2_gpus_deepspeed_zero{stage}"} for stage in (1, 2, 3)}
IN_FLOAT32 = {name: {**arguments, "in_float32": True} for name, arguments in STAGES.items()}


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([t.flatten() for t in tensors.values()]).norm())


@pytest.fixture(scope="module")
def summed() -> dict[str, torch.Tensor]:
    """The bfloat16 gradients of all micro-batches, one by one, added up in float64."""
    net = probe.make_net().to(torch.bfloat16)
    names, parameters = zip(*net.named_parameters(), strict=True)
    total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in net.named_parameters()}
    for m in probe.many_micro_batches():
        for name, gradient in zip(names, torch.autograd.grad(net(m["ids"], m["targets"]).sum(), parameters), strict=True):
            total[name] += gradient.double()
    return total


@pytest.fixture(scope="module")
def sums_of_ranks() -> dict[int, list[dict[str, Any]]]:
    """By number of processes."""
    modes = {**STAGES, **{f"{name} in float32": arguments for name, arguments in IN_FLOAT32.items()}}
    return {n: run_on_ranks("tests.distributed.probe:master_changes", n, {"modes": STAGES if n == 1 else modes}) for n in (1, 2)}


@pytest.mark.parametrize("num_ranks, in_float32", [(1, False), (2, True), (2, False)])
@pytest.mark.parametrize("stage", STAGES)
def test_many_bfloat16_gradients_add_up_in_float32(summed, sums_of_ranks, stage, num_ranks, in_float32):
    """128 micro-batches. Where nothing is sent, or float32 is, what is left is the rounding of the masters themselves."""
    mode = f"{stage} in float32" if in_float32 else stage
    for result in sums_of_ranks[num_ranks]:
        gaps = {name: value.double() - summed[name] for name, value in result[mode].items()}
        gap = norm(gaps) / norm(summed)
        of_largest = max(float(g.abs().max() / summed[name].abs().max()) for name, g in gaps.items())
        print(f"{mode}, {num_ranks} processes: {gap:.1e} of the gradient's norm, {of_largest:.1e} of a tensor's largest entry")
        assert result[mode].keys() == summed.keys()
        is_exact = in_float32 or num_ranks == 1
        assert gap < (1e-6 if is_exact else 3e-3) and of_largest < (1e-6 if is_exact else 5e-3)


def test_ranks_talk():
    first, second = run_on_ranks("tests.distributed.probe:talk", 2)
    assert first["gathered"] == second["gathered"] == [{"rank": 0, "text": "x" * 10}, {"rank": 1, "text": "x" * 1010}]
    assert first["broadcast"] == second["broadcast"] == "from 0"
    assert second["first"] - first["first"] > 0.19, "rank 1 did not wait for rank 0"
    assert first["slowest"] == second["slowest"] == second["own"]
    inner, outer, elapsed = first["nested"]  # of a phase in another: each second is counted once
    assert inner >= 0.2 and outer >= 0.05 and inner + outer <= elapsed


def test_the_file_of_accelerates_launcher_wins():
    arguments = {"config_file": "1_node_2_gpus_deepspeed_zero2"}
    (found,) = run_on_ranks("tests.distributed.probe:sharding_under_accelerate", 1, arguments)
    assert found == (3, "cpu", "cpu")
