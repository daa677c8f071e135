"""Lists of large tables: counts and searches are bounded, whatever the number of rows."""

import pytest
from django.contrib import admin
from django.contrib.auth import get_user_model
from django.db import connection
from django.urls import reverse
from django.utils import timezone
from django_celery_results.models import TaskResult

from prodserver_ops.console import admin as ops_admin
from prodserver_ops.console import large_tables, list_limits
from prodserver_ops.console.large_tables import LargeTableAdmin, describe_count
from prodserver_ops.models import DigestDelivery

LIST = reverse("admin:ops_digestdelivery_changelist")


@pytest.fixture
def administrator(client, make_user):
    client.force_login(make_user("administrator", is_staff=True, is_superuser=True))
    return client


@pytest.fixture
def deliveries(make_user):
    now = timezone.now()
    return [
        DigestDelivery.objects.create(
            recipient=make_user(f"reader{number}"), digest="news", period_end=now, status="sent"
        )
        for number in range(4)
    ]


def test_list_counts_a_limited_number_of_rows(administrator, deliveries, monkeypatch):
    monkeypatch.setattr(large_tables, "MAX_ROWS", 3)
    assert administrator.get(LIST).context["cl"].result_count == 3


def test_search_covers_the_first_rows_of_the_list(administrator, deliveries, monkeypatch):
    def search(name):
        return list(administrator.get(LIST, {"q": name}).context["cl"].result_list)

    assert search("reader0") == deliveries[:1]
    monkeypatch.setattr(large_tables, "MAX_SEARCHED", 3)
    assert search("reader0") == []
    assert search("reader1") == deliveries[1:2]


def test_deliveries_are_filtered_by_digest_and_status(administrator, deliveries, monkeypatch):
    monkeypatch.setattr(ops_admin, "get_digests", lambda: {"news": None, "other": None})
    DigestDelivery.objects.filter(pk=deliveries[0].pk).update(status="failed")
    failed = administrator.get(LIST, {"status__exact": "failed"}).context["cl"]
    assert list(failed.result_list) == deliveries[:1]
    assert not administrator.get(LIST, {"digest": "other"}).context["cl"].result_list


def test_number_of_queries_does_not_depend_on_the_number_of_rows(
    administrator, deliveries, django_assert_max_num_queries
):
    with django_assert_max_num_queries(4):
        administrator.get(LIST)


@pytest.mark.django_db
def test_count_is_described_up_to_a_limit(make_user):
    users = get_user_model().objects.all()
    make_user("one")
    make_user("two")
    assert (describe_count(users), describe_count(users, limit=1)) == ("2", "1+")


def test_no_list_of_a_large_table_has_facets():
    large = [each for each in admin.site._registry.values() if isinstance(each, LargeTableAdmin)]
    assert large
    assert {each.show_facets for each in large} == {admin.ShowFacets.NEVER}


