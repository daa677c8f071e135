"""Logins: guessing passwords is throttled, in the admin and in the API."""

import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import time_machine
from asgiref.sync import async_to_sync
from django.contrib import auth
from django.contrib.auth import aauthenticate, authenticate, get_user_model
from django.contrib.auth.backends import ModelBackend
from django.core.management import call_command
from django.db import connection
from django.http import HttpResponse
from django.test import RequestFactory
from django.urls import reverse
from rest_framework.test import APIRequestFactory

from prodserver_ops.api.views import TokenView
from prodserver_ops.core.logs import RequestLogMiddleware
from prodserver_ops.web import logins

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def few_slots(monkeypatch):
    monkeypatch.setattr(logins, "ADDRESS", replace(logins.ADDRESS, slots=3))
    monkeypatch.setattr(logins, "NAME", replace(logins.NAME, slots=5))


@pytest.fixture
def user(make_user):
    return make_user("anna", is_staff=True)


@pytest.fixture
def log_in(client, user):
    """Return a function that logs in to the admin; it returns the error message, or None."""

    def log_in(password="wrong", username=None, address="203.0.113.1"):
        response = client.post(
            reverse("admin:login"),
            {"username": username or user.get_username(), "password": password},
            REMOTE_ADDR=address,
        )
        if response.status_code == 302:
            client.logout()
            return None
        (error,) = response.context["form"].non_field_errors()
        return error

    return log_in


def fail(log_in, times, **options):
    for _ in range(times):
        assert log_in(**options)


def get_token(user, password):
    data = {"username": user.get_username(), "password": password}
    request = APIRequestFactory().post("/", data, format="json", REMOTE_ADDR="203.0.113.1")
    return TokenView.as_view()(request)


def test_correct_password_logs_in(log_in):
    assert log_in("secret") is None


def test_login_works_after_a_few_failures(log_in):
    fail(log_in, 2)
    assert log_in("secret") is None


def test_address_is_locked_after_too_many_failures(log_in):
    fail(log_in, 3)
    assert log_in("secret") == "Too many failed logins. Try again in 15 minutes."
    assert log_in("secret", address="203.0.113.2") is None


def test_address_is_locked_whichever_user_names_fail(log_in):
    for name in ("one", "two", "three"):
        fail(log_in, 1, username=name)
    assert log_in("secret")


def test_the_network_of_an_ipv6_address_is_one_address(log_in):
    for number in range(3):
        fail(log_in, 1, username=f"user{number}", address=f"2001:db8::{number}")
    assert log_in("secret", address="2001:db8::ffff:1")
    assert log_in("secret", address="2001:db8:0:1::1") is None


@pytest.fixture
def attack(log_in, user):
    """Reach the limit of the user name, from many addresses."""
    for number in range(5):
        name = user.get_username().title()
        fail(log_in, 1, username=name, address=f"198.51.100.{number}")


def test_a_name_under_attack_has_one_attempt_from_a_new_address(attack, log_in):
    fail(log_in, 1, address="203.0.113.99")
    assert "Too many" in log_in("secret", address="203.0.113.99")
    assert log_in("secret", address="203.0.113.98") is None


def test_a_name_under_attack_keeps_all_attempts_where_it_logged_in_before(log_in, request):
    assert log_in("secret") is None
    request.getfixturevalue("attack")
    fail(log_in, 2)
    assert log_in("secret") is None
    fail(log_in, 1)
    assert "Too many" in log_in("secret")


def test_an_address_is_known_only_for_the_name_that_logged_in(log_in, make_user, request):
    make_user("eve")
    assert log_in("secret", username="eve", address="203.0.113.66")
    request.getfixturevalue("attack")
    fail(log_in, 1, address="203.0.113.66")
    assert "Too many" in log_in("secret", address="203.0.113.66")


@pytest.mark.parametrize("name", ["ANNA", "203.0.113.1", "2001:db8::2"])
def test_unlock_ends_a_lock(log_in, user, name, capsys):
    if name == "ANNA":
        for number in range(5):
            fail(log_in, 1, address=f"198.51.100.{number}")
        fail(log_in, 1)
    else:
        fail(log_in, 3, address=name.replace("::2", "::1"))
    address = "203.0.113.1" if name == "ANNA" else name
    assert "Too many" in log_in("secret", address=address)
    call_command("unlock", user.get_username().upper() if name == "ANNA" else name)
    assert " failed logins forgotten" in capsys.readouterr().out
    assert log_in("secret", address=address) is None


