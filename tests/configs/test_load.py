"""Shipped files, overrides, mistakes and what is printed."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from common.errors import UserError
from common.registry import Registry, closest
from common.run_dir import RunDir
from configs.checks import RANGES
from configs.difference import config_difference
from configs.help import help_text, settings
from configs.load import ROOT, describe, load_config, setting_types, to_yaml
from configs.reference import flatten
from configs.schema import Config

MINIMAL = """
experiment: {project: runs/x}
model: {pretrained_model: somewhere, model_base: sdar}
dataset: {train_dataset: a, eval_dataset: b, optimization_data: c}
"""


FULL_ATTENTION = ["dream", "llada", "mmada"]


def job_of(path: Path) -> str:
    return "eval" if path.stem.endswith("eval") else "sft" if path.stem.startswith("sft") else "rl"


SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files(path):
    config = load_config(job_of(path), [f"config={path}"])
    assert Path(config.experiment.project).name == path.stem
    if "tiny" in path.stem:
        names = [config.dataset.train_dataset, config.dataset.eval_dataset, config.dataset.optimization_data]
        assert all((ROOT / "data" / f"{name}.json").is_file() for name in names if name is not None)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and any(line.startswith("#   ") and f"config=configs/{path.name}" in line for line in lines)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_sparse(path, tmp_path):
    """Every setting that a shipped file gives changes the result."""
    job, given = job_of(path), flatten(OmegaConf.to_container(OmegaConf.load(path)))
    whole = load_config(job, [f"config={path}"])
    for key in given:
        other = tmp_path / "other.yaml"
        kept = OmegaConf.create()
        for one, value in given.items():
            if one != key:
                OmegaConf.update(kept, one, value)
        OmegaConf.save(kept, other)
        try:
            assert load_config(job, [f"config={other}"]) != whole, f"{key} is the default"
        except UserError:
            pass  # required


def test_shipped_files_for_gpus_say_how_often_they_update_and_save():
    """The reference's rule would make hundreds of updates of a batch; a state of an 8B model at every step takes longer than it."""
    for path in SHIPPED:
        config = load_config(job_of(path), [f"config={path}"])
        if config.experiment.deepspeed_file is None:
            continue
        assert config.experiment.save_state_every > 1, path
        if job_of(path) == "rl":
            t = config.training
            assert t.num_updates_per_step is not None, path
            # One update is exactly on-policy: the ratio to the old policy is 1, and its KL has no gradient.
            assert not t.beta or t.kl_to == "reference" or t.num_updates_per_step > 1, path


def test_shipped_files_exist():
    assert {path.stem for path in SHIPPED} >= {
        *["rl_trado", "rl_sdar", "trado_eval", "sdar_eval", "trado_longcot_eval", "rl_tiny", "tiny_eval", "sft_tiny"],
        *["rl_trado_with_value", "rl_sdar_with_value", "rl_trado_process_reward_rlhf_with_value", "rl_sdar_code"],
        *["rl_trado_dipo", "rl_trado_coupled", "rl_trado_random_masking", "rl_trado_longcot"],
        *["rl_tiny_with_value", "rl_tiny_process_reward", "rl_tiny_dipo", "rl_tiny_coupled", "rl_tiny_random_masking"],
        *["rl_tiny_block8", "rl_tiny_block8_second", "rl_tiny_multi_update"],
        *[f"{name}_{family}" for name in ["rl", "sft", "rl_tiny", "sft_tiny"] for family in FULL_ATTENTION],
        *[f"{family}_eval" for family in FULL_ATTENTION],
        *["rl_dream_with_value", "rl_llada_with_value", "rl_diffucoder_code"],
    }
    assert all((ROOT / "train" / f"sft_{family}.py").is_file() for family in FULL_ATTENTION)


def test_defaults_are_resolved(load):
    config = load(
        "rl", MINIMAL, "training.eps=0.3", "rollout.block_size=8", "rollout.max_token=64", "rollout.stop_token_list=[a,'b c']"
    )
    assert config.training.eps == config.training.eps_high == 0.3
    assert config.rollout.denoising_steps_per_block == config.training.block_size == 8
    assert config.rollout.steps == config.training.max_gen_length == config.evaluation.max_token == 64
    assert config.evaluation.block_size == [8] and config.evaluation.stop_token_list == ["a", "b c"]
    assert config.training.method == "TraceRL" and config.model.dtype == "bfloat16"
    assert config.evaluation.num_response_per_task == 1
    assert dataclasses.is_dataclass(config.optimizer.params) and type(config.rollout.stop_token_list) is list
    assert load("sft", MINIMAL).training.method == "semi-ar"


def test_the_engine_is_of_the_job_and_how_prompts_are_dealt_out_of_a_decoding(load):
    """Evaluation files say rollout or evaluation; the engine is rollout's in every job."""
    settings = "rollout.engine=torch", "rollout.deterministic=true", "rollout.max_active=7"
    for job in ("rl", "eval", "sft"):
        config = load(job, MINIMAL, *settings)
        assert (config.rollout.engine, config.evaluation.deterministic, config.evaluation.max_active) == ("torch", True, 7)
    assert load("rl", MINIMAL).rollout.engine == "auto" and not load("rl", MINIMAL).rollout.deterministic
    with pytest.raises(UserError, match=r"evaluation.engine: unknown setting .*did you mean rollout.engine"):
        load("eval", MINIMAL, "evaluation.engine=torch")


