"""Admin lists that take about the same time regardless of the number of rows."""

from typing import Any

from django.contrib import admin
from django.core.paginator import Paginator
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.functional import cached_property

from .list_limits import MAX_SEARCH, MAX_WORDS

#: Lookups that compare the text of each row.
TEXT_LOOKUPS = {
    *("contains", "icontains", "startswith", "istartswith", "endswith", "iendswith"),
    *("regex", "iregex", "iexact", "search"),
}

#: Maximum number of rows that a list counts, and of rows at its start that it searches.
MAX_ROWS = 10_000
MAX_SEARCHED = 2_000


class BoundedPaginator(Paginator):  # type: ignore[type-arg]
    """A paginator of the first ``MAX_ROWS`` rows."""

    @cached_property
    def count(self) -> int:
        """The number of rows, at most ``MAX_ROWS``."""
        rows: QuerySet[Any] = self.object_list[:MAX_ROWS]  # type: ignore[assignment]
        return rows.count()


class LargeTableAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """Base class for models whose table may have millions of rows.

    Counts and searches are limited to ``MAX_ROWS`` and ``MAX_SEARCHED`` rows. Facets are off,
    because they count the whole table for each choice of a filter, and so are the lookups of texts
    that Django accepts in the address of a list. Add an index to the model for each order and filter
    of the list.
    """

    paginator = BoundedPaginator
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    search_help_text = f"Searches the first {MAX_SEARCHED:,} rows of the list."

    def lookup_allowed(self, lookup: str, value: str, request: HttpRequest | None = None) -> bool:
        """Return whether the address of a list may have this filter."""
        if lookup.rpartition("__")[2] in TEXT_LOOKUPS:
            return False
        return super().lookup_allowed(lookup, value, request)  # type: ignore[arg-type]

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        """Return the rows that match the search term, among the first ``MAX_SEARCHED``."""
        # The list has refused more words; fields with completion do not.
        search_term = " ".join(search_term[:MAX_SEARCH].split()[:MAX_WORDS])
        if search_term:
            # PostgreSQL may run a subquery once for each row.
            keys = list(queryset.values_list("pk", flat=True)[:MAX_SEARCHED])
            queryset = queryset.filter(pk__in=keys)
        return super().get_search_results(request, queryset, search_term)


def describe_count(queryset: QuerySet[Any], limit: int = 1000) -> str:
    """Return the number of rows as text: ``1000+`` if there are more than ``limit``."""
    count = queryset.order_by()[: limit + 1].count()
    return str(count) if count <= limit else f"{limit}+"
