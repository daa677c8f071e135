"""Generated tests: tests and type checks of a generated project pass in a new environment."""

import subprocess
import tomllib

import pytest
import yaml

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


def test_gitlab_accepts_its_files_and_runs_the_same_command(bake):
    project = bake(ci="gitlab", broker="redis")
    command = [
        "check-jsonschema",
        "--builtin-schema=vendor.gitlab-ci",
        "--data-transform=gitlab-ci",
    ]
    files = [project / ".gitlab-ci.yml", *project.glob(".gitlab/workflows/*.yml")]
    subprocess.run([*command, *files], check=True)
    (included,) = yaml.safe_load((project / ".gitlab-ci.yml").read_text())["include"]
    jobs = {}
    for path in project.glob(included["local"]):
        jobs |= yaml.safe_load(path.read_text())
    assert set(jobs) == {"test", "upgrade", "merge-request"}
    assert jobs["test"]["script"] == ["pip install uv", "uv run --locked manage.py ci"]
    assert jobs["test"]["services"] == ["postgres:16", "redis:7"]
    assert jobs["test"]["variables"]["CELERY_BROKER_URL"] == "redis://redis:6379/1"


@pytest.mark.parametrize("answers", [{}, {"monitoring": "flower", "broker": "postgresql"}])
def test_the_workflow_runs_the_command_that_runs_linters_and_tests(bake, answers):
    project = bake(**answers)
    workflow = yaml.safe_load((project / ".github" / "workflows" / "ci.yml").read_text())
    commands = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    assert commands == ["uv run --locked manage.py ci"]
    table = tomllib.loads((project / "pyproject.toml").read_text())["tool"]["prodserver-ops"]["ci"]
    assert list(table) == "lock lint format types migrations production tests".split()
    assert "--fail-level WARNING" in table["production"]
    assert ("FLOWER_BASIC_AUTH" in table["production"]) is ("monitoring" in answers)
