"""Set the new service up: environment, database, first commit. Then say what comes next."""

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

SETUP = {{cookiecutter.setup}}

# uvx tells where it is itself, which may be off the PATH.
UV = "uv" if shutil.which("uv") else os.environ.get("UV") or None

# A step works on the new folder alone, whatever the shell was set up for.
FOREIGN = {
    "CELERY_BROKER_URL",
    "DATABASE_URL",
    "DJANGO_MODE",
    "DJANGO_SETTINGS_MODULE",
    "GIT_DIR",
    "GIT_INDEX_FILE",
    "GIT_WORK_TREE",
    "PYTHONHOME",
    "PYTHONPATH",
    "VIRTUAL_ENV",
}


def run(command):
    """Run a command with a dot for each second; return "" or, if it failed, why."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        try:
            process = subprocess.Popen(
                shlex.split(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={name: value for name, value in os.environ.items() if name not in FOREIGN},
            )
        except OSError as error:
            return str(error)
        while True:
            try:
                if process.wait(timeout=1) == 0:
                    return ""
                break
            except subprocess.TimeoutExpired:
                print(".", end="", flush=True)
            except KeyboardInterrupt:
                process.wait()
                return "interrupted"
        output.seek(0)
        lines = [line.strip() for line in output if line.strip()] or ["no output"]
        told = [line for line in lines if line.startswith(("error:", "fatal:", "cause:"))]
        return "; ".join(dict.fromkeys([told[0], told[-1]])) if told else lines[-1]


def step(title, commands, by_hand):
    """Run the commands of one step; where one fails, say why and what does it by hand."""
    print(title, end="", flush=True)
    for command in commands:
        if problem := run(command):
            print(f" not done: {problem}. To do it: {by_hand}", flush=True)
            return
    print(" done", flush=True)


def set_up():
    if UV is None:
        print(
            "Install and migrate: not done: uv was not found. To do it: "
            "python3 -m pip install uv && uv sync && uv run manage.py migrate"
        )
    else:
        uv = shlex.quote(UV)
        step(
            "Install and migrate:",
            [f"{uv} sync --compile-bytecode", f"{uv} run manage.py migrate"],
            f"{uv} sync && {uv} run manage.py migrate",
        )
    commit = "git commit -m 'Start from cookiecutter-prodserver'"
    if Path(".git").exists():
        return
    if shutil.which("git") is None:
        print(
            "First commit: not done: git was not found. To do it: install git, then "
            f"git init -b main && git add . && {commit}"
        )
    else:
        step(
            "First commit:",
            ["git init --quiet --initial-branch=main", "git add .", f"{commit} --quiet"],
            "git config user.name YOU && git config user.email YOU@EXAMPLE.COM && "
            f"git init -b main && git add . && {commit}",
        )


if SETUP:
    set_up()
uv = shlex.quote(UV or "uv")
print()
print(f"  cd {shlex.quote(os.path.relpath(Path.cwd(), os.environ.get('PWD', Path.cwd().parent)))}")
print(f"  {uv} run manage.py {'createsuperuser' if SETUP else 'migrate'}")
print(f"  {uv} run honcho start -f Procfile.dev -p 8000")
