"""The admin of the record of deliveries, and the admin's throttled login."""

from typing import Any

from django.contrib import admin
from django.contrib.auth import get_user_model
from django.http import HttpRequest

from .logins import LoginForm
from .models import DigestDelivery

User = get_user_model()

admin.site.login_form = LoginForm


@admin.register(DigestDelivery)
class DigestDeliveryAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """Lists who received which digest; an administrator can delete rows but not edit them."""

    list_display = ("digest", "recipient", "period_start", "status", "reason", "created_at")
    list_filter = ("status", "digest", "created_at")
    list_select_related = ("recipient",)
    search_fields = (
        f"recipient__{User.USERNAME_FIELD}",
        f"recipient__{User.get_email_field_name()}",
        "reason",
    )
    show_full_result_count = False

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Only deliveries add rows."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """A delivery that happened cannot be changed."""
        return False
