"""Additions: after one of each kind, ``manage.py ci`` passes, and the processes run them."""

import json

import pytest

pytestmark = pytest.mark.slow

#: One of each kind; then again in the app that was added.
ADDITIONS = [
    "app rooms",
    "task count_rooms",
    "schedule clear_sessions",
    "digest news",
    "process pump",
    "task paint --app rooms",
    "schedule clean_rooms --app rooms --crontab '0 3 * * *'",
    "digest rooms_news --app rooms",
    "process lift --app rooms",
]

FIND = """
from django_celery_beat.models import PeriodicTask
names = ["clear-sessions", "send-news", "clean-rooms", "send-rooms-news"]
print(*sorted(f"{row.name}={row.task}" for row in PeriodicTask.objects.filter(name__in=names)))
"""


@pytest.mark.parametrize(
    ("answers", "steps"),
    [
        # The example has many tests; the other service runs every step.
        pytest.param({}, "lint format tests", marks=pytest.mark.long),
        ({"example": "none", "deploy": "systemd", "project_slug": "renamed"}, ""),
    ],
    ids=["default", "none"],
)
def test_each_kind_is_added_with_a_test_and_ci_passes(bake, make_service, uv, answers, steps):
    project = bake(**answers)
    slug = project.name
    service = make_service(project)
    service.run(f"{uv} sync --quiet")
    for addition in ADDITIONS:
        service.run(f"python manage.py add {addition}")
    service.run("python manage.py migrate --verbosity 0")
    output = service.run(f"python manage.py ci {steps}", UV=uv)
    assert output.splitlines()[-1].startswith("Passed in ")
    for name in ("rooms", "count_rooms", "clear_sessions", "news", "pump", "paint"):
        assert f"tests/test_{name}.py" in output
    assert service.shell(FIND).split() == [
        "clean-rooms=rooms.tasks.clean_rooms",
        f"clear-sessions={slug}.tasks.clear_sessions",
        f"send-news={slug}.tasks.send_news",
        "send-rooms-news=rooms.tasks.send_rooms_news",
    ]
    for name in ("pump", "lift"):
        assert service.procfile()[name] == f"python manage.py prodserver {name}"
    unit = project / f"{slug}-pump.service"
    if "deploy" in answers:
        assert "prodserver pump" in unit.read_text()
    else:
        assert json.loads((project / "app.json").read_text())["formation"]["lift"]


def test_an_addition_with_a_name_that_exists_changes_nothing(bake, make_service):
    service = make_service(bake())
    service.install()
    before = {path: path.read_bytes() for path in service.folder.glob("**/*.py")}
    with pytest.raises(pytest.fail.Exception, match="has send_user_digest already"):
        service.run("python manage.py add task send_user_digest")
    assert {path: path.read_bytes() for path in service.folder.glob("**/*.py")} == before
