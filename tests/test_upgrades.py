"""Upgrades: cruft and the upgrade command bring a service to a later version of the template.

Services of 1.x come to 2.0 with ``upgrade_from_1.py``; ``trials/time_travel.py`` plays all of them.
"""

import json
import os
import re
import shlex
import subprocess

import pytest

from tests.conftest import GIT_IDENTITY, ROOT, clean_environment, require_server
from tests.generate import get_releases
from trials.time_travel import LIBRARY, PACKAGE, Failed, Template, run, travel

pytestmark = pytest.mark.slow

#: The branch of the weekly pull request
BRANCH = "upgrade-template"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A repository with the template as it is now, and two later versions."""
    return Template(tmp_path_factory.mktemp("template") / "template")


@pytest.fixture
def create(template, tmp_path, uv):
    """A function that runs ``cruft create`` for the template as it is now."""

    def create(**answers):
        template.check_out("now")
        extra = f"--extra-context={json.dumps(answers)}"
        environment = GIT_IDENTITY | {"UV": uv, "PWD": str(tmp_path)}
        subprocess.run(
            ["cruft", "create", str(template.folder), extra, "-y"],
            cwd=tmp_path,
            env=clean_environment(**environment),
            check=True,
        )
        return next(path.parent for path in tmp_path.glob("*/manage.py"))

    return create


def commit(project):
    run(["git", "add", "--all"], project)
    run(["git", "commit", "--quiet", "--allow-empty", "-m", "Commit"], project)


def initialize(project):
    """Commit all files to a new repository; the tests' environment is a link, which git sees."""
    run(["git", "init", "--quiet"], project)
    (project / ".git" / "info" / "exclude").write_text(".venv\nreport.md\n")
    commit(project)


@pytest.fixture
def service(create, make_service):
    """A service of the template as it is now, installed and committed.

    An upgrade installs the new version of the library: the environment is not shared.
    """
    service = make_service(create(setup=False), UV=os.environ.get("UV", "uv"))
    run([service.uv, "sync", "--quiet"], service.folder)
    initialize(service.folder)
    return service


def test_new_service_is_clean_and_equals_the_template(create):
    """The set-up ran, and neither its files nor the record of cruft are in the way."""
    project = create()
    assert (project / ".venv").exists()
    assert run(["git", "status", "--porcelain"], project) == ""
    assert ".cruft.json" in run(["git", "ls-files"], project)
    assert run(["git", "ls-files", "--stage", "manage.py"], project).startswith("100755 ")
    assert "SUCCESS" in run(["cruft", "check"], project)
    assert run(["cruft", "diff"], project) == ""


@pytest.mark.parametrize("path", [".", "../template", "template"])
def test_service_of_a_relative_path_finds_its_template(template, tmp_path, path):
    template.check_out("now")
    start = template.folder.parent if path == "template" else template.folder
    command = ["cookiecutter", path, "--no-input", "setup=false", "--output-dir", str(tmp_path)]
    run(command, start, HOME=str(tmp_path))
    project = tmp_path / "prayer_room_api"
    record = json.loads((project / ".cruft.json").read_text())
    assert record["template"] == str(template.folder)
    initialize(project)
    assert "SUCCESS" in run(["cruft", "check"], project)


@pytest.mark.parametrize(
    ("origin", "recorded"),
    [("https://example.com/team/t.git", True), ("git@example.com:t.git", True), ("/gone/t", False)],
)
def test_clone_records_where_others_can_clone_it(template_copy, tmp_path, origin, recorded):
    run(["git", "init", "--quiet"], template_copy)
    run(["git", "remote", "add", "origin", origin], template_copy)
    commit(template_copy)
    command = ["cookiecutter", ".", "--no-input", "setup=false", "--output-dir", str(tmp_path)]
    run(command, template_copy, HOME=str(tmp_path))
    record = json.loads((tmp_path / "prayer_room_api" / ".cruft.json").read_text())
    assert record["template"] == (origin if recorded else str(template_copy))
    assert record["commit"] == run(["git", "rev-parse", "HEAD"], template_copy).strip()


