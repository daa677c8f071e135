from datetime import timedelta

import django.db.models.functions.datetime
from django.db import migrations, models

from ..scheduling.operations import CreateSchedule


class Migration(migrations.Migration):
    """Add the runs of resumable tasks, and the schedule that queues lost ones again."""

    dependencies = [
        ("ops", "0007_request_id"),
        ("django_celery_beat", "0019_alter_periodictasks_options"),
    ]

    operations = [
        migrations.CreateModel(
            name="ResumableRun",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("task_id", models.CharField(max_length=255, unique=True)),
                ("name", models.CharField(max_length=200)),
                ("arguments", models.TextField()),
                ("options", models.TextField()),
                ("cursor", models.TextField(default="null")),
                ("result", models.TextField(default="null")),
                ("steps", models.PositiveBigIntegerField(default=0)),
                ("total", models.PositiveBigIntegerField(null=True)),
                ("number", models.PositiveIntegerField(default=0)),
                ("claim", models.PositiveIntegerField(default=0)),
                ("attempts", models.PositiveIntegerField(default=0)),
                (
                    "status",
                    models.CharField(
                        choices=[
                            ("waiting", "Waiting"),
                            ("running", "Running"),
                            ("failed", "Failed"),
                            ("finished", "Finished"),
                        ],
                        default="waiting",
                        max_length=8,
                    ),
                ),
                ("error", models.CharField(blank=True, max_length=500)),
                (
                    "created_at",
                    models.DateTimeField(db_default=django.db.models.functions.datetime.Now()),
                ),
                (
                    "updated_at",
                    models.DateTimeField(db_default=django.db.models.functions.datetime.Now()),
                ),
            ],
            options={
                "indexes": [
                    models.Index(
                        condition=models.Q(("status__in", ["waiting", "running", "failed"])),
                        fields=["updated_at"],
                        name="resumable_run_unfinished",
                    ),
                ],
            },
        ),
        CreateSchedule("tasks-resume", task="ops.resume_tasks", interval=timedelta(minutes=1)),
    ]
