"""Reject answers on the command line that cookiecutter would reject with a traceback.

Cookiecutter runs this in a copy of the template. A replay does not ask new questions: they are
moved to another file, and local_extensions.py uses their defaults.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import cookiecutter

OLDEST = (2, 7)

#: What a service runs with, os.fork and file locks, for example, is missing on Windows.
WINDOWS = "Windows is supported through WSL: https://learn.microsoft.com/windows/wsl/install"

#: The folders that Python and its tools make in those that they read.
CACHES = "__pycache__ .mypy_cache .pytest_cache .ruff_cache".split()

BOOLEANS = "1 true t yes y on 0 false f no n off".split()


def get_command():
    """Return the arguments of the cookiecutter command, or an empty list if they are unknown.

    macOS and BSD do not have /proc. There cookiecutter itself refuses a value that is no choice.
    """
    try:
        arguments = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []
    is_command = any("cookiecutter" in Path(name).name for name in arguments[:3])
    return arguments if is_command else []


def find_error(questions, arguments):
    """Return a description of the first invalid answer among the arguments, or None."""
    version = re.findall(r"\d+", cookiecutter.__version__)
    if tuple(map(int, version[:2])) < OLDEST:
        return (
            f"This template needs cookiecutter {'.'.join(map(str, OLDEST))} or later,"
            f" but this is {cookiecutter.__version__}: python3 -m pip install -U cookiecutter"
        )
    for argument in arguments:
        name, _, value = argument.partition("=")
        # local_extensions.py rejects an unknown question.
        if name not in questions:
            continue
        allowed = questions[name]
        if isinstance(allowed, bool):
            allowed = ["yes", "no"]
            value = "yes" if value.strip().lower() in BOOLEANS else value
        if isinstance(allowed, list) and value not in allowed:
            shown = json.dumps(value, ensure_ascii=False)
            return f"{name}: {shown} must be one of: {', '.join(allowed)}"
    return None


if __name__ == "__main__":
    if sys.platform == "win32":
        sys.exit(WINDOWS)
    variables = json.loads(Path("cookiecutter.json").read_text(encoding="utf-8"))
    questions = {name: value for name, value in variables.items() if not name.startswith("_")}
    # Tests and tools leave folders in the library of a clone, which must not be copied to a service.
    for name in CACHES:
        for folder in list(Path().glob(f"*/vendor/**/{name}")):
            shutil.rmtree(folder)
    command = get_command()
    if error := find_error(questions, command):
        print(error)
        sys.exit(1)
    if any(argument.startswith("--replay") for argument in command):
        Path("cookiecutter.json").rename("questions.json")
        Path("cookiecutter.json").write_text("{}", encoding="utf-8")