def test_values_are_converted(load):
    config = load(
        "rl", MINIMAL, "rollout.max_token=1e4", "optimizer.params.learning_rate=1e-7", "training.beta=0", "wandb.entity=null"
    )
    assert config.rollout.max_token == 10_000 and isinstance(config.rollout.max_token, int)
    assert config.optimizer.params.learning_rate == 1e-7 and isinstance(config.training.beta, float) and config.wandb.entity is None
    assert load("rl", MINIMAL, "training.eps=0.1", "training.eps=0.2").training.eps == 0.2


def test_recomputation_is_all_none_or_chosen_by_memory(load, tmp_path):
    """As a bool is read, and one word more; files of the reference say True."""
    key = "training.gradient_checkpointing_enable"

    def read(text: str) -> bool | str:
        in_file = load("rl", MINIMAL + f"training: {{gradient_checkpointing_enable: {text}}}")
        given = load("rl", MINIMAL, f"{key}={text}")
        again = tmp_path / "again.yaml"
        again.write_text(to_yaml(given), encoding="utf-8")
        assert in_file == given == load_config("rl", [f"config={again}"])
        return given.training.gradient_checkpointing_enable

    assert load("rl", MINIMAL).training.gradient_checkpointing_enable == "auto"
    assert [read(text) for text in ("True", "true", "1", "'true'")] == [True] * 4
    assert [read(text) for text in ("False", "false", "0")] == [False] * 3
    assert [read(text) for text in ("auto", "'auto'")] == ["auto"] * 2
    assert type(read("1")) is bool
    for text in ("2", "some", "null"):
        with pytest.raises(UserError, match=f"{key}: got .* expected one of true, false, auto"):
            read(text)


def test_evaluation_follows_rollout_unless_given(load):
    config = load("rl", MINIMAL, "rollout.top_p=0.9", "rollout.temperature=0.5", "evaluation.temperature=0")
    assert (config.evaluation.top_p, config.evaluation.temperature, config.rollout.temperature) == (0.9, 0.0, 0.5)
    one = load("rl", MINIMAL, "rollout.block_size=8", "evaluation.block_size=4").evaluation.variants()
    assert [(v.block_size, v.denoising_steps_per_block) for v in one] == [(4, 4)]


