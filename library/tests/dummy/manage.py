import os
import sys
from pathlib import Path

from django.core.management import execute_from_command_line

if __name__ == "__main__":
    # In the folder of this file the name celery would be that of dummy/celery.py.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "dummy.settings")
    execute_from_command_line(sys.argv)
