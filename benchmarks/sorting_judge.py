"""A judge of digit sorting behind an OpenAI-compatible endpoint: what rl_tiny_process_reward.yaml runs against on a CPU.

    python -m benchmarks.sorting_judge 8123

It grades a part by what every judge is shown: the question (`s52910=`), the solution so far and the part.
"""

from __future__ import annotations

import re
import sys

from common.errors import UserError, entry_point
from reward.judge_prompts import BEST_VERDICT
from tests.reward.judge_server import JudgeServer, prompt_of


def section(prompt: str, title: str) -> str:
    """The text behind a marked line of a grading prompt (reward/judge_prompts.py)."""
    found = re.search(rf"^===== {title} \w+ =====\n(.*?)(?=^=====)", prompt, flags=re.DOTALL | re.MULTILINE)
    return found[1].removesuffix("\n") if found else ""


def verdict(prompt: str) -> int:
    """The share of the part's digits that stand where they should, from 0 to BEST_VERDICT. An empty part is one that stopped early:
    0, unless nothing was left to write."""
    answer = "".join(sorted(section(prompt, "QUESTION").strip("s=")))
    so_far = section(prompt, "SOLUTION SO FAR")
    so_far = "" if so_far == "(nothing yet)" else so_far
    part = section(prompt, "PART TO GRADE")
    if not part:
        return BEST_VERDICT if so_far == answer else 0
    right = sum(digit == expected for digit, expected in zip(part, answer[len(so_far) :]))
    return round(BEST_VERDICT * right / len(part))


def sorting_judge(port: int = 0) -> JudgeServer:
    """The server, not yet started. port 0: any."""
    return JudgeServer(lambda server, number, body: f"Verdict: {verdict(prompt_of(body))}", port)


@entry_point
def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or not arguments[0].isdigit():
        raise UserError("which port? python -m benchmarks.sorting_judge 8123")
    server = sorting_judge(int(arguments[0]))
    print(f"judging at {server.url}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
