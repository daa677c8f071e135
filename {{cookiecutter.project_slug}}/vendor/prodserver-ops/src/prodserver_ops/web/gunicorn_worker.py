"""gunicorn's threaded worker, with separate threads for health checks.

It responds to health checks even if all threads are busy with a slow database or slow clients.
Each URL of a health check has its own thread.
"""

import errno
import gc
import queue
import re
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from selectors import EVENT_READ
from tempfile import SpooledTemporaryFile
from typing import Any

from django.urls import get_resolver
from gunicorn.workers.gthread import TConn, ThreadWorker

from ..core.urls import get_prefix
from ..scheduling.heartbeats import start_web_heartbeat
from . import uploads

#: How long a new connection may be silent, in seconds.
SILENCE_TIMEOUT = 5

#: How many bytes of a chunked body are stored in memory, before the rest goes to a temporary file.
MAX_MEMORY = 2**20

#: How many bytes of a request are read to recognize a health check.
PEEK_SIZE = 4096

#: The signals with which the main process stops a worker.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)

HEALTH_CHECKS = ("/health/live", "/health/ready")

#: The headers of a request with a body. A thread would wait for a body that does not arrive.
BODY = re.compile(rb"\n(content-length|transfer-encoding):", re.IGNORECASE)


class HealthWorker(ThreadWorker):
    """A threaded worker with threads for health checks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Create the worker in the main process, before the fork.

        Workers share the memory of objects that are loaded before the fork, as long as the garbage
        collector does not write to it and freed memory is not reused.
        https://docs.python.org/3/library/gc.html#gc.freeze
        """
        super().__init__(*args, **kwargs)
        get_resolver().url_patterns  # noqa: B018  (loaded when they are read)
        gc.freeze()

    def init_process(self) -> None:
        """Create the threads for health checks, and run."""
        self.health_check = make_pattern()
        self.health_pools = {path: ThreadPoolExecutor(max_workers=1) for path in HEALTH_CHECKS}
        super().init_process()

    def init_signals(self) -> None:
        """Install the signal handlers; exit if a signal to stop has arrived since the fork.

        Until then the process has the handlers of the main process, which only queue signals.
        The main process would wait for this worker until ``graceful_timeout``.
        """
        inherited: Any = signal.getsignal(signal.SIGTERM)
        super().init_signals()
        with suppress(queue.Empty):
            while inherited.__self__.SIG_QUEUE.get_nowait() not in STOP_SIGNALS:
                pass
            sys.exit(0)

    def load_wsgi(self) -> None:
        """Load the application, and start to record heartbeats."""
        super().load_wsgi()
        self.wsgi = read_chunks(self.wsgi)
        start_web_heartbeat()

    def set_accept_enabled(self, enabled: bool | None) -> None:
        """Start or stop accepting connections; before exiting, accept all waiting connections.

        Closing the socket would reset them. New connections are refused immediately.
        https://github.com/benoitc/gunicorn/issues/3397
        """
        super().set_accept_enabled(enabled)
        if self.alive or enabled:
            return
        for listener in self.sockets:
            while self.accept(listener):
                pass
            listener.close()

    def accept(  # type: ignore[override]
        self, listener: socket.socket
    ) -> bool:
        """Accept a waiting connection, if any; return whether more may be waiting.

        A connection gets a thread when its first bytes arrive.
        """
        try:
            client, address = listener.accept()
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ECONNABORTED, errno.EWOULDBLOCK):
                raise
            return error.errno == errno.ECONNABORTED
        connection = TConn(self.cfg, client, address, listener.getsockname())
        connection.timeout = time.monotonic() + SILENCE_TIMEOUT
        self.nr_conns += 1
        self.pending_conns.append(connection)
        callback = partial(self.on_pending_socket_readable, connection)
        self.poller.register(connection.sock, EVENT_READ, callback)
        return True

    def enqueue_req(self, conn: Any) -> None:
        """Give a request to a thread."""
        future = self.get_pool(conn).submit(self.handle, conn)
        future.add_done_callback(
            lambda done: self.method_queue.defer(self.finish_request, conn, done)
        )

    def get_pool(self, connection: Any) -> ThreadPoolExecutor:
        """Return the threads for the request that a connection has received."""
        try:
            start = connection.sock.recv(PEEK_SIZE, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError:
            start = b""
        if (check := self.health_check.match(start)) and not BODY.search(start):
            return self.health_pools[check["path"].decode()]
        pool: ThreadPoolExecutor = self.tpool
        return pool


def read_chunks(application: Any) -> Any:
    """Wrap a WSGI application: Django would ignore a chunked body, because it has no length."""

    def respond(environ: dict[str, Any], start_response: Any) -> Any:
        if "HTTP_TRANSFER_ENCODING" not in environ or environ.get("CONTENT_LENGTH"):
            return application(environ, start_response)
        with SpooledTemporaryFile(MAX_MEMORY) as body:
            if problem := copy(environ["wsgi.input"], body, uploads.get_largest()):
                start_response(problem, [("Content-Length", "0")])
                return []
            length = {"CONTENT_LENGTH": str(body.tell()), "wsgi.input": body}
            body.seek(0)
            return application(environ | length, start_response)

    return respond


def copy(source: Any, target: Any, limit: int) -> str | None:
    """Copy a body; return the status of the response if it is too large or invalid."""
    try:
        while chunk := source.read(uploads.CHUNK):
            target.write(chunk)
            if target.tell() > limit:
                return "413 Content Too Large"
    except OSError:  # gunicorn's errors of chunks are such errors.
        return "400 Bad Request"
    return None


def make_pattern() -> re.Pattern[bytes]:
    """Return the pattern of a complete request for a health check."""
    paths = "|".join(HEALTH_CHECKS)
    pattern = rf"(GET|HEAD|OPTIONS) ({re.escape(get_prefix())})?(?P<path>{paths})[ ?].*\r\n\r\n"
    return re.compile(pattern.encode(), re.DOTALL)
