"""The pool of a worker whose broker has no event loop."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import prodserver_ops
from prodserver_ops.worker import pool

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


#: Kills the first process that has read a job.
SCRIPT_OF_READ = """
import os, signal, sys, time
from operator import add
from celery.concurrency import prefork
from prodserver_ops.worker import pool

original = pool.read

def read(queue):
    message = original(queue)
    if b"add" in message and not os.path.exists(sys.argv[1]):
        open(sys.argv[1], "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return message

pool.read = read
pool.install()
processes = prefork.TaskPool.BlockingPool(2)
processes.read_timeout = 0.5
results = [processes.apply_async(add, (number, 1)) for number in range(4)]
assert [result.get(timeout=30) for result in results] == [1, 2, 3, 4]
assert os.path.exists(sys.argv[1]) and not processes._cache
print("ran")
os._exit(0)
"""

#: Ends the processes of two jobs.
SCRIPT_OF_LOST = """
import os, signal, time
from operator import add
from billiard.exceptions import WorkerLostError
from celery.concurrency import prefork
from prodserver_ops.worker import pool

pool.install()
processes = prefork.TaskPool.BlockingPool(2)
start = time.monotonic()
lost = [processes.apply_async(os._exit, (3,)) for _ in range(2)]
for result in lost:
    result.wait(30)
    assert isinstance(result._value.exception.exc, WorkerLostError)
assert time.monotonic() - start < 8
assert processes.apply_async(add, (1, 2)).get(timeout=30) == 3
assert not processes._cache
print("ran")
os._exit(0)
"""


def test_processes_that_are_killed_while_they_wait_keep_no_lock():
    run(SCRIPT)


def test_job_is_not_lost_with_the_process_that_has_read_it(tmp_path):
    run(SCRIPT_OF_READ, str(tmp_path / "killed"))


def test_job_of_a_process_that_is_killed_ends_soon():
    run(SCRIPT_OF_LOST)


def run(*script):
    command = [sys.executable, "-W", "ignore", "-c", *script]
    environment = {**os.environ, "PYTHONPATH": str(Path(prodserver_ops.__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout == "ran\n", done.stderr


def test_a_process_that_ended_while_the_connection_was_lost_is_watched_again():
    reader, writer = os.pipe()
    process = SimpleNamespace(_sentinel_poll=None, _popen=SimpleNamespace(sentinel=reader))
    hub = Mock()
    pool.EventPool._track_child_process(pool.EventPool.__new__(pool.EventPool), process, hub)
    os.close(writer)
    os.close(reader)
    assert hub.add_reader.call_args.args[0] == process._sentinel_poll
    os.close(process._sentinel_poll)
