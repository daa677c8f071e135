"""The page *Operations* of the admin, and the record of task runs that it shows."""

import json
import os
import re
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from types import SimpleNamespace

import pytest
import time_machine
from celery import shared_task
from celery.exceptions import TimeLimitExceeded
from django.contrib.admin.models import LogEntry
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.db import DataError, OperationalError
from django.urls import reverse
from django.utils import timezone
from django_celery_beat.models import IntervalSchedule, PeriodicTask
from kombu.utils.json import dumps, loads

from prodserver_ops.console import doctor, operations, problems, retention
from prodserver_ops.models import Heartbeat, ScheduleRun, TaskRun
from prodserver_ops.tasks import delete_records
from prodserver_ops.worker import failed, record
from prodserver_ops.worker.app import Task

pytestmark = pytest.mark.django_db

PAGE = "admin:ops_operations"

NOW = timezone.now()


@shared_task(name="test.operations")
def sample(*args, **kwargs):
    """Do nothing."""


@pytest.fixture
def user(client):
    """A user of the admin who may do nothing, logged in."""
    user = get_user_model().objects.create_user("staff", "staff@example.com", is_staff=True)
    client.force_login(user)
    return user


@pytest.fixture
def page(admin_client):
    """A function that returns the page's text."""
    return lambda query="": admin_client.get(reverse(PAGE) + query).text


@pytest.fixture
def queued(monkeypatch):
    """Return the list of queued tasks, as (name, args, kwargs, headers)."""
    queued = []

    def apply_async(task, args=None, kwargs=None, headers=None, **options):
        queued.append((task.name, list(args), kwargs, headers))

    monkeypatch.setattr(Task, "apply_async", apply_async)
    return queued


@pytest.fixture
def schedule():
    """A schedule of the sample task."""
    interval = IntervalSchedule.objects.create(every=5, period="minutes")
    return PeriodicTask.objects.create(
        name="sample", task=sample.name, args='["a"]', interval=interval
    )


def make_run(**fields):
    fields = {"name": sample.name, "started_at": timezone.now(), "arguments": "[[1], {}]"} | fields
    return TaskRun.objects.create(**fields)


