"""Digests: their periods, their registration, and the e-mail that is composed for them."""

import re
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
import time_machine
from django.core.exceptions import ImproperlyConfigured
from django.db.models import AutoField, BigAutoField, BigIntegerField, Model, UUIDField
from django.test.utils import isolate_apps
from django.utils import timezone

from prodserver_ops.console import checks
from prodserver_ops.console.checks import check_recipients
from prodserver_ops.mail import composing, digests, tasks
from prodserver_ops.models import DigestRun

HOURLY, DAILY, WEEKLY = digests.HourlyDigest(), digests.DailyDigest(), digests.WeeklyDigest()


@pytest.fixture
def registry(monkeypatch):
    """The registry of messages, empty."""
    monkeypatch.setattr(digests, "registry", {})
    return digests.registry


@tasks.digest_task
def send_sample():
    return "sample"


def make_digest(base=digests.DailyDigest, **attributes):
    """Return a new digest class."""
    values = {"name": "sample", "subject": "news", "template": "sample", **attributes}
    return type("Sample", (base,), values)


class TestPeriod:
    @pytest.mark.parametrize(
        ("digest", "now", "start", "end"),
        [
            (DAILY, (2026, 11, 22, 8), (2026, 11, 21), (2026, 11, 22)),
            (DAILY, (2026, 11, 22, 23, 59), (2026, 11, 21), (2026, 11, 22)),
            (DAILY, (2026, 3, 1), (2026, 2, 28), (2026, 3, 1)),
            (WEEKLY, (2026, 11, 23, 8), (2026, 11, 16), (2026, 11, 23)),
            (WEEKLY, (2026, 11, 29, 8), (2026, 11, 16), (2026, 11, 23)),
            (HOURLY, (2026, 11, 22, 8, 0, 1), (2026, 11, 22, 7), (2026, 11, 22, 8)),
            (HOURLY, (2026, 11, 22, 8, 59), (2026, 11, 22, 7), (2026, 11, 22, 8)),
        ],
    )
    @pytest.mark.parametrize("zone", ["UTC", "Europe/London", "Asia/Tokyo"])
    def test_is_the_last_whole_one(self, settings, zone, digest, now, start, end):
        settings.TIME_ZONE = zone
        zone = ZoneInfo(zone)
        period = digest.period(datetime(*now, tzinfo=zone))
        assert period == (datetime(*start, tzinfo=zone), datetime(*end, tzinfo=zone))

    @pytest.mark.parametrize(
        ("digest", "now", "hours"),
        [
            (DAILY, datetime(2026, 3, 30, 8, tzinfo=UTC), 23),
            (DAILY, datetime(2026, 10, 26, 8, tzinfo=UTC), 25),
            (WEEKLY, datetime(2026, 3, 30, 8, tzinfo=UTC), 7 * 24 - 1),
            (WEEKLY, datetime(2026, 10, 26, 8, tzinfo=UTC), 7 * 24 + 1),
            (HOURLY, datetime(2026, 10, 25, 1, 30, tzinfo=UTC), 1),
        ],
    )
    def test_has_the_right_length_when_the_clock_changes(self, settings, digest, now, hours):
        settings.TIME_ZONE = "Europe/London"
        start, end = digest.period(now)
        assert end.astimezone(UTC) - start.astimezone(UTC) == timedelta(hours=hours)
        assert end.astimezone(ZoneInfo("Europe/London")).minute == 0

    def test_hours_of_a_night_when_the_clock_changes_are_all_different(self, settings):
        settings.TIME_ZONE = "Europe/London"
        night = [datetime(2026, 10, 25, hour, 5, tzinfo=UTC) for hour in range(4)]
        starts = [HOURLY.period(now)[0] for now in night]
        first = datetime(2026, 10, 24, 23, tzinfo=UTC)
        assert starts == [first + timedelta(hours=number) for number in range(4)]

    @pytest.mark.parametrize(
        ("zone", "change"),
        [
            ("Australia/Lord_Howe", "2026-04-04"),
            ("Australia/Lord_Howe", "2026-10-03"),
            ("Pacific/Chatham", "2026-04-04"),
            ("Pacific/Chatham", "2026-09-26"),
        ],
    )
    def test_hours_around_a_change_off_the_hour_follow_each_other(self, settings, zone, change):
        settings.TIME_ZONE = zone
        noon = datetime.fromisoformat(f"{change}T10:00+00:00")
        moments = [noon + timedelta(minutes=10 * number) for number in range(48)]
        periods = [HOURLY.period(moment) for moment in moments]
        assert all(end <= moment for (_, end), moment in zip(periods, moments, strict=True))
        assert periods == sorted(periods)
        for (_, end), (start, _) in pairwise(sorted(set(periods))):
            assert end == start

    @pytest.mark.django_db
    def test_is_the_last_one_before_the_task_was_queued(self, registry, queue, make_user):
        """A worker that was down for hours sends the digest that was due."""
        recipients = type(make_user("anna"))._default_manager.none()
        digests.register(make_digest(recipients=lambda self, run: recipients))
        monday = datetime(2026, 11, 23, 8, tzinfo=timezone.get_default_timezone())
        with time_machine.travel(monday + timedelta(hours=20)):
            send_sample.apply([], headers={"queued_at": monday.isoformat()})
        assert DigestRun.objects.get().period_end == monday.replace(hour=0)


