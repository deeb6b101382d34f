"""Recomputed layers: the same gradient, bit for bit, from less that is kept."""

from __future__ import annotations

from typing import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from models.attention import masked_attention
from models.decoder import Decoder
from models.lora import LoRA, LoRALinear, attach
from models.lora_targets import resolve_targets
from models.registry import FAMILIES
from models.tiny import build_tiny
from train import memory_items

SDAR = FAMILIES.get("sdar")
NUM_LAYERS = 4


@pytest.mark.parametrize("dropout", [None, 0.3])
def test_gradients_are_bit_for_bit_those_of_kept_activations(dropout):
    """dropout: of an adapter; its draws have to come back with the recomputation."""
    decoder = build_tiny(SDAR, dtype=torch.float32, num_layers=NUM_LAYERS).decoder
    if dropout is not None:
        targets = resolve_targets(SDAR, ["all-linear"])
        attach(decoder, SDAR, LoRA("base", rank=2, alpha=2, targets=targets))
        for module in decoder.modules():
            if isinstance(module, LoRALinear):
                module.dropout = dropout
        for parameter in decoder.parameters():
            if parameter.requires_grad:  # zeros else
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    ids = torch.randint(0, decoder.config.vocab_size, (24,), generator=torch.Generator().manual_seed(1))
    attend = masked_attention(torch.ones(24, 24, dtype=torch.bool).tril(3))
    forwards = count_forwards(decoder)

    def gradients(recomputed_layers: int) -> dict[str, Tensor]:
        decoder.recomputed_layers = recomputed_layers
        decoder.zero_grad()
        torch.manual_seed(2)
        logits = decoder.lm_head(decoder(ids, torch.arange(24), attend))
        logits.log_softmax(-1).square().mean().backward()
        return {name: parameter.grad for name, parameter in decoder.named_parameters() if parameter.grad is not None}

    kept = gradients(0)
    assert all(gradient.abs().max() > 0 for gradient in kept.values())
    for number in range(1, NUM_LAYERS + 1):
        forwards.clear()
        recomputed = gradients(number)
        # The others ran once.
        assert sorted(forwards) == sorted([*range(NUM_LAYERS), *range(number)])
        assert kept.keys() == recomputed.keys()
        assert all(torch.equal(kept[name], recomputed[name]) for name in kept), number


def count_forwards(decoder: Decoder) -> list[int]:
    """Grows by the number of a layer at every forward of it."""
    forwards: list[int] = []
    for index, layer in enumerate(decoder.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: forwards.append(index))
    return forwards


def test_without_a_gradient_nothing_is_recomputed():
    decoder = build_tiny(SDAR).decoder
    decoder.recomputed_layers = 2
    forwards = count_forwards(decoder)
    with torch.no_grad():
        decoder(torch.arange(8), torch.arange(8), masked_attention(torch.ones(8, 8, dtype=torch.bool)))
    assert forwards == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_that_every_recomputed_layer_saves(dtype):
    """What a CPU's allocator counts, against train/memory_items.py: the forward keeps less by a layer's share for its input, to the
    byte, and the backward has no more on top, the first layers being those: one is computed anew when all that the others kept is
    free again. Attention is a stand-in that keeps what a fused one does, without the log of the softmax's sum."""
    decoder = build_tiny(SDAR, dtype=dtype, num_layers=NUM_LAYERS, intermediate_size=160).decoder
    c, n = decoder.config, 512
    ids, positions = torch.randint(0, c.vocab_size, (n,)), torch.arange(n)
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    hidden = dtype.itemsize * c.hidden_size
    kept = memory_items.kept_per_token(c, dtype.itemsize) - 4 * c.num_heads
    # Not in that number: a norm's float32 per row or head. A recomputed layer also holds the state of the random numbers.
    saved = n * (kept - hidden + 4 * (2 + c.num_heads + c.num_kv_heads)) - torch.get_rng_state().numel()
    held, most = [], []
    for number in range(NUM_LAYERS + 1):
        decoder.recomputed_layers = number

        def forward() -> Tensor:
            return decoder(ids, positions, lambda layer, q, k, v: Fused.apply(q, k, v))

        held.append(allocated(forward)[0])
        most.append(allocated(lambda: forward().sum().backward())[1])
    assert [a - b for a, b in zip(held, held[1:])] == [saved] * NUM_LAYERS
    # As much less at the fullest moment, the last layer's backward, until that layer is itself computed anew there.
    assert [a - b for a, b in zip(most[:-1], most[1:-1])] == [saved] * (NUM_LAYERS - 1)
    assert most[-1] > most[-2] - saved


class Fused(torch.autograd.Function):
    """In the place of attention: keeps what a fused one does."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.zeros_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, gradient):
        _, k, v, _ = ctx.saved_tensors
        return gradient.clone(), torch.zeros_like(k), torch.zeros_like(v)


def allocated(run: Callable[[], object]) -> tuple[int, int]:
    """(bytes that the result of `run` holds, the most that was allocated in between) on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    del result
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return now, most
