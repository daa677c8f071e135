"""Login throttling: after too many failures, logins are refused for some minutes.

This applies to the admin, the API and every other password that ``authenticate()`` checks, with any
``AUTHENTICATION_BACKENDS``, unless ``THROTTLE_LOGINS`` is off. If the client's address reaches the limit ``ADDRESS``, logins fail without checking the password. If the user name
reaches the limit ``NAME``, addresses that have never logged in with that name have one attempt in
the same time. Addresses that have are not affected, so nobody can lock a user out.

``python manage.py unlock`` ends a lock.
"""

import logging
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from asgiref.sync import sync_to_async
from django.conf import settings
from django.contrib import auth
from django.contrib.admin.forms import AdminAuthenticationForm
from django.contrib.auth import get_user_model
from django.contrib.auth.backends import ModelBackend
from django.contrib.auth.signals import user_login_failed
from django.core.exceptions import PermissionDenied, ValidationError
from django.http import HttpRequest
from django.views.decorators.debug import sensitive_variables

from ..core import clients
from ..core.clients import get_network, to_network
from ..core.limits import Limit, entries, get_key

logger = logging.getLogger(__name__)

#: How long a failure counts, in minutes.
LOCKOUT_MINUTES = 15

#: How many logins may fail from one address, and how many for one user name.
ADDRESS = Limit("address", 10, LOCKOUT_MINUTES * 60)
NAME = Limit("user name", 50, LOCKOUT_MINUTES * 60)

#: How long an address is remembered after a login with a user name, in seconds.
KNOWN = timedelta(days=90).total_seconds()

#: Maximum length of a user name or password. Logins with longer ones fail immediately, because the
#: time to normalize a name grows with the square of its length.
MAX_LENGTH = 1024


class ThrottledBackend(ModelBackend):
    """Django's backend, under the name that the sessions of earlier releases contain."""


class GuardedBackend:
    """Any backend of ``AUTHENTICATION_BACKENDS``, which checks no password of a locked login."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    @sensitive_variables("credentials")
    def authenticate(self, request: HttpRequest | None, **credentials: Any) -> Any:
        """Return the user or None; raise PermissionDenied if the login is locked."""
        check(request, credentials)
        user = self.backend.authenticate(request, **credentials)
        if user is not None:
            record_success(request, credentials)
        return user

    @sensitive_variables("credentials")
    async def aauthenticate(self, request: HttpRequest | None, **credentials: Any) -> Any:
        """As ``authenticate()``."""
        await sync_to_async(check)(request, credentials)
        user = await self.backend.aauthenticate(request, **credentials)
        if user is not None:
            await sync_to_async(record_success)(request, credentials)
        return user


find_backends = auth._get_compatible_backends  # type: ignore[attr-defined]


@sensitive_variables("credentials")
def find_guarded_backends(request: HttpRequest | None, **credentials: Any) -> Iterator[Any]:
    """Return the backends for these credentials, as Django's function does."""
    for backend, path in find_backends(request, **credentials):
        yield (GuardedBackend(backend) if "password" in credentials else backend), path


def install() -> None:
    """Guard each password that ``authenticate()`` and ``aauthenticate()`` check.

    It does not matter which module calls them, and which backends the project has.
    """
    throttled = f"{ThrottledBackend.__module__}.{ThrottledBackend.__qualname__}"
    if settings.THROTTLE_LOGINS or throttled in settings.AUTHENTICATION_BACKENDS:
        auth._get_compatible_backends = find_guarded_backends  # type: ignore[attr-defined]
        user_login_failed.connect(record_failure)


class LoginForm(AdminAuthenticationForm):
    """The login form of the admin; it says when the login is locked."""

    def get_invalid_login_error(self) -> ValidationError:
        """Return the error to show after a failed login."""
        if self.request is not None and is_locked(self.request, self.cleaned_data["username"]):
            return ValidationError(
                f"Too many failed logins. Try again in {LOCKOUT_MINUTES} minutes."
            )
        return super().get_invalid_login_error()


@sensitive_variables("credentials")
def check(request: HttpRequest | None, credentials: dict[str, Any]) -> None:
    """Raise PermissionDenied if the login is locked, or its name or password is too long."""
    if any(isinstance(value, str) and len(value) > MAX_LENGTH for value in credentials.values()):
        raise PermissionDenied
    request = request or clients.current_request.get()
    if request is not None and is_locked(request, get_name(credentials)):
        raise PermissionDenied


def is_locked(request: HttpRequest, username: str) -> bool:
    """Return whether this client has no attempt left for this user name."""
    failures = ADDRESS.count(get_network(request))
    if failures >= ADDRESS.slots:
        return True
    # An address without failures has one attempt for any name.
    return (
        failures > 0
        and NAME.count(normalize(username)) >= NAME.slots
        and entries.get(_get_pair(request, username)) is None
    )


def record_failure(request: HttpRequest | None, credentials: dict[str, Any], **kwargs: Any) -> None:
    """Take one slot of the client's address and one of the user name, unless it is locked.

    A receiver of ``user_login_failed``, which Django sends when all backends have failed.
    """
    request = request or clients.current_request.get()
    name = get_name(credentials)
    if request is None or "password" not in credentials or is_locked(request, name):
        return
    for limit, value in ((ADDRESS, get_network(request)), (NAME, normalize(name))):
        if value and limit.take(value) and limit.count(value) == limit.slots:
            logger.warning("Too many failed logins for one %s", limit.name)


def record_success(request: HttpRequest | None, credentials: dict[str, Any]) -> None:
    """Remember that this address logged in with this name."""
    request = request or clients.current_request.get()
    if request is not None:
        pair = _get_pair(request, get_name(credentials))
        if entries.get(pair) is None:
            entries.set(pair, "known", KNOWN)


def get_name(credentials: dict[str, Any]) -> str:
    """Return the name in credentials, whatever the project calls it; "" if there is none."""
    fields = ("username", get_user_model().USERNAME_FIELD, "email", *credentials)
    names = (credentials.get(field) for field in fields if field != "password")
    return next((name for name in names if isinstance(name, str) and name), "")


def unlock(value: str) -> int:
    """Forget the failed logins of a user name or an address; return their number."""
    count = 0
    for limit, key in ((NAME, normalize(value)), (ADDRESS, to_network(value))):
        count += limit.count(key)
        limit.clear(key)
    return count


def forget(username: str) -> int:
    """Forget the failed logins of a user name, and the addresses that have logged in with it."""
    return unlock(username) + entries.delete_all(f"{get_key('known', normalize(username))}.")


def normalize(username: str) -> str:
    """Return the form of a user name under which failures count."""
    return get_user_model().normalize_username(username[:MAX_LENGTH]).lower()


def _get_pair(request: HttpRequest, username: str) -> str:
    # The addresses of a name are found by its hash.
    return f"{get_key('known', normalize(username))}.{get_key(get_network(request))}"
