"""API tokens, which expire after ``TOKEN_DAYS`` or when the user's password changes."""

import hashlib
import re
import secrets
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.contrib.auth.base_user import AbstractBaseUser
from django.utils import timezone
from django.utils.crypto import constant_time_compare
from rest_framework import authentication
from rest_framework.exceptions import AuthenticationFailed

from ..models import Token

#: Maximum number of tokens of a user; a new token replaces the oldest.
MAX_TOKENS = 20

#: The primary key of the row, and the secret.
FORMAT = re.compile(r"([0-9]{1,18})-([A-Za-z0-9_-]{43})")


class TokenAuthentication(authentication.TokenAuthentication):
    """Checks tokens of the HTTP authentication scheme ``Token``."""

    def authenticate_credentials(self, key: str) -> tuple[AbstractBaseUser, Token]:
        """Return the user and the token; raise AuthenticationFailed for an invalid one."""
        if match := FORMAT.fullmatch(key):
            tokens = Token.objects.select_related("user")
            token = tokens.filter(pk=int(match[1]), expires_at__gt=timezone.now()).first()
            if (
                token is not None
                and constant_time_compare(token.digest, _hash(match[2], token.user))
                and token.user.is_active
            ):
                return token.user, token
        raise AuthenticationFailed("Invalid or expired token.")


def create_token(user: Any) -> tuple[str, Token]:
    """Create a token for a user; return its text, which is not stored, and its row."""
    secret = secrets.token_urlsafe(32)
    token = Token.objects.create(
        user=user,
        digest=_hash(secret, user),
        expires_at=timezone.now() + timedelta(days=settings.TOKEN_DAYS),
    )
    latest = Token.objects.filter(user=user).order_by("-pk").values_list("pk", flat=True)
    Token.objects.filter(user=user).exclude(pk__in=list(latest[:MAX_TOKENS])).delete()
    return f"{token.pk}-{secret}", token


def _hash(secret: str, user: Any) -> str:
    # The password's hash is included, so that a new password invalidates the token.
    return hashlib.sha256(f"{secret}\n{user.password}".encode()).hexdigest()
