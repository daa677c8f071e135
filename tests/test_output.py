"""Output: the exact set of files, reproducible, valid and free of template leftovers."""

import ast
import json
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

from tests.conftest import ROOT, generate_project
from tests.generate import SOURCES, TEMPLATE

FILES = """
.cruft.json
.devcontainer/devcontainer.json
.editorconfig
.env.example
.gitattributes
.gitignore
.ignore
.pre-commit-config.yaml
.python-version
AGENTS.md
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
SLUG/settings.py
SLUG/static/docs.css
SLUG/static/docs.js
SLUG/static/site.css
SLUG/tasks.py
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
SLUG/templates/try.html
SLUG/templates/unsubscribe.html
SLUG/urls.py
SLUG/wsgi.py
app.json
docs/api.md
docs/deploy.md
docs/email.md
docs/limits.md
docs/move.md
docs/processes.md
docs/recipes.md
docs/restore.md
docs/schedules.md
docs/settings.md
docs/tasks.md
docs/upgrades.md
manage.py
openapi.yaml
pyproject.toml
tests/conftest.py
tests/test_api.py
tests/test_digests.py
tests/test_moderation.py
tests/test_pages.py
tests/test_schedules.py
tests/test_service.py
tests/test_submissions.py
"""

#: Files that a choice adds.
IMAGE_FILES = """
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

#: The files of each CI service.
CI_FILES = {
    "github": ".github/dependabot.yml .github/workflows/ci.yml .github/workflows/upgrade.yml",
    "gitlab": ".gitlab-ci.yml .gitlab/workflows/ci.yml .gitlab/workflows/upgrade.yml",
}

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
    "gitlab": {"ci": "gitlab"},
    "gitlab and compose": {"ci": "gitlab", "compose": True},
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
    """Return the paths of a service's files without the library, which test_rooms.py compares."""
    paths = [path.relative_to(project) for path in project.rglob("*") if path.is_file()]
    return sorted(path.as_posix() for path in paths if path.parts[0] != "vendor")


def texts(project, *endings):
    paths = [path for path in files(project) if path.endswith(endings)]
    assert paths
    return {path: (project / path).read_text() for path in paths}


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS)
def test_answers_generate_the_exact_set_of_files(bake, answers):
    project = bake(**answers)
    ci = answers.get("ci", "github")
    expected = FILES.replace("SLUG", project.name).split() + CI_FILES[ci].split()
    if answers.get("compose") or answers.get("deploy") == "dockerfile":
        expected += [*IMAGE_FILES.split(), f".{ci}/workflows/image.yml"]
    if answers.get("compose"):
        expected += COMPOSE_FILES.split()
    if "license" in answers:
        expected += ["LICENSE"]
    if answers.get("deploy") == "systemd":
        expected.remove("app.json")
        units = ("web", "worker", "beat")
        expected += [f"{project.name.replace('_', '-')}-{unit}.service" for unit in units]
    assert files(project) == sorted(expected)


def test_a_service_is_small(default_project):
    """Fewer than 80 files and 2,800 lines of Python, its tests included, are the team's own."""
    names = files(default_project)
    assert len(names) < 80
    python = [(default_project / name).read_text() for name in names if name.endswith(".py")]
    assert sum(text.count("\n") for text in python) < 2_800


def test_the_guide_for_assistants_is_short_and_names_what_exists(default_project):
    text = (default_project / "AGENTS.md").read_text()
    assert text.count("\n") < 60
    names = re.findall(r"`((?:[\w.-]+/)*[\w-]+(?:/|\.\w+))(?: [^`]*)?`", text)
    assert {"vendor/prodserver-ops/", "openapi.yaml", "docs/tasks.md"} <= set(names)
    made = {".env", "uv.lock", "var/"}
    package = default_project / default_project.name
    library = default_project / SOURCES.parent
    for name in set(names) - made:
        places = (default_project / name, package / name, library / name)
        assert any(place.exists() for place in places), name


def test_contract_tests_are_few(default_project):
    """The library has its own tests; these are for what a team's edits could break."""
    text = (default_project / "tests" / "test_service.py").read_text()
    assert 0 < len(re.findall(r"^ *(?:async )?def test_", text, re.M)) <= 40
    assert "parametrize" not in text


@pytest.mark.parametrize("name", ANSWERS)
def test_output_is_reproducible(cookies, name):
    first, second = (generate_project(cookies, **ANSWERS[name]) for _ in range(2))
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


def test_toml_yaml_json_and_procfiles_are_valid(project):
    assert all(json.loads(text) for text in texts(project, ".json").values())
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
        if not path.endswith((".html", ".txt", ".yml")) and path != RECIPES:
            assert not re.search(r"\{\{|\{%", text), path
        assert text.endswith("\n") or not text, path
        assert not re.search(r"[ \t]$", text, re.M), path


