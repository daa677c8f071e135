"""Resumable tasks: they go on where they were, and repeat at most the steps since then."""

import json
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial
from queue import Queue
from threading import Thread
from uuid import UUID

import pytest
from celery import current_app
from celery.exceptions import Reject, Retry, SoftTimeLimitExceeded, TimeLimitExceeded
from django.db import OperationalError, connection, transaction
from django.db.models import F
from django.urls import reverse
from django.utils import timezone
from django_celery_beat.models import IntervalSchedule, PeriodicTask
from kombu.exceptions import OperationalError as BrokerError
from kombu.utils.json import loads as kombu_loads

from prodserver_ops.core.locks import try_lock
from prodserver_ops.models import Alert, ResumableRun, TaskRun
from prodserver_ops.scheduling import validation
from prodserver_ops.tasks import delete_records, resume_tasks
from prodserver_ops.worker import continuations
from prodserver_ops.worker.app import MAX_LOSSES
from prodserver_ops.worker.continuations import (
    Status,
    get_lock_name,
    resumable_task,
    rows_after,
    set_total,
)

pytestmark = pytest.mark.django_db(transaction=True, serialized_rollback=True)

#: What happens before a step, by its number.
before = {}

done = Queue()


@resumable_task(interval=0)
def work(cursor, last, *, prefix="row"):
    """Create a row for each number."""
    set_total(last)
    for number in range((cursor or 0) + 1, last + 1):
        Alert.objects.create(key=f"{prefix} {number}")
        before.pop(number, lambda: None)()
        yield number
    done.put(last)
    return f"{last} rows"


@pytest.fixture(autouse=True)
def _clear():
    before.clear()
    continuations._stopping[0] = 0
    while not done.empty():
        done.get_nowait()


def deliver(task, *args, number=0, task_id="one", **request):
    """Run a task as a message with that number does."""
    values = {
        "id": task_id,
        "args": list(args),
        "kwargs": {},
        "headers": {"slice": number},
        "retries": 0,
        "delivery_info": {"exchange": "", "routing_key": "dummy"},
        "called_directly": False,
        "is_eager": False,
    }
    task.push_request(**values | request)
    try:
        return task.run(*args)
    except Exception as error:
        if not isinstance(error, (Retry, Reject)):
            task.on_failure(error, task_id, args, {}, None)
        raise
    finally:
        task.pop_request()


def get_rows():
    return sorted(int(key.partition(" ")[2]) for key in Alert.objects.values_list("key", flat=True))


def get_run():
    return ResumableRun.objects.get()


def fail(error):
    raise error


def stop():
    continuations._stopping[0] = 1


class TestWorker:
    def test_runs_a_task_to_its_end(self, run_worker):
        with run_worker():
            work.delay(5)
            assert done.get(timeout=30) == 5
        run = get_run()
        assert (run.status, run.steps, run.total, run.result) == ("finished", 5, 5, '"5 rows"')
        assert get_rows() == [1, 2, 3, 4, 5]

    def test_goes_on_with_another_message_after_each_slice(self, run_worker, monkeypatch):
        monkeypatch.setattr(continuations, "SLICE", 0)
        with run_worker():
            work.delay(5)
            assert done.get(timeout=30) == 5
        run = get_run()
        assert (run.status, run.number, run.claim) == ("finished", 5, 6)
        assert get_rows() == [1, 2, 3, 4, 5]

    def test_tries_again_as_long_as_it_makes_progress(self, run_worker, monkeypatch):
        monkeypatch.setattr(
            "celery.app.autoretry.get_exponential_backoff_interval", lambda **options: 0
        )
        for number in range(2, 12):
            before[number] = partial(fail, OperationalError("the connection is closed"))
        with run_worker():
            work.delay(11)
            assert done.get(timeout=30) == 11
        assert get_rows() == list(range(1, 12))

    def test_goes_on_after_the_worker_was_stopped(self, run_worker):
        before[3] = stop
        with run_worker():
            work.delay(5)
            wait_for(lambda: ResumableRun.objects.filter(steps__gte=3).exists())
            continuations._stopping[0] = 0
            assert done.get(timeout=30) == 5
        assert get_rows() == [1, 2, 3, 4, 5]


def wait_for(condition):
    until = time.monotonic() + 30
    while True:
        # A table of SQLite in memory is locked while another thread writes to it.
        with suppress(OperationalError):
            if condition():
                return
        assert time.monotonic() < until
        time.sleep(0.01)


