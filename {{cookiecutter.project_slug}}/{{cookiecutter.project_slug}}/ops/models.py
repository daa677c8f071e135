"""Tokens of the API, and the record of digests: which are due, and who received them."""

from django.conf import settings
from django.db import models
from django.db.models import Q


class Token(models.Model):
    """A token of the API; see ``tokens.py``. The row has a hash of it only."""

    user = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="api_tokens"
    )
    digest = models.CharField(max_length=64)
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField()

    class Meta:
        verbose_name = "API token"

    def __str__(self) -> str:
        return f"API token {self.pk} of {self.user}"


class DigestRun(models.Model):
    """A digest that is due for a period; finished once each recipient has a delivery."""

    digest = models.CharField(max_length=50)
    period_start = models.DateTimeField()
    period_end = models.DateTimeField()
    queued_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField(null=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["digest", "period_start"], name="one_run_per_period"),
        ]

    def __str__(self) -> str:
        return f"{self.digest} {self.period_start:%Y-%m-%d %H:%M}"

    def previous(self) -> "DigestRun | None":
        """Return the last run of the same digest for an earlier period, or None."""
        runs = DigestRun.objects.filter(digest=self.digest, period_start__lt=self.period_start)
        return runs.order_by("period_start").last()


class DigestDelivery(models.Model):
    """A recipient received the digest for a period, or the reason why not."""

    class Status(models.TextChoices):
        SENT = "sent", "Sent"
        FAILED = "failed", "Failed"

    digest = models.CharField(max_length=50)
    # The unique constraint's index starts with this field, so it needs none of its own.
    recipient = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        on_delete=models.CASCADE,
        related_name="digest_deliveries",
        db_index=False,
    )
    period_start = models.DateTimeField()
    status = models.CharField(max_length=6, choices=Status)
    reason = models.CharField(max_length=500, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["-pk"]
        verbose_name_plural = "digest deliveries"
        constraints = [
            models.UniqueConstraint(
                fields=["recipient", "digest", "period_start"], name="one_delivery_per_period"
            ),
        ]
        indexes = [
            models.Index(fields=["digest", "-id"], name="delivery_digest"),
            models.Index(fields=["-id"], name="delivery_failed", condition=Q(status="failed")),
        ]

    def __str__(self) -> str:
        return f"{self.digest} {self.period_start:%Y-%m-%d %H:%M} to {self.recipient}"


class Attempt(models.Model):
    """An e-mail that the mail server refused for now, or may have accepted without a reply.

    ``message_id`` is the local part of its Message-ID. The row is deleted once the e-mail is
    sent or has failed for good.
    """

    message_id = models.CharField(max_length=150, unique=True)
    refusals = models.PositiveSmallIntegerField(default=0)
    unknown = models.PositiveSmallIntegerField(default=0)
    next_at = models.DateTimeField()
    reason = models.CharField(max_length=500, blank=True)

    def __str__(self) -> str:
        return self.message_id
