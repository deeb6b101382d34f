"""What the memory of a GPU goes to in a training job: arithmetic over the model's shape and a few settings.

A job has moments that can be the fullest:

    sampling   what stays, and the engine's cache and workspace
    head       backward of the vocabulary's chunks, with all that the layers have kept
    layers     backward of the last layer (most is kept), of the last that is recomputed, or of the first (most gradients are
               there), of the policy or of a value model
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
MARGIN = 0.9
"""The share of a GPU that an update may take where recomputation is chosen by memory. The rest is for what the estimate misses
(2% of measured peaks, but DeepSpeed's share is read in its code) and for what torch's allocator holds in pieces that fit nothing,
packs being of many sizes. What is recomputed needlessly costs a fifth of the update's time at most, memory that is full the run."""
ENOUGH_IN_FLIGHT = 128
"""Sequences of a block model: twice as many gave 4% to 7% more tokens/s on an H200 (docs/results.md), not worth moving things."""
TILE = 128
"""As train/loop.py rounds packs up."""
PAGE, PREFILL_TOKENS, LOGITS, RESULT_POSITIONS, CANVAS_LOGITS_BYTES = 64, 16_384, 2**29, 2**24, 20 * 2**26
MEMORY_SHARE, ROWS_AT_A_TIME = 0.9, 32_768
"""Of the engines, in sample/: pages.py, paged_block.py, capacity.py, paged_state.py, canvas_cache.py; paged_cache.py,
canvas_cache.py. The rooms do not import each other; a test holds these equal."""


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


def padded_length(n: int) -> int:
    """As in models/attention.py; a test holds them equal."""
    multiple = max(TILE, (1 << (n - 1).bit_length()) // 8)
    return -(-n // multiple) * multiple


def filled_attention(c: DecoderConfig, itemsize: int, tokens: int, fused: bool) -> int:
    """Bytes that a layer keeps besides, for FlexAttention fills its rows up: of q, k, v and the output what lies behind the tokens,
    and of v a copy (a row that is full needs none, but one a tile shorter does). In plain torch nothing else reads the fused
    product, and where v is copied that goes: the copy costs nothing."""
    query, key, length = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, padded_length(tokens)
    return itemsize * ((length - tokens) * (2 * query + 2 * key) + (tokens * key if fused else 0))


def backward_per_token(c: DecoderConfig, itemsize: int) -> int:
    """Bytes that the backward of a layer has beside what it keeps, at its fullest: in the product of silu(gate) and up."""
    return itemsize * (2 * c.intermediate_size + c.hidden_size)


def head_bytes(c: DecoderConfig, itemsize: int, predictions: int, chunk: int, trains: bool = True, fused: bool = False) -> int:
    """Of the backward of the chunked head (train/logprobs.py) over so many rows, `chunk` at a time, beside its input.

    The weight's gradient in float32; and a chunk's four float32 tensors (fused: its logits alone, and their gradient in the
    weights' precision); or, at the end, the weight's gradient in its own precision.
    """
    vocabulary, row = vocabulary_parameters(c), (4 + itemsize if fused else 4 * 4) * c.vocab_size
    rows = min(chunk, predictions) * row
    return 4 * vocabulary + max(rows, itemsize * vocabulary) if trains else rows


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
    recomputed_layers: int | None = None
    """Whose activations are recomputed in the backward, the first so many (models/decoder.py); None: all."""
    fused: bool = False
    """`training.fused_kernels`."""
    accumulates: bool = True
    """Several micro-batches are summed up to one gradient. Without DeepSpeed a single one has its gradient behind the peak only."""
    value: DecoderConfig | None = None
    """Of a value model."""
    value_rests: bool = False
    """It is off the GPU during the rollout."""
    optimizer_rests: bool = False
    """So are the policy's optimizer states and gradients (ZeRO-3: all of it, for the engine has weights of its own)."""
    has_reference: bool = False
    reference_rests: bool = False
    """The frozen reference is off the GPU during the rollout."""
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

    @property
    def num_recomputed(self) -> int:
        return self.recomputed_of(self.shape.num_layers)

    def recomputed_of(self, num_layers: int) -> int:
        """Layers that a model of that depth recomputes: of no more than the policy it keeps the activations."""
        recomputed = self.shape.num_layers if self.recomputed_layers is None else self.recomputed_layers
        return max(0, num_layers - (self.shape.num_layers - recomputed))


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


def engine_wants(s: Setup) -> float:
    """Bytes of free memory with which the engine has as many of the `max_active` sequences in flight as help, each as long as it
    may become."""
    graphs, cache, workspace = engine_bytes(s)
    num_active = s.max_active if s.attention == "full" else min(s.max_active, ENOUGH_IN_FLIGHT)
    if s.attention == "full":  # forwards over as many canvases as come to so many rows
        length = s.prompt + s.response
        activations = workspace - CANVAS_LOGITS_BYTES
        workspace += activations * (max(1.0, min(s.max_active, ROWS_AT_A_TIME / length)) - 1)
    return graphs + (num_active * cache + workspace) / MEMORY_SHARE


def choose_resting(s: Setup, gpu_bytes: float, value: bool, optimizer: bool) -> Setup:
    """What rests in the rollout where memory decides, as train/offload.py: the value model first, if it may, then the policy's
    states, then the reference."""
    own = ("the engine's graphs and results", "keys and values of one sequence", "workspace of sampling")
    names = [*(["value_rests"] if value else []), *(["optimizer_rests"] if optimizer else [])]
    for name in [*names, *(["reference_rests"] if optimizer and s.has_reference else [])]:
        free = gpu_bytes - outside(s) - sum(item.rollout for item in estimate(s) if item.name not in own)
        s = dataclasses.replace(s, **{name: s.samples and free < engine_wants(s)})
    return s


def moments_of_update(s: Setup, policy: States) -> dict[str, tuple[float, float, float]]:
    """Of an update by moment: (fresh gradients, activations, the head's or the optimizer's temporary), bytes."""
    c, n = s.shape, s.tokens
    trains = not s.adapter
    hidden = s.itemsize * c.hidden_size
    kept, working = kept_per_token(c, s.itemsize, trains, s.fused), backward_per_token(c, s.itemsize)
    recomputed = s.num_recomputed
    of_layer = n * kept
    if s.attention == "block" or not s.fused or s.itemsize == 4:  # else variable-length attention needs no mask
        of_layer += filled_attention(c, s.itemsize, n, s.fused)
    held = recomputed * n * hidden + (c.num_layers - recomputed) * of_layer
    last_norm = n * (2 * hidden if s.fused else 4 * c.hidden_size + hidden * (2 if trains else 1)) + 3 * s.predictions * hidden
    layer = of_layer + n * working
    head_gradient = policy.fresh * vocabulary_parameters(c) if trains else 0.0
    layer_gradient = policy.fresh * (s.num_trained / c.num_layers if s.adapter else layer_parameters(c))
    # For the head's moment it matters how many layers are recomputed, not which. Then the backward of layer i finds what layers 0
    # to i hold, and adds `of_layer` where i is recomputed: together least where those before it hold their inputs alone. So the
    # first layers are recomputed; of their backwards the first and the last are the fullest, for inputs go as gradients come.
    first_input = n * hidden if recomputed else 0
    moments = {
        "head": (0.0, held + last_norm, head_bytes(c, s.itemsize, s.predictions, s.head_chunk, trains, s.fused)),
        "last layer": (head_gradient, held + n * working, 0.0),
        "first layer": (head_gradient + (c.num_layers - 1) * layer_gradient, first_input + layer, 0.0),
        "embedding": (policy.fresh * s.num_trained, n * hidden, 0.0),
        "step": (0.0, 0.0, policy.step),
    }
    if recomputed:  # the layers behind them have given back what they kept, and their gradients are there
        fresh = head_gradient + (c.num_layers - recomputed) * layer_gradient
        moments["last recomputed layer"] = (fresh, n * recomputed * hidden + layer, 0.0)
    return moments


def estimate(s: Setup) -> list[Item]:
    """What the memory of every GPU goes to: the update's part at its fullest moment. Without `OUTSIDE_TORCH` and `NCCL`."""
    c = s.shape
    largest = 0 if s.adapter else vocabulary_parameters(c)
    policy = states(s, num_parameters(c) + s.adapter, s.num_trained, largest)
    moments = moments_of_update(s, policy)
    if s.value is not None:
        trained = dataclasses.replace(s, shape=s.value, recomputed_layers=s.recomputed_of(s.value.num_layers))
        num_value = num_parameters(s.value, has_head=False)
        value = states(trained, num_value, s.adapter or num_value, vocabulary_parameters(s.value))
        own = moments_of_update(trained, value)
        moments |= {f"value model's {name}": own[name] for name in own if name != "head"}  # of one column
    moment = max(moments, key=lambda name: sum(moments[name]))
    fresh, activations, extra = moments[moment]
    temporary = f"head, {min(s.head_chunk, s.predictions):,} rows at a time" if moment == "head" else "the optimizer's temporary"
    how = f"{s.num_recomputed} of {c.num_layers} layers recomputed" if s.num_recomputed else "kept"
    stays = 0.0 if s.optimizer_rests else 1.0
    # The buckets of DDP are out of reach.
    gradients = policy.gradients_at_rest * (stays if s.zero else 1.0)
    items = [
        Item("weights", policy.weights * (stays if s.zero == 3 else 1.0), policy.weights, "zero weights lora"),
        Item("gradients", gradients, policy.gradients + fresh, "zero lora"),
        Item("optimizer states", policy.optimizer * stays, policy.optimizer, "zero offload lora"),
        Item("DeepSpeed's buckets", policy.buffers * stays if s.zero == 3 else 0.0, policy.buffers),
        Item("gathered weights", 0.0, policy.gathered),
        Item(f"activations of {s.tokens:,} tokens, {how}", 0.0, activations, "tokens recompute"),
        Item(temporary, 0.0, extra, "chunk"),
    ]
    if s.value is not None:
        total = value.weights + value.optimizer
        rest = (0.0 if s.value_rests else total) + (0.0 if s.value_rests and s.zero else value.gradients_at_rest)
        items.append(Item("value model", rest, total + value.gradients, "value"))
    if s.has_reference:
        whole = s.itemsize * num_parameters(c)
        items.append(Item("frozen reference", 0.0 if s.reference_rests else whole, whole, "reference"))
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
    rollout = sum(item.rollout for item in estimate(s)) + outside(s)
    return max(rollout if s.samples else 0.0, update_bytes(s))


def update_bytes(s: Setup) -> float:
    """Of a GPU in the update, libraries included."""
    return sum(item.update for item in estimate(s)) + outside(s)


def choose_recomputed(s: Setup, gpu_bytes: float) -> Setup:
    """The setup with as few recomputed layers as keep the update within `MARGIN` of the GPU; with all where none do.

    The rollout has no say: recomputation changes nothing about it.
    """
    choices = (dataclasses.replace(s, recomputed_layers=number) for number in range(s.shape.num_layers + 1))
    fitting = (choice for choice in choices if update_bytes(choice) <= MARGIN * gpu_bytes)
    return next(fitting, dataclasses.replace(s, recomputed_layers=None))


def outside(s: Setup) -> float:
    return OUTSIDE_TORCH + (NCCL if s.gpus > 1 else 0.0)
