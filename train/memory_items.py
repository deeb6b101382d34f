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

With the optimizer on the host its 12/W go there (the sum of ZeRO-2 stays). Without DeepSpeed (float32): 4, 4 and 8; under DDP the
gradients are 8, the sum over micro-batches and the buckets, which become one in a step's last backward.

The engine's part: train/memory_engine.py. What is said of an estimate: train/memory_estimate.py. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from models.family import DecoderConfig
from models.row_length import padded_length
from train.memory_engine import engine_bytes, engine_wants
from train.memory_setup import Setup, input_width, layer_parameters, num_parameters, vocabulary_parameters

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


# ----------------------------------------------------------------------------------------------------------- activations


def kept_per_token(
    c: DecoderConfig, itemsize: int, fused: bool = False, adapted: tuple[str, ...] = (), drops: bool = False
) -> int:
    """Bytes of a packed token that a layer keeps for its backward (models/decoder.py; attention without a mask in memory).

    Plain torch: a norm keeps its input in float32, the normed values in front of its weight (where that trains) and its result,
    which the product behind it reads. Measured on one H200: 225.6 KB at the 8B shape, and this is 225.4. fused
    (`training.fused_kernels`): a norm keeps its input and its result, one over heads its result alone, and no silu(gate).

    adapted: linear layers that have adapters; (): all weights train. A frozen product without one keeps no input. drops: there is
    dropout before the adapters, which keep what is left of their input in the place of it, and a mask of bytes. The output of the
    attention is kept all the same.
    """
    trains = not adapted

    def norm(width: int) -> int:
        return width * 2 * itemsize if fused else width * (4 + (itemsize if trains else 0) + itemsize)

    def keeps_input(name: str) -> bool:
        return trains or name in adapted

    query, key = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    kept = 2 * norm(c.hidden_size)
    kept -= itemsize * c.hidden_size * sum(not keeps_input(name) for name in ("attention.qkv.weight", "mlp.gate_up.weight"))
    kept += itemsize * (query + 2 * key)  # v is a part of it, and fused norms over heads read it
    kept += norm(query + key) if c.qk_norm and not fused else itemsize * (query + key)  # behind the rotation
    if c.qk_norm and itemsize == 4 and not fused:
        kept -= 4 * (query + key)  # what goes into these norms is that of v
    kept += itemsize * query + 4 * c.num_heads  # the output, and the log of the softmax's sum
    if drops:
        kept += sum(input_width(c, name) for name in adapted) + (itemsize * query if "attention.out.weight" in adapted else 0)
    kept += itemsize * (2 if fused else 3) * c.intermediate_size  # gate and up, silu(gate)
    return kept + (itemsize * c.intermediate_size if keeps_input("mlp.down.weight") else 0)  # their product


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


# ------------------------------------------------------------------------------------------------------- what it goes to


@dataclass(frozen=True)
class Item:
    name: str
    rollout: float
    """Bytes."""
    update: float


@dataclass(frozen=True)
class States:
    """Of one trained model, bytes that stay: weights, the summed gradient, the optimizer's; and what a backward has besides."""

    weights: float
    gradients: float
    gradients_in_rollout: float
    """What of the gradient is there in the rollout, where it is not offloaded."""
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
    buffers = gathered = fresh = in_rollout = 0.0
    if s.zero == 0:
        summed = float(s.itemsize * num_trained)
        in_rollout = summed if s.gpus > 1 else 0.0  # the buckets of DDP stay
        gradients = in_rollout + (summed if s.accumulates else 0.0)  # beside the buckets until the last backward
        fresh = 0.0 if gradients else s.itemsize
    elif s.zero == 1:
        gradients = in_rollout = 4.0 * num_trained
        fresh = s.itemsize if s.itemsize < 4 else 0.0
        buffers = 4 * min(num_trained, max(BUCKET, largest)) if s.gpus > 1 else 0.0
    else:
        gradients = 4 * split
        sends = 4 if s.reduces_in_float32 else s.itemsize  # ZeRO-3 fills its bucket with that, ZeRO-2 has a copy beside its own
        bucket = sends if s.zero == 3 or sends == s.itemsize else s.itemsize + sends
        buffers = bucket * max(BUCKET, largest) + 4 * largest / share
        if s.zero == 3:
            in_rollout = gradients
            step = min(step, 4 * GATHERED)
            whole = min(num_all, GATHERED)
            gathered = s.itemsize * (whole + max(vocabulary_parameters(s.shape), layer_parameters(s.shape))) if s.gpus > 1 else 0.0
            gathered = min(gathered, weights)
            weights = 0.0 if s.offload_weights else weights / s.gpus
    if s.offload_optimizer:
        optimizer = step = 0.0
        if s.zero == 3:
            gradients = in_rollout = 0.0
    return States(weights, gradients, in_rollout, optimizer, buffers, gathered, fresh, step)


