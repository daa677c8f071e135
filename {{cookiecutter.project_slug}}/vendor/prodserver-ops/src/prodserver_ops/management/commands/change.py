"""``python manage.py change``: change an answer of the service, such as its broker."""

import sys
import tempfile
from argparse import ArgumentParser
from copy import deepcopy
from pathlib import Path
from typing import Any

from django.core.management import CommandError
from django.core.management.base import BaseCommand

from ...console import upgrades

#: Answers that files alone cannot change, and what to do instead.
REFUSED = {
    "project_slug": "rename the package yourself; upgrades find renamed files",
    "example": "docs/recipes.md describes how to replace the example",
    "schedules": "write a migration with CreateSchedule, or use the admin",
    "setup": "it has no effect after the first command",
    "more_choices": "it has no effect after the first command",
}

#: Databases have run the migrations of the service.
MIGRATIONS = "*/migrations/*"

UNCHANGED = (
    "With the new answers the template has other migrations. They are not changed here, because "
    "databases have run them; write a new migration for what these would add:"
)


class Command(BaseCommand):
    """Merge the difference that other answers make at the recorded version of the template.

    Arguments are ``NAME=VALUE``. The report is that of ``manage.py upgrade``, without release notes.
    Migrations are left as they are, and listed. Nothing is committed and no database is changed.
    Exits with status 1 if an answer is unknown or invalid, the working tree has changes, there are
    conflicts, or the tests fail.
    """

    help = "Change answers of the service, such as broker=redis; see docs/upgrades.md."
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the answers and ``--no-tests``."""
        parser.add_argument("answers", nargs="+", metavar="NAME=VALUE")
        parser.add_argument("--no-tests", action="store_true", help="Do not run the tests.")

    @upgrades.explain_interrupt()
    def handle(self, *args: Any, **options: Any) -> None:
        """Change the answers, and print the report."""
        uv = upgrades.find_uv()
        upgrades.require_clean_tree()
        record = upgrades.read_record()
        given = read_answers(upgrades.get_answers(record), options["answers"])
        later = deepcopy(record)
        later["context"]["cookiecutter"] |= given
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            address = upgrades.choose_address(record, None)
            template = upgrades.Template(address, folder / "template")
            commit = template.find_commit(record)
            self.stdout.write(f"Template: {address}, commit {commit[:12]}")
            self.stdout.flush()
            versions = [(commit, record), (commit, later)]
            before, after = upgrades.render_both(template, uv, versions, folder)
            files = [upgrades.list_files(service) for service in (before, after)]
            skipped = [*upgrades.read_skipped(record), MIGRATIONS]
            changes = [
                f"{name}: {record['context']['cookiecutter'][name]} → {value}"
                for name, value in given.items()
            ]
            answers = upgrades.read_answers(after, record, address)
            with upgrades.undo_if_interrupted():
                merged = upgrades.merge(before, after, skipped, ", ".join(changes))
                upgrades.write_record(record | {"context": {"cookiecutter": answers}})
                merged.title = ", ".join(changes)
                merged.save()
        changed = [
            path
            for path in sorted(set(files[0]) | set(files[1]))
            if upgrades.matches(path, [MIGRATIONS]) and files[0].get(path) != files[1].get(path)
        ]
        merged.notes = upgrades.list_section("Do this", changed, UNCHANGED)
        passed, report = upgrades.build_report(uv, merged, with_tests=not options["no_tests"])
        self.stdout.write(report)
        if not passed or merged.conflicts:
            sys.exit(1)


def read_answers(known: dict[str, Any], arguments: list[str]) -> dict[str, Any]:
    """Return the answers in the arguments that differ from the known ones, or raise CommandError."""
    given: dict[str, Any] = {}
    for argument in arguments:
        name, is_answer, value = argument.partition("=")
        if not is_answer or name not in known:
            raise CommandError(f"{argument}: write NAME=VALUE with one of: {', '.join(known)}")
        if reason := REFUSED.get(name):
            raise CommandError(f"{name} cannot be changed: {reason}")
        if value != str(known[name]):
            given[name] = value
    if not given:
        raise CommandError("these are the answers that the service has already")
    return given
