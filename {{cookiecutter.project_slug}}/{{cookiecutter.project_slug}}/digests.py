"""The e-mail of the service: digests for moderators and users, notifications for authors."""

from datetime import UTC, datetime

from django.conf import settings
from django.db.models import Exists, OuterRef, Q
from django.utils import timezone

from .models import Submission, User
from .ops.digests import DailyDigest, Digest, HourlyDigest, Notification, WeeklyDigest, register

#: How many submissions a moderator digest lists.
NEWEST = 20

#: The fields of a recipient that the templates use.
RECIPIENT_FIELDS = ("email", "first_name", "last_name", "username")


@register
class ModeratorDigest(HourlyDigest):
    """What waits for a decision, to all moderators, if something is new."""

    name = "moderator"
    subject = "submissions to review"
    template = "moderator_digest"
    recipient_fields = RECIPIENT_FIELDS

    def recipients(self, run):
        """Return all moderators, or nobody if nothing is new since the previous run."""
        previous = run.previous()
        since = previous.period_end if previous else datetime.min.replace(tzinfo=UTC)
        new = Q(created_at__gte=since, created_at__lt=run.period_end) | Q(
            flagged_at__gte=since, flagged_at__lt=run.period_end
        )
        waiting = Submission.objects.pending() | Submission.objects.flagged()
        return User.objects.moderators() if waiting.filter(new).exists() else User.objects.none()

    def contents(self, recipients, run):
        """Return the same context for every moderator."""
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


class UserDigest(Digest):
    """The answers of a period, to the authors who chose this frequency."""

    subject = "your submissions were answered"
    template = "user_digest"
    recipient_fields = RECIPIENT_FIELDS

    def answered(self, run):
        return Submission.objects.answered_between(run.period_start, run.period_end)

    def recipients(self, run):
        """Return the users with this frequency who got an answer in the period."""
        answered = self.answered(run).filter(author=OuterRef("pk"))
        return User.objects.with_digest(self.name).filter(Exists(answered))

    def contents(self, recipients, run):
        """Return the answered submissions of each recipient."""
        contents = {recipient.pk: {"submissions": []} for recipient in recipients}
        answered = self.answered(run).filter(author__in=contents).order_by("answered_at")
        for submission in answered.values("author_id", "body", "response"):
            contents[submission["author_id"]]["submissions"].append(submission)
        return contents

    def unsubscribe(self, recipient):
        User.objects.filter(pk=recipient.pk).update(digest_frequency=User.DigestFrequency.OFF)


@register
class DailyUserDigest(UserDigest, DailyDigest):
    """Yesterday's answers."""

    name = User.DigestFrequency.DAILY.value
    unsubscribe_label = "daily digests"


@register
class WeeklyUserDigest(UserDigest, WeeklyDigest):
    """Last week's answers."""

    name = User.DigestFrequency.WEEKLY.value
    unsubscribe_label = "weekly digests"


@register
class AnswerNotification(Notification):
    """The answer to a submission, to its author, at once."""

    name = "answer"
    subject = "your submission was answered"
    template = "notification"
    unsubscribe_label = "answer notifications"
    due_field = "answered_at"

    def waiting(self):
        """Return the answered submissions whose authors want to be notified and were not."""
        return (
            Submission.objects.answered()
            .filter(notified_at=None, author__notify_on_response=True, author__is_active=True)
            .exclude(author__email="")
            .select_related("author")
        )

    def recipient(self, submission):
        return submission.author

    def context(self, submission):
        return {"submission": submission}

    def mark_sent(self, submission):
        Submission.objects.filter(pk=submission.pk).update(notified_at=timezone.now())

    def unsubscribe(self, recipient):
        User.objects.filter(pk=recipient.pk).update(notify_on_response=False)
