"""A language model as judge: process rewards, chunk by chunk, or one grade for the response (RLHF): docs/judge.md.

    python -m reward.judge serve-command --model PATH [--engine vllm|sglang] [--port 8000]

prints the command that starts a judge. `JudgedReward` wraps the reward of the data type and adds to it:

    reward        = reward.judge.outcome_weight * outcome + reward.judge.weight * (mean of the chunks' scores over tokens)
    token_rewards = reward.judge.weight * (score of the token's chunk), by default divided by the number of denoising steps

Nothing here imports torch, unless the judge runs here.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shlex
import socket
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

from common.errors import UserError, entry_point, warn
from common.launch import world_size
from common.records import Rollout
from reward.advantages import drop_reason, group_indices
from reward.judge_cache import FOLDER, JudgementCache, judgement_key
from reward.judge_client import ChatClient, Judge, JudgeRequest, Sampling
from reward.judge_prompts import NEUTRAL_SCORE, WORST_SCORE, GradingPrompt, make_mark, parse_verdict
from reward.judge_scores import Chunk, aggregate, cut_into_chunks, disagree, response_score, spread_over_tokens
from reward.registry import Progress, ResponseToScore, Reward, Score

TEMPLATE_TOKENS = 500
"""Of a grading prompt beside the texts it shows, generously."""
TOKENS_PER_TOKEN = 1.25
"""The judge's tokens for one of ours, guessed high; a judge that finds a prompt too long gets a shorter one."""


def judge_is_set(config: Any) -> bool:
    """Whether the config names a judge."""
    judge = getattr(config.reward, "judge", None)
    return judge is not None and (judge.base_url is not None or config.model.process_reward_model is not None)


# ---- the reward --------------------------------------------------------------------------------------------------------


class NoOutcome(Reward):
    """data_type `judge`: nothing to compare with, the judge alone scores (RLHF)."""

    answer_field = None
    has_outcome = False

    def score(self, responses: Sequence[ResponseToScore], progress: Progress | None = None) -> list[Score]:
        return [Score(0.0) for _ in responses]


