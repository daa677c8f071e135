"""``python manage.py requeue``: run failed tasks again."""

from argparse import ArgumentParser
from typing import Any

from celery import current_app
from django.core.management.base import BaseCommand
from kombu.message import Message

from ...worker.failed import repeat


class Command(BaseCommand):
    """Return the messages of failed tasks to their queues; by default those of all tasks.

    ``doctor`` reports how many there are. Prints the number of requeued tasks.
    """

    help = "Run failed tasks again. The command doctor reports how many there are."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the names of tasks."""
        parser.add_argument(
            "tasks", nargs="*", metavar="task", help="Only this task; all if omitted."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Return the messages."""
        names = options["tasks"]

        def is_wanted(message: Message) -> bool:
            return not names or message.headers.get("task") in names

        self.stdout.write(f"{repeat(current_app, is_wanted)} tasks queued again")
