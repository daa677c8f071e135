"""Locks: one holder at a time, released when the holder ends."""

import pytest
from django.db import connection

from prodserver_ops.core import locks

pytestmark = pytest.mark.django_db


@pytest.fixture
def other():
    """A database connection like that of another process."""
    other = connection.copy()
    yield other
    other.close()


def test_lock_has_one_holder_at_a_time(other):
    with locks.try_lock("lock") as acquired:
        assert acquired
        assert not locks.get_lock("lock", other).acquire()
        another = locks.get_lock("another", other)
        assert another.acquire()
        another.release()


def test_released_lock_can_be_acquired_again(other):
    with locks.try_lock("lock"):
        pass
    lock = locks.get_lock("lock", other)
    assert lock.acquire()
    lock.release()
    with locks.try_lock("lock") as acquired:
        assert acquired


def test_lock_in_a_file_has_one_holder_at_a_time(settings, tmp_path):
    settings.LOCK_DIR = tmp_path / "not" / "there"
    first, second = (locks.FileLock("a lock", connection) for _ in range(2))
    assert first.connection is connection
    assert not first.is_held()
    assert first.acquire()
    assert first.is_held()
    assert not second.acquire()
    assert not second.is_held()
    another = locks.FileLock("another", connection)
    assert another.acquire()
    another.release()
    assert sorted(path.name for path in settings.LOCK_DIR.iterdir()) == ["a-lock", "another"]
    first.release()
    assert not first.is_held()
    assert second.acquire()
    second.release()
    second.release()


def test_file_of_a_lock_keeps_its_content_and_is_no_link(settings, tmp_path):
    settings.LOCK_DIR = tmp_path / "locks"
    lock = locks.FileLock("lock", connection)
    assert lock.acquire()
    lock.release()
    modes = [path.stat().st_mode & 0o777 for path in (settings.LOCK_DIR, lock.path)]
    assert modes == [0o700, 0o600]
    lock.path.write_text("content")
    assert lock.acquire()
    lock.release()
    assert lock.path.read_text() == "content"
    lock.path.unlink()
    lock.path.symlink_to(tmp_path / "file")
    with pytest.raises(OSError, match="symbolic links"):
        lock.acquire()


def test_locks_of_tests_are_in_the_folder_of_the_project(settings):
    assert settings.VAR_DIR in settings.LOCK_DIR.parents


def test_lock_ends_with_its_connection(other):
    if connection.vendor != "postgresql":
        pytest.skip("only a PostgreSQL lock depends on a connection; set DATABASE_URL")
    lock = locks.get_lock("lock", other)
    assert lock.acquire()
    assert lock.is_held()
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s)", [other.connection.info.backend_pid])
    assert not lock.is_held()
    lock.release()
    with locks.try_lock("lock") as acquired:
        assert acquired
