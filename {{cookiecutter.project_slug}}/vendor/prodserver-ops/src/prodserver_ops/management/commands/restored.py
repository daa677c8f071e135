"""``python manage.py restored``: decide what is sent again after a restore."""

import sys
from argparse import ArgumentParser, ArgumentTypeError
from datetime import datetime
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.utils import timezone
from django.utils.dateparse import parse_datetime

from ...mail.restores import Due, find_due, mark_logged
from ...scheduling import restores

CHOICES = """
E-mail waits until you decide:
  python manage.py restored --mark-sent    none of this is sent or run again
  python manage.py restored --send-again   all of it is, for some the second time
  python manage.py restored --decide       ask about each
  python manage.py restored --log FILE     what the log of the mail server contains counts as sent,
                                           and all else is sent or run"""


class Command(BaseCommand):
    """Show what was due between the backup and its restore, and do with it what an option says.

    Exits with status 1 while that is undecided. ``--to`` announces a restore that the service
    cannot recognize: that of a disk, or of SQLite.
    """

    help = "After a restore, decide what is sent again of what was due since the backup."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument(
            "--to",
            type=parse_time,
            metavar="TIME",
            help="The database was restored to this time, such as 2030-01-31T03:00; "
            "without an offset, in the service's time zone.",
        )
        group = parser.add_mutually_exclusive_group()
        group.add_argument(
            "--mark-sent", action="store_true", help="Nothing is sent or run again."
        )
        group.add_argument("--send-again", action="store_true", help="All is sent or run again.")
        group.add_argument("--decide", action="store_true", help="Ask about each kind.")
        group.add_argument(
            "--log",
            metavar="FILE",
            help="A log of the mail server: the e-mails whose Message-IDs it contains were sent.",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Show and decide."""
        restore = restores.announce(options["to"]) if options["to"] else restores.find_restore()
        if restore is None:
            self.stdout.write("No restore was found, and e-mail does not wait; see --to.")
            return
        text = str(restore)
        self.stdout.write(f"{text[0].upper()}{text[1:]}.")
        due = find_due(restore)
        if due:
            self.stdout.write("These may have been sent or run in between:")
            for each in due:
                self.stdout.write(f"- {each.text}")
        else:
            self.stdout.write("Nothing was due in between.")
        if options["mark_sent"]:
            self.mark(due)
        elif options["decide"]:
            self.mark([each for each in due if self.was_sent(each)])
        elif options["log"]:
            self.read_log(options["log"])
        elif due and not options["send_again"]:
            self.stdout.write(CHOICES)
            sys.exit(1)
        restores.note_origin()
        self.stdout.write("E-mail continues.")

    def read_log(self, path: str) -> None:
        """Mark what a log says was sent."""
        try:
            with open(path, errors="replace") as lines:
                count = mark_logged(lines)
        except OSError as error:
            raise CommandError(f"--log: {error}") from error
        self.stdout.write(f"{count} e-mails were sent according to the log.")

    def mark(self, due: list[Due]) -> None:
        """Mark what was sent."""
        for each in due:
            each.mark()
            self.stdout.write(f"Marked as sent: {each.text}")

    def was_sent(self, due: Due) -> bool:
        """Ask whether something was sent."""
        while True:
            match input(f"{due.text}: [m]ark as sent, or [s]end again? ").strip().lower():
                case "m":
                    return True
                case "s":
                    return False


def parse_time(text: str) -> datetime:
    """Return a time of the command line, aware."""
    try:
        time = parse_datetime(text)
    except ValueError:
        time = None
    if time is None:
        raise ArgumentTypeError(f"{text!r} is not a time such as 2030-01-31T03:00")
    time = time if timezone.is_aware(time) else timezone.make_aware(time)
    if time > timezone.now():
        raise ArgumentTypeError(f"{text} is in the future")
    return time
