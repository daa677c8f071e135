"""Locks: held by one at a time, and free when the holder is gone."""

import pytest
from django.db import connection

from {{ cookiecutter.project_slug }} import locks

pytestmark = pytest.mark.django_db


@pytest.fixture
def other():
    """A connection of another process."""
    other = connection.copy()
    yield other
    other.close()


def test_is_held_by_one_at_a_time(other):
    with locks.hold("lock") as held:
        assert held
        assert not locks.lock("lock", other).acquire()
        another = locks.lock("another", other)
        assert another.acquire()
        another.release()


def test_is_free_again(other):
    with locks.hold("lock"):
        pass
    lock = locks.lock("lock", other)
    assert lock.acquire()
    lock.release()
    with locks.hold("lock") as held:
        assert held


def test_is_lost_with_the_connection(other):
    if connection.vendor != "postgresql":
        pytest.skip("only PostgreSQL's lock hangs on a connection; set DATABASE_URL to one")
    lock = locks.lock("lock", other)
    assert lock.acquire()
    assert lock.is_held()
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s)", [other.connection.info.backend_pid])
    assert not lock.is_held()
    lock.release()
    with locks.hold("lock") as held:
        assert held