def choose_offloaded(s: Setup, gpu_bytes: float, value: bool, optimizer: bool) -> Setup:
    """What is offloaded in the rollout where memory decides, as train/offload.py: the value model first, if it may, then
    the policy's states, then the reference."""
    own = ("the engine's graphs and results", "keys and values of one sequence", "workspace of sampling")
    names = [*(["value_offloaded_in_rollout"] if value else []), *(["optimizer_offloaded_in_rollout"] if optimizer else [])]
    for name in [*names, *(["reference_offloaded_in_rollout"] if optimizer and s.has_reference else [])]:
        free = gpu_bytes - outside(s) - sum(item.rollout for item in estimate(s) if item.name not in own)
        s = dataclasses.replace(s, **{name: s.samples and free < engine_wants(s)})
    return s


def moments_of_update(s: Setup, policy: States) -> dict[str, tuple[float, float, float]]:
    """Of an update by moment: (fresh gradients, activations, the head's or the optimizer's temporary), bytes."""
    c, n = s.shape, s.tokens
    trains = not s.adapter
    hidden = s.itemsize * c.hidden_size
    kept, working = kept_per_token(c, s.itemsize, s.fused, s.adapted, s.drops), backward_per_token(c, s.itemsize)
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
    buffers, gathered = policy.buffers, policy.gathered
    if s.value is not None:
        trained = dataclasses.replace(s, shape=s.value, recomputed_layers=s.recomputed_of(s.value.num_layers))
        num_value = num_parameters(s.value, has_head=False)
        value = states(trained, num_value, s.adapter or num_value, vocabulary_parameters(s.value))
        own = moments_of_update(trained, value)
        moments |= {f"value model's {name}": own[name] for name in own if name != "head"}  # of one column
        # There in a model's own forward and backward alone; but the buckets of ZeRO-3 stay, and are counted with the model.
        gathered = max(gathered, value.gathered)
        buffers = buffers if s.zero == 3 else max(buffers, value.buffers)
    moment = max(moments, key=lambda name: sum(moments[name]))
    fresh, activations, extra = moments[moment]
    temporary = f"head, {min(s.head_chunk, s.predictions):,} rows at a time" if moment == "head" else "the optimizer's temporary"
    how = f"{s.num_recomputed} of {c.num_layers} layers recomputed" if s.num_recomputed else "kept"
    stays = 0.0 if s.optimizer_offloaded_in_rollout else 1.0
    # The buckets of DDP are out of reach.
    gradients = policy.gradients_in_rollout * (stays if s.zero else 1.0)
    items = [
        Item("weights", policy.weights * (stays if s.zero == 3 else 1.0), policy.weights),
        Item("gradients", gradients, policy.gradients + fresh),
        Item("optimizer states", policy.optimizer * stays, policy.optimizer),
        Item("DeepSpeed's buckets", buffers * stays if s.zero == 3 else 0.0, buffers),
        Item("gathered weights", 0.0, gathered),
        Item(f"activations of {s.tokens:,} tokens, {how}", 0.0, activations),
        Item(temporary, 0.0, extra),
    ]
    if s.value is not None:
        total = value.weights + value.optimizer + (value.buffers if s.zero == 3 else 0.0)
        value_stays = 0.0 if s.value_offloaded_in_rollout else 1.0
        sampling = total * value_stays + value.gradients_in_rollout * (value_stays if s.zero else 1.0)
        items.append(Item("value model", sampling, total + value.gradients))
    if s.has_reference:
        whole = s.itemsize * num_parameters(c)
        items.append(Item("frozen reference", 0.0 if s.reference_offloaded_in_rollout else whole, whole))
    if s.samples:
        if s.zero == 3:
            whole = s.itemsize * (num_parameters(c) + s.adapter)
            items.append(Item("the engine's own weights", whole, whole))
        graphs, cache, workspace = engine_bytes(s)
        items.append(Item("the engine's graphs and results", graphs, graphs))
        items.append(Item("keys and values of one sequence", cache, 0.0))
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
