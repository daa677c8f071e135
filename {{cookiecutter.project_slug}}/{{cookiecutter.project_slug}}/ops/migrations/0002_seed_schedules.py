"""The schedule that resumes interrupted deliveries."""

from datetime import timedelta

from django.db import migrations

from ..schedules import CreateSchedule


class Migration(migrations.Migration):
    dependencies = [
        ("ops", "0001_initial"),
        ("django_celery_beat", "0019_alter_periodictasks_options"),
    ]

    operations = [
        CreateSchedule(
            "deliveries-resume",
            task="ops.resume_deliveries",
            interval=timedelta(minutes=1),
        ),
    ]
