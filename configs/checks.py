"""Values that a type cannot check: ranges, names in registries, files, and settings that contradict one another.

Every message says the setting, what was got and what is meant. Decoding: configs/checks_decoding.py; the update's settings:
configs/checks_training.py. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Any, Callable

from common.deepspeed_files import read_deepspeed_file
from common.errors import UserError, warn_once
from common.plugins import find_file
from configs.checks_decoding import check_decoding, check_lists, check_registered, draws_positions, evaluates
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
    check_lists(config)
    check_decoding(config, job)
    check_training(config, job)
    check_training_blocks(config, job)
    check_lora(config, job)
    if job == "rl" or evaluates(config, job):
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

    check_registered(FAMILIES, config.model.model_base, "model.model_base")
    check_registered(REWARDS, config.dataset.data_type, "dataset.data_type")
    function = config.reward.function
    if function is not None and ".py" in function:
        path, _, name = function.rpartition(":")
        if not path.endswith(".py") or not name:
            raise UserError(f"reward.function: got {function!r}, meant is path/to/file.py:name, or a registered name")
        find_file(path, "reward.function")
    elif function is not None and function not in REWARD_FUNCTIONS:
        check_registered(REWARDS, function, "reward.function")
    check_registered(ADVANTAGES, config.training.advantage, "training.advantage")
    if job != "eval":
        check_registered(METHODS, config.training.method, "training.method")
        if config.training.objective is not None:
            check_registered(OBJECTIVES, config.training.objective, "training.objective")
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
    if (r.temperature == 0 or r.top_k == 1) and not draws_positions(config) and not has_value:
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
    if t.stop_at_solve_rate is not None and config.dataset.eval_dataset is None:
        raise UserError("training.stop_at_solve_rate: is given, but dataset.eval_dataset, which it is measured on, is missing")
    if t.stop_at_solve_rate is not None and not config.evaluation.if_eval:
        raise UserError(
            f"training.stop_at_solve_rate: got {t.stop_at_solve_rate}, but evaluation.if_eval is false, so it is never measured: "
            "set if_eval to true, or leave stop_at_solve_rate out"
        )