TWO_MACHINES = ["experiment.num_node=2", "experiment.deepspeed_file=2_node_8_gpus_deepspeed_zero3"]
MISTAKES = [
    (["training.epss=0.3"], "training.epss: unknown setting on the command line (did you mean training.eps?)"),
    (["rollout.eps=1"], "rollout.eps: unknown setting on the command line (did you mean training.eps?)"),
    (["eps=1"], "eps: unknown setting on the command line (did you mean training.eps?)"),
    (["trainning.eps=1"], "trainning.eps: unknown setting on the command line (did you mean training.eps?)"),
    (["training.eps.x=1"], "training.eps.x: unknown setting on the command line"),
    (["training.eps=abc"], "training.eps: got 'abc' on the command line, expected a number"),
    (["training.eps="], "training.eps: got null on the command line, expected a number"),
    (["training.eps=.nan"], "training.eps: got nan on the command line, expected a number that is finite"),
    (["training.shrink=1.5"], "training.shrink: got 1.5 on the command line, expected a whole number"),
    (["training.enable_tf32=3"], "training.enable_tf32: got 3 on the command line, expected true or false"),
    (["rollout.stop_token_list=x"], "rollout.stop_token_list: got 'x' on the command line, expected a list of texts"),
    (["training.advantage=zscor"], "training.advantage: unknown advantage 'zscor' (did you mean zscore?)"),
    (["training.objective=cliped"], "training.objective: unknown objective 'cliped' (did you mean clipped?)"),
    (
        ["model.value_shared=true", "experiment.train_value_every=2"],
        "experiment.train_value_every: got 2, but with model.value_shared",
    ),
    (["training=3"], "training: got 3 on the command line, expected a section with settings"),
    (["training.eps=[1"], "training.eps: cannot read '[1'"),
    (["training.eps=???"], "training.eps: is still ??? on the command line"),
    (["training.eps=${rollout.foo}"], "training.eps: Interpolation key 'rollout.foo' not found (on the command line"),
    (["training.eps=${training.eps}"], "training.eps: Recursive"),
    (["training.eps=${model.model_base}"], "could not be converted to Float (on the command line; expected a number)"),
    (["training.eps=-1"], "training.eps: got -1.0, must be above 0"),
    (["training.seed=4294967296"], "training.seed: got 4294967296, must be from 0 to 4294967295"),
    (["rollout.top_p=1.5"], "rollout.top_p: got 1.5, must be above 0 and at most 1"),
    (["evaluation.top_k=[1,-1]"], "evaluation.top_k: got -1, must be 0 or more"),
    (
        ["evaluation.top_k=[1,2,3]", "evaluation.block_size=[4,8]"],
        "evaluation.block_size: got 2 values beside 3 of evaluation.top_k",
    ),
    (["evaluation.top_k=[]"], "evaluation.top_k: got an empty list"),
    (["evaluation.remasking_strategy=low_conf_static"], "(did you mean low_confidence_static?)"),
    (
        ["rollout.denoising_steps_per_block=8"],
        "rollout.denoising_steps_per_block: got 8, must be at most rollout.block_size, which is 4",
    ),
    (["training.lower_p=0.95"], "training.lower_p: got 0.95, must be at most training.upper_p, which is 0.9"),
    (["reward.keep_solve_rate=[0.8,0.2]"], "reward.keep_solve_rate: got [0.8, 0.2], must be two shares"),
    (["reward.overlong_margin=2000"], "reward.overlong_margin: got 2000, must be below rollout.max_token, which is 2000"),
    (
        ["reward.overlong_penalty_tokens=2001"],
        "reward.overlong_penalty_tokens: got 2001, must be at most rollout.max_token, which is 2000",
    ),
    (["model.block_size=0"], "model.block_size: got 0, must be above 0"),
    (["model.block_size=8"], "training.block_size: got 4, as rollout.block_size is, but model.block_size says that the run"),
    (["model.block_size=8", "training.block_size=16"], "training.block_size: got 16, but model.block_size says that the run's"),
    (["training.block_size=3"], "training.block_size: got 3, must be a multiple of rollout.block_size, which is 4"),
    (["rollout.block_size=8", "training.block_size=4"], "training.block_size: got 4, must be a multiple of rollout.block_size"),
    (["rollout.num_response_per_task=1"], "rollout.num_response_per_task: got 1, must be at least 2 without a value model"),
    (["rollout.temperature=0"], "rollout.temperature: got 0.0: all responses"),
    (["rollout.top_k=1"], "rollout.top_k: got 1: all responses"),
    (["model.value_base_model=x", "model.optimized_value_name=optimized"], "the value model would overwrite the policy"),
    (["lr_scheduler.params.learning_rate=1"], "lr_scheduler.params.learning_rate: got 1.0, but optimizer.params says 1e-06"),
    (["optimizer.params.learning_rate=1", "optimizer.params.policy_learning_rate=2"], "give only one of them"),
    (["experiment.node_index=1"], "experiment.node_index: got 1, must be below experiment.num_node, which is 1"),
    (
        ["experiment.num_processes=2", "experiment.deepspeed_file=1_node_1_gpus_deepspeed_zero2"],
        "experiment.num_processes: got 2, but 1_node_1_gpus_deepspeed_zero2 is for 1 per machine",
    ),
    (["experiment.num_processes=9", *TWO_MACHINES], "got 9, but 2_node_8_gpus_deepspeed_zero3 is for 8 per machine"),
    (
        ["experiment.deepspeed_file=zero3"],
        "experiment.deepspeed_file: no file 'zero3' in accelerate_configs/, where there is 1_node_1_gpus_deepspeed_zero3, "
        "1_node_2_gpus_deepspeed_zero3, 1_node_4_gpus_deepspeed_zero3, 1_node_8_gpus_deepspeed_zero3, and more: NUMBER_node_",
    ),
    (["experiment.deepspeed_file=1_node_8_gpu_zero3"], "accelerate_configs/, where there is 1_node_8_gpus_deepspeed_zero3, "),
    (["model.model_base=sdarr"], "(did you mean sdar?)"),
    (
        ["model.model_base=lladav"],
        "model.model_base: model family 'lladav' is not supported: images are not supported yet; choices: dream, llada,",
    ),
    (["dataset.data_type=mmu"], "dataset.data_type: reward 'mmu' is not supported: images are not supported yet; choices: "),
    (["dataset.data_type=maths"], "(did you mean math?)"),
    (["training.method=trace_rl"], "(did you mean TraceRL?)"),
    (["training.method=tracerl"], "training.method: unknown training method 'tracerl' (did you mean TraceRL?)"),
    (["training.method=semi-ar"], "training.method: got 'semi-ar', which is a method of sft, must be one of DiPO, TraceRL,"),
    (["reward.function=nowhere.py:f"], "reward.function: no such file: nowhere.py (looked in "),
    (["reward.function=judge"], "reward.function: got 'judge', but there is none: set reward.judge.base_url, or model.process_rew"),
    (["dataset.data_type=judge"], "dataset.data_type: got 'judge', but there is none: set reward.judge.base_url, or model.proc"),
    (["reward.function=nowhere.py"], "meant is path/to/file.py:name"),
    (["experiment.project=null"], "experiment.project: is missing, it is the run directory"),
    (["model.pretrained_model=null"], "model.pretrained_model: is missing"),
    (["dataset.train_dataset=null"], "dataset.train_dataset: is missing"),
    (["dataset.eval_dataset=null"], "dataset.eval_dataset: is missing"),
    (["experiment.plugins=[nowhere.py]"], "experiment.plugins: no such file: nowhere.py"),
    (["training.eps"], "training.eps: got no value"),
    (["batch_size=4"], "batch_size: unknown setting on the command line (did you mean rollout.num_task_per_step?)"),
    (["trainer.max_steps=4"], "trainer.max_steps: unknown setting on the command line (did you mean experiment.total_step?)"),
    (["eval_every=4"], "eval_every: unknown setting on the command line (did you mean experiment.eval_every?)"),
    (["--training.eps=5"], "--training.eps=5: unknown option: settings are given without dashes, as training.eps=5"),
    (["config="], "config=FILE.yaml is missing: choose one of configs/, such as "),
    (["experiment.deepspeed_file=/tmp"], "no file '/tmp' in accelerate_configs/, where there is 1_node_1_gpus_deepspeed_zero3, "),
    (["--print"], "--print: unknown option (did you mean --print-config?)"),
]


