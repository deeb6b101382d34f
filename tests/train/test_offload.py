"""Offloading empties storages and fills them again in place, views included; who is offloaded, and when."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from models.memory import free_host_memory
from train import offload
from train.offload import HostBuffer, HostCopy, RolloutOffload

CPU = torch.device("cpu")


class FlatOptimizer:
    """Holds one flat buffer that the weights are views of, and a list of further buffers, as DeepSpeed's do."""

    def __init__(self, flat, masters, inner):
        self.flat, self.groups, self.optimizer = flat, [{"masters": masters}], inner


def trained(device: torch.device = CPU) -> tuple[nn.Module, FlatOptimizer, torch.optim.Adam]:
    """A module whose weights are views of one flat buffer (-0.0 and NaN in it), behind one step of Adam."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(device)
    flat = torch.cat([p.detach().flatten() for p in module.parameters()])
    start = 0
    for p in module.parameters():
        p.data = flat[start : start + p.numel()].view_as(p)
        start += p.numel()
    inner = torch.optim.Adam(module.parameters())
    module(torch.randn(5, 4, device=device)).sum().backward()
    inner.step()
    masters = [p.detach().double() for p in module.parameters()]
    masters[0][0, :2] = torch.tensor([-0.0, float("nan")])
    return module, FlatOptimizer(flat, masters, inner), inner


def tensors(module, optimizer, inner) -> list[torch.Tensor]:
    moments = [s[key] for s in inner.state.values() for key in ("exp_avg", "exp_avg_sq")]
    return [optimizer.flat, *optimizer.groups[0]["masters"], *(p.grad for p in module.parameters()), *moments]


def bits(found: list[torch.Tensor]) -> list[list[int]]:
    return [t.detach().cpu().contiguous().view(torch.uint8).flatten().tolist() for t in found]


def size(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()


@pytest.mark.parametrize("chunk", [offload.CHUNK_BYTES, 64, 8])
def test_storages_are_reloaded_in_place_and_views_stay_views(monkeypatch, chunk):
    """Whatever the chunks of the host's buffer are: storages lie across their borders."""
    monkeypatch.setattr(offload, "CHUNK_BYTES", chunk)
    module, optimizer, inner = trained()
    everything = tensors(module, optimizer, inner)
    before, host_copy = bits(everything), HostCopy(CPU)
    assert host_copy.offload([module, optimizer], [])
    assert all(size(t) == 0 for t in everything)
    # Moments, gradients and Adam's counts of steps: float32; masters: float64; the flat buffer.
    assert host_copy.num_bytes == 4 * 23 * (1 + 3) + 8 * 23 + 4 * 4
    host_copy.reload()
    assert host_copy.num_bytes == 0 and bits(everything) == before
    optimizer.flat.add_(1)
    assert torch.equal(module[0].weight.flatten(), optimizer.flat[:12]), "a weight is no view of the flat buffer any more"
    inner.step()


def test_what_stays_can_be_computed_with():
    module, optimizer, inner = trained()
    x = torch.randn(3, 4)
    right, host_copy = module(x), HostCopy(CPU)
    assert host_copy.offload([module, optimizer], [p.data for p in module.parameters()])
    assert size(optimizer.flat) == 4 * 23 and all(size(p.grad) == 0 for p in module.parameters())
    assert all(size(s["exp_avg"]) == 0 for s in inner.state.values())
    assert torch.equal(module(x), right)
    host_copy.reload()
    inner.step()
    assert not torch.equal(module(x), right)


def test_zeros_and_scratch_take_no_place_on_the_host():
    zeros, negative, scratch, real = torch.zeros(1000), torch.full((10,), -0.0), torch.ones(1000), torch.ones(7)
    host_copy = HostCopy(CPU)
    host_copy.offload([[zeros, negative, real, scratch]], [], [scratch])
    assert host_copy.num_bytes == 4 * 2017 and sum(one.num_bytes for one in host_copy.moved if one.start is not None) == 4 * 17
    assert host_copy.host.num_bytes == 128  # 68, rounded up
    host_copy.reload()
    assert not zeros.any() and zeros.shape == (1000,) and len(scratch) == 1000 and size(scratch) == 4000
    assert torch.signbit(negative).all() and (real == 1).all()


def test_host_memory_is_taken_once():
    module, optimizer, inner = trained()
    host_copy, before = HostCopy(CPU), bits(tensors(module, optimizer, inner))
    addresses = []
    for _ in range(3):
        host_copy.offload([module, optimizer], [])
        addresses.append([chunk.data_ptr() for chunk in host_copy.host.chunks])
        host_copy.reload()
    assert addresses[0] == addresses[1] == addresses[2] and bits(tensors(module, optimizer, inner)) == before
    more = torch.arange(5000)  # states that a first step makes
    host_copy.offload([module, optimizer, [more]], [])
    host_copy.reload()
    assert torch.equal(more, torch.arange(5000)) and bits(tensors(module, optimizer, inner)) == before


