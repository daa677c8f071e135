"""Prove every pair of choices: ``uv run trials/pairs.py``.

Each pair of values of any two choices occurs in at least one combination. Each combination is
generated, linted, type-checked, checked, migrated on PostgreSQL, started with all its processes in
production mode on its own broker, given a schedule to run, stopped, and tested with its own tests.
Needs PostgreSQL, RabbitMQ and Redis on their usual ports on 127.0.0.1.

Prints a table in Markdown, and exits with status 1 if a combination fails.
"""

import argparse
import json
import os
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import amqp
import covertable
import psycopg
import redis

from tests.conftest import SECRET_KEY, clean_environment
from tests.generate import ROOT, get_template
from tests.servers import free_port

#: How many combinations run at the same time.
PARALLEL = 2

#: Tables of schedules: none, and one as a team would write it.
TABLES = {
    "default": {},
    "own": {
        "report-hourly": {
            "task": "write_report",
            "interval": {"hours": 1},
            "args": ["all", {"days": 7}],
        },
        "clean-nightly": {"task": "clean", "crontab": "30 3 * * mon-fri"},
    },
}

POSTGRES = "postgres://postgres@127.0.0.1:5432"
UV = os.environ.get("UV", "uv")


def read_choices():
    """Return the values of each choice, by name."""
    questions = json.loads((ROOT / "cookiecutter.json").read_text())
    choices = {
        name: values
        for name, values in questions.items()
        if isinstance(values, list) and not name.startswith("_")
    }
    return choices | {"compose": [False, True], "schedules": ["default", "own"]}


def read_unsupported():
    """Return the combinations of answers that the template refuses."""
    questions = json.loads((ROOT / "cookiecutter.json").read_text())
    return [row["answers"] for row in questions["_unsupported"]]


def make_combinations():
    """Return combinations of answers that contain each supported pair of values."""
    choices = read_choices()
    constraints = [
        {
            "operator": "or",
            "conditions": [
                {"operator": "ne", "left": name, "value": value} for name, value in answers.items()
            ],
        }
        for answers in read_unsupported()
    ]
    rows = covertable.make(choices, constraints=constraints)
    return [{name: row[name] for name in choices} for row in rows]


def choose_sample(size):
    """Return the indexes of some combinations, which depend on the commit alone, if there is one."""
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    indexes = range(len(make_combinations()))
    return sorted(random.Random(done.stdout).sample(indexes, min(size, len(indexes))))


class StepError(Exception):
    """A command failed; its output is the message."""


class Trial:
    """One combination, in a folder of its own."""

    def __init__(self, index, answers, folder):
        self.answers = answers | {"schedules": TABLES[answers["schedules"]]}
        self.slug = f"pair_{index}_{secrets.token_hex(3)}"
        self.folder = folder
        self.project = folder / self.slug
        self.port = free_port()
        self.environment = clean_environment(
            COOKIECUTTER_CONFIG=os.devnull, HOME=folder, UV_CACHE_DIR=get_uv_cache()
        )
        self.production = {
            "DJANGO_MODE": "prod",
            "SECRET_KEY": SECRET_KEY,
            "DATABASE_URL": f"{POSTGRES}/{self.slug}",
            "RABBITMQ_URL": "amqp://guest:guest@127.0.0.1:5672//",
            "REDIS_URL": f"redis://127.0.0.1:6379/{8 + index % 8}",
            "FLOWER_BASIC_AUTH": "name:a-password-for-this-trial",
        }

    def run(self, *command, **variables):
        """Run a command in the project; raise StepError if it fails."""
        done = subprocess.run(
            command,
            cwd=self.project if self.project.exists() else self.folder,
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise StepError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout}")
        return done.stdout

    def manage(self, *arguments, **variables):
        """Run a command of manage.py; raise StepError if it fails."""
        return self.run(UV, "run", "--no-sync", "manage.py", *arguments, **variables)

    def bake(self):
        """Generate the service from the command line."""
        options = [
            f"{name}={value if isinstance(value, str) else json.dumps(value)}"
            for name, value in self.answers.items()
        ]
        self.run(
            *(sys.executable, "-m", "cookiecutter", str(get_template()), "--no-input"),
            *(f"project_slug={self.slug}", "setup=false", *options),
        )

    def lint(self):
        """Check style and format with the template's own Ruff."""
        ruff = [sys.executable, "-m", "ruff"]
        self.run(*ruff, "check")
        self.run(*ruff, "format", "--check")

    def types(self):
        """Install the service and check its types."""
        self.run(UV, "sync", "--quiet")
        self.run(UV, "run", "--no-sync", "mypy")

    def check(self):
        """Run the checks for a deploy, and look for missing migrations."""
        deploy = ["check", "--deploy", "--fail-level", "WARNING"]
        self.manage(*deploy, **self.production)
        self.manage("makemigrations", "--check")

    def migrate(self):
        """Migrate an empty PostgreSQL database."""
        with psycopg.connect(f"{POSTGRES}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {self.slug}")
        redis.Redis.from_url(self.production["REDIS_URL"]).flushdb()
        self.manage("collectstatic", "--noinput", **self.production)
        self.manage("migrate", "--noinput", **self.production)

    def processes(self):
        """Start all processes on the real broker, have a schedule run, and stop them."""
        output = self.manage("smoke", **self.production)
        names = [line.partition(":")[0] for line in self.read_procfile()]
        if not output.startswith(f"{', '.join(names)}: ready, and a schedule was run"):
            raise StepError(f"not all of {names}: {output}")

    def read_procfile(self):
        """Return the lines of the processes in the Procfile."""
        lines = (self.project / "Procfile").read_text().splitlines()
        return [line for line in lines if " prodserver " in line]

    def tests(self):
        """Run the service's own tests on PostgreSQL."""
        self.run(UV, "run", "--no-sync", "pytest", "-q", DATABASE_URL=f"{POSTGRES}/{self.slug}")

    def clean_up(self):
        """Delete database and queues."""
        with psycopg.connect(f"{POSTGRES}/postgres", autocommit=True) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {self.slug} WITH (FORCE)")
        if self.answers["broker"] == "rabbitmq":
            with amqp.Connection("127.0.0.1:5672") as connection:
                for suffix in ("", ".mail", ".high", ".failed"):
                    connection.channel().queue_delete(self.slug + suffix)
        shutil.rmtree(self.folder, ignore_errors=True)


