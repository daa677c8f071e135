"""The client's address, behind any number of proxies."""

import pytest

from prodserver_ops.core.clients import get_address, get_network, to_network


@pytest.mark.parametrize(
    ("proxies", "forwarded", "address"),
    [
        (0, "203.0.113.1", "10.0.0.1"),
        (1, None, "10.0.0.1"),
        (1, "203.0.113.1", "203.0.113.1"),
        (1, "6.6.6.6, 203.0.113.1", "203.0.113.1"),
        (2, "6.6.6.6, 203.0.113.1, 10.0.0.2", "203.0.113.1"),
        (2, "203.0.113.1", "203.0.113.1"),
        (1, "203.0.113.1:5000", "203.0.113.1"),
        (1, "[2001:db8::1]:5000", "2001:db8::1"),
        (1, "2001:DB8::1", "2001:db8::1"),
        (1, "::ffff:203.0.113.1", "203.0.113.1"),
        (1, "unknown", "10.0.0.1"),
        (1, "x" * 8000, "10.0.0.1"),
    ],
)
def test_address_is_what_the_last_proxies_add(rf, settings, proxies, forwarded, address):
    settings.PROXY_COUNT = proxies
    headers = {"X-Forwarded-For": forwarded} if forwarded else {}
    assert get_address(rf.get("/", headers=headers, REMOTE_ADDR="10.0.0.1")) == address


def test_a_unix_socket_has_no_address(rf):
    assert get_network(rf.get("/", REMOTE_ADDR="")) == ""


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("203.0.113.1", "203.0.113.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("no address", "no address"),
    ],
)
def test_a_network_is_one_client(address, network):
    assert to_network(address) == network
