#!/usr/bin/env python
"""Run an administrative task of the service."""

import os
import sys

try:
    from prodserver_ops.management import execute_from_command_line
except ModuleNotFoundError as error:
    sys.exit(f"{error}: run it as `uv run manage.py`, or activate the environment in .venv.")

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "{{ cookiecutter.project_slug }}.settings")
    execute_from_command_line(sys.argv)
