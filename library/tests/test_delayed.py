"""Tasks that are not due: rows, which are published once."""

import threading
import time
from contextlib import suppress
from datetime import timedelta
from queue import Empty, Queue
from types import SimpleNamespace

import pytest
import time_machine
from celery import current_app
from celery.app.task import Context
from celery.exceptions import Ignore
from celery.worker import state
from django.contrib.admin.models import LogEntry
from django.db import OperationalError
from django.urls import reverse
from django.utils import timezone

from prodserver_ops import broker
from prodserver_ops.console import doctor, operations
from prodserver_ops.models import DelayedTask
from prodserver_ops.tasks import delete_records
from prodserver_ops.worker import consumer, delayed
from prodserver_ops.worker.app import get_failed_queue, make_failed_queue

NAME = "tests.delayed"

pytestmark = pytest.mark.django_db(transaction=True, serialized_rollback=True)


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    monkeypatch.setattr(delayed, "HOLD", 0.5)
    monkeypatch.setattr(delayed, "INTERVAL", 0.2)
    monkeypatch.setattr(delayed, "AHEAD", 0)
    monkeypatch.setattr(delayed, "RETRY_INTERVAL", 0.1)
    monkeypatch.setattr("kombu.transport.memory.Channel.do_restore", True)


@pytest.fixture
def task():
    """A task that notes its argument in ``task.done``."""

    @current_app.task(name=NAME, bind=True, shared=False, max_retries=3)
    def note(self, value, retries=0):
        note.done.put((value, self.request.retries))
        if self.request.retries < retries:
            raise self.retry(countdown=1)

    note.done = Queue()
    yield note
    del current_app.tasks[NAME]
    with current_app.connection_for_write() as connection:
        bound = current_app.amqp.queues[current_app.conf.task_default_queue](
            connection.default_channel
        )
        bound.declare()
        bound.purge()
        failed = make_failed_queue(current_app)(connection.default_channel)
        failed.declare()
        failed.purge()


def wait_for(condition):
    deadline = time.monotonic() + 20
    while True:
        # A table of SQLite in memory is locked while another thread writes to it.
        with suppress(OperationalError):
            if condition():
                return
        assert time.monotonic() < deadline
        time.sleep(0.02)


def count_messages():
    name = current_app.conf.task_default_queue
    return broker.count_messages(current_app, [name], 5)[name]


def count_failed():
    return broker.count_messages(current_app, [get_failed_queue()], 5)[get_failed_queue()]


def count_waiting():
    return DelayedTask.objects.filter(published_at=None).count()


def make(seconds=-1, **fields):
    """Store a delayed task, which is due after the seconds."""
    due = timezone.now() + timedelta(seconds=seconds)
    eta = due.isoformat()
    number = DelayedTask.objects.count()
    body = '[[%d], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'
    message = SimpleNamespace(
        body=body % number,
        content_type="application/json",
        content_encoding="utf-8",
        headers={"task": NAME, "id": f"id-{number}", "eta": eta, "lang": "py"},
        properties={"priority": 3, "expiration": "1"},
    )
    queue = current_app.conf.task_default_queue
    row = delayed.make_row(message, message.headers, due, queue)
    for name, value in fields.items():
        setattr(row, name, value)
    row.save()
    return row


def start(row, attempt=None):
    """Return whether a worker may run a message of a task."""
    headers = {} if attempt is None else {delayed.HEADER: [row.key, attempt]}
    eta = delayed.loads(row.message)["headers"]["eta"]
    return delayed.claim(Context(id=row.task_id, eta=eta, headers=headers))


