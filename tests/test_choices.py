"""Choices: each one is data, and what is generated speaks only of what was chosen."""

import json
import re

import pytest
import yaml

from local_schedules import find_problem
from tests.conftest import read_procfile
from tests.generate import get_template
from tests.test_output import texts

#: Answers, and the words of each choice that only these answers may bring into a service.
WORDS = [
    ({"web_server": "granian"}, r"granian"),
    ({"web_server": "uvicorn"}, r"uvicorn"),
    ({"web_server": "gunicorn"}, r"gunicorn|\bgthread|wsgi"),
    ({"task_results": "database"}, r"django.celery.results"),
    ({"monitoring": "flower"}, r"\bflower"),
    ({"realtime": "channels", "web_server": "uvicorn"}, r"channels|websocket|redis"),
    ({"lifecycle": "archive"}, r"archive_expired|submissions-archive"),
    ({"queues": "high"}, r"worker.high|high_queue|\.high\b"),
    ({"deploy": "systemd"}, r"systemd|systemctl"),
    ({"deploy": "dockerfile"}, r"docker build|dockerignore"),
    ({"ci": "gitlab"}, r"gitlab|merge.request"),
    ({"ci": "github"}, r"\.github\b|pull.request|dependabot|actions/"),
    ({"compose": True}, r"docker compose|compose\.ya?ml|nginx\.conf"),
]

#: Files that say what a tool must leave out whatever was chosen, and recipes for other choices.
IGNORED = (".cruft.json", ".gitignore", "docs/recipes.md")


@pytest.mark.parametrize(("answers", "words"), WORDS, ids=str)
def test_words_of_a_choice_occur_only_if_it_was_chosen(bake, answers, words):
    with_choice = bake(**answers)
    # The words of a default occur in services without another answer.
    others = {"gunicorn": {"web_server": "granian"}, "github": {"ci": "gitlab"}}
    without = bake(**others.get(next(iter(answers.values())), {}))
    found = {
        project: [
            path
            for path, text in texts(project, "").items()
            if path not in IGNORED and re.search(words, path + text, re.IGNORECASE)
        ]
        for project in (with_choice, without)
    }
    assert found[with_choice]
    assert found[without] == []


def test_files_of_each_deploy_have_every_process(bake):
    answers = {"queues": "high", "monitoring": "flower", "compose": True}
    project = bake(**answers)
    procfile = read_procfile(project / "Procfile")
    names = ["web", "worker", "worker_high", "beat", "flower"]
    assert list(procfile) == [*names, "release"]
    assert list(read_procfile(project / "Procfile.dev")) == names
    assert list(json.loads((project / "app.json").read_text())["formation"]) == names
    for file in ("compose.yaml", "compose.dev.yaml"):
        services = yaml.safe_load((project / file).read_text())["services"]
        assert [name for name in services if name in names] == names
    units = bake(**answers, deploy="systemd").glob("*.service")
    assert sorted(unit.stem for unit in units) == sorted(
        f"prayer-room-api-{name.replace('_', '-')}" for name in names
    )


def test_template_has_few_conditionals():
    """Fewer than 25 in all of what becomes a service; Django's own templates aside."""
    paths = [
        path
        for folder in ("templates", "{{cookiecutter.project_slug}}")
        for path in (get_template() / folder).rglob("*")
        if path.is_file() and not {".html", ".txt"} & set(re.findall(r"\.\w+", path.name))
    ]
    texts = [path.read_text() for path in paths]
    assert len(texts) > 100
    assert sum(len(re.findall(r"\{%-? *(?:el)?if\b", text)) for text in texts) < 25


def test_another_web_server_is_one_row_and_its_files(cookies, template_copy):
    questions = json.loads((template_copy / "cookiecutter.json").read_text())
    questions["web_server"].append("made_up")
    row = questions["_web_servers"]["uvicorn"]
    questions["_web_servers"]["made_up"] = row
    questions["__prompts__"]["web_server"]["made_up"] = "Made up"
    (template_copy / "cookiecutter.json").write_text(json.dumps(questions))
    servers = template_copy / "templates" / "web_servers"
    text = (servers / "uvicorn.j2").read_text().replace("uvicorn", "made_up")
    (servers / "made_up.j2").write_text(text)
    answers = {"setup": False, "web_server": "made_up"}
    result = cookies.bake(extra_context=answers, template=str(template_copy))
    assert result.exception is None
    project = result.project_path
    assert "prodserver-ops[api,made_up,sentry]" in (project / "pyproject.toml").read_text()
    settings = (project / project.name / "settings.py").read_text()
    assert '"web": processes.made_up(self),' in settings
    assert "(made_up) |" in (project / "docs" / "processes.md").read_text()


