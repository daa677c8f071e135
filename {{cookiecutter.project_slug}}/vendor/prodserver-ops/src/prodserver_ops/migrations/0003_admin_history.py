from django.db import migrations


class Migration(migrations.Migration):
    """Nothing any more: core/history.py creates these indexes, also for an admin added later."""

    dependencies = [
        ("ops", "0002_seed_schedules"),
    ]

    operations = []
