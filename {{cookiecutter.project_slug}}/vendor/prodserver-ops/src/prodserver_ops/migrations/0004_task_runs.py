import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):
    """Add the record of task runs."""

    dependencies = [
        ("django_celery_beat", "0019_alter_periodictasks_options"),
        ("ops", "0003_admin_history"),
    ]

    operations = [
        migrations.CreateModel(
            name="TaskRun",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("task_id", models.CharField(max_length=64)),
                ("name", models.CharField(max_length=200)),
                ("arguments", models.CharField(blank=True, max_length=1000)),
                ("queued_at", models.DateTimeField(null=True)),
                ("started_at", models.DateTimeField()),
                ("duration", models.FloatField(help_text="In seconds.", null=True)),
                (
                    "status",
                    models.CharField(
                        choices=[
                            ("running", "Running"),
                            ("succeeded", "Succeeded"),
                            ("failed", "Failed"),
                            ("retried", "Will be tried again"),
                        ],
                        default="running",
                        max_length=9,
                    ),
                ),
                ("error", models.CharField(blank=True, max_length=500)),
                ("host", models.CharField(max_length=255)),
                ("repeated_at", models.DateTimeField(null=True)),
                (
                    "schedule",
                    models.ForeignKey(
                        db_constraint=False,
                        db_index=False,
                        null=True,
                        on_delete=django.db.models.deletion.DO_NOTHING,
                        related_name="+",
                        to="django_celery_beat.periodictask",
                    ),
                ),
            ],
            options={
                "indexes": [
                    models.Index(fields=["schedule", "-id"], name="task_run_schedule"),
                    models.Index(fields=["started_at"], name="task_run_started"),
                    models.Index(
                        condition=models.Q(("status__in", ["running", "failed"])),
                        fields=["-id"],
                        name="task_run_unfinished",
                    ),
                ],
            },
        ),
    ]
