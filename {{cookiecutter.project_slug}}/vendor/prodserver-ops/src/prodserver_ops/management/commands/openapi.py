"""``python manage.py openapi``: write the OpenAPI schema of the API."""

from argparse import ArgumentParser
from typing import Any

from django.core.management import CommandError
from django.core.management.base import BaseCommand

from ...api.schema import get_path


class Command(BaseCommand):
    """Write the OpenAPI schema of the API to ``openapi.yaml``, which ``/api/schema/`` serves.

    Warns about views that it cannot describe. ``--check`` compares the schema with the file
    instead, and exits with status 1 if they differ.
    """

    help = "Write the OpenAPI schema of the API to openapi.yaml, which /api/schema/ serves."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add ``--check``."""
        parser.add_argument(
            "--check", action="store_true", help="Do not write the file; fail if it is outdated."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Write or compare the schema."""
        try:
            from ...api.openapi import generate_schema
        except ModuleNotFoundError as error:
            raise CommandError(f"{error}; install the packages for development: uv sync") from error
        path = get_path()
        schema = generate_schema(validate=True)
        if options["check"]:
            if not path.exists() or path.read_text(encoding="utf-8") != schema:
                raise CommandError(f"{path.name} is outdated; run: uv run manage.py openapi")
            self.stdout.write(f"{path.name} is up to date.")
            return
        try:
            path.write_text(schema, encoding="utf-8")
        except OSError as error:
            raise CommandError(f"{path} cannot be written: {error.strerror}") from error
        self.stdout.write(f"{path.name} was written.")