STEPS = ("bake", "lint", "types", "check", "migrate", "processes", "tests")

#: The steps that need neither servers nor packages.
FAST_STEPS = STEPS[:2]


def get_uv_cache():
    """Return the folder of uv's package cache, whatever the home directory is."""
    done = subprocess.run([UV, "cache", "dir"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def run_trial(index, answers, steps=STEPS):
    """Return the seconds of each step; the last one is an error's text if a step failed."""
    folder = Path(tempfile.mkdtemp(prefix="pairs-"))
    trial = Trial(index, answers, folder)
    results = []
    try:
        for step in steps:
            start = time.monotonic()
            getattr(trial, step)()
            results.append(round(time.monotonic() - start))
    except (StepError, OSError) as error:
        results.append(str(error))
    finally:
        if steps != FAST_STEPS:
            trial.clean_up()
        shutil.rmtree(folder, ignore_errors=True)
    return results


def describe(answers):
    """Return the answers that differ from the defaults."""
    defaults = {name: values[0] for name, values in read_choices().items()}
    changed = [f"{name}={value}" for name, value in answers.items() if value != defaults[name]]
    return ", ".join(changed) or "the defaults"


def main():
    """Run the trials and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--fast", action="store_true", help="only generate and lint, without servers"
    )
    parser.add_argument(
        "--sample", type=int, metavar="N", help="N combinations, by the commit's hash"
    )
    parser.add_argument("--only", type=int, nargs="*", metavar="INDEX", help="these combinations")
    options = parser.parse_args()
    combinations = make_combinations()
    steps = FAST_STEPS if options.fast else STEPS
    indexes = options.only or (
        choose_sample(options.sample) if options.sample else range(len(combinations))
    )
    start = time.monotonic()

    def run(index):
        results = run_trial(index, combinations[index], steps)
        failed = isinstance(results[-1], str)
        state = f"{steps[len(results) - 1]} FAILED" if failed else "ok"
        print(f"{index}: {state}, {describe(combinations[index])}", file=sys.stderr, flush=True)
        if failed:
            print(results[-1], file=sys.stderr, flush=True)
        return results

    get_template()
    with ThreadPoolExecutor(PARALLEL) as pool:
        results = list(pool.map(run, indexes))
    print(f"| # | answers | {' | '.join(steps)} |")
    print(f"|---|---|{'---|' * len(steps)}")
    for index, result in zip(indexes, results, strict=True):
        cells = [f"{cell} s" if isinstance(cell, int) else "FAILED" for cell in result]
        cells += ["-"] * (len(steps) - len(cells))
        print(f"| {index} | {describe(combinations[index])} | {' | '.join(cells)} |")
    failures = sum(isinstance(result[-1], str) for result in results)
    minutes = (time.monotonic() - start) / 60
    print(
        f"\n{len(results)} of {len(combinations)} combinations, {failures} failed, {minutes:.1f} min"
    )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
