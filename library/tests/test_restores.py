"""After a restore, e-mail waits until the command ``restored`` is told what to do."""

import subprocess
from contextlib import closing
from datetime import UTC, timedelta

import psycopg
import pytest
import services
from django.core import mail
from django.core.management import CommandError, call_command, execute_from_command_line
from django.db import connection
from django.urls import reverse
from django.utils import timezone
from django_celery_beat.models import CrontabSchedule, PeriodicTask
from test_deliveries import NAME, SampleDigest, SampleNotification

from prodserver_ops.console import doctor, problems
from prodserver_ops.mail import deliveries, restores, tasks, transport
from prodserver_ops.mail.digests import registry
from prodserver_ops.models import DelayedTask, DigestDelivery, DigestRun, Origin
from prodserver_ops.scheduling import restores as recognition
from prodserver_ops.worker import delayed

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("sample_templates", "_origin")]

on_postgresql = pytest.mark.skipif("connection.vendor != 'postgresql'")


@pytest.fixture
def _origin(db):
    """The row of a database that has been in use."""
    recognition.create_row("default")
    recognition.note_origin()


@pytest.fixture
def digest(monkeypatch, make_user):
    """A digest for three readers, which was due an hour ago."""
    digest = SampleDigest()
    monkeypatch.setitem(registry, NAME, digest)
    digest.keys = {make_user(f"reader{number}").pk for number in range(3)}
    hour = timezone.now() - timedelta(hours=1)
    crontab = CrontabSchedule.objects.create(minute="0", hour=hour.hour, timezone="UTC")
    PeriodicTask.objects.create(name="daily", task="test_deliveries.send_sample", crontab=crontab)
    PeriodicTask.objects.update(date_changed=timezone.now() - timedelta(hours=5))
    monkeypatch.setitem(tasks.DIGEST_TASKS, "test_deliveries.send_sample", lambda: NAME)
    return digest


@pytest.fixture
def notification(monkeypatch, make_user):
    notification = SampleNotification()
    monkeypatch.setitem(registry, notification.name, notification)
    notification.keys = {make_user("author").pk}
    (pk,) = notification.keys
    deliveries.request_notification(notification.name, pk)
    return notification


@pytest.fixture
def restore(digest):
    """The database was restored to three hours ago."""
    return recognition.announce(timezone.now() - timedelta(hours=3))


def send(queue):
    """Start what is due, and send it; return the number of e-mails."""
    mail.outbox.clear()
    queue.clear()
    tasks.resume_deliveries()
    for name, args, _ in list(queue):
        if name == tasks.send_digest_chunk.name:
            tasks.send_digest_chunk.run(*args)
        elif name == tasks.send_notification.name:
            tasks.send_notification.run(*args)
    return len(mail.outbox)


def run_command(capsys, *options):
    call_command("restored", *options)
    return capsys.readouterr().out


class TestRecognition:
    @on_postgresql
    def test_a_row_that_was_inserted_again_is_one_of_a_backup(self):
        assert recognition.find_restore() is None
        seen = Origin.objects.get().seen_at
        with connection.cursor() as cursor:
            cursor.execute("UPDATE django_migrations SET applied = applied WHERE app = 'ops'")
        restore = recognition.find_restore()
        assert restore.start == seen
        assert recognition.find_restore() == restore
        recognition.note_origin()
        assert recognition.find_restore() is None

    @on_postgresql
    @pytest.mark.django_db(transaction=True, serialized_rollback=True)
    def test_a_restored_dump_has_another_identity(self):
        # The origin has an identity of its own in each database, also after VACUUM FULL.
        identity, timeline = recognition.get_identity()
        with connection.cursor() as cursor:
            cursor.execute("VACUUM (FULL, FREEZE) django_migrations")
        assert recognition.get_identity() == (identity, timeline)
        dump = ["pg_dump", "--format=custom", "--table=django_migrations", "--dbname"]
        server = services.URLS[services.POSTGRESQL].rpartition("/")[0]
        source = f"{server}/{connection.settings_dict['NAME']}"
        content = subprocess.run([*dump, source], check=True, capture_output=True).stdout
        url = services.create(services.POSTGRESQL, "restored")
        try:
            subprocess.run(["pg_restore", "--dbname", url], input=content, check=True)
            with closing(psycopg.connect(url)) as restored:
                assert restored.execute(recognition.IDENTITY).fetchone()[0] != identity
        finally:
            services.delete(services.POSTGRESQL, url)

    @on_postgresql
    @pytest.mark.parametrize(("minutes", "waits"), [(1, False), (60, True)])
    def test_a_new_timeline_is_a_failover_or_a_recovery(self, minutes, waits):
        seen = timezone.now() - timedelta(minutes=minutes)
        Origin.objects.update(timeline="00000000", seen_at=seen)
        assert (recognition.find_restore() is not None) == waits

    def test_a_missing_row_is_not_created_by_the_way(self):
        # pg_restore would fail to insert that of the backup.
        Origin.objects.all().delete()
        recognition.note_origin()
        assert not Origin.objects.exists()
        assert recognition.find_restore() is None


