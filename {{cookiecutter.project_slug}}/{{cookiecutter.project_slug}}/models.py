"""Users and their submissions."""

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
        """Return active moderators and superusers with an e-mail address."""
        moderates = Q(is_superuser=True) | Q(groups__name=MODERATORS)
        return self.filter(moderates, is_active=True).exclude(email="").distinct()

    def with_digest(self, frequency):
        """Return active users with this digest frequency and an e-mail address."""
        return self.filter(digest_frequency=frequency, is_active=True).exclude(email="")


class UserManager(BaseUserManager.from_queryset(UserQuerySet)):
    use_in_migrations = False


class User(AbstractUser):
    """A person who posts submissions or moderates them."""

    class DigestFrequency(models.TextChoices):
        OFF = "off", "Never"
        DAILY = "daily", "Every day"
        WEEKLY = "weekly", "Every week"

    digest_frequency = models.CharField(
        max_length=6,
        choices=DigestFrequency,
        default=DigestFrequency.WEEKLY,
        help_text="How often to send an e-mail with the answers to this user's submissions.",
    )
    notify_on_response = models.BooleanField(
        "response notifications",
        default=True,
        help_text="Send an e-mail as soon as a submission is answered.",
    )

    objects = UserManager()


class SubmissionQuerySet(models.QuerySet):
    def pending(self):
        """Return submissions that no moderator has decided on."""
        return self.filter(
            approved_at__isnull=True,
            flagged_at__isnull=True,
            archived_at__isnull=True,
            answered_at__isnull=True,
        )

    def flagged(self):
        """Return submissions that need a second look."""
        return self.filter(flagged_at__isnull=False, archived_at__isnull=True)

    def approved(self):
        """Return public submissions, whether or not they are still current."""
        return self.filter(approved_at__isnull=False)

    def archived(self):
        """Return submissions that a moderator archived or that have expired."""
        return self.filter(Q(archived_at__isnull=False) | Q(expires_at__lte=timezone.now()))

    def current(self):
        """Return submissions that are neither archived nor expired."""
        return self.filter(
            Q(expires_at__isnull=True) | Q(expires_at__gt=timezone.now()), archived_at__isnull=True
        )

    def visible(self):
        """Return the submissions of the public list: approved and current."""
        return self.approved().current()

    def readable_by(self, user):
        """Return the submissions that a user may read: approved ones and their own."""
        if user.is_anonymous:
            return self.approved()
        return self.filter(Q(approved_at__isnull=False) | Q(author=user))

    def answered(self):
        """Return submissions that a moderator has answered."""
        return self.filter(answered_at__isnull=False)

    def answered_between(self, start, end):
        """Return submissions answered from ``start`` (included) to ``end`` (excluded)."""
        return self.filter(answered_at__gte=start, answered_at__lt=end)

    def approve(self):
        """Make these public; return how many."""
        return self.update(approved_at=timezone.now(), flagged_at=None, archived_at=None)

    def flag(self):
        """Hide these and mark them for a second look; return how many."""
        return self.update(flagged_at=timezone.now(), approved_at=None)

    def archive(self):
        """Remove these from the list; return how many."""
        return self.update(archived_at=timezone.now())


class Submission(models.Model):
    """A text that a user posted, with the decisions of the moderators."""

    STATUSES = ("pending", "flagged", "approved", "answered", "archived")

    author = models.ForeignKey(User, on_delete=models.CASCADE, related_name="submissions")
    body = models.TextField(max_length=5000)
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField(
        null=True, blank=True, help_text="When to remove it from the list; leave empty for never."
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
        null=True, editable=False, help_text="When the author was notified of the answer."
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
        """One of ``STATUSES``."""
        expired = self.expires_at is not None and self.expires_at <= timezone.now()
        if self.archived_at or expired:
            return "archived"
        for status in ("flagged", "approved", "answered"):
            if getattr(self, f"{status}_at"):
                return status
        return "pending"

    def answer(self, response, moderator):
        """Save the answer, or a correction of it; return whether it is the first one."""
        first = self.answered_at is None
        self.response = response
        if first:
            self.answered_at = timezone.now()
            self.answered_by = moderator
        self.save()
        return first

    def get_admin_url(self):
        return reverse(f"admin:{self._meta.app_label}_submission_change", args=[self.pk])
