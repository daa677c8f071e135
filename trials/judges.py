"""Let other programs judge the template and generated services: ``uv run trials/judges.py``.

Generates each combination of ``trials/pairs.py``, and keeps one copy of each file that differs. Then runs

- zizmor and checkov on the workflows, images and Compose files,
- bandit on the Python code, from medium severity,
- csp-evaluator on the content security policy,
- schemathesis on the API of a running service (``tests/test_api.py``, all examples).

uvx and npm install what is not a dependency of this repository. ``trials/judges.toml`` lists the findings
that are accepted, each with a reason. Exits with status 1 if there is another finding, if an accepted one
is no longer found, or if a judge cannot be installed. ``--only zizmor,bandit`` selects judges.
"""

import argparse
import collections
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.generate import ROOT, generated_project
from trials.pairs import TABLES, UV, make_combinations

#: Prints what csp-evaluator finds in a policy, in JSON.
EVALUATE = """
const {CspEvaluator} = require("csp_evaluator/dist/evaluator.js");
const {CspParser} = require("csp_evaluator/dist/parser.js");
const findings = new CspEvaluator(new CspParser(process.argv[1]).csp).evaluate();
console.log(JSON.stringify(findings));
"""

#: Prints the content security policy of a service.
POLICY = """
from django.utils.csp import build_policy
from prodserver_ops.conf.defaults import Defaults
print(build_policy(Defaults.SECURE_CSP))
"""


class MissingError(Exception):
    """A judge is not installed, and cannot be."""


def read_accepted():
    """Return the reasons of accepted findings by judge, file and rule."""
    table = tomllib.loads((ROOT / "trials" / "judges.toml").read_text())
    return {
        (each["judge"], each["file"], each["rule"]): each["reason"] for each in table["accepted"]
    }


def run(*command, **options):
    """Run a command, and return its output in JSON. Raise MissingError if there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
        return json.loads(done.stdout)
    except FileNotFoundError as error:
        raise MissingError(error) from error
    except ValueError as error:
        raise MissingError(done.stderr[-500:]) from error


def judge_zizmor(folder):
    """Yield the file and rule of each finding of medium or high severity."""
    folders = [folder / ".github", *sorted(folder.glob("*/.github"))]
    command = [Path(sys.executable).with_name("zizmor"), "--offline", "--no-progress"]
    command += ["--no-exit-codes", "--format=json", "--min-severity=medium"]
    for finding in run(*command, *(each for each in folders if each.exists())):
        for location in finding["locations"]:
            yield Path(location["symbolic"]["key"]["Local"]["verbatim_path"]).name, finding["ident"]


def judge_bandit(folder):
    """Yield the file and rule of each finding of medium or high severity."""
    uvx = Path(UV).with_name("uvx")
    command = [uvx if uvx.exists() else "uvx", "--quiet", "--python", sys.executable]
    command += [
        "bandit>=1.9,<2",
        "--quiet",
        "--recursive",
        "--format=json",
        "--severity-level=medium",
    ]
    report = run(*command, "--exclude=*/tests/*", folder)
    for error in report["errors"]:
        yield Path(error["filename"]).name, error["reason"]
    for finding in report["results"]:
        yield Path(finding["filename"]).name, finding["test_id"]


def judge_checkov(folder):
    """Yield the file and rule of each failed check."""
    uvx = Path(UV).with_name("uvx")
    command = [uvx if uvx.exists() else "uvx", "--quiet", "checkov>=3.3,<4", "--directory", folder]
    command += ["--compact", "--quiet", "--output=json", "--skip-download", "--framework"]
    reports = run(*command, "dockerfile", "github_actions", "gitlab_ci", "secrets", "yaml")
    for report in reports if isinstance(reports, list) else [reports]:
        for check in report.get("results", {}).get("failed_checks", []):
            yield Path(check["file_path"]).name, check["check_id"]


def judge_csp(folder):
    """Yield the directive and description of each finding that is more than information."""
    command = [UV, "run", "--quiet", "--directory", "library", "python", "-c", POLICY]
    policy = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as modules:
        install = ["npm", "install", "--silent", "--prefix", modules, "csp_evaluator@1"]
        try:
            subprocess.run(install, capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise MissingError(error) from error
        for finding in run("node", "-e", EVALUATE, policy, cwd=modules):
            if finding["severity"] < 60:
                yield finding["directive"], finding["description"]


def judge_schemathesis(folder):
    """Yield a finding if a response does not conform to the schema."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "", "tests/test_api.py"]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        yield "openapi.yaml", "failed"


JUDGES = {
    "zizmor": judge_zizmor,
    "bandit": judge_bandit,
    "checkov": judge_checkov,
    "csp-evaluator": judge_csp,
    "schemathesis": judge_schemathesis,
}


def collect(folder, combinations):
    """Write the files of this repository and of each combination, those with the same bytes once."""
    seen = set()

    def copy(source, path, target):
        content = source.read_bytes()
        key = (path, hashlib.sha256(content).digest())
        if key not in seen:
            seen.add(key)
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).write_bytes(content)

    for path in [".github", "hooks", "local_extensions.py", "local_schedules.py"]:
        for source in [ROOT / path, *sorted((ROOT / path).rglob("*"))]:
            if source.is_file() and "__pycache__" not in source.parts:
                copy(source, source.relative_to(ROOT), folder)
    for number, answers in enumerate(combinations):
        answers = answers | {"schedules": TABLES[answers["schedules"]]}
        with generated_project(**answers) as project:
            for source in sorted(project.rglob("*")):
                if source.is_file():
                    copy(source, source.relative_to(project), folder / f"{number}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="these judges, separated by commas")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(JUDGES)
    accepted, failed = read_accepted(), False
    folder = Path(tempfile.mkdtemp(prefix="judged-"))
    try:
        collect(folder, make_combinations())
        for name in names:
            try:
                found = collections.Counter((name, *finding) for finding in JUDGES[name](folder))
            except MissingError as error:
                print(f"{name}: MISSING, {error}")
                failed = True
                continue
            new = found.keys() - accepted.keys()
            stale = {each for each in accepted if each[0] == name} - found.keys()
            print(f"{name}: {len(found)} kinds of findings, {len(found) - len(new)} accepted")
            for _, file, rule in sorted(new):
                print(f"  NEW {file}: {rule}")
            for _, file, rule in sorted(stale):
                print(f"  no longer found: {file}: {rule}")
            failed = failed or bool(new or stale)
    finally:
        shutil.rmtree(folder)
    sys.exit(failed)


if __name__ == "__main__":
    os.environ.setdefault("BC_SKIP_MAPPING", "TRUE")  # checkov asks no server for its guidelines.
    main()
