"""The embedded broker: Celery's filesystem transport, for processes that start and write at once.

kombu's own shows files before they are written: a process that reads one too early ends with
an error, and the message is lost; two that make the same file lose what the first wrote.

https://docs.celeryq.dev/projects/kombu/en/stable/reference/kombu.transport.filesystem.html
"""

import time
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from kombu.transport import filesystem
from kombu.utils.json import dumps


class Channel(filesystem.Channel):
    """A channel whose files are whole from the moment that they can be seen."""

    def _put(self, queue, payload, **kwargs):
        name = f"{time.monotonic_ns() // 1_000_000}_{uuid4()}.{queue}.msg"
        draft = write_draft(Path(self.data_folder_out, name), payload)
        draft.rename(draft.with_name(name))

    def _queue_bind(self, exchange, routing_key, pattern, queue):
        table = self._exchange_file(exchange)
        if not table.exists():
            draft = write_draft(table, [])
            with suppress(FileExistsError):
                table.hardlink_to(draft)
            draft.unlink()
        super()._queue_bind(exchange, routing_key, pattern, queue)


class Transport(filesystem.Transport):
    """The transport of ``filesystem://`` URLs."""

    Channel = Channel


def write_draft(path, content):
    """Write JSON beside the path, to a file that no queue is looked for in; return its path."""
    draft = path.with_name(f".{uuid4()}")
    draft.write_text(dumps(content))
    return draft