class TestWorker:
    def test_stores_what_is_not_due_and_runs_other_tasks(self, task, run_worker):
        for number in range(20):
            task.apply_async([number], countdown=3600)
        task.delay("now")
        with run_worker():
            assert task.done.get(timeout=20) == ("now", 0)
            wait_for(lambda: count_waiting() == 20)
            wait_for(lambda: not state.reserved_requests and not state.requests)
        assert count_messages() == 0
        assert {row.name for row in DelayedTask.objects.all()} == {NAME}

    def test_runs_a_stored_task_in_time_and_once(self, task, run_worker):
        due = time.monotonic() + 1.5
        task.apply_async([1], countdown=1.5)
        with run_worker():
            assert task.done.get(timeout=20) == (1, 0)
            assert -0.1 < time.monotonic() - due < 5
        with pytest.raises(Empty):
            task.done.get_nowait()
        (row,) = DelayedTask.objects.all()
        assert row.attempts == 1
        assert row.published_at

    def test_holds_what_is_due_in_a_moment(self, task, run_worker):
        task.apply_async([1], countdown=0.3)
        with run_worker():
            assert task.done.get(timeout=20) == (1, 0)
        assert not DelayedTask.objects.exists()

    def test_stores_each_retry(self, task, run_worker):
        task.delay(1, retries=2)
        with run_worker():
            assert [task.done.get(timeout=20) for _ in range(3)] == [(1, 0), (1, 1), (1, 2)]
        assert DelayedTask.objects.count() == 2

    @pytest.mark.parametrize("eta", ["tomorrow", 7, "9999-12-31T23:59:59-23:59"])
    def test_leaves_an_invalid_eta_to_celery(self, task, run_worker, eta):
        task.apply_async([1], headers={"eta": eta})
        task.delay("next")
        with run_worker():
            assert task.done.get(timeout=20) == ("next", 0)
        assert not DelayedTask.objects.exists()

    def test_stores_forged_texts(self, task, run_worker):
        eta = (timezone.now() + timedelta(hours=6)).isoformat()
        for forged in ("\0", "\ud800", "x" * 200, "id"):
            task.apply_async([1], headers={"eta": eta, "id": forged, "argsrepr": "\0\ud800"})
        task.delay("next")
        with run_worker():
            assert task.done.get(timeout=20) == ("next", 0)
            # The others are given up, because their ids are invalid.
            wait_for(lambda: count_waiting() + count_failed() == 4)
        assert count_waiting() >= 1

    def test_database_that_is_away_delays_no_other_task(self, task, run_worker, monkeypatch):
        store = type(DelayedTask.objects).bulk_create
        is_away = threading.Event()
        is_away.set()

        def store_if_there(manager, rows, **options):
            if is_away.is_set() and isinstance(rows[0], DelayedTask):
                raise OperationalError
            return store(manager, rows, **options)

        monkeypatch.setattr(type(DelayedTask.objects), "bulk_create", store_if_there)
        for number in range(5):
            task.apply_async([number], countdown=3600)
        with run_worker():
            for number in range(3):
                task.delay(f"now {number}")
                assert task.done.get(timeout=20) == (f"now {number}", 0)
            is_away.clear()
            wait_for(lambda: count_waiting() == 5)
        assert count_messages() == 0

    def test_database_that_hangs_delays_no_other_task(self, task, run_worker, monkeypatch):
        monkeypatch.setattr(consumer, "STORE_TIMEOUT", 0.2)
        hangs = threading.Event()
        store = delayed.Keeper.store_entries

        def hang(keeper):
            hangs.wait(20)
            store(keeper)

        monkeypatch.setattr(delayed.Keeper, "store_entries", hang)
        task.apply_async([1], countdown=3600)
        with run_worker():
            for number in range(3):
                task.delay(f"now {number}")
                assert task.done.get(timeout=20) == (f"now {number}", 0)
            hangs.set()
            wait_for(lambda: count_waiting() == 1)
            wait_for(lambda: count_messages() == 0)
        assert DelayedTask.objects.count() == 1

    def test_runs_what_was_published_although_its_clock_is_late(self, task, run_worker):
        row = make(-1)
        delayed.publish_due(current_app)
        late = timezone.now() - timedelta(minutes=5)
        with time_machine.travel(late, tick=True), run_worker():
            assert task.done.get(timeout=20) == (0, 0)
        row.refresh_from_db()
        assert row.attempts == 1

    def test_command_revoke_reaches_what_is_stored(self, task, run_worker):
        result = task.apply_async([1], countdown=1.5)
        other = task.apply_async([2], countdown=1.6)
        with run_worker():
            wait_for(lambda: count_waiting() == 2)
            state.revoked.add(result.id)
            try:
                assert task.done.get(timeout=20) == (2, 0)
            finally:
                state.revoked.clear()
        assert DelayedTask.objects.get(task_id=result.id).started_by == DelayedTask.CANCELLED
        assert DelayedTask.objects.get(task_id=other.id).started_by != DelayedTask.CANCELLED

    def test_revoked_task_does_not_run_although_no_worker_had_received_it(self, task, run_worker):
        results = [task.apply_async([number], countdown=1.5) for number in range(3)]
        results[0].revoke()
        # A worker that was told, and received the message later
        state.revoked.add(results[1].id)
        try:
            with run_worker():
                assert task.done.get(timeout=20) == (2, 0)
        finally:
            state.revoked.clear()
        rows = DelayedTask.objects.exclude(message="")
        cancelled = rows.filter(started_by=DelayedTask.CANCELLED)
        assert set(cancelled.values_list("task_id", flat=True)) == {r.id for r in results[:2]}
        assert rows.count() == 3


