"""What the workers of test_worker_pool.py run."""

import os
import signal
import sys
import time


def double(job):
    return 2 * job


def print_and_double(job):
    print("noise", flush=True)
    return 2 * job


def obey(job):
    if job == "sleep":
        time.sleep(60)
    elif job == "c_code":
        return len(str(9 ** (9**9)))  # one operation of the interpreter, deaf to Python's signal handlers
    elif job == "ignore_alarm_handler":
        while True:
            try:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                time.sleep(1)
            except BaseException:
                pass
    elif job == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    return job


def fill_memory(num_bytes):
    return len(bytearray(num_bytes))


def modules(job):
    return sorted(sys.modules)
