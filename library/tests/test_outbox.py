"""The database as the broker: a task is queued if and only if the transaction is committed."""

import time
from queue import Empty, Queue
from threading import Event, Thread
from types import SimpleNamespace
from uuid import uuid4

import psycopg
import pytest
from celery import current_app
from celery.exceptions import Retry
from django.core.signals import request_finished, request_started
from django.db import IntegrityError, connection, transaction
from dummy.settings import TestSettings
from kombu import pools

from prodserver_ops import broker
from prodserver_ops.broker import postgresql, publishing
from prodserver_ops.conf.environment import evaluate
from prodserver_ops.models import Alert
from prodserver_ops.worker.app import CeleryApp

pytestmark = [
    pytest.mark.django_db(transaction=True, serialized_rollback=True),
    pytest.mark.skipif(
        "connection.vendor != 'postgresql'", reason="needs PostgreSQL; set DATABASE_URL"
    ),
]


@pytest.fixture
def app(settings, monkeypatch):
    """The Celery app of a service whose broker is the database of the tests."""
    postgresql.install()
    own = connection.settings_dict
    url = f"postgres://{own['USER']}:{own['PASSWORD']}@{own['HOST']}:{own['PORT']}/{own['NAME']}"
    monkeypatch.setenv("CELERY_BROKER_URL", url)
    package = {"PACKAGE": f"sample_{uuid4().hex[:8]}"}
    values = evaluate(type("BrokerSettings", (TestSettings,), package)())
    for name, value in values.items():
        if name.startswith("CELERY_"):
            setattr(settings, name, value)
    before = current_app._get_current_object()
    app = CeleryApp(package["PACKAGE"], set_as_current=False)
    app.config_from_object(SimpleNamespace(**values), namespace="CELERY")
    yield app
    # Otherwise sessions outlive the test.
    pools.reset()
    app.close()
    before.set_current()
    before.set_default()
    with connection.cursor() as cursor:
        cursor.execute("DROP SCHEMA pgmq CASCADE")


@pytest.fixture
def note(app):
    """A task that notes its argument in ``note.done``; its queue exists."""

    @app.task(name="sample.note", shared=False)
    def note(value):
        note.done.put(value)

    note.done = Queue()
    note.delay("first")
    return note


def count(app):
    """Return the number of messages, as another session sees it."""
    own = connection.settings_dict
    with psycopg.connect(
        host=own["HOST"], port=own["PORT"], user=own["USER"], dbname=own["NAME"]
    ) as other:
        name = app.conf.task_default_queue
        return other.execute(f"SELECT count(*) FROM pgmq.q_{name}").fetchone()[0]


QUEUE = {
    "delay": lambda task: task.delay(1),
    "delay_on_commit": lambda task: task.delay_on_commit(1),
    "apply_many": lambda task: task.apply_many([(1,)]),
}


@pytest.mark.parametrize("queue", QUEUE.values(), ids=QUEUE)
@pytest.mark.parametrize("in_request", [False, True])
def test_task_is_queued_with_the_transaction(app, note, queue, in_request):
    if in_request:
        request_started.send(None)
    with transaction.atomic():
        queue(note)
        assert count(app) == 1
    assert count(app) == 2
    with pytest.raises(RuntimeError), transaction.atomic():
        queue(note)
        raise RuntimeError
    assert count(app) == 2
    request_finished.send(None)
    queue(note)
    assert count(app) == 3


def test_savepoint_that_is_rolled_back_takes_its_tasks_with_it(app, note):
    with transaction.atomic():
        note.delay(1)
        with pytest.raises(RuntimeError), transaction.atomic():
            note.delay(2)
            raise RuntimeError
    assert count(app) == 2


def test_worker_runs_them_after_the_commit(app, note, run_worker):
    with run_worker(app):
        assert note.done.get(timeout=30) == "first"
        with transaction.atomic():
            note.delay(1)
            with pytest.raises(Empty):
                note.done.get(timeout=1.5)
        assert note.done.get(timeout=30) == 1


def test_retry_does_not_belong_to_the_transaction(app, note):
    note.push_request(id="one", args=["again"], kwargs={}, called_directly=False, delivery_info={})
    try:
        with pytest.raises(Retry), transaction.atomic():
            note.retry(countdown=0)
    finally:
        note.pop_request()
    assert count(app) == 2
    assert not publishing.request.is_separate


def test_error_of_the_broker_does_not_end_the_transaction(app, note, monkeypatch):
    monkeypatch.setattr(postgresql.Channel, "_queue_name", lambda channel, name: "no_such_queue")
    with transaction.atomic():
        Alert.objects.create(key="before")
        with pytest.raises(psycopg.Error):
            note.apply_async([1], queue="", exchange="", routing_key="x", declare=[])
        Alert.objects.create(key="after")
    assert Alert.objects.count() == 2


def test_transactions_do_not_wait_for_each_other(app, note):
    """Neither the trigger that notifies workers nor the declaration of a queue locks the table."""
    results, queued = Queue(), Event()

    def queue_task():
        queued.wait(30)
        start = time.monotonic()
        try:
            with app.connection_for_write() as fresh, transaction.atomic():
                producer = app.amqp.Producer(fresh)
                note.apply_async([2], producer=producer)
        finally:
            results.put(time.monotonic() - start)
            connection.close()

    thread = Thread(target=queue_task)
    thread.start()
    with transaction.atomic():
        time.sleep(0.3)  # Longer than notifications are throttled.
        note.delay(1)
        queued.set()
        assert results.get(timeout=8) < 8
    thread.join()
    assert count(app) == 3


def test_other_databases_are_not_joined(app, note, settings):
    url = settings.CELERY_BROKER_URL
    assert not broker.joins_transaction(url)
    with transaction.atomic():
        assert broker.joins_transaction(url)
        assert not broker.joins_transaction(f"{url}_other")
        assert not broker.joins_transaction("amqp://guest:guest@127.0.0.1//")
        with publishing.separately():
            assert not broker.joins_transaction(url)


def test_failed_transaction_fails_with_its_own_error(app, note):
    with pytest.raises(IntegrityError), transaction.atomic():
        note.delay(1)
        Alert.objects.create(key="same")
        Alert.objects.create(key="same")
    assert count(app) == 1
