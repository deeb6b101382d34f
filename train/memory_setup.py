"""What decides the memory of a training job: a model's shape, of how many parameters it is, and a few settings. Without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from models.family import DecoderConfig


def layer_parameters(c: DecoderConfig) -> int:
    heads = c.num_heads + 2 * c.num_kv_heads
    attention = c.hidden_size * c.head_dim * (heads + c.num_heads) + (heads * c.head_dim if c.qkv_bias else 0)
    norms = 2 * c.hidden_size + (2 * c.head_dim if c.qk_norm else 0)
    return attention + 3 * c.hidden_size * c.intermediate_size + norms


def vocabulary_parameters(c: DecoderConfig) -> int:
    """Of the embedding; the head has as many, unless it is the same."""
    return c.vocab_size * c.hidden_size


def num_parameters(c: DecoderConfig, has_head: bool = True) -> int:
    vocabularies = 2 if has_head and not c.tie_word_embeddings else 1
    return c.num_layers * layer_parameters(c) + vocabularies * vocabulary_parameters(c) + c.hidden_size


def adapter_parameters(family: Any, c: DecoderConfig, rank: int, targets: list[str]) -> int:
    """Of a LoRA adapter of that rank beside `targets` (`training.lora.target_modules`)."""
    from models.lora_targets import resolve_targets, target_pieces

    pieces = target_pieces(family, c, resolve_targets(family, targets))
    return sum(rank * (input_width(c, piece.parameter) + piece.rows) for piece in pieces)


def input_width(c: DecoderConfig, weight: str) -> int:
    """Of a (fused) linear layer, by the end of its weight's name in the decoder."""
    widths = {"attention.out.weight": c.num_heads * c.head_dim, "mlp.down.weight": c.intermediate_size}
    return next((size for name, size in widths.items() if weight.endswith(name)), c.hidden_size)


def adapted_weights(family: Any, targets: list[str]) -> tuple[str, ...]:
    """The (fused) linear layers of a decoder's layer that have an adapter beside `targets`, by the end of their weights' names."""
    from models.family import SMALLEST
    from models.lora_targets import LINEAR_WEIGHTS, resolve_targets, target_pieces

    pieces = target_pieces(family, SMALLEST, resolve_targets(family, targets))
    return tuple(name for name in LINEAR_WEIGHTS if any(piece.parameter.endswith(name) for piece in pieces))


@dataclass(frozen=True)
class Setup:
    """All that decides the memory of a job."""

    shape: DecoderConfig
    itemsize: int
    """Bytes of a weight."""
    gpus: int
    """All of the job's."""
    zero: int
    """ZeRO stage; 0: no DeepSpeed."""
    offload_optimizer: bool = False
    """By DeepSpeed (`_offload` files): masters and moments are on the host for good, and the update computes there."""
    offload_weights: bool = False
    """By DeepSpeed's ZeRO-3: the trainer's weights are on the host for good."""
    reduces_in_float32: bool = False
    """`training.reduce_in_float32`."""
    adapter: int = 0
    """Parameters of the LoRA adapter; 0: all weights train."""
    adapted: tuple[str, ...] = ()
    """Linear layers that have adapters (`adapted_weights`)."""
    drops: bool = False
    """`training.lora.dropout`: something is dropped before the adapters."""
    moments: int = 2
    """Float32 states of the optimizer per trained parameter: 2 (AdamW) or 0 (SGD)."""
    tokens: int = 16_384
    """Of the largest pack."""
    longest: int = 2784
    """Tokens of the longest part of a document that is not cut further, whatever `training.max_tokens_per_microbatch`."""
    predictions: int = 8_192
    """Of the largest pack."""
    head_chunk: int = 2048
    recomputed_layers: int | None = None
    """Whose activations are recomputed in the backward, the first so many (models/decoder.py); None: all."""
    fused: bool = False
    """`training.fused_kernels`."""
    accumulates: bool = True
    """Several micro-batches are summed up to one gradient. Without DeepSpeed a single one has its gradient behind the peak only."""
    value: DecoderConfig | None = None
    """Of a value model."""
    value_offloaded_in_rollout: bool = False
    """It is on the host while the engine samples (train/offload.py, `model.value_offload`), and on the GPU in the update."""
    optimizer_offloaded_in_rollout: bool = False
    """So are the policy's optimizer states and gradients (`training.offload_optimizer`); under ZeRO-3 its weights, too."""
    has_reference: bool = False
    reference_offloaded_in_rollout: bool = False
    """So is the frozen reference."""
    samples: bool = True
    """An engine samples: the rollout, evaluations."""
    attention: str = "block"
    prompt: int = 784
    response: int = 2000
    """The longest that is sampled, in the rollout or in an evaluation."""
    block_size: int = 4
    """The largest that is sampled in."""
    max_active: int = 256
    caches: bool = True

    def __post_init__(self) -> None:
        assert bool(self.adapter) == bool(self.adapted)

    @property
    def num_trained(self) -> int:
        return self.adapter or num_parameters(self.shape)

    @property
    def num_recomputed(self) -> int:
        return self.recomputed_of(self.shape.num_layers)

    def recomputed_of(self, num_layers: int) -> int:
        """Layers that a model of that depth recomputes: of no more than the policy it keeps the activations."""
        recomputed = self.shape.num_layers if self.recomputed_layers is None else self.recomputed_layers
        return max(0, num_layers - (self.shape.num_layers - recomputed))
