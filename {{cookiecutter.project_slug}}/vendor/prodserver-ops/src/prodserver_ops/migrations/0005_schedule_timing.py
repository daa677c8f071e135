import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):
    """Let several beats work at the same time, and note since when a schedule has its timing."""

    dependencies = [
        ("django_celery_beat", "0019_alter_periodictasks_options"),
        ("ops", "0004_task_runs"),
    ]

    operations = [
        migrations.CreateModel(
            name="ScheduleTiming",
            fields=[
                (
                    "schedule",
                    models.OneToOneField(
                        on_delete=django.db.models.deletion.CASCADE,
                        primary_key=True,
                        related_name="ops_timing",
                        serialize=False,
                        to="django_celery_beat.periodictask",
                    ),
                ),
                ("signature", models.CharField(blank=True, max_length=32)),
                ("date_changed", models.DateTimeField()),
                ("since", models.DateTimeField()),
            ],
        ),
        migrations.AddField("schedulerun", "claimed_at", models.DateTimeField(null=True)),
        migrations.AddField("schedulerun", "finished_at", models.DateTimeField(null=True)),
    ]
