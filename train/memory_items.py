"""What the memory of a GPU goes to in a training job: arithmetic over the model's shape and a few settings.

A job has moments that can be the fullest:

    sampling   what stays, and the engine's cache and workspace
    head       backward of the vocabulary's chunks, with all that the layers have kept
    layers     backward of the last layer (most is kept) or of the first one (most gradients are there)
    step       the optimizer's own temporary

What DeepSpeed keeps, per trained parameter on W GPUs, bfloat16 weights (common/dist.py asks for float32 accumulation):

    ZeRO   weights   gradients                             masters and moments (AdamW)
    1      2         4 (float32 sum), and 2 in a backward  12/W
    2      2         4/W, and a bucket in a backward       12/W
    3      2/W       4/W, and a bucket                     12/W; beside it what is gathered

With the optimizer on the host its 12/W go there (the sum of ZeRO-2 stays). Without DeepSpeed (float32): 4, 4 and 8.

Nothing here imports torch. What is said of an estimate: train/memory_estimate.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from models.family import DecoderConfig

GIB = 2**30
BUCKET = 5e8
"""Elements of DeepSpeed's gradient bucket, and most parameters that its ZeRO-3 holds gathered at a time is twice that (its
defaults; accelerate changes neither)."""
GATHERED = 1e9
OUTSIDE_TORCH = 0.7 * GIB
"""CUDA's context and the libraries' workspaces; not in torch's own count."""
NCCL = 1.5 * GIB
"""Buffers of the communication between GPUs."""
TILE = 128
"""As train/loop.py rounds packs up."""
PAGE, PREFILL_TOKENS, LOGITS, RESULT_POSITIONS, CANVAS_LOGITS_BYTES = 64, 16_384, 2**29, 2**24, 20 * 2**26
"""Of the engines, in sample/: pages.py, paged_block.py, capacity.py, paged_state.py, canvas_cache.py. The rooms do not import each
other; a test holds these equal."""


# ------------------------------------------------------------------------------------------------------------ parameters


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

    width = {"attention.out.weight": c.num_heads * c.head_dim, "mlp.down.weight": c.intermediate_size}
    total = 0
    for piece in target_pieces(family, c, resolve_targets(family, targets)):
        num_in = next((size for name, size in width.items() if piece.parameter.endswith(name)), c.hidden_size)
        total += rank * (num_in + piece.rows)
    return total


# ----------------------------------------------------------------------------------------------------------- activations


def kept_per_token(c: DecoderConfig, itemsize: int, trains: bool = True, fused: bool = False) -> int:
    """Bytes of a packed token that a layer keeps for its backward (models/decoder.py; attention without a mask in memory).

    Plain torch: a norm keeps its input in float32, the normed values in front of its weight (where that trains) and its result,
    which the product behind it reads. Measured on one H200: 225.6 KB at the 8B shape, and this is 225.4. fused
    (`training.fused_kernels`): a norm keeps its input and its result, one over heads its result alone, and no silu(gate).
    """

    def norm(width: int) -> int:
        return width * 2 * itemsize if fused else width * (4 + (itemsize if trains else 0) + itemsize)

    query, key = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    kept = 2 * norm(c.hidden_size)
    kept += itemsize * (query + 2 * key)  # v is a part of it, and fused norms over heads read it
    kept += norm(query + key) if c.qk_norm and not fused else itemsize * (query + key)  # behind the rotation
    if c.qk_norm and itemsize == 4 and not fused:
        kept -= 4 * (query + key)  # what goes into these norms is that of v
    kept += itemsize * query + 4 * c.num_heads  # the output, and the log of the softmax's sum
    return kept + itemsize * (3 if fused else 4) * c.intermediate_size  # gate and up, silu(gate), their product


def backward_per_token(c: DecoderConfig, itemsize: int) -> int:
    """Bytes that the backward of a layer has beside what it keeps, at its fullest: in the product of silu(gate) and up."""
    return itemsize * (2 * c.intermediate_size + c.hidden_size)


def head_bytes(c: DecoderConfig, itemsize: int, rows: int, trains: bool = True, fused: bool = False) -> int:
    """Of the backward of the chunked head (train/logprobs.py) over chunks of `rows` rows, beside its input.

    The weight's gradient in float32; and a chunk's four float32 tensors (fused: its logits alone, and their gradient in the
    weights' precision) beside the gradient of the chunk before; or, at the end, the weight's gradient in its own precision.
    """
    chunk, vocabulary = 4 * rows * c.vocab_size, vocabulary_parameters(c)
    narrow = chunk * itemsize // 4
    chunks = (chunk + narrow if fused else 4 * chunk) + narrow
    return 4 * vocabulary + max(chunks, itemsize * vocabulary) if trains else chunks


