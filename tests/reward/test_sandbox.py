"""Hostile programs score 0 and leave nothing; right programs of every kind pass within the default limits."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from reward.code_reward import CodeChecker
from reward.sandbox import Limits, Sandbox
from reward.sandbox_runner import descendants
from tests.reward import hostile_programs as hostile

FUNCTION_TESTS = ["assert f(1) == 8472", "assert f(2) == [8473] or f(2) == 8473", "assert abs(f(3.5) - 8474.5) < 1e-6"]
HELPER_TESTS = ["assert isinstance(f(1), str) and len(f(1)) == 8472", "assert math.isclose(f(1), 8472.0)", "assert 8472 in f(1)"]

MODES = [pytest.param(True, id="namespaces"), pytest.param(False, id="plain", marks=pytest.mark.slow)]


def function(code, tests=FUNCTION_TESTS, seconds=0.5, **fields):
    return code, {"test_method": "function", "test_list": tests, "test_time_limit": seconds, **fields}


def script(code, stdin="5\n", expected="8472\n", seconds=0.5):
    return code, {"test_method": "stdio", "test_input": [stdin], "test_output": [expected], "test_time_limit": seconds}


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class World:
    """What a program could leave its mark on."""

    def __init__(self, folder):
        self.folder = folder
        self.folder.joinpath("expected.txt").write_text("8472\n")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.port = self.listener.getsockname()[1]
        self.bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        self.processes = set(descendants(os.getpid()))  # the bystander, and servers of other tests
        self.before = self.state()

    def fill_in(self, code):
        for name, value in (("port", self.port), ("folder", self.folder), ("pid", self.bystander.pid)):
            code = code.replace("{" + name + "}", str(value))
        return code

    def state(self):
        """Names of files, shared memory and listening sockets, without what other tests make meanwhile."""
        files = {
            os.path.join(d, name)
            for d in (*hostile.FOLDER_NAMES, self.folder, os.path.dirname(os.__file__))
            if os.path.isdir(d)
            for name in os.listdir(d)
            if name.startswith(("unmask-hostile", "unmask-sandbox-", "unmask-program-")) or d == self.folder
        }
        sysv = Path("/proc/sysvipc/shm").read_text() if os.path.exists("/proc/sysvipc/shm") else ""
        with socket.socket() as probe:
            is_taken = probe.connect_ex(("127.0.0.1", self.port + 1)) == 0
        return files, sysv.count("\n"), is_taken, socket.gethostname()

    def close(self):
        self.bystander.kill()
        self.bystander.wait()
        self.listener.close()


@pytest.fixture(scope="module", params=MODES)
def results(request, tmp_path_factory):
    """All hostile programs in one batch: name -> verdicts, with the world and the processes around them."""
    checker = CodeChecker(2, memory_mb=400, use_namespaces=request.param)
    checker.probe()
    world = World(tmp_path_factory.mktemp("world"))
    programs = {}
    for name, code in hostile.FUNCTION.items():
        programs[f"function: {name}"] = function(world.fill_in(code))
    for name, code in hostile.EXPENSIVE_FUNCTION.items():
        programs[f"function: {name}"] = function(world.fill_in(code), FUNCTION_TESTS[:1])
    for name, code in {**hostile.SCRIPT, **hostile.EXPENSIVE_SCRIPT}.items():
        programs[f"script: {name}"] = script(world.fill_in(code))
    for name, code in HELPERS.items():
        programs[f"helper: {name}"] = function(code, HELPER_TESTS)
    begin = time.monotonic()
    progress = []
    verdicts = dict(zip(programs, checker.check(list(programs.values()), lambda *p: progress.append(p))))
    yield {
        "verdicts": verdicts,
        "world": world,
        "checker": checker,
        "seconds": time.monotonic() - begin,
        "progress": progress,
    }
    checker.close()
    world.close()


HELPERS = {
    "isinstance, len and isclose defined": r"""
def isinstance(*a): return True
def len(x): return 8472
def abs(x): return 0
class math:
    isclose = staticmethod(lambda *a: True)
def f(x): return 1
""",
    "math replaced": r"""
import math, sys
math.isclose = lambda *a, **k: True
math = type('math', (), {'isclose': math.isclose})
def f(x): return 1
""",
    "always equal": hostile.ALWAYS_EQUAL + 'def f(x): return Yes()',
    "ANY under the name": 'from unittest.mock import ANY, MagicMock as f',
    "endless iterator": r"""
def f(x):
    while True: yield 1
