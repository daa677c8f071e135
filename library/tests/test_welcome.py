"""The part of the home page for developers, and the e-mails that it shows."""

from pathlib import Path

import pytest
from django.core import mail
from django.core.mail import EmailMultiAlternatives
from django.template import Context, Template
from django.urls import reverse
from django.utils import timezone

from prodserver_ops.development import overview, reloading, welcome
from prodserver_ops.mail import console
from prodserver_ops.models import Heartbeat, TaskRun

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _development(settings, tmp_path):
    settings.DEBUG = True
    settings.VAR_DIR = tmp_path
    settings.EMAIL_BACKEND = "prodserver_ops.mail.console.EmailBackend"


@pytest.fixture
def send(capsys):
    """Return a function that sends an e-mail."""

    def send(number=1):
        message = EmailMultiAlternatives(
            f"Number {number}", "plain text", to=["Sam <s@example.com>"]
        )
        message.attach_alternative("<p>rich text</p>", "text/html")
        return mail.get_connection().send_messages([message])

    return send


def get_state(client):
    response = client.get(reverse("welcome_state"))
    assert response.status_code == 200
    return response.text


class TestEmails:
    def test_each_is_printed_kept_and_shown(self, client, send, capsys):
        assert send() == 1
        assert "Subject: Number 1" in capsys.readouterr().out
        (sent,) = console.get_latest(5)
        assert (sent.subject, sent.to) == ("Number 1", "Sam <s@example.com>")
        assert (timezone.now() - sent.sent_at).total_seconds() < 60
        for page in (get_state(client), client.get(reverse("emails")).text):
            assert reverse("sent_email", args=[sent.name, "html"]) in page
        html = client.get(reverse("sent_email", args=[sent.name, "html"]))
        assert "<p>rich text</p>" in html.text
        assert html.headers["Content-Security-Policy"].startswith("default-src 'none'")
        text = client.get(reverse("sent_email", args=[sent.name, "txt"]))
        assert text.text.startswith("Subject: Number 1\nTo: Sam <s@example.com>\n\nplain text")

    def test_only_the_latest_are_kept(self, send, monkeypatch):
        monkeypatch.setattr(console, "KEPT", 2)
        for number in range(4):
            send(number)
        assert [sent.subject for sent in console.get_latest(9)] == ["Number 3", "Number 2"]

    @pytest.mark.parametrize("name", ["unknown", "0000000000000000-00000000"])
    def test_unknown_one_is_not_found(self, client, name):
        assert client.get(reverse("sent_email", args=[name, "txt"])).status_code == 404


class TestState:
    def test_processes_are_running_or_not(self, client):
        Heartbeat.objects.create(process="worker", host="elsewhere", pid=1, seen_at=timezone.now())
        text = get_state(client)
        assert "<strong>worker</strong> running" in text
        assert "<strong>beat</strong> not running: <code>" in text
        assert "manage.py prodserver beat --reload" in text

    def test_killed_process_does_not_run(self, monkeypatch):
        row = Heartbeat.objects.create(
            process="worker", host="here", pid=2**22 + 1, seen_at=timezone.now()
        )
        monkeypatch.setattr(overview.socket, "gethostname", lambda: "here")
        assert "worker" in overview.get_missing()
        Heartbeat.objects.filter(pk=row.pk).update(pid=1)
        assert "worker" not in overview.get_missing()

    def test_error_of_a_process_is_shown(self, client):
        path = reloading.get_failure_path("worker")
        path.parent.mkdir()
        path.write_text("Traceback ...\nSyntaxError: <wrong>\n")
        assert "<strong>worker</strong> not running: SyntaxError: &lt;wrong&gt;" in get_state(
            client
        )

    def test_runs_are_shown(self, client):
        fields = {"started_at": timezone.now(), "host": "here", "status": "failed"}
        error = "ValueError: wrong" + " word" * 200
        TaskRun.objects.create(name="sample.task", error=error, **fields)
        TaskRun.objects.create(name=welcome.HIDDEN_TASKS[0], **fields)
        text = get_state(client)
        assert "sample.task" in text
        assert "ValueError: wrong" in text
        assert text.count(" word") < 50
        assert welcome.HIDDEN_TASKS[0] not in text


class TestPage:
    def render(self, rf):
        template = Template("{% load welcome %}{% welcome %}")
        return template.render(Context({"request": rf.get("/")}))

    def test_has_links_commands_and_documents(self, rf, settings, tmp_path):
        settings.BASE_DIR = tmp_path
        (tmp_path / "README.md").write_text("# Sample")
        text = self.render(rf)
        assert "manage.py createsuperuser" in text
        assert reverse("document", args=["README.md"]) in text
        assert reverse("admin:ops_operations") in text
        assert 'id="welcome-state"' in text

    def test_administrator_is_named(self, rf, admin_user):
        text = self.render(rf)
        assert f"Sign in as <strong>{admin_user.get_username()}</strong>" in text
        assert "createsuperuser" not in text

    def test_unapplied_migrations_are_shown(self, rf, monkeypatch):
        monkeypatch.setattr(overview, "count_unapplied", lambda: 3)
        text = self.render(rf)
        assert "3 migrations not applied" in text
        assert "manage.py migrate" in text

    def test_only_documents_are_shown(self, client, settings, tmp_path):
        settings.BASE_DIR = tmp_path
        Path(tmp_path, "docs").mkdir()
        Path(tmp_path, "docs", "tasks.md").write_text("# Tasks")
        Path(tmp_path, "secret.md").write_text("secret")
        assert client.get(reverse("document", args=["docs/tasks.md"])).text == "# Tasks"
        for name in ("secret.md", "docs/../secret.md", ".env"):
            assert client.get(reverse("document", args=[name])).status_code == 404

    def test_production_has_none_of_it(self, rf, client, settings, send):
        send()
        settings.DEBUG = False
        assert self.render(rf) == ""
        name = console.get_latest(1)[0].name
        urls = [
            reverse("welcome_state"),
            reverse("document", args=["README.md"]),
            reverse("sent_email", args=[name, "txt"]),
        ]
        assert {client.get(url).status_code for url in urls} == {404}
