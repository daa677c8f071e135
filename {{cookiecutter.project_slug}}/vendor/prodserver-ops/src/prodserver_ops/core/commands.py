"""Management commands: in another process, and as a person types them."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from django.conf import settings


def get_script() -> str:
    """Return the path of the running ``manage.py``, or of the one in ``BASE_DIR``."""
    script = Path(sys.argv[0]).resolve()
    return str(script if script.name == "manage.py" else Path(settings.BASE_DIR, "manage.py"))


def get_line(command: str) -> str:
    """Return the line that runs a management command on this machine.

    ``uv run`` sets ``UV`` to the path of uv, which may not be on the PATH.
    """
    uv = "uv" if shutil.which("uv") else os.environ.get("UV")
    return f"{shlex.quote(uv)} run manage.py {command}" if uv else f"python manage.py {command}"
