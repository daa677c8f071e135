from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("ops", "0009_delayed_tasks")]

    operations = [
        migrations.CreateModel(
            name="Origin",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("identity", models.CharField(blank=True, max_length=50)),
                ("timeline", models.CharField(blank=True, max_length=8)),
                ("seen_at", models.DateTimeField()),
                ("restored_at", models.DateTimeField(null=True)),
            ],
        ),
    ]