def test_template_in_a_folder_of_a_repository_is_recorded(template_copy, tmp_path):
    repository = tmp_path / "repository"
    (repository / "templates").mkdir(parents=True)
    template_copy.rename(repository / "templates" / "django")
    run(["git", "init", "--quiet"], repository)
    commit(repository)
    address = f"git+file://{repository}"
    options = ["--no-input", "setup=false", "--output-dir", str(tmp_path)]
    command = ["cookiecutter", address, "--directory", "templates/django", *options]
    run(command, tmp_path, HOME=str(tmp_path))
    record = json.loads((tmp_path / "prayer_room_api" / ".cruft.json").read_text())
    assert record["template"] == f"file://{repository}"
    assert record["directory"] == "templates/django"
    assert record["commit"] == run(["git", "rev-parse", "HEAD"], repository).strip()


def test_answers_can_be_changed_later(create, template, tmp_path):
    project = create(setup=False)
    initialize(project)
    changes = {"deploy": "dockerfile", "compose": True, "license": "MIT"}
    run(["cruft", "update", "-y", "--variables-to-update", json.dumps(changes)], project)
    commit(project)
    assert run(["cruft", "diff"], project) == ""
    other = tmp_path / "other"
    other.mkdir()
    answers = json.dumps(changes | {"setup": False})
    run(["cruft", "create", str(template.folder), f"--extra-context={answers}", "-y"], other)
    exclude = ["-x", ".git", "-x", ".cruft.json"]
    run(["diff", "-r", *exclude, str(project), str(other / project.name)], tmp_path)


def upgrade(service, *options, status=0):
    """Run the upgrade command; return its output, or fail."""
    return service.run(shlex.join(["python", "manage.py", "upgrade", *options]), status)


def test_upgrade_reports_what_changed(service, template):
    project = service.folder
    options = "--no-tests", "--report", "report.md"
    with (project / "uv.lock").open("a") as lock:
        lock.write("\n")  # `uv run` may write it; it is never in the way.
    assert "The template is up to date (" in upgrade(service, *options)
    template.check_out("newest")
    (project / "note").touch()
    refused = upgrade(service, status=1)
    assert refused == "CommandError: the working tree has changes: note: commit them first\n"
    (project / "note").unlink()
    output = upgrade(service, *options)
    report = (project / "report.md").read_text()
    assert report in output
    assert f"Template: {template.folder}\nUpgrade: " in output
    assert template.versions["newest"][:12] in output
    assert re.match(r"# Template \d+\.\d+\.\d+ → 99\.0\.0\n\n## Do this\n\nTake the new", report)
    migration = rf"## New migrations\n\n- `{LIBRARY}/migrations/\d+_note.py`"
    assert re.search(migration, report)
    assert "## New environment variables\n\n- `NEW_VARIABLE`" in report
    assert "Conflicts" not in report
    commit(project)
    assert run(["cruft", "diff"], project) == ""
    # The same again, from the release in the history.
    version = re.search(r"Template (\S+) →", report)[1]
    again = upgrade(service, "--no-tests", "--report", version)
    assert again == report


def test_schema_is_written_not_merged(service, template):
    project = service.folder
    # The same line as in the new version.
    schema = project / "openapi.yaml"
    schema.write_text(schema.read_text().replace("A token of the HTTP", "Our token of the HTTP"))
    api = project / project.name / "api.py"
    api.write_text(api.read_text().replace("A submission, as its author", "A post, as its author"))
    commit(project)
    template.check_out("newest")
    assert "Conflicts" not in upgrade(service, "--no-tests")
    assert service.run("python manage.py openapi --check") == "openapi.yaml is up to date.\n"
    assert "A later token" in schema.read_text()
    assert "A post, as its author" in schema.read_text()
    assert not run(["git", "diff", "--name-only", "--diff-filter=U"], project)


def test_schema_that_cannot_be_written_is_a_conflict(service, template):
    schema = service.folder / "openapi.yaml"
    schema.write_text(schema.read_text().replace("A token of the HTTP", "Our token of the HTTP"))
    (service.folder / service.folder.name / "openapi.py").write_text("1 / 0\n")
    commit(service.folder)
    template.check_out("newest")
    output = upgrade(service, "--no-tests", status=1)
    assert list_items(output, "Conflicts") == ["openapi.yaml"]
    assert "<<<<<<<" in schema.read_text()