class TestSteps:
    def test_cursor_is_stored_with_the_changes(self, queue):
        before[3] = partial(fail, ValueError("no such row"))
        with pytest.raises(ValueError, match="no such row"):
            deliver(work, 5)
        run = get_run()
        assert (run.status, run.cursor, run.steps) == ("failed", "2", 2)
        assert run.error == "ValueError: no such row"
        assert get_rows() == [1, 2]

    def test_steps_of_an_interval_are_stored_together(self, queue, monkeypatch):
        monkeypatch.setattr(continuations, "SQLITE_INTERVAL", 60)

        @resumable_task(name="tests.slow", interval=60)
        def slow(cursor):
            for number in range(1, 5):
                Alert.objects.create(key=f"row {number}")
                yield number
            raise ValueError

        with pytest.raises(ValueError):
            deliver(slow)
        assert (get_run().steps, get_rows()) == (0, [])

    def test_stops_within_a_step(self, queue):
        before[2] = stop
        with pytest.raises(Retry):
            deliver(work, 5)
        ((name, arguments, options),) = queue
        assert (name, arguments, options["task_id"]) == (work.name, (5,), "one")
        assert (options["headers"]["slice"], options["retries"]) == (1, 0)
        run = get_run()
        assert (run.status, run.number, run.cursor) == ("waiting", 1, "2")
        continuations._stopping[0] = 0
        assert deliver(work, 5, number=1) == "5 rows"
        assert get_rows() == [1, 2, 3, 4, 5]

    def test_message_stays_if_the_broker_is_unavailable(self, monkeypatch):
        def refuse(*args, **kwargs):
            raise BrokerError("no broker")

        monkeypatch.setattr("prodserver_ops.worker.app.Task.apply_async", refuse)
        before[2] = stop
        with pytest.raises(Reject) as caught:
            deliver(work, 5)
        assert caught.value.requeue
        run = get_run()
        assert (run.status, run.number, run.cursor) == ("waiting", 0, "2")

    def test_soft_time_limit_is_tried_again(self, queue):
        before[2] = partial(fail, SoftTimeLimitExceeded())
        with pytest.raises(Retry):
            deliver(work, 5)
        assert queue[0][2]["retries"] == 1
        assert get_run().status == "waiting"

    def test_retries_without_progress_end(self, queue):
        before[1] = partial(fail, OperationalError("the connection is closed"))
        with pytest.raises(OperationalError):
            deliver(work, 5, retries=3)
        assert get_run().status == "failed"

    def test_losses_without_progress_end(self, queue):
        deliver_lost = partial(deliver, work, 5)
        for _ in range(MAX_LOSSES):
            before[1] = partial(fail, SystemExit())
            with pytest.raises(SystemExit):
                deliver_lost()
        assert get_run().status == "running"
        with pytest.raises(RuntimeError, match="without completing a step"):
            deliver_lost()
        assert get_run().status == "failed"

    def test_losses_with_progress_do_not_count(self, queue):
        for number in range(2, MAX_LOSSES + 10):
            before[number] = partial(fail, SystemExit())
            with pytest.raises(SystemExit):
                deliver(work, MAX_LOSSES + 10)
        assert get_run().attempts == 0
        deliver(work, MAX_LOSSES + 10)
        assert get_rows() == list(range(1, MAX_LOSSES + 11))

    @pytest.mark.parametrize(("age", "status"), [(0, "running"), (60, "failed")])
    def test_hard_time_limit_ends_only_a_task_without_progress(self, queue, age, status):
        """A worker that stops may notice the limit of a message that another worker runs by now."""
        before[2] = partial(fail, SystemExit())
        with pytest.raises(SystemExit):
            deliver(work, 5)
        ResumableRun.objects.update(updated_at=timezone.now() - timedelta(seconds=age))
        work.on_failure(TimeLimitExceeded(300), "one", [5], {}, None)
        assert get_run().status == status

    def test_yield_needs_a_cursor_outside_of_a_transaction(self, queue):
        @resumable_task(name="tests.none")
        def none(cursor):
            stop()
            yield

        @resumable_task(name="tests.atomic", interval=0)
        def atomic(cursor):
            with transaction.atomic():
                yield 1

        for number, task in enumerate((none, atomic)):
            with pytest.raises(TypeError, match="must yield a cursor, outside"):
                deliver(task, task_id=str(number))

    def test_iterators_outlive_transactions(self, queue):
        Alert.objects.bulk_create(Alert(key=f"row {number}") for number in range(1, 8))

        @resumable_task(name="tests.iterate", interval=0)
        def iterate(cursor):
            for row in Alert.objects.order_by("pk").iterator(chunk_size=2):
                Alert.objects.filter(pk=row.pk).update(misses=F("misses") + 1)
                yield row.pk

        deliver(iterate)
        assert set(Alert.objects.values_list("misses", flat=True)) == {1}
        assert not connection.settings_dict.get("DISABLE_SERVER_SIDE_CURSORS")

    @pytest.mark.parametrize("size", [1, 3, 7, 100])
    def test_rows_after(self, size):
        rows = Alert.objects.bulk_create(Alert(key=f"row {number}") for number in range(7))
        keys = sorted(row.pk for row in rows)
        assert [row.pk for row in rows_after(Alert.objects.all(), None, size)] == keys
        assert [row.pk for row in rows_after(Alert.objects.all(), keys[2], size)] == keys[3:]

    def test_must_be_a_generator(self):
        with pytest.raises(TypeError, match="does not yield"):
            resumable_task(lambda cursor: None)

    def test_call_runs_all_steps(self):
        assert work(3) == "3 rows"
        assert work.apply([2], {"prefix": "other"}).get() == "2 rows"
        assert not ResumableRun.objects.exists()


