"""A slow sampler to compare with: no cache, one full forward per denoising step, loops over positions. Not a test itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from common.records import Rollout
from models.attention import masked_attention
from models.decoder import Decoder
from models.family import DecoderConfig
from sample import noise
from sample.engine import Request, SamplingSettings

VOCAB_SIZE, MASK, STOPS = 24, 23, (3, 17)


def random_decoder(seed: int = 0, **changes) -> Decoder:
    torch.manual_seed(seed)
    shape = dict(vocab_size=VOCAB_SIZE, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48)
    decoder = Decoder(DecoderConfig(**{**shape, "rope_theta": 100.0, "qk_norm": True, **changes}))
    for parameter in decoder.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    return decoder.requires_grad_(False)


def random_requests(lengths: list[int], num_samples: int = 1) -> list[Request]:
    generator = torch.Generator().manual_seed(7)
    draw = lambda n: torch.randint(0, VOCAB_SIZE - 2, (n,), generator=generator).tolist()  # noqa: E731
    return [Request(f"task {n}", draw(length), num_samples) for n, length in enumerate(lengths)]


def block_logits(decoder: Decoder, ids: list[int], size: int) -> torch.Tensor:
    """Logits [B, V] of the last block of `ids`, all of them run anew under the block-causal mask."""
    position = torch.arange(len(ids))
    block = position // size
    hidden = decoder(torch.tensor(ids), position, masked_attention(block[:, None] >= block[None, :]))
    return decoder.lm_head(hidden[-size:])


def filtered(p: list[float], top_k: int, top_p: float, top_p_first: bool = False) -> list[float]:
    """Top-k, then top-p, or the other way round; renormalised."""
    if top_p_first:
        p = filtered(p, 0, top_p)
        return filtered(p, top_k, 1.0)
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if top_k:
        order = order[:top_k]
    total = sum(p[i] for i in order)
    kept, mass = set(), 0.0
    for i in order:
        if mass / total > top_p:
            break
        kept.add(i)
        mass += p[i]
    return [p[i] / mass if i in kept else 0.0 for i in range(len(p))]


def entropy(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def schedule(size: int, steps: int) -> list[int]:
    return [size // steps + (1 if s < size % steps else 0) for s in range(steps)]


def choose(masked: list[int], score: dict, entropies: dict, n: int, s: SamplingSettings) -> list[int]:
    """The positions to reveal."""
    n = min(n, len(masked))
    best = sorted(masked, key=lambda i: (-score[i], i))
    if s.strategy == "sequential":
        return masked[:n]
    if s.strategy == "low_confidence_static":
        return best[:n]
    if s.strategy == "low_confidence_dynamic":
        above = [i for i in masked if score[i] > s.threshold]
        return above if len(above) >= n else best[:n]
    chosen = []
    for i in sorted(masked, key=lambda i: (entropies[i], i)):
        if chosen and sum(entropies[j] for j in chosen) > s.entropy_bound:
            break
        chosen.append(i)
    return chosen


@dataclass
class Drawn:
    """What a masked position drew."""

    token: int
    logprob: float
    entropy: float
    score: float
    score_entropy: float


def draw(logits: torch.Tensor, position: int, key: tuple[int, int], forward: int, s: SamplingSettings) -> Drawn:
    """One token from raw logits [V] of a position in the sequence's `forward`-th forward."""
    raw = logits.double()
    raw[list(s.forbidden_ids)] = -math.inf
    p, unscaled = (raw / (s.temperature or 1.0)).softmax(-1).tolist(), raw.softmax(-1).tolist()
    row = noise.row_keys(torch.tensor([key], dtype=torch.int32), torch.tensor([position]), torch.tensor([forward]))
    q = filtered(p, s.top_k, s.top_p, s.top_p_first)
    allowed = [v for v in range(len(p)) if q[v] > 0]
    if s.is_greedy:
        token = max(allowed, key=lambda v: q[v])
    else:
        gumbel = noise.gumbel(row, len(p))[0].tolist()
        token = max(allowed, key=lambda v: math.log(q[v]) + gumbel[v])
    seen = q if s.confidence == "filtered" else p
    if s.scores_unscaled:
        left = [u if q[v] > 0 or s.confidence == "raw" else 0.0 for v, u in enumerate(unscaled)]
        seen = [u / sum(left) for u in left]
    ranked = sorted(seen, reverse=True)
    score = {
        "confidence": seen[token],
        "margin_confidence": ranked[0] - ranked[1],
        "neg_entropy": -entropy(seen),
        "random": noise.uniform(row, torch.tensor([-1])).item(),
    }[s.target]
    return Drawn(token, math.log(p[token]), entropy(p), score, entropy(seen))


def slow_generate(decoder: Decoder, request: Request, sample: int, s: SamplingSettings) -> Rollout:
    size, prompt = s.block_size, len(request.prompt_ids)
    end = math.ceil((prompt + s.max_tokens) / size) * size
    ids = list(request.prompt_ids) + [s.mask_id] * (end - prompt)
    step_map, logprobs, entropies = [0] * end, [0.0] * end, [0.0] * end
    key = noise.sequence_key(s.seed, request.task_id, sample)
    counts = schedule(size, s.num_steps)
    forward = 0
    for start in range(prompt // size * size, end, size):
        step = 0
        while masked := [i for i in range(start, start + size) if i >= prompt and step_map[i] == 0]:
            forward += 1
            logits = block_logits(decoder, ids[: start + size], size)
            drawn = {i: draw(logits[i - start], i, key, forward, s) for i in masked}
            score, score_entropy = ({i: getattr(d, name) for i, d in drawn.items()} for name in ("score", "score_entropy"))
            for i in choose(masked, score, score_entropy, counts[min(step, len(counts) - 1)], s):
                ids[i], step_map[i] = drawn[i].token, forward
                logprobs[i], entropies[i] = drawn[i].logprob, drawn[i].entropy
            step += 1
        answer = ids[prompt : min(start + size, prompt + s.max_tokens)]
        stops = [n for n, token in enumerate(answer) if token in s.stop_ids]
        if stops:
            end = start + size
            break
    return Rollout(
        task_id=request.task_id,
        sample=sample,
        prompt_ids=list(request.prompt_ids),
        response_ids=ids[prompt:end],
        step_map=step_map[prompt:end],
        logprobs=logprobs[prompt:end],
        entropy=entropies[prompt:end],
        num_response=stops[0] + 1 if stops else s.max_tokens,
        finish="stop" if stops else "length",
        num_forwards=forward,
        weights_version=0,
        block_size=size,
    )