class TestRecord:
    @pytest.fixture
    def recorder(self, monkeypatch):
        """A recorder without its thread, which keeps the test's connection."""
        monkeypatch.setattr(record.threading, "Thread", lambda **options: self)
        monkeypatch.setattr(record.connection, "close", lambda: None)
        return record.Recorder()

    def start(self):
        """Stand in for a thread, which inherits the blocked signals."""
        self.blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def test_thread_gets_no_sigterm_that_the_main_thread_defers(self, recorder):
        assert signal.SIGTERM in self.blocked
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def note(self, recorder, number, state="SUCCESS", result=None, args=(1,), schedule=None):
        context = sample.request.__class__(headers={"schedule": schedule})
        recorder.start(f"id{number}", context, sample.name, list(args), {})
        recorder.end(f"id{number}", state, result)

    def test_arguments_of_any_type_that_celery_serializes_are_recorded(self, recorder, queued):
        day = timezone.now()
        self.note(recorder, 1, "FAILURE", ValueError("a"), args=(day,))
        self.note(recorder, 2, "FAILURE", ValueError("a"), args=(object(),))
        recorder.write()
        first, second = TaskRun.objects.order_by("pk")
        assert loads(first.arguments) == [[day], {}]
        assert second.arguments == ""

    def test_result_duration_and_arguments_are_recorded(self, recorder):
        self.note(recorder, 1)
        self.note(recorder, 2, "FAILURE", ValueError("password=hunter2 at a@example.com"))
        self.note(recorder, 3, "REJECTED")
        recorder.write()
        first, second = TaskRun.objects.order_by("-status")
        assert (first.status, first.arguments, first.error) == ("succeeded", "[[1], {}]", "")
        assert 0 <= first.duration < 1
        assert second.status == "failed"
        assert second.error.startswith("ValueError: ")
        assert "a@example.com" not in second.error

    @pytest.mark.parametrize(
        ("state", "status"), [("SUCCESS", "succeeded"), ("IGNORED", "retried"), ("", "retried")]
    )
    def test_long_run_is_recorded_while_it_runs(self, recorder, monkeypatch, state, status):
        monkeypatch.setattr(record, "INTERVAL", -1)
        context = sample.request.__class__(headers={})
        recorder.start("id1", context, sample.name, [], {})
        recorder.write()
        assert TaskRun.objects.get().status == "running"
        recorder.end("id1", state, None)
        recorder.write()
        assert TaskRun.objects.get().status == status

    def test_lost_runs_are_counted_and_recorded(self, recorder, monkeypatch):
        monkeypatch.setattr(record, "_recorder", recorder)
        context = sample.request.__class__(headers={})
        # One was lost before it was recorded, and one while its row said that it runs.
        make_run(task_id="id1", status="running")
        for losses in (1, 2, 3):
            recorder.start("id1", context, sample.name, [], {})
            assert record.start_again("id1") == losses
        recorder.end("id1", "IGNORED", record.GivenUp("it has lost 3 workers"))
        recorder.write()
        rows = list(TaskRun.objects.order_by("pk").values_list("status", "error"))
        # A person has requeued it, and it loses its worker again.
        for losses in (0, 1):
            recorder.start("id1", context, sample.name, [], {})
            assert record.start_again("id1") == losses
        assert rows[:3] == [("retried", "WorkerLostError: its worker was lost")] * 3
        assert rows[3:] == [("failed", "it has lost 3 workers")]

    @pytest.mark.parametrize(("url", "losses"), [("amqp://mq", 1), ("redis://r", 0)])
    def test_run_that_rabbitmq_ends_counts_as_lost(
        self, recorder, monkeypatch, settings, url, losses
    ):
        monkeypatch.setattr(record, "_recorder", recorder)
        settings.CELERY_BROKER_URL, settings.RABBITMQ_CONSUMER_TIMEOUT = url, 60
        context = sample.request.__class__(headers={})
        for seconds in (30, 61):
            recorder.start("id1", context, sample.name, [], {})
            recorder.running["id1"].start -= seconds
            recorder.end("id1", "", None)
        recorder.write()
        recorder.start("id1", context, sample.name, [], {})
        assert record.start_again("id1") == losses

    @pytest.mark.parametrize("seconds", [0, 61])
    def test_task_that_exits_has_failed(self, recorder, monkeypatch, schedule, seconds):
        monkeypatch.setattr(record, "_recorder", recorder)
        headers = {"schedule": schedule.pk}
        context = {"id": "id1", "headers": headers, "is_eager": False}
        recorder.start("id1", sample.request.__class__(**context), sample.name, [], {})
        recorder.running["id1"].start -= seconds
        recorder.write()
        sample.push_request(**context)
        try:
            sys.exit(3)
        except SystemExit:
            record.note_end("id1", sample, None, None)
            # In the main process:
            record.note_killed(sample, "id1", record.TaskExit("SystemExit(3)"), args=[], kwargs={})
        finally:
            sample.pop_request()
        recorder.write()
        run = TaskRun.objects.get()
        assert (run.status, run.error) == ("failed", "TaskExit: SystemExit(3)")
        assert run.schedule_id == schedule.pk

    def test_lost_runs_are_not_counted_while_the_database_is_away(self, monkeypatch, caplog):
        def fail():
            raise OperationalError("the connection is closed")

        monkeypatch.setattr(record, "get_recorder", fail)
        make_run(task_id="id1", status="running")
        assert record.start_again("id1") == 0
        assert "Could not record the start of a task: OperationalError" in caplog.text

    def test_first_tasks_of_two_threads_have_one_recorder(self, monkeypatch):
        both = threading.Barrier(2)

        class SlowRecorder:
            def __init__(self):
                self.pid = os.getpid()
                with suppress(threading.BrokenBarrierError):
                    both.wait(timeout=0.1)

        monkeypatch.setattr(record, "_recorder", None)
        monkeypatch.setattr(record, "Recorder", SlowRecorder)
        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(lambda _: record.get_recorder(), range(2))
        assert first is second

    def test_all_failures_are_kept_if_there_are_too_many(self, recorder, monkeypatch):
        monkeypatch.setattr(record, "MAX_RUNS", 2)
        for number in range(9):
            self.note(recorder, number, "FAILURE" if number > 3 else "SUCCESS", ValueError())
        recorder.write()
        assert TaskRun.objects.filter(status="failed").count() == 5
        assert TaskRun.objects.filter(status="succeeded").count() == 2

    def test_run_of_a_schedule_is_kept_if_there_are_too_many(self, recorder, monkeypatch):
        monkeypatch.setattr(record, "MAX_RUNS", 2)
        for number in range(9):
            self.note(recorder, number, schedule=7 if number == 8 else None)
        assert len(recorder.ended) == 3
        recorder.write()
        assert set(TaskRun.objects.values_list("schedule_id", flat=True)) == {7, None}

    def test_long_run_is_kept_if_there_are_too_many(self, recorder, monkeypatch):
        """The thread may be about to store it as running."""
        monkeypatch.setattr(record, "MAX_RUNS", 1)
        self.note(recorder, 1)
        recorder.start("id2", sample.request.__class__(headers={}), sample.name, [], {})
        recorder.running["id2"].start -= record.INTERVAL
        recorder.end("id2", "SUCCESS", None)
        assert [note.task_id for note in recorder.ended] == ["id1", "id2"]

    def test_error_without_a_text_is_recorded(self, recorder):
        class FaultyError(Exception):
            def __str__(self):
                raise ValueError

        self.note(recorder, 1, "FAILURE", FaultyError())
        recorder.write()
        assert TaskRun.objects.get().error == "FaultyError"

    def test_error_that_no_database_stores_is_changed(self, recorder):
        self.note(recorder, 1, "FAILURE", ValueError("a\0b\udcff"))
        recorder.write()
        assert TaskRun.objects.get().error == r"ValueError: a\x00b\udcff"

    @pytest.mark.parametrize(
        "headers",
        [
            {"queued_at": "2026-13-01T00:00:00"},
            {"queued_at": ["x"]},
            {"schedule": "abc"},
            {"schedule": 2**70},
            {"schedule": ["x"]},
            {"request_id": "a\0b"},
        ],
        ids=str,
    )
    def test_forged_header_is_ignored(self, recorder, headers):
        self.note(recorder, 1)
        recorder.start("x" * 300, sample.request.__class__(headers=headers), sample.name, [], {})
        recorder.end("x" * 300, "SUCCESS", None)
        recorder.write()
        assert set(TaskRun.objects.values_list("schedule", "queued_at", "request_id")) == {
            (None, None, "")
        }
        assert TaskRun.objects.count() == 2

    def test_row_that_cannot_be_stored_does_not_affect_the_others(
        self, recorder, monkeypatch, caplog
    ):
        for number in range(3):
            self.note(recorder, number)
        bulk_create = TaskRun.objects.bulk_create

        def fail(rows):
            if any(row.task_id == "id1" for row in rows):
                raise DataError("too long")
            return bulk_create(rows)

        monkeypatch.setattr(TaskRun.objects, "bulk_create", fail)
        recorder.write()
        assert "Could not record a task run: DataError" in caplog.text
        assert set(TaskRun.objects.values_list("task_id", flat=True)) == {"id0", "id2"}

    def test_notes_are_kept_while_the_database_is_unavailable(self, recorder, monkeypatch, caplog):
        def fail(*args, **kwargs):
            raise OperationalError("gone")

        self.note(recorder, 1, "FAILURE", ValueError())
        with monkeypatch.context() as patch:
            patch.setattr(TaskRun.objects, "bulk_create", fail)
            recorder.write()
        assert "Could not record task runs yet: OperationalError" in caplog.text
        assert recorder.wake.is_set()
        self.note(recorder, 2)
        recorder.write()
        assert set(TaskRun.objects.values_list("task_id", flat=True)) == {"id1", "id2"}

    def test_long_run_is_stored_once_although_its_first_row_was_rolled_back(
        self, recorder, monkeypatch
    ):
        monkeypatch.setattr(record, "INTERVAL", -1)
        recorder.start("id1", sample.request.__class__(headers={}), sample.name, [], {})
        bulk_create = TaskRun.objects.bulk_create

        def create_and_fail(rows):
            bulk_create(rows)
            raise OperationalError("gone")

        with monkeypatch.context() as patch:
            patch.setattr(TaskRun.objects, "bulk_create", create_and_fail)
            recorder.write()
        assert not TaskRun.objects.exists()
        recorder.end("id1", "SUCCESS", None)
        recorder.write()
        assert TaskRun.objects.get().status == "succeeded"

    def test_run_whose_process_was_killed_is_recorded_once(self, recorder, monkeypatch):
        monkeypatch.setattr(record, "get_recorder", lambda: recorder)
        make_run(task_id="id1", status="running")
        # It has noted that it was terminated.
        make_run(task_id="id2", status="retried")
        for task_id in ("id1", "id1", "id2", "id2", "id3", "id3"):
            record.note_killed(sample, task_id, TimeLimitExceeded(300), args=[], kwargs={})
        recorder.write()
        record.note_killed(sample, "id1", TimeLimitExceeded(300), args=[], kwargs={})
        recorder.write()
        rows = TaskRun.objects.order_by("task_id").values_list("task_id", "status", "error")
        error = "TimeLimitExceeded: TimeLimitExceeded(300,)"
        assert list(rows) == [(name, "failed", error) for name in ("id1", "id2", "id3")]

    def test_arguments_that_are_too_long_are_left_out(self, recorder):
        self.note(recorder, 1, args=["x" * 2000])
        recorder.write()
        assert TaskRun.objects.get().arguments == ""

    def test_old_and_too_many_rows_are_deleted(self, monkeypatch):
        monkeypatch.setattr(retention, "KEEP_ROWS", 2)
        make_run(started_at=timezone.now() - timedelta(days=8))
        kept = [make_run().pk for _ in range(3)][1:]
        delete_records()
        assert sorted(TaskRun.objects.values_list("pk", flat=True)) == kept

    def test_eager_runs_are_not_recorded(self, monkeypatch):
        monkeypatch.setattr(record, "get_recorder", lambda: pytest.fail("recorded"))
        sample.apply()


