from django.db import migrations, models


class Migration(migrations.Migration):
    """Record the id of the request that a task run belongs to."""

    dependencies = [("ops", "0006_alerts")]

    operations = [
        migrations.AddField(
            model_name="taskrun",
            name="request_id",
            field=models.CharField(blank=True, db_default="", default="", max_length=128),
        ),
    ]
