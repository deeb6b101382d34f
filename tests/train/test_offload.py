"""Offloading empties storages and fills them again in place, views included."""

from __future__ import annotations

import torch
from torch import nn

from train.offload import Offloaded


class FlatOptimizer:
    """Holds one flat buffer that the weights are views of, and a list of further buffers, as DeepSpeed's do."""

    def __init__(self, flat, masters, inner):
        self.flat, self.groups, self.optimizer = flat, [{"masters": masters}], inner


def test_storages_come_back_in_place_and_views_stay_views():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    flat = torch.cat([p.detach().flatten() for p in module.parameters()])
    start = 0
    for p in module.parameters():
        p.data = flat[start : start + p.numel()].view_as(p)
        start += p.numel()
    inner = torch.optim.Adam(module.parameters())
    module(torch.randn(5, 4)).sum().backward()
    inner.step()
    masters = [p.detach().double() for p in module.parameters()]
    optimizer = FlatOptimizer(flat, masters, inner)
    kept = [
        t.clone() for t in (flat, *masters, *(p.grad for p in module.parameters()), *(s["exp_avg"] for s in inner.state.values()))
    ]

    offloaded = Offloaded([module, optimizer], device_type="cpu")
    assert flat.untyped_storage().nbytes() == 0 and masters[0].untyped_storage().nbytes() == 0
    assert all(s["exp_avg_sq"].untyped_storage().nbytes() == 0 for s in inner.state.values())
    assert offloaded.num_bytes >= sum(t.nbytes for t in kept)
    offloaded.restore()

    again = [flat, *masters, *(p.grad for p in module.parameters()), *(s["exp_avg"] for s in inner.state.values())]
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    flat.add_(1)
    assert torch.equal(module[0].weight.flatten(), flat[:12]), "a weight is no view of the flat buffer any more"
    inner.step()
