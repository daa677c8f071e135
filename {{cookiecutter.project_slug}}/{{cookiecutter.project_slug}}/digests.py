"""What the digests say, for which period, and to whom; ``deliveries.py`` sends them.

A digest is an object with a name, a period, recipients and their contents. Each
recipient gets it once for each period, however often it is asked for.
"""

from datetime import UTC, datetime, time, timedelta

from django.conf import settings
from django.db.models import Exists, OuterRef, Q
from django.utils import timezone

from .models import DigestRun, Submission, User

#: How many submissions a moderator's digest shows.
NEWEST = 20

#: What a digest shows of its recipient; any other field takes a query for each of them.
RECIPIENT_FIELDS = ("email", "first_name", "last_name", "username")


class ModeratorDigest:
    """What waits for a decision, to every moderator, where something is new."""

    name = "moderator"
    subject = "submissions wait for you"
    template = "moderator_digest"
    unsubscribe = None

    def period(self, now):
        """Return start and end of the last whole hour before ``now``."""
        end = timezone.localtime(now).replace(minute=0, second=0, microsecond=0).astimezone(UTC)
        return end - timedelta(hours=1), end

    def recipients(self, run):
        """Return all moderators, or none where nothing is new since the last run."""
        earlier = DigestRun.objects.filter(digest=self.name, period_start__lt=run.period_start)
        last = earlier.order_by("period_start").last()
        since = last.period_end if last else datetime.min.replace(tzinfo=UTC)
        new = Q(created_at__gte=since, created_at__lt=run.period_end) | Q(
            flagged_at__gte=since, flagged_at__lt=run.period_end
        )
        waiting = Submission.objects.pending() | Submission.objects.flagged()
        return User.objects.moderators() if waiting.filter(new).exists() else User.objects.none()

    def contents(self, recipients, run):
        """Return the context of the template by the recipient's key."""
        pending, flagged = Submission.objects.pending(), Submission.objects.flagged()
        newest = (pending | flagged).select_related("author").order_by("-created_at")[:NEWEST]
        context = {
            "pending": pending.count(),
            "flagged": flagged.count(),
            "newest": [
                (submission, f"{settings.SITE_URL}{submission.get_admin_url()}")
                for submission in newest
            ],
        }
        return dict.fromkeys((recipient.pk for recipient in recipients), context)


class UserDigest:
    """What was answered in the last whole day or week, to the authors who want to know."""

    subject = "your submissions were answered"
    template = "user_digest"
    unsubscribe = "digest"

    def __init__(self, frequency, days):
        self.name = frequency
        self.days = days

    def period(self, now):
        """Return start and end of the last whole day or week (from Monday) before ``now``.

        Both are midnights in the service's time zone, whatever its clock does in
        between: a day may have 23 or 25 hours.
        """
        end = timezone.localdate(now)
        if self.days == 7:
            end -= timedelta(days=end.weekday())
        zone = timezone.get_default_timezone()
        start = end - timedelta(days=self.days)
        return tuple(datetime.combine(day, time.min, tzinfo=zone) for day in (start, end))

    def answered(self, run):
        return Submission.objects.answered_between(run.period_start, run.period_end)

    def recipients(self, run):
        """Return the people with this frequency who got an answer in the period."""
        answered = self.answered(run).filter(author=OuterRef("pk"))
        return User.objects.with_digest(self.name).filter(Exists(answered))

    def contents(self, recipients, run):
        """Return the context of the template by the recipient's key."""
        contents = {recipient.pk: {"submissions": []} for recipient in recipients}
        answered = self.answered(run).filter(author__in=contents).order_by("answered_at")
        for submission in answered.values("author_id", "body", "response"):
            contents[submission["author_id"]]["submissions"].append(submission)
        return contents


DIGESTS = {
    digest.name: digest
    for digest in (ModeratorDigest(), UserDigest("daily", 1), UserDigest("weekly", 7))
}
