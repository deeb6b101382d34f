"""A tiny Dream learns to write programs: configs/rl_diffucoder_code.yaml as it is shipped, but for its size, from sampling over the
sandbox to the update."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common.metrics import read_metrics
from common.records import read_rollouts
from data.tiny_tasks import TINY_SPECIAL_TOKENS
from models.checkpoint import Pretrained, empty_decoder, save_pretrained
from models.registry import FAMILIES
from models.tiny import init_weights, tiny_config
from tests.jobs.fork_server import ForkServer
from tests.jobs.test_methods import arguments

PROGRAMS = ["print(1)", "print(int(input()))", "print(int(input()) + 1)", "print(3", "raise ValueError"]
"""What a token of the tiny model's vocabulary may be: a fenced program. One of them is right."""
FENCED = [f"```python\n{program}\n```\n" for program in PROGRAMS]
WORDS = ["Echo", "Repeat", "fine", "done"]
TASKS = {
    "Echo": {"test_input": ["1", "5", "6"], "test_output": ["1", "5", "6"]},
    "Repeat": {"test_input": ["0", "7"], "test_output": ["0", "7"]},
}


def passed(program: str, question: str) -> float:
    """Share of the tests that it passes, worked out by hand: to print what is read is right, 1 is the first of Echo's three."""
    return 1.0 if program == "print(int(input()))" else 1 / 3 if (program, question) == ("print(1)", "Echo") else 0.0


def program_tokenizer() -> Any:
    """One id per word, fenced program or run of other characters; what it does not know is padding."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*FENCED, *WORDS, *TINY_SPECIAL_TOKENS.values()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=TINY_SPECIAL_TOKENS["pad_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w]+"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **TINY_SPECIAL_TOKENS)


STEPS = 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """model/: a Dream of random weights with that vocabulary; tasks.json: eight tasks."""
    family, tokenizer = FAMILIES.get("dream"), program_tokenizer()
    config = tiny_config(family, tokenizer)
    decoder = empty_decoder(family, config, torch.float32, "cpu")
    init_weights(decoder, seed=1)
    model = Pretrained(decoder, family, tokenizer, config, None, config["mask_token_id"])
    save_pretrained(model, decoder.state_dict(), tmp_path / "model")
    tasks = [{"question": name, "test_method": "stdio", "test_time_limit": 1, **tests} for name, tests in TASKS.items()]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    return tmp_path


@pytest.mark.parametrize("method", ["TraceRL", pytest.param("coupled", marks=pytest.mark.slow)])
def test_programs_are_sampled_run_and_learnt_from(method: str, server: ForkServer, folder: Path):
    project = folder / "run"
    small = {
        "experiment.deepspeed_file": "null",
        "experiment.total_step": STEPS,
        "experiment.eval_every": STEPS,
        "model.pretrained_model": folder / "model",
        "dataset.train_dataset": folder / "tasks.json",
        "dataset.eval_dataset": folder / "tasks.json",
        "rollout.num_task_per_step": 2,
        "rollout.num_response_per_task": 12,
        "rollout.max_gen_length": 4,
        "rollout.block_size": 2,
        "training.method": method,
        "training.shrink": 1,
        "training.mixed_precision": "no",
        "optimizer.params.learning_rate": 3e-3,
        "lr_scheduler.scheduler": "constant",
        "reward.overlong_margin": "null",
        "evaluation.remasking_strategy": "low_confidence_static",
    }
    job = server.run("rl.py", arguments("rl_diffucoder_code", project, small), timeout_seconds=600)
    assert job.code == 0, job.err
    rows, means = read_metrics(project), []
    for row in rows:
        rollouts = read_rollouts(project / "rollouts" / f"step_{row['step']:06d}.jsonl")
        assert len(rollouts) == 24
        for r in rollouts:
            (question,) = (name for name in TASKS if len(FENCED) + WORDS.index(name) in r.prompt_ids)
            programs = [PROGRAMS[token] for token in r.response_ids[: r.num_response] if token < len(PROGRAMS)]
            right = passed(programs[-1], question) if programs else 0.0
            assert (r.reward, r.correct) == (right, right == 1.0), (programs, question)
        means.append(sum(r.reward for r in rollouts) / len(rollouts))
    assert {0.0, 1 / 3, 1.0} <= {r.reward for r in read_rollouts(project / "rollouts" / "step_000001.jsonl")}
    assert all(row["train/gradient_norm"] > 0 for row in rows[:2])
    print(f"{method}: mean reward by step", *(f"{mean:.2f}" for mean in means))
    assert means[-1] > means[0] + 0.3  # 0.35 -> 0.9 or more
