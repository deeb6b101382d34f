"""Checks of how responses are decoded, in rollouts and evaluations (configs/checks.py has those of all others). Nothing here
imports torch."""

from __future__ import annotations

import math
from typing import Any, Iterator

from common.errors import UserError, warn_once
from common.registry import Registry
from configs.schema import Config, Decoding


def check_registered(registry: Registry, name: str, key: str) -> None:
    if name not in registry:  # `get` alone would import the entry, and torch with it
        registry.get(name, key)


def check_lists(config: Config) -> None:
    """The lists run one evaluation each: their lengths are equal, or 1."""
    lists = {name: getattr(config.evaluation, name) for name in ["remasking_strategy", "top_k", "block_size"]}
    for name, values in lists.items():
        if not values:
            raise UserError(f"evaluation.{name}: got an empty list, must hold at least one")
    longest = max(lists, key=lambda name: len(lists[name]))
    for name, values in lists.items():
        if len(values) not in (1, len(lists[longest])):
            raise UserError(
                f"evaluation.{name}: got {len(values)} values beside {len(lists[longest])} of evaluation.{longest}: "
                "each place runs one evaluation, so give as many, or one for all"
            )


def _decodings(config: Config, job: str) -> Iterator[tuple[str, Any]]:
    """The decodings that the job samples with, and the sections that they are from."""
    if job == "rl":
        yield "rollout", config.rollout
    for variant in config.evaluation.variants() if evaluates(config, job) else []:
        yield "evaluation", variant


def evaluates(config: Config, job: str) -> bool:
    return job == "eval" or (config.evaluation.if_eval and config.dataset.eval_dataset is not None)


def check_decoding(config: Config, job: str) -> None:
    from models.registry import FAMILIES
    from sample.registry import TARGETS, THRESHOLDED, UNMASKING

    is_block = FAMILIES.get(config.model.model_base).attention == "block"
    if config.model.block_size is not None and not is_block:
        raise UserError(
            f"model.block_size: got {config.model.block_size}, but {config.model.model_base} is no block model: leave it out"
        )
    unused: dict[str, None] = {}  # in order, each once
    for section, d in _decodings(config, job):
        check_registered(UNMASKING, d.remasking_strategy, f"{section}.remasking_strategy")
        check_registered(TARGETS, d.target, f"{section}.target")
        if d.remasking_strategy == THRESHOLDED:
            _check_threshold(section, d, is_as_rollout=job != "eval" and d.dynamic_threshold == config.rollout.dynamic_threshold)
        if is_block:
            _check_blocks(section, d)
        else:
            _check_canvas(section, d)
        others = {**ONLY_FULL, "steps": d.max_token} if is_block else {"denoising_steps_per_block": d.block_size}
        unused |= dict.fromkeys(f"{section}.{name}" for name, default in others.items() if getattr(d, name) != default)
    if unused:
        kind = "block" if is_block else "full"
        warn_once(f"settings that have no use, as {config.model.model_base} has {kind} attention: {', '.join(unused)}")


ONLY_FULL = {
    "use_cache": True,
    "cache": None,
    "further_horizon": None,
    "stop_early": False,
    "alg_temp": 0.0,
    "pad_target_penalty": 1.0,
}
"""Settings of decoding that full attention alone has, and their defaults."""


def _check_threshold(section: str, d: Any, is_as_rollout: bool) -> None:
    """Scores are compared with it, so it lies where they do."""
    from sample.registry import SCORE_RANGES

    low, high = SCORE_RANGES.get(d.target, (0.0, 1.0))
    if low <= d.dynamic_threshold <= high:
        return
    from_where = ","
    if d.dynamic_threshold == Decoding.dynamic_threshold:
        from_where = ", the default,"
    elif section == "evaluation" and is_as_rollout:
        from_where = ", as in rollout,"
    meant = f"{high:g} or less" if low == -math.inf else f"{low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"
    raise UserError(
        f"{section}.dynamic_threshold: got {d.dynamic_threshold}{from_where} must be {meant} with {section}.target={d.target}, "
        "where its scores lie"
    )


def _check_blocks(section: str, d: Any) -> None:
    if d.denoising_steps_per_block > d.block_size:
        raise UserError(
            f"{section}.denoising_steps_per_block: got {d.denoising_steps_per_block}, must be at most {section}.block_size, "
            f"which is {d.block_size}: every forward reveals at least one token"
        )


def _check_canvas(section: str, d: Any) -> None:
    from sample.registry import UNRANKED

    if not d.use_cache and d.cache_kind != "none":
        raise UserError(f"{section}.use_cache: got false, but {section}.cache says {d.cache}: give only one of them")
    if d.further_horizon is not None and d.cache_kind == "none":
        warn_once(
            f"{section}.further_horizon={d.further_horizon} has no use: without a cache every forward is over the whole canvas"
        )
    unused = {name: getattr(d, name) for name in ("alg_temp", "pad_target_penalty") if getattr(d, name) != ONLY_FULL[name]}
    if unused and d.remasking_strategy in UNRANKED:
        given = ", ".join(f"{section}.{name}={value}" for name, value in unused.items())
        warn_once(f"settings that have no use, as remasking_strategy {d.remasking_strategy} ranks by no score: {given}")
    if d.max_token % d.block_size:
        raise UserError(
            f"{section}.max_gen_length: got {d.max_token}, must be a multiple of {section}.block_size, which is {d.block_size}"
        )
    if d.steps > d.max_token:
        raise UserError(
            f"{section}.steps: got {d.steps}, must be at most {section}.max_gen_length, which is {d.max_token}: "
            "every forward reveals at least one token"
        )
    num_blocks = d.max_token // d.block_size
    if d.steps < num_blocks:
        raise UserError(
            f"{section}.steps: got {d.steps}, must be at least {num_blocks}: {section}.max_gen_length={d.max_token} is as many "
            f"blocks of {d.block_size}, and each of them takes a forward"
        )


def draws_positions(config: Config) -> bool:
    """Whether chance decides which positions a rollout's forward reveals: then responses differ even where no token is drawn. Where
    the first forward of a block reveals all of it, there is nothing to choose. Dream's reveals a given position: there it is the
    second that may choose."""
    from models.registry import FAMILIES
    from sample.canvas_schedule import counts_of
    from sample.registry import UNRANKED

    r, family = config.rollout, FAMILIES.get(config.model.model_base)
    is_full, num_given = family.attention == "full", int(family.first_token_from_refresh)
    if is_full:  # where the dynamic strategy has no fixed number; no block has more forwards than the first one
        forwards = counts_of(family.canvas_schedule, r.max_token, r.block_size, r.steps)[0]
        reveals_all = r.remasking_strategy == "low_confidence_static" and len(forwards) - num_given <= 1
    else:
        is_at_least = r.remasking_strategy in ("low_confidence_static", "low_confidence_dynamic")
        reveals_all = is_at_least and r.denoising_steps_per_block == 1
    has_choice = r.block_size - num_given > 1 and not reveals_all
    return has_choice and r.remasking_strategy not in UNRANKED and (r.target == "random" or (is_full and r.alg_temp > 0))
