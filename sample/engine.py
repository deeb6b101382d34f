"""What RL and evaluation call: requests in, rollouts out.

    engine = build_engine(decoder, family)
    rollouts = engine.generate([Request("task-1", prompt_ids, num_samples=8)], settings)

What one sequence draws depends on the seed, its task, its sample number, the position and the number of the forward: not on
what else is in flight, nor on the machine.
"""

from __future__ import annotations

import importlib.util
import time
from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Iterator, Literal, Protocol

import torch

from common.errors import UserError
from common.records import Rollout
from models.decoder import Decoder
from models.family import Family
from sample.queue import ListQueue, WorkQueue
from sample.registry import ENGINES, KERNEL_ENGINES, TARGETS, UNMASKING

if TYPE_CHECKING:
    from torch import Tensor

    from models.checkpoint import Pretrained

Progress = Callable[[int, int, int], None]
"""Called after every forward of the engine with (finished sequences, revealed tokens, denoising forwards of all sequences)."""


@dataclass(frozen=True)
class Request:
    """One prompt, to be answered `num_samples` times."""

    task_id: str
    """Names the task: it keys the sampling noise, so it has to be stable between runs."""
    prompt_ids: list[int]
    num_samples: int = 1
    max_tokens: int | tuple[int, ...] | None = None
    """Longest response to this prompt, where it is not the settings'; a tuple: of each of its samples."""

    def __post_init__(self) -> None:
        limits = self.max_tokens if isinstance(self.max_tokens, tuple) else () if self.max_tokens is None else (self.max_tokens,)
        assert all(limit >= 1 for limit in limits), f"task {self.task_id}: max_tokens must be at least 1"
        assert not isinstance(self.max_tokens, tuple) or len(limits) == self.num_samples, f"task {self.task_id}: a limit per sample"

    def limit(self, sample: int, settings: SamplingSettings) -> int:
        """Tokens of the longest response that this sample may have."""
        if self.max_tokens is None:
            return settings.max_tokens
        return self.max_tokens if isinstance(self.max_tokens, int) else self.max_tokens[sample]


