"""Change the delicate modules of a service in small ways, and see whether their tests notice.

    uv run trials/mutants.py [MODULE ...]

Generates the default service, and runs mutmut on each module of ``ops`` with the tests that are
its own. Prints the changes that no test notices, and their number.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.conftest import clean_environment
from tests.generate import generated_project

#: The modules, and the files with their tests.
MODULES = {
    "attempts": ["test_deliveries"],
    "beat": ["test_beat"],
    "crontabs": ["test_crontabs"],
    "deliveries": ["test_deliveries"],
    "leases": ["test_leases"],
    "locks": ["test_locks"],
    "logins": ["test_logins"],
    "mailer": ["test_deliveries"],
    "scheduler": ["test_scheduler"],
    "schedules": ["test_schedules"],
}

CONFIGURATION = """
[tool.mutmut]
paths_to_mutate = ["prayer_room_api/ops/{module}.py"]
tests_dir = [{tests}]
also_copy = ["prayer_room_api", "tests", "manage.py"]
"""


def main(modules):
    """Run mutmut on each module; return the number of changes that no test noticed."""
    survivors = 0
    with generated_project() as project:

        def run(*command, check=True):
            done = subprocess.run(
                [os.environ.get("UV", "uv"), *command],
                cwd=project,
                env=clean_environment(),
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
            tests = ", ".join(f'"tests/ops/{name}.py"' for name in MODULES[module])
            configuration = CONFIGURATION.format(module=module, tests=tests)
            (project / "pyproject.toml").write_text(pyproject + configuration)
            shutil.rmtree(project / "mutants", ignore_errors=True)
            output = run("run", "--quiet", "mutmut", "run", check=False)
            results = run("run", "--quiet", "mutmut", "results", "--all", "true")
            # Warnings are printed between the results.
            found = re.findall(r"^ *([\w.\u01c1]+__mutmut_\d+: .*)$", results, re.M)
            if not found:
                sys.exit(f"{module}: mutmut failed:\n{output[-2000:]}")
            alive = [line for line in found if not line.endswith((": killed", ": timeout"))]
            print(f"{module}: {len(alive)} of {len(found)} changes are not noticed", flush=True)
            for line in alive:
                name, _, status = line.partition(": ")
                print(f"\n{status}\n{run('run', '--quiet', 'mutmut', 'show', name)}", flush=True)
            survivors += len(alive)
    return survivors


if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - MODULES.keys()
    if unknown:
        sys.exit(f"unknown: {', '.join(unknown)}; the modules are: {', '.join(MODULES)}")
    sys.exit(1 if main(sys.argv[1:] or list(MODULES)) else 0)
