"""The jobs of the full-attention families, by their tiny YAMLs as a user starts them: finetuning, RL by every method, evaluation.

Short runs are measured as in test_methods.py: before and after on the same 256 tasks, four responses each, from the same noise; the
standard error of the difference is about 0.015, the rises seen in 40 steps are 0.12 to 0.31.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import pytest
import torch

from common.metrics import read_metrics, steps_of_blocks
from common.records import read_rollouts
from data.prepare_sft import main as prepare_sft
from models.checkpoint import load_pretrained
from models.registry import FAMILIES
from models.tiny import build_tiny, tiny_tokenizer
from sample.trace_viewer import main as trace_viewer
from tests.distributed.harness import ROOT
from tests.jobs.fork_server import ForkServer
from tests.jobs.test_methods import SAMPLED, SHORT, arguments, check_rise, rate_after

TRAINED = ["dream", "llada"]
"""MMaDA in text is LLaDA with a larger vocabulary: it runs with every method of the reference, and not with every setting."""
QUICK = "dream"
"""Logits shifted by one, a first token of its own in every block, biases: what differs most from the block models."""
EXACT_GAP = 1e-4


def families(*others: str) -> list[Any]:
    return [QUICK, *[pytest.param(family, marks=pytest.mark.slow) for family in others]]


@pytest.fixture(scope="module")
def start_model(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What configs/sft_tiny_FAMILY.yaml makes; made once."""
    made: dict[str, Path] = {}

    def model(family: str) -> Path:
        if family not in made:
            project = tmp_path_factory.mktemp("full") / f"sft_{family}"
            job = server.run(f"train/sft_{family}.py", arguments(f"sft_tiny_{family}", project, {}))
            assert job.code == 0, job.err
            made[family] = project / "ckpt" / "optimized"
        return made[family]

    return model


def evaluate(server: ForkServer, family: str, model: Path, project: Path, **changes: Any) -> list[dict[str, Any]]:
    """The results of eval.py; by default sampled, as the short runs are measured."""
    settings = {
        "model.model_base": family,
        "model.pretrained_model": model,
        "evaluation.remasking_strategy": SAMPLED,
        "evaluation.top_k": 0,
        "evaluation.cache": "none",
        **changes,
    }
    job = server.run("eval.py", arguments("tiny_eval", project, settings))
    assert job.code == 0, job.err
    return json.loads((project / "results" / "tiny_sort_test.json").read_text())


@pytest.fixture(scope="module")
def rate_before(server: ForkServer, start_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], float]:
    known: dict[str, float] = {}

    def rate(family: str) -> float:
        if family not in known:
            (result,) = evaluate(server, family, start_model(family), tmp_path_factory.mktemp("full") / "eval")
            known[family] = result["accuracy"]
        return known[family]

    return rate


Train = Callable[..., "tuple[Path, list[dict[str, Any]]]"]


@pytest.fixture
def train(server: ForkServer, start_model: Any, tmp_path: Path) -> Train:
    """train(family, {"section.key": value}) -> (run directory, its metrics)"""

    def train(family: str, changes: dict[str, Any]) -> tuple[Path, list[dict[str, Any]]]:
        project = tmp_path / "run"
        settings = {**SHORT, "model.pretrained_model": start_model(family), **changes}
        job = server.run("rl.py", arguments(f"rl_tiny_{family}", project, settings), timeout_seconds=1200)
        assert job.code == 0, job.err
        return project, read_metrics(project)

    return train


# ---- finetuning, then RL


@pytest.mark.parametrize("family", families("llada", "mmada"))
def test_tracerl(family: str, train: Train, rate_before: Any):
    """Learns, and trains the very distributions that were sampled from. A canvas is two blocks of 4 behind the prompt."""
    project, rows = train(family, {})
    check_rise(rows, rate_before(family))
    assert max(row["gap/logprob_max"] for row in rows) < EXACT_GAP
    rollouts = read_rollouts(project / "rollouts" / "step_000040.jsonl")
    assert {len(r.prompt_ids) % 4 for r in rollouts} > {0}, "prompts of several lengths"
    for r in rollouts:
        assert len(r.response_ids) == 8 and r.block_origin % 4 == len(r.prompt_ids) % 4
        assert min(r.step_map) == 1 and r.num_forwards == max(r.step_map) and len(steps_of_blocks(r)) == 2
        assert max(r.step_map[:4]) < min(r.step_map[4:]), "block by block"


