"""E-mail settings: by default, passwords are encrypted; ``check`` reports if they are not."""

import pytest
from django.conf import settings as current
from django.core.checks import run_checks
from django.core.signing import Signer

from prodserver_ops.conf.defaults import Defaults
from prodserver_ops.conf.environment import EnvironmentVariableError

ACCOUNT = {"EMAIL_HOST": "mail.example.com", "EMAIL_HOST_USER": "user"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (25, False, False)),
        ({"EMAIL_HOST": "mail.example.com"}, (25, False, False)),
        (ACCOUNT, (587, True, False)),
        (ACCOUNT | {"EMAIL_USE_SSL": "on"}, (465, False, True)),
        (ACCOUNT | {"EMAIL_USE_TLS": "off"}, (25, False, False)),
        (ACCOUNT | {"EMAIL_PORT": "2525"}, (2525, True, False)),
    ],
)
def test_a_server_with_an_account_is_encrypted(monkeypatch, variables, expected):
    for name in ("EMAIL_HOST", "EMAIL_HOST_USER", "EMAIL_PORT", "EMAIL_USE_TLS", "EMAIL_USE_SSL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = Defaults()
    assert expected == (settings.EMAIL_PORT, settings.EMAIL_USE_TLS, settings.EMAIL_USE_SSL)


@pytest.mark.parametrize(
    ("user", "tls", "ssl", "expected"),
    [
        ("user", False, False, ["email.E001"]),
        ("user", True, True, ["email.E002"]),
        ("user", True, False, []),
        ("user", False, True, []),
        ("", False, False, []),
    ],
)
def test_check_deploy_reports_an_unencrypted_password(settings, user, tls, ssl, expected):
    settings.EMAIL_HOST, settings.EMAIL_HOST_USER = "mail.example.com", user
    settings.EMAIL_USE_TLS, settings.EMAIL_USE_SSL = tls, ssl
    ids = [message.id for message in run_checks(include_deployment_checks=True)]
    assert [id_ for id_ in ids if id_.startswith("email.")] == expected


def test_earlier_keys_still_verify(monkeypatch, settings):

    old = current.SECRET_KEY
    signed = Signer().sign("value")
    monkeypatch.setenv(
        "SECRET_KEY_FALLBACKS",
        "a-key-for-this-test-alone-of-more-than-fifty-characters, " + "b1c2d3" * 10,
    )
    assert Defaults().SECRET_KEY_FALLBACKS[1] == "b1c2d3" * 10
    settings.SECRET_KEY, settings.SECRET_KEY_FALLBACKS = "b1c2d3" * 10, [old]
    assert Signer().unsign(signed) == "value"


class TestApi:
    @pytest.fixture
    def read(self, monkeypatch):
        """Return a function that reads EMAIL_API."""

        def read(text):
            monkeypatch.setenv("EMAIL_API", text)
            return Defaults()

        return read

    def test_names_provider_and_settings_of_anymail(self, read):
        settings = read("mailgun?api_key=abc%26d&sender_domain=mg.example.com")
        assert settings.EMAIL_BACKEND == "anymail.backends.mailgun.EmailBackend"
        assert settings.ANYMAIL == {
            "MAILGUN_API_KEY": "abc&d",
            "MAILGUN_SENDER_DOMAIN": "mg.example.com",
        }
        assert read("amazon_ses").ANYMAIL == {}
        assert read("").EMAIL_BACKEND == "prodserver_ops.mail.console.EmailBackend"

    @pytest.mark.parametrize("text", ["https://x", "postmark?hunter2", "Postmark?a=b"])
    def test_error_shows_no_secret(self, read, text):
        with pytest.raises(EnvironmentVariableError, match="EMAIL_API") as error:
            read(text).EMAIL_API  # noqa: B018
        assert "hunter2" not in str(error.value)

    def test_check_names_the_package_that_is_missing(self, settings):
        settings.EMAIL_API = ("postmark", {})
        settings.EMAIL_BACKEND = "anymail.backends.postmark.EmailBackend"
        errors = [each for each in run_checks(include_deployment_checks=True) if "email" in each.id]
        (error,) = errors
        assert error.id == "email.E003"
        assert error.hint.startswith("Run uv add django-anymail")
