"""Dedicated servers for one test, which it can stop and start, and helpers for ports."""

import contextlib
import ctypes
import functools
import glob
import itertools
import os
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

# https://www.kernel.org/doc/html/latest/networking/filter.html
SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27


#: The first port of the tests, and how many each test process has. They are below those that the
#: system gives to connections, so that nobody takes one before its server is started.
FIRST_PORT, PORTS = 20_000, 1_000


@functools.cache
def iterate_ports():
    """Return an iterator over the ports of this test process, again and again."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw10").removeprefix("gw")
    first = FIRST_PORT + int(worker) % 11 * PORTS
    start = os.getpid() % PORTS  # Those of another test run are elsewhere.
    return itertools.cycle(first + (start + number) % PORTS for number in range(PORTS))


def free_port():
    """Return a TCP port on 127.0.0.1 that is unused, and that this process gives to nobody else."""
    for port in iterate_ports():
        with contextlib.suppress(OSError), socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", port))
            return port


def reachable(port):
    """Return whether a server accepts connections on 127.0.0.1:port."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2):
        return True
    return False


#: How many times as long as usual a test waits before it fails, for a machine that is busy.
PATIENCE = float(os.environ.get("PATIENCE", "1"))


def wait_for(condition, seconds, describe_failure):
    """Wait until the condition is true and return its value, or fail the test."""
    deadline = time.monotonic() + seconds * PATIENCE
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"timed out after {seconds} s: {describe_failure()}")
        time.sleep(0.1)
    return value


def find_program(name, *patterns):
    """Return the path of an installed program, or None."""
    paths = [path for pattern in patterns for path in sorted(glob.glob(pattern))]
    return shutil.which(name) or (paths[-1] if paths else None)


class RabbitMQ:
    """A RabbitMQ node."""

    server = find_program("/usr/lib/rabbitmq/bin/rabbitmq-server") or find_program(
        "rabbitmq-server"
    )
    # The program in the path would run with the cookie of another user.
    ctl = find_program("/usr/lib/rabbitmq/bin/rabbitmqctl") or find_program("rabbitmqctl")

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
        """Start the node and wait until it accepts connections."""
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
        """Shut the node down cleanly. Its durable queues stay on disk."""
        self.popen.terminate()
        try:
            self.popen.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self.popen.pid, 9)
            self.popen.wait()

    def freeze(self):
        """Stop the processes of the node, which keep their connections but do not respond."""
        os.killpg(self.popen.pid, signal.SIGSTOP)

    def thaw(self):
        """Let the processes continue."""
        os.killpg(self.popen.pid, signal.SIGCONT)

    def set_memory_limit(self, fraction):
        """Set the memory limit; below what the node uses, it blocks all publishers."""
        self.control("set_vm_memory_high_watermark", str(fraction))

    def control(self, *arguments):
        """Run a command of rabbitmqctl."""
        subprocess.run(
            [self.ctl, "-n", self.environment["RABBITMQ_NODENAME"], *arguments],
            env=self.environment,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )


class PostgreSQL:
    """A PostgreSQL server."""

    server = find_program("postgres", "/usr/lib/postgresql/*/bin/postgres")

    def __init__(self, folder):
        self.folder = folder
        self.port = free_port()
        self.url = f"postgres://postgres@127.0.0.1:{self.port}/postgres"
        self.binaries = Path(self.server).parent
        # PostgreSQL refuses to run as root.
        self.user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if self.user:
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
        """Start the server and wait until it accepts connections."""
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
        """Stop the server and disconnect its clients (fast shutdown)."""
        self._run("pg_ctl", "-w", "-D", self.folder / "data", "-m", "fast", "stop")

    def freeze(self):
        """Stop all processes of the server, which keep their connections but do not respond."""
        self._signal(signal.SIGSTOP)

    def thaw(self):
        """Let the processes continue."""
        self._signal(signal.SIGCONT)

    def _signal(self, number):
        pid = int((self.folder / "data" / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for process in [pid, *map(int, children)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)


class Wire:
    """A TCP forwarder to 127.0.0.1:port, at ``self.port``, that can become a black hole.

    When it is cut, all packets are dropped without an acknowledgement, as if a firewall had
    forgotten the connections or the machines were gone.
    """

    def __init__(self, port):
        self.target = ("127.0.0.1", port)
        self.sockets = []
        self.flows = threading.Event()
        self.flows.set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self.target)
            except OSError:
                client.close()
                continue
            self.sockets += [client, server]
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self.forward, args=(source, sink), daemon=True).start()

    def forward(self, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.flows.wait()
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def freeze(self):
        """Keep all connections, and accept others, but forward nothing."""
        self.flows.clear()

    def thaw(self):
        """Forward again."""
        self.flows.set()

    def cut(self):
        """Drop all packets of all connections, and refuse new ones without a word."""
        drop_everything = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
        program = struct.pack("HL", 1, ctypes.addressof(drop_everything))
        for end in [self.listener, *self.sockets]:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)

    def mend(self):
        """Accept new connections again; those that were cut stay cut."""
        self.listener.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)

    def reset(self):
        """End all connections; new ones are accepted."""
        for end in self.sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self.sockets.clear()

    def close(self):
        """Refuse connections, and end those that exist."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.reset()


class Remote(Wire):
    """A server of another generation, at an address; its clients see it stop and start.

    ``url`` leads to a part of it for one test, through this wire.
    """

    def __init__(self, url):
        super().__init__(urlsplit(url).port)
        self.url = url.replace(f":{self.target[1]}/", f":{self.port}/")

    stop = Wire.close

    def start(self):
        """Accept connections again."""
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self.accept, daemon=True).start()

    def set_memory_limit(self, fraction):
        """Set the memory limit of a RabbitMQ; below what it uses, it blocks all publishers."""
        run_rabbitmqctl("set_vm_memory_high_watermark", str(fraction))


def run_rabbitmqctl(*arguments):
    """Run rabbitmqctl for the RabbitMQ at ``TEST_RABBITMQ_URL``."""
    program = shlex.split(os.environ.get("TEST_RABBITMQCTL", "rabbitmqctl"))
    subprocess.run([*program, "--quiet", *arguments], check=True, stdin=subprocess.DEVNULL)
