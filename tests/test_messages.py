"""Every message of the service, as a real SMTP server receives it."""

import email
import email.policy
import re

import pytest

from tests.conftest import production_variables
from tests.servers import wait_for

pytestmark = pytest.mark.slow

#: Long, multi-line and non-Latin content, and what could end a header or a message.
TEXT = "Überlänge 祈り 🙏 Молитва\n.\n\n..\r\nBcc: eve@example.com\n" + "x" * 1200 + "\n<b>&amp;"

SEND_ALL = """
from datetime import timedelta
from django.utils import timezone
from django.contrib.auth.models import Permission
from prodserver_ops.mail import tasks
text = {text!r}
now = timezone.now()
author = User.objects.create(
    username="author", email="author@example.com", first_name="Ünïcode " * 15, last_name="祈り",
    digest_frequency="{frequency}",
)
User.objects.create_superuser("moderator", "moderator@example.com", "secret")
before = timezone.localtime().replace(hour=0, minute=0) - timedelta(days=7)
for number in range(8):
    Submission.objects.create(
        author=author, body=text, response=text, answered_at=before + timedelta(days=number),
        notified_at=now,
    )
    Submission.objects.create(author=author, body=text)
Submission.objects.update(created_at=now - timedelta(hours=2))
tasks.start_digest("moderator", now)
tasks.start_digest("{frequency}", now)
answered = Submission.objects.create(
    author=author, body=text, response=text, answered_at=now, answered_by=author
)
tasks.notify_on_commit("answer", answered.pk)
"""


@pytest.mark.parametrize(("django_version", "frequency"), [("6.0", "daily"), ("5.2", "weekly")])
def test_every_message_leaves_as_it_should(
    bake, make_service, smtp, postgres_url, rabbitmq_url, django_version, frequency
):
    raw = []
    accept = smtp.handle_DATA

    async def keep(server, session, envelope):
        raw.append(envelope.original_content)
        return await accept(server, session, envelope)

    smtp.handle_DATA = keep
    project = bake(
        project_slug="letters",
        project_name="Fürbitten und Gebete der Gemeinden am schönen großen See in Österreich",
        django_version=django_version,
        domain_name=f"{'long-label.' * 9}example.com",
    )
    service = make_service(
        project,
        EMAIL_HOST="127.0.0.1",
        EMAIL_PORT=smtp.port,
        **production_variables(postgres_url, rabbitmq_url),
    )
    service.deploy()
    service.shell(SEND_ALL.format(text=TEXT, frequency=frequency))
    worker = service.start("worker")
    wait_for(lambda: len(raw) >= 3, 60, worker.text)
    kinds = set()
    for content in raw:
        kinds.add(check_message(content))
    assert kinds == {"moderator", frequency, "answer"}
    assert len({email.message_from_bytes(content)["Message-ID"] for content in raw}) == 3


def check_message(content):
    """Check the bytes of one message; return its kind."""
    lines = content.split(b"\r\n")
    assert b"\n" not in b"".join(lines)
    # RFC 5322, section 2.1.1
    assert max(len(line) for line in lines) <= 998
    headers = content.partition(b"\r\n\r\n")[0].decode("ascii")
    fields = re.sub(r"\r\n[ \t]+", " ", headers).split("\r\n")
    names = [field.partition(":")[0] for field in fields]
    assert sorted({name.lower() for name in names}) == sorted(name.lower() for name in names)
    values = dict(field.split(":", 1) for field in fields)

    assert values["Auto-Submitted"].strip() == "auto-generated"
    message_id = re.fullmatch(r" *<([a-z]+)\.[0-9T.]+@[a-z.-]+>", values["Message-ID"])
    assert message_id, values["Message-ID"]
    assert "bcc" not in {name.lower() for name in names}
    assert values["MIME-Version"].strip() == "1.0"
    assert values["Date"].strip()

    message = email.message_from_bytes(content, policy=email.policy.default)
    assert (
        message["Subject"]
        .strip()
        .startswith("Fürbitten und Gebete der Gemeinden am schönen großen See")
    )
    assert "noreply@" in message["From"]
    assert re.fullmatch(r"(author|moderator)@example\.com", message["To"])
    text, html = message.iter_parts()
    assert [part.get_content_type() for part in (text, html)] == ["text/plain", "text/html"]
    for part in (text, html):
        assert "祈り 🙏 Молитва" in part.get_content()
        assert "x" * 1000 in part.get_content() or message_id[1] == "moderator"
    assert "&lt;b&gt;&amp;amp;" in html.get_content() or message_id[1] == "moderator"

    if message_id[1] == "moderator":
        assert "List-Unsubscribe" not in values
        return "moderator"
    # RFC 8058, as plain ASCII: mailers cannot read an encoded word here.
    link = re.fullmatch(r" *<(https://[!-~]+)>", values["List-Unsubscribe"])
    assert link, values["List-Unsubscribe"]
    assert values["List-Unsubscribe-Post"].strip() == "List-Unsubscribe=One-Click"
    assert link[1] in text.get_content()
    assert link[1] in html.get_content()
    return message_id[1]