class TestPage:
    def test_shows_schedules_in_words_with_their_latest_runs(self, page, schedule, settings):
        settings.LANGUAGE_CODE = "en"
        make_run(schedule=schedule, status="succeeded", duration=0.25)
        make_run(schedule=schedule, status="failed", duration=61, error="ValueError: wrong")
        text = page()
        assert "every 5 minutes" in text
        assert text.index('class="run failed"') < text.index('class="run succeeded"')
        assert "1 min 1 s" in text

    def test_shows_what_is_off_invalid_running_and_failed(self, page, schedule):
        PeriodicTask.objects.filter(pk=schedule.pk).update(enabled=False)
        other = PeriodicTask.objects.create(
            name="broken", task="no.such.task", interval=schedule.interval
        )
        make_run(schedule=other, status="failed", error="KeyError: 'x'")
        make_run(name="slow.task")
        make_run(name="lost.task", started_at=timezone.now() - timedelta(hours=1))
        text = page()
        assert "<strong>off</strong>" in text
        assert "its task does not exist: no.such.task" in text
        assert "KeyError: &#x27;x&#x27;" in text
        assert "slow.task" in text
        assert "lost.task" not in text

    def test_shows_all_schedules_on_several_pages(self, page, schedule, monkeypatch):
        monkeypatch.setattr(operations, "PAGE_SIZE", 2)
        for name in ("first", "last"):
            PeriodicTask.objects.create(name=name, task=sample.name, interval=schedule.interval)
        texts = [page()]
        while following := re.search(r'href="(\?page=\d+)">next', texts[-1]):
            texts.append(page(following[1]))
        shown = [re.findall(r'aria-label="Run ([^"]+) now"', text) for text in texts]
        names = PeriodicTask.objects.order_by("name").values_list("name", flat=True)
        assert [name for each in shown for name in each] == list(names)
        assert f"1 to 2 of {len(names)}" in texts[0]

    def test_shows_runs_that_pile_up(self, page, schedule):
        now = timezone.now()
        for minutes in (1, 2, 3):
            moment = now - timedelta(minutes=minutes)
            ScheduleRun.objects.create(schedule=schedule, due_at=moment, published_at=moment)
        TaskRun.objects.create(
            name=sample.name, schedule=schedule, started_at=now - timedelta(minutes=4), host="a"
        )
        text = "its runs pile up: 3 waiting, 1 running"
        assert text in page()
        result = doctor.check_pile_ups()
        assert (result.status, result.message) == ("error", f"{schedule.name}: {text}")

    @pytest.mark.parametrize(
        "change",
        [
            {"published_at": None},
            {"started_at": NOW},
            {"due_at": NOW - timedelta(days=2)},
        ],
    )
    @time_machine.travel(NOW, tick=False)
    def test_run_that_is_alone_is_no_pile_up(self, page, schedule, change):
        for seconds in (70, 80):
            moment = NOW - timedelta(seconds=seconds)
            ScheduleRun.objects.create(schedule=schedule, due_at=moment, published_at=moment)
        assert set(problems.find_pile_ups()) == {schedule.pk}
        # The earlier one does not count either once the last one was started.
        last = ScheduleRun.objects.order_by("due_at").last()
        ScheduleRun.objects.filter(pk=last.pk).update(**change)
        assert problems.find_pile_ups() == {}
        assert "pile up" not in page()
        assert doctor.check_pile_ups().status == "ok"

    @time_machine.travel(NOW, tick=False)
    def test_runs_that_wait_for_a_moment_are_no_pile_up(self, schedule):
        for seconds in (30, 40):
            moment = NOW - timedelta(seconds=seconds)
            ScheduleRun.objects.create(schedule=schedule, due_at=moment, published_at=moment)
        assert problems.find_pile_ups() == {}

    def test_messages_that_expire_are_no_pile_up(self, schedule):
        for minutes in (1, 2, 3):
            moment = NOW - timedelta(minutes=minutes)
            ScheduleRun.objects.create(schedule=schedule, due_at=moment, published_at=moment)
        PeriodicTask.objects.update(expire_seconds=30)
        assert problems.find_pile_ups() == {}

    def test_shows_the_version_of_the_template_if_it_is_known(self, page, settings, tmp_path):
        settings.BASE_DIR = tmp_path
        assert "Template " not in page()
        record = {"commit": None, "context": {"cookiecutter": {"_version": "1.2.3"}}}
        (tmp_path / ".cruft.json").write_text(json.dumps(record))
        assert "Template 1.2.3" in page()

    def test_shows_processes(self, page):
        assert "No worker or beat is running." in page()
        Heartbeat.objects.create(process="beat", host="web1", pid=7, seen_at=timezone.now())
        assert re.search(r"beat 7 on web1: \d seconds ago", page())

    def test_loads_without_a_broker(self, page, monkeypatch):
        def fail(*args):
            raise OSError("connection refused")

        monkeypatch.setattr(operations.broker, "count_messages", fail)
        assert "The broker is unavailable: OSError: connection refused" in page()

    def test_shows_how_many_tasks_wait(self, page, settings):
        sample.apply_async()
        assert f"{settings.CELERY_TASK_DEFAULT_QUEUE}: " in page()

    def test_number_of_queries_does_not_grow(self, page, schedule, django_assert_max_num_queries):
        for number in range(10):
            other = PeriodicTask.objects.create(
                name=f"other {number}", task=sample.name, interval=schedule.interval
            )
            make_run(schedule=other, status="failed")
        with django_assert_max_num_queries(15):
            page()

    def test_is_for_those_who_may_see_runs(self, client, user):
        assert client.get(reverse(PAGE)).status_code == 403
        user.user_permissions.add(Permission.objects.get(codename="view_taskrun"))
        response = client.get(reverse(PAGE))
        assert response.status_code == 200
        assert "Run now" not in response.text

    def test_index_of_the_admin_leads_with_it(self, admin_client, client):
        make_run(status="failed")
        text = admin_client.get(reverse("admin:index")).text
        assert reverse(PAGE) in text
        assert "1 failed task" in text
        assert "no worker" in text

    def test_index_says_nothing_to_others(self, client, user):
        assert reverse(PAGE) not in client.get(reverse("admin:index")).text


