"""Digests: which period, who gets them, and what they say."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
import time_machine
from django.core import mail
from django.utils import timezone

from {{ cookiecutter.project_slug }} import deliveries, tasks
from {{ cookiecutter.project_slug }}.digests import DIGESTS
from {{ cookiecutter.project_slug }}.models import DigestDelivery, DigestRun, Submission

pytestmark = pytest.mark.django_db

#: A Monday at eight, in the service's time zone.
MONDAY = datetime(2026, 11, 23, 8, tzinfo=timezone.get_default_timezone())


def send(name, now=MONDAY):
    """Run a digest from start to end, at that time."""
    with time_machine.travel(now, tick=False):
        deliveries.start(name, now)
        for run in DigestRun.objects.filter(finished_at=None):
            keys = deliveries.remaining(run).values_list("pk", flat=True)
            for chunk in sorted({key // deliveries.CHUNK for key in keys}):
                deliveries.send_chunk(run, chunk)


@pytest.fixture(autouse=True)
def _queue(queue):
    """Queue nothing: ``send`` runs the chunks itself."""


def recipients():
    return sorted(address for message in mail.outbox for address in message.to)


class TestPeriod:
    @pytest.mark.parametrize(
        ("name", "now", "start", "end"),
        [
            ("daily", (2026, 11, 22, 8), (2026, 11, 21), (2026, 11, 22)),
            ("daily", (2026, 11, 22, 23, 59), (2026, 11, 21), (2026, 11, 22)),
            ("daily", (2026, 3, 1), (2026, 2, 28), (2026, 3, 1)),
            ("weekly", (2026, 11, 23, 8), (2026, 11, 16), (2026, 11, 23)),
            ("weekly", (2026, 11, 29, 8), (2026, 11, 16), (2026, 11, 23)),
            ("moderator", (2026, 11, 22, 8, 0, 1), (2026, 11, 22, 7), (2026, 11, 22, 8)),
            ("moderator", (2026, 11, 22, 8, 59), (2026, 11, 22, 7), (2026, 11, 22, 8)),
        ],
    )
    def test_is_the_last_whole_one(self, name, now, start, end):
        zone = timezone.get_default_timezone()
        period = DIGESTS[name].period(datetime(*now, tzinfo=zone))
        assert period == (datetime(*start, tzinfo=zone), datetime(*end, tzinfo=zone))

    @pytest.mark.parametrize(
        ("name", "now", "hours"),
        [
            ("daily", datetime(2026, 3, 30, 8, tzinfo=UTC), 23),
            ("daily", datetime(2026, 10, 26, 8, tzinfo=UTC), 25),
            ("weekly", datetime(2026, 3, 30, 8, tzinfo=UTC), 7 * 24 - 1),
            ("weekly", datetime(2026, 10, 26, 8, tzinfo=UTC), 7 * 24 + 1),
            ("moderator", datetime(2026, 10, 25, 1, 30, tzinfo=UTC), 1),
        ],
    )
    def test_is_right_when_the_clock_changes(self, settings, name, now, hours):
        settings.TIME_ZONE = "Europe/London"
        start, end = DIGESTS[name].period(now)
        assert end.astimezone(UTC) - start.astimezone(UTC) == timedelta(hours=hours)
        assert end.astimezone(ZoneInfo("Europe/London")).minute == 0

    def test_hours_of_a_changing_clock_are_all_different(self, settings):
        settings.TIME_ZONE = "Europe/London"
        night = [datetime(2026, 10, 25, hour, 5, tzinfo=UTC) for hour in range(4)]
        starts = [DIGESTS["moderator"].period(now)[0] for now in night]
        first = datetime(2026, 10, 24, 23, tzinfo=UTC)
        assert starts == [first + timedelta(hours=number) for number in range(4)]

    def test_is_that_of_the_time_when_it_was_queued(self, queue):
        """A worker that was down for hours sends the digest that was due."""
        with time_machine.travel(MONDAY + timedelta(hours=20)):
            tasks.send_user_digest.apply(["daily"], headers={"queued_at": MONDAY.isoformat()})
        assert DigestRun.objects.get().period_end == MONDAY.replace(hour=0)


class TestModeratorDigest:
    def test_tells_moderators_what_waits(self, moderator, superuser, make_user, make_submission):
        make_user("staff", is_staff=True)
        pending = make_submission(body="Waiting", created_at=MONDAY - timedelta(hours=3))
        make_submission(body="Odd", flagged_at=MONDAY - timedelta(hours=2))
        make_submission(body="Fine", approved_at=MONDAY)
        send("moderator")
        assert recipients() == [superuser.email, moderator.email]
        text = mail.outbox[0].body
        assert "1 pending, 1 flagged" in text
        assert pending.get_admin_url() in text
        assert "Waiting" in text
        assert "Odd" in text
        assert "Fine" not in text

    def test_shows_the_newest_twenty(self, moderator, make_submission, make_user):
        author = make_user("author")
        for number in range(25):
            created_at = MONDAY - timedelta(minutes=number + 1)
            make_submission(body=f"[{number}]", author=author, created_at=created_at)
        send("moderator")
        text = mail.outbox[0].body
        assert "25 pending" in text
        assert "[19]" in text
        assert "[20]" not in text

    def test_is_sent_only_if_something_is_new(self, moderator, make_submission):
        make_submission(created_at=MONDAY - timedelta(minutes=1))
        send("moderator")
        send("moderator", MONDAY + timedelta(hours=1))
        assert len(mail.outbox) == 1
        make_submission(created_at=MONDAY + timedelta(minutes=61))
        send("moderator", MONDAY + timedelta(hours=2))
        assert len(mail.outbox) == 2
        assert "2 pending" in mail.outbox[1].body

    def test_what_came_while_the_service_was_down_is_new(self, moderator, make_submission):
        send("moderator")
        make_submission(created_at=MONDAY + timedelta(hours=2))
        send("moderator", MONDAY + timedelta(hours=9))
        assert len(mail.outbox) == 1

    def test_is_not_sent_when_all_is_decided(self, moderator, make_submission):
        make_submission(approved_at=MONDAY, created_at=MONDAY - timedelta(minutes=1))
        send("moderator")
        assert mail.outbox == []
        assert DigestRun.objects.get().finished_at


class TestUserDigest:
    @pytest.fixture
    def answered(self, make_submission):
        """Make a submission that was answered on the Sunday."""

        def make(**fields):
            fields = {"response": "We do.", "answered_at": MONDAY - timedelta(hours=10)} | fields
            return make_submission(**fields)

        return make

    def test_goes_to_whom_the_period_brought_an_answer(self, make_user, answered):
        daily = make_user("daily", digest_frequency="daily")
        answered(author=daily)
        answered(author=make_user("weekly", digest_frequency="weekly"))
        answered(author=make_user("off", digest_frequency="off"))
        answered(author=make_user("gone", digest_frequency="daily", is_active=False))
        answered(author=make_user("mute", digest_frequency="daily", email=""))
        make_user("none", digest_frequency="daily")
        send("daily")
        assert recipients() == [daily.email]

    @pytest.mark.parametrize(
        ("answered_at", "sent"),
        [
            (MONDAY.replace(hour=0) - timedelta(days=1, microseconds=1), 0),
            (MONDAY.replace(hour=0) - timedelta(days=1), 1),
            (MONDAY.replace(hour=0) - timedelta(microseconds=1), 1),
            (MONDAY.replace(hour=0), 0),
        ],
    )
    def test_covers_its_period_exactly(self, make_user, answered, answered_at, sent):
        answered(author=make_user("daily", digest_frequency="daily"), answered_at=answered_at)
        send("daily")
        assert len(mail.outbox) == sent

    def test_holds_all_answers_of_the_period(self, make_user, answered):
        author = make_user("weekly", digest_frequency="weekly", first_name="Jo")
        answered(author=author, body="One?", response="First.")
        answered(author=author, body="Two?", response="Second.")
        answered(author=make_user("other"), response="Not yours.")
        send("weekly")
        message = next(message for message in mail.outbox if message.to == [author.email])
        html = message.alternatives[0][0]
        for part in (message.body, html):
            assert "Jo" in part
            assert part.index("First.") < part.index("Second.")
            assert "Not yours." not in part

    def test_html_is_escaped_and_text_is_not(self, make_user, answered):
        answered(author=make_user("daily", digest_frequency="daily"), response="<b> & 'you'")
        send("daily")
        (message,) = mail.outbox
        assert "<b> & 'you'" in message.body
        assert "&lt;b&gt; &amp; &#x27;you&#x27;" in message.alternatives[0][0]

    def test_has_links_and_headers_to_unsubscribe(self, settings, make_user, answered):
        settings.SITE_URL = "https://service.example"
        answered(author=make_user("daily", digest_frequency="daily"))
        send("daily")
        (message,) = mail.outbox
        link = message.extra_headers["List-Unsubscribe"].strip("<>")
        assert link.startswith("https://service.example/unsubscribe/")
        assert message.extra_headers["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
        assert link in message.body
        assert link in message.alternatives[0][0]


def test_deliveries_are_recorded(make_user, make_submission):
    author = make_user("daily", digest_frequency="daily")
    make_submission(author=author, answered_at=MONDAY - timedelta(hours=10))
    send("daily")
    delivery = DigestDelivery.objects.get()
    assert (delivery.recipient, delivery.digest, delivery.status) == (author, "daily", "sent")
    assert delivery.period_start == MONDAY.replace(hour=0) - timedelta(days=1)
    assert Submission.objects.count() == 1
