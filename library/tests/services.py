"""The servers of this machine: a virtual host, a number or a database for each test process."""

import os
import shlex
import shutil
import socket
import subprocess
from contextlib import closing
from urllib.parse import urlsplit

import psycopg
import redis
from amqp import NotAllowed
from kombu import Connection
from pgmq.install import get_embedded_install_sql

RABBITMQ, REDIS, POSTGRESQL = "rabbitmq", "redis", "postgresql"

#: The address of each server.
URLS = {
    RABBITMQ: os.environ.get("TEST_RABBITMQ_URL", "amqp://guest:guest@127.0.0.1:5672//"),
    REDIS: os.environ.get("TEST_REDIS_URL", "redis://127.0.0.1:6379"),
    POSTGRESQL: os.environ.get(
        "TEST_POSTGRESQL_URL", "postgres://postgres@127.0.0.1:5432/postgres"
    ),
}

COMMANDS = {
    RABBITMQ: "docker run -d -p 5672:5672 rabbitmq:4",
    REDIS: "docker run -d -p 6379:6379 redis:7",
    POSTGRESQL: "docker run -d -p 5432:5432 -e POSTGRES_HOST_AUTH_METHOD=trust postgres:16",
}

#: The key with which a test run claims a number of Redis, and for how long, in seconds.
CLAIM, CLAIM_SECONDS = "prodserver-ops-tests", 1800


class Unavailable(Exception):
    """A server that is not running; the message says how to start it."""


def check(name):
    """Raise Unavailable unless the server accepts connections."""
    address = urlsplit(URLS[name])
    try:
        socket.create_connection((address.hostname, address.port), timeout=2).close()
    except OSError:
        raise Unavailable(
            f"{name} is not running on {address.hostname}:{address.port}; "
            f"start it with: {COMMANDS[name]}"
        ) from None


def create(name, process):
    """Return the URL of an empty part of a server, for the test process of that name."""
    check(name)
    part = f"prodserver_ops_{os.getpid()}_{process}"
    if name == RABBITMQ:
        _create_virtual_host(part)
        return urlsplit(URLS[name])._replace(path=f"/{part}").geturl()
    if name == REDIS:
        return f"{URLS[name]}/{_claim_number()}"
    _execute(URLS[name], f"CREATE DATABASE {part}")
    url = urlsplit(URLS[name])._replace(path=f"/{part}").geturl()
    _execute(url, get_embedded_install_sql())
    return url


def share():
    """Return the URL of RabbitMQ's virtual host for tests with queues of their own names.

    It is kept: rabbitmqctl takes longer than such a test.
    """
    check(RABBITMQ)
    url = urlsplit(URLS[RABBITMQ])._replace(path="/prodserver_ops").geturl()
    try:
        with Connection(url) as connection:
            connection.connect()
    except NotAllowed:
        _create_virtual_host("prodserver_ops")
    return url


def delete(name, url):
    """Delete a part of a server."""
    part = urlsplit(url).path.removeprefix("/")
    if name == RABBITMQ:
        _run_rabbitmqctl("delete_vhost", part)
    elif name == REDIS:
        with closing(redis.Redis.from_url(url)) as client:
            client.flushdb()
    else:
        _execute(URLS[name], f"DROP DATABASE {part} WITH (FORCE)")


def _create_virtual_host(name):
    _run_rabbitmqctl("add_vhost", name)
    user = urlsplit(URLS[RABBITMQ]).username
    _run_rabbitmqctl("set_permissions", "-p", name, user, ".*", ".*", ".*")


def _claim_number():
    """Return the number of an unused Redis database; 0 and 1 are for services."""
    for number in range(15, 1, -1):
        with closing(redis.Redis.from_url(f"{URLS[REDIS]}/{number}")) as client:
            if not client.dbsize() and client.set(CLAIM, os.getpid(), nx=True, ex=CLAIM_SECONDS):
                return number
    raise Unavailable("redis has no empty database; run: redis-cli flushall")


def _execute(url, sql):
    with closing(psycopg.connect(url, autocommit=True)) as connection:
        connection.execute(sql)


def _run_rabbitmqctl(*arguments):
    program = shlex.split(os.environ.get("TEST_RABBITMQCTL", "rabbitmqctl"))
    if shutil.which(program[0]) is None:
        raise Unavailable(f"{program[0]} is not installed; it creates the virtual hosts")
    command = [*program, "--quiet", *arguments]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=60)
