"""``python manage.py forget``: delete or blank what the service stores about one person."""

from argparse import ArgumentParser
from typing import Any

from django.contrib.auth import get_user_model
from django.core.management import CommandError
from django.core.management.base import BaseCommand
from django.db import Error as DatabaseError
from django.db.models import ProtectedError, RestrictedError
from kombu.exceptions import OperationalError

from ...console import forgetting
from ...console.forgetting import Person

NOT_SEARCHED = (
    "Not searched: texts in the models of the service, tasks that wait in a queue, sessions outside "
    "the database, logs, backups, and other services such as Sentry."
)


class Command(BaseCommand):
    """Delete or blank what the library stores about a user, and print what it did.

    That is: API tokens, sessions, counts of logins, deliveries of e-mail, arguments and errors of
    task runs, failed and delayed tasks, results, alerts, and the history of the admin. E-mail to
    the user that is not sent yet is given up. What belongs to the models of the service is listed,
    and kept unless ``--delete`` is given. Exits with status 1 if no user or several are found.
    """

    help = "Delete or blank what the service stores about one person."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the user and the options."""
        parser.add_argument("user", metavar="USER", help="User name, e-mail address or key.")
        parser.add_argument("--dry-run", action="store_true", help="Change nothing.")
        kinds = parser.add_mutually_exclusive_group()
        kinds.add_argument(
            "--delete", action="store_true", help="Also delete the user, and what depends on it."
        )
        kinds.add_argument(
            "--deleted",
            action="store_true",
            help="The user was deleted before: search for the name or address USER.",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Forget the person; raise CommandError if that is not possible."""
        person = self.find(options["user"], options["deleted"])
        others = forgetting.find_others(person)
        try:
            done = forgetting.forget(person, delete=options["delete"], is_trial=options["dry_run"])
        except (ProtectedError, RestrictedError) as error:
            raise CommandError(f"The user cannot be deleted: {error.args[0]}") from error
        except (DatabaseError, OperationalError, OSError, forgetting.Busy) as error:
            raise CommandError(f"Nothing was changed in the database: {error}") from error
        self.stdout.write(
            "Nothing was changed. This would be done:" if options["dry_run"] else "Done:"
        )
        for name, count in done.items():
            self.stdout.write(f"  {name}: {count}")
        if not done:
            self.stdout.write("  nothing was found")
        if not options["delete"]:
            self.write_others(person, others)
        self.stdout.write(NOT_SEARCHED)

    def find(self, text: str, is_deleted: bool) -> Person:
        """Return the person; raise CommandError unless there is one."""
        users = forgetting.find_people(get_user_model(), text)
        if is_deleted and not users:
            return Person(None, [text])
        if is_deleted:
            raise CommandError(f"The user {text} exists; leave out --deleted.")
        if not users:
            hint = "If the user was deleted before, add --deleted."
            raise CommandError(f"No user has the name, address or key {text}. {hint}")
        if len(users) > 1:
            names = ", ".join(user.get_username() for user in users)
            raise CommandError(f"{len(users)} users have the address {text}; name one: {names}")
        return Person.of(users[0])

    def write_others(self, person: Person, others: dict[str, str]) -> None:
        """Print what the project keeps."""
        if person.user is not None:
            label = person.user._meta.label
            self.stdout.write(f"Kept, because it belongs to the service: {label} {person.user.pk}")
        for name, text in others.items():
            self.stdout.write(f"  {name}: {text}")
