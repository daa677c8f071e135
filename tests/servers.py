"""Servers of a test's own, on ports and in folders of their own, that it may stop and start."""

import contextlib
import glob
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest


def free_port():
    """Return a TCP port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def reachable(port):
    """Tell whether something accepts connections on the port of 127.0.0.1."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2):
        return True
    return False


def wait_for(condition, seconds, problem):
    """Wait until the condition is true and return it; fail with what ``problem()`` says."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds} s: {problem()}")
        time.sleep(0.1)
    return found


def program(name, *patterns):
    """Return the path of an installed program, or None."""
    found = [path for pattern in patterns for path in sorted(glob.glob(pattern))]
    return shutil.which(name) or (found[-1] if found else None)


class RabbitMQ:
    """A RabbitMQ node."""

    server = program("/usr/lib/rabbitmq/bin/rabbitmq-server") or program("rabbitmq-server")

    def __init__(self, folder):
        self.folder = folder
        self.port = free_port()
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}//"
        (folder / "plugins").write_text("[].\n")
        (folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\nlog.console = true\nlog.file = false\n"
        )
        self.environment = os.environ | {
            "HOME": str(folder),
            "RABBITMQ_NODENAME": f"test{self.port}@localhost",
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1",
        }
        self.popen = None

    def start(self):
        """Start the node and wait until it takes connections."""
        with (self.folder / "node.log").open("ab") as log:
            self.popen = subprocess.Popen(
                [self.server],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_for(lambda: reachable(self.port), 60, (self.folder / "node.log").read_text)

    def stop(self):
        """End the node in good order; its queues stay on the disk."""
        self.popen.terminate()
        try:
            self.popen.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self.popen.pid, 9)
            self.popen.wait()


class PostgreSQL:
    """A PostgreSQL server with one database, ``service``."""

    server = program("postgres", "/usr/lib/postgresql/*/bin/postgres")

    def __init__(self, folder):
        self.folder = folder
        self.port = free_port()
        self.url = f"postgres://postgres@127.0.0.1:{self.port}/postgres"
        self.binaries = Path(self.server).parent
        # PostgreSQL refuses to run as root.
        self.user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if self.user:
            for parent in [folder, *folder.parents]:
                if parent.owner() == "root" and parent != Path(parent.root):
                    parent.chmod(parent.stat().st_mode | 0o711)
            shutil.chown(folder, "postgres")
        self._run("initdb", "-U", "postgres", "--auth=trust", "--no-sync", "-D", folder / "data")

    def _run(self, name, *arguments):
        subprocess.run(
            [*self.user, self.binaries / name, *arguments],
            cwd=self.folder,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def start(self):
        """Start the server and wait until it takes connections."""
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder}"
        self._run(
            "pg_ctl",
            "-w",
            "-D",
            self.folder / "data",
            "-o",
            options,
            "-l",
            self.folder / "log",
            "start",
        )

    def stop(self):
        """End the server at once, with all its connections."""
        self._run("pg_ctl", "-w", "-D", self.folder / "data", "-m", "fast", "stop")
