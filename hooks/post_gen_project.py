"""Set up the new service, check that it runs, make a first commit, and print the next steps."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

#: For a comparison of two versions the files are only rendered.
COMPARISON = {{is_comparison()}}

SETUP = {{cookiecutter.setup}} and not COMPARISON

#: The upgrade command of 1.x reads this file after the update. upgrade_from_1.py deletes it.
if {{is_update_from_1()}}:
    SETTINGS = Path("{{cookiecutter.project_slug}}", "ops", "settings.py")
    SETTINGS.parent.mkdir()
    SETTINGS.write_text("# Run: python3 vendor/prodserver-ops/upgrade_from_1.py\n")

# uvx sets UV to its own path, which may not be on the PATH.
UV = "uv" if shutil.which("uv") else os.environ.get("UV") or None

#: The Python versions that a service supports, the newest first.
PYTHONS = ("3.14", "3.13", "3.12")

#: The files that contain the Python version of the service, and their lines.
PYTHON_FILES = {
    ".python-version": "{}\n",
    "Dockerfile": "FROM python:{}-slim",
    "compose.dev.yaml": "FROM python:{}-slim",
}

#: The number of lines that are shown if a command fails.
SHOWN_LINES = 30

# Variables that would make the setup use another project, database or broker.
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
    # Each process would compile the same modules again.
    "PYTHONDONTWRITEBYTECODE",
}


def run(command, progress=False):
    """Run a command; return its exit status and output. ``progress`` prints a dot each second."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={k: v for k, v in os.environ.items() if k not in IGNORED_VARIABLES},
            )
        except OSError as error:
            return 127, [str(error)]
        while True:
            try:
                status = process.wait(timeout=1)
                break
            except subprocess.TimeoutExpired:
                if progress:
                    print(".", end="", flush=True)
            except KeyboardInterrupt:
                process.wait()
                return 130, ["interrupted"]
        output.seek(0)
        return status, [line.rstrip() for line in output if line.strip()] or ["no output"]


def get_summary(lines):
    """Return the error messages of uv or git as one line."""
    lines = [line.strip() for line in lines]
    errors = [line for line in lines if line.startswith(("error:", "fatal:", "cause:"))]
    return "; ".join(dict.fromkeys([errors[0], errors[-1]])) if errors else lines[-1]


def choose_python():
    """Make the service use the newest supported Python that is installed."""
    named = Path(".python-version").read_text().strip()
    find = [UV, "python", "find", "--quiet", "--no-python-downloads"]
    found = next((version for version in PYTHONS if run([*find, version])[0] == 0), named)
    for name, line in PYTHON_FILES.items():
        path = Path(name)
        if found != named and path.exists():
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(line.format(named), line.format(found)), encoding="utf-8")


def install():
    """Install the dependencies. Return False if this fails, for example without network."""
    if UV is None:
        print("Install: skipped: uv not found. Run: python3 -m pip install uv")
        return False
    choose_python()
    print("Install:", end="", flush=True)
    status, lines = run([UV, "sync"], progress=True)
    print(f" failed: {get_summary(lines)}" if status else " done", flush=True)
    return status == 0


def prove(title, *arguments):
    """Run a management command, and print its result; exit if it fails."""
    print(f"{title}:", end="", flush=True)
    start = time.monotonic()
    status, lines = run([UV, "run", "--quiet", "manage.py", *arguments], progress=True)
    if status == 130:
        sys.exit("\ninterrupted")
    if status:
        print(" failed", flush=True)
        print("\n".join(f"  {line}" for line in lines[-SHOWN_LINES:]))
        print(f"{title} failed: use --keep-project-on-failure to keep the service.", flush=True)
        sys.exit(1)
    shown = lines[-1] if arguments[0] == "smoke" else f"{time.monotonic() - start:.1f} s"
    print(f" {shown}", flush=True)


def create_first_commit():
    """Commit all files to a new repository, unless this folder is part of one already."""
    title = "First commit"
    message = "Start from cookiecutter-prodserver"
    manual = f"git init -b main && git add . && git commit -m {shlex.quote(message)}"
    if Path(".git").exists():
        return
    if shutil.which("git") is None:
        print(f"{title}: skipped: git not found. Install git, then run: {manual}")
        return
    status, lines = run(["git", "rev-parse", "--show-toplevel"])
    # A nested repository is no problem if the outer repository ignores its folder.
    if status == 0 and run(["git", "check-ignore", "--quiet", "."])[0] != 0:
        print(f"{title}: skipped: this folder is in the repository {lines[-1]}. Commit it there.")
        return
    for command in (
        ["git", "init", "--quiet", "--initial-branch=main"],
        ["git", "add", "."],
        ["git", "commit", "--quiet", "-m", message],
    ):
        status, lines = run(command)
        if status:
            identity = "git config user.name YOU && git config user.email YOU@EXAMPLE.COM"
            print(f"{title}: failed: {get_summary(lines)}. Run: {identity} && {manual}")
            return
    print(f"{title}: done")


def main():
    """Set up the service, if requested, and print the next steps."""
    installed = SETUP and install()
    if installed:
        prove("Migrate", "migrate", "--verbosity=0")
        # migrate has just run the checks.
        prove("Start and stop", "smoke", "--skip-checks")
    if SETUP:
        create_first_commit()
    if COMPARISON:
        return
    uv = shlex.quote(UV or "uv")
    folder = os.path.relpath(Path.cwd(), os.environ.get("PWD", Path.cwd().parent))
    print(f"\n  cd {shlex.quote(folder)}")
    if not installed:
        print(f"  {uv} sync")
        print(f"  {uv} run manage.py migrate")
    print(f"  {uv} run manage.py createsuperuser")
    print(f"  {uv} run honcho start -f Procfile.dev")


main()
