"""The modules of the service that a process imports: a change of another one does not restart it."""

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

from django.conf import settings

#: The variable with the path of the file that gets the names.
VARIABLE = "PRODSERVER_IMPORTS"


def get_packages() -> list[Path]:
    """Return the folders of the Python packages next to ``manage.py``."""
    return [path.parent for path in Path(settings.BASE_DIR).glob("*/__init__.py")]


class Recorder(MetaPathFinder):
    """Finds no module, but writes the names of those of the service, also of those that are missing.

    Children of the process inherit it.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.packages = {folder.name for folder in get_packages()}

    def find_spec(self, fullname: str, *args: Any) -> None:
        """Write the name of a module that is imported."""
        self.write([fullname])

    def write(self, names: Iterable[str]) -> None:
        """Append names to the file."""
        lines = [f"{name}\n" for name in names if name.partition(".")[0] in self.packages]
        if lines:
            with suppress(OSError), open(self.path, "a") as file:
                file.write("".join(lines))


def record() -> None:
    """Record the modules that are imported, and those that will be, for ``--reload``."""
    if path := os.environ.get(VARIABLE):
        recorder = Recorder(path)
        recorder.write(list(sys.modules))
        sys.meta_path.insert(0, recorder)


def get_name(path: str) -> str:
    """Return the name of the module in a file."""
    module = Path(os.path.relpath(path, settings.BASE_DIR)).with_suffix("")
    return ".".join(module.parts).removesuffix(".__init__")