def list_items(report, title):
    """Return the items of a section of a report."""
    section = report.partition(f"## {title}\n\n")[2].partition("\n\n## ")[0]
    return re.findall(r"^- `(.*)`$", section, re.M)


def test_upgrade_goes_on_after_conflicts(service, template):
    project = service.folder
    procfile = project / "Procfile"
    before = procfile.read_text().replace("migrate --noinput", "migrate")
    procfile.write_text(before)
    for path in (project / "tests").iterdir():
        path.unlink()
    (project / "tests" / "test_one.py").write_text("def test_one():\n    pass\n")
    # The repository of a team does not need to have the template's files.
    (project / ".git").rename(project / ".old")
    initialize(project)
    (project / ".git" / "info" / "exclude").write_text(".venv\n.old\n")
    template.check_out("newest")
    output = upgrade(service, status=1)
    assert list_items(output, "Conflicts") == ["Procfile"]
    assert "<<<<<<<" in procfile.read_text()
    refused = upgrade(service, status=1)
    assert "manage.py upgrade --continue" in refused
    assert "conflicts are left in Procfile" in upgrade(service, "--continue", status=1)
    procfile.write_text(before)
    output = upgrade(service, "--continue")
    assert "## Tests\n\nPassed: 1 passed" in output
    assert "## Checks of production\n\nPassed." in output
    assert "## New environment variables\n\n- `NEW_VARIABLE`" in output
    commit(project)
    # As in a clone of the branch of the weekly pull request.
    output = upgrade(service, "--continue", "--no-tests")
    assert "## New environment variables\n\n- `NEW_VARIABLE`" in output


def test_renamed_package_gets_its_changes(service, template):
    """A file that the team deleted is listed: its changes have no place."""
    project = service.folder
    run(["git", "mv", project.name, "rooms"], project)
    names = run(["git", "grep", "-lIw", project.name, "--", ".", ":!.cruft.json"], project)
    for path in map(project.joinpath, names.splitlines()):
        path.write_text(re.sub(rf"\b{project.name}\b", "rooms", path.read_text()))
    (project / "Procfile").unlink()
    toml = project / "pyproject.toml"
    toml.write_text(toml.read_text().replace("skip = [", 'skip = ["openapi.yaml", '))
    commit(project)
    template.check_out("newest")
    output = upgrade(service, "--no-tests", status=1)
    assert list_items(output, "Changes to missing files") == ["Procfile"]
    assert 'CITY = "Berlin"' in (project / "rooms" / "settings.py").read_text()
    assert not (project / project.name).exists()
    assert not (project / "Procfile").exists()
    assert "A later token" not in (project / "openapi.yaml").read_text()


def test_answer_is_changed(service, template, tmp_path):
    """The result equals a new service, but for migrations and the answer to the setup."""
    project = service.folder
    command = ["python", "manage.py", "change", "--no-tests"]
    answers = {"deploy": "dockerfile", "license": "MIT"}
    given = [f"{name}={value}" for name, value in answers.items()]
    report = service.run(" ".join([*command, *given]))
    assert "# deploy: buildpack → dockerfile, license: proprietary → MIT" in report
    commit(project)
    extra = json.dumps(answers | {"setup": False})
    run(
        ["cruft", "create", str(template.folder), f"--extra-context={extra}", "-y"], tmp_path / ".."
    )
    other = tmp_path.parent / project.name
    exclude = ["-x", ".git", "-x", ".venv", "-x", "uv.lock", "-x", "__pycache__", "-x", "var"]
    run(["diff", "-r", *exclude, str(project), str(other)], tmp_path)


# The weekly workflow of earlier releases


def test_old_workflow_gets_no_workflow_files_and_deletes_no_commits(template, tmp_path):
    """It updates with cruft, pushes with the token of GitHub, and overwrites its branch."""
    template.check_out("2.0.0")
    extra = '--extra-context={"setup": false, "example": "none"}'
    run(["cruft", "create", str(template.folder), extra, "-y"], tmp_path)
    project = tmp_path / "prayer_room_api"
    initialize(project)
    template.check_out("now")
    variables = {"GITHUB_WORKFLOW": "Upgrade", "GITHUB_WORKSPACE": str(project)}
    run(["git", "commit", "--quiet", "--allow-empty", "-m", "Of a person"], project)
    run(["git", "update-ref", f"refs/remotes/origin/{BRANCH}", "HEAD"], project)
    run(["git", "reset", "--quiet", "--hard", "HEAD^"], project)
    with pytest.raises(Failed, match="the branch upgrade-template has commits of others"):
        run(["cruft", "update", "-y"], project, **variables)
    assert not run(["git", "status", "--porcelain"], project)
    run(["git", "update-ref", "-d", f"refs/remotes/origin/{BRANCH}"], project)
    assert "Good work" in run(["cruft", "update", "-y"], project, **variables)
    changed = run(["git", "status", "--porcelain"], project)
    assert "vendor/prodserver-ops/propose_upgrade.py" in changed
    assert ".github/workflows" not in changed


