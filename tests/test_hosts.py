"""A service on two hosts: network namespaces with a name and an address of their own."""

import contextlib
import os
import shlex
import socket
import subprocess
import threading
import time
import urllib.request

import psycopg
import pytest

from tests.conftest import production_variables
from tests.generate import replace
from tests.servers import free_port, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root creates network namespaces"),
]

#: The network of the hosts; the servers are at its first address.
NETWORK = "10.213.77"
HOSTS = {"first": f"{NETWORK}.2", "second": f"{NETWORK}.3"}

#: Queues the tasks with these numbers, one every 20 ms.
QUEUE = """
import time
from {slug}.tasks import note_host
for number in range({start}, {end}):
    note_host.delay(number)
    time.sleep(0.02)
"""

TASK = """

from celery import shared_task


@shared_task
def note_host(number):
    import socket
    import time

    from django.db import connection

    time.sleep(0.05)
    with connection.cursor() as cursor:
        row = [number, socket.gethostname()]
        cursor.execute("INSERT INTO ran VALUES (%s, %s) ON CONFLICT DO NOTHING", row)
"""

#: The table of the tasks that ran, and where.
CREATE_TABLE = """
from django.db import connection
connection.cursor().execute("CREATE TABLE ran (number integer PRIMARY KEY, host text)")
"""

#: Which host ran each of them.
GET_HOSTS = "SELECT host FROM ran WHERE number >= %s AND number < %s"

#: How often RabbitMQ expects to hear of a worker, in seconds; Celery's default is a minute.
HEARTBEAT = 20

#: How long the second host is cut off, in seconds. Its task gets an error of the database after
#: 10 seconds, and one of RabbitMQ 5 seconds later.
CUT_SECONDS = 25


def run(*command):
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def network(tmp_path):
    """Two hosts with a cable each to the network of the servers."""
    bridge = f"cpbr{os.getpid() % 100_000}"
    names = {host: f"cp{host}{os.getpid()}" for host in HOSTS}
    cables = {host: f"cp{host[0]}{os.getpid() % 1_000_000}" for host in HOSTS}
    try:
        run("ip", "link", "add", bridge, "type", "bridge")
        run("ip", "address", "add", f"{NETWORK}.1/24", "dev", bridge)
        run("ip", "link", "set", bridge, "up")
        for host, address in HOSTS.items():
            run("ip", "netns", "add", names[host])
            peer = ["type", "veth", "peer", "name", "eth0", "netns", names[host]]
            run("ip", "link", "add", cables[host], *peer)
            run("ip", "link", "set", cables[host], "master", bridge, "up")
            inside = ["ip", "-n", names[host]]
            run(*inside, "address", "add", f"{address}/24", "dev", "eth0")
            run(*inside, "link", "set", "eth0", "up")
            run(*inside, "link", "set", "lo", "up")
        yield names, cables
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        subprocess.run(["ip", "link", "delete", bridge], capture_output=True)


@contextlib.contextmanager
def forwarded(port):
    """Forward a port of the servers' address to this machine; yield its number there."""
    server = socket.create_server((f"{NETWORK}.1", free_port()))
    opened = [server]

    def copy(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                client, _ = server.accept()
                target = socket.create_connection(("127.0.0.1", port))
                opened.extend((client, target))
                for pair in ((client, target), (target, client)):
                    threading.Thread(target=copy, args=pair, daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for end in opened:
            end.close()


def test_two_hosts_share_the_work_and_one_that_is_cut_off_loses_none(
    network, bake, make_service, postgres_url, rabbitmq_url, real_times
):
    names, cables = network
    with forwarded(5432) as postgresql, forwarded(5672) as rabbitmq:
        folder = bake(project_slug="hosts")
        with (folder / "hosts" / "tasks.py").open("a") as tasks:
            tasks.write(TASK)
        if not real_times:
            old = "    USE_TZ = True\n"
            new = f"{old}    CELERY_BROKER_HEARTBEAT = {HEARTBEAT}\n"
            replace(folder / "hosts" / "settings.py", old, new)
        service = make_service(
            folder,
            ALLOWED_HOSTS=",".join(HOSTS.values()),
            WORKER_CONCURRENCY=1,
            **production_variables(
                postgres_url.replace("127.0.0.1:5432", f"{NETWORK}.1:{postgresql}"),
                rabbitmq_url.replace("127.0.0.1:5672", f"{NETWORK}.1:{rabbitmq}"),
            ),
        )
        service.deploy()
        service.shell(CREATE_TABLE)

        def start(host, process):
            command = shlex.split(service.procfile()[process])
            inside = ["ip", "netns", "exec", names[host], "unshare", "--uts", "sh", "-c"]
            script = f'hostname {host}; exec "$@"'
            return service.spawn(f"{host}-{process}", *inside, script, "sh", *command)

        beats = [start(host, "beat") for host in HOSTS]
        workers = {host: start(host, "worker") for host in HOSTS}
        for host in HOSTS:
            start(host, "web")

        def is_ready(host):
            url = f"http://{HOSTS[host]}:{service.port}/health/ready?deep"
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as response:
                return response.status == 200
            return False

        for host in HOSTS:
            wait_for(lambda host=host: is_ready(host), 60, lambda: workers["first"].text())
            workers[host].wait_for_text("ready.")
        for beat in beats:
            beat.wait_for_text("beat: Starting...")

        def queue(start, end):
            service.shell(QUEUE.format(slug="hosts", start=start, end=end))

        def get_hosts(start, end):
            with psycopg.connect(postgres_url) as connection:
                return [host for (host,) in connection.execute(GET_HOSTS, (start, end))]

        queue(0, 100)
        wait_for(lambda: len(get_hosts(0, 100)) == 100, 60, workers["first"].text)
        assert set(get_hosts(0, 100)) == set(HOSTS)

        # The second host is cut off while tasks are queued, and comes back.
        timer = threading.Timer(1, run, ["ip", "link", "set", cables["second"], "down"])
        timer.start()
        reconnect_at = time.monotonic() + CUT_SECONDS
        queue(100, 300)
        # It may hold two messages: one that runs, and one that it has received.
        wait_for(lambda: len(get_hosts(100, 300)) >= 198, 60, workers["first"].text)
        assert is_ready("first")
        assert not is_ready("second")
        time.sleep(max(0, reconnect_at - time.monotonic()))
        run("ip", "link", "set", cables["second"], "up")
        # RabbitMQ notices a lost connection by missing heartbeats, after up to three of them.
        wait_for(lambda: is_ready("second"), 60, workers["second"].text)
        wait_for(lambda: len(get_hosts(100, 300)) == 200, 240, workers["second"].text)
        queue(300, 400)
        wait_for(lambda: len(get_hosts(300, 400)) == 100, 60, workers["second"].text)
        assert set(get_hosts(300, 400)) == set(HOSTS)
