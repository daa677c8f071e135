"""The models of the app ``ops``: API tokens, e-mail deliveries, heartbeats, runs, and alerts."""

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.db.models.functions import Now
from django_celery_beat.models import PeriodicTask

#: The age from which the process of a heartbeat counts as lost, in seconds.
HEARTBEAT_AGE = 60


class Token(models.Model):
    """An API token; see ``api/tokens.py``. Only a hash of it is stored."""

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
    """A digest for a period. It is finished when each recipient has a delivery.

    The digest and the end of the period identify a run; its start may be earlier than usual.
    """

    digest = models.CharField(max_length=50)
    period_start = models.DateTimeField()
    period_end = models.DateTimeField()
    queued_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField(null=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["digest", "period_end"], name="one_run_per_period"),
        ]

    def __str__(self) -> str:
        return f"{self.digest} until {self.period_end:%Y-%m-%d %H:%M}"

    def previous(self) -> "DigestRun | None":
        """Return the last run of the same digest for an earlier period, or None."""
        runs = DigestRun.objects.filter(digest=self.digest, period_end__lt=self.period_end)
        return runs.order_by("period_end").last()


class DigestDelivery(models.Model):
    """The delivery of a digest for a period to a recipient, or the reason why it failed.

    The row is created before the e-mail is sent.
    """

    class Status(models.TextChoices):
        SENDING = "sending", "Being sent"
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
    period_end = models.DateTimeField()
    status = models.CharField(max_length=7, choices=Status)
    reason = models.CharField(max_length=500, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["-pk"]
        verbose_name_plural = "digest deliveries"
        constraints = [
            models.UniqueConstraint(
                fields=["recipient", "digest", "period_end"], name="one_delivery_per_period"
            ),
        ]
        indexes = [
            models.Index(fields=["digest", "-id"], name="delivery_digest"),
            models.Index(fields=["-id"], name="delivery_failed", condition=Q(status="failed")),
        ]

    def __str__(self) -> str:
        return f"{self.digest} until {self.period_end:%Y-%m-%d %H:%M} to {self.recipient}"


class Attempt(models.Model):
    """An e-mail that was requested, refused or maybe accepted; see ``mail/attempts.py``.

    ``message_id`` is the local part of its Message-ID. The row is deleted once the e-mail is
    sent or given up.
    """

    message_id = models.CharField(max_length=150, unique=True)
    refusals = models.PositiveSmallIntegerField(default=0)
    rejected = models.BooleanField(default=False)
    unknown = models.PositiveSmallIntegerField(default=0)
    next_at = models.DateTimeField()
    reason = models.CharField(max_length=500, blank=True)

    def __str__(self) -> str:
        return self.message_id


class Lease(models.Model):
    """The lease of the beat of release 1.x, which may run during a deploy."""

    name = models.CharField(max_length=50, unique=True)
    number = models.BigIntegerField(default=0)
    holder = models.CharField(max_length=500, blank=True)
    renewed_at = models.DateTimeField(null=True)

    def __str__(self) -> str:
        return f"{self.name} {self.number}"


class Heartbeat(models.Model):
    """When a process was last known to be running; see ``scheduling/heartbeats.py``."""

    process = models.CharField(max_length=20)
    host = models.CharField(max_length=255)
    pid = models.PositiveIntegerField()
    seen_at = models.DateTimeField()

    #: Age in seconds; set by ``get_heartbeats()`` in ``scheduling/heartbeats.py``.
    age: float

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["process", "host", "pid"], name="one_heartbeat_per_process"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.process} {self.pid} on {self.host}"

    @property
    def is_alive(self) -> bool:
        """Whether the process is running."""
        return self.age < HEARTBEAT_AGE


class ScheduleTiming(models.Model):
    """Since when a schedule has its present timing; see ``scheduling/timing.py``.

    ``signature`` is empty while the schedule is disabled, and ``date_changed`` is that of the
    schedule when the row was stored.
    """

    schedule = models.OneToOneField(
        PeriodicTask, on_delete=models.CASCADE, primary_key=True, related_name="ops_timing"
    )
    signature = models.CharField(max_length=32, blank=True)
    date_changed = models.DateTimeField()
    since = models.DateTimeField()

    def __str__(self) -> str:
        return f"{self.schedule_id} since {self.since:%Y-%m-%d %H:%M:%S}"


class ScheduleRun(models.Model):
    """A run of a schedule: when it was due, queued and started; see ``scheduling/scheduler.py``.

    A beat claims it before it publishes it, and each claim is an attempt. ``started_by`` is the
    number of the attempt whose message a worker has started. ``finished_at`` is stored for tasks
    that must not overlap.
    """

    schedule = models.ForeignKey(
        PeriodicTask, on_delete=models.CASCADE, related_name="+", db_index=False
    )
    due_at = models.DateTimeField()
    created_at = models.DateTimeField(db_default=Now())
    attempts = models.PositiveIntegerField(default=0)
    claimed_at = models.DateTimeField(null=True)
    published_at = models.DateTimeField(null=True)
    started_by = models.PositiveIntegerField(null=True)
    started_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField(null=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["schedule", "due_at"], name="one_run_per_due_time"),
        ]
        indexes = [
            models.Index(fields=["due_at"], name="run_due"),
            models.Index(
                fields=["schedule"], name="run_unpublished", condition=Q(published_at=None)
            ),
        ]

    def __str__(self) -> str:
        return f"{self.schedule.name} {self.due_at:%Y-%m-%d %H:%M:%S}"


