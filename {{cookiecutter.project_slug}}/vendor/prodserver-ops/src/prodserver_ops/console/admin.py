"""The admin of API tokens, deliveries and runs of tasks, and the admin's throttled login."""

from typing import Any

from django.contrib import admin
from django.contrib.auth import get_user_model
from django.db.models import QuerySet
from django.http import HttpRequest

from ..mail.digests import get_digests
from ..models import DigestDelivery, TaskRun, Token
from ..web.logins import LoginForm
from .large_tables import LargeTableAdmin
from .operations import OperationsAdmin

User = get_user_model()

admin.site.login_form = LoginForm


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


@admin.register(Token)
class TokenAdmin(LargeTableAdmin):
    """Lists the API's tokens; an administrator can delete them but not see or edit them."""

    list_display = ("id", "user", "created_at", "expires_at")
    list_select_related = ("user",)
    ordering = ("-pk",)
    sortable_by = ()
    search_fields = (f"user__{User.USERNAME_FIELD}",)
    fields = ("user", "created_at", "expires_at")

    def has_add_permission(self, request: HttpRequest) -> bool:
        """The API creates tokens."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """A token cannot be changed."""
        return False


@admin.register(DigestDelivery)
class DigestDeliveryAdmin(LargeTableAdmin):
    """Lists who received which digest; an administrator can delete rows but not edit them."""

    list_display = ("digest", "recipient", "period_end", "status", "reason", "created_at")
    list_filter = ("status", DigestFilter)
    list_select_related = ("recipient",)
    ordering = ("-pk",)
    sortable_by = ()
    search_fields = (
        f"recipient__{User.USERNAME_FIELD}",
        f"recipient__{User.get_email_field_name()}",
        "reason",
    )

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Only deliveries add rows."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """A delivery that happened cannot be changed."""
        return False


@admin.register(TaskRun)
class TaskRunAdmin(OperationsAdmin):
    """Lists runs of tasks, and has the page *Operations*."""

    list_display = ("name", "status", "started_at", "duration", "error", "host")
    list_filter = ("status",)
    ordering = ("-pk",)
    sortable_by = ()
    search_fields = ("name", "error")

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Only workers add rows."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """A run that happened cannot be changed."""
        return False
