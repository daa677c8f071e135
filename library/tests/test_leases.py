"""Leases: one holder at a time, by the clock of the database."""

import subprocess
from datetime import timedelta

import pytest
from django.db.models import F
from django.utils import timezone

from prodserver_ops import models
from prodserver_ops.scheduling import leases as module
from prodserver_ops.scheduling.leases import LEASE_SECONDS, Lease, LostLease

pytestmark = pytest.mark.django_db


def age(seconds):
    """Make the lease look as if it was renewed so many seconds earlier."""
    models.Lease.objects.update(renewed_at=F("renewed_at") - timedelta(seconds=seconds))


@pytest.fixture
def processes():
    """Two processes that ask for the same lease; the first one holds it."""
    first, second = Lease("sample"), Lease("sample")
    assert first.acquire()
    return first, second


@pytest.fixture
def leases(processes, monkeypatch):
    """Two processes on different machines."""
    monkeypatch.setattr(module, "_is_gone", lambda holder: False)
    return processes


def test_second_process_has_to_wait(leases):
    first, second = leases
    assert not second.acquire()
    age(LEASE_SECONDS - 5)
    assert not second.acquire()
    assert (first.number, second.number) == (1, 0)
    with pytest.raises(LostLease):
        second.renew()


def test_second_process_takes_over_a_lease_that_was_not_renewed(leases):
    first, second = leases
    age(LEASE_SECONDS + 1)
    assert second.acquire()
    assert second.number == 2
    second.renew()
    with pytest.raises(LostLease):
        first.renew()
    assert not first.acquire()


def test_renewed_lease_is_kept(leases):
    first, second = leases
    age(LEASE_SECONDS + 1)
    now = first.renew()
    assert abs(now - timezone.now()) < timedelta(seconds=10)
    assert not second.acquire()


def test_released_lease_is_free_at_once(leases):
    first, second = leases
    first.release()
    assert first.number == 0
    assert second.acquire()


def test_release_of_a_lost_lease_changes_nothing(leases):
    first, second = leases
    age(LEASE_SECONDS + 1)
    second.acquire()
    first.release()
    assert not Lease("sample").acquire()
    second.renew()
    assert not first.acquire()


def test_leases_of_other_names_do_not_matter(leases):
    first, _ = leases
    other = Lease("other")
    assert other.acquire()
    assert other.number == first.number
    age(LEASE_SECONDS + 1)
    first.renew()
    assert Lease("other").acquire()
    assert not Lease("sample").acquire()


def test_release_leaves_leases_of_other_names(leases):
    first, _ = leases
    other = Lease("other")
    assert other.acquire()
    first.release()
    assert not Lease("other").acquire()


def test_only_one_of_two_processes_that_ask_at_once_gets_it(monkeypatch):
    first, second = Lease("sample"), Lease("sample")
    update = type(models.Lease.objects.all()).update

    def update_after_the_other(queryset, **values):
        monkeypatch.undo()
        assert second.acquire()
        return update(queryset, **values)

    monkeypatch.setattr(type(models.Lease.objects.all()), "update", update_after_the_other)
    assert not first.acquire()
    assert (first.number, second.number) == (0, 1)


@pytest.mark.parametrize("place", ["", "another-"], ids=["here", "elsewhere"])
@pytest.mark.parametrize("alive", [True, False], ids=["alive", "killed"])
def test_process_that_was_killed_is_replaced_at_once_on_its_machine(processes, place, alive):
    with subprocess.Popen(["sleep", "60"]) as process:
        if not alive:
            process.kill()
            process.wait()
        here = module._get_holder().rpartition(" ")[0]
        models.Lease.objects.update(holder=f"{place}{here} {process.pid}")
        assert processes[1].acquire() is (not alive and not place)
        assert (process.poll() is None) is alive
        process.kill()


def test_process_that_replaced_itself_gets_its_lease_again(processes):
    assert processes[1].acquire()


def test_process_of_another_user_is_not_gone(processes, monkeypatch):
    def refuse(pid, number):
        raise PermissionError

    monkeypatch.setattr(module.os, "kill", refuse)
    here = module._get_holder().rpartition(" ")[0]
    models.Lease.objects.update(holder=f"{here} 1")
    assert not processes[1].acquire()