METHODS: dict[str, dict[str, Any]] = {
    "random_masking": {"training.method": "random_masking", "training.mask_times_per_sample": 2},
    "coupled": {"training.method": "coupled"},
    "DiPO": {"training.method": "DiPO"},
    "several_updates": {"training.num_updates_per_step": 4, "training.eps_high": 0.28},
    # Four rows of a response, of the six or so that it has: noisier, and on average the same.
    "some_rows": {"training.max_rows_per_response": 4},
    "prefix_cache": {"rollout.cache": "prefix"},
    "dual_cache": {"rollout.cache": "dual"},
    "capped_cache": {"rollout.cache": "dual", "training.importance_cap": 2},
    "stop_early": {"rollout.stop_early": "true"},
    "value_shared": {"model.value_shared": "true"},
}


OF_THE_REFERENCE = ["random_masking", "coupled"]
"""Beside TraceRL, which `test_tracerl` runs."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, method",
    [*((family, method) for family in TRAINED for method in METHODS), *(("mmada", method) for method in OF_THE_REFERENCE)],
)
def test_other_ways_to_learn(method: str, family: str, train: Train, rate_before: Any):
    _, rows = train(family, METHODS[method])
    check_rise(rows, rate_before(family))
    if method.endswith("cache"):
        gap = max(row["gap/logprob_max"] for row in rows)
        print(f"{family}, {method}: log-probs of engine and trainer up to {gap:.2f} apart")
        assert gap > 0.01, "keys of an earlier forward"
    else:
        assert max(row["gap/logprob_max"] for row in rows) < EXACT_GAP


@pytest.mark.slow
@pytest.mark.parametrize("family", TRAINED)
def test_with_value(family: str, train: Train, start_model: Any, rate_before: Any):
    changes = {"model.value_base_model": start_model(family), "optimizer.params.value_learning_rate": 2e-3}
    project, rows = train(family, changes)
    check_rise(rows, rate_before(family))
    assert rows[0]["value/mean"] == 0 and abs(rows[-1]["value/mean"] - rows[-1]["value/return"]) < 0.25
    assert (project / "ckpt" / "optimized_value" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", TRAINED)
@pytest.mark.parametrize("method", ["TraceRL", "random_masking", "coupled"])
def test_the_whole_run(method: str, family: str, train: Train, rate_before: Any):
    whole = {"experiment.total_step": 320, "experiment.eval_every": 160}
    _, rows = train(family, {**METHODS.get(method, {}), **whole})
    check_rise(rows, rate_before(family), least=0.25)  # 0.30 (Dream, random_masking) to 0.44 are seen


@pytest.mark.slow
@pytest.mark.parametrize("family", TRAINED)
@pytest.mark.parametrize("method", ["semi-ar", "random_masking"])
@pytest.mark.parametrize("masks", ["independent", "complementary"])
def test_finetuning(masks: str, method: str, family: str, server: ForkServer, tmp_path: Path):
    """From random weights to half of the held-out tasks, with block-wise masks and masks of the whole response."""
    changes = {
        "training.method": method,
        "training.complementary_mask": str(masks == "complementary").lower(),
        "training.stop_at_solve_rate": 0.5,
        "training.max_steps": 600,
    }
    job = server.run(f"train/sft_{family}.py", arguments(f"sft_tiny_{family}", tmp_path / "run", changes))
    assert job.code == 0, job.err
    rows = read_metrics(tmp_path / "run")
    print(f"{family}, {method}, {masks}: {rate_after(rows):.3f} behind {rows[-1]['step']} steps")
    assert rate_after(rows) >= 0.5


def test_finetuning_along_sampled_step_maps(server: ForkServer, start_model: Any, tmp_path: Path):
    """Given answers are unmasked by a model in its own order, on the canvas of training, and learnt along it."""
    tasks = json.loads((ROOT / "data" / "tiny_sort_train.json").read_text())[:40]
    records = [{"prompt": task["question"], "response": task["ground_truth_answer"]} for task in tasks]
    (tmp_path / "right.json").write_text(json.dumps(records))
    model, out = start_model(QUICK), tmp_path / "steps.json"
    options = ["--plain", "--sample-steps", str(model), "--model-base", QUICK, "--out", str(out)]
    with pytest.raises(SystemExit):
        prepare_sft([str(tmp_path / "right.json"), *options])
    prepare_sft([str(tmp_path / "right.json"), *options, "--canvas", "8"])
    assert all(len(record["step_map"]) == 8 and min(record["step_map"]) == 1 for record in json.loads(out.read_text()))
    changes = {
        "training.method": "trace",
        "dataset.optimization_data": out,
        "dataset.eval_dataset": "null",
        "training.stop_at_solve_rate": "null",
        "training.max_steps": 4,
        "training.batch_size": 8,
    }
    job = server.run(f"train/sft_{QUICK}.py", arguments(f"sft_tiny_{QUICK}", tmp_path / "run", changes))
    assert job.code == 0, job.err
    assert all(row["train/nll"] > 0 for row in read_metrics(tmp_path / "run"))


@pytest.mark.slow
def test_next_token_finetuning(server: ForkServer, tmp_path: Path):
    """Dream as the autoregressive model that its weights began as: the next token of an answer is learnt."""
    changes = {"training.method": "ar", "dataset.eval_dataset": "null", "training.stop_at_solve_rate": "null"}
    job = server.run("train/sft_dream.py", arguments("sft_tiny_dream", tmp_path / "run", changes))
    assert job.code == 0, job.err
    nll = [row["train/nll"] for row in read_metrics(tmp_path / "run")]
    print(f"nats per token {nll[0]:.2f} -> {nll[-1]:.2f}")
    assert nll[-1] < 0.3


def test_image_codes_are_neither_written_nor_learnt(server: ForkServer, tmp_path: Path):
    """MMaDA's vocabulary is larger than its tokenizer. From random weights a code would be every fourth token or so that is drawn,
    were the codes not left out; and their rows of embedding and head move in no update."""
    tokenizer, start = tiny_tokenizer(), build_tiny(FAMILIES.get("mmada"), seed=10086)
    first_code = len(tokenizer)
    assert start.decoder.config.vocab_size > first_code
    changes = {
        "model.pretrained_model": "tiny-random",
        "model.prepare_config": "null",
        "experiment.plugins": "[tests/jobs/killer.py]",
        "dataset.data_type": "remainder",  # a reward of any text
        "experiment.total_step": 2,
        "rollout.num_task_per_step": 4,
        "rollout.num_response_per_task": 4,
        "evaluation.if_eval": "false",
        "optimizer.params.weight_decay": 0,
    }
    project = tmp_path / "run"
    job = server.run("rl.py", arguments("rl_tiny_mmada", project, changes))
    assert job.code == 0, job.err
    assert all(row["gap/logprob_max"] < EXACT_GAP and row["train/gradient_norm"] > 0 for row in read_metrics(project))
    rollouts = [r for step in (1, 2) for r in read_rollouts(project / "rollouts" / f"step_{step:06d}.jsonl")]
    assert {token for r in rollouts for token in r.response_ids} <= {*range(first_code)} - {start.mask_id}
    end = load_pretrained(str(project / "ckpt" / "optimized"), "mmada", torch.float32)
    for before, after in [(m.weight for m in pair) for pair in zip(*((m.decoder.embed, m.decoder.lm_head) for m in (start, end)))]:
        assert torch.equal(before[first_code:], after[first_code:])
        assert not torch.equal(before[:first_code], after[:first_code])


# ---- evaluation, pages


def test_evaluation_of_blocks_and_caches(server: ForkServer, start_model: Any, rate_before: Any, tmp_path: Path):
    """A list of block sizes runs one evaluation each; batches and early stops change no answer; the page shows all of it."""
    model, project = start_model(QUICK), tmp_path / "eval"
    changes = {"evaluation.block_size": "[4,8]", "evaluation.output_unmasking_history": "true"}
    at_4, at_8 = evaluate(server, QUICK, model, project, **changes)
    assert at_4["accuracy"] == rate_before(QUICK) and at_8["tokens_per_forward"] > at_4["tokens_per_forward"]
    assert [r["settings"]["block_size"] for r in (at_4, at_8)] == [4, 8]
    again, stopped = tmp_path / "again", {"evaluation.max_active": 7, "evaluation.stop_early": "true"}
    (few,) = evaluate(server, QUICK, model, again, **stopped)
    assert few["accuracy"] == at_4["accuracy"] and few["mean_length"] == at_4["mean_length"]
    file = f"tiny_sort_test.{SAMPLED}"
    whole = read_rollouts(project / "results" / f"{file}-block_size4.jsonl")
    cut = read_rollouts(again / "results" / f"{file}.jsonl")
    for one, other in zip(whole, cut, strict=True):
        assert one.response_ids[: one.num_response] == other.response_ids[: other.num_response]
    skipped = [r for r in cut if 0 in r.step_map]
    assert skipped and all(r.step_map[4:] == [0] * 4 and r.num_response <= 4 for r in skipped)
    trace_viewer([str(again / "results" / f"{file}.jsonl"), "-o", str(tmp_path / "trace.html")])
    assert '"origin":' in (tmp_path / "trace.html").read_text()


def test_another_canvas_than_the_blocks_fill_is_refused(server: ForkServer, tmp_path: Path):
    changes = {**SHORT, "model.pretrained_model": "tiny-random", "rollout.block_size": 3}
    job = server.run("rl.py", arguments("rl_tiny_llada", tmp_path / "run", changes))
    assert job.code == 2 and not (tmp_path / "run").exists()
    assert job.error_lines == ["error: rollout.max_gen_length: got 8, must be a multiple of rollout.block_size, which is 3"]
