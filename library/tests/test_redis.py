"""Redis: a separate database, and every wait has a timeout."""

import pytest
from celery import current_app
from django.conf import settings
from kombu import Connection
from kombu.transport.redis import Channel

from prodserver_ops.broker import redis


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://:secret@redis.example.com", "redis://:secret@redis.example.com/1"),
        ("redis://redis.example.com:6379/", "redis://redis.example.com:6379/1"),
        ("redis://redis.example.com/0", "redis://redis.example.com/0"),
        ("rediss://a.example.com", "rediss://a.example.com/1?ssl_cert_reqs=required"),
        (
            "rediss://a.example.com/2?ssl_ca_certs=ca.pem",
            "rediss://a.example.com/2?ssl_ca_certs=ca.pem&ssl_cert_reqs=required",
        ),
        (
            "rediss://a.example.com?ssl_cert_reqs=none",
            "rediss://a.example.com/1?ssl_cert_reqs=none",
        ),
    ],
)
def test_url_has_a_database_and_the_verification_of_tls(url, expected):
    assert redis.get_url(url) == expected


def test_message_of_a_running_task_is_not_delivered_again():
    options = redis.get_options(settings)
    assert options["visibility_timeout"] > current_app.conf.task_time_limit


def test_messages_of_lost_workers_are_looked_for_every_10_seconds():
    throttle = redis.get_options(settings)["unacked_restore_throttle"]
    assert "unacked_restore_throttle" in Channel.from_transport_options
    assert throttle * Channel.unacked_restore_interval == 10


def test_server_that_is_out_of_reach_fails_soon(monkeypatch):
    monkeypatch.setattr("kombu.utils.functional.sleep", lambda seconds: None)
    options = redis.get_options(settings)
    connection = Connection("redis://127.0.0.1:1/1", transport_options=options)
    with pytest.raises(connection.connection_errors):
        connection.connect()
