"""The OpenAPI schema of the service's API. Production does not load this module.

The schema is generated from the views. An app can extend it in a module ``openapi``, with
extensions of drf-spectacular.

https://drf-spectacular.readthedocs.io/en/latest/blueprints.html
"""

from io import StringIO
from typing import Any

from django.core.management import call_command
from django.utils.module_loading import autodiscover_modules
from drf_spectacular.extensions import OpenApiViewExtension
from drf_spectacular.management.commands.spectacular import Command
from drf_spectacular.utils import OpenApiResponse, extend_schema, extend_schema_view
from rest_framework import serializers
from rest_framework.authtoken.serializers import AuthTokenSerializer
from rest_framework.views import APIView

from .views import TokenSerializer, TokenView


class ErrorSerializer(serializers.Serializer[Any]):
    """Why a request failed."""

    detail = serializers.CharField()


INVALID = OpenApiResponse(
    {
        "type": "object",
        "additionalProperties": {
            "oneOf": [{"type": "array", "items": {"type": "string"}}, {"type": "string"}]
        },
    },
    description="The problems by field; `detail` if the request is not valid JSON.",
)


def errors(*statuses: int) -> dict[int, type[ErrorSerializer]]:
    """Return the responses of an operation that fails with one of these statuses."""
    return dict.fromkeys(statuses, ErrorSerializer)


class TokenExtension(OpenApiViewExtension):  # type: ignore[no-untyped-call]
    """Describes the view that creates and deletes tokens."""

    target_class = TokenView

    def view_replacement(self) -> type[APIView]:
        """Return the view with its description."""

        @extend_schema_view(
            post=extend_schema(
                summary="Get a token for a user name and a password",
                auth=[],
                request=AuthTokenSerializer,
                responses={200: TokenSerializer, 400: INVALID} | errors(413, 415, 429),
            ),
            delete=extend_schema(
                summary="End the token of this request", responses={204: None} | errors(401, 429)
            ),
        )
        class Described(TokenView):
            pass

        return Described


def generate_schema(**options: Any) -> str:
    """Return the schema as YAML; options are those of ``manage.py spectacular``."""
    autodiscover_modules("openapi")
    output = StringIO()
    call_command(Command(), stdout=output, **options)
    return output.getvalue()
