"""The pool of a worker whose broker has no event loop."""

import os
import subprocess
import sys
from pathlib import Path

import prodserver_ops

#: Runs tasks, and kills all processes of the pool while they wait for others, several times.
SCRIPT = """
import os, signal, time
from operator import add
from celery.concurrency import prefork
from prodserver_ops.worker import pool

pool.install()
processes = prefork.TaskPool.BlockingPool(2)
killed = set()
for _ in range(3):
    results = [processes.apply_async(add, (number, 1)) for number in range(20)]
    assert [result.get(timeout=30) for result in results] == list(range(1, 21))
    while len(pids := {each.pid for each in processes._pool if each.pid} - killed) < 2:
        time.sleep(0.1)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    killed |= pids
print("ran")
os._exit(0)
"""


def test_processes_that_are_killed_while_they_wait_keep_no_lock():
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    environment = {**os.environ, "PYTHONPATH": str(Path(prodserver_ops.__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout == "ran\n", done.stderr
