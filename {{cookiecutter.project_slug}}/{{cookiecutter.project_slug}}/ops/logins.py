"""Login throttling: after too many failures, logins are refused for some minutes.

It applies to the admin, the API and every other use of ``authenticate()``. Each failed
login takes one slot of the client's address and one of the user name, for
``LOCKOUT_MINUTES``. If no slot is free, the password is not checked. All web processes
share the slots through a database cache.
"""

import logging
from collections.abc import Iterator
from typing import Any

from django.contrib.admin.forms import AdminAuthenticationForm
from django.contrib.auth import get_user_model
from django.contrib.auth.backends import ModelBackend
from django.contrib.auth.base_user import AbstractBaseUser
from django.core.cache import caches
from django.core.exceptions import ValidationError
from django.http import HttpRequest
from django.utils.crypto import salted_hmac
from rest_framework.throttling import BaseThrottle

logger = logging.getLogger(__name__)

#: How many logins may fail from one address, and how many for one user name.
SLOTS = {"address": 10, "user name": 50}

#: How long a failure counts, in minutes.
LOCKOUT_MINUTES = 15

#: Characters of a user name or password above which a login fails at once: the time to
#: normalize a name grows with the square of its length.
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
        return user


class LoginForm(AdminAuthenticationForm):
    """The login form of the admin; it says when the login is locked."""

    def get_invalid_login_error(self) -> ValidationError:
        """Return the error to show after a failed login."""
        if self.request is not None and is_locked(self.request, self.cleaned_data["username"]):
            return ValidationError(
                f"Too many failed logins. Try again in {LOCKOUT_MINUTES} minutes.", code="locked"
            )
        return super().get_invalid_login_error()


def is_locked(request: HttpRequest, username: str) -> bool:
    """Return whether the client's address or the user name has no free slot."""
    return any(not free for _, free in _get_free_slots(request, username))


def record_failure(request: HttpRequest, username: str) -> None:
    """Take one slot of the client's address and one of the user name."""
    for kind, free in _get_free_slots(request, username):
        # Another process may take a slot first; then take the next one.
        next(filter(_take, free), None)
        if len(free) == 1:
            logger.warning("Logins of one %s are locked for %d minutes", kind, LOCKOUT_MINUTES)


def _take(slot: str) -> bool:
    return caches["logins"].add(slot, "taken", LOCKOUT_MINUTES * 60)


def _get_free_slots(request: HttpRequest, username: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the free slots of each kind; their names are hashes."""
    values = {
        "address": BaseThrottle().get_ident(request),  # type: ignore[arg-type]
        "user name": get_user_model().normalize_username(username).lower(),
    }
    for kind, number in SLOTS.items():
        digest = salted_hmac("logins", f"{kind} {values[kind]}", algorithm="sha256").hexdigest()
        slots = [f"{digest}.{slot}" for slot in range(number)]
        taken = caches["logins"].get_many(slots)
        yield kind, [slot for slot in slots if slot not in taken]
