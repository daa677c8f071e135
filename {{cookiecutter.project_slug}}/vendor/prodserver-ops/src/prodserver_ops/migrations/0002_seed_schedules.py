"""The schedules that resume interrupted deliveries and delete old records."""

from datetime import timedelta

from django.db import migrations

from ..scheduling.operations import CreateSchedule


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
        CreateSchedule("records-delete", task="ops.delete_records", interval=timedelta(hours=1)),
    ]
