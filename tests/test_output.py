"""Output: the exact set of files, reproducible, valid and free of template leftovers."""

import ast
import json
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

from tests.conftest import ROOT

FILES = """
.cruft.json
.env.example
.github/dependabot.yml
.github/workflows/ci.yml
.github/workflows/upgrade.yml
.gitignore
.pre-commit-config.yaml
.python-version
Procfile
Procfile.dev
README.md
SECURITY.md
SLUG/__init__.py
SLUG/admin.py
SLUG/api.py
SLUG/apps.py
SLUG/celery.py
SLUG/digests.py
SLUG/migrations/0001_initial.py
SLUG/migrations/0002_seed_schedules.py
SLUG/migrations/0003_moderators.py
SLUG/migrations/__init__.py
SLUG/models.py
SLUG/openapi.py
SLUG/ops/__init__.py
SLUG/ops/admin.py
SLUG/ops/adoption.py
SLUG/ops/api.py
SLUG/ops/apps.py
SLUG/ops/attempts.py
SLUG/ops/beat.py
SLUG/ops/broker.py
SLUG/ops/celery.py
SLUG/ops/checks.py
SLUG/ops/clients.py
SLUG/ops/crontabs.py
SLUG/ops/database.py
SLUG/ops/deliveries.py
SLUG/ops/digests.py
SLUG/ops/doctor.py
SLUG/ops/email_preview.py
SLUG/ops/environment.py
SLUG/ops/failed_tasks.py
SLUG/ops/gunicorn_log.py
SLUG/ops/gunicorn_worker.py
SLUG/ops/health.py
SLUG/ops/heartbeats.py
SLUG/ops/large_tables.py
SLUG/ops/leases.py
SLUG/ops/limits.py
SLUG/ops/locks.py
SLUG/ops/logins.py
SLUG/ops/logs.py
SLUG/ops/mailer.py
SLUG/ops/management/__init__.py
SLUG/ops/management/commands/__init__.py
SLUG/ops/management/commands/adopt.py
SLUG/ops/management/commands/doctor.py
SLUG/ops/management/commands/heartbeat.py
SLUG/ops/management/commands/openapi.py
SLUG/ops/management/commands/prodserver.py
SLUG/ops/management/commands/requeue.py
SLUG/ops/management/commands/schedules.py
SLUG/ops/management/commands/smoke.py
SLUG/ops/management/commands/unlock.py
SLUG/ops/management/commands/upgrade.py
SLUG/ops/messages.py
SLUG/ops/migrations/0001_initial.py
SLUG/ops/migrations/0002_seed_schedules.py
SLUG/ops/migrations/0003_admin_history.py
SLUG/ops/migrations/0004_task_runs.py
SLUG/ops/migrations/__init__.py
SLUG/ops/models.py
SLUG/ops/openapi.py
SLUG/ops/operations.py
SLUG/ops/overlaps.py
SLUG/ops/parsers.py
SLUG/ops/processes.py
SLUG/ops/production_broker.py
SLUG/ops/publishing.py
SLUG/ops/runs.py
SLUG/ops/scheduler.py
SLUG/ops/schedules.py
SLUG/ops/schema.py
SLUG/ops/sentry.py
SLUG/ops/settings.py
SLUG/ops/static/ops/operations.css
SLUG/ops/static/ops/periodic_task.js
SLUG/ops/task_runs.py
SLUG/ops/tasks.py
SLUG/ops/templates/admin/djcelery/change_periodictask_form.html
SLUG/ops/templates/admin/index.html
SLUG/ops/templates/admin/operations.html
SLUG/ops/templates/ops/emails.html
SLUG/ops/templatetags/__init__.py
SLUG/ops/templatetags/email.py
SLUG/ops/templatetags/operations.py
SLUG/ops/throttles.py
SLUG/ops/tokens.py
SLUG/ops/unsubscribe.py
SLUG/ops/uploads.py
SLUG/ops/web_backend.py
SLUG/ops/web_server.py
SLUG/settings.py
SLUG/static/docs.css
SLUG/static/docs.js
SLUG/static/site.css
SLUG/tasks.py
SLUG/templates/403_csrf.html
SLUG/templates/answer.html
SLUG/templates/base.html
SLUG/templates/docs.html
SLUG/templates/email.html
SLUG/templates/email/moderator_digest.html
SLUG/templates/email/moderator_digest.txt
SLUG/templates/email/notification.html
SLUG/templates/email/notification.txt
SLUG/templates/email/user_digest.html
SLUG/templates/email/user_digest.txt
SLUG/templates/home.html
SLUG/templates/moderate.html
SLUG/templates/unsubscribe.html
SLUG/urls.py
SLUG/wsgi.py
app.json
docs/deploy.md
docs/move.md
manage.py
openapi.yaml
pyproject.toml
tests/conftest.py
tests/ops/conftest.py
tests/ops/templates/email/sample.html
tests/ops/templates/email/sample.txt
tests/ops/test_api.py
tests/ops/test_beat.py
tests/ops/test_broker.py
tests/ops/test_clients.py
tests/ops/test_crontabs.py
tests/ops/test_database.py
tests/ops/test_deliveries.py
tests/ops/test_digests.py
tests/ops/test_doctor.py
tests/ops/test_email_preview.py
tests/ops/test_email_settings.py
tests/ops/test_environment.py
tests/ops/test_failed_tasks.py
tests/ops/test_health.py
tests/ops/test_heartbeats.py
tests/ops/test_large_tables.py
tests/ops/test_leases.py
tests/ops/test_locks.py
tests/ops/test_logging.py
tests/ops/test_logins.py
tests/ops/test_openapi.py
tests/ops/test_operations.py
tests/ops/test_overlaps.py
tests/ops/test_processes.py
tests/ops/test_production_broker.py
tests/ops/test_publishing.py
tests/ops/test_scheduler.py
tests/ops/test_schedules.py
tests/ops/test_security.py
tests/ops/test_throttles.py
tests/ops/test_tokens.py
tests/ops/test_unsubscribe.py
tests/ops/test_web_server.py
tests/test_api.py
tests/test_digests.py
tests/test_moderation.py
tests/test_pages.py
tests/test_schedules.py
tests/test_submissions.py
"""

