"""Play ten years of schedules on a virtual clock, and compare them with an own reckoning.

    uv run trials/ten_years.py [ZONES] [SEED]

Generates a service and drives its scheduler from 2026 to 2036 in time zones: all that have
daylight saving time or change their rules in these years, or the first ZONES of them in an
order that SEED decides. Beat is restarted, paused for hours, and its schedules are edited at
random. The reckoning uses croniter for wall clock times and a list of the zone's offsets.
The periods of digests must follow each other without a gap or an overlap. A part with rows in
a database (SQLite) shows that the rows lead to the same runs.

At the end it says what the scheduler of django-celery-beat makes of the same days on which
the clock changes. Exits with status 1 if anything is wrong.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEED = 20261125


def main(zones=0, seed=SEED):
    """Generate the service, and play in its environment; return whether all is well."""
    from cookiecutter.main import cookiecutter

    with tempfile.TemporaryDirectory() as folder:
        os.environ["COOKIECUTTER_CONFIG"] = f"{folder}/none"
        (Path(folder) / "none").touch()
        answers = {"setup": False, "project_slug": "years"}
        project = cookiecutter(str(ROOT), no_input=True, extra_context=answers, output_dir=folder)
        uv = os.environ.get("UV") or shutil.which("uv")
        environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
        environment |= {"DJANGO_MODE": "test", "DJANGO_SETTINGS_MODULE": "years.settings"}
        environment["PYTHONPATH"] = str(project)
        subprocess.run([uv, "sync", "--quiet"], cwd=project, env=environment, check=True)
        start = time.monotonic()
        command = [uv, "run", "--quiet", "--with", "croniter>=6,<7", "python", __file__, "--play"]
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
    report = json.loads(done.stdout.splitlines()[-1])
    print("\n".join(done.stdout.splitlines()[:-1]))
    print(f"{time.monotonic() - start:.0f} s: {report}")
    return not any(report[name] for name in ("twice", "missing", "unexpected", "periods wrong"))


def play(count, seed):
    """Play in the environment of the service, and print a report."""
    import django

    django.setup()
    from play_years import Play

    Play(count, seed).run()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--play"]:
        play(int(sys.argv[2]), int(sys.argv[3]))
    else:
        sys.exit(0 if main(*map(int, sys.argv[1:])) else 1)
