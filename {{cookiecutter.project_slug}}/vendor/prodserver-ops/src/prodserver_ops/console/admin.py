"""The admin of API tokens, deliveries and runs of tasks, and the admin's throttled login."""

from typing import Any

from django.apps import apps
from django.contrib import admin
from django.contrib.auth import get_user_model
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.text import Truncator

from ..mail.digests import get_digests
from ..models import DelayedTask, DigestDelivery, TaskRun, Token
from ..web.logins import LoginForm
from . import list_limits, schedule_forms
from .large_tables import LargeTableAdmin
from .operations import OperationsAdmin

User = get_user_model()

# A project may have its own form.
admin.site.login_form = admin.site.login_form or LoginForm

schedule_forms.install()
list_limits.install()


class DigestFilter(admin.SimpleListFilter):
    """Filters by digest, without reading the table for its choices."""

    title = "digest"
    parameter_name = "digest"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        """Return the names of the registered digests."""
        return [(name, name) for name in get_digests()]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """Return the deliveries of the chosen digest, or all."""
        return queryset.filter(digest=self.value()) if self.value() else queryset


class RecordAdmin(LargeTableAdmin):
    """Lists records that code creates; administrators can delete them, but not add or edit them."""

    ordering = ("-pk",)
    sortable_by = ()

    class Media:
        css = {"all": ["ops/records.css"]}

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Only code adds rows."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Records cannot be changed."""
        return False


class TokenAdmin(RecordAdmin):
    """Lists the API's tokens, without their secrets."""

    list_display = ("id", "user", "created_at", "expires_at")
    list_select_related = ("user",)
    search_fields = (f"user__{User.USERNAME_FIELD}",)
    fields = ("user", "created_at", "expires_at")


if apps.is_installed("rest_framework"):
    admin.site.register(Token, TokenAdmin)


@admin.register(DigestDelivery)
class DigestDeliveryAdmin(RecordAdmin):
    """Lists deliveries of digests, and their recipients."""

    list_display = ("digest", "recipient", "status", "reason", "period_end", "created_at")
    list_filter = ("status", DigestFilter)
    list_select_related = ("recipient",)
    search_fields = (
        f"recipient__{User.USERNAME_FIELD}",
        f"recipient__{User.get_email_field_name()}",
        "reason",
    )


@admin.register(DelayedTask)
class DelayedTaskAdmin(RecordAdmin):
    """Lists tasks that are not due, and those of the last day; a deleted one does not run."""

    list_display = ("name", "due_at", "queue", "published_at", "task_id")
    search_fields = ("name", "task_id")
    fields = ("name", "task_id", "queue", "due_at", "created_at", "published_at")


@admin.register(TaskRun)
class TaskRunAdmin(RecordAdmin, OperationsAdmin):
    """Lists task runs, and provides the page *Operations*."""

    list_display = ("name", "status", "short_error", "started_at", "duration", "host")
    list_filter = ("status",)
    search_fields = ("name", "error", "request_id")

    @admin.display(description="error")
    def short_error(self, run: TaskRun) -> str:
        """Return the error in a few words: a long one would make the row high."""
        return Truncator(run.error).chars(60)


if apps.is_installed("django_celery_results"):
    from django_celery_results.admin import TaskResultAdmin
    from django_celery_results.models import TaskResult

    class ResultAdmin(RecordAdmin, TaskResultAdmin):
        """Lists results. The form of the package saves an empty row, and fails for a second one."""

        date_hierarchy = None  # type: ignore[assignment]
        list_filter = ("status",)  # type: ignore[assignment]

    admin.site.unregister(TaskResult)
    admin.site.register(TaskResult, ResultAdmin)
