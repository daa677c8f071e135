"""Management commands that run in another process."""

import sys
from pathlib import Path

from django.conf import settings


def get_script() -> str:
    """Return the path of the running ``manage.py``, or of the one in ``BASE_DIR``."""
    script = Path(sys.argv[0]).resolve()
    return str(script if script.name == "manage.py" else Path(settings.BASE_DIR, "manage.py"))
