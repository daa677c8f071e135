"""Measure how long the first command takes until a service is generated, proved and committed.

    uv run bench/first.py [--release VERSION] [--runs N]

Generates the default service with its setup, as cookiecutter does from the command line, from the
template of now and of release 1.4.0, or of another one, in turns, and prints a table in Markdown
with the medians of N runs, 3 unless given. One run before fills uv's cache of packages; the others
are without network. What the README's first command does besides is not measured: pip and uvx,
which install uv and cookiecutter.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from digest import ROOT

#: The release whose first command is measured beside that of now
LAST_RELEASE = "1.4.0"

#: The parts of setup that say how long they took, by what a row says, with a pattern
PARTS = {
    "the whole command, seconds": None,
    "its `migrate`, seconds": r"^Migrate:\.* ([\d.]+) s$",
    "its processes until they work, seconds": r" after ([\d.]+) seconds; stopped",
    "and until they stopped, seconds": r"; stopped after ([\d.]+) more",
}

#: What would make setup another one: this environment, and Python without bytecode.
IGNORED_VARIABLES = {"PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV"}

#: An author for the first commit
GIT_IDENTITY = {
    "GIT_AUTHOR_NAME": "A",
    "GIT_AUTHOR_EMAIL": "a@example.com",
    "GIT_COMMITTER_NAME": "A",
    "GIT_COMMITTER_EMAIL": "a@example.com",
}


def run_first_command(template, **variables):
    """Generate a service in a folder that is deleted after. Return the seconds of each part."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        kept = {name: os.environ[name] for name in os.environ.keys() - IGNORED_VARIABLES}
        environment = kept | GIT_IDENTITY | variables
        environment |= {"COOKIECUTTER_CONFIG": os.devnull, "PWD": folder}
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "cookiecutter", template, "--no-input"],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        seconds = time.perf_counter() - start
        if done.returncode or not Path(folder, "prayer_room_api", ".git").exists():
            sys.exit(f"the service was not set up:\n{done.stdout}")
    return {
        name: float(re.search(pattern, done.stdout, re.M)[1]) if pattern else seconds
        for name, pattern in PARTS.items()
    }


def measure(release, runs):
    """Measure the template of now and a release in turns. Return a table in Markdown."""
    sys.path.insert(0, str(ROOT))
    from tests.generate import get_template

    names = {"this template": None, f"release {release}": release}
    results = {name: [] for name in names}
    for release in names.values():
        run_first_command(str(get_template(release)))
    for turn in range(runs):
        for name in sorted(names, reverse=bool(turn % 2)):
            template = str(get_template(names[name]))
            results[name].append(run_first_command(template, UV_OFFLINE="1"))
            print(f"{name}: {results[name][-1]}", file=sys.stderr, flush=True)
    lines = [f"| figure | {' | '.join(names)} | ratio |", "|---|---|---|---|"]
    for part in PARTS:
        ours, theirs = (statistics.median(each[part] for each in results[name]) for name in names)
        lines.append(f"| {part} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} |")
    return "\n".join(lines)


def main():
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--release", default=LAST_RELEASE, metavar="VERSION")
    parser.add_argument("--runs", type=int, default=3, help="of each, default 3")
    options = parser.parse_args()
    print(measure(options.release, options.runs))


if __name__ == "__main__":
    main()