# ------------------------------------------------------------------------------------------------------------- the setup


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
    offload_weights: bool = False
    adapter: int = 0
    """Parameters of the LoRA adapter; 0: all weights train."""
    moments: int = 2
    """Float32 states of the optimizer per trained parameter: 2 (AdamW) or 0 (SGD)."""
    tokens: int = 16_384
    """Of the largest pack."""
    predictions: int = 8_192
    """Of the largest pack."""
    head_chunk: int = 2048
    recomputes: bool = True
    fused: bool = False
    """`training.fused_kernels`."""
    accumulates: bool = True
    """Several micro-batches are summed up to one gradient. Without DeepSpeed a single one has its gradient behind the peak only."""
    value: DecoderConfig | None = None
    """Of a value model."""
    value_rests: bool = False
    """It is off the GPU during the rollout."""
    has_reference: bool = False
    samples: bool = True
    """An engine samples: the rollout, evaluations."""
    attention: str = "block"
    prompt: int = 784
    response: int = 2000
    block_size: int = 4
    max_active: int = 256
    caches: bool = True

    @property
    def num_trained(self) -> int:
        return self.adapter or num_parameters(self.shape)


@dataclass(frozen=True)
class Item:
    name: str
    rollout: float
    """Bytes."""
    update: float
    what: str = ""
    """To change about it, as settings."""


@dataclass(frozen=True)
class States:
    """Of one trained model, bytes that stay: weights, the summed gradient, the optimizer's; and what a backward has besides."""

    weights: float
    gradients: float
    gradients_at_rest: float
    """In the rollout."""
    optimizer: float
    buffers: float
    gathered: float
    fresh: float
    """Bytes per trained parameter whose gradient a backward has made, until it is over."""
    step: float


def states(s: Setup, num_all: int, num_trained: int, largest: int) -> States:
    """largest: parameters of the largest trained tensor."""
    share = s.gpus if s.zero else 1
    split = num_trained / share
    optimizer = 4 * split * (s.moments + (1 if s.zero else 0))  # masters, where DeepSpeed keeps them
    step = 4 * split if s.moments else 0.0  # the root of the second moment
    weights: float = s.itemsize * num_all
    buffers = gathered = fresh = at_rest = 0.0
    if s.zero == 0:
        gradients = s.itemsize * num_trained if s.accumulates or s.gpus > 1 else 0.0
        at_rest = gradients if s.gpus > 1 else 0.0  # the buckets of DDP stay
        fresh = 0.0 if gradients else s.itemsize
    elif s.zero == 1:
        gradients = at_rest = 4.0 * num_trained
        fresh = s.itemsize if s.itemsize < 4 else 0.0
        buffers = 4 * min(num_trained, max(BUCKET, largest)) if s.gpus > 1 else 0.0
    else:
        gradients = 4 * split
        buffers = s.itemsize * max(BUCKET, largest) + 4 * largest / share
        if s.zero == 3:
            at_rest = gradients
            step = min(step, 4 * GATHERED)
            whole = min(num_all, GATHERED)
            gathered = s.itemsize * (whole + max(vocabulary_parameters(s.shape), layer_parameters(s.shape))) if s.gpus > 1 else 0.0
            gathered = min(gathered, weights)
            weights = 0.0 if s.offload_weights else weights / s.gpus
    if s.offload_optimizer:
        optimizer = step = 0.0
        if s.zero == 3:
            gradients = at_rest = 0.0
    return States(weights, gradients, at_rest, optimizer, buffers, gathered, fresh, step)