class TestPublishing:
    def test_message_is_as_it_was(self, task, run_worker):
        row = make()
        delayed.publish_due(current_app)
        with current_app.connection_for_read() as connection:
            queue = current_app.amqp.queues[row.queue](connection.default_channel)
            message = queue.get()
            content = delayed.loads(row.message)
            expected = content["headers"] | {delayed.HEADER: [row.key, 1]}
            assert message.headers.items() >= expected.items()
            assert message.properties["priority"] == 3
            assert "expiration" not in message.properties
            message.reject(requeue=True)
        with run_worker():
            assert task.done.get(timeout=20) == (0, 0)

    def test_only_what_is_due_is_published(self, task):
        due, later = make(), make(3600)
        make(published_at=timezone.now())
        make(started_by=0)
        delayed.publish_due(current_app)
        assert count_messages() == 1
        due.refresh_from_db()
        later.refresh_from_db()
        assert due.published_at
        assert later.published_at is None
        assert count_waiting() == 1

    def test_queue_that_is_gone_is_the_default_queue(self, task):
        make(queue="gone")
        delayed.publish_due(current_app)
        assert count_messages() == 1

    def test_claim_of_another_worker_holds_for_seconds(self, task):
        (row,) = [make()]
        assert delayed.claim_rows()
        delayed.publish_due(current_app)
        assert count_messages() == 0
        DelayedTask.objects.update(claimed_at=timezone.now() - delayed.CLAIM * 2)
        delayed.publish_due(current_app)
        assert count_messages() == 1
        row.refresh_from_db()
        assert row.attempts == 2

    def test_message_that_cannot_be_published_does_not_hold_up_others(self, task, caplog):
        make(message="{}")
        make()
        with pytest.raises(KeyError):
            delayed.publish_due(current_app)
        DelayedTask.objects.update(claimed_at=None)
        delayed.publish_due(current_app)
        assert count_messages() >= 1
        assert count_waiting() == 1
        assert "is not queued: KeyError" in caplog.text

    def test_broker_that_is_away_is_tried_again(self, task, monkeypatch):
        def refuse(*args):
            raise ConnectionError

        make()
        make()
        with monkeypatch.context() as patch:
            patch.setattr(delayed, "publish_batch", refuse)
            for _ in range(2):
                with pytest.raises(ConnectionError):
                    delayed.publish_due(current_app)
                DelayedTask.objects.update(claimed_at=None)
        delayed.publish_due(current_app)
        assert count_messages() == 2


class TestClaim:
    """Each task runs once, whoever publishes or delivers its message again."""

    def test_first_message_runs_and_may_run_again(self):
        row = make(attempts=2)
        assert start(row, 1)
        assert start(row, 1)  # Its worker was lost.
        assert not start(row, 2)
        assert not start(row)

    def test_message_that_the_broker_delivered_again_runs_instead(self):
        row = make()
        assert start(row)
        assert not start(row, 1)
        delayed.publish_due(current_app)
        assert count_messages() == 0

    def test_retry_is_another_message(self):
        row = make()
        assert start(row, 1)
        retry = Context(id=row.task_id, eta="2030-01-01T00:00:00+00:00")
        retry.headers = {delayed.HEADER: [row.key, 1]}
        assert delayed.claim(retry)

    @pytest.mark.parametrize("attempt", [-1, 0, 2**31, 10**30, 1e400, "x", None, [1]])
    def test_forged_attempt_is_that_of_a_first_message(self, attempt):
        row, cancelled = make(), make()
        assert start(row, attempt)
        row.refresh_from_db()
        assert row.started_by == DelayedTask.DELIVERED
        delayed.cancel(DelayedTask.objects.filter(pk=cancelled.pk))
        assert not start(cancelled, attempt)

    @pytest.mark.parametrize("header", [5, "x", [], [1, 2, 3], ["x", 1], [1, 1], {}, None])
    def test_forged_header_is_none(self, header):
        row = make()
        assert delayed.claim(Context(id=row.task_id, headers={delayed.HEADER: header}))
        eta = delayed.loads(row.message)["headers"]["eta"]
        assert delayed.claim(Context(id=row.task_id, eta=eta, headers={delayed.HEADER: header}))

    def test_task_that_was_not_stored_may_run(self):
        assert delayed.claim(Context(id="id"))
        assert delayed.claim(Context(id="id", eta="2030-01-01T00:00:00+00:00"))

    def test_task_may_run_while_the_database_is_away(self, monkeypatch):
        row = make()

        def fail(*args, **kwargs):
            raise OperationalError

        monkeypatch.setattr("django.db.models.query.QuerySet.update", fail)
        assert start(row, 1)

    def test_task_whose_class_overrides_the_hooks_of_celery(self, task):
        class Base(task.app.Task):
            def before_start(self, *args):
                pass

        @task.app.task(name="tests.hooks", shared=False, base=Base)
        def other():
            pass

        try:
            row = make()
            assert start(row, 1)
            eta = delayed.loads(row.message)["headers"]["eta"]
            other.request_stack.push(Context(id=row.task_id, eta=eta))
            with pytest.raises(Ignore):
                other.before_start(row.task_id, [], {})
        finally:
            other.request_stack.pop()
            task.app.tasks.pop("tests.hooks")

    def test_second_message_is_ignored(self, task):
        row = make()
        assert start(row, 1)
        eta = delayed.loads(row.message)["headers"]["eta"]
        task.request_stack.push(Context(id=row.task_id, eta=eta))
        try:
            with pytest.raises(Ignore):
                task.before_start(row.task_id, [], {})
        finally:
            task.request_stack.pop()

    def test_revoked_task_does_not_run(self, task):
        rows = [make(3600) for _ in range(3)]
        start(rows[2], 1)
        current_app.AsyncResult(rows[0].task_id).revoke()
        current_app.control.revoke([rows[1].task_id, rows[2].task_id])
        assert [start(row, 1) for row in rows] == [False, False, True]
        assert count_waiting() == 1
        assert not start(rows[0])


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"consumer_tag": "2", "exchange": "celery_delayed_delivery", "routing_key": "x"}, "old"),
        ({"exchange": "", "routing_key": "old"}, "old"),
        ({"exchange": "celery", "routing_key": "old"}, "old"),
        ({"exchange": "dummy", "routing_key": "dummy.mail"}, "dummy.mail"),
        ({"exchange": "other", "routing_key": "other"}, "dummy"),
    ],
)
def test_queue_of_a_message_is_found(info, expected):
    queues = dict(current_app.amqp.queues)
    queues["old"] = SimpleNamespace(exchange=SimpleNamespace(name="dummy"), routing_key="old")
    amqp = SimpleNamespace(queues=SimpleNamespace(consume_from=queues))
    worker = SimpleNamespace(
        app=SimpleNamespace(amqp=amqp, conf=current_app.conf),
        task_consumer=SimpleNamespace(_active_tags={"dummy": "1", "old": "2"}),
    )
    message = SimpleNamespace(delivery_info=info)
    assert consumer.Consumer.find_queue(worker, message) == expected


