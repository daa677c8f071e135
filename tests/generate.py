"""Generate a service outside of a test, for a benchmark or a trial."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from cookiecutter.main import cookiecutter

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def generated_project(**answers):
    """Yield the folder of a new service, without setup; it is deleted after."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # No defaults of the user
        os.environ["COOKIECUTTER_CONFIG"] = f"{folder}/none"
        (Path(folder) / "none").touch()
        context = {"setup": False} | answers
        yield Path(cookiecutter(str(ROOT), no_input=True, extra_context=context, output_dir=folder))
