"""A mistake of the user's: one line that says what is wrong, exit code 2, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from common.launch import free_port
from common.metrics import read_metrics
from common.records import read_rollouts
from common.run_dir import RunDir
from tests.jobs.conftest import listing
from tests.jobs.fork_server import ForkServer, Job

SCRIPTS = {"rl": "rl.py", "sft": "train/sft_sdar.py", "eval": "eval.py"}
JOBS = ["rl", *[pytest.param(job, marks=pytest.mark.slow) for job in ("eval", "sft")]]


@dataclass
class Place:
    """Where a case may make its files."""

    folder: Path
    jobs_dir: Path
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def project(self) -> Path:
        return self.folder / "run"

    def model(self, config: dict[str, Any] | None = None, without: tuple[str, ...] = ()) -> Path:
        """A copy of the tiny checkpoint with changed keys of config.json (None: removed), without some of its files."""
        copy = self.folder / "model"
        shutil.copytree(self.jobs_dir / "model", copy)
        for name in without:
            (copy / name).unlink()
        old = json.loads((copy / "config.json").read_text())
        new = {key: value for key, value in {**old, **(config or {})}.items() if value is not None}
        (copy / "config.json").write_text(json.dumps(new))
        self.changes["model.pretrained_model"] = copy
        return copy

    def without_tokens(self, *names: str) -> None:
        """A copy of the tiny checkpoint in which neither config.json nor the tokenizer names these special tokens."""
        copy = self.model({f"{name}_id": None for name in names})
        settings = json.loads((copy / "tokenizer_config.json").read_text())
        (copy / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k not in names}))
        (copy / "special_tokens_map.json").unlink(missing_ok=True)

    def data(self, key: str, content: Any) -> Path:
        """A data set as `key`: records, or the text of the file."""
        file = self.folder / "data.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        self.changes[key] = file
        return file


@pytest.fixture
def place(tmp_path: Path, jobs_dir: Path) -> Place:
    return Place(tmp_path, jobs_dir)


@pytest.fixture
def start(server: ForkServer, settings: Callable[..., list[str]]) -> Callable[[str, Place], Job]:
    def start(job: str, place: Place, env: dict[str, str] | None = None) -> Job:
        return server.run(SCRIPTS[job], settings(job, place.project, place.changes), env)

    return start


def assert_refused(start: Callable[..., Job], job: str, place: Place, *words: str) -> None:
    """One line on stderr with all `words`, exit code 2, and no file or directory made, changed or removed."""
    before = listing(place.folder)
    ended = start(job, place)
    assert ended.code == 2, (ended.code, ended.out, ended.err)
    lines = [line for line in ended.error_lines if not line.startswith(("warning: settings", "warning: lr_scheduler"))]
    assert len(lines) == 1 and lines[0].startswith("error: "), ended.err
    for word in words:
        assert word in lines[0], f"{word!r} is not in: {lines[0]}"
    assert "step 1" not in ended.out
    assert listing(place.folder) == before


TASK = {"question": "s52910=", "ground_truth_answer": "01259"}


# ---- models


@pytest.mark.parametrize("job", JOBS)
def test_missing_model(job: str, place: Place, start: Any):
    place.changes["model.pretrained_model"] = place.folder / "nowhere"
    assert_refused(start, job, place, "model.pretrained_model", f"no directory {place.folder}/nowhere")


def test_model_without_config(place: Place, start: Any):
    (place.model() / "config.json").unlink()
    assert_refused(start, "rl", place, "model.pretrained_model", "no config.json")


def test_missing_value_model(place: Place, start: Any):
    place.changes["model.value_base_model"] = place.folder / "nowhere"
    assert_refused(start, "rl", place, f"error: model.value_base_model: no directory {place.folder}/nowhere")


def test_flex_attention_without_a_gpu(place: Place, start: Any):
    place.changes["training.attention_backend"] = "flex"
    assert_refused(start, "rl", place, "training.attention_backend: got flex, which needs a GPU")


@pytest.mark.parametrize("job", JOBS)
def test_an_engine_of_kernels_without_a_gpu(job: str, place: Place, start: Any):
    place.changes["rollout.engine"] = "triton"
    assert_refused(start, job, place, "rollout.engine: got triton, which needs a GPU, and there is none")


def test_a_script_of_another_family(place: Place, server: ForkServer, settings: Any):
    ended = server.run("train/sft_dream.py", settings("sft", place.project))
    assert ended.code == 2 and len(ended.error_lines) == 1
    assert ended.err.startswith("error: model.model_base: got sdar, but train/sft_dream.py finetunes dream: start")
    assert not place.project.exists()


@pytest.mark.parametrize("job", JOBS)
def test_another_family(job: str, place: Place, start: Any):
    place.model({"model_type": "llama"})
    assert_refused(start, job, place, "model.model_base: sdar reads model_type sdar", "says 'llama'", "no known family reads it")


def test_another_registered_family(place: Place, start: Any):
    place.model({"model_type": "renamed"})
    place.changes["experiment.plugins"] = f"[{Path(__file__).with_name('extension.py')}]"
    assert_refused(start, "rl", place, "says 'renamed'", "set model.model_base to renamed")


def test_an_unknown_family(place: Place, start: Any):
    place.changes["model.model_base"] = "sdarr"
    assert_refused(start, "rl", place, "model.model_base", "'sdarr' (did you mean sdar?)")


@pytest.mark.parametrize("job, key", [("rl", "rollout"), ("eval", "evaluation")])
def test_block_size_that_the_checkpoint_contradicts(job: str, key: str, place: Place, start: Any):
    place.changes[f"{key}.block_size"] = 8
    assert_refused(start, job, place, f"{key}.block_size: got 8", "says block_size 4: set it to 4")


@pytest.mark.parametrize("changes", [{"training.block_size": 8}, {"training.block_size": 8, "dataset.eval_dataset": "null"}])
@pytest.mark.parametrize("job", ["rl", "sft"])
def test_training_block_size_that_the_checkpoint_contradicts(job: str, changes: dict[str, Any], place: Place, start: Any):
    place.changes |= changes | ({"evaluation.if_eval": "false"} if "dataset.eval_dataset" in changes else {})
    assert_refused(start, job, place, "training.block_size", "got 8", "says block_size 4: set it to 4", "model.block_size to 8")


@pytest.mark.parametrize("job", ["rl", "sft"])
def test_a_model_that_is_to_become_one_of_larger_blocks(job: str, place: Place, start: Any):
    place.changes |= {"training.block_size": 8, "model.block_size": 8}
    ended = start(job, place)
    assert ended.code == 0, ended.err
    assert json.loads((place.project / "ckpt" / "optimized" / "config.json").read_text())["block_size"] == 8


def test_finetuning_says_a_warm_up_longer_than_the_run(place: Place, start: Any):
    """Also where the data decide how long it is: 14 records, 4 a step."""
    place.changes["training.max_steps"] = "null"
    ended = start("sft", place)
    assert ended.code == 0 and "lr_scheduler.params.warmup_steps=50: the run has 4 optimizer steps, so the learning" in ended.err


def test_block_size_is_known_before_the_weights_are_read(place: Place, start: Any):
    place.model(without=("model.safetensors",))
    place.changes["rollout.block_size"] = 8
    assert_refused(start, "rl", place, "rollout.block_size: got 8")


@pytest.mark.parametrize("job", JOBS)
def test_missing_tokenizer(job: str, place: Place, start: Any):
    place.model(without=("tokenizer.json", "tokenizer_config.json"))
    assert_refused(start, job, place, f"{place.folder}/model: no tokenizer")


def test_stop_token_that_the_tokenizer_does_not_have(place: Place, start: Any):
    place.changes["rollout.stop_token_list"] = "['<|im_end|>']"
    assert_refused(start, "rl", place, "stop_token_list", "'<|im_end|>' is no single token of this model")


def test_no_stop_token_at_all(place: Place, start: Any):
    place.without_tokens("eos_token")
    assert_refused(start, "eval", place, "evaluation.stop_token_list: no token ends a response")


def test_no_token_to_fill_responses_up_with(place: Place, start: Any):
    place.without_tokens("eos_token", "pad_token")
    place.changes["dataset.eval_dataset"] = "null"
    assert_refused(start, "sft", place, f"{place.folder}/model: no token to fill responses up with", "add pad_token_id")


@pytest.mark.parametrize("key, value, said", [
    ("hidden_size", None, "hidden_size is missing"),
    ("mask_token_id", "x", "mask_token_id is 'x', must be a token id"),
])  # fmt: skip
def test_damaged_config_json(key: str, value: Any, said: str, place: Place, start: Any):
    place.model({key: value})
    assert_refused(start, "rl", place, f"error: {place.folder}/model/config.json: {said}")


def test_damaged_index(place: Place, start: Any):
    (place.model() / "model.safetensors.index.json").write_text("{bad")
    assert_refused(start, "rl", place, f"error: {place.folder}/model/model.safetensors.index.json: not JSON")


def test_truncated_weights(place: Place, start: Any):
    file = place.model() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert_refused(start, "rl", place, str(file), "not a whole safetensors file")


def test_weights_of_another_shape(place: Place, start: Any):
    place.model({"intermediate_size": 96})
    assert_refused(start, "rl", place, "model.layers.0.mlp.gate_proj.weight has shape")


def test_a_model_that_another_job_makes(place: Place, start: Any):
    recipe = place.folder / "mine.yaml"
    recipe.write_text(
        f"experiment: {{project: {place.folder}/tuned}}\nmodel: {{pretrained_model: tiny-random, model_base: sdar}}\n"
        "dataset: {optimization_data: tiny_sort_train}\n"
    )
    place.changes["model.prepare_config"] = recipe
    made, other = place.folder / "tuned" / "ckpt" / "optimized", place.folder / "tuned" / "ckpt" / "optimised"
    command = f"`python train/sft.py config={recipe}` makes"
    place.changes["model.pretrained_model"] = made
    assert_refused(start, "eval", place, f"no directory {made}: {command} it, or give")
    place.changes["model.pretrained_model"] = other
    for job in ("eval", "rl"):  # which is not made, then said not to be there
        assert_refused(start, job, place, f"no directory {other}: {command} {made}, or give")


@pytest.mark.parametrize("job", ["rl", "eval"])
def test_missing_judge(job: str, place: Place, start: Any):
    """Not only when the first answers are graded."""
    place.changes["model.process_reward_model"] = place.folder / "nowhere"
    if job == "eval":
        place.changes["dataset.data_type"] = "judge"
    assert_refused(start, job, place, f"error: model.process_reward_model: no directory {place.folder}/nowhere")


# ---- data


DATA_KEYS = [("rl", "dataset.train_dataset"), ("rl", "dataset.eval_dataset"), ("eval", "dataset.eval_dataset"),
             ("sft", "dataset.optimization_data"), ("sft", "dataset.eval_dataset")]  # fmt: skip


@pytest.mark.parametrize("job, key", DATA_KEYS)
def test_empty_data_file(job: str, key: str, place: Place, start: Any):
    file = place.data(key, "")
    place.changes["model.pretrained_model"] = place.folder / "nowhere"  # which is looked for later
    assert_refused(start, job, place, f"{file}: the file is empty")


@pytest.mark.parametrize("job, key", DATA_KEYS)
def test_record_without_its_field(job: str, key: str, place: Place, start: Any):
    file = place.data(key, [TASK, TASK, {"question": "s11="}])
    field = "response" if key == "dataset.optimization_data" else "ground_truth_answer"
    assert_refused(start, job, place, f"{file}: record 3: field '{field}' is missing")


def test_missing_data_set(place: Place, start: Any):
    place.changes["dataset.train_dataset"] = "MATH500"
    assert_refused(start, "rl", place, "no data set 'MATH500'", "python data/download_data.py --dataset MATH500")


def test_broken_json(place: Place, start: Any):
    file = place.data("dataset.train_dataset", "[{]")
    assert_refused(start, "rl", place, f"{file}: not JSON", "line 1")


def test_more_tasks_per_step_than_there_are(place: Place, start: Any):
    place.changes["rollout.num_task_per_step"] = 15
    assert_refused(start, "rl", place, "rollout.num_task_per_step: got 15", "has 14 tasks")


# ---- settings


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"trainig.eps": 0.3}, ["trainig.eps: unknown setting", "did you mean training.eps?"]),
        ({"training.epss": 0.3}, ["training.epss: unknown setting", "did you mean training.eps?"]),
        ({"training.eps": "much"}, ["training.eps: got 'much'", "a number"]),
        ({"training.method": "TracRL"}, ["training.method", "did you mean TraceRL?"]),
        ({"training.method": "semi-ar"}, ["training.method", "a method of sft"]),
        ({"training.objective": "cliped"}, ["training.objective", "did you mean clipped?"]),
        ({"rollout.remasking_strategy": "low_confidence"}, ["rollout.remasking_strategy", "unmasking strategy 'low_confidence'"]),
        ({"rollout.target": "margin"}, ["rollout.target", "did you mean margin_confidence?"]),
        ({"dataset.data_type": "exakt"}, ["dataset.data_type", "did you mean exact?"]),
        ({"experiment.deepspeed_file": "1_node_3_gpus"}, ["experiment.deepspeed_file: no file '1_node_3_gpus'", "1_node_"]),
        ({"experiment.plugins": "[nowhere.py]"}, ["experiment.plugins: no such file: nowhere.py"]),
        ({"reward.function": "nowhere.py:score"}, ["reward.function", "nowhere.py"]),
        ({"reward.function": f"{__file__}:nothing"}, ["reward.function", "no function 'nothing'"]),
        ({"config": "configs/rl_tny.yaml"}, ["config=configs/rl_tny.yaml: no such file", "configs/rl_tiny.yaml"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings(changes: dict[str, Any], words: list[str], place: Place, start: Any):
    place.changes |= changes
    assert_refused(start, "rl", place, *words)


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(
    "name, words",
    [
        ("missing", "has no function 'missing'"),
        ("two", "takes (task, text), but is called with (task, response_text, rollout): too many positional arguments"),
        ("keyword", "takes (task, text, rollout, *, scale), but is called with (task, response_text, rollout): missing a required"),
    ],
)
def test_a_reward_that_cannot_be_called(job: str, name: str, words: str, place: Place, start: Any):
    """Known before the model, which is not there, is looked for."""
    file = place.folder / "rewards.py"
    file.write_text("def two(task, text): ...\n\n\ndef keyword(task, text, rollout, *, scale): ...\n")
    place.changes |= {"reward.function": f"{file}:{name}", "model.pretrained_model": place.folder / "nowhere"}
    assert_refused(start, job, place, "reward.function: ", words)


# ---- run directories


def test_a_run_of_another_config(place: Place, start: Any):
    assert start("rl", place).code == 0
    place.changes["training.eps"] = 0.3
    words = ["holds a run of another config (training.eps: 0.2 there, 0.3 here and 1 more)", "start_from_scratch=false"]
    assert_refused(start, "rl", place, *words)


def test_going_on_with_a_mistake_leaves_the_run_alone(place: Place, start: Any):
    """start_from_scratch=false may go on with other settings; not with ones that cannot work."""
    assert start("rl", place).code == 0
    place.changes |= {"experiment.start_from_scratch": "false", "experiment.total_step": 4}
    for key, value in [("model.pretrained_model", place.folder / "nowhere"), ("rollout.block_size", 8)]:
        good = place.changes.get(key)
        place.changes[key] = value
        assert_refused(start, "rl", place, key)
        place.changes.pop(key)
        if good is not None:
            place.changes[key] = good
    place.data("dataset.train_dataset", [{**TASK, "id": n} for n in range(14)])
    assert_refused(start, "rl", place, "the data set has changed since this run was saved")


@pytest.mark.parametrize("job", JOBS)
def test_project_that_is_a_file(job: str, place: Place, start: Any):
    place.project.write_text("mine")
    assert_refused(start, job, place, f"experiment.project: {place.project}")


@pytest.mark.parametrize("job", JOBS)
def test_project_below_a_file(job: str, place: Place, start: Any):
    (place.folder / "file").write_text("mine")
    place.changes["experiment.project"] = place.folder / "file" / "run"
    assert_refused(start, job, place, "experiment.project", f"{place.folder}/file is no directory")


@pytest.mark.parametrize("job", JOBS)
def test_project_that_cannot_be_made(job: str, place: Place, start: Any):
    """Known before the weights, which are not there, are read."""
    place.model(without=("model.safetensors",))
    place.changes["experiment.project"] = "/proc/foo"
    assert_refused(start, job, place, "experiment.project: /proc/foo", "cannot be made (No such file or directory: /proc/foo)")


def test_a_run_directory_that_was_damaged(place: Place, start: Any):
    """Whatever of it cannot be read is named; with everything in its place the run goes on."""
    assert start("rl", place).code == 0
    place.changes |= {"experiment.total_step": 3, "experiment.start_from_scratch": "false"}
    state = place.project / "state" / "step_000002"
    for file, content, words in [
        (state / "run.json", None, "run.json: cannot be read (No such file or directory), the state is not whole"),
        (state / "run.json", b'{"step": 2', "run.json: cannot be read (Expecting"),
        (state / "state.bin", 100, "state.bin: cannot be read (PytorchStreamReader failed reading zip archive"),
        (state / "trained_0_0.bin", 1000, f"remove {state} and the run goes on from an older state"),
        (state / "trained_0_0.bin", 0, "trained_0_0.bin: cannot be read ("),
        (place.project / "config.yaml", b"a: [", "config.yaml: cannot be read as settings (while parsing a flow node"),
    ]:
        whole = file.read_bytes()
        if content is None:
            file.unlink()
        else:
            file.write_bytes(whole[:content] if isinstance(content, int) else content)
        assert_refused(start, "rl", place, words)
        file.write_bytes(whole)
    ended = start("rl", place)
    assert ended.code == 0 and "behind step 2" in ended.out, ended.err


@pytest.mark.parametrize("job", JOBS)
def test_project_that_is_no_run_directory(job: str, place: Place, start: Any):
    place.project.mkdir()
    (place.project / "thesis.tex").write_text("mine")
    assert_refused(start, job, place, "is no run directory (no config.yaml)")


@pytest.mark.parametrize("job", ["rl", "sft"])
def test_a_directory_that_another_job_trains_in(job: str, place: Place, start: Any):
    """Before there is a run in it, and with one that is over."""
    other = RunDir(place.project)
    other.lock.acquire()
    words = f"experiment.project: {place.project} is in use by process {os.getpid()} on {socket.gethostname()}, started 20"
    assert_refused(start, job, place, words)
    other.lock.release()
    assert start(job, place).code == 0
    assert not other.lock.path.exists()
    other.lock.acquire()
    assert_refused(start, job, place, words)


@pytest.mark.slow
def test_several_processes_hold_one_lock(place: Place, start: Any):
    """And whoever comes behind the launcher's look at it (here: a launcher that is not ours) is refused by rank 0."""
    place.changes["experiment.num_processes"] = 2
    assert start("rl", place).code == 0
    other = RunDir(place.project)
    other.lock.acquire()
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    before = listing(place.folder)
    ended = start("rl", place, alone)
    assert ended.code == 2 and f"is in use by process {os.getpid()} on " in ended.err, ended.err
    assert listing(place.folder) == before