class TestMessages:
    def test_second_message_waits_and_is_ignored(self, queue, monkeypatch):
        monkeypatch.setattr(continuations, "LOCK_TIMEOUT", 0.2)
        errors = []

        def deliver_again():
            try:
                deliver(work, 5)
            except Reject as error:
                errors.append(error)
            finally:
                connection.close()

        def run_thread():
            thread = Thread(target=deliver_again)
            thread.start()
            thread.join()

        with try_lock(get_lock_name("one")) as is_held:
            assert is_held
            run_thread()
        assert [error.requeue for error in errors] == [False]
        assert not ResumableRun.objects.exists()

    def test_arguments_and_cursor_may_be_any_that_celery_serializes(self, queue):
        seen = []

        @resumable_task(interval=0)
        def dated(cursor, day):
            seen.append((cursor, day))
            for number in range(2):
                before.pop(number, lambda: None)()
                yield UUID(int=number)

        before[0] = stop
        day = timezone.now()
        with pytest.raises(Retry):
            deliver(dated, day)
        call = get_run()
        assert kombu_loads(call.arguments) == [[day], {}]
        continuations._stopping[0] = 0
        deliver(dated, day, number=1)
        assert seen == [(None, day), (UUID(int=0), day)]

    def test_earlier_message_is_ignored(self, queue):
        before[2] = stop
        with pytest.raises(Retry):
            deliver(work, 5)
        with pytest.raises(Reject):
            deliver(work, 5, number=0)
        assert get_rows() == [1, 2]

    def test_message_after_the_end_returns_the_result(self, queue):
        deliver(work, 3)
        assert deliver(work, 3) == "3 rows"
        assert get_rows() == [1, 2, 3]

    def test_message_after_a_failure_is_ignored(self, queue):
        before[2] = partial(fail, ValueError())
        with pytest.raises(ValueError):
            deliver(work, 3)
        with pytest.raises(Reject):
            deliver(work, 3)

    def test_process_that_has_lost_its_claim_commits_nothing(self, queue):
        def take_over():
            run = ResumableRun.objects.all()
            run.update(claim=F("claim") + 1)

        before[3] = take_over
        with pytest.raises(Reject):
            deliver(work, 5)
        run = get_run()
        assert (run.steps, run.cursor, get_rows()) == (2, "2", [1, 2])