class TestPage:
    """Administrators see what waits for its time, and may cancel it."""

    @pytest.fixture
    def page(self, admin_client):
        return lambda: admin_client.get(reverse("admin:ops_operations")).text

    def test_shows_the_next_tasks_and_how_many_wait(self, page):
        assert "No task waits for its time." in page()
        for seconds in range(12):
            make(3600 - seconds)
        make(published_at=timezone.now())
        text = page()
        assert "12 in all" in text
        assert text.count("Cancel</button>") == operations.SHOWN_DELAYED
        assert "id-11" in text
        assert "id-0<" not in text

    def test_cancels_a_task(self, page, admin_client):
        row, other = make(3600), make(3600)
        for expected in ("Cancelled: tests.delayed.", "has already been started"):
            url = reverse("admin:ops_cancel", args=[row.pk])
            assert expected in admin_client.post(url, follow=True).text
        assert (start(row, 1), start(other, 1)) == (False, True)
        assert LogEntry.objects.get().object_repr == str(row)

    def test_button_needs_a_permission_and_a_post(self, admin_client, client, make_user):
        url = reverse("admin:ops_cancel", args=[make(3600).pk])
        assert admin_client.get(url).status_code == 405
        client.force_login(make_user("staff", is_staff=True))
        assert client.post(url).status_code == 403
        assert count_waiting() == 1

    def test_list_has_no_arguments_of_tasks(self, admin_client):
        row = make(3600)
        for url in (
            reverse("admin:ops_delayedtask_changelist"),
            reverse("admin:ops_delayedtask_change", args=[row.pk]),
        ):
            text = admin_client.get(url).text
            assert NAME in text
            assert "callbacks" not in text


class TestDoctor:
    def test_counts_what_waits(self):
        assert doctor.check_delayed() == doctor.Result("no task waits for its time")
        make(3600)
        make(7200)
        result = doctor.check_delayed()
        assert result.status == doctor.OK
        assert result.message.startswith("2 tasks wait for their time, the next is tests.delayed")

    def test_finds_what_no_worker_queues(self):
        make(-120)
        result = doctor.check_delayed()
        assert result.status == doctor.ERROR
        assert result.message.endswith("no worker queues it")
        assert result.next == "python manage.py prodserver worker"


def test_rows_are_deleted_a_day_after_they_were_published():
    old = timezone.now() - timedelta(days=2)
    make(published_at=old)
    kept = {make(-100_000).pk, make(published_at=timezone.now()).pk}
    delete_records()
    assert set(DelayedTask.objects.values_list("pk", flat=True)) == kept