# ---- the disk


@pytest.mark.parametrize("point", ["rollouts", "metrics", "state", "ckpt", "results"])
def test_full_disk(point: str, place: Place, start: Any):
    """Simulated: writing below `point` fails as it does on a full disk. With room again the run goes on."""
    place.changes["experiment.plugins"] = f"[{Path(__file__).with_name('full_disk.py')}]"
    ended = start("rl", place, {"FULL_DISK": point})
    assert ended.code == 2, (ended.out, ended.err)
    assert len(ended.error_lines) == 1 and "error: " in ended.err, ended.err
    assert "the disk" in ended.err and ("is full" in ended.err or "No space left on device" in ended.err)
    again = start("rl", place)
    assert again.code == 0, again.err
    assert [row["step"] for row in read_metrics(place.project)] == [1, 2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk needs root's right to mount: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("job", ["rl", "sft"])
def test_really_full_disk(job: str, place: Place, start: Any, small_disk: Path):
    """Half a megabyte of weights, as much of optimizer state and more do not fit into one."""
    place.changes["experiment.project"] = small_disk / "run"
    ended = start(job, place)
    assert ended.code == 2, (ended.out, ended.err)
    lines = [line for line in ended.error_lines if not line.startswith("warning: lr_scheduler")]
    assert len(lines) == 1 and "the disk" in ended.err, ended.err


# ---- prompts


def test_long_prompts_are_dropped_and_counted(place: Place, start: Any):
    records = json.loads((place.jobs_dir / "train.json").read_text())
    for record in records[:7]:
        record["question"] = record["question"].replace("=", "0" * 20 + "=")
    place.data("dataset.train_dataset", records)
    place.changes |= {"training.max_prompt_len": 16, "rollout.num_task_per_step": 14}
    ended = start("rl", place)
    assert ended.code == 0, ended.err
    for row in read_metrics(place.project):
        assert row["rollout/dropped_groups_prompt_too_long"] == 7
        assert row["rollout/num_groups"] == 14
    rollouts = read_rollouts(place.project / "rollouts" / "step_000001.jsonl")
    long = [r for r in rollouts if r.dropped == "prompt too long"]
    assert len(long) == 7 and len(rollouts) == 7 + 7 * 4
    assert all(len(r.prompt_ids) <= 16 for r in rollouts)


def test_a_step_whose_prompts_are_all_too_long_is_skipped(place: Place, start: Any):
    """One task of 14 would fit: at least one of two steps of four tasks does without it, and says why."""
    records = json.loads((place.jobs_dir / "train.json").read_text())
    for record in records[1:]:
        record["question"] = record["question"].replace("=", "0" * 20 + "=")
    place.data("dataset.train_dataset", records)
    place.changes |= {"training.max_prompt_len": 16, "evaluation.if_eval": "false"}
    ended = start("rl", place)
    assert ended.code == 0, ended.err
    rows = read_metrics(place.project)
    skipped = [row["step"] for row in rows if row["rollout/dropped_groups_prompt_too_long"] == 4]
    assert skipped and all(rows[step - 1]["train/skipped"] == 1 for step in skipped)
    for step in skipped:
        assert f"warning: step {step}: every response was dropped (prompt too long: 4): no update" in ended.error_lines


def test_evaluation_says_once_how_many_prompts_are_too_long(place: Place, start: Any):
    records = json.loads((place.jobs_dir / "test.json").read_text())
    for record in records[:4]:
        record["question"] = record["question"].replace("=", "0" * 20 + "=")
    place.data("dataset.eval_dataset", records)
    place.changes["training.max_prompt_len"] = 16
    ended = start("eval", place)
    assert ended.code == 0, ended.err
    said = "warning: 4 of 6 evaluation tasks have a prompt longer than training.max_prompt_len=16: they are not sampled and count"
    assert ended.error_lines == [f"{said} as not solved"], "three decodings"
    results = json.loads((place.project / "results" / "data.json").read_text())
    assert [(result["num_responses"], result["num_prompts_too_long"]) for result in results] == [(8, 4)] * 3


@pytest.mark.parametrize(
    "job, key, number",
    [("rl", "dataset.train_dataset", 14), ("rl", "dataset.eval_dataset", 3), ("eval", "dataset.eval_dataset", 6)],
)
def test_prompts_that_are_all_too_long(job: str, key: str, number: int, place: Place, start: Any):
    """Prompts of the tiny model are a token per character."""
    name = "train" if key == "dataset.train_dataset" else "test"
    records = json.loads((place.jobs_dir / f"{name}.json").read_text())[:number]
    if (job, name) == ("rl", "test"):  # some to train on, none to evaluate on
        for record in records:
            record["question"] = record["question"].replace("=", "0" * 20 + "=")
        place.changes["training.max_prompt_len"] = limit = 16
    else:
        place.changes["training.max_prompt_len"] = limit = 2
    place.data(key, records)
    shortest = min(len(record["question"]) for record in records)
    said = f"training.max_prompt_len: got {limit}, but all {number} prompts of {key} are longer, the shortest has {shortest} tokens"
    assert_refused(start, job, place, said)


def test_sft_with_prompts_that_are_all_too_long(place: Place, start: Any):
    place.changes |= {"training.max_prompt_len": 3, "dataset.eval_dataset": "null"}
    assert_refused(start, "sft", place, "every prompt is longer than training.max_prompt_len")
