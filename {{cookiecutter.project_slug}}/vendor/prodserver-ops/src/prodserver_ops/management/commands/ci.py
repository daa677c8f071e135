"""``python manage.py ci``: run what continuous integration runs, in the same order."""

import os
import shlex
import subprocess
import sys
import time
import tomllib
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management import CommandError
from django.core.management.base import BaseCommand

#: The table of ``pyproject.toml`` that maps the names of the steps to shell commands.
TABLE = "tool.prodserver-ops.ci"

#: The exit status after Ctrl-C, as in a shell.
INTERRUPTED = 130


class Command(BaseCommand):
    """Run the steps in ``[tool.prodserver-ops.ci]`` of ``pyproject.toml``, each a shell command.

    Names of steps as arguments select some of them. ``--list`` prints the steps instead. A step
    that fails does not keep the others from running, unless ``--fail-fast`` is given. Exits with
    status 1 if a step failed, and with 130 after Ctrl-C.
    """

    help = "Run the checks and tests that continuous integration runs, in the same order."
    # A step reports what the checks find; this command has to run nevertheless.
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the names of steps and the options."""
        parser.add_argument("steps", nargs="*", metavar="STEP", help="Run only these steps.")
        parser.add_argument("--list", action="store_true", help="List the steps; run nothing.")
        parser.add_argument(
            "--fail-fast", action="store_true", help="Stop after the first step that fails."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Run or list the steps."""
        steps = read_steps(Path(settings.BASE_DIR, "pyproject.toml"))
        for name in options["steps"]:
            if name not in steps:
                raise CommandError(f"unknown step {name!r}; the steps are {', '.join(steps)}")
        chosen = {name: steps[name] for name in steps if name in (options["steps"] or steps)}
        width = max(map(len, chosen))
        if options["list"]:
            for name, command in chosen.items():
                self.stdout.write(f"{name:<{width}}  {command}")
            return
        results: dict[str, tuple[int, float]] = {}
        for name, command in chosen.items():
            self.write(self.style.MIGRATE_HEADING(f"{name}: {command}"))
            start = time.monotonic()
            try:
                status = run_step(command)
            except KeyboardInterrupt:
                self.write(f"\nInterrupted in the step {name}.")
                sys.exit(INTERRUPTED)
            results[name] = status, time.monotonic() - start
            self.write("")
            if status and options["fail_fast"]:
                break
        failed = [name for name, (status, _) in results.items() if status]
        for name, (status, seconds) in results.items():
            if status:
                text = f"{name:<{width}}  failed  {seconds:6.1f} s  exit status {status}"
                self.write(self.style.ERROR(text))
            else:
                self.write(f"{name:<{width}}  passed  {seconds:6.1f} s")
        for name in list(chosen)[len(results) :]:
            self.write(f"{name:<{width}}  not run")
        total = sum(seconds for _, seconds in results.values())
        if failed:
            script = Path(sys.argv[0]).name
            again = f"uv run {script} ci {' '.join(map(shlex.quote, failed))}"
            self.write(self.style.ERROR(f"Failed in {total:.1f} s. To run it again: {again}"))
            sys.exit(1)
        self.write(self.style.SUCCESS(f"Passed in {total:.1f} s."))

    def write(self, text: str) -> None:
        """Print a line before what the next step prints."""
        self.stdout.write(text)
        self.stdout.flush()


def read_steps(path: Path) -> dict[str, str]:
    """Return the shell commands of the steps by name, in order, or raise CommandError."""
    try:
        table: Any = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"{path.name}: {error}") from error
    for part in TABLE.split("."):
        table = table.get(part) if isinstance(table, dict) else None
    if not (
        isinstance(table, dict) and table and all(isinstance(step, str) for step in table.values())
    ):
        example = 'tests = "uv run pytest"'
        raise CommandError(f"{path.name}: write the steps in [{TABLE}], such as {example}")
    return table


def run_step(command: str) -> int:
    """Run a shell command in ``BASE_DIR``; return its exit status.

    What it prints goes to the terminal. On a signal, the status is 128 and its number.
    """
    environment = dict(os.environ)
    # `uv run` sets UV to the path of a uv that may not be on the PATH.
    if uv := environment.get("UV"):
        environment["PATH"] = f"{Path(uv).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    process = subprocess.Popen(["sh", "-c", command], cwd=settings.BASE_DIR, env=environment)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        # The terminal sends Ctrl-C to the step too.
        process.wait()
        raise
    return status if status >= 0 else 128 - status
