"""The API: users post submissions, list their own, and read approved ones."""

from django.utils import timezone
from drf_spectacular.utils import OpenApiParameter, extend_schema, extend_schema_view
from rest_framework import mixins, permissions, routers, serializers, viewsets
from rest_framework.decorators import action
from rest_framework.throttling import UserRateThrottle

from .models import Submission
from .ops.api import INVALID, CursorPagination, errors


class SubmissionSerializer(serializers.ModelSerializer):
    """A submission, as its author and all readers see it."""

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
            raise serializers.ValidationError("Must be in the future.")
        return value


class MineOptions(serializers.Serializer):
    """Query parameters of the list of the user's own submissions."""

    include_archived = serializers.BooleanField(
        default=True, help_text="Include archived and expired submissions."
    )


class NewestFirst(CursorPagination):
    """Pages of submissions, the newest first."""

    ordering = ("-created_at", "-id")


class PostThrottle(UserRateThrottle):
    """Limits how many submissions a user posts."""

    scope = "post"
    rate = "30/hour"


LIST = {200: SubmissionSerializer(many=True)}


@extend_schema_view(
    list=extend_schema(
        summary="List approved, current submissions", responses=LIST | errors(401, 404, 429)
    ),
    retrieve=extend_schema(
        summary="Read an approved submission or one of your own",
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
    """Approved submissions, and the user's own."""

    serializer_class = SubmissionSerializer
    permission_classes = (permissions.IsAuthenticatedOrReadOnly,)
    pagination_class = NewestFirst
    # Non-numeric ids get a JSON 404.
    lookup_value_converter = "str"

    def get_queryset(self):
        submissions = Submission.objects.select_related("author")
        if self.action == "list":
            return submissions.visible()
        return submissions.readable_by(self.request.user)

    def get_throttles(self):
        throttles = super().get_throttles()
        return [*throttles, PostThrottle()] if self.action == "create" else throttles

    def perform_create(self, serializer):
        serializer.save(author=self.request.user)

    @extend_schema(
        summary="List your own submissions",
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


router = routers.SimpleRouter(use_regex_path=False)
router.register("submissions", SubmissionViewSet, basename="submission")
