"""The forms of schedules in the admin: they refuse what beat could not run."""

from datetime import timedelta
from typing import Any

from celery import current_app
from django import forms
from django_celery_beat import admin

from ..scheduling import crontabs, timing, validation


class ScheduleForm(admin.PeriodicTaskForm):  # type: ignore[misc]
    """The form of a schedule; each problem is at the field that has it."""

    def _clean_json(self, field: str) -> Any:
        # Read below: some JSON raises errors that the original does not expect.
        return self.cleaned_data[field]

    def _post_clean(self) -> None:
        super()._post_clean()
        if self.errors:
            return
        current_app.loader.import_default_modules()
        for name, problem in validation.find_problems(self.instance).items():
            self.add_error(
                name if name in self.fields else None, f"{problem[:1].upper()}{problem[1:]}."
            )


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


def install() -> None:
    """Let the admin of django-celery-beat, which registers its models itself, use these forms."""
    admin.PeriodicTaskAdmin.form = ScheduleForm
    admin.CrontabScheduleAdmin.form = CrontabForm
    admin.IntervalScheduleAdmin.form = IntervalForm
