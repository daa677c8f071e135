"""Generated tests: tests and type checks of a generated project pass in a new environment."""

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("python", "django_version", "timezone"),
    [
        # test_readme.py runs these tests too, and test_first_week.py the type checks.
        pytest.param("3.13", "6.0", "UTC", marks=pytest.mark.long),
        ("3.12", "5.2", "America/New_York"),
    ],
)
def test_generated_tests_pass_with_the_embedded_defaults(
    bake, make_service, python, django_version, timezone
):
    project = bake(django_version=django_version, timezone=timezone)
    (project / ".python-version").write_text(f"{python}\n")
    service = make_service(project)
    service.install()
    assert service.run("python --version").startswith(f"Python {python}.")
    service.run("mypy")
    service.run("pytest -q")


def test_generated_tests_pass_on_postgresql_and_rabbitmq(
    bake, make_service, postgres_url, rabbitmq_url
):
    service = make_service(
        bake(project_slug="own_tests"), DATABASE_URL=postgres_url, CELERY_BROKER_URL=rabbitmq_url
    )
    service.install()
    service.run("pytest -q")


def test_generated_workflow_runs_linters_and_tests(default_project):
    workflow = (default_project / ".github" / "workflows" / "ci.yml").read_text()
    for command in (
        "ruff check",
        "ruff format --check",
        "mypy",
        "makemigrations --check",
        "pytest",
    ):
        assert f"uv run {command}" in workflow or f"uv run manage.py {command}" in workflow
