"""The first schedules of the service. An administrator can change them in the admin."""

from django.db import migrations

from ..ops.schedules import CreateSchedule


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
