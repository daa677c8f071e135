"""Renew the messages that a process holds, so that only those of a lost process return.

Redis and PGMQ deliver a message again when it was neither acknowledged nor renewed for
``VISIBILITY`` seconds. A thread renews what the process holds, also while its loop is busy; so a
task may take a day, and the tasks of a lost worker are back within a minute.

A worker that could not renew for ``LIMIT`` seconds, because it was paused or its server did not
respond, gives up what it holds before others get it: it ends its tasks and connects again, as
after a lost connection.
"""

import logging
import os
import threading
import time
from typing import Any
from weakref import WeakSet

logger = logging.getLogger(__name__)

#: When a message that is not renewed is delivered again, in seconds.
VISIBILITY = 40

#: How often a process renews what it holds, in seconds.
INTERVAL = 5

#: After how many seconds without a renewal a worker gives up what it holds.
LIMIT = 30

#: How often the loop of a worker checks this, in seconds.
CHECK_INTERVAL = 1


class NotRenewed(ConnectionError):
    """The messages of this process may be delivered to another one."""


class RenewedQoS:
    """What a channel holds. A subclass of kombu's ``QoS`` implements ``renew()``."""

    #: When all that the channel held was last renewed.
    renewed_at: float
    is_lost = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.renewed_at = time.monotonic()

    def append(self, message: Any, delivery_tag: Any) -> None:
        """Hold a message."""
        super().append(message, delivery_tag)  # type: ignore[misc]
        watch(self)

    def get_held(self) -> list[Any]:
        """Return the tags that are neither acknowledged nor rejected, from any thread."""
        dirty = self._dirty  # type: ignore[attr-defined]
        return [tag for tag in list(self._delivered) if tag not in dirty]  # type: ignore[attr-defined]

    def renew(self, tags: list[Any]) -> None:
        """Renew messages; called by the thread."""
        raise NotImplementedError

    def renew_held(self) -> None:
        """Renew what the channel holds, unless it is too late."""
        start = time.monotonic()
        if tags := self.get_held():
            if start - self.renewed_at > LIMIT:
                self.is_lost = True
                return
            self.renew(tags)
        self.renewed_at = start

    def check(self) -> None:
        """Raise NotRenewed if what the channel holds may be delivered to others."""
        if self.is_lost or (time.monotonic() - self.renewed_at > LIMIT and self.get_held()):
            # Do not return these messages, which others may hold by now.
            self._delivered.clear()  # type: ignore[attr-defined]
            self._dirty.clear()  # type: ignore[attr-defined]
            raise NotRenewed(f"The tasks of this worker were not renewed within {LIMIT} seconds")


_watched: WeakSet[RenewedQoS] = WeakSet()
_lock = threading.Lock()
_pid: int | None = None


def watch(qos: RenewedQoS) -> None:
    """Renew what a channel holds from now on; start the thread of this process if necessary."""
    global _pid, _lock
    if len(qos.get_held()) == 1:
        # It held nothing before, for however long.
        qos.renewed_at = time.monotonic()
    if qos in _watched and _pid == os.getpid():
        return
    if _pid not in (None, os.getpid()):
        # The thread of the parent process does not exist here, and may have held the lock.
        _lock = threading.Lock()
        _watched.clear()
    with _lock:
        _watched.add(qos)
        if _pid != os.getpid():
            _pid = os.getpid()
            threading.Thread(target=renew_forever, daemon=True).start()


def renew_forever() -> None:
    """Renew what the channels of this process hold."""
    while True:
        time.sleep(INTERVAL)
        with _lock:
            watched = list(_watched)
        for qos in watched:
            try:
                qos.renew_held()
            except Exception as error:
                logger.warning("Could not renew the running tasks: %s", type(error).__name__)


def check(channels: list[Any] | None) -> None:
    """Raise NotRenewed if what one of the channels holds may be delivered to others."""
    for channel in channels or ():
        if isinstance(channel._qos, RenewedQoS):
            channel._qos.check()
