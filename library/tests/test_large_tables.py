"""Lists of large tables: counts and searches are bounded, whatever the number of rows."""

import pytest
from django.contrib import admin
from django.contrib.auth import get_user_model
from django.urls import reverse
from django.utils import timezone

from prodserver_ops.console import admin as ops_admin
from prodserver_ops.console import large_tables
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