class TestLost:
    def make(self, **fields):
        values = {
            "task_id": "one",
            "name": work.name,
            "arguments": "[[5], {}]",
            "options": json.dumps({"queue": "dummy.mail", "headers": {"schedule": 1}}),
            "cursor": "2",
            "number": 3,
            "updated_at": timezone.now() - timedelta(minutes=1),
        }
        return ResumableRun.objects.create(**values | fields)

    def test_task_without_a_worker_is_queued_again(self, queue):
        self.make(status=Status.RUNNING)
        resume_tasks()
        resume_tasks()
        ((name, arguments, options),) = queue
        assert (name, arguments) == (work.name, (5,))
        assert (options["task_id"], options["queue"]) == ("one", "dummy.mail")
        assert options["headers"] == {"schedule": 1, "slice": 3}
        assert deliver(work, 5, number=3) == "5 rows"
        assert get_rows() == [3, 4, 5]

    def test_task_at_work_is_not(self, queue):
        run = self.make(status=Status.RUNNING)
        names = Queue()

        def hold():
            with try_lock(get_lock_name("one")):
                names.put("held")
                while ResumableRun.objects.filter(pk=run.pk, total=None).exists():
                    time.sleep(0.01)
            connection.close()

        thread = Thread(target=hold)
        thread.start()
        names.get(timeout=30)
        resume_tasks()
        ResumableRun.objects.update(total=1)
        thread.join()
        assert queue == []

    @pytest.mark.parametrize(
        ("status", "age", "count"),
        [("running", 10, 0), ("waiting", 60, 0), ("waiting", 660, 1), ("failed", 6000, 0)],
    )
    def test_others_wait(self, queue, status, age, count):
        self.make(status=status, updated_at=timezone.now() - timedelta(seconds=age))
        resume_tasks()
        assert len(queue) == count

    def test_broker_that_is_unavailable_changes_nothing(self, monkeypatch, caplog):
        def refuse(*args, **kwargs):
            raise BrokerError("no broker")

        monkeypatch.setattr("prodserver_ops.worker.app.Task.apply_async", refuse)
        run = self.make(status=Status.RUNNING)
        resume_tasks()
        run.refresh_from_db()
        assert (run.status, run.number) == ("running", 3)
        assert "is not queued again" in caplog.text

    def test_old_runs_are_deleted(self):
        for number, status in enumerate(Status.values):
            old = timezone.now() - timedelta(days=8)
            self.make(task_id=number, status=status, updated_at=old)
            self.make(task_id=number + 10, status=status)
        delete_records()
        kept = ResumableRun.objects.filter(updated_at__lt=timezone.now() - timedelta(days=7))
        assert set(kept.values_list("status", flat=True)) == {"waiting", "running"}
        assert ResumableRun.objects.count() == 6


class TestPage:
    @pytest.fixture
    def failed(self, queue):
        before[3] = partial(fail, ValueError("no such row"))
        with pytest.raises(ValueError, match="no such row"):
            deliver(work, 5)
        values = {"name": work.name, "arguments": "[[5], {}]", "started_at": timezone.now()}
        return TaskRun.objects.create(task_id="one", status="failed", **values)

    @pytest.mark.usefixtures("failed")
    def test_shows_progress(self, admin_client):
        text = admin_client.get(reverse("admin:ops_operations")).text
        assert "Long tasks" in text
        assert "2 of 5 (40%)" in text
        assert "no such row" in text

    @pytest.mark.parametrize("view", ["ops_repeat", "ops_continue"])
    def test_try_again_goes_on_at_the_cursor(self, admin_client, queue, failed, view):
        row = failed if view == "ops_repeat" else get_run()
        for text in ("It goes on after step 2", "already been tried again"):
            response = admin_client.post(reverse(f"admin:{view}", args=[row.pk]), follow=True)
            assert text in response.text
        ((_, arguments, options),) = queue
        assert (arguments, options["task_id"], options["headers"]["slice"]) == ((5,), "one", 1)
        failed.refresh_from_db()
        assert failed.repeated_at is not None
        assert deliver(work, 5, number=1) == "5 rows"
        assert get_rows() == [1, 2, 3, 4, 5]

    def test_try_again_says_if_the_broker_is_unavailable(self, admin_client, failed, monkeypatch):
        def refuse(*args, **kwargs):
            raise BrokerError("no broker")

        monkeypatch.setattr("prodserver_ops.worker.app.Task.apply_async", refuse)
        for view, row in (("ops_repeat", failed), ("ops_continue", get_run())):
            response = admin_client.post(reverse(f"admin:{view}", args=[row.pk]), follow=True)
            assert "Not queued" in response.text
        failed.refresh_from_db()
        assert (failed.repeated_at, get_run().status) == (None, "failed")


def test_callers_do_not_pass_the_cursor(queue):
    signature = current_app.tasks[work.name].__header__
    signature(5, prefix="other")
    with pytest.raises(TypeError):
        signature(None, 5)
    interval = IntervalSchedule.objects.create(every=1, period="hours")
    schedule = PeriodicTask(name="sample", interval=interval, task=work.name, args="[5]")
    assert validation.find_problems(schedule) == {}
    schedule.args = "[null, 5]"
    assert "args" in validation.find_problems(schedule)
