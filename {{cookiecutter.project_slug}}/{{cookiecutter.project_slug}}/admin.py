"""The admin: moderation of submissions, and users."""

from django import forms
from django.conf import settings
from django.contrib import admin, messages
from django.contrib.auth.admin import UserAdmin as BaseUserAdmin
from django.shortcuts import render
from django.utils.translation import ngettext

from .models import Submission, User
from .ops.tasks import notify_on_commit

admin.site.site_title = admin.site.site_header = settings.SITE_NAME


class StatusFilter(admin.SimpleListFilter):
    """Filters by status; shows pending submissions by default."""

    title = "status"
    parameter_name = "status"

    def lookups(self, request, model_admin):
        return [(status, status.capitalize()) for status in Submission.STATUSES]

    def choices(self, changelist):
        pending, *rest = super().choices(changelist)
        everything = pending | {
            "display": "All",
            "query_string": changelist.get_query_string({self.parameter_name: "all"}),
            "selected": self.value() == "all",
        }
        return [*rest, everything]

    def value(self):
        return super().value() or "pending"

    def queryset(self, request, queryset):
        if self.value() in Submission.STATUSES:
            return getattr(queryset, self.value())()
        return queryset


class AnswerForm(forms.Form):
    response = forms.CharField(
        max_length=5000,
        widget=forms.Textarea(attrs={"rows": 6, "class": "vLargeTextField", "autofocus": True}),
    )


def answer(submission, response, moderator):
    """Save the answer, and notify the author of the first one."""
    first = submission.answer(response, moderator)
    if first and submission.author.notify_on_response:
        notify_on_commit("answer", submission.pk)


@admin.register(Submission)
class SubmissionAdmin(admin.ModelAdmin):
    list_display = ("__str__", "author", "created_at", "status")
    list_filter = (StatusFilter, "created_at")
    list_select_related = ("author",)
    list_per_page = 50
    show_facets = admin.ShowFacets.ALWAYS
    search_fields = ("body", "response", "author__username", "author__email")
    actions = ("approve", "flag", "archive", "answer")
    readonly_fields = (
        "author",
        "body",
        "created_at",
        "status",
        "approved_at",
        "flagged_at",
        "archived_at",
        "answered_at",
        "answered_by",
    )
    fieldsets = (
        (None, {"fields": ("author", "body", "created_at", "expires_at")}),
        ("Answer", {"fields": ("response", "answered_at", "answered_by")}),
        ("Moderation", {"fields": ("status", "approved_at", "flagged_at", "archived_at")}),
    )

    def has_add_permission(self, request):
        return False

    def save_model(self, request, obj, form, change):
        if "response" in form.changed_data and obj.response:
            answer(obj, obj.response, request.user)
        else:
            super().save_model(request, obj, form, change)

    @admin.action(description="Approve", permissions=["change"])
    def approve(self, request, queryset):
        self._report(request, queryset.approve(), "approved")

    @admin.action(description="Flag for a second look", permissions=["change"])
    def flag(self, request, queryset):
        self._report(request, queryset.flag(), "flagged")

    @admin.action(description="Archive", permissions=["change"])
    def archive(self, request, queryset):
        self._report(request, queryset.archive(), "archived")

    @admin.action(description="Answer", permissions=["change"])
    def answer(self, request, queryset):
        form = AnswerForm(request.POST if "response" in request.POST else None)
        if form.is_valid():
            # Read them only once: an answered submission drops out of the filtered queryset.
            submissions = list(queryset.select_related("author"))
            for submission in submissions:
                answer(submission, form.cleaned_data["response"], request.user)
            return self._report(request, len(submissions), "answered")
        context = {
            **self.admin_site.each_context(request),
            "title": "Answer",
            "opts": self.opts,
            "form": form,
            "submissions": queryset.select_related("author"),
        }
        return render(request, "admin/answer.html", context)

    def _report(self, request, count, done):
        text = ngettext("%d submission was %s.", "%d submissions were %s.", count)
        self.message_user(request, text % (count, done), messages.SUCCESS)


@admin.register(User)
class UserAdmin(BaseUserAdmin):
    list_display = (*BaseUserAdmin.list_display, "digest_frequency")
    list_filter = (*BaseUserAdmin.list_filter, "digest_frequency")
    fieldsets = (
        *BaseUserAdmin.fieldsets,
        ("E-mail", {"fields": ("digest_frequency", "notify_on_response")}),
    )
