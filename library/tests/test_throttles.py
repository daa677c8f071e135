"""Throttles: all processes share counts, which are not evicted by a flood of requests."""

import pytest
from django.core.cache import caches
from rest_framework import permissions, response, views
from rest_framework.settings import api_settings
from rest_framework.test import APIRequestFactory

from prodserver_ops.api.throttles import AnonymousThrottle, SharedThrottle
from prodserver_ops.core.limits import Limit

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
