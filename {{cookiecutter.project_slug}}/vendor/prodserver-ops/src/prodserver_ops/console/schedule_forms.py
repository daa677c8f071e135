"""The forms of schedules in the admin: they refuse what beat could not run."""

from datetime import timedelta
from functools import wraps
from hashlib import blake2b
from typing import Any

from celery import current_app
from django import forms
from django.contrib import messages
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils import timezone
from django_celery_beat import admin
from django_celery_beat.models import PeriodicTask
from kombu.exceptions import OperationalError

from ..scheduling import crontabs, timing, validation

#: The fields of a schedule that beat changes with each run.
COUNTED = {"last_run_at", "total_run_count", "date_changed"}

CHANGED = (
    "This schedule has changed since you opened it. Open it again, so that you do not undo that change."
)


#: The action of the list, before it is replaced.
run_all = admin.PeriodicTaskAdmin.run_tasks


class ScheduleForm(admin.PeriodicTaskForm):  # type: ignore[misc]
    """The form of a schedule; each problem is at the field that has it.

    ``opened`` is the state of the schedule when the form was opened. If another administrator, or beat,
    has changed it since then, saving would undo that change.
    """

    opened = forms.CharField(required=False, widget=forms.HiddenInput)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.instance.pk and "opened" in self.fields:
            self.fields["opened"].initial = get_state(self.instance)
        if "task" in self.fields:
            self.fields["task"].widget.attrs["class"] = "vTextField"  # As wide as names of tasks.

    def _clean_json(self, field: str) -> Any:
        # Read below: some JSON raises errors that the original does not expect.
        return self.cleaned_data[field]

    def clean_headers(self) -> str:
        """Return the headers; the model would store NULL for none, which the table refuses."""
        return self.cleaned_data["headers"] or "{}"

    def clean(self) -> Any:
        """Check the fields together; the original needs a value of the field ``task``."""
        self.cleaned_data.setdefault("task", "")
        return super().clean()

    def _post_clean(self) -> None:
        super()._post_clean()
        if self.has_changed_since():
            self.add_error(None, CHANGED)
        if self.errors:
            return
        current_app.loader.import_default_modules()
        for name, problem in validation.find_problems(self.instance).items():
            problem = f"{problem[:1].upper()}{problem[1:]}".rstrip(".")
            self.add_error(name if name in self.fields else None, f"{problem}.")
        self.check_expiry(self.instance)

    def has_changed_since(self) -> bool:
        """Return whether the schedule has changed since the form was opened."""
        opened = self.cleaned_data.get("opened")
        # Of two forms that are saved at the same time, the second waits here for the first.
        rows = PeriodicTask.objects.select_for_update().filter(pk=self.instance.pk)
        return bool(opened) and any(get_state(row) != opened for row in rows)

    def check_expiry(self, row: PeriodicTask) -> None:
        """Refuse an expiry after which no run is left: beat would disable the schedule."""
        if row.expires is None or not row.enabled:
            return
        if row.expires <= timezone.now():
            self.add_error("expires", "Is in the past.")
        elif row.start_time is not None and row.expires <= row.start_time:
            self.add_error("expires", "Is before the start.")


def get_state(row: PeriodicTask) -> str:
    """Return a text that changes with the fields of a schedule that the form can change."""
    names = [each.attname for each in row._meta.concrete_fields if each.name not in COUNTED]
    values = repr([str(getattr(row, name)) for name in names])
    return blake2b(values.encode(), digest_size=16).hexdigest()


class CrontabForm(forms.ModelForm):  # type: ignore[type-arg]
    """The form of a crontab; it refuses one that is never due."""

    def clean(self) -> dict[str, Any]:
        """Check the five fields together."""
        data = super().clean() or {}
        if not self.errors:
            try:
                crontabs.parse(*(data[name] for name in crontabs.FIELDS))
            except ValueError as error:
                raise forms.ValidationError(f"This crontab cannot be used: {error}.") from error
        return data


class IntervalForm(forms.ModelForm):  # type: ignore[type-arg]
    """The form of an interval; it refuses one that is too short or too long."""

    def clean(self) -> dict[str, Any]:
        """Check number and unit together."""
        data = super().clean() or {}
        if not self.errors:
            try:
                period = timedelta(**{data["period"]: data["every"]})
            except OverflowError as error:
                raise forms.ValidationError("The interval is too long.") from error
            if period < timing.MIN_PERIOD:
                raise forms.ValidationError("The interval must be at least a second.")
        return data


def get_fieldsets(self: Any, request: Any, obj: Any = None) -> Any:
    """Add the hidden field to the form of an existing schedule."""
    fieldsets = super(admin.PeriodicTaskAdmin, self).get_fieldsets(request, obj)
    if obj is None or not self.has_change_permission(request, obj):
        return fieldsets
    return [*fieldsets, (None, {"fields": ["opened"], "classes": ["hidden"]})]


@wraps(run_all)
def run_tasks(self: Any, request: HttpRequest, queryset: "QuerySet[PeriodicTask]") -> None:
    """Queue the tasks of schedules; show why, if one of them cannot run."""
    current_app.loader.import_default_modules()
    for row in queryset:
        for field, problem in validation.find_problems(row).items():
            if field not in timing.KINDS:
                text = f"{row.name} cannot run: {field} {problem}."
                self.message_user(request, text, messages.ERROR)
                return
    try:
        run_all(self, request, queryset)
    except OperationalError:
        text = "The broker is unavailable: look at the page Operations for what has been queued."
        self.message_user(request, text, messages.ERROR)


def install() -> None:
    """Let the admin of django-celery-beat, which registers its models itself, use these forms."""
    admin.PeriodicTaskAdmin.form = ScheduleForm
    # Without the column of intervals, which "scheduler" has too, the last run is in sight.
    admin.PeriodicTaskAdmin.list_display = ("name", "enabled", "scheduler", "last_run_at", "one_off")
    admin.PeriodicTaskAdmin.get_fieldsets = get_fieldsets
    admin.PeriodicTaskAdmin.run_tasks = run_tasks
    admin.CrontabScheduleAdmin.form = CrontabForm
    admin.IntervalScheduleAdmin.form = IntervalForm