SCHEDULES = {
    "report-hourly": {"task": "write_report", "interval": {"hours": 1}, "args": ["all"]},
    "digest-early": {"task": "send_user_digest", "crontab": "0 6 * * *", "args": ["daily"]},
}


@pytest.fixture(params=["command line", "configuration file", "replay file"])
def project(request, run_cookiecutter, tmp_path):
    """A service with other schedules."""
    if request.param == "command line":
        folder, done = run_cookiecutter(
            "--no-input", "setup=no", f"schedules={json.dumps(SCHEDULES)}"
        )
    elif request.param == "configuration file":
        file = tmp_path / "config.yaml"
        file.write_text(
            yaml.safe_dump({"default_context": {"schedules": SCHEDULES}}, sort_keys=False)
        )
        folder, done = run_cookiecutter("--no-input", "setup=no", "--config-file", str(file))
    else:
        environment = {"HOME": str(tmp_path)}
        run_cookiecutter("--no-input", "setup=no", environment=environment)
        (file,) = tmp_path.glob(".cookiecutter_replay/*.json")
        recorded = json.loads(file.read_text())
        recorded["cookiecutter"]["schedules"] = SCHEDULES
        file.write_text(json.dumps(recorded))
        folder, done = run_cookiecutter("--replay-file", str(file), environment=environment)
    assert done.returncode == 0, done.stdout
    return folder / "prayer_room_api"


def test_table_of_schedules_replaces_those_of_the_example(project):
    migration = (project / "prayer_room_api/migrations/0002_seed_schedules.py").read_text()
    assert re.findall(r'CreateSchedule\(\n +"(.*)"', migration) == list(SCHEDULES)
    assert "interval=timedelta(hours=1)," in migration
    assert 'crontab="0 6 * * *",' in migration
    document = (project / "docs" / "schedules.md").read_text()
    assert '| `report-hourly` | every hour | `write_report("all")` |' in document
    tasks = (project / "prayer_room_api/tasks.py").read_text()
    assert tasks.count("raise NotImplementedError") == 1
    assert "def write_report(*args):" in tasks
    assert "xfail" in (project / "tests/test_tasks.py").read_text()


GOOD = {"task": "clean", "crontab": "0 3 * * *"}


@pytest.mark.parametrize(
    ("schedules", "problem"),
    [
        ({"a": {"task": "__import__", "crontab": "* * * * *"}}, "task cannot be __import__"),
        (
            {"a": {"task": "f", "crontab": "* * * * *", "args": [[[[[[[[[[[1]]]]]]]]]]]}},
            "args must have at most 10 levels",
        ),
        (
            {"a": {"task": "f", "crontab": "* * * * *", "args": [{"a": "\u202e"}]}},
            "args must not contain control characters",
        ),
        ([], "must be an object"),
        ({" ": GOOD}, "blank"),
        ({"x" * 201: GOOD}, "longer than 200"),
        ({"records-delete": GOOD}, "name is reserved"),
        ({"x": "daily"}, "must be an object"),
        ({"x": GOOD | {"when": "now"}}, "unknown key 'when'"),
        ({"x": {"crontab": "0 3 * * *"}}, "must be the name of a function"),
        ({"x": GOOD | {"task": "my.task"}}, "must be the name of a function"),
        ({"x": GOOD | {"task": "class"}}, "is reserved"),
        ({"x": GOOD | {"interval": {"hours": 1}}}, "either a crontab or an interval"),
        ({"x": {"task": "clean"}}, "either a crontab or an interval"),
        ({"x": GOOD | {"crontab": "0 3 * *"}}, "invalid crontab"),
        ({"x": GOOD | {"crontab": "60 3 * * *"}}, "invalid crontab"),
        ({"x": GOOD | {"crontab": "0 3 * * funday"}}, "invalid crontab"),
        ({"x": GOOD | {"crontab": "*/0 3 * * *"}}, "invalid crontab"),
        ({"x": {"task": "clean", "interval": {"hours": 0}}}, "interval"),
        ({"x": {"task": "clean", "interval": {"weeks": 1}}}, "interval"),
        ({"x": {"task": "clean", "interval": 5}}, "interval"),
        ({"x": GOOD | {"args": "daily"}}, "args must be a list"),
    ],
)
def test_invalid_schedule_is_reported(schedules, problem):
    assert problem in find_problem(schedules)


@pytest.mark.parametrize("crontab", ["0 3 * * *", "*/5 8-18 1,15 jan-mar mon-fri", "0 0 31 12 0"])
def test_valid_schedule_has_no_problem(crontab):
    assert (
        find_problem({"x": GOOD | {"crontab": crontab, "args": [1, None, {"a": [True]}]}}) is None
    )