""",
}
NAMES = (
    [f"function: {n}" for n in [*hostile.FUNCTION, *hostile.EXPENSIVE_FUNCTION]]
    + [f"script: {n}" for n in [*hostile.SCRIPT, *hostile.EXPENSIVE_SCRIPT]]
    + [f"helper: {n}" for n in HELPERS]
)


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_program_scores_0(results, name):
    verdicts = results["verdicts"][name]
    assert not any(passed for passed, _ in verdicts), verdicts
    assert all(note and not note.startswith("sandbox:") for _, note in verdicts), verdicts


def test_they_are_40_and_leave_nothing(results):
    assert len(NAMES) >= 40
    world = results["world"]
    workers, running = set(results["checker"].pool.pids()), set(descendants(os.getpid()))
    own = {pid for pid in running if pid in workers or _parent(pid) in workers}
    assert len(own) == 2 * len(workers)  # workers and their zygotes
    assert not running - own - world.processes, "a program has left a process behind"
    assert world.state() == world.before
    assert world.bystander.poll() is None and os.path.exists("/proc/self")
    with pytest.raises(BlockingIOError):
        world.listener.accept()  # nobody came
    assert results["progress"][0] == (0, len(NAMES)) and results["progress"][-1] == (len(NAMES), len(NAMES))
    assert results["seconds"] < 90
    # A program that is right passes in the same sandboxes as before.
    right = results["checker"].check([function("def f(x): return x + 8471"), script("print(int(input()) + 8467)")])
    assert right[0][0] == (True, None) and right[1] == [(True, None)]


def test_nothing_outlives_the_checker():
    checker = CodeChecker(1)
    checker.probe()
    pids = [pid for pid in descendants(os.getpid()) if pid in checker.pool.pids() or _parent(pid) in checker.pool.pids()]
    assert len(pids) == 2  # the worker and its zygote
    checker.close()
    end = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(map(is_alive, pids))


def _parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("use_namespaces", [True, False])
def test_programs_end_with_a_parent_that_is_killed(tmp_path, use_namespaces):
    """SIGKILL of the process that scores, in the middle of a program with children."""
    code = "import os, time\nos.fork()\nos.fork()\nwhile True: time.sleep(1)"
    folders = set(Path(tempfile.gettempdir()).glob("unmask-program-*"))
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from reward.sandbox import Limits, Sandbox
sandbox = Sandbox({use_namespaces})
print('ready', flush=True)
sandbox.run_script({code!r}, '', Limits(60))
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        end = time.monotonic() + 20
        while len(pids := descendants(process.pid)) < 6 and time.monotonic() < end:  # zygote, init, four of the program
            time.sleep(0.02)
        assert len(pids) == 6
        process.kill()
    end = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not [pid for pid in pids if is_alive(pid)]
    assert set(Path(tempfile.gettempdir()).glob("unmask-program-*")) <= folders


RIGHT_SCRIPTS = {
    "memory": r"""
kept = bytearray(200 << 20)
for i in range(0, len(kept), 4096): kept[i] = 1
print(8472)
""",
    "recursion": r"""
import sys
sys.setrecursionlimit(5000 + 50)
def f(n): return 0 if n == 0 else 1 + f(n - 1)
print(f(5000) + 3472)
""",
    "deep recursion in a thread": r"""
import sys, threading
sys.setrecursionlimit(10**6)
threading.stack_size(1 << 27)
def f(n): return 0 if n == 0 else 1 + f(n - 1)
def main(): print(f(50000) - 41528)
t = threading.Thread(target=main)
t.start()
t.join()
""",
    "threads": r"""
import threading
r = []
ts = [threading.Thread(target=r.append, args=(1,)) for _ in range(32)]
[t.start() for t in ts]
[t.join() for t in ts]
print(8440 + sum(r))
""",
    "processes": r"""
import multiprocessing
def f(x): return x * x
if __name__ == '__main__':
    with multiprocessing.Pool(3) as p:
        print(sum(p.map(f, range(5))) + 8442)
""",
    "a subprocess": r"""
import subprocess, sys
print(int(subprocess.check_output([sys.executable, '-c', 'print(8472)'])))
""",
    "files": r"""
with open('x.txt', 'w') as f: f.write('8472')
import tempfile
with tempfile.TemporaryFile() as g: g.write(b'x')
print(open('x.txt').read())
""",
    "dataclass": r"""
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class P:
    x: int
print(P(8472).x)
""",
    "asyncio": r"""
import asyncio
async def f():
    await asyncio.sleep(0.01)
    return 8472
print(asyncio.run(f()))
""",
    "output at exit": r"""
import atexit, sys
atexit.register(print, 8472)
sys.exit()
""",
    "os._exit behind a flush": r"""
import os
print(8472, flush=True)
os._exit(0)
""",
    "exec of __main__": r"""
import sys
assert __name__ == '__main__' and sys.modules['__main__'].__dict__ is globals()
print(8472)
""",
    "stdout replaced": r"""
import io, sys
sys.stdout = io.TextIOWrapper(sys.stdout.buffer, line_buffering=True)
print(8472)
""",
    "unicode": "print(len('\\u00e4\\U0001f600') + 8470)",
    "random is random": r"""
