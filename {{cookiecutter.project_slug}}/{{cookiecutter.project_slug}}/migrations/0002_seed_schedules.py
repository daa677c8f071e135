"""The service's first schedules, in the database for an administrator to change."""

from django.db import migrations

from ..schedules import CreateSchedule


class Migration(migrations.Migration):
    dependencies = [
        ("{{ cookiecutter.project_slug }}", "0001_initial"),
        ("django_celery_beat", "0019_alter_periodictasks_options"),
    ]

    operations = [
        CreateSchedule(
            "moderator-digest-hourly",
            task="{{ cookiecutter.project_slug }}.tasks.send_moderator_digest",
            crontab="0 * * * *",
            timezone="{{ cookiecutter.timezone }}",
        ),
        CreateSchedule(
            "user-digest-daily",
            task="{{ cookiecutter.project_slug }}.tasks.send_user_digest",
            crontab="0 8 * * *",
            timezone="{{ cookiecutter.timezone }}",
            args=["daily"],
        ),
        CreateSchedule(
            "user-digest-weekly",
            task="{{ cookiecutter.project_slug }}.tasks.send_user_digest",
            crontab="0 8 * * 1",
            timezone="{{ cookiecutter.timezone }}",
            args=["weekly"],
        ),
    ]