class TestRun:
    @pytest.mark.django_db
    def test_previous_one_is_of_the_same_digest_and_an_earlier_period(self):
        start = datetime(2026, 11, 23, tzinfo=UTC)
        one, two, three = (
            DigestRun.objects.create(digest=name, period_start=day, period_end=day)
            for name, day in [
                ("daily", start),
                ("other", start + timedelta(days=1)),
                ("daily", start + timedelta(days=2)),
            ]
        )
        assert [run.previous() for run in (one, two, three)] == [None, None, one]


class TestRegistry:
    def test_digest_is_found_by_its_name(self, registry):
        sample = digests.register(make_digest())
        assert isinstance(digests.get_digest("sample"), sample)

    def test_notification_is_found_by_its_name(self, registry):
        sample = digests.register(make_digest(digests.Notification))
        assert isinstance(digests.get_notification("sample"), sample)

    def test_error_for_an_unknown_name_lists_the_digests(self, registry):
        for name in ("one", "two"):
            digests.register(make_digest(name=name))
        digests.register(make_digest(digests.Notification, name="three"))
        message = "no digest 'three'; the digests are: one, two"
        with pytest.raises(ValueError, match=message):
            digests.get_digest("three")
        message = "no notification 'one'; the notifications are: three"
        with pytest.raises(ValueError, match=message):
            digests.get_notification("one")

    def test_duplicate_name_is_rejected(self, registry):
        digests.register(make_digest())
        with pytest.raises(ImproperlyConfigured, match="'sample'"):
            digests.register(make_digest(digests.Notification))

    @pytest.mark.parametrize("name", ["", "Sample", "a:b", "a b", "x" * 51])
    def test_invalid_name_is_rejected(self, registry, name):
        with pytest.raises(ImproperlyConfigured, match="invalid name"):
            digests.register(make_digest(name=name))


