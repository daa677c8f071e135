"""The tasks of the service. Schedules run them; the README shows how to add one."""

from .ops.tasks import digest_task


@digest_task
def send_moderator_digest():
    """Send what waits for a decision to all moderators, if something is new."""
    return "moderator"


@digest_task
def send_user_digest(frequency):
    """Send the answers of the last period to the authors; frequency is daily or weekly."""
    return frequency
