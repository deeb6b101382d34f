"""The main job on the embedded tiny model: `make demo`. SFT from random weights, TraceRL, evaluation with both decodings.

    python -m benchmarks.demo            one run, in runs/demo; what is there is kept as runs/demo-1, -2, ...
    python -m benchmarks.demo --seeds    three other seeds, and a control whose rewards are permuted within groups

Everything runs through the same commands that a user types, as processes of their own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from common.errors import entry_point
from common.metrics import read_metrics
from common.run_lock import RunLock

ROOT = Path(__file__).resolve().parents[1]
SAMPLED, GREEDY = "low_confidence_dynamic-top_k0", "low_confidence_dynamic-top_k1"
"""Two of the decodings of configs/tiny_eval.yaml."""
CONTROL = "benchmarks/permuted_rewards.py"


def call(script: str, *arguments: str, quiet: bool, environment: dict[str, str] | None = None, log: Path | None = None) -> float:
    """Run a script of the repo's root; returns its seconds. A failure ends the demo with the script's exit code.

    environment: variables beside this process's; log: file for all that the script prints, errors too (else they are shown).
    """
    start = time.perf_counter()
    command = [sys.executable, script, *arguments]
    if not quiet:
        print(f"\n$ python {' '.join(command[1:])}", flush=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **(environment or {})}
    with open(log or os.devnull, "a") as file:
        output = file if quiet or log is not None else None
        errors = file if log is not None else None
        code = subprocess.run(command, cwd=ROOT, env=variables, stdout=output, stderr=errors).returncode
    if code:
        sys.exit(code)
    return time.perf_counter() - start


def shared_caches(folder: Path) -> dict[str, str]:
    """Variables for `call`: jobs keep what is compiled (on a GPU) in one place, and not each in its run directory."""
    cache = (ROOT / folder).absolute() / "cache"
    defaults = {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton")}
    return {name: os.environ.get(name, value) for name, value in defaults.items()}


def one_run(folder: Path, seed: int, control: bool = False, quiet: bool = False) -> dict[str, float | str]:
    """SFT, RL and evaluation of one seed; returns what the table shows."""
    lock = set_aside(ROOT / folder)
    sft, rl, caches = folder / "sft", folder / "rl", shared_caches(folder)
    seconds = {}
    arguments = ["config=configs/sft_tiny.yaml", f"experiment.project={sft}", f"training.seed={seed}"]
    seconds["sft"] = call("train/sft_sdar.py", *arguments, quiet=quiet, environment=caches)
    model = sft / "ckpt" / "optimized"
    arguments = [
        "config=configs/rl_tiny.yaml",
        f"experiment.project={rl}",
        f"training.seed={seed}",
        f"model.pretrained_model={model}",
    ]
    if control:
        arguments += [f"experiment.plugins=[{CONTROL}]", "reward.function=exact_permuted"]
    before = evaluate(folder / "eval_before", model, quiet, caches)
    seconds["rl"] = call("rl.py", *arguments, quiet=quiet, environment=caches)
    after = evaluate(folder / "eval_after", rl / "ckpt" / "optimized", quiet, caches)
    lock.release()
    return {"seed": f"{seed}{' permuted' if control else ''}", "before": before, "after": after, "seconds": seconds}


def set_aside(folder: Path) -> RunLock:
    """Give what an earlier demo has left in `folder` another name, FOLDER-1, FOLDER-2, ..., and hold the empty place. Raises
    UserError where a demo is at work there."""
    lock = RunLock(folder / ".demo.lock", str(folder), "another place (--folder)")
    lock.check()
    if folder.exists():
        kept = next(
            place for place in (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(1)) if not place.exists()
        )
        folder.rename(kept)
        print(f"the earlier {folder} is kept as {kept}", flush=True)
    lock.acquire()
    return lock


def evaluate(folder: Path, model: Path, quiet: bool, environment: dict[str, str] | None = None) -> dict[str, dict[str, float]]:
    """Held-out numbers, sampled (temperature 1) and greedy, both by dynamic unmasking."""
    arguments = ["config=configs/tiny_eval.yaml", f"experiment.project={folder}", f"model.pretrained_model={model}"]
    call("eval.py", *arguments, quiet=quiet, environment=environment)
    results = {result["name"]: result for result in json.loads((ROOT / folder / "results" / "tiny_sort_test.json").read_text())}
    return {"sampled": results[SAMPLED], "greedy": results[GREEDY]}


def curve(rl: Path, width: int = 60) -> str:
    """Held-out solve rate over RL steps as a bar of text per evaluation."""
    lines = []
    for row in read_metrics(ROOT / rl):
        found = [value for key, value in row.items() if key.startswith("eval/") and key.endswith("/accuracy")]
        if found:
            lines.append(f"  step {row['step']:4d}  {found[0]:.3f}  {'#' * round(width * found[0])}")
    return "\n".join(lines)


def row(result: dict) -> str:
    before, after = result["before"], result["after"]
    cells = [f"{result['seed']:>16}"]
    for kind in ("sampled", "greedy"):
        cells.append(f"{before[kind]['accuracy']:.3f} -> {after[kind]['accuracy']:.3f}")
    cells.append(f"{before['sampled']['tokens_per_forward']:.2f} -> {after['sampled']['tokens_per_forward']:.2f}")
    cells.append(f"{result['seconds']['sft']:.0f} s + {result['seconds']['rl']:.0f} s")
    return "  ".join(cells)


HEAD = f"{'seed':>16}  sampled         greedy          tokens/forward  SFT + RL"


@entry_point
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", action="store_true", help="three other seeds and the control")
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    start = time.perf_counter()
    if arguments.seeds:
        print("held-out solve rate before RL -> after it (digit sorting, decoding dynamic 0.9; sampled at temperature 1)")
        print(HEAD, flush=True)
        for seed, control in [(1, False), (2, False), (3, False), (1, True)]:
            name = f"demo_seed_{seed}{'_permuted' if control else ''}"
            print(row(one_run(arguments.folder / name, seed, control, quiet=True)), flush=True)
        return
    folder = arguments.folder / "demo"
    result = one_run(folder, seed=10086)
    responses = folder / "eval_after" / "results" / f"tiny_sort_test.{SAMPLED}.jsonl"
    call("-m", "sample.trace_viewer", str(responses), "-o", str(folder / "trace.html"), quiet=False)
    print("\nheld-out solve rate during RL (sampled)")
    print(curve(folder / "rl"))
    print("\nheld-out solve rate before RL -> after it")
    print(HEAD)
    print(row(result))
    print(f"\nreport       {folder / 'rl' / 'report.html'}")
    print(f"trace page   {folder / 'trace.html'}")
    print(f"checkpoints  {folder / 'rl' / 'ckpt'}")
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
