"""A slow canvas sampler to compare with: one sequence, one position after the other, keys in lists. Not a test itself."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from common.records import Rollout
from models.decoder import Decoder
from models.family import Family
from sample import noise
from sample.engine import Request, SamplingSettings
from tests.sample.reference import choose, draw, schedule

Stored = dict[tuple[int, int], tuple[Tensor, Tensor]]
"""(layer, position) -> key and value [G, K]."""


def run(decoder: Decoder, ids: list[int], rows: list[int], visible: list[int], stored: Stored, keep: bool) -> dict[int, Tensor]:
    """Raw logits [V] by position of the `rows` (positions), which see `visible`: what is among the rows as it is now, the others as
    they were stored. keep: store the rows' keys and values."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        now = {position: (k[n], v[n]) for n, position in enumerate(rows)}
        pairs = [now[p] if p in now else stored[layer, p] for p in visible]
        per_group = q.shape[1] // k.shape[1]
        keys, values = (torch.stack([pair[i] for pair in pairs]).repeat_interleave(per_group, 1) for i in (0, 1))  # [visible, H, K]
        weights = (torch.einsum("nhk,vhk->nhv", q, keys) / math.sqrt(q.shape[2])).softmax(-1)
        if keep:
            stored.update({(layer, p): pair for p, pair in now.items()})
        return torch.einsum("nhv,vhk->nhk", weights, values)

    hidden = decoder(torch.tensor([ids[p] for p in rows]), torch.tensor(rows), attend)
    return dict(zip(rows, decoder.lm_head(hidden), strict=True))


def dream_counts(size: int, steps: int) -> list[int]:
    """Dream's schedule as it is written down, forwards that reveal nothing included."""
    times = torch.linspace(1, 1e-3, steps + 1).tolist()
    counts, masked = [1], size - 1
    for i in range(1, max(steps, 2)):
        counts.append(math.floor(masked * (1 - times[i + 1] / times[i])) if i < steps - 1 else masked)
        masked -= counts[-1]
    return counts


def slow_canvas(decoder: Decoder, family: Family, request: Request, sample: int, s: SamplingSettings) -> tuple[Rollout, int]:
    """The rollout, and how many rows went through the head."""
    s = dataclasses.replace(s, scores_unscaled=family.name in ("llada", "mmada"))
    prompt = len(request.prompt_ids)
    end = prompt + request.limit(sample, s)
    ids = list(request.prompt_ids) + [s.mask_id] * (end - prompt)
    step_map, logprobs, entropies = [0] * end, [0.0] * end, [0.0] * end
    key = noise.sequence_key(s.seed, request.task_id, sample)
    starts = list(range(prompt, end, s.block_size))
    shares = schedule(math.ceil((s.steps or s.max_tokens) * (end - prompt) / s.max_tokens), len(starts))
    forward = head_rows = 0
    for start, share in zip(starts, shares, strict=True):
        block = range(start, min(start + s.block_size, end))
        steps = max(1, share)
        counts = dream_counts(len(block), steps) if family.canvas_schedule == "dream" else schedule(len(block), steps)
        counts = [n for n in counts if n > 0]  # forwards that would reveal nothing
        stored: Stored = {}
        step = 0
        while masked := [i for i in block if step_map[i] == 0]:
            forward += 1
            if step == 0 or s.cache == "none":
                logits = run(decoder, ids, list(range(end)), list(range(end)), stored, keep=True)
            else:
                first = start if family.first_token_from_refresh else start - family.logit_shift
                behind = {"prefix": end, "dual": 0}[s.cache] if s.further_horizon is None else s.further_horizon
                window = list(range(first, min(block[-1] + 1 + behind, end)))
                visible = [*range(first), *window, *(range(window[-1] + 1, end) if s.cache == "dual" else [])]
                logits = run(decoder, ids, window, visible, stored, keep=False)
            if step == 0 and family.first_token_from_refresh:
                masked = masked[:1]
            head_rows += len(masked)
            drawn = {i: draw(logits[i - family.logit_shift], i, key, forward, s) for i in masked}
            score = {i: d.score / (s.pad_target_penalty if d.token == s.pad_id else 1.0) for i, d in drawn.items()}
            count = 1 if s.strategy == "low_confidence_dynamic" else counts[min(step, len(counts) - 1)]
            for i in choose(masked, score, {i: d.score_entropy for i, d in drawn.items()}, count, s):
                ids[i], step_map[i] = drawn[i].token, forward
                logprobs[i], entropies[i] = drawn[i].logprob, drawn[i].entropy
            step += 1
        if s.stop_early and any(ids[i] in s.stop_ids for i in block):
            break
    stops = [n for n, token in enumerate(ids[prompt:end]) if token in s.stop_ids]
    rollout = Rollout(
        task_id=request.task_id,
        sample=sample,
        prompt_ids=list(request.prompt_ids),
        response_ids=ids[prompt:end],
        step_map=step_map[prompt:end],
        logprobs=logprobs[prompt:end],
        entropy=entropies[prompt:end],
        num_response=stops[0] + 1 if stops else end - prompt,
        finish="stop" if stops else "length",
        num_forwards=forward,
        weights_version=0,
        block_size=s.block_size,
    )
    return rollout, head_rows
