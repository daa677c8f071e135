"""Change the delicate modules of the library in small ways, and see whether their tests notice.

    uv run trials/mutants.py [MODULE ...]

Copies the library and its tests, and runs mutmut on each module, such as ``scheduling.timing``,
with the tests that are its own. Prints the changes that no test notices, and their number. Those
of locks and the scheduler run on the PostgreSQL server of this machine.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.conftest import clean_environment
from tests.generate import copy_template

#: The modules, and the files with their tests.
MODULES = {
    "core.locks": ["test_locks"],
    "mail.attempts": ["test_deliveries"],
    "mail.deliveries": ["test_deliveries"],
    "mail.transport": ["test_deliveries"],
    "scheduling.beat": ["test_beat"],
    "scheduling.crontabs": ["test_crontabs"],
    "scheduling.operations": ["test_schedules"],
    "scheduling.scheduler": ["test_scheduler"],
    "scheduling.timing": ["test_scheduler"],
    "scheduling.validation": ["test_validation"],
    "web.logins": ["test_logins"],
}

#: The modules whose tests need a PostgreSQL server.
POSTGRESQL = {"core.locks", "scheduling.scheduler"}

#: The folder with the source of the library, from that of its tests.
SOURCE = "../{{cookiecutter.project_slug}}/vendor/prodserver-ops/src"

#: Changes that make no difference that matters, by a part of the changed line.
ACCEPTED = {
    r"^\+.*XX": "the text of a message, or a name that is used in one place only",
    r"^\+.*get_manager\(\"|^\+.*get_model\(|^\+ *field, model =": (
        "Django finds a model whatever the case of its name"
    ),
    r"^\+.*\"(KNOWN|known)\"": "a name that is used in one place only",
    r"^\+.*authenticate\(None, |^\+.*authenticate\(request, username, password, \)": (
        "Django's backend uses neither the request nor other credentials"
    ),
    r"^\+.*authenticate\(username, password|^\+.*authenticate\(request, (None|password), ": (
        "without a name, or with the arguments shifted, nobody logs in"
    ),
    r"^\+.*get_key\(get_network|^\+.*get\(None\) is None": (
        "another name is as good; what is known already is stored again"
    ),
    r"^\+.*\) / 2 // MINUTE": "the same number of minutes",
    r"^\+ *while day (> first|< last):$": "a margin of a day, which no time zone needs",
    r"^\+.*\.upper\(\)$": "one form of a name is as good as the other",
    r"^\+.*zip\(CRONTAB_FIELDS": "the number of fields is checked before",
    r"^\+.*astimezone\(None\)": "the tests run in UTC; another zone gives another unique name",
    r"^\+.*self\.interval / unit": "the column stores an integer",
    r"^\+.*(digest_size|signed)=|^\+.*(blake2b\(name\.encode\(\)|from_bytes\(digest), \)": (
        "another number is as good as a lock's key"
    ),
    r"^\+.*(signal\.|execv|sleep\(|os\._exit|sys\.exit|heartbeats\.record|monotonic)": (
        "tests/test_beat.py notices it, with real processes"
    ),
    r"^\+.*logger\.|^\+ *logged = ": "the text of a message",
    r"^\+.*\bcast\(None, ": "a type is for mypy alone",
    r"^\+.*suppress\(": "the statement in the block ends the process anyway",
    r"^\+.*\"(select|SELECT) (pg_|PG_)": "SQL is the same in small and capital letters",
}

CONFIGURATION = """
[tool.mutmut]
paths_to_mutate = ["src/prodserver_ops/{module}.py"]
tests_dir = [{tests}]
also_copy = ["src", "tests"]
"""


@contextmanager
def copied_library():
    """Yield the folder of a copy of the tests, with the source in ``src``; it is deleted after."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copy_template(Path(folder))
        library = Path(folder, "library")
        shutil.copytree(library / SOURCE, library / "src")
        pyproject = library / "pyproject.toml"
        text = pyproject.read_text()
        # mutmut runs pytest in its own process.
        for old, new in ((f'"{SOURCE}"]', '"src"]'), ("--numprocesses=auto", "--numprocesses=0")):
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        pyproject.write_text(text)
        yield library


def main(modules):
    """Run mutmut on each module; return the number of changes that no test noticed."""
    survivors = 0
    with copied_library() as project:

        def run(*command, check=True, **variables):
            done = subprocess.run(
                [os.environ.get("UV", "uv"), *command],
                cwd=project,
                env=clean_environment(**variables),
                check=check,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            return done.stdout

        run("add", "--quiet", "--dev", "mutmut>=3,<4")
        pyproject = (project / "pyproject.toml").read_text()
        for module in modules:
            tests = ", ".join(f'"tests/{name}.py"' for name in MODULES[module])
            configuration = CONFIGURATION.format(module=module.replace(".", "/"), tests=tests)
            (project / "pyproject.toml").write_text(pyproject + configuration)
            shutil.rmtree(project / "mutants", ignore_errors=True)
            variables, options = {}, []
            if module in POSTGRESQL:
                # Tests at the same time would share a database.
                variables["DATABASE_URL"] = "postgres://postgres@127.0.0.1:5432/mutants"
                options = ["--max-children", "1"]
            output = run("run", "--quiet", "mutmut", "run", *options, check=False, **variables)
            results = run("run", "--quiet", "mutmut", "results", "--all", "true")
            # Warnings are printed between the results.
            found = re.findall(r"^ *([\w.\u01c1]+__mutmut_\d+: .*)$", results, re.M)
            if not found:
                sys.exit(f"{module}: mutmut failed:\n{output[-2000:]}")
            alive = [line for line in found if not line.endswith((": killed", ": timeout"))]
            unexplained = 0
            for line in alive:
                name, _, status = line.partition(": ")
                change = run("run", "--quiet", "mutmut", "show", name)
                reason = next((ACCEPTED[p] for p in ACCEPTED if re.search(p, change, re.M)), None)
                unexplained += reason is None
                print(f"\n{status}: {reason or 'NO TEST NOTICES THIS'}\n{change}", flush=True)
            print(
                f"{module}: {unexplained} of {len(found)} changes are not noticed;"
                f" {len(alive) - unexplained} others do not matter",
                flush=True,
            )
            survivors += unexplained
    return survivors


if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - MODULES.keys()
    if unknown:
        sys.exit(f"unknown: {', '.join(unknown)}; the modules are: {', '.join(MODULES)}")
    sys.exit(1 if main(sys.argv[1:] or list(MODULES)) else 0)
