"""The API: people post submissions, follow their own, and read what is approved."""

from django.core.exceptions import ValidationError
from django.utils import timezone
from drf_spectacular.utils import (
    OpenApiParameter,
    OpenApiResponse,
    extend_schema,
    extend_schema_view,
)
from rest_framework import mixins, permissions, routers, serializers, throttling, viewsets
from rest_framework.authtoken.serializers import AuthTokenSerializer
from rest_framework.authtoken.views import ObtainAuthToken
from rest_framework.decorators import action
from rest_framework.exceptions import NotFound
from rest_framework.pagination import CursorPagination
from rest_framework.parsers import JSONParser

from .models import Submission


class SubmissionSerializer(serializers.ModelSerializer):
    """A submission, as its author and every reader see it."""

    author = serializers.CharField(source="author.username", read_only=True)
    status = serializers.ChoiceField(choices=Submission.STATUSES, read_only=True)

    class Meta:
        model = Submission
        fields = (
            "id",
            "author",
            "body",
            "status",
            "created_at",
            "expires_at",
            "response",
            "answered_at",
        )
        read_only_fields = ("response",)

    def validate_expires_at(self, value):
        if value is not None and value <= timezone.now():
            raise serializers.ValidationError("This is not in the future.")
        return value


class MineOptions(serializers.Serializer):
    """What the list of one's own submissions holds."""

    include_archived = serializers.BooleanField(
        default=True, help_text="Also what is archived or expired."
    )


class ErrorSerializer(serializers.Serializer):
    """Why a request failed."""

    detail = serializers.CharField()


class NewestFirst(CursorPagination):
    """Pages by cursor, which stay right while submissions come in."""

    ordering = ("-created_at", "-id")
    page_size = 50

    def paginate_queryset(self, queryset, request, view=None):
        try:
            return super().paginate_queryset(queryset, request, view)
        except ValidationError as error:
            # A made-up cursor may hold what is no time.
            raise NotFound(self.invalid_cursor_message) from error


def errors(*statuses):
    """Return the failures of an operation for its schema."""
    return dict.fromkeys(statuses, ErrorSerializer)


LIST = {200: SubmissionSerializer(many=True)}
INVALID = OpenApiResponse(
    {
        "type": "object",
        "additionalProperties": {
            "oneOf": [{"type": "array", "items": {"type": "string"}}, {"type": "string"}]
        },
    },
    description="What is wrong, by field; `detail` where the request is no JSON at all.",
)


@extend_schema_view(
    list=extend_schema(
        summary="List what is approved and current", responses=LIST | errors(401, 404, 429)
    ),
    retrieve=extend_schema(
        summary="Read a submission: an approved one, or one's own",
        parameters=[OpenApiParameter("id", int, OpenApiParameter.PATH)],
        responses={200: SubmissionSerializer} | errors(401, 404, 429),
    ),
    create=extend_schema(
        summary="Post a submission",
        responses={201: SubmissionSerializer, 400: INVALID} | errors(401, 403, 415, 429),
    ),
)
class SubmissionViewSet(
    mixins.CreateModelMixin,
    mixins.ListModelMixin,
    mixins.RetrieveModelMixin,
    viewsets.GenericViewSet,
):
    """Submissions: what is approved, and one's own."""

    serializer_class = SubmissionSerializer
    permission_classes = (permissions.IsAuthenticatedOrReadOnly,)
    pagination_class = NewestFirst
    # What is no number is not found here, in JSON, and not before, in HTML.
    lookup_value_converter = "str"

    def get_queryset(self):
        submissions = Submission.objects.select_related("author")
        if self.action == "list":
            return submissions.visible()
        return submissions.readable_by(self.request.user)

    @property
    def throttle_scope(self):
        return "post" if self.action == "create" else None

    def perform_create(self, serializer):
        serializer.save(author=self.request.user)

    @extend_schema(
        summary="List one's own submissions",
        parameters=[MineOptions],
        responses=LIST | {400: INVALID} | errors(401, 404, 429),
    )
    @action(detail=False, permission_classes=[permissions.IsAuthenticated])
    def mine(self, request):
        submissions = self.get_queryset().filter(author=request.user)
        options = MineOptions(data=request.query_params)
        options.is_valid(raise_exception=True)
        if not options.validated_data["include_archived"]:
            submissions = submissions.current()
        page = self.paginate_queryset(submissions)
        return self.get_paginated_response(self.get_serializer(page, many=True).data)


class TokenSerializer(serializers.Serializer):
    """What proves who is there: send it as ``Authorization: Token ...``."""

    token = serializers.CharField()


class TokenView(ObtainAuthToken):
    """Give a token for a user name and a password."""

    parser_classes = (JSONParser,)
    throttle_classes = (throttling.ScopedRateThrottle,)
    throttle_scope = "login"

    @extend_schema(
        summary="Get a token for a user name and a password",
        auth=[],
        request=AuthTokenSerializer,
        responses={200: TokenSerializer, 400: INVALID} | errors(415, 429),
    )
    def post(self, request, *args, **kwargs):
        return super().post(request, *args, **kwargs)


router = routers.SimpleRouter(use_regex_path=False)
router.register("submissions", SubmissionViewSet, basename="submission")