class JudgedReward(Reward):
    """The reward `outcome`, and what the judge makes of the responses on top of it."""

    def __init__(
        self, outcome: Reward, config: Any, tokenizer: Any, is_overlong: Callable[[Rollout], bool] = lambda rollout: False
    ) -> None:
        """`is_overlong`: responses that count as wrong for their length; they are not shown to the judge."""
        super().__init__(config.reward)
        self.outcome, self.tokenizer, self.is_overlong = outcome, tokenizer, is_overlong
        self.filter_by_solve_rate, self.has_outcome = outcome.filter_by_solve_rate, outcome.has_outcome
        self.judge_settings, self.model_settings = config.reward.judge, config.rollout.reward_model
        self.keep_solve_rate = tuple(config.reward.keep_solve_rate) if self.filter_by_solve_rate else (0.0, 1.0)
        self.sampling = Sampling(self.model_settings.temperature, self.model_settings.max_generation_token)
        self.rank, self.num_processes = int(os.environ.get("RANK") or 0), world_size()
        self.judge = make_judge(config, self.sampling, self.num_processes)
        project = config.experiment.project
        self.folder = Path(project) / FOLDER if project is not None else None
        self._cache: JudgementCache | None = None
        self._counts: Counter[str] = Counter()
        if isinstance(self.judge, ChatClient) and self.rank == 0 and (problem := self.judge.problem()):
            warn(f"the judge at {self.judge.url} does not answer now ({problem}): it is needed when the first responses are graded")

    @property
    def cache(self) -> JudgementCache:
        """Opened on first use: the run directory must have been made by then."""
        if self._cache is None:
            self._cache = JudgementCache(self.folder, self.rank)
        return self._cache

    def close(self) -> None:
        self.outcome.close()
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    # -- scoring

    def score(self, responses: Sequence[ResponseToScore], progress: Progress | None = None) -> list[Score]:
        """Not judged: responses of groups that are dropped for their solve rate anyway, and over-long ones (the worst score)."""
        outcomes = self.outcome.score(responses, progress)
        overlong = [self.is_overlong(r.rollout) for r in responses]
        dropped = self._dropped(responses, outcomes, overlong)
        places = [n for n in range(len(responses)) if not overlong[n] and not dropped[n]]
        chunks = {n: self._chunks(responses[n]) for n in places}
        prompts = [(n, c, prompt) for n in places for c, prompt in enumerate(self._prompts(responses[n], chunks[n]))]
        started = time.perf_counter()
        judgements = self._judge([prompt for *_, prompt in prompts], progress)

        settings, scores = self.judge_settings, {n: [NEUTRAL_SCORE] * len(chunks[n]) for n in places}
        for (n, c, _), given in zip(prompts, judgements):
            scores[n][c] = aggregate(given, settings.aggregate)
            self._counts["graded"] += 1
            self._counts["score"] += scores[n][c]
            self._counts["disagreements"] += disagree(given)
        self._counts["seconds"] += time.perf_counter() - started

        result = []
        for n, (response, outcome) in enumerate(zip(responses, outcomes)):
            if overlong[n]:  # what the length rule then makes of it stays the worst
                reward = settings.outcome_weight * min(outcome.reward, 0.0) + settings.weight * WORST_SCORE
                result.append(dataclasses.replace(outcome, reward=reward, token_rewards=None, outcome=0.0))
            elif dropped[n]:
                result.append(self._combine(response.rollout, outcome, [], []))
            else:
                result.append(self._combine(response.rollout, outcome, chunks[n], scores[n]))
        return result

    def _dropped(self, responses: Sequence[ResponseToScore], outcomes: Sequence[Score], overlong: Sequence[bool]) -> list[bool]:
        """Whether the response's group is dropped for its solve rate, whatever the judge says."""
        dropped = [False] * len(responses)
        for members in group_indices([r.task.id for r in responses]).values():
            correct = [None if outcomes[n].correct is None else outcomes[n].correct and not overlong[n] for n in members]
            # Rewards that differ: only the solve rate can be a reason.
            if drop_reason([0.0, 1.0], correct, self.keep_solve_rate) is not None:
                for n in members:
                    dropped[n] = True
        return dropped

    def _combine(self, rollout: Rollout, outcome: Score, chunks: Sequence[Chunk], scores: Sequence[float]) -> Score:
        settings = self.judge_settings
        judged = settings.weight * response_score(chunks, scores)
        own = None if outcome.token_rewards is None else [settings.outcome_weight * r for r in outcome.token_rewards]
        last = settings.outcome_weight * (outcome.reward if own is None else outcome.outcome)
        token_rewards = own
        if settings.granularity == "chunk":
            spread = spread_over_tokens(rollout, chunks, [settings.weight * score for score in scores], settings.per_step)
            token_rewards = spread if own is None else [a + b for a, b in zip(own, spread)]
        elif own is not None:
            last += judged
        return dataclasses.replace(
            outcome,
            reward=settings.outcome_weight * outcome.reward + judged,
            token_rewards=token_rewards,
            outcome=0.0 if token_rewards is None else last,
        )

    # -- prompts

    def _chunks(self, response: ResponseToScore) -> list[Chunk]:
        rollout = response.rollout
        ids = rollout.response_ids[: rollout.num_response]
        num_text = len(ids) - (rollout.finish == "stop")

        def decode(part: Sequence[int]) -> str:
            return self.tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)

        return cut_into_chunks(ids, num_text, self.model_settings.reward_chunk_length, decode)

    def _prompts(self, response: ResponseToScore, chunks: list[Chunk]) -> Iterator[GradingPrompt]:
        """One per chunk, or one for the response, in which case all its chunks become one in `chunks`. None for a blank text."""
        task, settings = response.task, self.judge_settings
        text = "".join(chunk.text for chunk in chunks)
        shared = {
            "question": task.question,
            "mark": make_mark(text),
            "answer": task.answer if settings.show_answer else None,
            "rubric": settings.rubric,
        }
        room = self.model_settings.max_model_len - self.model_settings.max_generation_token - TEMPLATE_TOKENS
        room = int(room / TOKENS_PER_TOKEN) - len(response.rollout.prompt_ids)
        if settings.granularity == "response":
            first = _first_that_fits(chunks, len(chunks) - 1, room)
            part = "".join(chunk.text for chunk in chunks[first:])
            chunks[:] = [Chunk(0, chunks[-1].end, text)] if chunks else []
            if text.strip():
                yield GradingPrompt(**shared, part=part, whole=True, cut=first > 0)
            return
        for c, chunk in enumerate(chunks):
            if not chunk.text.strip():
                assert c == 0, "a later blank chunk has been joined"
                continue
            first = _first_that_fits(chunks, c, room)
            so_far = "".join(one.text for one in chunks[first:c])
            yield GradingPrompt(**shared, part=chunk.text, so_far=so_far, cut=first > 0)

    # -- judgements

    def _judge(self, prompts: Sequence[GradingPrompt], progress: Progress | None) -> list[list[float | None]]:
        """`k_sample` judgements of each prompt, from the cache or the judge. A reply without a verdict is asked for again."""
        if not prompts:
            return []
        cache, k = self.cache, self.model_settings.k_sample
        with self._nothing_is_lost():
            model = self.judge.name()
        sampling = dataclasses.asdict(self.sampling)
        texts = [prompt.text() for prompt in prompts]
        keys = [[judgement_key(model, text, sampling, sample) for sample in range(k)] for text in texts]
        wanted = {key: prompt for prompt, own in zip(prompts, keys) for key in own}  # equal responses share judgements
        missing = [key for key in wanted if key not in cache]
        num_retries, num_done, num_tries = self.judge.num_retries, len(wanted) - len(missing), 0
        self._counts["wanted"] += len(prompts) * k
        self._counts["asked"] += len(missing)
        last_try = self.judge_settings.nonsense_retries
        with _bar(len(wanted), num_done, self.rank) as advance, self._nothing_is_lost():
            while missing:
                asked, missing = missing, []
                # Another seed each time: the same one would bring the same nonsense.
                requests = [JudgeRequest(wanted[key], int(key[:8], 16) + num_tries & 0x7FFFFFFF) for key in asked]

                def on_reply(index: int, reply: str, asked=asked, missing=missing, tries=num_tries) -> None:
                    nonlocal num_done
                    score = parse_verdict(reply)
                    self._counts["replies"] += 1
                    self._counts["unparsable"] += score is None
                    if score is None and tries < last_try:
                        missing.append(asked[index])
                        return
                    self._counts["neutral"] += score is None
                    cache.put(asked[index], score, reply, tries + 1)
                    num_done += 1
                    advance()
                    if progress is not None:
                        progress(num_done, len(wanted))

                self.judge.complete(requests, on_reply)
                num_tries += 1
        self._counts["retries"] += self.judge.num_retries - num_retries
        num_neutral = sum(cache[key] is None for key in wanted)
        if num_neutral:
            warn(
                f"the judge gave no verdict in {num_neutral:,} of {len(wanted):,} judgements, asked {last_try + 1} times each: "
                "they are left out, and a chunk without any counts as neutral"
            )
        return [[cache[key] for key in own] for own in keys]

    @contextmanager
    def _nothing_is_lost(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            where = f" in {self.folder}" if self.folder is not None else ""
            raise UserError(f"{error}. Nothing is lost: {len(self.cache):,} judgements are kept{where}") from None

    # -- numbers

    def take_counts(self) -> dict[str, float]:
        counts, self._counts = dict(self._counts), Counter()
        return {**counts, "processes": 1, **self.outcome.take_counts()}

    def metrics(self, counts: dict[str, float] | None = None) -> dict[str, float]:
        """judge/*: see docs/judge.md."""
        counts = Counter(self.take_counts() if counts is None else counts)
        metrics = self.outcome.metrics(counts)
        if not counts["wanted"]:
            return metrics
        return {
            **metrics,
            "judge/score": counts["score"] / counts["graded"],
            "judge/disagreement_share": counts["disagreements"] / counts["graded"],
            "judge/num_judgements": counts["asked"],
            "judge/cache_hit_share": 1 - counts["asked"] / counts["wanted"],
            "judge/unparsable_share": counts["unparsable"] / counts["replies"] if counts["replies"] else 0.0,
            "judge/num_without_verdict": counts["neutral"],
            "judge/num_retries": counts["retries"],
            "judge/seconds": counts["seconds"] / counts["processes"],
        }


def _first_that_fits(chunks: Sequence[Chunk], last: int, room: int) -> int:
    """The first of the chunks up to `last`, that one always included, whose tokens together stay within `room`."""
    first = max(last, 0)
    while first > 0 and chunks[last].end - chunks[first - 1].start <= room:
        first -= 1
    return first


@contextmanager
def _bar(total: int, done: int, rank: int) -> Iterator[Callable[[], Any]]:
    """A bar over judgements, on a terminal, where it takes long enough to be read; yields what moves it by one."""
    from tqdm import tqdm

    disable = None if rank == 0 else True
    with tqdm(total=total, initial=done, desc="judge", unit="grade", leave=False, disable=disable, delay=1.0) as bar:
        yield bar.update


def make_judge(config: Any, sampling: Sampling, num_processes: int = 1) -> Judge:
    """The endpoint, or the model to run here."""
    judge, path = config.reward.judge, config.model.process_reward_model
    if judge.base_url is None:
        from reward.local_judge import LocalJudge

        return LocalJudge(path, sampling, config.rollout.reward_model.max_model_len, judge.concurrency)
    return ChatClient(
        judge.base_url,
        sampling,
        model=judge.model or path,
        api_key_env=judge.api_key_env,
        concurrency=math.ceil(judge.concurrency / num_processes),
        timeout_seconds=judge.timeout_seconds,
        retry_seconds=judge.retry_seconds,
    )


# ---- serve-command -----------------------------------------------------------------------------------------------------

ENGINES = {
    "vllm": "vllm serve {model} --port {port} --max-model-len {length} --tensor-parallel-size {gpus}",
    "sglang": "python -m sglang.launch_server --model-path {model} --port {port} --context-length {length} --tp-size {gpus}",
}


def serve_command(engine: str, model: str, port: int, max_model_len: int, num_gpus: int) -> str:
    return ENGINES[engine].format(model=shlex.quote(model), port=port, length=max_model_len, gpus=num_gpus)


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    from configs.schema import RewardModel

    parser = argparse.ArgumentParser(prog="python -m reward.judge", description="Helps with the judge (docs/judge.md).")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve-command", help="print the command that starts a judge")
    serve.add_argument("--model", required=True, help="path or hub name")
    serve.add_argument("--engine", choices=sorted(ENGINES), default="vllm")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--num-gpus", type=int, default=1, help="GPUs that share the model")
    serve.add_argument(
        "--max-model-len", type=int, default=RewardModel().max_model_len, help="as rollout.reward_model.max_model_len (tokens)"
    )
    arguments = parser.parse_args(argv)
    print(serve_command(arguments.engine, arguments.model, arguments.port, arguments.max_model_len, arguments.num_gpus))
    # On stderr: the command can be taken with $(...)
    print(
        f"then train with reward.judge.base_url=http://{socket.gethostname()}:{arguments.port}/v1 "
        f"reward.judge.model={shlex.quote(arguments.model)}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
