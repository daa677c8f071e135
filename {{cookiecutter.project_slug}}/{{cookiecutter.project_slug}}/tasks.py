"""The tasks that schedules run, and those that they queue. Each may run twice without harm."""

from celery import shared_task

from . import deliveries
from .models import DigestRun

#: E-mail is tried again after 1, 2, 4 ... minutes, nine times within four hours in all.
PERSISTENT = {
    "bind": True,
    "autoretry_for": (Exception,),
    "max_retries": 8,
    "retry_backoff": 60,
    "retry_backoff_max": 2 * 60 * 60,
    "retry_jitter": False,
}

#: How long to wait for another process that sends the same, in seconds.
BUSY = 10


@shared_task(bind=True)
def send_moderator_digest(self):
    """Send every moderator what waits for a decision, if something is new."""
    deliveries.start("moderator", self.queued_at)


@shared_task(bind=True)
def send_user_digest(self, frequency):
    """Send people the answers of their last period; ``frequency`` is daily or weekly."""
    deliveries.start(frequency, self.queued_at)


#: Which digest a scheduled task sends, by its name and arguments.
DIGEST_TASKS = {
    send_moderator_digest.name: lambda: "moderator",
    send_user_digest.name: lambda frequency: frequency,
}


@shared_task(**PERSISTENT)
def send_digest_chunk(self, run_pk, chunk):
    """Send a digest to the recipients of one chunk."""
    try:
        deliveries.send_chunk(DigestRun.objects.get(pk=run_pk), chunk, is_last_try(self))
    except deliveries.Busy:
        come_back(self)


@shared_task(**PERSISTENT)
def notify_author(self, submission_pk):
    """Tell the author of a submission that it was answered."""
    try:
        deliveries.notify(submission_pk, is_last_try(self))
    except deliveries.Busy:
        come_back(self)


@shared_task
def resume_deliveries():
    """Queue again what a crash or an absent broker left undone."""
    deliveries.resume()


def is_last_try(task):
    return task.request.retries >= task.max_retries


def come_back(task):
    """Queue the task again for later, without counting that as a try."""
    request = task.request
    task.apply_async(request.args, request.kwargs, countdown=BUSY, retries=request.retries)
