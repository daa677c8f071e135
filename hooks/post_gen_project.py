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

#: Whether cookiecutter asks its questions.
INTERACTIVE = {{is_interactive()}}

SETUP = {{cookiecutter.setup}} and not COMPARISON

#: The upgrade command of 1.x reads this file after the update. upgrade_from_1.py deletes it.
if {{is_update_from_1()}}:
    SETTINGS = Path("{{cookiecutter.project_slug}}", "ops", "settings.py")
    SETTINGS.parent.mkdir()
    SETTINGS.write_text("# Run: python3 vendor/prodserver-ops/upgrade_from_1.py\n")

if {{is_old_workflow()}}:
    shutil.rmtree(Path(".github", "workflows"), ignore_errors=True)

# uvx sets UV to its own path, which may not be on the PATH.
UV = "uv" if shutil.which("uv") else os.environ.get("UV") or None

#: The Python versions that a service supports, the newest first.
PYTHONS = ("3.14", "3.13", "3.12")

#: The files that contain the Python version of the service, and their lines.
PYTHON_FILES = {
    ".python-version": "{}\n",
    ".devcontainer/devcontainer.json": "devcontainers/python:{}",
    "Dockerfile": "FROM python:{}-slim",
    "compose.dev.yaml": "FROM python:{}-slim",
}

#: What to do if the service cannot be set up. Cookiecutter deletes the folder then.
AGAIN = (
    "No service was generated. Run the same command again; --replay uses the same answers, and "
    "setup=no generates the files without installing them."
)

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
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in IGNORED_VARIABLES}


def run(command, progress=False):
    """Run a command; return its exit status and output. ``progress`` prints a dot each second."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=ENVIRONMENT,
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
                raise
        output.seek(0)
        return status, [line.rstrip() for line in output if line.strip()] or ["no output"]


def get_summary(lines):
    """Return the error messages of uv or git as one line."""
    lines = [line.strip() for line in lines]
    errors = [line for line in lines if line.startswith(("error:", "fatal:", "cause:"))]
    return "; ".join(dict.fromkeys([errors[0], errors[-1]])) if errors else lines[-1]


def choose_python():
    """Make the service use the newest supported Python that is installed.

    Return its version and whether it is installed.
    """
    named = Path(".python-version").read_text().strip()
    find = [UV, "python", "find", "--quiet", "--no-python-downloads"]
    found = next((version for version in PYTHONS if run([*find, version])[0] == 0), None)
    for name, line in PYTHON_FILES.items():
        path = Path(name)
        if found not in (None, named) and path.exists():
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(line.format(named), line.format(found)), encoding="utf-8")
    return found or named, found is not None


def install():
    """Install the dependencies, and show uv's progress; exit if this fails."""
    version, is_installed = choose_python()
    source = "" if is_installed else ", which uv downloads: 3.12, 3.13 or 3.14 is not installed"
    print(f"Install: packages for Python {version}{source}", flush=True)
    try:
        status = subprocess.run([UV, "sync"], stdin=subprocess.DEVNULL, env=ENVIRONMENT).returncode
    except OSError as error:
        sys.exit(f"Install failed: {error}. {AGAIN}")
    if status and not is_installed:
        sys.exit(
            f"Install failed: see above. Connect to the network, so that uv can download Python "
            f"{version}, or install Python 3.12, 3.13 or 3.14. {AGAIN}"
        )
    if status:
        sys.exit(f"Install failed: see above. {AGAIN}")


def prove(title, *arguments):
    """Run a management command, and print its result; exit if it fails."""
    print(f"{title}:", end="", flush=True)
    start = time.monotonic()
    status, lines = run([UV, "run", "--quiet", "manage.py", *arguments], progress=True)
    if status:
        print(" failed", flush=True)
        print("\n".join(f"  {line}" for line in lines[-SHOWN_LINES:]))
        sys.exit(f"{title} failed: see above. {AGAIN} --keep-project-on-failure keeps the files.")
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
        outside = shlex.quote(str(Path(lines[-1]).parent))
        print(
            f"{title}: skipped: this folder is in the repository {lines[-1]}. Commit it there. For "
            f"a repository of its own, generate the service outside, with --output-dir {outside}"
        )
        return
    for command in (
        ["git", "init", "--quiet", "--initial-branch=main"],
        ["git", "add", "."],
        # With core.fileMode=false git does not see that the release command can be run.
        ["git", "update-index", "--chmod=+x", "manage.py"],
        ["git", "commit", "--quiet", "-m", message],
    ):
        status, lines = run(command)
        if status:
            identity = "git config user.name YOU && git config user.email YOU@EXAMPLE.COM"
            print(f"{title}: failed: {get_summary(lines)}. Run: {identity} && {manual}")
            return
    print(f"{title}: done")


def create_administrator():
    """Offer to create an administrator, if a person can answer; return whether one was created.

    Its password is only in the database of development, which git ignores.
    """
    if not (INTERACTIVE and sys.stdin.isatty()):
        return False
    try:
        answer = input("Create an administrator for development? [Y/n] ").strip().lower()
        if answer not in ("", "y", "yes"):
            return False
        command = [UV, "run", "--quiet", "manage.py", "createsuperuser"]
        return subprocess.run(command, env=ENVIRONMENT).returncode == 0
    except (EOFError, KeyboardInterrupt):
        return False


def get_steps(installed, has_administrator=False):
    """Return the commands that follow."""
    uv = shlex.quote(UV or "uv")
    folder = os.path.relpath(Path.cwd(), os.environ.get("PWD", Path.cwd().parent))
    first = [] if installed else [f"{uv} sync", f"{uv} run manage.py migrate"]
    administrator = [] if has_administrator else [f"{uv} run manage.py createsuperuser"]
    return [
        f"cd {shlex.quote(folder)}",
        *first,
        *administrator,
        f"{uv} run honcho start -f Procfile.dev",
    ]


def main():
    """Set up the service, if requested, and print the next steps."""
    # A zip of the template, for example, does not keep the mode of the file.
    Path("manage.py").chmod(0o755)
    installed = SETUP and UV is not None
    if SETUP and UV is None:
        print("Install: skipped: uv not found. Run: python3 -m pip install uv")
    if installed:
        install()
        prove("Migrate", "migrate", "--verbosity=0")
        # migrate has just run the checks.
        prove("Start and stop", "smoke", "--skip-checks")
    if SETUP:
        create_first_commit()
    has_administrator = installed and create_administrator()
    if {{is_inside_template()}}:
        print(
            "This folder is in the clone of the template, which cookiecutter copies for each further "
            "service: move it elsewhere, and use --output-dir .. from now on."
        )
    if not COMPARISON:
        print("", *get_steps(installed, has_administrator), sep="\n  ")


try:
    main()
except KeyboardInterrupt:
    # Cookiecutter ends at once and keeps the folder.
    print(f"\nInterrupted, without a commit. Continue with: {' && '.join(get_steps(False))}")
    sys.exit(130)
