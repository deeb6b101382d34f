"""The one decoder: every family is this module with other facts. Engine and trainer run it on the same tensors.

Shapes: N tokens (sequences are packed, there is no batch dimension), D hidden, H query heads, G key/value heads, K head_dim,
F intermediate, V vocabulary.

The decoder does not know which token sees which: the caller passes `attend(layer, q, k, v)`. The trainer's computes attention
under a mask (models/attention.py); the engine's first writes k and v to its cache (sample/kv_cache.py).
"""

from __future__ import annotations

from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.family import DecoderConfig
from models.kernels.norms import rms_norm
from models.kernels.rotary import norm_rotate
from models.kernels.swiglu import silu_mul

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [N, H, K], k [N, G, K], v [N, G, K]) -> attention output [N, H, K]; q and k are normed and rotated."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32 inside, over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class HeadNorm(RMSNorm):
    """RMSNorm of every head, and its rotary position embedding: one kernel, in the module whose weight it is (ZeRO-3 gathers the
    weights of a module around its own forward)."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return norm_rotate(x, self.weight, self.eps, cos, sin)


class NoHeadNorm(nn.Module):
    """The rotary position embedding alone."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return norm_rotate(x, None, 0.0, cos, sin)


def rope_cos_sin(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, each [N, 1, K]; half-split (rotate-half) layout, computed in float32."""
    inverse = theta ** -(torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)  # [K/2]
    angles = positions.float()[:, None] * inverse  # [N, K/2]
    angles = torch.cat([angles, angles], dim=-1)[:, None]  # [N, 1, K]
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Attention(nn.Module):
    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.split = [c.num_heads, c.num_kv_heads, c.num_kv_heads]
        self.head_dim = c.head_dim
        self.qkv = nn.Linear(c.hidden_size, sum(self.split) * c.head_dim, bias=c.qkv_bias)
        self.out = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm, self.k_norm = (HeadNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else NoHeadNorm() for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).split(self.split, dim=1)
        q, k = self.q_norm(q, cos, sin), self.k_norm(k, cos, sin)
        return self.out(attend(layer, q, k, v).flatten(1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=False)
        self.down = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu_mul(self.gate_up(x)))


class Layer(nn.Module):
    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.attention = Attention(c)
        self.mlp_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, layer, attend)
        return x + self.mlp(self.mlp_norm(x))


class Head(nn.Module):
    """The vocabulary projection. A module of its own, so that sharded weights (ZeRO-3) are gathered around every use of them."""

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        weight = torch.empty(c.vocab_size, c.hidden_size)
        if not weight.is_meta:
            nn.init.normal_(weight, std=c.hidden_size**-0.5)
        self.weight = nn.Parameter(weight)

    def forward(self, hidden: Tensor, project: Callable[[Tensor, Tensor], object] = F.linear) -> object:
        """`project(hidden [M, D], weight [V, D])`: plain logits, or the trainer's chunked log-probs (train/logprobs.py)."""
        return project(hidden, self.weight)


class Decoder(nn.Module):
    """Embedding, layers, final norm, head. `forward` returns final-norm hidden states; `lm_head` turns rows of them into logits."""

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.config = c
        embedding = torch.empty(c.vocab_size, c.hidden_size)
        if not embedding.is_meta:  # drawing on the meta device would import torch._dynamo: a second at every start
            nn.init.normal_(embedding)
        self.embed = nn.Embedding.from_pretrained(embedding, freeze=False)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = Head(c)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.embed.weight
        self.recomputed_layers = 0
        """Of the layers the first so many keep their input alone, and the backward computes the rest of them anew (activation
        checkpointing). The first, for the backward comes to them when the others have given back what they kept: what one of them
        then has for its own backward finds that room empty. Were they the last, it would come on top of all that the first keep."""

    def forward(self, input_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """input_ids [N], positions [N] -> hidden states [N, D] after the final norm."""
        x = self.embed(input_ids)
        cos, sin = rope_cos_sin(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        for n, layer in enumerate(self.layers):
            if n < self.recomputed_layers and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, n, attend, use_reentrant=False)
            else:
                x = layer(x, cos, sin, n, attend)
        return self.norm(x)

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype
