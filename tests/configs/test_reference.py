"""Files written for the reference implementation load, with the same meaning."""

from __future__ import annotations

import runpy
import sys

import pytest
from omegaconf import OmegaConf

from common.errors import UserError
from configs.load import ROOT, to_yaml, with_default
from configs.reference import ALIASES, UNUSED, canonical, flatten
from configs.schema import Decoding
from tests.configs.reference_files import EVAL, EVAL_MMADA, RL_BLOCK, RL_DREAM, RL_FULL_WITH_VALUE, SFT, SFT_DREAM, every_key

pytestmark = pytest.mark.usefixtures("whole_reference")

WHAT_SFT_BATCHES_BY = (
    "settings that have no use in finetuning: training.batch_size_lm, training.gradient_accumulation_steps: an optimizer step is "
    "training.batch_size=64 documents, over all processes"
)


def test_the_files_hold_every_key():
    texts = [RL_BLOCK, RL_FULL_WITH_VALUE, EVAL, SFT, RL_DREAM, EVAL_MMADA, SFT_DREAM]
    held = {key for text in texts for key in flatten(OmegaConf.to_container(OmegaConf.create(text)))}
    assert every_key() <= held


@pytest.mark.parametrize("key", sorted(every_key()))
def test_every_key_has_a_meaning(key):
    from configs.load import setting_types

    assert key in UNUSED or ALIASES.get(key, key) in setting_types()


def test_rl_block(load, capsys):
    config = load("rl", RL_BLOCK)
    assert config.experiment.project == "rl_trado" and config.model.model_base == "trado"
    assert (config.rollout.max_token, config.rollout.max_response_length, config.rollout.stop_token_list) == (
        2000,
        2000,
        ["<|im_end|>"],
    )
    assert config.training.post_num == 0 and config.training.mask_times_per_sample == 2
    assert config.optimizer.params.learning_rate == config.optimizer.params.policy_learning_rate == 1e-6
    assert config.lr_scheduler.params.learning_rate == 1e-6
    assert config.rollout.reward_model.reward_chunk_length == 64  # under its older name
    assert (config.wandb.entity, config.wandb.run_id, config.wandb.resume) == (None, None, "auto")
    variants = config.evaluation.variants()
    assert [(v.remasking_strategy, v.top_k, v.block_size) for v in variants] == [
        ("low_confidence_static", 1, 4),
        ("low_confidence_dynamic", 0, 4),
    ]
    assert all(type(v) is Decoding and v.dynamic_threshold == 0.95 and v.denoising_steps_per_block == 4 for v in variants)
    assert config.evaluation.stop_token_list == ["<|im_end|>"]  # not given for evaluation: as in rollout
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, "one warning names all settings without a use"
    for key in [
        "experiment.function",
        "rollout.tensor_parallel_size",
        "evaluation.tensor_parallel_size",
        "optimizer.params.scale_lr",
    ]:
        assert key in lines[0]
    load("rl", RL_BLOCK)
    assert capsys.readouterr().err == "", "and only once"


def test_rl_full_attention_with_value_model(load, capsys):
    config = load("rl", RL_FULL_WITH_VALUE)
    assert config.rollout.max_token == config.rollout.max_response_length == config.rollout.steps == 256
    assert config.evaluation.block_size == [32, 64] and config.evaluation.top_k == [40]
    assert [v.block_size for v in config.evaluation.variants()] == [32, 64]
    assert config.evaluation.temperature == 0.1 and config.rollout.temperature == 0.9
    assert config.training.post_num is None and not config.training.use_kl_estimator_k3
    assert config.optimizer.params.policy_learning_rate == 1e-6 and config.optimizer.params.value_learning_rate == 5e-6
    assert config.system.HTTP_PROXY == "http://proxy:3128" and config.experiment.num_node == 2
    assert config.rollout.reward_model.k_sample == 3
    line, *_ = capsys.readouterr().err.splitlines()
    keys = ["model.vq_model_path", "dataset.image_root", "dataset.add_think_prompt", "reward.answer_must_in_box"]
    assert f"{', '.join(keys)} (images are not supported yet)" in line and "rollout.batch_size" in line
    assert "rollout.batch_size, evaluation.batch_size (max_active says" in line, "a reason is said once"
    assert "strict_len_check" not in line and "image_resolution" not in line, "as they are by default"


def test_rl_full_attention(load, capsys):
    config = load("rl", RL_DREAM)
    r = config.rollout
    assert config.model.model_base == "dream" and (r.max_token, r.steps, r.block_size) == (512, 512, 4)
    assert (r.use_cache, r.cache, r.further_horizon, r.stop_early) == (True, None, 32, False)
    assert (r.target, r.alg_temp, r.pad_target_penalty, r.top_p, r.top_k) == ("margin_confidence", 0.0, 1.2, 1.0, 0)
    t = config.training
    assert (t.method, t.shrink, t.post_num, t.mask_times_per_sample, t.max_rows_per_response) == ("TraceRL", 16, 4, 8, None)
    assert (t.num_updates_per_step, t.num_train_epochs, t.batch_size_lm, t.gradient_accumulation_steps) == (None, 1, 1, 4)
    found = [(v.block_size, v.remasking_strategy, v.target, v.further_horizon, v.steps) for v in config.evaluation.variants()]
    assert found == [
        (4, "low_confidence_dynamic", "confidence", 128, 512),
        (32, "low_confidence_static", "confidence", 128, 512),
    ]
    assert config.evaluation.pad_target_penalty == 1.2, "not given for evaluation: as in rollout"
    assert (config.dataset.eval_dataset, config.dataset.data_type) == ("MATH500", "math"), "said beside the decoding of evaluation"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "experiment.function" in lines[0], "nothing else is without a use"


def test_what_is_evaluated_on_under_either_name(load):
    assert load("rl", RL_DREAM, "dataset.eval_dataset=GSM8K").dataset.eval_dataset == "GSM8K"
    assert load("rl", RL_DREAM.replace("MATH500", "${dataset.train_dataset}")).dataset.eval_dataset == "MATH_train"
    alone = RL_DREAM.replace('"rl_data"\n    data_type: "math"\n', '"rl_data"\n').replace('data_type: "math"', 'data_type: "code"')
    assert load("rl", alone).dataset.data_type == "code"
    twice = RL_DREAM.replace('"MATH500"\n    data_type: "math"', '"MATH500"\n    data_type: "code"')
    with pytest.raises(UserError) as error:
        load("rl", twice)
    assert str(error.value) == (
        "evaluation.data_type: got 'code', but dataset.data_type says 'math': they are one setting, give only one of them"
    )
    with pytest.raises(UserError, match="^evaluation.eval_dataset: got 'MATH500', but dataset.eval_dataset says 'AIME2024': they"):
        load("rl", RL_DREAM.replace('"rl_data"\n', '"rl_data"\n    eval_dataset: "AIME2024"\n'))


def test_an_override_of_one_data_type_does_not_change_the_other(load):
    """Silently: an evaluation of another kind would have changed what is learnt from."""
    ours, theirs = "dataset.data_type", "evaluation.data_type"
    only_ours = RL_DREAM.replace('"MATH500"\n    data_type: "math"\n', '"MATH500"\n')
    for text, name, other in [(RL_DREAM, theirs, ours), (RL_DREAM, ours, theirs), (only_ours, theirs, ours)]:
        assert load("rl", text, f"{name}=math").dataset.data_type == "math"
        assert load("rl", text, f"{name}=code", f"{other}=code").dataset.data_type == "code"
        with pytest.raises(UserError, match=f"^{name}: got 'code' on the command line, but {other} is 'math' in .*: training and"):
            load("rl", text, f"{name}=code")
    assert load("rl", only_ours, f"{ours}=code").dataset.data_type == "code"
    assert load("eval", EVAL, f"{theirs}=exact").dataset.data_type == "exact", "which trains nothing"


@pytest.mark.parametrize("method, objective", [("random_masking", "clipped"), ("coupled", "clipped")])
def test_other_methods_of_full_attention(load, method, objective):
    from train.methods import METHODS

    config = load("rl", RL_DREAM, f"training.method={method}")
    assert config.training.mask_times_per_sample == 8 and METHODS.get(config.training.method).objective_of("rl") == objective


def test_eval_full_attention(load, capsys):
    config = load("eval", EVAL_MMADA)
    evaluation = config.evaluation
    assert (evaluation.max_token, evaluation.steps, evaluation.temperature) == (256, 128, 0.1)
    assert (evaluation.use_cache, evaluation.target, evaluation.top_p) == (False, "neg_entropy", 0.95)
    assert [(v.block_size, v.top_k, v.steps) for v in evaluation.variants()] == [(32, 40, 128), (64, 40, 128)]
    assert "evaluation.further_horizon=128 has no use: without a cache" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["semi-ar", "random_masking", "trace", "ar"])
def test_sft_full_attention(load, method, capsys):
    config = load("sft", SFT_DREAM, f"training.method={method}", "model.model_base=dream")
    t = config.training
    assert (t.method, t.block_size, t.max_gen_length, t.post_num, t.shrink) == (method, 32, 1600, 4, 48)
    assert capsys.readouterr().err == f"warning: {WHAT_SFT_BATCHES_BY}\n"


def test_how_the_reference_batches_sft_is_said_to_be_unused(load, capsys):
    """Once, where it says what training.batch_size does not."""
    dream = "model.model_base=dream"
    load("sft", SFT_DREAM, dream)
    load("sft", SFT_DREAM, dream)
    assert capsys.readouterr().err == f"warning: {WHAT_SFT_BATCHES_BY}\n"
    config = load("sft", SFT_DREAM, dream, "training.batch_size=16")  # gradient_accumulation_steps is 1
    assert config.training.batch_size == 16
    assert capsys.readouterr().err == (
        "warning: settings that have no use in finetuning: training.batch_size_lm: an optimizer step is training.batch_size=16 "
        "documents, over all processes\n"
    )
    load("sft", to_yaml(load("sft", SFT_DREAM, dream, "training.batch_size=16", "training.batch_size_lm=1")))
    assert capsys.readouterr().err == "", "a run's own config.yaml holds every setting"
    load("rl", RL_DREAM)
    assert "finetuning" not in capsys.readouterr().err


@pytest.mark.parametrize("family", ["dream", "llada", "mmada", "sdar", "trado"])
def test_scripts_of_sft_supply_their_family(family, tmp_path, capsys):
    """Files of the reference for them hold no model_base; one that is given wins."""
    script, file = f"train/sft_{family}.py", tmp_path / "sft.yaml"

    def family_of(text: str, *overrides: str) -> str:
        file.write_text(text)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as leaving:
            patch.setattr(sys, "path", [""] + sys.path)
            patch.setattr(sys, "argv", [script, f"config={file}", *overrides, "--print-config"])
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert leaving.value.code == 0
        return OmegaConf.create(capsys.readouterr().out).model.model_base

    assert family_of(SFT_DREAM) == family_of(SFT_DREAM, "training.seed=1") == family
    assert family_of(SFT_DREAM, "model.model_base=llada") == "llada"
    assert family_of(SFT_DREAM.replace("    optimized_name", "    model_base: mmada\n    optimized_name")) == "mmada"
    assert family_of('model_base: "mmada"\n' + SFT_DREAM) == "mmada"


def test_the_default_of_a_script_is_an_argument_of_its_job(tmp_path):
    """So the processes and machines that it starts get it too."""
    file = tmp_path / "sft.yaml"
    file.write_text(SFT_DREAM)
    arguments = with_default("sft", [f"config={file}", "training.seed=1"], "model.model_base", "dream")
    assert arguments == [f"config={file}", "training.seed=1", "model.model_base=dream"]
    assert with_default("sft", arguments, "model.model_base", "llada") == arguments
    assert with_default("sft", ["--help"], "model.model_base", "dream") == ["--help"]


def test_eval_with_the_model_at_the_top(load, capsys):
    config = load("eval", EVAL)
    assert config.model.pretrained_model == "/models/TraDo-8B-Instruct" and config.model.model_base == "trado"
    assert (
        config.reward.answer_must_in_box
        and config.model.vq_model_path == "/models/magvitv2"
        and config.model.image_resolution == 256
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.vq_model_path, model.image_resolution, reward.answer_must_in_box (images" in line
    evaluation = config.evaluation  # eval files of the reference say rollout
    assert evaluation.remasking_strategy == ["low_confidence_static", "low_confidence_dynamic"]
    assert (evaluation.top_k, evaluation.block_size, evaluation.num_response_per_task) == ([50], [4], 3)
    assert (evaluation.max_token, evaluation.temperature, evaluation.max_active, evaluation.start_with_think) == (
        10000,
        0.5,
        2,
        True,
    )


def test_eval_overrides_under_either_name(load):
    config = load(
        "eval", EVAL, "rollout.temperature=0.1", "model=/elsewhere", "evaluation.top_k=7", "evaluation.max_gen_length=300"
    )
    assert config.evaluation.temperature == 0.1 and config.model.pretrained_model == "/elsewhere"
    assert config.evaluation.top_k == [7] and config.evaluation.max_token == 300


def test_eval_with_the_model_in_its_section(load):
    text = EVAL.replace(
        'model: "/models/TraDo-8B-Instruct"\nmodel_base: "trado"\n', "model: {pretrained_model: /m, model_base: sdar}\n"
    )
    config = load("eval", text.replace('vq_model_path: "/models/magvitv2"\nimage_resolution: 256\n', ""))
    assert (config.model.pretrained_model, config.model.model_base) == ("/m", "sdar")


def test_sft(load):
    config = load("sft", SFT)
    assert config.training.block_size == 8 and config.training.method == "semi-ar" and config.training.num_train_epochs == 3
    assert config.evaluation.block_size == [8], "looks at the solve rate decode the blocks that are trained"
    assert config.lr_scheduler.params.warmup_steps == 100


def test_interpolations_follow_renamed_settings(load):
    text = RL_FULL_WITH_VALUE.replace("steps: 256", "steps: ${rollout.max_gen_length}")
    config = load("rl", text, "rollout.max_gen_length=128")
    assert config.rollout.steps == config.rollout.max_token == 128


def test_overrides_reach_what_is_interpolated(load):
    assert load("rl", RL_BLOCK, "optimizer.params.learning_rate=3e-6").lr_scheduler.params.learning_rate == 3e-6


def test_two_names_of_one_setting():
    with pytest.raises(UserError, match=r"rollout.max_token: got 20, but rollout.max_gen_length says 10: they are one setting"):
        canonical({"rollout.max_token": 20, "rollout.max_gen_length": 10}, "rl")
    assert canonical({"rollout.max_token": 20, "rollout.max_gen_length": 20}, "rl") == ({"rollout.max_token": 20}, [])
    newer, older = "rollout.reward_model.reward_chunk_length", "model.process_reward_chunk_size"
    assert canonical({newer: 200, older: 64}, "rl")[0] == canonical({older: 64, newer: 200}, "rl")[0] == {newer: 200}
    assert canonical({"evaluation.top_p": 0.5, "rollout.top_p": 0.9}, "eval")[0] == {"evaluation.top_p": 0.5}
    assert canonical({"evaluation.max_gen_length": 5, "rollout.max_token": 9}, "eval")[0] == {"evaluation.max_token": 5}


def test_post_num_null_and_mixed_precision_no(load):
    config = load("rl", RL_BLOCK, "training.post_num=null", "training.mixed_precision=no")
    assert config.training.post_num is None and config.training.mixed_precision == "no" and config.model.dtype == "float32"
