"""Play ten years of schedules on a virtual clock, and compare them with an own reckoning.

    uv run trials/ten_years.py [ZONES] [SEED]

Generates a service and drives its scheduler from 2026 to 2036 in time zones: all that have
daylight saving time or change their rules in these years, or the first ZONES of them in an
order that SEED decides. Beat is restarted, paused for hours, and its schedules are edited at
random. The reckoning uses croniter for wall clock times and a list of the zone's offsets.
The periods of digests must follow each other without a gap or an overlap. A part with rows in
a database (SQLite) shows that the rows lead to the same runs.

At the end it says what the crontab of django-celery-beat makes of the same days on which the
clock changes. Exits with status 1 if anything is wrong.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.conftest import clean_environment
from tests.generate import generated_project

SEED = 20261125

#: Runs in the environment of the service, with the zones and the seed as arguments.
PLAY = """
import sys
import django
django.setup()
from play_years import Play
Play(*map(int, sys.argv[1:])).run()
"""


def main(zones=0, seed=SEED):
    """Generate the service, and play in its environment; return whether all is well."""
    with generated_project(project_slug="years") as project:
        uv = os.environ.get("UV", "uv")
        environment = clean_environment(
            DJANGO_MODE="test",
            DJANGO_SETTINGS_MODULE="years.settings",
            PYTHONPATH=f"{project}{os.pathsep}{Path(__file__).parent}",
        )
        subprocess.run([uv, "sync", "--quiet"], cwd=project, env=environment, check=True)
        start = time.monotonic()
        command = [uv, "run", "--quiet", "--with", "croniter>=6,<7", "python", "-c", PLAY]
        done = subprocess.run(
            [*command, str(zones), str(seed)],
            cwd=project,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
    if done.returncode:
        print(done.stdout)
        return False
    *lines, last = done.stdout.splitlines()
    report = json.loads(last)
    print("\n".join(lines))
    print(f"{time.monotonic() - start:.0f} s: {report}")
    return not any(report[name] for name in ("twice", "missing", "unexpected", "periods wrong"))


if __name__ == "__main__":
    sys.exit(0 if main(*map(int, sys.argv[1:])) else 1)