@dataclass(frozen=True)
class SamplingSettings:
    """How to decode, and the token ids that the model and its tokenizer give special meaning."""

    max_tokens: int
    """Longest response. A stop token behind it does not count; the last block is completed all the same."""
    mask_id: int
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a response, at the end of the block in which they appear."""
    forbidden_ids: tuple[int, ...] = ()
    """Never sampled, and without probability: the mask, and ids beyond the tokenizer."""
    block_size: int = 4
    steps_per_block: int | None = None
    """Denoising forwards of a block under a fixed schedule; None: block_size."""
    strategy: str = "low_confidence_static"
    """A name in sample.registry.UNMASKING."""
    target: str = "confidence"
    """What ranks the masked positions: a name in sample.registry.TARGETS."""
    threshold: float = 0.9
    """low_confidence_dynamic: positions whose target is above it are all revealed."""
    entropy_bound: float = 0.1
    """entropy_bounded, nats."""
    confidence: Literal["raw", "filtered"] = "raw"
    """Whether targets see the distribution before top-k/top-p or after them."""
    temperature: float = 1.0
    """0: greedy, with log-probs and confidences at temperature 1."""
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    """1: off."""
    top_p_first: bool = False
    """Top-p of all ids, not of those that top-k leaves."""
    scores_unscaled: bool = False
    """Targets see the distribution at temperature 1, whatever tokens are drawn from."""
    greedy: bool = False
    """Take the most probable token at any temperature."""
    seed: int = 0
    # Full attention (sample/canvas.py): the canvas is the prompt and max_tokens behind it; blocks count from the prompt's end.
    steps: int | None = None
    """Denoising forwards of the whole response under a fixed schedule; None: max_tokens."""
    cache: Literal["none", "prefix", "dual"] = "none"
    """Of what keys and values are kept from a block's first forward for its others: of nothing; of what is before the block; or of
    what is behind it too."""
    further_horizon: int | None = None
    """Tokens behind the block that its forwards with a cache compute beside it. What is behind them is not seen (prefix), or seen
    as it was (dual). None: all of them (prefix), none (dual)."""
    stop_early: bool = False
    """Skip the blocks behind the first one with a stop token: they stay masks."""
    alg_temp: float = 0.0
    """Draw the positions to reveal in proportion to exp(score / alg_temp), without replacement; 0: the best ones."""
    pad_target_penalty: float = 1.0
    """What the score of a position is divided by where the drawn token is `pad_id`."""
    pad_id: int | None = None

    def __post_init__(self) -> None:
        least = {"max_tokens": 1, "block_size": 1, "temperature": 0, "top_k": 0, "entropy_bound": 0, "alg_temp": 0}
        least |= {"steps_per_block": 1, "steps": 1, "further_horizon": 0}
        for name, bound in least.items():
            if getattr(self, name) is not None and getattr(self, name) < bound:
                raise UserError(f"{name}: got {getattr(self, name)}, must be at least {bound}")
        if self.pad_target_penalty <= 0:
            raise UserError(f"pad_target_penalty: got {self.pad_target_penalty}, must be above 0")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: got {self.top_p}, must be above 0 and at most 1")
        UNMASKING.get(self.strategy)
        TARGETS.get(self.target)

    @classmethod
    def from_decoding(
        cls, decoding: Any, *, mask_id: int, stop_ids: list[int], forbidden_ids: list[int], seed: int, **changes: Any
    ) -> SamplingSettings:
        """From a config section (`rollout`, or one variant of `evaluation`) and facts of the model; `changes` override."""
        settings = dict(
            max_tokens=decoding.max_token,
            block_size=decoding.block_size,
            steps_per_block=decoding.denoising_steps_per_block,
            strategy=decoding.remasking_strategy,
            target=decoding.target,
            threshold=decoding.dynamic_threshold,
            entropy_bound=decoding.entropy_bound,
            confidence=decoding.confidence,
            temperature=decoding.temperature,
            top_k=decoding.top_k,
            top_p=decoding.top_p,
            steps=decoding.steps,
            cache=decoding.cache_kind,
            further_horizon=decoding.further_horizon,
            stop_early=decoding.stop_early,
            alg_temp=decoding.alg_temp,
            pad_target_penalty=decoding.pad_target_penalty,
        )
        ids = dict(mask_id=mask_id, stop_ids=tuple(stop_ids), forbidden_ids=tuple(forbidden_ids))
        return cls(**{**settings, **ids, "seed": seed, **changes})

    @classmethod
    def for_model(cls, model: Pretrained, max_tokens: int, **settings: Any) -> SamplingSettings:
        """For a model that was read from a checkpoint: its own mask, stop and forbidden ids, and its block size if it says one."""
        facts = dict(mask_id=model.mask_id, stop_ids=tuple(model.eos_ids), forbidden_ids=tuple(model.forbidden_ids))
        if model.family.attention == "full":
            facts["pad_id"] = model.fill_id
        block_size = model.family.config_block_size(model.config)
        if block_size is not None:
            facts["block_size"] = block_size
        return cls(max_tokens=max_tokens, **{**facts, **settings})

    @property
    def is_greedy(self) -> bool:
        return self.greedy or self.temperature == 0

    @property
    def logits_temperature(self) -> float:
        """What logits are divided by; the trainer divides by the same."""
        return self.temperature or 1.0

    @property
    def score_temperature(self) -> float:
        """What logits are divided by for the distribution that targets see."""
        return 1.0 if self.scores_unscaled else self.logits_temperature

    @property
    def num_steps(self) -> int:
        return self.steps_per_block or self.block_size


def make_rollout(
    request: Request,
    sample: int,
    settings: SamplingSettings,
    tokens: Tensor,
    step_map: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    num_forwards: int,
    weights_version: int,
) -> Rollout:
    """The record of a finished sequence from what its response's positions hold (host tensors, all of one length).

    Raises FloatingPointError for a log-probability that is not finite.
    """
    if not logprobs.isfinite().all():
        raise FloatingPointError(
            f"task {request.task_id}, sample {sample}: log-probabilities are not finite: the weights have diverged"
        )
    response_ids = tokens.tolist()
    limit = request.limit(sample, settings)
    stops = (n for n, token in enumerate(response_ids[:limit]) if token in settings.stop_ids)
    stop = next(stops, None)
    return Rollout(
        task_id=request.task_id,
        sample=sample,
        prompt_ids=list(request.prompt_ids),
        response_ids=response_ids,
        step_map=step_map.tolist(),
        logprobs=logprobs.tolist(),
        entropy=entropy.tolist(),
        num_response=limit if stop is None else stop + 1,
        finish="length" if stop is None else "stop",
        num_forwards=num_forwards,
        weights_version=weights_version,
        block_size=settings.block_size,
    )


@dataclass
class Statistics:
    """What one call of `generate` did."""

    sequences: int = 0
    tokens: int = 0
    """Revealed, those behind stop tokens included."""
    engine_forwards: int = 0
    """Forwards of the model, prefills not counted."""
    sequence_forwards: int = 0
    """Denoising forwards summed over sequences: tokens / sequence_forwards is the tokens per forward."""
    commit_items: int = 0
    """Finished blocks whose keys were stored along with a denoising forward."""
    prefill_tokens: int = 0
    """Padding included."""
    stalled: int = 0
    """Times that a sequence sat a forward out because its capacities were used up (the paged engine)."""
    graphs: int = 0
    """CUDA graphs that were captured, those of earlier calls not counted."""
    capture_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.sequence_forwards if self.sequence_forwards else 0.0

    @property
    def mean_active(self) -> float:
        """Sequences in an average forward."""
        return self.sequence_forwards / self.engine_forwards if self.engine_forwards else 0.0


class Generation(Protocol):
    """One call of `generate`, as an engine does it."""

    rollouts: dict[tuple[int, int], Rollout]
    """What is finished, by (request, sample)."""

    def admit(self) -> bool:
        """Fill free slots with sequences from the queue. Returns whether any sequence is in flight."""

    def advance(self) -> None:
        """One forward of the model, and what it ended."""

    def finish(self) -> None:
        """Nothing is in flight any more: complete `rollouts`."""


class Engine(ABC):
    """An attention kind's way to sample. It reads the decoder's own weights: an update of them is seen by the next call."""

    def __init__(self, decoder: Decoder, family: Family, max_active: int = 256) -> None:
        if max_active < 1:
            raise UserError(f"rollout.max_active: got {max_active}, must be at least 1")
        self.decoder, self.family, self.max_active = decoder, family, max_active
        self.statistics = Statistics()
        """Of the last call of `generate`."""

    # no_grad, not inference mode: the weights are the trainer's, or are gathered inside (ZeRO-3) and used for training later.
    @torch.no_grad()
    def generate(
        self,
        requests: list[Request],
        settings: SamplingSettings,
        weights_version: int = 0,
        progress: Progress | None = None,
        queue: WorkQueue | None = None,
    ) -> list[Rollout]:
        """Rollouts in the order of requests, then of samples. Raises UserError for a request that can never be served.

        queue: hands out the samples of `requests` that are this engine's (other ranks take others); None: all are. The engine
        has at most `queue.share` sequences in flight, calls `queue.take(room)` whenever it has room, and is done when that says
        None and nothing is in flight. The result holds what it was handed. `Request.limit` is how long a response may be.
        """
        started = time.perf_counter()
        self.statistics = statistics = Statistics()
        queue = queue or ListQueue(requests)
        if queue.share == 0:
            return []
        check_prompts(requests, self.decoder.config.vocab_size)
        generation = self.begin(requests, settings, weights_version, queue, min(self.max_active, queue.share))
        while generation.admit():
            generation.advance()
            statistics.seconds = time.perf_counter() - started
            if progress is not None:
                progress(statistics.sequences, statistics.tokens, statistics.sequence_forwards)
        generation.finish()
        statistics.seconds = time.perf_counter() - started
        return [rollout for _, rollout in sorted(generation.rollouts.items())]

    @abstractmethod
    def begin(
        self, requests: list[Request], settings: SamplingSettings, weights_version: int, queue: WorkQueue, num_slots: int
    ) -> Generation:
        """Have the memory that the call needs, with at most `num_slots` sequences in flight."""

    @abstractmethod
    def release(self) -> None:
        """Free the cache; the next `generate` takes it back."""


def check_prompts(requests: list[Request], vocab_size: int) -> None:
    """Raises UserError for a token id that the model does not have."""
    for request in requests:
        if not all(0 <= token < vocab_size for token in request.prompt_ids):
            raise UserError(f"prompt of task {request.task_id}: token ids must be below the vocabulary's {vocab_size}")


def build_engine(decoder: Decoder, family: Family, max_active: int = 256, engine: str = "auto") -> Engine:
    """The engine of the family's attention kind, with at most `max_active` sequences in flight.

    engine: `rollout.engine`. torch: plain torch; triton: kernels and CUDA graphs (on a CPU their torch references, for tests);
    auto: triton on CUDA where the attention kind has such an engine and triton is installed, else torch. Raises UserError.
    """
    on_cuda, has_triton = decoder.device.type == "cuda", importlib.util.find_spec("triton") is not None
    if engine == "auto":
        engine = "triton" if on_cuda and has_triton and family.attention in KERNEL_ENGINES else "torch"
    if engine == "triton":
        if on_cuda and not has_triton:
            raise UserError("rollout.engine: triton is not installed: pip install triton, or set rollout.engine=torch")
        return KERNEL_ENGINES.get(family.attention, "rollout.engine=triton")(decoder, family, max_active)
    return ENGINES.get(family.attention)(decoder, family, max_active)


@contextmanager
def progress_bar(num_sequences: int, description: str = "rollout", enabled: bool = True) -> Iterator[Progress | None]:
    """A tqdm bar over sequences with tokens/s and tokens per forward: `with progress_bar(n) as p: generate(..., progress=p)`."""
    if not enabled:
        yield None
        return
    from tqdm import tqdm

    started = time.perf_counter()
    # Only on a terminal, and only where it takes long enough to be read.
    with tqdm(total=num_sequences, desc=description, unit="seq", leave=False, disable=None, delay=1.0) as bar:

        def update(finished: int, tokens: int, forwards: int) -> None:
            rate = tokens / max(time.perf_counter() - started, 1e-9)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s, {tokens / max(forwards, 1):.2f} tokens/forward", refresh=False)
            bar.update(finished - bar.n)

        yield update