class TestButtons:
    def test_run_now_queues_the_task_of_a_schedule(self, admin_client, schedule, queued):
        response = admin_client.post(reverse("admin:ops_run", args=[schedule.pk]), follow=True)
        assert "Queued: sample." in response.text
        assert queued == [(sample.name, ["a"], {}, {"schedule": schedule.pk})]
        assert LogEntry.objects.get().change_message == "Run now."

    def test_run_now_without_a_broker_is_not_in_the_history(
        self, admin_client, schedule, monkeypatch
    ):
        def fail(*args, **options):
            raise OSError("connection refused")

        monkeypatch.setattr(Task, "apply_async", fail)
        response = admin_client.post(reverse("admin:ops_run", args=[schedule.pk]), follow=True)
        assert "Not queued: sample: OSError: connection refused" in response.text
        assert not LogEntry.objects.exists()

    def test_run_whose_arguments_were_not_recorded_is_not_tried_again(self, admin_client, queued):
        run = make_run(status="failed", arguments="")
        response = admin_client.post(reverse("admin:ops_repeat", args=[run.pk]), follow=True)
        assert "Not queued: the arguments of test.operations were not recorded." in response.text
        assert queued == []
        run.refresh_from_db()
        assert run.repeated_at is None

    def test_try_again_queues_a_failed_task_once(self, admin_client, queued):
        run = make_run(status="failed", arguments=json.dumps([[1], {"b": 2}]))
        url = reverse("admin:ops_repeat", args=[run.pk])
        assert "Queued: test.operations." in admin_client.post(url, follow=True).text
        assert queued == [(sample.name, [1], {"b": 2}, {})]
        assert "has already been tried again" in admin_client.post(url, follow=True).text
        assert len(queued) == 1
        assert "tried again" in admin_client.get(reverse(PAGE)).text

    def test_run_that_was_given_up_is_requeued(self, admin_client, queued, monkeypatch):
        run = make_run(status="failed", task_id="id1", error="it has lost 15 workers, and")
        url = reverse("admin:ops_repeat", args=[run.pk])
        waiting = [SimpleNamespace(headers={"id": id}) for id in ("id1", "id2")]

        def requeue(app, is_wanted):
            found = [message for message in waiting if is_wanted(message)]
            for message in found:
                waiting.remove(message)
            return len(found)

        monkeypatch.setattr(failed, "requeue", requeue)
        assert "Queued: test.operations." in admin_client.post(url, follow=True).text
        assert [message.headers["id"] for message in waiting] == ["id2"]
        assert "has already been tried again" in admin_client.post(url, follow=True).text
        # Its message was deleted.
        TaskRun.objects.update(repeated_at=None)
        text = admin_client.post(url, follow=True).text
        assert "test.operations is not in the queue of failed tasks." in text
        run.refresh_from_db()
        assert run.repeated_at is None
        assert queued == []

    def test_try_again_restores_the_types_of_the_arguments(self, admin_client, queued):
        day = timezone.now()
        run = make_run(status="failed", arguments=dumps([[day], {}]))
        admin_client.post(reverse("admin:ops_repeat", args=[run.pk]))
        assert queued == [(sample.name, [day], {}, {})]

    def test_failure_that_cannot_be_queued_can_be_tried_again_later(
        self, admin_client, monkeypatch
    ):
        def fail(*args, **options):
            raise OSError("connection refused")

        monkeypatch.setattr(Task, "apply_async", fail)
        run = make_run(status="failed")
        response = admin_client.post(reverse("admin:ops_repeat", args=[run.pk]), follow=True)
        assert "Not queued: test.operations: OSError: connection refused" in response.text
        run.refresh_from_db()
        assert run.repeated_at is None

    def test_unknown_task_is_reported(self, admin_client, schedule):
        PeriodicTask.objects.filter(pk=schedule.pk).update(task="no.such.task")
        response = admin_client.post(reverse("admin:ops_run", args=[schedule.pk]), follow=True)
        assert "Not queued: sample: ValueError: The task no.such.task does not" in response.text

    @pytest.mark.parametrize("name", ["ops_run", "ops_repeat"])
    def test_need_post_and_the_permission_to_change_schedules(
        self, client, user, schedule, queued, name
    ):
        run = make_run(status="failed")
        url = reverse(f"admin:{name}", args=[schedule.pk if name == "ops_run" else run.pk])
        user.user_permissions.add(Permission.objects.get(codename="view_taskrun"))
        assert client.post(url).status_code == 403
        assert client.get(url).status_code == 405
        assert queued == []