#: Files that a choice adds.
IMAGE_FILES = """
.github/workflows/image.yml
.dockerignore
Dockerfile
docs/image.md
"""
COMPOSE_FILES = """
compose.dev.yaml
compose.yaml
docs/compose.md
nginx.conf
"""

#: Answers that cover every choice that changes the output.
ANSWERS = {
    "default": {},
    "dockerfile": {"deploy": "dockerfile"},
    "compose": {"compose": True},
    "dockerfile and compose": {"deploy": "dockerfile", "compose": True},
    "lts": {"django_version": "5.2"},
    "results": {"task_results": "database"},
    "redis": {"broker": "redis"},
    "systemd": {"deploy": "systemd"},
    "postgresql": {"broker": "postgresql"},
    "mit": {"license": "MIT"},
    "apache": {"license": "Apache-2.0"},
    "short": {"project_slug": "q", "project_name": "Q", "timezone": "Europe/London"},
    "long": {"project_slug": "a" * 30, "timezone": "America/Argentina/ComodRivadavia"},
    "hostile": {
        "project_name": 'Ångström & Söhne\'s "Räume" {x} \\',
        "description": "a \"b\" 'c' \\ {d}\n🙏🏽 </script>",
        "author_name": 'O\'Brien "Q" \\',
        "author_email": "o'brien+x@example.com",
        "license": "MIT",
        "compose": True,
    },
}


@pytest.fixture(params=ANSWERS)
def project(request, bake):
    return bake(**ANSWERS[request.param])


def files(project):
    return sorted(
        path.relative_to(project).as_posix() for path in project.rglob("*") if path.is_file()
    )


def texts(project, *endings):
    paths = [path for path in files(project) if path.endswith(endings)]
    assert paths
    return {path: (project / path).read_text() for path in paths}


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS)
def test_answers_generate_the_exact_set_of_files(bake, answers):
    project = bake(**answers)
    expected = FILES.replace("SLUG", project.name).split()
    if answers.get("compose") or answers.get("deploy") == "dockerfile":
        expected += IMAGE_FILES.split()
    if answers.get("compose"):
        expected += COMPOSE_FILES.split()
    if "license" in answers:
        expected += ["LICENSE"]
    if answers.get("deploy") == "systemd":
        expected.remove("app.json")
        units = ("web", "worker", "beat")
        expected += [f"{project.name.replace('_', '-')}-{unit}.service" for unit in units]
    if answers.get("django_version") == "5.2":
        expected += [f"{project.name}/ops/csp.py"]
    assert files(project) == sorted(expected)


def test_output_is_reproducible(bake):
    for answers in ANSWERS.values():
        first, second = bake(**answers), bake(**answers)
        assert files(first) == files(second)
        for path in files(first):
            assert (first / path).read_bytes() == (second / path).read_bytes(), path
            assert (first / path).stat().st_mode == (second / path).stat().st_mode, path