def test_nothing_moves_where_the_host_is_full():
    things = [torch.ones(100), torch.zeros(1000)]
    host_copy = HostCopy(CPU)
    assert not host_copy.offload([things], [], new_host_bytes=399) and host_copy.num_bytes == 0 and size(things[0]) == 400
    assert host_copy.offload([things], [], new_host_bytes=400)
    host_copy.reload()
    assert host_copy.offload([things], [], new_host_bytes=0), "what it has already is its own"
    host_copy.reload()


def test_an_interrupt_leaves_nothing_lost(monkeypatch):
    """Between two storages, on the way out and on the way back."""
    module, optimizer, inner = trained()
    everything = tensors(module, optimizer, inner)
    before, host_copy = bits(everything), HostCopy(CPU)
    pairs, calls = HostCopy._pairs, []

    def interrupted(self, one):
        calls.append(one)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return pairs(self, one)

    monkeypatch.setattr(HostCopy, "_pairs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        host_copy.offload([module, optimizer], [])
    assert not host_copy.moved and bits(everything) == before
    assert host_copy.offload([module, optimizer], [])
    # As if the interrupt had come before the last one was emptied.
    last = host_copy.moved[-1]
    last.storage.resize_(last.num_bytes)
    for piece, copy in pairs(host_copy, last):
        piece.copy_(copy)
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        host_copy.reload()
    assert host_copy.moved
    host_copy.reload()
    assert not host_copy.moved and bits(everything) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory can be pinned here")
def test_memory_that_cannot_be_pinned_is_taken_as_it_is(capsys):
    host = HostBuffer(pinned=True)
    host.grow_to(100)
    host.grow_to(200)
    assert host.num_bytes == 256 and capsys.readouterr().err.count("could be pinned") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_emptied_and_filled():
    device = torch.device("cuda", torch.cuda.current_device())
    module, optimizer, inner = trained(device)
    large = torch.randn(300, 2**20, device=device)  # across the chunks of the host
    everything = [*tensors(module, optimizer, inner), large]
    before, right, host_copy = bits(everything[:-1]), large.sum(dtype=torch.float64), HostCopy(device)
    for _ in range(2):
        allocated = torch.cuda.memory_allocated()
        assert host_copy.offload([module, optimizer, [large]], [])
        assert all(chunk.is_pinned() for chunk in host_copy.host.chunks) and host_copy.host.num_bytes > 300 * 2**22
        assert torch.cuda.memory_allocated() <= allocated - 300 * 2**22
        host_copy.reload()
        assert bits(everything[:-1]) == before and large.sum(dtype=torch.float64) == right
    inner.step()


# ---- who is offloaded, and when


class FakeTrainer:
    """Of so many bytes, which are free on a pretended GPU while it is offloaded."""

    def __init__(self, gpu: dict[str, float], num_bytes: int, needs_host: float = 0) -> None:
        self.gpu, self.num_bytes, self.needs_host = gpu, num_bytes, needs_host
        self.host_copy, self.is_offloaded, self.keeps_weights = SimpleNamespace(num_bytes=0), False, None

    def offload(self, keeps_weights: bool, new_host_bytes: float) -> bool:
        if self.needs_host > new_host_bytes:
            return False
        self.is_offloaded, self.keeps_weights, self.host_copy.num_bytes = True, keeps_weights, self.num_bytes
        self.gpu["free"] += self.num_bytes
        return True

    def reload(self) -> None:
        if self.is_offloaded:
            self.gpu["free"] -= self.num_bytes
        self.is_offloaded, self.host_copy.num_bytes = False, 0


@pytest.fixture
def gpu(monkeypatch) -> dict[str, float]:
    """Bytes that are free of a pretended GPU and of its host."""
    memory = {"free": 100.0, "host": 1000.0}
    monkeypatch.setattr(offload, "free_memory", lambda device: memory["free"])
    monkeypatch.setattr(offload, "free_host_memory", lambda: memory["host"])
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return memory


def offloading(gpu, wanted: float, value="auto", policy="auto", **changes) -> tuple[RolloutOffload, FakeTrainer, FakeTrainer]:
    moving = RolloutOffload(lambda phase: nullcontext(), torch.device("cuda"))
    moving.wanted_bytes = wanted
    trainers = FakeTrainer(gpu, 50), FakeTrainer(gpu, 70, **changes)
    moving.add(trainers[0], value, keeps_weights=False)
    moving.add(trainers[1], policy, keeps_weights=True)
    return moving, *trainers


@pytest.mark.parametrize("wanted, who", [(100, (False, False)), (150, (True, False)), (151, (True, True)), (999, (True, True))])
def test_as_many_are_offloaded_as_the_engine_needs(gpu, wanted, who):
    """100 are free; the value model has 50, the policy 70."""
    moving, value, policy = offloading(gpu, wanted)
    for _ in range(2):  # several rounds of rollouts: nothing changes
        moving.offload()
        assert (value.is_offloaded, policy.is_offloaded) == who
        assert gpu["free"] == 100 + 50 * who[0] + 70 * who[1]
    assert (value.keeps_weights, policy.keeps_weights) == tuple({0: None}.get(went, kept) for went, kept in zip(who, (False, True)))
    moving.reload()
    moving.reload()
    assert gpu["free"] == 100 and not (value.is_offloaded or policy.is_offloaded)


def test_always_and_never(gpu):
    moving, value, policy = offloading(gpu, 10, "never", "always")
    moving.offload()
    assert not value.is_offloaded and policy.is_offloaded
    assert moving.take_metrics() == {"memory/offloaded_gib": 70 / 2**30}
    assert moving.take_metrics() == {"memory/offloaded_gib": 70 / 2**30}, "it is still offloaded"
    moving.reload()
    assert moving.take_metrics() != {} and moving.take_metrics() == {}


def test_a_full_host_is_left_alone(gpu, monkeypatch, capsys):
    """By `auto`; every rank of a machine has its part of four fifths of it, and the first one warns, once."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for local_rank, num_warnings in ((None, 1), ("0", 1), ("1", 0), ("3", 0)):
        if local_rank is not None:
            monkeypatch.setenv("LOCAL_RANK", local_rank)
        gpu["free"] = 100.0
        moving, value, policy = offloading(gpu, 999, needs_host=201)
        for _ in range(2):
            moving.offload()
        assert value.is_offloaded and not policy.is_offloaded
        assert capsys.readouterr().err.count("training.offload_optimizer=always") == num_warnings
    moving, _, policy = offloading(gpu, 999, needs_host=200)
    moving.offload()
    assert policy.is_offloaded
    moving, _, policy = offloading(gpu, 999, policy="always", needs_host=5000)
    moving.offload()
    assert policy.is_offloaded


def test_nothing_is_short_on_a_cpu():
    moving = RolloutOffload(lambda phase: nullcontext(), CPU)
    trainer = FakeTrainer({"free": 0}, 1)
    moving.add(trainer, "auto", keeps_weights=True)
    moving.wanted_bytes = 1e15
    moving.offload()
    assert not trainer.is_offloaded and moving.take_metrics() == {}


def test_free_memory_of_a_host_and_of_its_containers(tmp_path):
    assert free_host_memory(tmp_path) == float("inf")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  2000 kB\nMemAvailable:  1000 kB\nHugePages_Free: 0\n")
    assert free_host_memory(tmp_path) == 1000 * 1024
    (tmp_path / "proc/self").mkdir()
    (tmp_path / "proc/self/cgroup").write_text("1:cpu:/\n0::/\n")
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert free_host_memory(tmp_path) == 1000 * 1024
    (group / "memory.max").write_text("500000\n")
    (group / "memory.current").write_text("450000\n")
    (group / "memory.stat").write_text("anon 300000\ninactive_file 100000\n")
    assert free_host_memory(tmp_path) == 150_000
    (group / "memory.max").write_text("100000\n")
    assert free_host_memory(tmp_path) == 0


@pytest.mark.parametrize(
    "line, folder, limit, used, cache",
    [
        ("0::/jobs/7/task", "", "memory.max", "memory.current", "inactive_file"),
        ("4:memory:/jobs/7/task", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_free_memory_of_a_batch_job(tmp_path, line, folder, limit, used, cache):
    """Its limit is of a group in which ours is; the tightest counts. Inside a container neither may be there by that name."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"3:cpuset,cpu:/\n{line}\n")
    top = tmp_path / "sys/fs/cgroup" / folder
    top.mkdir(parents=True)
    (top / limit).write_text("9223372036854771712\n" if folder else "max\n")
    assert free_host_memory(tmp_path) >= 2**62
    job = top / "jobs/7"
    (job / "task").mkdir(parents=True)
    for group, most, now in ((job / "task", 900_000, 100_000), (job, 500_000, 450_000), (top / "jobs/8", 10, 10)):
        group.mkdir(exist_ok=True)
        (group / limit).write_text(f"{most}\n")
        (group / used).write_text(f"{now}\n")
    (job / "memory.stat").write_text(f"rss 300000\n{cache} 20000\n")
    assert free_host_memory(tmp_path) == 70_000
    (job / "task" / limit).write_text("160000\n")
    assert free_host_memory(tmp_path) == 60_000