class TestLimits:
    """The limits of each list, also of those that are no LargeTableAdmin."""

    SCHEDULES = reverse("admin:django_celery_beat_periodictask_changelist")

    def refusal(self, client, url, query):
        response = client.get(url, query)
        if response.status_code != 302:
            return None
        assert response.url == url
        return [str(message) for message in client.get(url).context["messages"]]

    @pytest.mark.parametrize("url", [LIST, SCHEDULES])
    @pytest.mark.parametrize("search", [" ".join("a" * 11), "a" * 201])
    def test_searches_with_many_words_or_characters_are_refused(self, administrator, url, search):
        problem = ["Search for at most 10 words and 200 characters."]
        assert self.refusal(administrator, url, {"q": search}) == problem
        assert administrator.get(url, {"q": search[:15]}).status_code == 200

    def test_long_query_strings_are_refused(self, administrator):
        query = {"name__icontains": ["a" * 50] * 40}
        assert self.refusal(administrator, self.SCHEDULES, query) == [
            "This address has too many filters."
        ]

    @pytest.mark.parametrize("lookup", ["reason__icontains", "reason__iregex", "digest__contains"])
    def test_lookups_of_texts_in_the_address_are_refused(self, administrator, lookup, caplog):
        assert administrator.get(LIST, {lookup: "a"}).status_code == 400
        assert administrator.get(LIST, {"status__exact": "sent"}).status_code == 200
        assert not [record for record in caplog.records if record.levelname == "ERROR"]

    def test_fields_with_completion_search_for_few_words(self, deliveries, rf):
        model_admin = admin.site._registry[DigestDelivery]
        rows, _ = model_admin.get_search_results(
            rf.get("/"), DigestDelivery.objects.all(), " ".join(f"w{n}" for n in range(99))
        )
        sql = str(rows.query)
        assert "w9" in sql
        assert "w10" not in sql

    @pytest.mark.parametrize("value", ["9" * 30, "-1", "0"])
    def test_filters_that_no_column_can_have_are_refused(self, administrator, value, caplog):
        for lookup in ("last_run_at__year", "id__exact", "last_run_at__month"):
            response = administrator.get(self.SCHEDULES, {lookup: value})
            assert response.status_code in (200, 302), lookup
        assert not [record for record in caplog.records if record.levelname == "ERROR"]

    @pytest.mark.parametrize("value", ["x", "", "9" * 30, "9" * 5000, "[1]", "1\0", "\ufffd"])
    def test_selections_that_are_not_valid_are_refused(self, administrator, value):
        for url in (LIST, self.SCHEDULES):
            data = {"action": "delete_selected", "_selected_action": [value], "index": "0"}
            response = administrator.post(url, data)
            assert (response.status_code, response.url) == (302, url)
            (message,) = administrator.get(url).context["messages"]
            assert str(message) == "The selection is not valid."

    def test_fields_with_completion_have_the_limits_of_lists(self, administrator, settings):
        url, query = reverse("admin:autocomplete"), {"term": " ".join("a" * 11)}
        response = administrator.get(url, query)
        assert (response.status_code, response.text) == (
            400,
            "Search for at most 10 words and 200 characters.",
        )
        query["term"] = "a"
        assert administrator.get(url, query).status_code == 403  # No field with completion.
        slots = settings.WEB_THREADS // 2
        for _ in range(slots):
            list_limits.slots.acquire()
        try:
            assert administrator.get(url, query).status_code == 429
        finally:
            list_limits.slots.release(slots)

    def test_lists_do_not_take_all_threads(self, administrator, settings):
        taken = 0
        while list_limits.slots.acquire(blocking=False):
            taken += 1
        try:
            assert taken == settings.WEB_THREADS // 2
            assert administrator.get(LIST, {"q": "a"}).status_code == 429
            assert administrator.get(LIST).status_code == 200
        finally:
            for _ in range(taken):
                list_limits.slots.release()
        assert administrator.get(LIST, {"q": "a"}).status_code == 200

    @pytest.mark.skipif(connection.vendor != "postgresql", reason="has no timeout")
    @pytest.mark.django_db(transaction=True)
    def test_list_that_takes_long_is_ended(self, administrator, monkeypatch):
        monkeypatch.setattr(list_limits, "SECONDS", 1)

        def search(self, request, queryset, term):
            slow = ["(SELECT pg_sleep(20)) IS NOT NULL"] if term else []
            return queryset.extra(where=slow), False

        for url in (LIST, self.SCHEDULES):
            model_admin = administrator.get(url).context["cl"].model_admin
            monkeypatch.setattr(type(model_admin), "get_search_results", search)
            (problem,) = self.refusal(administrator, url, {"q": "a"})
            assert problem == "This list took longer than 1 seconds. Search or filter for less."
        with connection.cursor() as cursor:
            cursor.execute("SHOW statement_timeout")
            assert cursor.fetchone() == ("30s",)


def test_results_are_listed_and_only_code_adds_them(administrator):
    """Its own form is without fields: the second row that it saves is a status 500."""
    result = TaskResult.objects.create(task_id="a", task_name="send", status="SUCCESS")
    pages = {
        "changelist": administrator.get(
            reverse("admin:django_celery_results_taskresult_changelist")
        ),
        "change": administrator.get(
            reverse("admin:django_celery_results_taskresult_change", args=[result.pk])
        ),
        "add": administrator.post(reverse("admin:django_celery_results_taskresult_add")),
    }
    assert {name: page.status_code for name, page in pages.items()} == {
        "changelist": 200,
        "change": 200,
        "add": 403,
    }
    assert "send" in pages["changelist"].text
