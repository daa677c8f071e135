"""Management commands that run in a process of their own."""

import sys
from pathlib import Path

from django.conf import settings


def get_script() -> str:
    """Return the path of ``manage.py``: of the running command, otherwise in ``BASE_DIR``."""
    script = Path(sys.argv[0]).resolve()
    return str(script if script.name == "manage.py" else Path(settings.BASE_DIR, "manage.py"))
