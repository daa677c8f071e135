"""The embedded broker for development: kombu's filesystem transport, safe for several processes.

kombu's transport makes files visible before they are complete: a process that reads a file too
early fails and loses the message. If two processes create the same file, one write is lost. It also
moves messages to the folder for temporary files, which may be on another file system.

https://docs.celeryq.dev/projects/kombu/en/stable/reference/kombu.transport.filesystem.html
"""

import time
from contextlib import suppress
from pathlib import Path
from queue import Empty
from typing import Any
from uuid import uuid4

from kombu.exceptions import OperationalError
from kombu.transport import filesystem
from kombu.utils.json import dumps

from .envelopes import Message, loads


class Channel(filesystem.Channel):
    """A channel that writes each file completely before it becomes visible."""

    Message = Message

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for folder in (self.data_folder_in, self.data_folder_out, self.control_folder):
            Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)

    def _put(  # type: ignore[override]
        self, queue: str, payload: Any, **kwargs: Any
    ) -> None:
        name = f"{time.monotonic_ns() // 1_000_000}_{uuid4()}.{queue}.msg"
        draft = write_draft(Path(self.data_folder_out, name), payload)
        draft.rename(draft.with_name(name))

    def _get(self, queue: str) -> Any:  # type: ignore[override]
        for path in sorted(Path(self.data_folder_in).glob("[!.]*.msg")):
            if path.name.partition(".")[2] == f"{queue}.msg":
                taken = path.with_name(f".{path.name}")
                with suppress(FileNotFoundError):  # Another process took it.
                    path.rename(taken)
                    content = taken.read_text()
                    taken.unlink()
                    return loads(content)
        raise Empty

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str | None, queue: str) -> None:
        table: Path = self._exchange_file(exchange)  # type: ignore[attr-defined]
        if not table.exists():
            draft = write_draft(table, [])
            with suppress(FileExistsError):
                table.hardlink_to(draft)
            draft.unlink()
        super()._queue_bind(exchange, routing_key, pattern, queue)


class Transport(filesystem.Transport):
    """The transport of ``filesystem://`` URLs."""

    #: How often an idle worker looks for messages, in seconds.
    polling_interval = 0.2

    def drain_events(  # type: ignore[override]
        self, connection: Any, timeout: float | None = None
    ) -> None:
        """Process a message; raise TimeoutError soon if there is none, so that workers can stop."""
        super().drain_events(connection, self.polling_interval if timeout else None)

    Channel = Channel


def get_options(settings: Any) -> dict[str, Any]:
    """Return the options of the transport."""
    return {
        "data_folder_in": str(settings.VAR_DIR / "queue"),
        "data_folder_out": str(settings.VAR_DIR / "queue"),
        "control_folder": str(settings.VAR_DIR / "control"),
    }


def write_draft(path: Path, content: Any) -> Path:
    """Write JSON to a hidden file next to the path, which no queue reads; return its path.

    Raises OperationalError, as other brokers do, if it cannot be written.
    """
    draft = path.with_name(f".{uuid4()}")
    try:
        draft.write_text(dumps(content))
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise OperationalError(str(error)) from error
    return draft
