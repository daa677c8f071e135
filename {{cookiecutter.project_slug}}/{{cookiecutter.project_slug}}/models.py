"""People, what they post, and the record of the e-mail that they get."""

from django.contrib.auth.models import AbstractUser
from django.contrib.auth.models import UserManager as BaseUserManager
from django.db import models
from django.db.models import Q
from django.urls import reverse
from django.utils import timezone
from django.utils.text import Truncator

MODERATORS = "moderators"


class UserQuerySet(models.QuerySet):
    def moderators(self):
        """Active people who moderate and can be written to."""
        moderates = Q(is_superuser=True) | Q(groups__name=MODERATORS)
        return self.filter(moderates, is_active=True).exclude(email="").distinct()

    def with_digest(self, frequency):
        """Active people who want a digest that often and can be written to."""
        return self.filter(digest_frequency=frequency, is_active=True).exclude(email="")


class UserManager(BaseUserManager.from_queryset(UserQuerySet)):
    use_in_migrations = False


class User(AbstractUser):
    """Somebody who posts submissions, or moderates them."""

    class DigestFrequency(models.TextChoices):
        OFF = "off", "Never"
        DAILY = "daily", "Every day"
        WEEKLY = "weekly", "Every week"

    digest_frequency = models.CharField(
        max_length=6,
        choices=DigestFrequency,
        default=DigestFrequency.WEEKLY,
        help_text="How often to send the answers to one's submissions in one e-mail.",
    )
    notify_on_response = models.BooleanField(
        "response notifications",
        default=True,
        help_text="Send an e-mail at once when a submission is answered.",
    )

    objects = UserManager()


class SubmissionQuerySet(models.QuerySet):
    def pending(self):
        """What no moderator has decided on."""
        return self.filter(
            approved_at__isnull=True,
            flagged_at__isnull=True,
            archived_at__isnull=True,
            answered_at__isnull=True,
        )

    def flagged(self):
        """What needs a second look."""
        return self.filter(flagged_at__isnull=False, archived_at__isnull=True)

    def approved(self):
        """What everybody may read, whether or not it is still current."""
        return self.filter(approved_at__isnull=False)

    def archived(self):
        """What is put away, by a moderator or because it expired."""
        return self.filter(Q(archived_at__isnull=False) | Q(expires_at__lte=timezone.now()))

    def current(self):
        """What is neither archived nor expired."""
        return self.filter(
            Q(expires_at__isnull=True) | Q(expires_at__gt=timezone.now()), archived_at__isnull=True
        )

    def visible(self):
        """What everybody finds in the list: approved and current."""
        return self.approved().current()

    def readable_by(self, user):
        """What this person may read: what is approved, and their own."""
        if user.is_anonymous:
            return self.approved()
        return self.filter(Q(approved_at__isnull=False) | Q(author=user))

    def answered(self):
        """What a moderator has answered."""
        return self.filter(answered_at__isnull=False)

    def answered_between(self, start, end):
        """What was answered from ``start`` up to, and without, ``end``."""
        return self.filter(answered_at__gte=start, answered_at__lt=end)

    def approve(self):
        """Let everybody read these; return how many there are."""
        return self.update(approved_at=timezone.now(), flagged_at=None, archived_at=None)

    def flag(self):
        """Mark these for a second look, and hide them; return how many there are."""
        return self.update(flagged_at=timezone.now(), approved_at=None)

    def archive(self):
        """Take these off the list; return how many there are."""
        return self.update(archived_at=timezone.now())


class Submission(models.Model):
    """Something that a person posted, and what the moderators did with it."""

    STATUSES = ("pending", "flagged", "approved", "answered", "archived")

    author = models.ForeignKey(User, on_delete=models.CASCADE, related_name="submissions")
    body = models.TextField(max_length=5000)
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField(
        null=True, blank=True, help_text="When to take it off the list; empty means never."
    )

    approved_at = models.DateTimeField(null=True, blank=True, editable=False)
    flagged_at = models.DateTimeField(null=True, blank=True, editable=False)
    archived_at = models.DateTimeField(null=True, blank=True, editable=False)

    response = models.TextField(blank=True, max_length=5000)
    answered_at = models.DateTimeField(null=True, blank=True, editable=False)
    answered_by = models.ForeignKey(
        User, on_delete=models.SET_NULL, null=True, editable=False, related_name="answers"
    )
    notified_at = models.DateTimeField(
        null=True, editable=False, help_text="When the author was told of the answer."
    )

    objects = SubmissionQuerySet.as_manager()

    class Meta:
        ordering = ["-created_at"]
        indexes = [
            models.Index(fields=["author", "answered_at"], name="submission_answers"),
            models.Index(fields=["answered_at"], name="submission_answered"),
            models.Index(fields=["-created_at"], name="submission_newest"),
        ]

    def __str__(self):
        return Truncator(self.body).chars(60)

    @property
    def status(self):
        """What has become of it: one of ``STATUSES``."""
        expired = self.expires_at is not None and self.expires_at <= timezone.now()
        if self.archived_at or expired:
            return "archived"
        for status in ("flagged", "approved", "answered"):
            if getattr(self, f"{status}_at"):
                return status
        return "pending"

    def answer(self, response, moderator):
        """Give the answer, or mend it, and save; the author is told of the first one."""
        self.response = response
        first = self.answered_at is None
        if first:
            self.answered_at = timezone.now()
            self.answered_by = moderator
        self.save()
        if first and self.author.notify_on_response:
            from .tasks import notify_author

            notify_author.delay_on_commit(self.pk)

    def get_admin_url(self):
        return reverse(f"admin:{self._meta.app_label}_submission_change", args=[self.pk])


class DigestRun(models.Model):
    """That a digest is due for a period; finished once every recipient has a delivery."""

    digest = models.CharField(max_length=20)
    period_start = models.DateTimeField()
    period_end = models.DateTimeField()
    queued_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField(null=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["digest", "period_start"], name="one_run_per_period"),
        ]

    def __str__(self):
        return f"{self.digest} {self.period_start:%Y-%m-%d %H:%M}"


class DigestDelivery(models.Model):
    """That a recipient got the digest for a period, or why not."""

    class Status(models.TextChoices):
        SENT = "sent", "Sent"
        FAILED = "failed", "Failed"

    digest = models.CharField(max_length=20)
    # No index of its own: that of the constraint begins with it.
    recipient = models.ForeignKey(
        User, on_delete=models.CASCADE, related_name="deliveries", db_index=False
    )
    period_start = models.DateTimeField()
    status = models.CharField(max_length=6, choices=Status)
    reason = models.CharField(max_length=500, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["-created_at"]
        verbose_name_plural = "digest deliveries"
        constraints = [
            models.UniqueConstraint(
                fields=["recipient", "digest", "period_start"], name="one_delivery_per_period"
            ),
        ]

    def __str__(self):
        return f"{self.digest} {self.period_start:%Y-%m-%d %H:%M} to {self.recipient}"
