"""Checks of the update's settings (configs/checks.py has those of all others). Nothing here imports torch."""

from __future__ import annotations

from common.errors import UserError, warn_once
from configs.schema import Config


def check_training(config: Config, job: str) -> None:
    t, bounds = config.training, config.reward.keep_solve_rate
    if t.lower_p > t.upper_p:
        raise UserError(f"training.lower_p: got {t.lower_p}, must be at most training.upper_p, which is {t.upper_p}")
    if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] <= 1:
        raise UserError(f"reward.keep_solve_rate: got {bounds}, must be two shares from 0 to 1, the lower one first")
    peak, again = config.optimizer.params.policy_learning_rate, config.lr_scheduler.params.learning_rate
    if again not in (peak, config.optimizer.params.learning_rate):
        raise UserError(
            f"lr_scheduler.params.learning_rate: got {again}, but optimizer.params says {peak}: they are one setting, "
            "set the latter"
        )
    if config.model.value_base_model is None and config.optimizer.params.learning_rate != peak:
        raise UserError(
            f"optimizer.params.learning_rate: got {config.optimizer.params.learning_rate}, but policy_learning_rate is {peak}: "
            "without model.value_base_model they are one setting, give only one of them"
        )
    if job == "eval":
        return
    if config.model.dtype == "bfloat16" and t.mixed_precision == "no":
        raise UserError(
            "model.dtype: got bfloat16 with training.mixed_precision=no, which is float32 throughout: set mixed_precision to bf16, "
            "bfloat16 weights with float32 masters, or leave dtype out"
        )
    _check_masks(config, job)
    if job == "rl" and t.num_updates_per_step is not None:
        warn_of_warmup(config, config.experiment.total_step * t.num_updates_per_step)


def _check_masks(config: Config, job: str) -> None:
    """That what is said of random masks has a meaning for the method, and that 1/ratio is weighed by once."""
    from models.registry import FAMILIES
    from train.methods import METHODS

    t = config.training
    drawing, trace = "semi-ar" if job == "sft" else "random_masking", METHODS.get(t.method).trace
    for key in ["complementary_mask", "loss_weight_by_ratio"]:
        if getattr(t, key) and trace in ("trace", "next_token"):
            raise UserError(f"training.{key}: got true, but method {t.method} draws no masks: choose {drawing}, or leave it out")
        if getattr(t, key) and trace == "coupled_mask":
            why = "has the complement of every mask already" if key == "complementary_mask" else "weighs all its tokens alike"
            raise UserError(f"training.{key}: got true, but method {t.method} {why}: choose {drawing}, or leave it out")
    if not t.loss_weight_by_ratio:
        return
    got = f"training.loss_weight_by_ratio: got true with loss_weighting={t.loss_weighting}"
    is_full = FAMILIES.get(config.model.model_base).attention == "full"
    if t.loss_weighting == "step" or (t.loss_weighting == "reference" and is_full):
        mean = "for full attention is the mean over the masked tokens of a row" if is_full else "is a mean over masked tokens"
        raise UserError(f"{got}, which {mean} and weighs by 1/ratio already: choose loss_weighting constant")
    if t.loss_weighting == "response" and not t.complementary_mask:
        raise UserError(
            f"{got}, which divides by the number of masked tokens of a response, and that differs from draw to draw: choose "
            "loss_weighting constant, or complementary_mask, with which every token is masked as often"
        )


def warn_of_warmup(config: Config, num_updates: int) -> None:
    """num_updates: optimizer steps of the whole run."""
    warmup = config.lr_scheduler.params.warmup_steps
    if warmup > num_updates:
        warn_once(
            f"lr_scheduler.params.warmup_steps={warmup}: the run has {num_updates} optimizer step{'s' * (num_updates != 1)}, so "
            "the learning rate never reaches its peak"
        )


def check_training_blocks(config: Config, job: str) -> None:
    """Block models: that the blocks of the update are those that the run's checkpoints will say, and hold whole sampled ones. What
    the checkpoint at the start says is compared when it is read (models/checkpoint.py, check_block_size)."""
    from models.registry import FAMILIES
    from train.methods import METHODS

    size, becomes, sampled = config.training.block_size, config.model.block_size, config.rollout.block_size
    got = f"training.block_size: got {size}{', as rollout.block_size is' if job == 'rl' and size == sampled else ''}"
    if job == "eval" or FAMILIES.get(config.model.model_base).attention != "block":
        return
    if becomes is not None and size != becomes:
        raise UserError(
            f"{got}, but model.block_size says that the run's checkpoints are of blocks of {becomes}: set it to {becomes} too"
        )
    if job == "rl" and METHODS.get(config.training.method).follows_steps and size % sampled:
        raise UserError(
            f"training.block_size: got {size}, must be a multiple of rollout.block_size, which is {sampled}: "
            "a block that is trained holds the steps of whole blocks that were sampled"
        )


def check_engine_logprobs(config: Config, is_sampled: bool, attention: str) -> None:
    """The engine's log-probs mean something to the trainer only where it trains the very slices that were sampled."""
    t = config.training
    is_single = t.num_updates_per_step == 1
    if t.importance_cap is not None and (t.old_logprobs == "engine" or (t.old_logprobs == "current" and not is_single)):
        raise UserError(
            f"training.importance_cap: got {t.importance_cap!r} with training.old_logprobs={t.old_logprobs}, but it weighs the "
            "trainer's log-probs before the update against the engine's: use old_logprobs trainer or auto"
        )
    if (
        t.beta
        and t.kl_to == "old"
        and t.use_kl_estimator_k3
        and (t.old_logprobs == "current" or (t.old_logprobs == "auto" and is_single))
    ):
        warn_once(
            f"training.beta={t.beta} holds to the old policy, which is the current one in every update here: the term has no "
            "gradient; set training.kl_to=reference, or several updates per step"
        )
    cache = config.rollout.cache_kind
    if attention == "full" and t.old_logprobs == "engine" and cache != "none":
        raise UserError(
            f"training.old_logprobs: got 'engine' with a {cache} cache, but caches of full-attention models are approximate, so "
            "the engine's log-probs are not the trainer's: use trainer or auto, or rollout.cache=none"
        )
    for key, is_asked in [("old_logprobs", t.old_logprobs == "engine"), ("importance_cap", t.importance_cap is not None)]:
        if is_asked and not is_sampled:
            width = "max_gen_length" if attention == "full" else "block_size"
            raise UserError(
                f"training.{key}: got {getattr(t, key)!r}, which needs the log-probs of sampling, but training.method="
                f"{t.method}, shrink={t.shrink}, {width}={getattr(t, width)} trains other slices than were sampled: leave it out"
            )


def check_lora(config: Config, job: str) -> None:
    from models.lora_targets import resolve_targets
    from models.registry import FAMILIES

    lora = config.training.lora
    if job == "eval" or not lora.rank:
        return
    resolve_targets(FAMILIES.get(config.model.model_base), lora.target_modules)
    for key in ("pretrained_model", "value_base_model"):
        if getattr(config.model, key) == "tiny-random":
            raise UserError(
                f"training.lora.rank: got {lora.rank}, but model.{key} is tiny-random, which every job makes anew: "
                "an adapter needs a base on disk"
            )
    if job == "rl" and lora.dropout:
        raise UserError(f"training.lora.dropout: got {lora.dropout}, must be 0 for RL: what is trained has to be what was sampled")
