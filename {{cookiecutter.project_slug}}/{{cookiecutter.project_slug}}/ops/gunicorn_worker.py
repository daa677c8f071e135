"""gunicorn's threaded worker, which responds to health checks also if all threads are busy.

A thread that waits for a database or a slow client cannot respond. Health checks have a
thread of their own for each of their URLs.
"""

import errno
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from selectors import EVENT_READ
from typing import Any

from gunicorn.workers.gthread import TConn, ThreadWorker

#: How long a new connection may be silent, in seconds.
SILENCE_TIMEOUT = 5

#: How many bytes of a request may show that it is a health check.
PEEK_SIZE = 4096

HEALTH_CHECKS = (b"GET /health/live", b"GET /health/ready")


class HealthWorker(ThreadWorker):  # type: ignore[misc]
    """A threaded worker with threads for health checks."""

    def init_process(self) -> None:
        """Create the threads."""
        self.health_pools = {name: ThreadPoolExecutor(max_workers=1) for name in HEALTH_CHECKS}
        super().init_process()

    def accept(self, listener: socket.socket) -> None:
        """Accept a connection; it gets a thread when its first bytes arrive."""
        try:
            client, address = listener.accept()
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ECONNABORTED, errno.EWOULDBLOCK):
                raise
            return
        connection = TConn(self.cfg, client, address, listener.getsockname())
        connection.timeout = time.monotonic() + SILENCE_TIMEOUT
        self.nr_conns += 1
        self.pending_conns.append(connection)
        callback = partial(self.on_pending_socket_readable, connection)
        self.poller.register(connection.sock, EVENT_READ, callback)

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
        # An incomplete request could hold up the thread.
        if b"\r\n\r\n" in start:
            for name, health_pool in self.health_pools.items():
                if start.startswith(name):
                    return health_pool
        pool: ThreadPoolExecutor = self.tpool
        return pool
