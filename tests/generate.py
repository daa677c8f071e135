"""Generate services: for tests, benchmarks and trials."""

import atexit
import functools
import io
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from contextlib import contextmanager
from pathlib import Path

from cookiecutter.main import cookiecutter

ROOT = Path(__file__).resolve().parent.parent

#: The folder of the template that becomes a service.
TEMPLATE = ROOT / "{{cookiecutter.project_slug}}"

#: The library in a service, and its Python package.
LIBRARY = Path("vendor", "prodserver-ops")
SOURCES = LIBRARY / "src" / "prodserver_ops"

#: Folders of this repository that no service is made of. Cookiecutter copies a template as a
#: whole for each service.
OTHER_FOLDERS = {"bench", "docs", "library", "tests", "trials"}


@functools.cache
def get_template(release=None):
    """Return a copy of the template without what git ignores, such as virtual environments.

    ``release`` is the version of a release, such as ``"1.0.0"``; otherwise the copy has the files
    as they are now, without the folders that no service is made of.
    """
    folder = Path(tempfile.mkdtemp(prefix="template-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if release is None:
        copy_template(folder, without=OTHER_FOLDERS)
    else:
        extract_release(release, folder)
    return folder


def get_releases():
    """Return the commits of the releases, by version, from the history alone."""
    command = ["git", "log", "--reverse", "--format=%H %s"]
    log = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    releases = {
        match[2]: match[1] for match in re.finditer(r"^(\w+) Release (\d+\.\d+\.\d+)$", log, re.M)
    }
    if "1.0.0" not in releases:
        raise RuntimeError("the releases are missing in this clone: git fetch --unshallow")
    return releases


def extract_release(release, folder):
    """Extract the files of a release, which is a commit of the history."""
    command = ["git", "archive", get_releases()[release]]
    archive = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as file:
        file.extractall(folder, filter="data")


def copy_template(folder, without=()):
    """Copy the files of the template that git knows or would add, but for some of its folders."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in set(done.stdout.split("\0")):
        # A file that is deleted but not committed is still listed.
        if name and name.split("/")[0] not in without and (ROOT / name).is_file():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, path)


def replace(path, old, new):
    """Replace the one occurrence of a text in a file."""
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


@contextmanager
def generated_project(release=None, **answers):
    """Yield the folder of a new service, without setup; it is deleted after.

    ``release`` is the version of the template's release, if it is not the template of now.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # No defaults of the user
        os.environ["COOKIECUTTER_CONFIG"] = f"{folder}/none"
        (Path(folder) / "none").touch()
        context = {"setup": False} | answers
        template = str(get_template(release))
        yield Path(cookiecutter(template, no_input=True, extra_context=context, output_dir=folder))
