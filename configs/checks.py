"""Values that a type cannot check: ranges, names in registries, files, and settings that contradict one another.

Every message says the setting, what was got and what is meant. The update's settings: configs/checks_training.py. Nothing here
imports torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Iterator

from common.deepspeed_files import read_deepspeed_file
from common.errors import UserError, warn_once
from common.registry import Registry
from configs.checks_training import check_engine_logprobs, check_lora, check_training, check_training_blocks
from configs.no_use import warn_of_settings_without_use
from configs.schema import Config, get


def _of_decoding(names: str) -> str:
    return " ".join(f"{section}.{name}" for section in ["rollout", "evaluation"] for name in names.split())


RANGES: list[tuple[str, Callable[[Any], bool], str]] = [
    (
        "above 0",
        lambda x: x > 0,
        """
        experiment.total_step experiment.save_every experiment.eval_every experiment.save_state_every
        experiment.train_value_every experiment.current_epoch experiment.num_node experiment.num_processes
        system.ssh_port system.start_timeout_seconds system.silence_timeout_seconds
        model.image_resolution model.block_size
        rollout.num_task_per_step rollout.num_response_per_task rollout.resample_max_rounds
        rollout.reward_model.reward_chunk_length rollout.reward_model.k_sample rollout.reward_model.max_model_len
        rollout.reward_model.max_generation_token
        evaluation.num_response_per_task
        execute.num_chunk execute.memory_mb
        reward.num_workers reward.timeout_seconds
        reward.judge.concurrency reward.judge.timeout_seconds
        training.shrink training.block_size training.mask_times_per_sample training.max_gen_length training.max_prompt_len
        training.eps training.eps_high training.importance_cap training.num_updates_per_step training.num_train_epochs
        training.max_rows_per_response
        training.batch_size_lm training.gradient_accumulation_steps training.max_tokens_per_microbatch training.head_chunk
        training.max_grad_norm training.max_steps training.batch_size training.eval_every
        training.lora.alpha
        optimizer.params.epsilon
        logging.gradient_norms_every
        """
        + _of_decoding("block_size denoising_steps_per_block max_token steps max_active pad_target_penalty"),
    ),
    (
        "0 or more",
        lambda x: x >= 0,
        """
        experiment.node_index
        rollout.reward_model.temperature
        reward.judge.weight reward.judge.outcome_weight reward.judge.retry_seconds reward.judge.nonsense_retries
        reward.overlong_margin reward.overlong_penalty_tokens
        training.post_num training.beta training.value_loss_weight training.lora.rank
        logging.gap_responses
        optimizer.params.learning_rate optimizer.params.policy_learning_rate optimizer.params.value_learning_rate
        optimizer.params.weight_decay
        lr_scheduler.params.learning_rate lr_scheduler.params.warmup_steps
        """
        + _of_decoding("temperature top_k entropy_bound alg_temp further_horizon"),
    ),
    (
        "above 0 and at most 1",
        lambda x: 0 < x <= 1,
        """
        training.stop_at_solve_rate
        """
        + _of_decoding("top_p"),
    ),
    (
        "from 0 to 1",
        lambda x: 0 <= x <= 1,
        """
        training.lower_p training.upper_p training.gam training.lam
        lr_scheduler.params.min_lr_scale
        """,
    ),
    ("at most 1", lambda x: x <= 1, _of_decoding("dynamic_threshold")),
    ("from 0 to 4294967295", lambda x: 0 <= x < 2**32, "training.seed"),  # as NumPy has it
    (
        "from 0 to below 1",
        lambda x: 0 <= x < 1,
        """
        training.validation_share
        optimizer.params.beta1 optimizer.params.beta2 training.lora.dropout
        """,
    ),
]
"""(what is meant, the test, the settings). Nulls pass; of a list every item is tested."""


def check(config: Config, job: str) -> None:
    """Raises UserError for the first setting whose value cannot be meant. Call after plugins are loaded: registries count."""
    for meaning, test, keys in RANGES:
        for key in keys.split():
            value = get(config, key)
            for one in value if isinstance(value, list) else [value]:
                if one is not None and not test(one):
                    raise UserError(f"{key}: got {one!r}, must be {meaning}")
    _check_experiment(config)
    _check_registries(config, job)
    _check_evaluation(config)
    _check_decoding(config, job)
    check_training(config, job)
    check_training_blocks(config, job)
    check_lora(config, job)
    if job == "rl" or _evaluates(config, job):
        _check_judge(config)
    if job == "rl":
        _check_rl(config)
    if job == "sft":
        _check_sft(config)
    warn_of_settings_without_use(config, job)


def _check_experiment(config: Config) -> None:
    e = config.experiment
    if e.node_index >= e.num_node:
        raise UserError(f"experiment.node_index: got {e.node_index}, must be below experiment.num_node, which is {e.num_node}")
    if e.deepspeed_file is None:
        return
    name = e.deepspeed_file
    file = read_deepspeed_file(name)
    machines = file.num_machines
    if machines != e.num_node:
        raise UserError(
            f"experiment.deepspeed_file: got {name}, which is for {machines} machine{'s' * (machines > 1)}, but "
            f"experiment.num_node is {e.num_node}: name the file of {e.num_node}_node, or set num_node to {machines}"
        )
    named = None if file.num_processes is None else file.num_processes // machines
    if named is not None and e.num_processes is not None and e.num_processes > named:
        raise UserError(
            f"experiment.num_processes: got {e.num_processes}, but {name} is for {named} per machine: name the file of "
            f"as many GPUs in experiment.deepspeed_file, or set num_processes to {named} or less"
        )


def _check_registries(config: Config, job: str) -> None:
    """Registries are imported here: the schema must be readable without the rooms."""
    from models.registry import FAMILIES
    from reward.advantages import ADVANTAGES
    from reward.registry import REWARD_FUNCTIONS, REWARDS
    from train.methods import METHODS
    from train.registry import OBJECTIVES

    _registered(FAMILIES, config.model.model_base, "model.model_base")
    _registered(REWARDS, config.dataset.data_type, "dataset.data_type")
    function = config.reward.function
    if function is not None and ".py" in function:
        path, _, name = function.rpartition(":")
        if not path.endswith(".py") or not name:
            raise UserError(f"reward.function: got {function!r}, meant is path/to/file.py:name, or a registered name")
        if not Path(path).is_file():
            raise UserError(f"reward.function: got {function!r}, but there is no file {path}")
    elif function is not None and function not in REWARD_FUNCTIONS:
        _registered(REWARDS, function, "reward.function")
    _registered(ADVANTAGES, config.training.advantage, "training.advantage")
    if job != "eval":
        _registered(METHODS, config.training.method, "training.method")
        if config.training.objective is not None:
            _registered(OBJECTIVES, config.training.objective, "training.objective")
        method, family = METHODS.get(config.training.method), FAMILIES.get(config.model.model_base)
        if not method.fits(job):
            fitting = [name for name in METHODS if METHODS.get(name).fits(job) and _predicts_as(METHODS.get(name), family)]
            raise UserError(
                f"training.method: got {config.training.method!r}, which is a method of {method.stage}, "
                f"must be one of {', '.join(fitting)}"
            )
        if not _predicts_as(method, family):
            raise UserError(
                f"training.method: got {config.training.method!r}, which trains a token at the position before it, but "
                f"{config.model.model_base} predicts it at its own: choose random_masking or semi-ar"
            )
        if job == "rl":
            check_engine_logprobs(config, method.is_sampled(config.training, config.rollout, family.attention), family.attention)
        has_judge = config.reward.judge.base_url is not None or config.model.process_reward_model is not None
        if has_judge and (config.model.value_shared or config.model.value_base_model is not None) and method.trace != "trace":
            warn_once(
                f"training.method={config.training.method} with a judge and a value model: tokens that no mask predicts take their "
                "rewards out of the returns; TraceRL leaves none out"
            )


def _predicts_as(method: Any, family: Any) -> bool:
    """Whether the family predicts tokens where the method trains them."""
    return method.trace != "next_token" or family.logit_shift == 1


def _registered(registry: Registry, name: str, key: str) -> None:
    if name not in registry:  # `get` alone would import the entry, and torch with it
        registry.get(name, key)


def _check_evaluation(config: Config) -> None:
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
    for variant in config.evaluation.variants() if _evaluates(config, job) else []:
        yield "evaluation", variant


def _evaluates(config: Config, job: str) -> bool:
    return job == "eval" or (config.evaluation.if_eval and config.dataset.eval_dataset is not None)


def _check_decoding(config: Config, job: str) -> None:
    from models.registry import FAMILIES
    from sample.registry import TARGETS, UNMASKING

    is_block = FAMILIES.get(config.model.model_base).attention == "block"
    if config.model.block_size is not None and not is_block:
        raise UserError(
            f"model.block_size: got {config.model.block_size}, but {config.model.model_base} is no block model: leave it out"
        )
    unused: dict[str, None] = {}  # in order, each once
    for section, d in _decodings(config, job):
        _registered(UNMASKING, d.remasking_strategy, f"{section}.remasking_strategy")
        _registered(TARGETS, d.target, f"{section}.target")
        _check_threshold(section, d)
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


def _check_threshold(section: str, d: Any) -> None:
    """Scores are compared with it, so it lies where they do."""
    from sample.registry import NEGATIVE_TARGETS

    got = f"{section}.dynamic_threshold: got {d.dynamic_threshold}"
    if d.target not in NEGATIVE_TARGETS:
        if d.dynamic_threshold < 0:
            raise UserError(f"{got}, must be from 0 to 1 with {section}.target={d.target}")
    elif d.dynamic_threshold > 0 and d.remasking_strategy == "low_confidence_dynamic":
        raise UserError(
            f"{got}, must be 0 or less with {section}.target={d.target}: its scores are entropies in nats, negated, so none is "
            "above it; give -0.5, say"
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


def _check_judge(config: Config) -> None:
    from reward.judge_client import split_url
    from reward.registry import scoring_reward

    judge, lengths = config.reward.judge, config.rollout.reward_model
    data_type, function = config.dataset.data_type, config.reward.function
    if judge.base_url is None and config.model.process_reward_model is None:
        scoring = scoring_reward(data_type, function)
        if scoring is not None and not scoring.has_outcome:
            key, name = ("dataset.data_type", data_type) if function is None else ("reward.function", function)
            raise UserError(f"{key}: got {name!r}, but there is none: set reward.judge.base_url, or model.process_reward_model")
        return
    if judge.base_url is not None:
        split_url(judge.base_url)
    if lengths.max_generation_token >= lengths.max_model_len:
        raise UserError(
            f"rollout.reward_model.max_generation_token: got {lengths.max_generation_token}, must be below max_model_len, "
            f"which is {lengths.max_model_len}: the judge has to read something"
        )
    if judge.weight == 0:
        raise UserError("reward.judge.weight: got 0.0, but there is a judge: leave it out, or give it a weight")


def _check_rl(config: Config) -> None:
    r, t, m = config.rollout, config.training, config.model
    if config.evaluation.if_eval and config.dataset.eval_dataset is None:
        raise UserError("dataset.eval_dataset: is missing: name the tasks to evaluate on, or set evaluation.if_eval=false")
    if config.reward.overlong_margin is not None and config.reward.overlong_margin >= r.max_token:
        raise UserError(
            f"reward.overlong_margin: got {config.reward.overlong_margin}, must be below rollout.max_token, "
            f"which is {r.max_token}: every response would count as over-long"
        )
    if config.reward.overlong_penalty_tokens > r.max_token:
        raise UserError(
            f"reward.overlong_penalty_tokens: got {config.reward.overlong_penalty_tokens}, must be at most rollout.max_token, "
            f"which is {r.max_token}: it counts back from there"
        )
    has_value = m.value_base_model is not None or m.value_shared
    if m.value_shared and m.value_base_model is not None:
        raise UserError(
            f"model.value_shared: got true beside model.value_base_model={m.value_base_model}: the value head sits on the "
            "policy's trunk or on a model of its own, give only one of them"
        )
    if m.value_shared and config.experiment.train_value_every != 1:
        raise UserError(
            f"experiment.train_value_every: got {config.experiment.train_value_every}, but with model.value_shared the value head "
            "is trained by the policy's own update: leave it out"
        )
    if r.num_response_per_task == 1 and not has_value:
        raise UserError(
            "rollout.num_response_per_task: got 1, must be at least 2 without a value model: "
            "advantages compare the responses of a task"
        )
    if (r.temperature == 0 or r.top_k == 1) and not _draws_positions(config) and not has_value:
        greedy = "rollout.temperature: got 0.0" if r.temperature == 0 else "rollout.top_k: got 1"
        raise UserError(f"{greedy}: all responses of a task would be the same, and nothing be learnt: RL needs sampling")
    if m.value_base_model is not None and m.optimized_name == m.optimized_value_name:
        raise UserError(
            f"model.optimized_value_name: got {m.optimized_value_name!r}, which is model.optimized_name too: "
            "the value model would overwrite the policy"
        )
    if t.max_gen_length < r.max_token:
        warn_once(
            f"training.max_gen_length ({t.max_gen_length}) is below rollout.max_token ({r.max_token}): "
            "longer responses are cut before they are trained on"
        )


def _draws_positions(config: Config) -> bool:
    """Whether chance decides which positions a rollout's forward reveals: then responses differ even where no token is drawn. Where
    the first forward of a block reveals all of it, there is nothing to choose."""
    from models.registry import FAMILIES
    from sample.registry import UNRANKED

    r, is_full = config.rollout, FAMILIES.get(config.model.model_base).attention == "full"
    if is_full:  # where the dynamic strategy has no fixed number
        reveals_all = r.remasking_strategy == "low_confidence_static" and r.steps == r.max_token // r.block_size
    else:
        is_at_least = r.remasking_strategy in ("low_confidence_static", "low_confidence_dynamic")
        reveals_all = is_at_least and r.denoising_steps_per_block == 1
    has_choice = r.block_size > 1 and not reveals_all
    return has_choice and r.remasking_strategy not in UNRANKED and (r.target == "random" or (is_full and r.alg_temp > 0))


def _check_sft(config: Config) -> None:
    t = config.training
    for key in ["value_base_model", "value_shared"]:
        if getattr(config.model, key):
            raise UserError(f"model.{key}: got {getattr(config.model, key)!r}, but finetuning has no value model: leave it out")
    if t.validation_share and config.dataset.validation_data is not None:
        raise UserError(
            f"training.validation_share: got {t.validation_share}, but dataset.validation_data names the held-out data: "
            "give only one of them"
        )
    from models.registry import FAMILIES

    is_canvas = FAMILIES.get(config.model.model_base).attention == "full"
    if is_canvas and t.loss_weight_by_ratio and t.loss_weighting == "reference":
        raise UserError(
            "training.loss_weight_by_ratio: got true with loss_weighting=reference, which for full attention is the mean over the "
            "masked tokens of a row and weighs by 1/ratio already: choose loss_weighting token or response"
        )
    if t.stop_at_solve_rate is not None and config.dataset.eval_dataset is None:
        raise UserError("training.stop_at_solve_rate: is given, but dataset.eval_dataset, which it is measured on, is missing")
    if t.stop_at_solve_rate is not None and not config.evaluation.if_eval:
        raise UserError(
            f"training.stop_at_solve_rate: got {t.stop_at_solve_rate}, but evaluation.if_eval is false, so it is never measured: "
            "set if_eval to true, or leave stop_at_solve_rate out"
        )
