"""Throttles: all processes share counts, which are not evicted by a flood of requests."""

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from django.core.cache import caches
from django.db import connection, connections
from rest_framework import permissions, response, views
from rest_framework.settings import api_settings
from rest_framework.test import APIRequestFactory

from prodserver_ops.api.throttles import AnonymousThrottle, SharedThrottle
from prodserver_ops.core import limits
from prodserver_ops.core.limits import Limit, create_table, entries

pytestmark = pytest.mark.django_db


class PublicView(views.APIView):
    permission_classes = (permissions.AllowAny,)

    def get(self, request):
        return response.Response()


class Posts(SharedThrottle):
    scope = "test"
    rate = "2/hour"


@pytest.fixture
def request_from():
    def request_from(address):
        request = APIRequestFactory().post("/", REMOTE_ADDR=address)
        request.user = None
        return request

    return request_from


def test_a_shared_throttle_counts_in_the_database(request_from):
    request = request_from("203.0.113.1")
    assert [Posts().allow_request(request, None) for _ in range(2)] == [True, True]
    # Other processes and floods of requests do not affect the count.
    caches["default"].clear()
    throttle = Posts()
    assert not throttle.allow_request(request, None)
    assert 3590 < throttle.wait() <= 3600
    assert Posts().allow_request(request_from("203.0.113.2"), None)


def test_a_network_is_one_client(request_from):
    allowed = [Posts().allow_request(request_from(f"2001:db8::{n}"), None) for n in range(3)]
    assert allowed == [True, True, False]


def test_anonymous_requests_are_limited(monkeypatch):
    monkeypatch.setattr(AnonymousThrottle, "rate", "2/min", raising=False)
    assert AnonymousThrottle in api_settings.DEFAULT_THROTTLE_CLASSES
    request = APIRequestFactory().get("/")
    statuses = [PublicView.as_view()(request).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]


def test_a_limit_can_be_cleared():
    limit = Limit("test", 2, 60)
    assert [limit.take("x") for _ in range(3)] == [True, True, False]
    limit.clear("x")
    assert limit.count("x") == 0


class TestEntries:
    def test_expire(self):
        entries.set("name", "value", 60)
        entries.set("expired", "value", -1)
        assert entries.get_many(["name", "expired", "unknown"]) == {"name": "value"}
        assert entries.get("expired", 1) == 1

    def test_are_added_in_one_statement(self, django_assert_num_queries):
        with django_assert_num_queries(3):
            added = [entries.add("name", value, 60) for value in range(3)]
        assert added == [True, False, False]
        assert entries.get("name") == 0

    def test_can_be_added_again_after_they_have_expired(self):
        entries.set("name", "old", -1)
        assert entries.add("name", "new", 60)
        assert entries.get("name") == "new"

    def test_of_the_cache_of_release_1_are_read(self, settings):
        backend = "django.core.cache.backends.db.DatabaseCache"
        settings.CACHES = {"default": {"BACKEND": backend, "LOCATION": "limits"}}
        caches["default"].set("name", [1.5], 60)
        assert entries.get("name") == [1.5]
        entries.set("name", "new", 60)
        assert caches["default"].get("name") == "new"
        entries.delete("name")
        assert caches["default"].get("name") is None

    def test_are_cleaned(self, monkeypatch):
        monkeypatch.setattr(limits, "CLEANED", 1)
        monkeypatch.setattr(limits, "MAX_ENTRIES", 3)
        entries.set("expired", 0, -1)
        for number in range(5):
            entries.set(str(number), number, 60 + number)
        # One too many was there twice, and the one that expires first was deleted.
        assert sorted(entries.get_many(["expired", *map(str, range(5))])) == ["1", "2", "3", "4"]
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM limits")
            assert cursor.fetchone() == (4,)

    def test_have_a_table_that_migrate_creates_where_it_is_missing(self):
        with connection.cursor() as cursor:
            cursor.execute("DROP TABLE limits")
        create_table("default")
        create_table("default")
        create_table("another")
        assert entries.add("name", "value", 60)
        # That of release 1.x has the same columns.
        with connection.cursor() as cursor:
            names = {
                column.name
                for column in connection.introspection.get_table_description(cursor, "limits")
            }
        assert names == {"cache_key", "value", "expires"}


@pytest.mark.parametrize(
    "backend", ["dummy.DummyCache", "redis.RedisCache"], ids=["dummy", "unavailable"]
)
def test_requests_are_counted_whatever_the_caches_of_the_project(settings, monkeypatch, backend):
    monkeypatch.setattr(AnonymousThrottle, "rate", "2/min", raising=False)
    location = {
        "BACKEND": f"django.core.cache.backends.{backend}",
        "LOCATION": "redis://127.0.0.1:1",
    }
    settings.CACHES = {"default": location}
    request = APIRequestFactory().get("/")
    statuses = [PublicView.as_view()(request).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    assert Limit("test", 1, 60).take("x")


@pytest.mark.django_db(transaction=True, serialized_rollback=True)
def test_two_processes_never_take_the_same_slot():
    """Not even one that has just expired."""
    if connection.vendor != "postgresql":
        pytest.skip("threads cannot share this database")
    limit, threads = Limit("race", 1, 60), 4
    barrier = Barrier(threads)
    (slot,) = limit._get_slots("x")

    def take(number):
        try:
            barrier.wait(10)
            return limit.take("x")
        finally:
            connections.close_all()

    with ThreadPoolExecutor(threads) as pool:
        for _ in range(50):
            entries.set(slot, time.time(), -1)
            assert sum(pool.map(take, range(threads))) == 1