def test_template_python_files_contain_no_jinja_statements():
    paths = list(TEMPLATE.rglob("*.py"))
    assert paths
    for path in paths:
        assert "{%" not in path.read_text(), path


def test_hooks_and_filters_are_valid_on_python_3_11():
    for path in [*ROOT.glob("local_*.py"), *ROOT.glob("hooks/*.py")]:
        ast.parse(path.read_text(), str(path), feature_version=(3, 11))


def test_manage_py_without_its_packages_says_how_to_run_it(default_project):
    command = [sys.executable, "manage.py", "check"]
    done = subprocess.run(command, cwd=default_project, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        1,
        "No module named 'prodserver_ops': run it as `uv run manage.py`, or activate the environment "
        "in .venv.\n",
    )


def test_only_manage_py_is_executable(default_project):
    executable = [path for path in files(default_project) if is_executable(default_project / path)]
    assert executable == ["manage.py"]


def is_executable(path):
    return bool(path.stat().st_mode & 0o111)


def test_context_and_output_contain_no_secrets(default_project):
    context = json.loads((ROOT / "cookiecutter.json").read_text())
    assert not re.search(r"secret|password|token|random", json.dumps(context), re.I)
    package = default_project / default_project.name
    assert "SECRET_KEY" not in (package / "settings.py").read_text()
    defaults = (default_project / SOURCES / "conf" / "defaults.py").read_text()
    assert re.findall(r"SECRET_KEY = (.*)", defaults) == [
        'env("django-insecure-for-development-only")',
        "env(env.Required, cast=secret_key)",
    ]


def test_documents_name_every_environment_variable_of_the_settings(default_project):
    own = (default_project / "prayer_room_api" / "settings.py").read_text()
    settings = own + (default_project / SOURCES / "conf" / "defaults.py").read_text()
    read = set(re.findall(r"^    ([A-Z_]+) = env", settings, re.M))
    read |= set(re.findall(r"@env\S*\n    def ([A-Z_]+)\(", settings))
    read |= set(re.findall(r'key="([A-Z_]+)"', settings))
    read |= set(re.findall(r'BROKER_VARIABLE = "([A-Z_]+)"', own))
    assert {"SECRET_KEY", "DATABASE_URL", "RABBITMQ_URL", "ALLOWED_HOSTS", "PORT"} <= read
    table = (default_project / "docs" / "settings.md").read_text()
    first_column = "\n".join(re.findall(r"^\| (.*?) \|", table, re.M))
    documented = set(re.findall(r"`([A-Z_]+)`", first_column))
    assert documented == read | {"DJANGO_MODE"}


#: The words of each broker.
#: Recipes name servers and deployments that a service can use besides those that were chosen.
RECIPES = "docs/recipes.md"

BROKER_WORDS = {"rabbitmq": r"rabbit|amqps?:|quorum", "redis": r"redis", "postgresql": r"pgmq"}


@pytest.mark.parametrize("broker", BROKER_WORDS)
def test_output_speaks_only_of_the_broker_that_was_chosen(bake, broker):
    project = bake(broker=broker, compose=True, deploy="dockerfile")
    for path, text in texts(project, "").items():
        if path not in (".cruft.json", RECIPES):
            for other, words in BROKER_WORDS.items():
                assert other == broker or not re.search(words, text, re.IGNORECASE), (path, other)


def test_another_broker_is_one_row_and_its_files(cookies, template_copy):
    questions = json.loads((template_copy / "cookiecutter.json").read_text())
    questions["broker"].append("made_up")
    row = questions["_brokers"]["redis"]
    questions["_brokers"]["made_up"] = row | {"variable": "MADE_UP_URL", "plugins": ["made-up"]}
    questions["__prompts__"]["broker"]["made_up"] = "Made up"
    (template_copy / "cookiecutter.json").write_text(json.dumps(questions))
    broker = template_copy / "templates" / "brokers"
    (broker / "made_up.j2").write_text((broker / "redis.j2").read_text())
    answers = {"setup": False, "broker": "made_up"}
    result = cookies.bake(extra_context=answers, template=str(template_copy))
    assert result.exception is None
    project = result.project_path
    settings = (project / project.name / "settings.py").read_text()
    assert 'BROKER_VARIABLE = "MADE_UP_URL"' in settings
    assert "| `MADE_UP_URL` |" in (project / "docs" / "settings.md").read_text()
    assert "dokku made-up:create" in (project / "docs" / "deploy.md").read_text()