def engine_bytes(s: Setup) -> tuple[float, float, float]:
    """(what graphs and results keep, keys and values of the longest sequence alone, workspace of its largest forward)."""
    c = s.shape
    position = 2 * c.num_layers * c.num_kv_heads * c.head_dim * s.itemsize
    length = s.prompt + s.response
    if s.attention == "full":
        heads = c.num_heads + 2 * c.num_kv_heads
        row = s.itemsize * (6 * c.hidden_size + 4 * heads * c.head_dim + 4 * c.intermediate_size)
        return 0.0, length * position if s.caches else 0.0, length * row + CANVAS_LOGITS_BYTES
    columns = 1 << (s.response + s.block_size - 2).bit_length()
    slots = 1 << (s.max_active - 1).bit_length()
    results = 16 * columns * min(max(2 * slots, RESULT_POSITIONS // columns), 16 * slots)
    logits = 4 * min(LOGITS, slots * s.block_size * c.vocab_size)
    pages = 1 + -(-(length + s.block_size) // PAGE)
    wide = 6 * c.intermediate_size + 4 * c.num_heads * c.head_dim + 8 * c.hidden_size
    return results + logits, pages * PAGE * position, PREFILL_TOKENS * wide * s.itemsize + 2 * logits


def moments_of_update(s: Setup, policy: States) -> dict[str, tuple[float, float, float]]:
    """Of an update by moment: (fresh gradients, activations, head), bytes."""
    c, n = s.shape, s.tokens
    trains = not s.adapter
    hidden = s.itemsize * c.hidden_size
    kept, working = kept_per_token(c, s.itemsize, trains, s.fused), backward_per_token(c, s.itemsize)
    inputs = n * c.num_layers * (hidden if s.recomputes else kept)
    last_norm = n * (2 * hidden if s.fused else 4 * c.hidden_size + hidden * (2 if trains else 1)) + 3 * s.predictions * hidden
    layer = n * ((kept if s.recomputes else 0) + working)
    head_gradient = policy.fresh * vocabulary_parameters(c) if trains else 0.0
    layer_gradient = policy.fresh * (s.num_trained / c.num_layers if s.adapter else layer_parameters(c))
    rows = min(s.head_chunk, s.predictions)
    return {
        "head": (0.0, inputs + last_norm, head_bytes(c, s.itemsize, rows, trains, s.fused)),
        "last layer": (head_gradient, inputs + layer, 0.0),
        "first layer": (head_gradient + (c.num_layers - 1) * layer_gradient, inputs / c.num_layers + layer, 0.0),
        "embedding": (policy.fresh * s.num_trained, n * hidden, 0.0),
        "step": (0.0, 0.0, policy.step),
    }


def estimate(s: Setup) -> list[Item]:
    """What the memory of every GPU goes to: the update's part at its fullest moment. Without `OUTSIDE_TORCH` and `NCCL`."""
    c = s.shape
    largest = 0 if s.adapter else vocabulary_parameters(c)
    policy = states(s, num_parameters(c) + s.adapter, s.num_trained, largest)
    moments = moments_of_update(s, policy)
    moment = max(moments, key=lambda name: sum(moments[name]))
    fresh, activations, head = moments[moment]
    temporary = {"head": f"head, {min(s.head_chunk, s.predictions):,} rows at a time", "step": "the optimizer's temporary"}
    how = "recomputed" if s.recomputes else "kept"
    items = [
        Item("weights", policy.weights, policy.weights, "zero weights lora"),
        Item("gradients", policy.gradients_at_rest, policy.gradients + fresh, "zero lora"),
        Item("optimizer states", policy.optimizer, policy.optimizer, "zero offload lora"),
        Item("DeepSpeed's buckets", policy.buffers if s.zero == 3 else 0.0, policy.buffers),
        Item("gathered weights", 0.0, policy.gathered),
        Item(f"activations of {s.tokens:,} tokens, {how}", 0.0, activations, "tokens recompute"),
        Item(temporary.get(moment, "head"), 0.0, head, "chunk"),
    ]
    if s.value is not None:
        num_value = num_parameters(s.value, has_head=False)
        trained = dataclasses.replace(s, shape=s.value)
        value = states(trained, num_value, s.adapter or num_value, vocabulary_parameters(s.value))
        total = value.weights + value.optimizer
        rest = 0.0 if s.value_rests else total + value.gradients_at_rest
        items.append(Item("value model", rest, total + value.gradients, "value"))
    if s.has_reference:
        whole = s.itemsize * num_parameters(c)
        items.append(Item("frozen reference", whole, whole, "reference"))
    if s.samples:
        if s.zero == 3:
            whole = s.itemsize * (num_parameters(c) + s.adapter)
            items.append(Item("the engine's own weights", whole, whole, "engine"))
        graphs, cache, workspace = engine_bytes(s)
        items.append(Item("the engine's graphs and results", graphs, graphs))
        items.append(Item("keys and values of one sequence", cache, 0.0, "response"))
        items.append(Item("workspace of sampling", workspace, 0.0))
    return [item for item in items if max(item.rollout, item.update) >= 2**20]


def total_bytes(s: Setup) -> float:
    """Of a GPU at the fullest moment of the job, libraries included."""
    items = estimate(s)
    rollout, update = sum(i.rollout for i in items), sum(i.update for i in items)
    return max(rollout if s.samples else 0.0, update) + outside(s)


def outside(s: Setup) -> float:
    return OUTSIDE_TORCH + (NCCL if s.gpus > 1 else 0.0)