# From 1.x


@pytest.mark.parametrize("case", [pytest.param("default", marks=pytest.mark.long), "renamed"])
def test_aged_service_of_the_last_1x_comes_to_2(case, request, template):
    require_server(request, "PostgreSQL", 5432, "docker run -d -p 5432:5432 postgres:16")
    result = travel(template, "1.4.0", case, ["now"], with_tests=False)
    assert not result.problem, result.problem


def test_every_module_of_1x_has_a_place_in_the_library():
    script = (ROOT / PACKAGE / "vendor" / "prodserver-ops" / "upgrade_from_1.py").read_text()
    modules = re.findall(r'^    "(\w+)": (?:"[\w.]+"|None),$', script, re.M)
    for commit in get_old_releases().values():
        folder = f"{PACKAGE}/{PACKAGE}/ops"
        listed = run(["git", "ls-tree", "-z", "--name-only", commit, f"{folder}/"], ROOT)
        names = {
            re.sub(r"^.*[/}]|\.py.*$", "", name) for name in listed.split("\0") if ".py" in name
        }
        names |= set(re.findall(r"%\}(\w+)\.py\{", listed))
        assert names - {"__init__", "production_broker", "web_backend"} - {""} <= {*modules, ""}


# Releases


def get_old_releases():
    """Return the releases of 1.x, which have no library."""
    return {name: commit for name, commit in get_releases().items() if name.startswith("1.")}


#: The import of 1.x in migrations, and that of the library
IMPORT = re.compile(
    r"^from (\.+ops\.schedules|\.\.schedules|\.\.scheduling\.operations"
    r"|prodserver_ops\.scheduling\.operations) import (\w+)$",
    re.M,
)


def normalize(text):
    """Return a migration without what the way to the library changed in its imports."""
    return re.sub(r"\n+", "\n", IMPORT.sub(r"import \2", text))


def test_shipped_migrations_are_never_edited():
    """A database that ran an earlier form of a migration would differ from a new one."""
    for commit in get_releases().values():
        listed = run(["git", "ls-tree", "-r", "-z", "--name-only", commit, PACKAGE], ROOT)
        shipped = [name for name in listed.split("\0") if "/migrations/0" in name]
        assert shipped
        for name in shipped:
            before = run(["git", "show", f"{commit}:{name}"], ROOT)
            now = name.replace(f"{PACKAGE}/{PACKAGE}/ops/", f"{PACKAGE}/{LIBRARY}/")
            assert normalize((ROOT / now).read_text()) == normalize(before), name


def test_the_version_is_that_of_the_last_release_and_its_changelog():
    version = json.loads((ROOT / "cookiecutter.json").read_text())["_version"]
    headings = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert version == headings[0]
    releases = list(get_releases())
    assert releases == headings[::-1][: len(releases)]
    assert len(headings) - len(releases) in (0, 1)  # A release is committed after its test.


@pytest.mark.parametrize("django", ["6.0", pytest.param("5.2", marks=pytest.mark.long)])
def test_service_works_with_the_oldest_versions_it_allows(bake, uv, tmp_path, django):
    project = bake(django_version=django)
    environment = tmp_path / "environment"
    variables = {"UV_PROJECT_ENVIRONMENT": str(environment), "VIRTUAL_ENV": ""}
    run([uv, "sync", "--quiet", "--resolution", "lowest-direct"], project, **variables)
    python = str(environment / "bin" / "python")
    run([python, "manage.py", "migrate", "--verbosity=0"], project)
    run([python, "manage.py", "smoke"], project)
    run([python, "-m", "pytest", "-q", "-x"], project)
