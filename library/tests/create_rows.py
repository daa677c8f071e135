"""Put the rows of ``random_rows.py`` into the database, in an environment without hypothesis."""

import json

from django_celery_beat import models


def create(rows):
    """Create schedules from such rows, as a program could, and not the form."""
    kinds = {
        "crontab": models.CrontabSchedule,
        "interval": models.IntervalSchedule,
        "solar": models.SolarSchedule,
        "clocked": models.ClockedSchedule,
    }
    made = [dict(row) for row in rows]
    dates = [row.pop("date_changed", None) for row in made]
    for kind, model in kinds.items():
        values = {
            json.dumps(row[kind], sort_keys=True): model(**row[kind]) for row in made if kind in row
        }
        model.objects.bulk_create(values.values())
        for row in made:
            if kind in row:
                row[kind] = values[json.dumps(row[kind], sort_keys=True)]
    created = models.PeriodicTask.objects.bulk_create(models.PeriodicTask(**row) for row in made)
    for row, date in zip(created, dates, strict=True):
        if date is not None:
            row.date_changed = date
    models.PeriodicTask.objects.bulk_update(created, ["date_changed"], batch_size=500)
    return created
