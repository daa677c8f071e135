"""The choice example=none: a service with users, admin and an empty API, that starts and runs."""

import ast
import re
import subprocess
import sys
import urllib.error

import pytest

from tests.servers import wait_for
from tests.test_first_week import append, migration_path, python_blocks
from tests.test_output import CI_FILES, FILES, files

#: Files of the example, which this choice leaves out.
EXAMPLE_FILES = """
SLUG/digests.py
SLUG/openapi.py
SLUG/migrations/0002_seed_schedules.py
SLUG/migrations/0003_moderators.py
SLUG/templates/answer.html
SLUG/templates/moderate.html
SLUG/templates/try.html
SLUG/templates/email/moderator_digest.html
SLUG/templates/email/moderator_digest.txt
SLUG/templates/email/notification.html
SLUG/templates/email/notification.txt
SLUG/templates/email/user_digest.html
SLUG/templates/email/user_digest.txt
tests/conftest.py
tests/test_api.py
tests/test_digests.py
tests/test_moderation.py
tests/test_schedules.py
tests/test_submissions.py
"""

#: What only the example is about.
EXAMPLE_WORDS = r"submissions?\b|moderator|moderation|user.digest|prayer"

LIST_SCHEDULES = """
from django_celery_beat.models import PeriodicTask
print(*PeriodicTask.objects.values_list("name", "task"))
"""


def test_output_is_the_exact_set_of_files(none_project):
    names = FILES.replace("SLUG", none_project.name).split() + CI_FILES["github"].split()
    example = EXAMPLE_FILES.replace("SLUG", none_project.name).split()
    assert set(example) <= set(names)
    assert files(none_project) == sorted(set(names) - set(example))


def test_output_says_nothing_about_the_example(bake):
    project = bake(
        example="none", project_name="Ledger", description="Accounts.", project_slug="ledger"
    )
    found = [
        (path, number, line)
        for path in files(project)
        if path != ".cruft.json"
        for number, line in enumerate((project / path).read_text().splitlines(), 1)
        if re.search(EXAMPLE_WORDS, line, re.IGNORECASE)
    ]
    assert found == []


def test_python_files_are_valid_and_pass_ruff(none_project):
    for path in files(none_project):
        if path.endswith(".py"):
            ast.parse((none_project / path).read_text(), path, feature_version=(3, 12))
    for command in (["check"], ["format", "--check", "--diff"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", "."],
            cwd=none_project,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_tasks_module_says_where_a_task_goes_and_has_none(none_project):
    tree = ast.parse((none_project / none_project.name / "tasks.py").read_text())
    assert "task" in (ast.get_docstring(tree) or "").lower()
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def paste_readme_snippets(project):
    """Add the documents' schedule and digest: the snippets exactly as they stand there."""
    package = project / project.name
    task, migration, digest, _ = python_blocks(project)
    append(package / "tasks.py", task)
    migration_path(project).write_text(migration)
    (package / "digests.py").write_text(digest)


@pytest.mark.slow
def test_service_passes_its_checks_and_tests_and_runs(bake, make_service):
    service = make_service(bake(example="none", project_slug="empty"))
    service.install()
    service.run("python manage.py makemigrations --check --dry-run")
    service.run("python manage.py check --fail-level WARNING")
    assert " passed" in service.run("pytest -q")

    service.run(service.procfile()["release"])
    assert service.shell(LIST_SCHEDULES).split("\n")[0] == (
        "('deliveries-resume', 'ops.resume_deliveries') ('records-delete', 'ops.delete_records') "
        "('tasks-resume', 'ops.resume_tasks')"
    )
    paste_readme_snippets(service.folder)
    service.run("ruff check")
    service.run("python manage.py check --fail-level WARNING")
    service.run("python manage.py migrate")
    assert "('clear-sessions', 'empty.tasks.clear_sessions')" in service.shell(LIST_SCHEDULES)

    web, worker, beat = (service.start(name) for name in ("web", "worker", "beat"))
    web.wait_for_text("Listening at")
    worker.wait_for_text(" ready.", seconds=60)
    beat.wait_for_text("beat: Starting...")
    wait_for(lambda: service.get("/health/ready")[0] == 200, 20, web.text)
    for path in ("/", "/admin/login/", "/api/docs/", "/api/schema/"):
        assert service.get(path)[0] == 200
    with pytest.raises(urllib.error.HTTPError) as error:
        service.get("/api/submissions/")
    assert error.value.code == 404
    error.value.close()
    service.run("python manage.py doctor")
    assert [process.stop() for process in (beat, web, worker)] == [0, 0, 0]
