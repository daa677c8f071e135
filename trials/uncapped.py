"""Run a service with releases that are newer than the ranges of the template allow.

    uv run trials/uncapped.py FOLDER [--prerelease allow]

FOLDER is a generated service. Its lock file gets the newest release of each package that the
service and the library name, whatever their upper limits are. Prints a report as Markdown: the
packages beyond their limits, and the commands of the service that fail with them. Exits with
status 1 if one fails. The weekly workflow ``newest.yml`` opens an issue with the report.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

#: A requirement such as ``celery[redis]>=5.7,<5.8``
REQUIREMENT = re.compile(r"([\w-]+)(?:\[[\w,-]+\])?(.*)")

COMMANDS = [
    "uv run --no-sync manage.py check",
    "uv run --no-sync manage.py migrate --verbosity=0",
    "uv run --no-sync manage.py smoke",
    "uv run --no-sync pytest -q",
]

SHOWN_LINES = 30


def read_limits(folder):
    """Return the upper limits of the packages that the service and the library name."""
    limits = {}
    for path in (folder, folder / "vendor" / "prodserver-ops"):
        project = tomllib.loads((path / "pyproject.toml").read_text())["project"]
        extras = project.get("optional-dependencies", {}).values()
        for requirement in [
            *project["dependencies"],
            *(each for extra in extras for each in extra),
        ]:
            name, versions = REQUIREMENT.fullmatch(requirement).groups()
            if limit := re.search(r"<([\d.]+)", versions):
                limits[name] = limit[1]
    return limits


def to_numbers(version):
    """Return the numbers of a version, to compare it with another one."""
    return [int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3]]


def lift(folder, limits):
    """Let uv ignore the limits. An override replaces all requirements of a package."""
    path = folder / "pyproject.toml"
    names = ", ".join(f'"{name}"' for name in sorted(limits))
    lifted = f"[tool.uv]\noverride-dependencies = [{names}]"
    path.write_text(path.read_text().replace("[tool.uv]", lifted, 1))


def find_beyond(folder, limits):
    """Return the locked packages that are not below their limits, as lines."""
    packages = tomllib.loads((folder / "uv.lock").read_text())["package"]
    return [
        f"- {package['name']} {package['version']} (limit: {limits[package['name']]})"
        for package in packages
        if package["name"] in limits
        and to_numbers(package["version"]) >= to_numbers(limits[package["name"]])
    ]


def run(command, folder):
    """Run a command; return its status and its last lines."""
    done = subprocess.run(
        command.split(), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, "\n".join(done.stdout.splitlines()[-SHOWN_LINES:])


def main(folder, options):
    """Print the report; return whether every command succeeds."""
    limits = read_limits(folder)
    lift(folder, limits)
    results = [("uv sync --upgrade", *run(" ".join(["uv sync --upgrade", *options]), folder))]
    if not results[0][1]:
        results += [(command, *run(command, folder)) for command in COMMANDS]
    print("Packages beyond the limits of the template:\n")
    print("\n".join(find_beyond(folder, limits)) or "None.")
    for command, status, output in results:
        if status:
            print(f"\n`{command}` fails:\n\n```\n{output}\n```")
    return not any(status for _, status, _ in results)


if __name__ == "__main__":
    sys.exit(0 if main(Path(sys.argv[1]).resolve(), sys.argv[2:]) else 1)