class DelayedTask(models.Model):
    """A task that is not due yet; see ``worker/delayed.py``.

    ``key`` identifies the message, which a broker may deliver again. A worker claims the row before
    it publishes the message, and each claim is an attempt. ``started_by`` is the number of the
    attempt whose message a worker has started: 0 if the broker delivered it, -1 if the task was
    cancelled.
    """

    DELIVERED = 0
    CANCELLED = -1

    key = models.CharField(max_length=64, unique=True)
    task_id = models.CharField(max_length=64)
    name = models.CharField(max_length=200)
    queue = models.CharField(max_length=255)
    message = models.TextField()
    due_at = models.DateTimeField()
    created_at = models.DateTimeField(db_default=Now())
    attempts = models.PositiveIntegerField(default=0)
    claimed_at = models.DateTimeField(null=True)
    published_at = models.DateTimeField(null=True)
    started_by = models.IntegerField(null=True)

    class Meta:
        indexes = [
            models.Index(fields=["task_id"], name="delayed_task_id"),
            models.Index(fields=["due_at"], name="delayed_waiting", condition=Q(published_at=None)),
        ]

    def __str__(self) -> str:
        return f"{self.name} {self.due_at:%Y-%m-%d %H:%M:%S}"


class TaskRun(models.Model):
    """A run of a task; see ``worker/record.py``.

    ``arguments`` is JSON: a list of the positional arguments and an object of the keyword arguments;
    it is empty if they were too long, for example. ``request_id`` is the X-Request-ID of the request
    that queued the task, or that queued the task which queued it.
    """

    class Status(models.TextChoices):
        RUNNING = "running", "Running"
        SUCCEEDED = "succeeded", "Succeeded"
        FAILED = "failed", "Failed"
        RETRIED = "retried", "Will be tried again"

    task_id = models.CharField(max_length=64)
    name = models.CharField(max_length=200)
    arguments = models.CharField(max_length=1000, blank=True)
    schedule = models.ForeignKey(
        PeriodicTask,
        on_delete=models.DO_NOTHING,
        null=True,
        related_name="+",
        db_index=False,
        db_constraint=False,
    )
    queued_at = models.DateTimeField(null=True)
    started_at = models.DateTimeField()
    duration = models.FloatField(null=True, help_text="In seconds.")
    status = models.CharField(max_length=9, choices=Status, default=Status.RUNNING)
    error = models.CharField(max_length=500, blank=True)
    host = models.CharField(max_length=255)
    request_id = models.CharField(max_length=128, blank=True, default="", db_default="")
    repeated_at = models.DateTimeField(null=True)

    class Meta:
        indexes = [
            models.Index(fields=["schedule", "-id"], name="task_run_schedule"),
            models.Index(fields=["started_at"], name="task_run_started"),
            models.Index(
                fields=["-id"],
                name="task_run_unfinished",
                condition=Q(status__in=["running", "failed"]),
            ),
        ]

    def __str__(self) -> str:
        return f"{self.name} {self.started_at:%Y-%m-%d %H:%M:%S}"


class ResumableRun(models.Model):
    """A run of a resumable task, from its first step to its last; see ``worker/continuations.py``.

    ``arguments``, ``options``, ``cursor`` and ``result`` are JSON; ``options`` are those of the
    message. Each message of the task has a higher ``number``, and each delivery a higher ``claim``.
    ``attempts`` is the number of deliveries since the last step.
    """

    class Status(models.TextChoices):
        WAITING = "waiting", "Waiting"
        RUNNING = "running", "Running"
        FAILED = "failed", "Failed"
        FINISHED = "finished", "Finished"

    task_id = models.CharField(max_length=255, unique=True)
    name = models.CharField(max_length=200)
    arguments = models.TextField()
    options = models.TextField()
    cursor = models.TextField(default="null")
    result = models.TextField(default="null")
    steps = models.PositiveBigIntegerField(default=0)
    total = models.PositiveBigIntegerField(null=True)
    number = models.PositiveIntegerField(default=0)
    claim = models.PositiveIntegerField(default=0)
    attempts = models.PositiveIntegerField(default=0)
    status = models.CharField(max_length=8, choices=Status, default=Status.WAITING)
    error = models.CharField(max_length=500, blank=True)
    created_at = models.DateTimeField(db_default=Now())
    updated_at = models.DateTimeField(db_default=Now())

    class Meta:
        indexes = [
            models.Index(
                fields=["updated_at"],
                name="resumable_run_unfinished",
                condition=Q(status__in=["waiting", "running", "failed"]),
            ),
        ]

    def __str__(self) -> str:
        return f"{self.name} {self.created_at:%Y-%m-%d %H:%M:%S}"

    @property
    def percent(self) -> int | None:
        """How much is done; None if the total is unknown."""
        return min(100, self.steps * 100 // self.total) if self.total else None


class Origin(models.Model):
    """The database that wrote the rows of this one, in one row; see ``scheduling/restores.py``.

    ``seen_at`` is when it was last this one. ``restored_at`` is when it was found to be another one.
    """

    identity = models.CharField(max_length=50, blank=True)
    timeline = models.CharField(max_length=8, blank=True)
    seen_at = models.DateTimeField()
    restored_at = models.DateTimeField(null=True)

    def __str__(self) -> str:
        return f"{self.identity} {self.seen_at:%Y-%m-%d %H:%M:%S}"


class Alert(models.Model):
    """A problem that administrators are told of; see ``console/alerts.py``.

    ``misses`` is how many of the last checks did not find it.
    """

    key = models.CharField(max_length=300, unique=True)
    message = models.CharField(max_length=500, blank=True)
    since = models.DateTimeField(db_default=Now())
    is_confirmed = models.BooleanField(default=False)
    misses = models.PositiveIntegerField(default=0)
    emailed_at = models.DateTimeField(null=True)
    posted_at = models.DateTimeField(null=True)

    def __str__(self) -> str:
        return self.message