def test_lock_ends_after_a_time(log_in):
    now = datetime.now(UTC)
    with time_machine.travel(now) as clock:
        fail(log_in, 3)
        assert log_in("secret")
        clock.move_to(now + timedelta(minutes=logins.LOCKOUT_MINUTES, seconds=2))
        assert log_in("secret") is None


def test_attempts_while_locked_do_not_prolong_the_lock(log_in):
    fail(log_in, 3)
    fail(log_in, 10)
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM limits")
        assert cursor.fetchone() == (6,)


def test_token_needs_the_correct_password(user):
    assert get_token(user, "wrong").status_code == 400
    response = get_token(user, "secret")
    assert response.status_code == 200
    assert response.data["token"]


def test_token_is_refused_while_logins_are_locked(log_in, user):
    fail(log_in, 3)
    assert get_token(user, "secret").status_code == 400


def test_token_requests_are_throttled(user):
    statuses = [get_token(user, str(number)).status_code for number in range(11)]
    assert statuses == [400] * 10 + [429]


def test_neither_count_nor_log_contains_name_or_address(log_in, user, caplog):
    fail(log_in, 3)
    with connection.cursor() as cursor:
        cursor.execute("SELECT cache_key, value FROM limits")
        stored = str(cursor.fetchall())
    assert "Too many failed logins for one address" in caplog.text
    # An earlier test may have added the fields of the access log to the text.
    logged = " ".join(record.getMessage() for record in caplog.records)
    assert user.get_username() not in stored + logged
    assert "203.0.113" not in stored + logged


def test_a_login_in_code_is_not_throttled(user, log_in):
    fail(log_in, 3)
    name = user.get_username()
    assert authenticate(None, username=name, password="secret") == user
    assert authenticate(None, **{user.USERNAME_FIELD: name, "password": "secret"}) == user
    assert authenticate(None, username=name, password="wrong") is None


def test_the_name_may_be_given_by_its_field(user):
    request = APIRequestFactory().post("/", REMOTE_ADDR="203.0.113.1")
    name = {user.USERNAME_FIELD: user.get_username()}
    assert authenticate(request, **name, password="secret") == user
    for _ in range(3):
        assert authenticate(request, **name, password="wrong") is None
    assert authenticate(request, **name, password="secret") is None


def test_the_name_may_be_in_another_field(user, monkeypatch):
    monkeypatch.setattr(type(user), "USERNAME_FIELD", "email")
    request = APIRequestFactory().post("/", REMOTE_ADDR="203.0.113.1")
    assert authenticate(request, email=user.email, password="secret") == user
    for _ in range(3):
        assert authenticate(request, email=user.email, password="wrong") is None
    assert authenticate(request, email=user.email, password="secret") is None


def test_a_wrong_password_is_not_called_a_lock(log_in):
    assert "Too many" not in log_in()


def test_an_address_is_known_for_long(log_in, request):
    now = datetime.now(UTC)
    with time_machine.travel(now, tick=False) as clock:
        assert log_in("secret") is None
        clock.move_to(now + timedelta(days=89))
        request.getfixturevalue("attack")
        fail(log_in, 1)
        assert log_in("secret") is None


def test_the_longest_password_works_and_a_longer_one_fails(user, log_in):
    for length, works in ((logins.MAX_LENGTH, True), (logins.MAX_LENGTH + 1, False)):
        user.set_password("x" * length)
        user.save()
        assert (log_in("x" * length) is None) == works


def test_a_limit_is_logged_once_when_it_is_reached(log_in, caplog):
    fail(log_in, 2)
    assert caplog.messages.count("Too many failed logins for one address") == 0
    fail(log_in, 5)
    assert caplog.messages.count("Too many failed logins for one address") == 1


def test_an_address_is_forgotten_after_a_time(log_in):
    now = datetime.now(UTC)
    with time_machine.travel(now, tick=False) as clock:
        assert log_in("secret") is None
        clock.move_to(now + timedelta(days=91))
        for number in range(5):
            fail(log_in, 1, address=f"198.51.100.{number}")
        fail(log_in, 1)
        assert "Too many" in log_in("secret")