@pytest.mark.parametrize("overrides, message", MISTAKES, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_mistakes(load, overrides, message):
    with pytest.raises(UserError) as error:
        load("rl", MINIMAL, *overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_reward_function_is_looked_for_where_it_is_loaded_from(load, tmp_path, monkeypatch):
    """At home, and in the repo's root."""
    from reward.registry import check_function

    (tmp_path / "mine.py").write_text("def f(task, text, rollout):\n    return 1\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    check_function(load("rl", MINIMAL, "reward.function=~/mine.py:f").reward)
    monkeypatch.chdir(tmp_path)
    load("rl", MINIMAL, "reward.function=reward/exact.py:f")


@pytest.mark.parametrize("job", ["rl", "eval", "sft"])
def test_what_nothing_scores(load, job):
    """A judge that is not there: refused wherever it alone would score, by either name; not where it would not."""
    for scored_by in (["dataset.data_type=judge"], ["reward.function=judge"]):
        with pytest.raises(UserError, match=f"^{scored_by[0].partition('=')[0]}: got 'judge', but there is none: set reward.judge"):
            load(job, MINIMAL, *scored_by)
        load(job, MINIMAL, *scored_by, "reward.judge.base_url=http://judge/v1")
    load(job, MINIMAL, "dataset.data_type=judge", "reward.function=exact")
    load("sft", MINIMAL, "reward.function=judge", "evaluation.if_eval=false")


def test_every_number_has_a_range():
    numbers = {key for key, hint in setting_types().items() if "number" in describe(hint)}
    of_scores = {"rollout.dynamic_threshold", "evaluation.dynamic_threshold"}  # theirs
    assert numbers - {"reward.keep_solve_rate", *of_scores} == {key for _, _, keys in RANGES for key in keys.split()}


def test_mistakes_in_the_file_name_it(load, tmp_path):
    path = tmp_path / "settings.yaml"
    for text, message in [
        ("training: {epss: 1}", f"training.epss: unknown setting in {path} (did you mean training.eps?)"),
        ("training:\n  eps: abc", f"training.eps: got 'abc' in {path}, expected a number"),
        ("training:\n  eps: 'a\nrollout: 3\n", f"{path}, line 4: not valid YAML"),
        ("training:\n  eps: 1\n  eps: 2\n", f"{path}, line 3: not valid YAML: found duplicate key eps"),
        ("- 1\n- 2\n", "expected sections with settings, got a list"),
        ("just text", "experiment.project: is missing|not a config|unknown setting"),
        ("rollout:\n  max_token: ???\n", f"rollout.max_token: is still ??? in {path}"),
    ]:
        with pytest.raises(UserError) as error:
            load("rl", text)
        assert any(one in str(error.value) for one in message.split("|")) and "\n" not in str(error.value), str(error.value)


def test_question_marks_may_be_overridden(load):
    assert load("rl", MINIMAL + "rollout:\n  max_token: ???\n", "rollout.max_token=10").rollout.max_token == 10


def test_empty_sections_are_nothing(load):
    assert load("rl", MINIMAL + "training:\nwandb:\n") == load("rl", MINIMAL)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match=r"config=FILE.yaml is missing: choose one of .*configs/rl_tiny.yaml"):
        load_config("rl", [])
    with pytest.raises(UserError, match=r"config=nowhere.yaml: no such file; in configs/ there is configs/tiny_eval.yaml"):
        load_config("eval", ["config=nowhere.yaml"])
    with pytest.raises(UserError) as error:
        load_config("rl", ["config=configs/rl_tny.yaml"])
    assert str(error.value).startswith("config=configs/rl_tny.yaml: no such file; in configs/ there is configs/rl_tiny.yaml, ")
    assert str(error.value).count(".yaml") == 4, "the closest few"
    with pytest.raises(UserError, match=r"config=configs: is a directory, expected a file, such as configs/sft_tiny.yaml, "):
        load_config("sft", ["config=configs"])
    for given in (["--config", "configs/rl_tiny.yaml"], ["--config=configs/rl_tiny.yaml"]):
        with pytest.raises(UserError, match=r"^--config.*: unknown option: the file is given as config=FILE.yaml, without dashes$"):
            load_config("rl", given)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    with pytest.raises(UserError, match="latin.yaml: cannot be read"):
        load_config("rl", [f"config={tmp_path / 'latin.yaml'}"])


def test_as_many_processes_as_the_deepspeed_file_names_or_fewer(load):
    for number in (1, 8):
        assert load("rl", MINIMAL, f"experiment.num_processes={number}", *TWO_MACHINES).experiment.num_processes == number


def test_blocks_of_the_update(load):
    """Random masks follow no sampled block; a larger block holds whole ones; finetuning samples nothing that it trains."""
    assert load("rl", MINIMAL, "training.block_size=8", "model.block_size=8").rollout.block_size == 4
    assert load("rl", MINIMAL, "training.block_size=6", "training.method=random_masking").training.block_size == 6
    assert load("sft", MINIMAL, "training.block_size=6", "rollout.block_size=4").training.block_size == 6
    assert load("eval", MINIMAL, "evaluation.block_size=8", "model.block_size=8").evaluation.block_size == [8]
    with pytest.raises(UserError, match="training.block_size: got 8, but model.block_size .* of blocks of 4: set it to 4"):
        load("sft", MINIMAL, "training.block_size=8", "model.block_size=4")


SUGGESTED = {
    "optimizer.lr": "optimizer.params.learning_rate",
    "lr": "optimizer.params.learning_rate",
    "optimizer.learning_rat": "optimizer.params.learning_rate",
    "optimizer.learning_rate": "optimizer.params.learning_rate",
    "rollout.temp": "rollout.temperature",
    "training.lora_rank": "training.lora.rank",
    "training.beta1": "optimizer.params.beta1",
    "training.epochs": "training.num_train_epochs",
    "evaluation.max_new_tokens": "evaluation.max_token",
    "rollout.max_new_tokens": "rollout.max_token",
    "Training.eps": "training.eps",
}


@pytest.mark.parametrize("wrong", SUGGESTED)
def test_suggested_names(load, wrong):
    with pytest.raises(UserError, match=rf"^{wrong}: unknown setting .*\(did you mean {SUGGESTED[wrong]}\?\)$"):
        load("rl", MINIMAL, f"{wrong}=1")


def test_sft_needs_tasks_to_stop_at_a_solve_rate(load):
    with pytest.raises(UserError, match="training.stop_at_solve_rate"):
        load("sft", MINIMAL, "dataset.eval_dataset=null", "training.stop_at_solve_rate=0.4")
    with pytest.raises(UserError, match="dataset.optimization_data: is missing, it is the data to finetune on"):
        load("sft", MINIMAL, "dataset.optimization_data=null")


def test_a_solve_rate_to_stop_at_has_to_be_measured(load):
    message = "training.stop_at_solve_rate: got 0.4, but evaluation.if_eval is false, so it is never measured: set if_eval to true"
    with pytest.raises(UserError, match=message):
        load("sft", MINIMAL, "training.stop_at_solve_rate=0.4", "evaluation.if_eval=false")


def test_bfloat16_weights_are_trained_with_masters(load):
    for job in ("rl", "sft"):
        with pytest.raises(UserError, match="model.dtype: got bfloat16 with training.mixed_precision=no"):
            load(job, MINIMAL, "model.dtype=bfloat16", "training.mixed_precision=no")
    assert load("eval", MINIMAL, "model.dtype=bfloat16", "training.mixed_precision=no").model.dtype == "bfloat16", "nothing trains"
    assert load("rl", MINIMAL, "model.dtype=float32").training.mixed_precision == "bf16", "its default asks for nothing"


def test_masks_of_methods_that_draw_none(load):
    for key in ("complementary_mask", "loss_weight_by_ratio"):
        for method in ("TraceRL", "DiPO"):
            message = f"training.{key}: got true, but method {method} draws no masks: choose random_masking"
            with pytest.raises(UserError, match=message):
                load("rl", MINIMAL, f"training.method={method}", f"training.{key}=true")
        with pytest.raises(UserError, match=f"training.{key}: got true, but method trace draws no masks: choose semi-ar"):
            load("sft", MINIMAL, "training.method=trace", f"training.{key}=true")
        with pytest.raises(UserError, match=f"training.{key}: got true, but method coupled .*: choose random_masking"):
            load("rl", MINIMAL, "training.method=coupled", f"training.{key}=true")
        assert getattr(load("rl", MINIMAL, "training.method=random_masking", f"training.{key}=true").training, key)


IN_RL = ["dataset.validation_data=v", "training.max_steps=9", "training.batch_size=8", "training.stop_at_solve_rate=0.5"]
OF_A_VALUE_MODEL = ["experiment.train_value_every=2", "training.gam=0.9", "training.lam=0.9"]
OF_AN_ADAPTER = ["training.lora.alpha=8", "training.lora.dropout=0.1", "training.lora.save_merged=true"]


@pytest.mark.parametrize(
    "job, given, where",
    [
        ("rl", IN_RL, "in RL"),
        ("rl", ["evaluation.max_active=7"], "in RL, which evaluates with rollout.max_active"),
        ("rl", ["training.kl_to=reference"], "in RL with training.beta=0"),
        ("rl", ["training.mask_ratio=per_token"], "with a method that draws no masks"),
        (
            "sft",
            ["training.eps=0.3", "training.beta=0.1", "training.kl_to=reference"],
            "in finetuning, which maximises the likelihood",
        ),
        ("eval", ["evaluation.if_eval=false"], "in eval.py, which evaluates all the same"),
        ("rl", OF_A_VALUE_MODEL, "without a value model"),
        ("rl", ["optimizer.params.value_learning_rate=1e-3"], "without a value model"),
        ("rl", OF_AN_ADAPTER, "without training.lora.rank"),
        ("sft", OF_AN_ADAPTER, "without training.lora.rank"),
        ("sft", ["lr_scheduler.params.min_lr_scale=0.1"], "with a constant schedule"),
        ("eval", ["evaluation.start_with_think=true"], "where prompts are no chat, as of this data type"),
        ("rl", ["rollout.start_with_think=true"], "where prompts are no chat, as of this data type"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_settings_without_a_use_in_this_job_are_said(load, capsys, job, given, where):
    schedule = "lr_scheduler.scheduler=constant"
    load(job, MINIMAL, *given, schedule, "dataset.data_type=exact")
    keys = [one.partition("=")[0] for one in given]
    if keys == ["rollout.start_with_think"]:
        keys.append("evaluation.start_with_think")  # which follows it
    (line,) = capsys.readouterr().err.splitlines()
    told, _, listed = line.partition(": settings that have no use ")
    assert told == "warning" and listed.startswith(f"{where}: ") and sorted(listed.partition(": ")[2].split(", ")) == sorted(keys)


@pytest.mark.parametrize(
    "beside, given, where",
    [
        ("training.num_updates_per_step=2", ["training.num_train_epochs=2", "training.gradient_accumulation_steps=4"],
         "in RL with training.num_updates_per_step"),
        ("model.value_base_model=x", ["training.advantage=rloo"], "with a value model, which takes its place"),
        ("model.value_shared=true", ["training.advantage=rloo"], "with a value model, which takes its place"),
        ("model.value_base_model=x", ["training.value_loss_weight=0.1"], "with a value model of its own"),
        ("model.value_shared=true", ["model.value_offload=always", "optimizer.params.value_learning_rate=1"],
         "with model.value_shared, where the policy's update trains the value head"),
    ],
)  # fmt: skip
def test_settings_without_a_use_beside_another_are_said(load, capsys, beside, given, where):
    load("rl", MINIMAL, beside)
    assert capsys.readouterr().err == "", "nothing is given"
    load("rl", MINIMAL, beside, *given)
    listed = ", ".join(sorted(one.partition("=")[0] for one in given))
    err = capsys.readouterr().err
    assert err.startswith(f"warning: settings that have no use {where}: ") and err.count("warning") == 1
    assert ", ".join(sorted(err.rstrip().rpartition(": ")[2].split(", "))) == listed


def test_settings_with_a_use_are_not_said(load, capsys):
    load("sft", MINIMAL, *IN_RL, "dataset.eval_dataset=b")
    load("rl", MINIMAL, *OF_A_VALUE_MODEL, "model.value_base_model=x", "optimizer.params.value_learning_rate=1e-3")
    load("sft", MINIMAL, *OF_AN_ADAPTER, "training.lora.rank=4", "lr_scheduler.params.min_lr_scale=0.1")
    load("eval", MINIMAL, *OF_A_VALUE_MODEL, *OF_AN_ADAPTER, "evaluation.start_with_think=true", "evaluation.max_active=7")
    load("rl", MINIMAL, "rollout.max_active=7", "training.gradient_accumulation_steps=4", "training.advantage=rloo")
    load("rl", MINIMAL, "training.beta=0.1", "training.kl_to=reference", "training.num_updates_per_step=1")
    load("rl", MINIMAL, "training.method=random_masking", "training.mask_ratio=per_token", "training.eps=0.3")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_have_no_setting_without_use(path, capsys):
    load_config(job_of(path), [f"config={path}"])
    assert "no use" not in capsys.readouterr().err


def test_a_warm_up_longer_than_the_run(load, capsys):
    settings = ["experiment.total_step=20", "training.num_updates_per_step=2"]
    load("rl", MINIMAL, *settings, "lr_scheduler.params.warmup_steps=40")
    assert capsys.readouterr().err == ""
    load("rl", MINIMAL, *settings, "lr_scheduler.params.warmup_steps=41")
    said = "lr_scheduler.params.warmup_steps=41: the run has 40 optimizer steps, so the learning rate never reaches its peak"
    assert capsys.readouterr().err == f"warning: {said}\n"
    load("rl", MINIMAL, "experiment.total_step=1", "training.num_updates_per_step=1", "lr_scheduler.params.warmup_steps=41")
    assert "the run has 1 optimizer step, so" in capsys.readouterr().err
    load("rl", MINIMAL, "experiment.total_step=20", "lr_scheduler.params.warmup_steps=41")
    assert capsys.readouterr().err == "", "how many updates a step has is not known before its rollouts"


@pytest.mark.parametrize("change", ["model.value_base_model=x", "model.value_shared=true"])
def test_sft_has_no_value_model(load, change):
    with pytest.raises(UserError, match=rf"{change.partition('=')[0]}: got .*, but finetuning has no value model"):
        load("sft", MINIMAL, change)


def test_compiled_kernels_are_kept_in_the_run_directory(load, monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/of/the/user")
    config = load("rl", MINIMAL, f"experiment.project={tmp_path / 'run'}")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "run" / "cache" / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == "/of/the/user"
    (tmp_path / "run" / "cache").mkdir(parents=True)  # a process that compiled and was killed before it wrote anything
    RunDir(config.experiment.project).check_path()


def test_system_settings_become_environment_variables(load, monkeypatch, tmp_path):
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "HF_HOME"]:
        monkeypatch.setenv(name, "before")
    load("rl", MINIMAL)
    assert os.environ["HTTPS_PROXY"] == os.environ["HF_HOME"] == "before"
    config = load("rl", MINIMAL, "system.HTTP_PROXY=http://proxy:1", f"system.HF_HOME={tmp_path}")
    proxies = {os.environ[name] for name in ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"]}
    assert proxies == {"http://proxy:1"} and os.environ["HF_HOME"] == str(tmp_path)
    assert config_difference(to_yaml(config), load("rl", MINIMAL)) == [], "a run may go on on another machine"


def test_settings_without_a_use_are_said(load, capsys):
    load("rl", MINIMAL, "rollout.tensor_parallel_size=2", "evaluation.output_unmasking_history=false")
    told = capsys.readouterr().err
    assert "rollout.tensor_parallel_size (every process" in told and "evaluation.output_unmasking_history (step maps are" in told
    load("rl", MINIMAL, "evaluation.output_unmasking_history=true")
    assert not capsys.readouterr().err


IMAGES = {
    "model.vq_model_path": "/m",
    "model.image_resolution": 256,
    "dataset.image_root": "/i",
    "dataset.add_think_prompt": True,
    "reward.answer_must_in_box": True,
    "reward.strict_len_check": True,
}


def test_settings_for_images_are_said_to_have_no_use(load, capsys):
    load("eval", MINIMAL, *(f"{key}={value}" for key, value in IMAGES.items()), "rollout.tensor_parallel_size=2")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: settings on the command line that have no use here: rollout.tensor_parallel_size")
    assert f"{', '.join(IMAGES)} (images are not supported yet)" in line
    defaults = {key: flatten(dataclasses.asdict(Config()))[key] for key in IMAGES}
    load("eval", MINIMAL, *(f"{key}={'null' if value is None else value}" for key, value in defaults.items()))
    assert capsys.readouterr().err == "", "defaults ask for nothing"


def test_a_name_that_is_lacking_may_be_registered():
    registry = Registry("thing")
    registry.register("one", 1)
    registry.lacks("two", "not yet")
    with pytest.raises(UserError, match="^here: thing 'two' is not supported: not yet; choices: one$"):
        registry.get("two", "here")
    registry.register("two", 2)
    assert registry.get("two") == 2


def test_closest_names():
    files = ["1_zero2", "1_zero3", "2_zero3", "2_zero3_offload"]
    assert closest("zero3", files, 3) == ["1_zero3", "2_zero3", "2_zero3_offload"], "those that hold it"
    assert closest("tracerl", ["trace", "TraceRL", "coupled"], 1) == ["TraceRL"], "the same but for upper and lower case"
    assert closest("TraceRL", ["tracerl", "tracer"], 2) == ["tracerl", "tracer"]
    assert closest("cuopled", ["trace", "TraceRL", "coupled"], 1) == ["coupled"], "a similar one"
    assert closest("xyz", files, 3) == []


def test_responses_cut_by_training_are_warned_of(load, capsys):
    load("rl", MINIMAL, "training.max_gen_length=100")
    assert "training.max_gen_length (100) is below rollout.max_token (2000)" in capsys.readouterr().err


def test_print_config_round_trips(load, tmp_path, capsys):
    for job in ["rl", "eval", "sft"]:
        overrides = [
            "rollout.top_p=0.7",
            "evaluation.top_k=[1,0]",
            "optimizer.params.learning_rate=3e-7",
            "training.mixed_precision=no",
        ]
        config = load(job, MINIMAL, *overrides)
        with pytest.raises(SystemExit) as end:
            load(job, MINIMAL, *overrides, "--print-config")
        assert end.value.code == 0
        printed = capsys.readouterr().out
        assert load(job, printed) == config
        assert printed.strip() == to_yaml(config).strip() and config_difference(printed, config) == []


def test_config_difference(load):
    saved = to_yaml(load("rl", MINIMAL))
    harmless = [
        "experiment.num_processes=2",
        "experiment.start_from_scratch=false",
        "wandb.enabled=true",
        "logging.tensorboard=true",
    ]
    assert config_difference(saved, load("rl", MINIMAL, *harmless)) == []
    assert config_difference(saved, load("rl", MINIMAL, "training.eps_high=0.3")) == ["training.eps_high: 0.2 there, 0.3 here"]
    lists = config_difference(saved, load("rl", MINIMAL, "evaluation.top_k=[1,0]", "evaluation.temperature=0.5"))
    assert lists == ["evaluation.temperature: 1.0 there, 0.5 here", "evaluation.top_k: [0] there, [1, 0] here"]
    without = saved.replace("  head_chunk: 2048\n", "")
    assert without != saved and config_difference(without, load("rl", MINIMAL)) == []
    assert config_difference(saved + "gone: 1\n", load("rl", MINIMAL)) == ["gone: 1 there, 'unknown' here"]


def test_what_results_do_not_depend_on(load, tmp_path, monkeypatch):
    saved = to_yaml(load("eval", MINIMAL))

    def difference(*overrides: str, job="eval") -> list[str]:
        return config_difference(saved, load(job, MINIMAL, *overrides), of_results=True)

    harmless = "evaluation.max_active=7 evaluation.if_eval=false model.prepare_config=x experiment.save_every=3 training.eps=0.3"
    assert difference(*harmless.split(), "optimizer.params.learning_rate=1", "dataset.train_dataset=other") == []
    for change in ["training.seed=3", "training.max_prompt_len=9", "evaluation.max_token=2001", "reward.timeout_seconds=9"]:
        assert difference(change)[0].startswith(change.replace("=", ": ").partition(" ")[0])
    assert len(config_difference(saved, load("eval", MINIMAL, *harmless.split()))) == 6, "of a run they count, and eps_high"


def test_a_path_may_be_written_in_several_ways(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "m").mkdir(parents=True)
    saved = to_yaml(load("rl", MINIMAL, "model.pretrained_model=models/m"))
    for same in ["models/m/", "./models/m", str(tmp_path / "models" / "m")]:
        assert config_difference(saved, load("rl", MINIMAL, f"model.pretrained_model={same}")) == []
    for other in ["models/n", "models", "models/m/.."]:
        assert len(config_difference(saved, load("rl", MINIMAL, f"model.pretrained_model={other}"))) == 1


def test_every_field_is_documented_and_helped():
    listed = [one for _, _, section in settings() for one in section]
    assert {one.key for one in listed} == set(setting_types())
    assert [one.key for one in listed if len(one.doc) < 5] == []
    text = help_text("rl")
    assert all(f"  {key}: " in text for key in setting_types()) and max(map(len, text.splitlines())) <= 132
    assert "  training.eps: float = 0.2\n      Ratios of probabilities are clipped to 1 - eps .. 1 + eps." in text
    assert "  reward.keep_solve_rate: list[float] = [0.2, 0.8]" in text and "  evaluation.top_k: list[int] = as rollout" in text
    assert "python eval.py config=" in help_text("eval") and "train/sft_sdar.py config=" in help_text("sft")


def test_every_type_can_be_said():
    for hint in setting_types().values():
        assert describe(hint)


def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """`code` in a fresh process in the repo's root, which `python -c` puts on its path."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)


def test_a_mistake_is_one_line_and_exit_code_2():
    code = "from common.errors import entry_point\nfrom configs.load import load_config\nentry_point(lambda: load_config('rl'))()"
    result = run(code, "config=configs/rl_tiny.yaml", "training.epss=1")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "error: training.epss: unknown setting on the command line (did you mean training.eps?)\n"
    result = run(code, "--help")
    assert result.returncode == 0 and "training.eps: float" in result.stdout
    result = run(code, "config=configs/rl_tiny.yaml", "--print-config")
    assert result.returncode == 0 and result.stderr == "" and "total_step: 320" in result.stdout


MISTAKES_OF_EVERY_KIND = [
    "training.epss=1",
    "training.eps=x",
    "training.eps=-1",
    "dataset.data_type=exakt",
    "training.method=tracerl",
    "evaluation.denoising_steps_per_block=9",
    "dataset.eval_dataset=nowhere",
]


@pytest.mark.parametrize("script, file", [("rl.py", "rl_tiny"), ("eval.py", "tiny_eval"), ("train/sft_sdar.py", "sft_tiny")])
def test_torch_is_not_imported(script, file, tmp_path):
    """By a config that is right, nor by any mistake in it or in the data that it names."""
    job = job_of(Path(file))
    code = f"import sys\nfrom configs.load import load_config\nload_config({job!r})\nassert 'torch' not in sys.modules"
    result = run(code, f"config=configs/{file}.yaml")
    assert result.returncode == 0, result.stderr
    code = (
        "import runpy, sys\nmistakes = sys.argv[3:]\nfor mistake in mistakes:\n"
        f"    sys.argv = [{script!r}, *sys.argv[1:3], mistake]\n"
        f"    try:\n        runpy.run_path({script!r}, run_name='__main__')\n"
        "    except SystemExit as end:\n        assert end.code == 2, mistake\n"
        "    else:\n        raise AssertionError(mistake)\n"
        "    assert 'torch' not in sys.modules, mistake\n"
    )
    mistakes = [one for one in MISTAKES_OF_EVERY_KIND if job != "eval" or "method" not in one]
    result = run(code, f"config=configs/{file}.yaml", f"experiment.project={tmp_path}/run", *mistakes)
    assert result.returncode == 0, result.stderr
    assert len(result.stderr.splitlines()) == len(mistakes)