def test_python_files_are_valid_and_pass_ruff(project):
    for path, text in texts(project, ".py").items():
        ast.parse(text, path, feature_version=(3, 12))
    for command in (["check"], ["format", "--check", "--diff"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", "."],
            cwd=project,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_toml_yaml_and_procfiles_are_valid(project):
    for text in texts(project, ".toml").values():
        assert tomllib.loads(text)
    for text in texts(project, ".yml", ".yaml").values():
        assert yaml.safe_load(text)
    for line in texts(project, "Procfile")["Procfile"].splitlines():
        assert re.fullmatch(r"\w+: \S.*", line)


def test_output_contains_no_template_leftovers(project):
    for path, text in texts(project, "").items():
        if path == ".cruft.json":
            continue
        # The record of the template has a key of that name.
        text = text.replace('["cookiecutter"]', "").replace('{"cookiecutter": ', "")
        text = text.replace("cookiecutter>=2.7.1", "")
        found = re.findall(r"cookiecutter|\{%-? *raw", text)
        assert not found, path
        if not path.endswith((".html", ".txt", ".yml")):
            assert not re.search(r"\{\{|\{%", text), path
        assert text.endswith("\n") or not text, path
        assert not re.search(r"[ \t]$", text, re.M), path


def test_template_python_files_contain_no_jinja_statements():
    for path in ROOT.glob("*cookiecutter.project_slug*/**/*.py"):
        assert "{%" not in path.read_text(), path


def test_hooks_and_filters_are_valid_on_python_3_11():
    for path in [*ROOT.glob("local_*.py"), *ROOT.glob("hooks/*.py")]:
        ast.parse(path.read_text(), str(path), feature_version=(3, 11))


def test_only_manage_py_is_executable(default_project):
    executable = [path for path in files(default_project) if is_executable(default_project / path)]
    assert executable == ["manage.py"]


def is_executable(path):
    return bool(path.stat().st_mode & 0o111)


def test_context_and_output_contain_no_secrets(default_project):
    context = json.loads((ROOT / "cookiecutter.json").read_text())
    assert not re.search(r"secret|password|token|random", json.dumps(context), re.I)
    settings = (default_project / "prayer_room_api" / "ops" / "settings.py").read_text()
    assert re.findall(r"SECRET_KEY = (.*)", settings) == [
        'env("django-insecure-for-development-only")',
        "env(env.Required, cast=secret_key)",
    ]


def test_readme_documents_every_environment_variable_of_the_settings(default_project):
    package = default_project / "prayer_room_api"
    settings = "".join((package / name).read_text() for name in ("settings.py", "ops/settings.py"))
    read = set(re.findall(r"^    ([A-Z_]+) = env", settings, re.M))
    read |= set(re.findall(r"@env\S*\n    def ([A-Z_]+)\(", settings))
    read |= set(re.findall(r'key="([A-Z_]+)"', settings))
    broker = (package / "ops" / "production_broker.py").read_text()
    read |= set(re.findall(r'^VARIABLE = "([A-Z_]+)"', broker, re.M))
    assert {"SECRET_KEY", "DATABASE_URL", "RABBITMQ_URL", "ALLOWED_HOSTS", "PORT"} <= read
    table = (default_project / "README.md").read_text().split("## Settings")[1]
    first_column = "\n".join(re.findall(r"^\| (.*?) \|", table, re.M))
    documented = set(re.findall(r"`([A-Z_]+)`", first_column))
    assert documented == read | {"DJANGO_MODE"}


#: The words of each broker.
BROKER_WORDS = {"rabbitmq": r"rabbit|amqps?:|quorum", "redis": r"redis", "postgresql": r"pgmq"}


@pytest.mark.parametrize("broker", BROKER_WORDS)
def test_output_speaks_only_of_the_broker_that_was_chosen(bake, broker):
    project = bake(broker=broker, compose=True, deploy="dockerfile")
    for path, text in texts(project, "").items():
        if path != ".cruft.json":
            for other, words in BROKER_WORDS.items():
                assert other == broker or not re.search(words, text, re.IGNORECASE), (path, other)


def test_another_broker_is_one_row_and_its_files(cookies, template_copy):
    questions = json.loads((template_copy / "cookiecutter.json").read_text())
    questions["broker"].append("made_up")
    row = questions["_brokers"]["redis"]
    questions["_brokers"]["made_up"] = row | {"variable": "MADE_UP_URL", "plugins": ["made-up"]}
    questions["__prompts__"]["broker"]["made_up"] = "Made up"
    (template_copy / "cookiecutter.json").write_text(json.dumps(questions))
    ops = template_copy / "{{cookiecutter.project_slug}}" / "{{cookiecutter.project_slug}}" / "ops"
    name = '{{% if cookiecutter.broker == "{}" %}}production_broker.py{{% endif %}}'
    broker = template_copy / "templates" / "brokers"
    (broker / "made_up.j2").write_text((broker / "redis.j2").read_text())
    text = (ops / name.format("redis")).read_text().replace("REDIS_URL", "MADE_UP_URL")
    (ops / name.format("made_up")).write_text(text)
    answers = {"setup": False, "broker": "made_up"}
    result = cookies.bake(extra_context=answers, template=str(template_copy))
    assert result.exception is None
    project = result.project_path
    assert "MADE_UP_URL" in (project / project.name / "ops" / "production_broker.py").read_text()
    assert "| `MADE_UP_URL` |" in (project / "README.md").read_text()
    assert "dokku made-up:create" in (project / "docs" / "deploy.md").read_text()