class TestWaiting:
    def test_nothing_is_sent_and_everybody_is_told(self, restore, queue, admin_client, caplog):
        assert transport.is_paused()
        assert send(queue) == 0
        assert not DigestRun.objects.exists()
        assert "E-mail waits: the database is from a backup of" in caplog.text
        result = doctor.check_deliveries()
        assert (result.status, result.next) == ("error", "python manage.py restored")
        assert "E-mail waits" in problems.find_email({})[""]
        page = admin_client.get(reverse("admin:ops_operations")).text
        assert "E-mail waits: the database is from a backup of" in page

    def test_a_chunk_of_an_earlier_run_waits(self, digest, queue):
        tasks.resume_deliveries()
        recognition.announce(timezone.now() - timedelta(hours=2))
        run = DigestRun.objects.get()
        with pytest.raises(transport.Paused):
            deliveries.send_chunk(run, min(digest.keys) // deliveries.CHUNK)

    def test_delayed_tasks_of_the_backup_wait_and_others_run(self, digest):
        now = timezone.now()
        for key, created, due in (("old", 180, 60), ("future", 180, -0.01), ("new", 0, 0)):
            DelayedTask.objects.create(
                key=key,
                task_id=key,
                name="sample",
                queue="dummy",
                message="{}",
                created_at=now - timedelta(minutes=created),
                due_at=now - timedelta(minutes=due),
            )
        recognition.announce(now - timedelta(hours=2))
        assert {row.key for row in delayed.claim_rows()} == {"future", "new"}


class TestCommand:
    def test_without_a_restore_it_says_so(self, capsys):
        assert "No restore was found" in run_command(capsys)

    def test_an_option_is_needed(self, restore, capsys):
        with pytest.raises(SystemExit):
            call_command("restored")
        output = capsys.readouterr().out
        assert f"{NAME} until" in output
        assert "3 recipients" in output
        assert "--mark-sent" in output
        assert not DigestRun.objects.exists()
        assert transport.is_paused()

    def test_what_is_marked_is_not_sent(self, restore, notification, queue, capsys):
        Origin.objects.update(restored_at=timezone.now())
        output = run_command(capsys, "--mark-sent")
        assert "1 notifications" in output
        assert send(queue) == 0
        assert notification.keys == set()
        assert recognition.find_restore() is None
        # Another digest starts where this one ended.
        run = deliveries.get_run(restores.get_digests()[NAME], timezone.now() + timedelta(days=1))
        assert run.period_start == DigestRun.objects.earliest("period_end").period_end

    def test_a_message_of_a_marked_run_sends_nothing(self, digest, queue, capsys):
        tasks.resume_deliveries()
        run = DigestRun.objects.get()
        recognition.announce(timezone.now() - timedelta(hours=2))
        run_command(capsys, "--mark-sent")
        tasks.send_digest_chunk.run(run.pk, min(digest.keys) // deliveries.CHUNK)
        assert mail.outbox == []

    def test_all_is_sent_again(self, restore, queue, capsys):
        run_command(capsys, "--send-again")
        assert send(queue) == 3

    def test_what_was_due_after_the_restore_is_sent(self, restore, queue, capsys):
        Origin.objects.update(restored_at=timezone.now() - timedelta(minutes=125))
        assert "Nothing was due" in run_command(capsys)
        assert send(queue) == 3

    def test_each_is_asked_about(self, restore, notification, queue, capsys, monkeypatch):
        Origin.objects.update(restored_at=timezone.now())
        answers = iter(["?", "s", "m"])
        monkeypatch.setattr("builtins.input", lambda text: next(answers))
        run_command(capsys, "--decide")
        assert send(queue) == 3
        assert notification.keys == set()

    def test_what_a_log_contains_is_not_sent_again(
        self, restore, notification, digest, queue, capsys, tmp_path
    ):
        Origin.objects.update(restored_at=timezone.now())
        end = digest.period(tasks.get_due_digests(timezone.now())[NAME])[1].astimezone(UTC)
        first, _, third = sorted(digest.keys)
        (author,) = notification.keys
        path = tmp_path / "mail.log"
        path.write_text(
            f"postfix/cleanup[1]: 4F: message-id=<{NAME}.{end:%Y%m%dT%H%M}.{first}@example.com>\n"
            f"x <{NAME}.{end:%Y%m%dT%H%M}.{third}@example.com> <{notification.name}.{author}@x>\n"
            "message-id=<else@example.com> <unknown.20300101T0000.1@example.com>\n"
        )
        assert "3 e-mails were sent" in run_command(capsys, "--log", str(path))
        assert send(queue) == 1
        assert DigestDelivery.objects.filter(status="sent").count() == 3
        assert notification.keys == set()
        with pytest.raises(CommandError, match="No such file"):
            recognition.announce(timezone.now())
            run_command(capsys, "--log", str(tmp_path / "missing"))

    def test_delayed_tasks_are_cancelled(self, restore, capsys):
        row = DelayedTask.objects.create(
            key="1",
            task_id="1",
            name="sample",
            queue="dummy",
            message="{}",
            created_at=restore.start - timedelta(hours=1),
            due_at=restore.end - timedelta(hours=1),
        )
        assert "sample: 1 delayed tasks" in run_command(capsys, "--mark-sent")
        row.refresh_from_db()
        assert row.started_by == DelayedTask.CANCELLED

    @pytest.mark.parametrize("time", ["soon", "2030-13-01", "2999-01-01T00:00"])
    def test_an_invalid_time_is_refused(self, time, capsys):
        with pytest.raises(SystemExit) as error:
            execute_from_command_line(["manage.py", "restored", "--to", time])
        assert error.value.code == 2
        assert "error: argument --to: " in capsys.readouterr().err

    def test_a_restore_can_be_announced(self, digest, capsys):
        with pytest.raises(SystemExit):
            time = timezone.localtime() - timedelta(hours=2)
            call_command("restored", "--to", f"{time:%Y-%m-%dT%H:%M}")
        assert transport.is_paused()
        assert f"{NAME} until" in capsys.readouterr().out
