"""Beat: one runs at a time, and a missed schedule is made up for within the hour."""

from datetime import datetime, timedelta
from types import SimpleNamespace

import pytest
import time_machine
from django.db import OperationalError
from django.utils import timezone
from django_celery_beat.models import CrontabSchedule, PeriodicTask
from django_celery_beat.schedulers import ModelEntry

from {{ cookiecutter.project_slug }} import backends, celery_app

#: A day at three in the morning, when a schedule of these tests is due.
THREE = datetime(2026, 11, 22, 3, tzinfo=timezone.get_default_timezone())


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("beat_is_back", "due"),
    [
        (THREE - timedelta(hours=2), False),
        (THREE, True),
        (THREE + timedelta(minutes=55), True),
        (THREE + timedelta(minutes=65), False),
        (THREE + timedelta(hours=22), False),
        (THREE + timedelta(hours=24), True),
    ],
)
def test_a_missed_schedule_is_made_up_for_within_the_hour(beat_is_back, due):
    crontab = CrontabSchedule.objects.create(minute="0", hour="3", timezone=str(THREE.tzinfo))
    schedule = PeriodicTask(
        name="nightly", task="x", crontab=crontab, last_run_at=THREE - timedelta(days=1)
    )
    with time_machine.travel(beat_is_back, tick=False):
        assert ModelEntry(schedule, app=celery_app).is_due().is_due is due


def test_stands_by_until_the_lock_is_free(monkeypatch, caplog):
    away = OperationalError("password=hunter2")
    answers = iter([False, away, away, False, True])

    def acquire():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    lock = SimpleNamespace(acquire=acquire, connection=SimpleNamespace(close=lambda: None))
    waits = []
    monkeypatch.setattr(backends.time, "sleep", waits.append)
    backends.stand_by(lock)
    assert waits == [backends.INTERVAL] * 4
    assert [record.getMessage() for record in caplog.records] == [
        "beat: Standing by: another beat runs",
        "beat: Standing by: the database does not answer (OperationalError)",
        "beat: Standing by: another beat runs",
    ]
