"""Set up the new service (environment, database, first commit) and print the next steps."""

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

SETUP = {{ cookiecutter.setup and not is_comparison() }}

# uvx sets UV to its own path, which may not be on the PATH.
UV = "uv" if shutil.which("uv") else os.environ.get("UV") or None

# Variables that would make setup act on something other than the new project.
IGNORED_VARIABLES = {
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
    """Run a command, printing a dot each second. Return "" on success, or the error."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        try:
            process = subprocess.Popen(
                shlex.split(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={k: v for k, v in os.environ.items() if k not in IGNORED_VARIABLES},
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
        errors = [line for line in lines if line.startswith(("error:", "fatal:", "cause:"))]
        return "; ".join(dict.fromkeys([errors[0], errors[-1]])) if errors else lines[-1]


def run_step(title, commands, manual):
    """Run the commands of a step. On failure, print the error and the manual command."""
    print(f"{title}:", end="", flush=True)
    for command in commands:
        if error := run(command):
            print(f" failed: {error}. Run: {manual}", flush=True)
            return
    print(" done", flush=True)


def install_and_migrate():
    title = "Install and migrate"
    if UV is None:
        print(
            f"{title}: skipped: uv not found. "
            "Run: python3 -m pip install uv && uv sync && uv run manage.py migrate"
        )
        return
    uv = shlex.quote(UV)
    run_step(
        title,
        [f"{uv} sync --compile-bytecode", f"{uv} run manage.py migrate"],
        f"{uv} sync && {uv} run manage.py migrate",
    )


def create_first_commit():
    title = "First commit"
    commit = "git commit -m 'Start from cookiecutter-prodserver'"
    manual = f"git init -b main && git add . && {commit}"
    if Path(".git").exists():
        return
    if shutil.which("git") is None:
        print(f"{title}: skipped: git not found. Install git, then run: {manual}")
        return
    run_step(
        title,
        ["git init --quiet --initial-branch=main", "git add .", f"{commit} --quiet"],
        f"git config user.name YOU && git config user.email YOU@EXAMPLE.COM && {manual}",
    )


if SETUP:
    install_and_migrate()
    create_first_commit()
uv = shlex.quote(UV or "uv")
print()
print(f"  cd {shlex.quote(os.path.relpath(Path.cwd(), os.environ.get('PWD', Path.cwd().parent)))}")
print(f"  {uv} run manage.py {'createsuperuser' if SETUP else 'migrate'}")
print(f"  {uv} run honcho start -f Procfile.dev -p 8000")
