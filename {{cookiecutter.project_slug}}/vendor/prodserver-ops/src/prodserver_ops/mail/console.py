"""The e-mail backend of development: it prints each e-mail, and keeps the latest in files."""

import email
import email.policy
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import EmailMessage as ParsedMessage
from pathlib import Path
from typing import Any
from uuid import uuid4

from django.conf import settings
from django.core.mail import EmailMessage
from django.core.mail.backends import console

#: How many e-mails are kept.
KEPT = 50

#: The name of a file: when the e-mail was sent, in microseconds, and a random part.
NAME = re.compile(r"(\d{16})-[0-9a-f]{8}")


class EmailBackend(console.EmailBackend):
    """Django's console backend, which also keeps the e-mails."""

    def send_messages(self, email_messages: Sequence[EmailMessage]) -> int:
        """Print and keep the e-mails; return how many."""
        count: int = super().send_messages(email_messages)
        folder = get_folder()
        folder.mkdir(parents=True, exist_ok=True)
        for message in email_messages:
            path = folder / f"{time.time_ns() // 1000:016d}-{uuid4().hex[:8]}"
            path.write_bytes(message.message().as_bytes())
        for path in sorted(folder.iterdir(), reverse=True)[KEPT:]:
            path.unlink(missing_ok=True)  # Another process may have deleted it.
        return count


@dataclass(frozen=True)
class Sent:
    """An e-mail that was sent in development."""

    name: str
    message: ParsedMessage

    @property
    def sent_at(self) -> datetime:
        """When it was sent."""
        return datetime.fromtimestamp(int(self.name[:16]) / 1_000_000, UTC)

    @property
    def subject(self) -> str:
        """The subject."""
        return str(self.message.get("Subject", ""))

    @property
    def to(self) -> str:
        """The recipients."""
        return str(self.message.get("To", ""))

    def get_text(self, kind: str) -> str:
        """Return the text of the kind ``html`` or ``plain``; an empty string if it has none."""
        part: Any = self.message.get_body((kind,))
        return str(part.get_content()) if part is not None else ""


def get_folder() -> Path:
    """Return the folder of the e-mails."""
    return Path(settings.VAR_DIR, "mail")


def read(name: str) -> Sent:
    """Return an e-mail; raise OSError if there is none with this name."""
    if not NAME.fullmatch(name):
        raise FileNotFoundError(name)
    data = Path(get_folder(), name).read_bytes()
    message: Any = email.message_from_bytes(data, policy=email.policy.default)
    return Sent(name, message)


def get_latest(number: int) -> list[Sent]:
    """Return the latest e-mails, the newest first."""
    found = []
    folder = get_folder()
    for path in sorted(folder.iterdir(), reverse=True)[:number] if folder.exists() else ():
        with suppress(OSError):  # Another process may have deleted it.
            found.append(read(path.name))
    return found