import random, uuid
print(8472 if random.random() != random.random() else 0)
""",
}
BIG = " ".join(map(str, range(600_000)))
READERS = {
    "sys.stdin.read": "import sys\nprint(sum(map(int, sys.stdin.read().split())))",
    "buffer": "import sys\nprint(sum(map(int, sys.stdin.buffer.readline().split())))",
    "open(0)": "print(sum(map(int, open(0).read().split())))",
    "os.read": "import io, os\nprint(sum(map(int, io.BytesIO(os.read(0, os.fstat(0).st_size)).readline().split())))",
    "/dev/stdin": "print(sum(map(int, open('/dev/stdin').read().split())))",
    "input": "print(sum(map(int, input().split())))",
}


@pytest.fixture(scope="module", params=[True, False], ids=["namespaces", "plain"])
def checker(request):
    checker = CodeChecker(2, use_namespaces=request.param)
    yield checker
    checker.close()


def test_right_programs_pass(checker):
    programs = {name: script(code, seconds=4) for name, code in RIGHT_SCRIPTS.items()}
    programs |= {name: script(code, BIG, f"{sum(range(600_000))}\n", seconds=4) for name, code in READERS.items()}
    programs["much output"] = script("for i in range(300000): print(i)", "", "\n".join(map(str, range(300_000))), seconds=4)
    try:
        import numpy  # noqa: F401

        code = "import numpy as np\na = np.ones((300, 300))\nprint(int(a.dot(a)[0, 0]) + 8172)"
        programs["numpy"] = script(code, seconds=4)
    except ImportError:
        pass
    verdicts = dict(zip(programs, checker.check(list(programs.values()))))
    if not Path("/dev/stdin").exists():
        del verdicts["/dev/stdin"]
    assert {name: v for name, v in verdicts.items() if v != [(True, None)]} == {}


def test_environment_is_empty_and_folder_fresh(checker):
    os.environ["UNMASK_SECRET"] = "8472"
    try:
        code = "import os\nprint(dict(os.environ), os.listdir('.'))\nopen('left', 'w').close()"
        with Sandbox(checker.common["use_namespaces"]) as sandbox:
            for _ in range(2):
                assert sandbox.run_script(code, "", Limits(2)).output == b"{} []\n"
    finally:
        del os.environ["UNMASK_SECRET"]


def test_limits_say_what_happened(checker):
    with Sandbox(checker.common["use_namespaces"]) as sandbox:
        limits = Limits(0.5, memory_bytes=100 << 20, num_processes=8)
        assert sandbox.run_script("while True: pass", "", limits).note == "time limit"
        assert sandbox.run_script("x = b'x' * (200 << 20)\nimport time\ntime.sleep(9)", "", limits).note == "memory limit"
        assert sandbox.run_script("while True: print('x' * 10000)", "", limits).note == "output limit"
        assert sandbox.run_script("import sys\nsys.exit(3)", "", limits).note == "exit code 3"
        assert sandbox.run_script("import os\nos.fork()\nwhile True: pass", "", limits).note == "time limit"  # together
        many = "import threading, time\nfor _ in range(50): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
        assert sandbox.run_script(many, "", limits).note in ("exit code 1", "processes limit")


def test_a_machine_without_namespaces_is_told_what_is_open():
    with Sandbox(use_namespaces=False) as sandbox:
        text = sandbox.unprotected()
        assert text.startswith("no user namespaces") and "\n" not in text
        sandbox.landlock = sandbox.filter = False
        assert "read your files" in sandbox.unprotected() and "network" in sandbox.unprotected()
    with Sandbox() as sandbox:
        assert (sandbox.unprotected() is None) == sandbox.namespaces


def test_a_python_that_lies_under_tmp_is_there_in_every_programs_own_tmp():
    """Programs have a /tmp of their own: an environment made in the machine's must not vanish behind it, nor be writable there."""
    environment = Path(tempfile.mkdtemp(dir="/tmp", prefix="unmask-test-"))
    environment.chmod(0o755)  # programs are another user
    try:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
        [packages] = environment.glob("lib/python3*/site-packages")
        (packages / "unmask_marker.py").write_text("VALUE = 8467\n")
        (packages / "rest.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
        program = (
            "import unmask_marker\ntry:\n    open(unmask_marker.__file__, 'w')\n"
            "except OSError:\n    print(int(input()) + unmask_marker.VALUE)"
        )
        code = (
            "import json, sys\nfrom reward.code_reward import CodeChecker\nfrom tests.reward.test_sandbox import script\n"
            "checker = CodeChecker(1)\nprint(json.dumps(checker.check([script(sys.argv[1])])))\nchecker.close()"
        )
        command = [str(environment / "bin" / "python"), "-c", code, program]
        root = Path(__file__).resolve().parents[2]
        result = subprocess.run(command, capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout.splitlines()[-1]) == [[[True, None]]], result.stdout + result.stderr
        assert (packages / "unmask_marker.py").read_text() == "VALUE = 8467\n"
    finally:
        shutil.rmtree(environment, ignore_errors=True)
