"""``python manage.py upgrade``: upgrade the service to the newest version of its template."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from argparse import ArgumentParser
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from django.conf import settings
from django.core.management import CommandError
from django.core.management.base import BaseCommand

from ...api.schema import get_path

#: Runs cruft, which renders both versions and applies the difference.
CRUFT = ["tool", "run", "--from", "cruft>=2.16,<3", "--with", "cookiecutter>=2.7.1,<2.8", "cruft"]

#: How many lines of the tests' output the report contains.
SHOWN_LINES = 30

RECORD = ".cruft.json"

UNPLACED = (
    "The template changed these files, but the service does not have them: they were renamed or "
    "deleted. Make each change where the code is now. Add files that you do not need to `skip` in "
    "`[tool.cruft]` of `pyproject.toml`:"
)

REJECTED = "Make the changes that these files contain, and delete them:"

#: Finds the environment variables that settings read.
VARIABLE = re.compile(
    r"""^    ([A-Z]\w+) = env\(|env\(key="(\w+)"|^    @env\(.*\n    def ([A-Z]\w+)""", re.M
)


class Command(BaseCommand):
    """Apply the template's changes since the recorded version, and report them.

    The report is Markdown: the template's changelog, changes to files that the service does not
    have, files with conflicts, new migrations, new and removed environment variables, and the
    result of the tests. Nothing is committed and no database is changed. Exits with status 1 if the
    working tree has changes, the template cannot be read, files are missing, or the tests fail;
    conflicts are part of the report.
    """

    help = "Upgrade the service to the newest version of its template, and report what changed."
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add ``--report`` and ``--no-tests``."""
        parser.add_argument("--report", type=Path, help="Write the report to this file too.")
        parser.add_argument("--no-tests", action="store_true", help="Do not run the tests.")

    def handle(self, *args: Any, **options: Any) -> None:
        """Upgrade, and print the report."""
        uv = os.environ.get("UV") or shutil.which("uv")
        if uv is None:
            raise CommandError("uv not found; run: python3 -m pip install uv")
        if not Path(settings.BASE_DIR, RECORD).exists():
            raise CommandError(f"{RECORD} not found: it contains the URL of the template")
        if run(["git", "status", "--porcelain"]).strip():
            raise CommandError("the working tree has changes: commit them first")
        before, files = read_state(), list_files()
        skipped = read_skipped()
        self.stdout.write("Updating from the template ...")
        self.stdout.flush()
        run([uv, *CRUFT, "update", "--skip-apply-ask"])
        after = read_state()
        if before["commit"] == after["commit"]:
            self.stdout.write(f"The template is up to date ({before['version']})")
            return
        conflicts, rejected = find_conflicts(), find_rejected()
        unplaced = find_unplaced(uv, before, after, files, skipped)
        schema = get_path().name
        if set(conflicts) <= {schema} and not rejected:
            run([uv, "sync", "--quiet"])
            # The schema is generated, not merged. If that fails, a test shows why.
            with suppress(CommandError):
                run([uv, "run", "--quiet", "manage.py", "openapi"])
                run(["git", "add", schema])
                conflicts = []
        sections = [
            f"# Template {before['version']} → {after['version']}",
            get_changelog(after, before["version"]),
            list_section("Changes to missing files", unplaced, UNPLACED),
            list_section("Rejected changes", rejected, REJECTED),
            list_section("Conflicts", conflicts, "Resolve the marked lines of these files:"),
        ]
        passed = True
        if conflicts or rejected:
            sections.append(
                "Migrations, variables and tests were not checked because of the conflicts."
            )
        else:
            sections += [
                list_section("New migrations", minus(after, before, "migrations")),
                list_section("New environment variables", minus(after, before, "variables")),
                list_section("Removed environment variables", minus(before, after, "variables")),
            ]
            if not options["no_tests"]:
                self.stdout.write("Running the tests ...")
                self.stdout.flush()
                passed, section = run_tests(uv)
                sections.append(section)
        report = "\n\n".join(section for section in sections if section) + "\n"
        self.stdout.write(report)
        if options["report"]:
            options["report"].write_text(report)
        if not passed or unplaced or rejected:
            sys.exit(1)


def execute(
    command: list[str], env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in the service's folder."""
    return subprocess.run(
        command,
        cwd=settings.BASE_DIR,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(command: list[str]) -> str:
    """Run a command; return its output, or raise CommandError."""
    done = execute(command)
    if done.returncode:
        last = "\n".join(done.stdout.splitlines()[-SHOWN_LINES:])
        raise CommandError(f"{' '.join(command)} failed:\n{last}")
    return done.stdout


def read_state() -> dict[str, Any]:
    """Return the template's version and commit, and the service's migrations and variables."""
    base = Path(settings.BASE_DIR)
    record = json.loads((base / RECORD).read_text())
    context = record["context"]["cookiecutter"]
    # The library in vendor/ has the same version as the service's files.
    paths = [*base.glob("*/settings.py"), *base.glob("vendor/*/src/prodserver_ops/conf/*.py")]
    text = "\n".join(path.read_text() for path in paths)
    return {
        "template": record["template"],
        "commit": record["commit"],
        "directory": record.get("directory"),
        "context": {name: value for name, value in context.items() if not name.startswith("_")},
        "version": context["_version"],
        "migrations": {str(path.relative_to(base)) for path in base.glob("*/**/migrations/0*.py")},
        "variables": {name for match in VARIABLE.findall(text) for name in match if name},
    }


def minus(one: dict[str, Any], other: dict[str, Any], name: str) -> list[str]:
    """Return the items that one state has and the other lacks, sorted."""
    return sorted(one[name] - other[name])


def list_files() -> set[str]:
    """Return the paths of the files that git knows."""
    return set(run(["git", "ls-files"]).splitlines())


def find_conflicts() -> list[str]:
    """Return the files with conflict markers."""
    return run(["git", "diff", "--relative", "--name-only", "--diff-filter=U"]).splitlines()


def find_rejected() -> list[str]:
    """Return the files with changes that git rejected."""
    others = run(["git", "ls-files", "--others", "--exclude-standard"]).splitlines()
    return [name for name in others if name.endswith(".rej")]


def read_skipped() -> list[str]:
    """Return the paths and patterns that cruft leaves out."""
    project = tomllib.loads(Path(settings.BASE_DIR, "pyproject.toml").read_text())
    skipped: list[str] = project.get("tool", {}).get("cruft", {}).get("skip", [])
    return skipped


def find_unplaced(
    uv: str, before: dict[str, Any], after: dict[str, Any], files: set[str], skipped: list[str]
) -> list[str]:
    """Return the files that the template changed, but the service did not have.

    cruft skips them silently. New files in a folder that the service did not have are included,
    for example those in a package that was renamed.
    """
    with tempfile.TemporaryDirectory() as folder:
        old, new = (render(uv, state, Path(folder)) for state in (before, after))
    folders = {str(parent) for name in files for parent in PurePosixPath(name).parents}
    old_folders = {str(parent) for name in old for parent in PurePosixPath(name).parents}
    unplaced = []
    for name in sorted(new):
        path = PurePosixPath(name)
        lost = old[name] != new[name] if name in old else str(path.parent) in old_folders - folders
        paths = [path, *path.parents]
        if (
            lost
            and name not in files
            and not any(fnmatch(str(path), pattern) for path in paths for pattern in skipped)
        ):
            unplaced.append(name)
    return unplaced


def render(uv: str, state: dict[str, Any], folder: Path) -> dict[str, bytes]:
    """Render the template for a state of the service; return the files."""
    context = json.dumps(state["context"] | {"setup": False})
    place = ["--directory", state["directory"]] if state["directory"] else []
    output = folder / state["commit"]
    output.mkdir()
    template = ["create", state["template"], "--checkout", state["commit"], *place]
    arguments = ["--no-input", "--extra-context", context, "--output-dir", str(output)]
    run([uv, *CRUFT, *template, *arguments])
    (service,) = output.iterdir()
    paths = [path for path in service.rglob("*") if path.is_file()]
    return {path.relative_to(service).as_posix(): path.read_bytes() for path in paths}


def get_changelog(state: dict[str, Any], version: str) -> str:
    """Return the sections of the template's changelog that are newer than a version."""
    with tempfile.TemporaryDirectory() as folder:
        run(["git", "clone", "--quiet", state["template"], folder])
        run(["git", "-C", folder, "checkout", "--quiet", state["commit"]])
        changelog = Path(folder, "CHANGELOG.md").read_text()
    sections = re.split(r"^(?=## \[)", changelog, flags=re.M)[1:]
    newer: list[str] = []
    for section in sections:
        if section.startswith(f"## [{version}]"):
            break
        if "\n" in section.strip():
            newer.append(section.strip())
    return "\n\n".join(newer)


def list_section(title: str, items: list[str], introduction: str = "") -> str:
    """Return a section with a list, or an empty string if there are no items."""
    lines = "\n".join(f"- `{item}`" for item in items)
    return f"## {title}\n\n{introduction}\n\n{lines}".replace("\n\n\n\n", "\n\n") if items else ""


def run_tests(uv: str) -> tuple[bool, str]:
    """Run the service's tests; return whether they passed, and a section about them."""
    environment = {name: value for name, value in os.environ.items() if name != "DJANGO_MODE"}
    done = execute([uv, "run", "--quiet", "pytest", "-q"], environment)
    lines = done.stdout.splitlines()
    if done.returncode == 0:
        return True, f"## Tests\n\nPassed: {lines[-1]}"
    shown = "\n".join(lines[-SHOWN_LINES:])
    return False, f"## Tests\n\nFailed:\n\n```\n{shown}\n```"
