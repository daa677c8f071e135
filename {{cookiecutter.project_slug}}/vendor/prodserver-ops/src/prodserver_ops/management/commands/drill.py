"""``python manage.py drill``: try whether a backup would bring the service back."""

import glob
import json
import os
import signal
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management import CommandError, call_command
from django.core.management.base import BaseCommand
from django.db import DEFAULT_DB_ALIAS, DatabaseError, connection
from django.db.migrations.executor import MigrationExecutor
from django.template.defaultfilters import filesizeformat
from django.utils import timezone
from django.utils.timesince import timesince

from ...console import drills
from ...core.commands import get_script
from ...core.database import lift_limit
from ...core.locks import try_lock
from ...core.redaction import redact
from ...mail.restores import find_due
from ...scheduling import restores

#: The settings of the copy, in the second process of this command.
SETTINGS = "prodserver_ops.conf.drill"

#: How long the second process may take to end, in seconds.
STOP_SECONDS = 60

#: The exit status after Ctrl-C or SIGTERM, as in a shell.
INTERRUPTED = 130


class Command(BaseCommand):
    """Restore a backup beside production, start the processes on it, and say what is missing.

    ``BACKUP`` is a dump of ``pg_dump`` (custom format or SQL) or a file of SQLite, also compressed
    with gzip. Exits with status 1 if the backup would not bring the service back. Nothing of
    production is changed, no e-mail is sent, and the copy is deleted.
    """

    help = "Restore a backup beside production, and say whether it would bring the service back."
    # With the settings of the copy, they are those of production on other servers.
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the file and the limits."""
        parser.add_argument(
            "backup",
            nargs="?",
            help="The file, or a pattern of which the newest is taken; BACKUP_PATH by default.",
        )
        parser.add_argument(
            "--max-age",
            type=float,
            default=48,
            metavar="HOURS",
            help="An older newest record is a problem; 48 by default, 0 for no limit.",
        )
        parser.add_argument(
            "--timeout",
            type=int,
            default=120,
            metavar="SECONDS",
            help="Time limit for the processes to be ready, and then to stop; 120 by default.",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Restore the backup, and examine it with the settings of the copy."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            if settings.SETTINGS_MODULE == SETTINGS:
                self.examine(**options)
            else:
                self.drill(**options)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)

    def drill(self, backup: str | None, **options: Any) -> None:
        """Restore the backup, and let another process examine it."""
        path = find_backup(backup or settings.BACKUP_PATH)
        self.stdout.write(f"Backup: {path}, {filesizeformat(path.stat().st_size)}")
        with try_lock("drill") as mine, tempfile.TemporaryDirectory(prefix="drill-") as folder:
            if not mine:
                raise CommandError("another drill is running")
            try:
                with drills.restore(path, Path(folder)) as copy:
                    status = run_examination(folder, copy, options)
            except drills.Damaged as error:
                status = self.finish([str(error)])
            except DatabaseError as error:
                raise CommandError(f"no copy can be created: {redact(str(error))}") from error
        sys.exit(status)

    def examine(self, max_age: float, timeout: int, **options: Any) -> None:
        """Compare the copy with production, start the processes, and reconcile deliveries."""
        connection.ensure_connection()
        newest = drills.find_newest()
        if newest is None:
            self.stdout.write("Newest record: unknown")
        else:
            age = timesince(newest).replace("\xa0", " ")
            self.stdout.write(
                f"Newest record: {timezone.localtime(newest):%Y-%m-%d %H:%M %Z}, {age} ago"
            )
        problems = list(drills.find_foreign()) or list(self.migrate())
        if not problems:
            lift_limit(DEFAULT_DB_ALIAS)
            problems += drills.find_missing(newest)
            if newest and max_age and timezone.now() - newest > timedelta(hours=max_age):
                problems.append(f"the newest record is older than {max_age:g} hours; see --max-age")
        if not problems:
            try:
                self.reconcile(newest or timezone.now())
                drills.silence()
                call_command("smoke", timeout=timeout, stdout=self.stdout)
            except Exception as error:
                problems.append(describe(error))
        sys.exit(self.finish(problems))

    def migrate(self) -> Iterator[str]:
        """Apply the migrations that the backup lacks; return the error, if any."""
        try:
            executor = MigrationExecutor(connection)
            plan = executor.migration_plan(executor.loader.graph.leaf_nodes())
            if plan:
                self.stdout.write(f"Migrations: {len(plan)} are applied, the first is {plan[0][0]}")
            call_command("migrate", interactive=False, verbosity=0)
        except Exception as error:
            yield f"migrate: {describe(error)}; rows of django_migrations or parts of a table are missing"

    def reconcile(self, newest: datetime) -> None:
        """Decide about the e-mail that waits, as ``restored --mark-sent`` does."""
        due = find_due(restores.find_restore() or restores.announce(newest))
        for each in due:
            each.mark()
        restores.note_origin()
        waiting = "; ".join(each.text for each in due) or "nothing"
        self.stdout.write(f"What waits for the command restored: {waiting}")

    def finish(self, problems: list[str]) -> int:
        """Print the problems and the verdict; return the exit status."""
        for problem in problems:
            self.stdout.write(f"- {problem}")
        verb = "would not" if problems else "would"
        style = self.style.ERROR if problems else self.style.SUCCESS
        self.stdout.write(style(f"This backup {verb} bring the service back."))
        return 1 if problems else 0


def find_backup(pattern: str) -> Path:
    """Return the newest file that matches; raise CommandError if there is none."""
    if not pattern:
        raise CommandError("name the backup, or set BACKUP_PATH")
    if not (paths := [path for path in map(Path, glob.glob(pattern)) if path.is_file()]):
        raise CommandError(f"there is no file {pattern}")
    return max(paths, key=lambda path: path.stat().st_mtime)


def run_examination(folder: str, copy: str, options: dict[str, Any]) -> int:
    """Run the second process, and end it when this one is interrupted; return its exit status."""
    drill = {"settings": settings.SETTINGS_MODULE, "folder": folder, "database": copy}
    command = [sys.executable, get_script(), "drill"]
    command += [f"--max-age={options['max_age']}", f"--timeout={options['timeout']}"]
    environment = {
        "DJANGO_SETTINGS_MODULE": SETTINGS,
        drills.VARIABLE: json.dumps(drill),
        "TMPDIR": folder,
        "BIND_HOST": "127.0.0.1",
        "WEB_CONCURRENCY": "1",
        "WORKER_CONCURRENCY": "1",
        "LOG_LEVEL": "WARNING",
    }
    # Ctrl-C reaches this process alone, which ends the other one.
    process = subprocess.Popen(command, env=os.environ | environment, start_new_session=True)
    try:
        return process.wait()
    finally:
        process.terminate()
        process.wait(STOP_SECONDS)


def describe(error: Exception) -> str:
    """Return an error as one line without secrets."""
    return redact(" ".join(str(error).split()))[:500] or type(error).__name__