def test_an_address_is_known_for_itself_alone(log_in, request):
    assert log_in("secret", address="203.0.113.1") is None
    request.getfixturevalue("attack")
    fail(log_in, 1, address="203.0.113.2")
    assert log_in("secret", address="203.0.113.2")


def test_unlock_returns_the_number_of_failures(log_in, user):
    fail(log_in, 2)
    fail(log_in, 1, address="203.0.113.2")
    assert logins.unlock(user.get_username()) == 3
    assert logins.unlock("203.0.113.1") == 2
    assert logins.unlock("203.0.113.1") == 0


class OtherBackend(ModelBackend):
    """As that of django-allauth, which takes any credentials."""

    def authenticate(self, request, **credentials):
        return super().authenticate(request, credentials.get("login"), credentials.get("password"))

    async def aauthenticate(self, request, **credentials):
        return await super().aauthenticate(
            request, credentials.get("login"), credentials.get("password")
        )


class TokenBackend(ModelBackend):
    """A backend without passwords."""

    def authenticate(self, request, token):
        return get_user_model().objects.first() if token == "correct" else None


class TestOtherBackends:
    @pytest.fixture(autouse=True)
    def backends(self, settings):
        settings.AUTHENTICATION_BACKENDS = [
            "django.contrib.auth.backends.ModelBackend",
            f"{__name__}.OtherBackend",
            f"{__name__}.TokenBackend",
        ]

    @pytest.fixture
    def request_(self):
        return RequestFactory().post("/", REMOTE_ADDR="203.0.113.1")

    def test_admin_is_guarded(self, log_in):
        fail(log_in, 3)
        assert "Too many" in log_in("secret")

    def test_a_failure_of_several_backends_counts_once(self, user, request_):
        for _ in range(2):
            assert authenticate(request_, username="anna", login="anna", password="wrong") is None
        assert authenticate(request_, login=user.get_username(), password="secret") == user

    def test_names_of_any_field_are_guarded(self, user, request_):
        for _ in range(3):
            assert authenticate(request_, login=user.get_username(), password="wrong") is None
        assert authenticate(request_, login=user.get_username(), password="secret") is None

    def test_asynchronous_logins_are_guarded(self, user, request_):
        log_in = async_to_sync(aauthenticate)
        credentials = {"login": user.get_username()}
        assert log_in(request_, **credentials, password="secret") == user
        for _ in range(3):
            assert log_in(request_, **credentials, password="wrong") is None
        assert log_in(request_, **credentials, password="secret") is None

    def test_a_view_that_passes_no_request_is_guarded(self, user, rf):
        def view(request):
            return HttpResponse(authenticate(login=user.get_username(), password=request.GET["p"]))

        handle = RequestLogMiddleware(view)
        for _ in range(3):
            assert handle(rf.get("/?p=wrong")).content == b"None"
        assert handle(rf.get("/?p=secret")).content == b"None"
        logins.unlock("127.0.0.1")
        assert handle(rf.get("/?p=secret")).content == str(user).encode()

    def test_other_credentials_than_passwords_are_not_counted(self, user, request_):
        for _ in range(5):
            assert authenticate(request_, token="wrong") is None
        assert authenticate(request_, token="correct") == user
        assert authenticate(request_, login=user.get_username(), password="secret") == user

    def test_the_backend_of_the_user_is_that_of_the_project(self, user, request_):
        found = authenticate(request_, login=user.get_username(), password="secret")
        assert found.backend == f"{__name__}.OtherBackend"

    @pytest.mark.parametrize("on", [True, False])
    def test_a_project_may_turn_it_off(self, settings, monkeypatch, on):
        monkeypatch.setattr(auth, "_get_compatible_backends", logins.find_backends)
        settings.THROTTLE_LOGINS = on
        logins.install()
        assert (auth._get_compatible_backends is logins.find_guarded_backends) == on


