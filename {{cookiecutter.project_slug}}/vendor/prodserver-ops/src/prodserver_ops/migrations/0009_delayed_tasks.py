from django.db import migrations, models
from django.db.models import Q
from django.db.models.functions import Now


class Migration(migrations.Migration):
    dependencies = [("ops", "0008_continuations")]

    operations = [
        migrations.CreateModel(
            name="DelayedTask",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("key", models.CharField(max_length=64, unique=True)),
                ("task_id", models.CharField(max_length=64)),
                ("name", models.CharField(max_length=200)),
                ("queue", models.CharField(max_length=255)),
                ("message", models.TextField()),
                ("due_at", models.DateTimeField()),
                ("created_at", models.DateTimeField(db_default=Now())),
                ("attempts", models.PositiveIntegerField(default=0)),
                ("claimed_at", models.DateTimeField(null=True)),
                ("published_at", models.DateTimeField(null=True)),
                ("started_by", models.IntegerField(null=True)),
            ],
            options={
                "indexes": [
                    models.Index(fields=["task_id"], name="delayed_task_id"),
                    models.Index(
                        fields=["due_at"], name="delayed_waiting", condition=Q(published_at=None)
                    ),
                ],
            },
        ),
    ]
