import django.db.models.functions.datetime
from django.db import migrations, models


class Migration(migrations.Migration):
    """Add the problems that administrators are told of."""

    dependencies = [("ops", "0005_schedule_timing")]

    operations = [
        migrations.CreateModel(
            name="Alert",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("key", models.CharField(max_length=300, unique=True)),
                ("message", models.CharField(blank=True, max_length=500)),
                (
                    "since",
                    models.DateTimeField(db_default=django.db.models.functions.datetime.Now()),
                ),
                ("is_confirmed", models.BooleanField(default=False)),
                ("misses", models.PositiveIntegerField(default=0)),
                ("emailed_at", models.DateTimeField(null=True)),
                ("posted_at", models.DateTimeField(null=True)),
            ],
        ),
    ]
