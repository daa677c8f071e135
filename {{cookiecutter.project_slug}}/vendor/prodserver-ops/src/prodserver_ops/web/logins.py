"""Login throttling: after too many failures, logins are refused for some minutes.

This applies to the admin, the API and every other use of ``authenticate()``. If the client's
address reaches the limit ``ADDRESS``, logins fail without checking the password. If the user name
reaches the limit ``NAME``, addresses that have never logged in with that name have one attempt in
the same time. Addresses that have are not affected, so nobody can lock a user out.

``python manage.py unlock`` ends a lock.
"""

import logging
from datetime import timedelta
from typing import Any

from django.contrib.admin.forms import AdminAuthenticationForm
from django.contrib.auth import get_user_model
from django.contrib.auth.backends import ModelBackend
from django.contrib.auth.base_user import AbstractBaseUser
from django.core.exceptions import ValidationError
from django.http import HttpRequest

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
    """Checks a password unless too many logins failed."""

    def authenticate(  # type: ignore[override]
        self,
        request: HttpRequest | None,
        username: str | None = None,
        password: str | None = None,
        **kwargs: Any,
    ) -> AbstractBaseUser | None:
        """Return the user, or None if the credentials are wrong or the login is locked."""
        if username is None:
            username = kwargs.get(get_user_model().USERNAME_FIELD)
        if max(len(username or ""), len(password or "")) > MAX_LENGTH:
            return None
        if request is None or username is None:
            return super().authenticate(request, username, password, **kwargs)
        if is_locked(request, username):
            return None
        user = super().authenticate(request, username, password, **kwargs)
        if user is None:
            record_failure(request, username)
        else:
            record_success(request, username)
        return user


class LoginForm(AdminAuthenticationForm):
    """The login form of the admin; it says when the login is locked."""

    def get_invalid_login_error(self) -> ValidationError:
        """Return the error to show after a failed login."""
        if self.request is not None and is_locked(self.request, self.cleaned_data["username"]):
            return ValidationError(
                f"Too many failed logins. Try again in {LOCKOUT_MINUTES} minutes."
            )
        return super().get_invalid_login_error()


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


def record_failure(request: HttpRequest, username: str) -> None:
    """Take one slot of the client's address and one of the user name."""
    for limit, value in ((ADDRESS, get_network(request)), (NAME, normalize(username))):
        if limit.take(value) and limit.count(value) == limit.slots:
            logger.warning("Too many failed logins for one %s", limit.name)


def record_success(request: HttpRequest, username: str) -> None:
    """Remember that this address logged in with this name."""
    pair = _get_pair(request, username)
    if entries.get(pair) is None:
        entries.set(pair, "known", KNOWN)


def unlock(value: str) -> int:
    """Forget the failed logins of a user name or an address; return their number."""
    count = 0
    for limit, key in ((NAME, normalize(value)), (ADDRESS, to_network(value))):
        count += limit.count(key)
        limit.clear(key)
    return count


def normalize(username: str) -> str:
    """Return the form of a user name under which failures count."""
    return get_user_model().normalize_username(username[:MAX_LENGTH]).lower()


def _get_pair(request: HttpRequest, username: str) -> str:
    return get_key("known", get_network(request), normalize(username))
