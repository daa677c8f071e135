"""Building blocks of the API: pagination, errors in JSON, and a throttled login."""

from typing import Any

from django.core.exceptions import RequestDataTooBig, ValidationError
from django.db import DataError
from rest_framework import pagination, permissions, serializers, status
from rest_framework.authentication import BaseAuthentication
from rest_framework.authtoken.serializers import AuthTokenSerializer
from rest_framework.exceptions import ErrorDetail, NotFound, UnsupportedMediaType
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.throttling import BaseThrottle
from rest_framework.views import APIView
from rest_framework.views import exception_handler as default_exception_handler

from ..models import Token
from .parsers import BoundedJSONParser
from .throttles import SharedThrottle
from .tokens import TokenAuthentication, create_token


class CursorPagination(pagination.CursorPagination):
    """Cursor pagination, which stays correct while rows are added; set ``ordering``."""

    page_size = 50

    def paginate_queryset(
        self, queryset: Any, request: Request, view: APIView | None = None
    ) -> list[Any] | None:
        """Return a page of the queryset; raise NotFound for an invalid cursor."""
        try:
            return super().paginate_queryset(queryset, request, view)
        except (ValidationError, DataError, OverflowError) as error:
            # The position in a forged cursor may be an invalid value for the field or the database.
            raise NotFound(self.invalid_cursor_message) from error


def exception_handler(error: Exception, context: dict[str, Any]) -> Response | None:
    """Return the response to an exception, in JSON even if the request body is too large."""
    if isinstance(error, RequestDataTooBig):
        return Response(
            {"detail": "The request is too large."}, status.HTTP_413_REQUEST_ENTITY_TOO_LARGE
        )
    if isinstance(error, UnsupportedMediaType):
        parsers = context["view"].get_parsers() if context.get("view") else []
        types = ", ".join(parser.media_type for parser in parsers)
        error.detail = ErrorDetail(f"{error.detail} Use the Content-Type {types}.", error.default_code)
    return default_exception_handler(error, context)


# Login


class LoginThrottle(SharedThrottle):
    """Limits the attempts to get a token, by client address."""

    scope = "login"
    rate = "10/min"


class TokenSerializer(serializers.Serializer[Any]):
    """A token of the HTTP authentication scheme ``Token``."""

    token = serializers.CharField()
    expires_at = serializers.DateTimeField()


class TokenView(APIView):
    """Returns a token for a user name and a password, and ends tokens."""

    parser_classes = (BoundedJSONParser,)

    def get_authenticators(self) -> list[BaseAuthentication]:
        """Require a token to delete it; creating one requires no authentication."""
        deletes = self.request is not None and self.request.method == "DELETE"
        return [TokenAuthentication()] if deletes else []

    def get_permissions(self) -> list[permissions.BasePermission]:
        """Return the permissions that go with the authenticators."""
        deletes = self.request.method == "DELETE"
        return [permissions.IsAuthenticated() if deletes else permissions.AllowAny()]

    def get_throttles(self) -> list[BaseThrottle]:
        """Limit attempts to guess passwords."""
        return [LoginThrottle()] if self.request.method == "POST" else super().get_throttles()

    def post(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Create a token."""
        serializer = AuthTokenSerializer(data=request.data, context={"request": request})
        serializer.is_valid(raise_exception=True)
        text, token = create_token(serializer.validated_data["user"])
        return Response(TokenSerializer({"token": text, "expires_at": token.expires_at}).data)

    def delete(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Delete the token that authenticates the request."""
        assert isinstance(request.auth, Token)
        request.auth.delete()
        return Response(status=status.HTTP_204_NO_CONTENT)
