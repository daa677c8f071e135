"""The weekly workflow of a service: its steps, with a repository that refuses what GitHub refuses."""

import base64
import runpy
import shutil

import pytest

from tests.generate import ROOT
from tests.github import GitHub
from trials.time_travel import PACKAGE, VENDOR, Template, run

pytestmark = pytest.mark.slow

BRANCH = "upgrade-template"

WORKFLOW = ".github/workflows/ci.yml"


#: The job that pushes
PUSH = "pull-request"

MARKERS = ("<" * 7, "=" * 7, ">" * 7)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return Template(tmp_path_factory.mktemp("template") / "template")


@pytest.fixture
def github(template, tmp_path, uv):
    """A service of the template as it is now on GitHub, with a line that will be a conflict."""
    template.check_out("now")
    answers = '--extra-context={"setup": false, "example": "none"}'
    run(["cruft", "create", str(template.folder), answers, "-y"], tmp_path, UV=uv, PWD=tmp_path)
    service = tmp_path / "prayer_room_api"
    run([uv, "lock", "--quiet"], service)
    # The report needs a result of the tests, but not of all of them.
    shutil.rmtree(service / "tests")
    (service / "tests").mkdir()
    (service / "tests" / "test_one.py").write_text("def test_one():\n    pass\n")
    procfile = service / "Procfile"
    procfile.write_text(procfile.read_text().replace("release: ./manage.py", "release: ./manage"))
    found = GitHub(tmp_path / "github", uv)
    run(["git", "init", "--quiet", "--initial-branch=main"], service)
    run(["git", "add", "--all"], service)
    run(["git", "commit", "--quiet", "-m", "First"], service)
    run(["git", "push", "--quiet", str(found.origin), "main"], service)
    return found


def commit_to_branch(github, work, branch=BRANCH):
    """Resolve the conflict on the branch of the pull request, as its report asks."""
    github.git("clone", "--quiet", "--branch", branch, str(github.origin), str(work))
    procfile = work / "Procfile"
    lines = [line for line in procfile.read_text().splitlines() if line[:7] not in MARKERS]
    procfile.write_text("\n".join(lines) + "\n")
    github.git("commit", "--quiet", "--all", "--message", "Resolve the conflict", folder=work)
    github.git("push", "--quiet", folder=work)
    return github.git("rev-parse", "HEAD", folder=work)


def test_pull_request_of_an_upgrade(github, template, tmp_path, uv):
    """It opens, is left alone with commits of others, and has workflow files only by a token."""
    assert github.run_workflow()[0] == 0
    assert github.pulls() == []  # Nothing is new.

    template.check_out("newest")
    moved = template.folder.rename(template.folder.with_name("private"))
    status, log = github.run_workflow()
    moved.rename(template.folder)
    assert status == 1
    assert "the secret TEMPLATE_TOKEN" in log
    assert "Traceback" not in log

    (github.folder / "forbidden").touch()
    status, log = github.run_workflow()
    assert status == 1
    assert "Allow GitHub Actions to create and approve pull requests" in log
    (github.folder / "forbidden").unlink()

    # The next run opens the pull request, though the branch is there already.
    status, log = github.run_workflow(job=PUSH)
    assert status == 0, log
    (pull,) = github.pulls()
    assert pull["title"].endswith("→ 99.0.0")
    assert f"- `{WORKFLOW}`" in pull["body"]
    assert "uv run manage.py upgrade --workflows" in pull["body"]
    assert "- `Procfile`" in pull["body"]
    assert "secret UPGRADE_TOKEN" in log
    changed = github.git("diff", "--name-only", f"main...{BRANCH}", folder=github.origin)
    assert ".cruft.json" in changed
    assert "uv.lock" in changed
    assert ".github" not in changed

    # The same again changes nothing.
    tip = github.git("rev-parse", BRANCH, folder=github.origin)
    assert github.run_workflow(job=PUSH)[0] == 0
    assert github.git("rev-parse", BRANCH, folder=github.origin) == tip
    assert len(github.pulls()) == 1

    # Somebody works on the branch.
    work = tmp_path / "work"
    tip = commit_to_branch(github, work)
    for _ in range(2):
        status, log = github.run_workflow(job=PUSH)
        assert status == 0, log
        assert "this branch has commits of others" in log
    assert github.git("rev-parse", BRANCH, folder=github.origin) == tip
    (comment,) = github.pulls()[0]["comments"]
    assert "has commits of others" in comment["body"]

    # What the pull request says adds the workflow files.
    command = [uv, "run", "manage.py", "upgrade", "--workflows", "--no-tests"]
    run(command, work, UV=uv, UV_PROJECT_ENVIRONMENT=github.folder / "environment")
    assert run(["git", "diff", "--cached", "--name-only"], work).splitlines() == [WORKFLOW]

    # A closed pull request with such commits is not overwritten either.
    github.close(BRANCH)
    assert github.run_workflow(job=PUSH)[0] == 0
    assert github.git("rev-parse", BRANCH, folder=github.origin) == tip
    assert github.pulls()[-1]["head"] == f"{BRANCH}-2"

    # With a token of the team workflow files are part of the upgrade.
    github.give_token()
    status, log = github.run_workflow(job=PUSH)
    assert status == 0, log
    changed = github.git("diff", "--name-only", f"main...{BRANCH}-2", folder=github.origin)
    assert WORKFLOW in changed


def test_token_of_the_pushing_job_is_in_no_file(tmp_path, monkeypatch):
    """The checkout does not have it; a push sends it as actions/checkout would."""
    path = ROOT / PACKAGE / VENDOR / "propose_upgrade.py"
    get_credentials = runpy.run_path(str(path))["get_credentials"]
    monkeypatch.setenv("GH_TOKEN", "secret")
    monkeypatch.delenv("GITHUB_SERVER_URL", raising=False)
    assert get_credentials() == {}
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://github.example.com")
    variables = get_credentials()
    command = ["git", "config", "--get-urlmatch", "http.extraheader"]
    found = run([*command, "https://github.example.com/team/rooms"], tmp_path, **variables)
    login = base64.b64decode(found.rpartition(" ")[2]).decode()
    assert login == "x-access-token:secret"
    run([*command, "https://example.com/other"], tmp_path, ok=1, **variables)
