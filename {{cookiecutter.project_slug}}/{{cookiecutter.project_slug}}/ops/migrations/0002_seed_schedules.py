"""A schedule that finds what a crash or an absent broker left undone."""

from datetime import timedelta

from django.db import migrations

from ..schedules import CreateSchedule


class Migration(migrations.Migration):
    dependencies = [("{{ cookiecutter.project_slug }}", "0003_moderators")]

    operations = [
        CreateSchedule(
            "deliveries-resume",
            task="{{ cookiecutter.project_slug }}.tasks.resume_deliveries",
            interval=timedelta(minutes=1),
        ),
    ]