def test_an_old_settings_module_is_still_guarded(settings, monkeypatch):
    monkeypatch.setattr(auth, "_get_compatible_backends", logins.find_backends)
    settings.THROTTLE_LOGINS = False
    settings.AUTHENTICATION_BACKENDS = ["prodserver_ops.web.logins.ThrottledBackend"]
    logins.install()
    assert auth._get_compatible_backends is logins.find_guarded_backends


#: Wrong passwords through the views of packages, and then the correct one.
PACKAGES = """
from pathlib import Path

import django
from django.conf import settings

settings.configure(
    DEBUG=True, SECRET_KEY="x" * 50, USE_TZ=True, ROOT_URLCONF="urls", ALLOWED_HOSTS=["*"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "db.sqlite3"}},
    BASE_DIR=Path.cwd(), THROTTLE_LOGINS=True, SENTRY_DSN="", PROXY_COUNT=0,
    PRODUCTION_PROCESSES={}, CELERY_BROKER_URL="memory://", LOG_REDACTED_PATHS=(),
    EMAIL_BACKEND="django.core.mail.backends.locmem.EmailBackend",
    DATABASE_STATEMENT_TIMEOUT=30, ALERTS=False, ALERT_WEBHOOK="", CELERY_TASK_QUEUES=[],
    INSTALLED_APPS=[
        "prodserver_ops", "django.contrib.auth", "django.contrib.admin", "django.contrib.messages",
        "django.contrib.contenttypes", "django.contrib.sessions", "django_celery_beat",
        "django_prodserver", "allauth", "allauth.account", "rest_framework",
    ],
    MIDDLEWARE=[
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
        "allauth.account.middleware.AccountMiddleware",
    ],
    TEMPLATES=[{
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {"context_processors": ["django.template.context_processors.request"]},
    }],
    AUTHENTICATION_BACKENDS=[
        "django.contrib.auth.backends.ModelBackend",
        "allauth.account.auth_backends.AuthenticationBackend",
    ],
    WEB_THREADS=2,
    PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"],  # It is fast.
    # Its own limit is off, so that the library's alone counts.
    ACCOUNT_RATE_LIMITS=False, ACCOUNT_LOGIN_METHODS={"username", "email"},
    ACCOUNT_EMAIL_VERIFICATION="none",
)
django.setup()

from django.contrib.auth import get_user_model
from django.core.management import call_command
from django.test import Client

from prodserver_ops.web import logins

call_command("migrate", verbosity=0)
get_user_model().objects.create_user("anna", "anna@example.com", "secret")


def allauth(name, password):
    client = Client()
    client.post("/login/", {"login": name, "password": password})
    return "_auth_user_id" in client.session


def simplejwt(name, password):
    data = {"username": name, "password": password}
    response = Client().post("/token/", data, content_type="application/json")
    return "access" in response.json()


for log_in, name in ((allauth, "anna"), (allauth, "anna@example.com"), (simplejwt, "anna")):
    logins.unlock("127.0.0.1")
    assert log_in(name, "secret"), log_in
    assert not any(log_in(name, "wrong") for _ in range(logins.ADDRESS.slots)), log_in
    assert not log_in(name, "secret"), f"{log_in.__name__}: {name} is not locked"
print("locked")
"""

URLS = """
from allauth.account.views import login
from django.http import HttpResponse
from django.urls import path
from rest_framework_simplejwt.views import TokenObtainPairView

urlpatterns = [
    path("login/", login, name="account_login"),
    path("token/", TokenObtainPairView.as_view()),
    *(path(f"{name}/", lambda request: HttpResponse(), name=f"account_{name}")
      for name in ("signup", "logout", "inactive", "reset_password", "email")),
]
"""


@pytest.mark.slow
def test_views_of_allauth_and_simplejwt_are_guarded(tmp_path):
    (tmp_path / "run.py").write_text(PACKAGES)
    (tmp_path / "urls.py").write_text(URLS)
    packages = ("django-allauth>=65,<66", "djangorestframework-simplejwt>=5.5,<6")
    added = [f"--with={package}" for package in packages]
    done = subprocess.run(
        [
            os.environ.get("UV", "uv"),
            "run",
            "--project",
            Path(__file__).parents[1],
            f"--python={sys.executable}",
            *added,
            "run.py",
        ],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith("DJANGO_")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "locked\n", done.stdout + done.stderr