@pytest.mark.usefixtures("sample_templates")
class TestMessage:
    @pytest.fixture
    def compose(self, settings, make_user):
        """Return a function that composes the e-mail of a digest with these attributes."""
        settings.SITE_NAME = "Sample service"
        settings.SITE_URL = "https://service.example"

        def compose(content="", **attributes):
            user = make_user("anna")
            return composing.compose(
                make_digest(**attributes)(), user, {"content": content}, "sample.1"
            )

        return compose

    def test_has_the_service_in_its_subject_and_the_given_message_id(self, compose, settings):
        settings.DEFAULT_FROM_EMAIL = "Service <noreply@service.example>"
        composing._domain.cache_clear()
        email = compose()
        assert email.subject == "Sample service: news"
        assert email.to == ["anna@example.com"]
        assert email.extra_headers["Message-ID"] == "<sample.1@service.example>"
        assert "Sample service" in email.body

    def test_html_is_escaped_and_text_is_not(self, compose):
        email = compose("<b> & 'you'")
        assert "<b> & 'you'" in email.body
        assert "&lt;b&gt; &amp; &#x27;you&#x27;" in email.alternatives[0][0]

    def test_has_links_and_headers_to_unsubscribe(self, compose):
        email = compose(unsubscribe_label="news")
        link = email.extra_headers["List-Unsubscribe"].strip("<>")
        assert link.startswith("https://service.example/")
        assert email.extra_headers["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
        assert link in email.body
        assert link in email.alternatives[0][0]

    def test_without_a_label_has_no_link_to_unsubscribe(self, compose):
        email = compose()
        assert "List-Unsubscribe" not in email.extra_headers
        assert "https://" not in email.body


@pytest.mark.django_db
@pytest.mark.usefixtures("sample_templates")
class TestHeaders:
    """The headers that the mail server receives, rather than ``extra_headers``."""

    @pytest.fixture
    def lines(self, make_user, settings):
        settings.SITE_URL = f"https://{'long-name.' * 10}example.com"
        settings.DEFAULT_FROM_EMAIL = f"Service <noreply@{'long-name.' * 10}example.com>"
        digest = make_digest(name="x" * 50, subject="Überlänge " * 20, unsubscribe_label="sample")()
        composing._domain.cache_clear()
        email = composing.compose(digest, make_user("anna"), {"content": "é" * 3000}, "x" * 70)
        composing._domain.cache_clear()
        text = email.message().as_bytes().decode("ascii")
        # A header may continue on the next line, but is never encoded.
        return re.sub(r"\n[ \t]+", "", text).splitlines()

    def test_links_are_not_encoded(self, lines):
        (link,) = [line for line in lines if line.startswith("List-Unsubscribe:")]
        assert re.fullmatch(r"List-Unsubscribe: ?<https://\S+/unsubscribe/\S+/>", link)
        (number,) = [line for line in lines if line.startswith("Message-ID:")]
        assert re.fullmatch(r"Message-ID: ?<\S+@\S+>", number)

    def test_lines_are_not_too_long(self, lines):
        assert max(len(line) for line in lines) <= 998

    def test_nobody_replies_automatically(self, lines):
        assert "Auto-Submitted: auto-generated" in lines
        assert "List-Unsubscribe-Post: List-Unsubscribe=One-Click" in lines


class TestUserModel:
    @pytest.fixture
    def use(self, monkeypatch):
        """Return a function that makes the check see a user model with this primary key."""

        def use(key):
            with isolate_apps("dummy"):
                names = {"__module__": __name__, "Meta": type("Meta", (), {"app_label": "dummy"})}
                model = type("Person", (Model,), names | {"id": key})
            monkeypatch.setattr(checks, "get_user_model", lambda: model)
            return check_recipients()

        return use

    @pytest.mark.parametrize("digests", [{"sample": None}, {}])
    def test_without_an_integer_key_cannot_receive_digests(self, use, monkeypatch, digests):
        monkeypatch.setattr(checks, "get_digests", lambda: digests)
        messages = use(UUIDField(primary_key=True))
        assert [message.id for message in messages] == ["digests.E001"] * len(digests)
        if messages:
            assert messages[0].msg.startswith(
                "AUTH_USER_MODEL: dummy.Person.id is a UUIDField, but"
            )

    @pytest.mark.parametrize("field", [AutoField, BigAutoField, BigIntegerField])
    def test_with_an_integer_key_is_not_reported(self, use, monkeypatch, field):
        monkeypatch.setattr(checks, "get_digests", lambda: {"sample": None})
        assert use(field(primary_key=True)) == []
