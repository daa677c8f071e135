from django.db import migrations


class Migration(migrations.Migration):
    """Index the admin's history, which has an entry for each action on each object."""

    dependencies = [
        ("admin", "0003_logentry_add_action_flag_choices"),
        ("ops", "0002_seed_schedules"),
    ]

    operations = [
        migrations.RunSQL(
            "CREATE INDEX history_of_object ON django_admin_log (object_id, content_type_id)",
            "DROP INDEX history_of_object",
        ),
        migrations.RunSQL(
            "CREATE INDEX history_of_user ON django_admin_log (user_id, action_time)",
            "DROP INDEX history_of_user",
        ),
    ]
