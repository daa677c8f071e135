"""Heartbeats: which processes are running, on this host or any."""

import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue

import pytest
from django.core.management import call_command
from django.db import OperationalError
from django.db.models import F
from django.utils import timezone

from prodserver_ops import heartbeat
from prodserver_ops.conf import processes
from prodserver_ops.console import doctor, problems
from prodserver_ops.models import HEARTBEAT_AGE, Heartbeat
from prodserver_ops.scheduling import heartbeats
from prodserver_ops.web import health

pytestmark = pytest.mark.django_db

HOST = socket.gethostname()


@pytest.fixture(autouse=True)
def _no_earlier_heartbeat(monkeypatch):
    monkeypatch.setattr(heartbeats, "_recorded_at", None)


def test_is_recorded_once_for_each_process():
    for _ in range(2):
        heartbeats.record("worker")
        heartbeats._recorded_at = None
    row = Heartbeat.objects.get()
    assert (row.process, row.host, row.pid) == ("worker", HOST, os.getpid())
    assert heartbeats.is_alive("worker")
    assert heartbeats.get_ages("worker", HOST) == [0]
    assert heartbeats.get_ages("worker", "another-host") == []
    assert not heartbeats.is_alive("beat")


def test_is_recorded_every_ten_seconds_at_most(monkeypatch):
    now = 0
    monkeypatch.setattr(heartbeats.time, "monotonic", lambda: now)
    recorded = []
    for now in range(31):
        Heartbeat.objects.all().delete()
        heartbeats.record("beat")
        if Heartbeat.objects.exists():
            recorded.append(now)
    assert recorded == [0, 10, 20, 30]


def test_old_one_means_nothing():
    heartbeats.record("beat")
    Heartbeat.objects.update(seen_at=F("seen_at") - timedelta(seconds=55))
    assert heartbeats.is_alive("beat")
    Heartbeat.objects.update(seen_at=F("seen_at") - timedelta(seconds=6))
    assert not heartbeats.is_alive("beat")


def test_ages_are_in_order():
    for pid, seconds in enumerate([50, 10, 30]):
        seen_at = timezone.now() - timedelta(seconds=seconds + 0.5)
        Heartbeat.objects.create(process="beat", host="a", pid=pid, seen_at=seen_at)
    assert heartbeats.get_ages("beat") == [10, 30, 50]
    assert heartbeats.get_ages("beat", "another-host") == []


def test_process_that_ends_deletes_its_own():
    heartbeats.record("worker")
    Heartbeat.objects.create(process="worker", host=HOST, pid=1, seen_at=timezone.now())
    heartbeats.forget()
    assert Heartbeat.objects.get().pid == 1


def test_workers_are_found_in_the_processes(settings):
    celery = "django_prodserver.backends.workers.celery"
    settings.PRODUCTION_PROCESSES = {
        "web": {"BACKEND": "no.such.Server"},
        "worker": {"BACKEND": f"{celery}.CeleryWorker", "APP": "app"},
        "mailer": {"BACKEND": f"{celery}.CeleryWorker", "APP": "app"},
        "beat": {"BACKEND": f"{celery}.CeleryBeat", "APP": "app"},
        "loop": processes.command(None, "loop"),
        "misspelled": {"BACKEND": f"{celery}.CeleryWorkers", "APP": "app"},
        "incomplete": {"APP": "app"},
        "strange": {"BACKEND": "os.path", "APP": "app"},
    }
    assert heartbeats.get_workers() == ["worker", "mailer"]
    assert heartbeats.get_beats() == ["beat"]
    assert heartbeats.get_others() == ["loop"]
    assert heartbeats.get_processes() == ["worker", "mailer", "beat", "loop"]


def test_servers_are_not_imported(settings, monkeypatch):
    monkeypatch.setattr(heartbeats, "import_string", pytest.fail)
    servers = (processes.gunicorn, processes.granian, processes.uvicorn)
    settings.PRODUCTION_PROCESSES = {each.__name__: each(settings) for each in servers}
    assert heartbeats.get_processes() == []


def test_processes_that_are_not_named_are_not_expected(settings):
    settings.PRODUCTION_PROCESSES = {"worker": processes.worker(settings)}
    assert heartbeats.get_processes() == list(doctor.get_requirements().keys() & {"worker", "beat"})
    assert "beat" not in doctor.get_checks().keys() | health.get_deep_checks().keys()
    assert problems.find_missing({}).keys() == {"worker"}
    assert "has no beat, which runs them" in doctor.check_schedules().message


@pytest.mark.parametrize(("loop_age", "alive"), [(None, True), (5, True), (25, False)])
def test_another_process_may_show_that_its_loop_runs(monkeypatch, loop_age, alive):
    monkeypatch.setattr(heartbeats, "_loop_at", 1000 - loop_age if loop_age else 0)
    monkeypatch.setattr(heartbeats.time, "monotonic", lambda: 1000)
    works = SimpleQueue()
    monkeypatch.setattr(heartbeats, "record_forever", lambda name, check: works.put(check()))
    monkeypatch.setattr(heartbeats.atexit, "register", lambda function: None)
    heartbeats.start_heartbeat("loop")
    assert works.get(timeout=5) is alive


@pytest.mark.parametrize(
    ("process", "name"), [("mailer", "mailer"), ("worker", "worker"), ("command", "worker")]
)
def test_worker_records_it_under_the_name_of_its_process(monkeypatch, process, name):
    monkeypatch.setattr(heartbeats, "get_workers", lambda: ["worker", "mailer"])
    monkeypatch.setattr(heartbeats.logs, "_process", process)
    names = SimpleQueue()
    monkeypatch.setattr(heartbeats, "record_forever", lambda name, works: names.put(name))
    heartbeats.start_worker_heartbeat()
    assert names.get(timeout=5) == name


