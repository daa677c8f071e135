"""Logins: after too many that failed, all are refused for a while, through whatever door.

A failure takes one of the slots of its client's address, and one of the name that it
tried, for a while. Where none is left, the password is not even looked at. All web
processes share the slots, which are a table of the database.
"""

import logging

from django.contrib.admin.forms import AdminAuthenticationForm
from django.contrib.auth import get_user_model
from django.contrib.auth.backends import ModelBackend
from django.core.cache import caches
from django.core.exceptions import ValidationError
from django.utils.crypto import salted_hmac
from rest_framework.throttling import BaseThrottle

logger = logging.getLogger(__name__)

#: How many logins may fail from one address, and how many for one name from anywhere.
SLOTS = {"address": 10, "name": 50}

#: For how long a failure counts, in minutes.
MINUTES = 15


class ThrottledBackend(ModelBackend):
    """Checks a password, unless too many were wrong."""

    def authenticate(self, request, username=None, password=None, **kwargs):
        if username is None:
            username = kwargs.get(get_user_model().USERNAME_FIELD)
        if request is None or username is None:
            return super().authenticate(request, username, password, **kwargs)
        if refused(request, username):
            return None
        user = super().authenticate(request, username, password, **kwargs)
        if user is None:
            count_failure(request, username)
        return user


class LoginForm(AdminAuthenticationForm):
    """The login of the admin, which says when it is closed."""

    def get_invalid_login_error(self):
        if refused(self.request, self.cleaned_data["username"]):
            return ValidationError(
                f"Too many logins failed. Try again in {MINUTES} minutes.", code="refused"
            )
        return super().get_invalid_login_error()


def refused(request, username):
    """Return whether all slots of the client's address or of the name are taken."""
    return any(not free for _, free in _free_slots(request, username))


def count_failure(request, username):
    """Take a slot of the client's address and one of the name."""
    for kind, free in _free_slots(request, username):
        # Another process may be faster: the next one then.
        next(filter(_take, free), None)
        if len(free) == 1:
            logger.warning("Logins of one %s are refused for %d minutes", kind, MINUTES)


def _take(slot):
    return caches["logins"].add(slot, "taken", MINUTES * 60)


def _free_slots(request, username):
    """Yield each kind of slots with those that are free; who it is stands nowhere in them."""
    about = {
        "address": BaseThrottle().get_ident(request),
        "name": get_user_model().normalize_username(username).lower(),
    }
    for kind, number in SLOTS.items():
        digest = salted_hmac("logins", f"{kind} {about[kind]}", algorithm="sha256").hexdigest()
        slots = [f"{digest}.{slot}" for slot in range(number)]
        taken = caches["logins"].get_many(slots)
        yield kind, [slot for slot in slots if slot not in taken]
