"""Generate services: for tests, benchmarks and trials."""

import atexit
import functools
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

from cookiecutter.main import cookiecutter

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def get_template():
    """Return a copy of the template without what git ignores, such as virtual environments.

    Cookiecutter copies a template as a whole before it runs its first hook.
    """
    folder = Path(tempfile.mkdtemp(prefix="template-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy_template(folder)
    return folder


def copy_template(folder):
    """Copy the files of the template that git knows or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in set(done.stdout.split("\0")):
        # A file that is deleted but not committed is still listed.
        if name and (ROOT / name).is_file():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, path)


@contextmanager
def generated_project(**answers):
    """Yield the folder of a new service, without setup; it is deleted after."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # No defaults of the user
        os.environ["COOKIECUTTER_CONFIG"] = f"{folder}/none"
        (Path(folder) / "none").touch()
        context = {"setup": False} | answers
        template = str(get_template())
        yield Path(cookiecutter(template, no_input=True, extra_context=context, output_dir=folder))