class Stop(BaseException):
    """Ends the thread."""


@pytest.mark.parametrize(("loop_age", "alive"), [(5, True), (25, False)])
def test_worker_records_it_while_its_loop_runs(monkeypatch, loop_age, alive):
    def stop(seconds):
        raise Stop

    monkeypatch.setattr(heartbeats.time, "sleep", stop)
    monkeypatch.setattr(heartbeats.time, "monotonic", lambda: 1000)
    heartbeats.note_loop()
    monkeypatch.setattr(heartbeats.time, "monotonic", lambda: 1000 + loop_age)
    monkeypatch.setattr(heartbeats.connections, "close_all", lambda: None)
    with pytest.raises(Stop):
        heartbeats.record_forever("worker", heartbeats.loop_runs)
    assert heartbeats.is_alive("worker") is alive


def test_worker_survives_an_unavailable_database(monkeypatch, caplog):
    waits = []

    def stop(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            raise Stop

    def fail(process):
        raise OperationalError("password=hunter2")

    monkeypatch.setattr(heartbeats.time, "sleep", stop)
    monkeypatch.setattr(heartbeats, "record", fail)
    monkeypatch.setattr(heartbeats.connections, "close_all", lambda: None)
    heartbeats.note_loop()
    with pytest.raises(Stop):
        heartbeats.record_forever("worker", heartbeats.loop_runs)
    assert [record.getMessage() for record in caplog.records] == [
        "Could not record a heartbeat: OperationalError"
    ] * 2


class TestCommand:
    def test_succeeds_while_the_process_works(self, capsys):
        heartbeats.record("worker")
        call_command("heartbeat", "worker")
        assert capsys.readouterr().out == f"worker on {HOST}: heartbeat 0 seconds ago\n"

    @pytest.mark.parametrize("seconds", [None, 100, 86_405])
    def test_fails_without_a_heartbeat_of_this_host(self, seconds, capsys):
        now = timezone.now()
        Heartbeat.objects.create(process="worker", host="another-host", pid=1, seen_at=now)
        if seconds:
            seen_at = now - timedelta(seconds=seconds + 0.5)
            Heartbeat.objects.create(process="worker", host=HOST, pid=1, seen_at=seen_at)
        with pytest.raises(SystemExit) as error:
            call_command("heartbeat", "worker")
        assert error.value.code == 1
        expected = f"heartbeat {seconds} seconds ago" if seconds else "no heartbeat"
        assert capsys.readouterr().out == f"worker on {HOST}: {expected}\n"


class TestFile:
    """The check of the file, which imports nothing of the service."""

    @pytest.fixture(autouse=True)
    def _folder(self, monkeypatch, tmp_path, settings):
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        settings.BASE_DIR = tmp_path / "service"
        settings.BASE_DIR.mkdir()

    def check(self, base, process="worker"):
        command = [sys.executable, "-m", "prodserver_ops.heartbeat", process]
        environment = os.environ | {"PYTHONPATH": str(Path(heartbeat.__file__).parents[1])}
        done = subprocess.run(command, cwd=base, env=environment, capture_output=True, text=True)
        assert done.stderr == ""
        return done.returncode, done.stdout

    def test_reports_a_process_that_runs_until_it_ends(self, settings, tmp_path):
        base = settings.BASE_DIR
        assert self.check(base) == (1, f"worker in {base}: no heartbeat\n")
        heartbeats.record("worker")
        assert self.check(base) == (0, f"worker in {base}: heartbeat 0 seconds ago\n")
        assert self.check(base, "beat")[0] == self.check(tmp_path)[0] == 1
        heartbeats.forget()
        assert self.check(base)[0] == 1

    def test_reports_the_last_of_several_and_their_age(self, settings):
        heartbeat.touch("worker", settings.BASE_DIR)
        (path,) = Path(heartbeat.get_folder()).iterdir()
        assert path.stat().st_mode & 0o777 == 0o600
        os.utime(path, (0, time.time() - 61))
        assert self.check(settings.BASE_DIR)[0] == 1
        path.with_suffix(".1").touch()
        assert self.check(settings.BASE_DIR)[0] == 0

    def test_is_recorded_while_the_database_is_unavailable(self, settings, monkeypatch):
        monkeypatch.setattr(Heartbeat.objects, "update_or_create", fail)
        with pytest.raises(OperationalError):
            heartbeats.record("worker")
        assert heartbeat.get_age("worker", settings.BASE_DIR) < 60

    def test_folder_of_another_user_is_not_used(self, settings, tmp_path):
        (tmp_path / f"prodserver-{os.getuid()}").symlink_to(tmp_path)
        with pytest.raises(FileExistsError):
            heartbeat.touch("worker", settings.BASE_DIR)
        heartbeats.record("worker")  # The database has it.
        assert heartbeats.is_alive("worker")

    def test_imports_no_other_package(self):
        code = "import sys; import prodserver_ops.heartbeat; print(*sys.modules)"
        environment = os.environ | {"PYTHONPATH": str(Path(heartbeat.__file__).parents[1])}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        packages = {name.partition(".")[0] for name in done.stdout.split()}
        assert not packages & {"django", "celery", "cbs", "tempfile", "logging"}

    def test_has_the_age_of_those_in_the_database(self):
        assert heartbeat.MAX_AGE == HEARTBEAT_AGE


def fail(**options):
    raise OperationalError
