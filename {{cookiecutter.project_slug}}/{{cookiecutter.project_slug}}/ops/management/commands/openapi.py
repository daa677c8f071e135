"""``python manage.py openapi``: write the OpenAPI schema of the API."""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management import CommandError
from django.core.management.base import BaseCommand

from ...openapi import generate_schema


class Command(BaseCommand):
    """Write the OpenAPI schema of the API to ``openapi.yaml``, which ``/api/schema/`` serves.

    ``--check`` compares it with that file instead. Exits with status 1 if the schema is not
    valid, if it leaves out what a view does, or if the file that ``--check`` reads is not current.
    """

    help = "Write the OpenAPI schema of the API to openapi.yaml, which /api/schema/ serves."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add ``--check``."""
        parser.add_argument(
            "--check", action="store_true", help="Write nothing; fail if the file is not current."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Write or compare the schema."""
        path = Path(settings.BASE_DIR, "openapi.yaml")
        schema = generate_schema(validate=True, fail_on_warn=True)
        if not options["check"]:
            path.write_text(schema, encoding="utf-8")
            self.stdout.write(f"{path.name} is written.")
        elif not path.exists() or path.read_text(encoding="utf-8") != schema:
            raise CommandError(
                f"{path.name} does not describe the API as it is now; run: uv run manage.py openapi"
            )
        else:
            self.stdout.write(f"{path.name} is current.")
