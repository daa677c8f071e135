"""The API: posting, reading what is approved, following one's own."""

from datetime import timedelta

import pytest
from django.core.management import call_command
from django.utils import timezone
from rest_framework.authtoken.models import Token
from rest_framework.test import APIClient

from {{ cookiecutter.project_slug }}.models import Submission

URL = "/api/submissions/"
NOW = timezone.now()
PAST = NOW - timedelta(days=1)


@pytest.fixture
def author(make_user):
    return make_user("author")


@pytest.fixture
def api(author):
    """The API as the author sees it."""
    client = APIClient()
    client.force_authenticate(author)
    return client


@pytest.fixture
def anonymous(db):
    return APIClient()


def bodies(response):
    assert response.status_code == 200
    return [result["body"] for result in response.json()["results"]]


class TestPosting:
    def test_makes_a_pending_submission_of_ones_own(self, api, author):
        response = api.post(URL, {"body": "Please remember us."}, format="json")
        assert response.status_code == 201
        assert response.json().items() >= {"author": "author", "status": "pending"}.items()
        assert Submission.objects.get().author == author

    @pytest.mark.parametrize(
        ("fields", "field"),
        [
            ({}, "body"),
            ({"body": "   "}, "body"),
            ({"body": "x" * 5001}, "body"),
            ({"body": "nul \0"}, "body"),
            ({"body": "late", "expires_at": "2001-01-01T00:00:00Z"}, "expires_at"),
            ({"body": "late", "expires_at": "soon"}, "expires_at"),
        ],
    )
    def test_says_what_is_wrong(self, api, fields, field):
        response = api.post(URL, fields, format="json")
        assert response.status_code == 400
        assert list(response.json()) == [field]

    def test_cannot_moderate(self, api):
        fields = {"body": "Mine", "status": "approved", "response": "Yes", "author": "other"}
        response = api.post(URL, fields, format="json")
        assert response.json()["status"] == "pending"
        assert response.json()["response"] == ""
        assert response.json()["author"] == "author"

    def test_needs_a_login(self, anonymous):
        assert anonymous.post(URL, {"body": "Mine"}, format="json").status_code == 401

    def test_is_throttled(self, api):
        statuses = [api.post(URL, {"body": "x"}, format="json").status_code for _ in range(31)]
        assert statuses == [201] * 30 + [429]
        assert api.get(URL).status_code == 200


class TestReading:
    def test_lists_what_is_approved_and_current_newest_first(self, anonymous, make_submission):
        make_submission(body="old", approved_at=NOW, created_at=PAST)
        make_submission(body="new", approved_at=NOW)
        make_submission(body="pending")
        make_submission(body="archived", approved_at=PAST, archived_at=NOW)
        make_submission(body="expired", approved_at=PAST, expires_at=PAST)
        assert bodies(anonymous.get(URL)) == ["new", "old"]

    def test_pages_by_cursor(self, anonymous, make_submission, author):
        for number in range(51):
            make_submission(body=str(number), author=author, approved_at=NOW)
        first = anonymous.get(URL)
        second = anonymous.get(first.json()["next"])
        assert (len(bodies(first)), bodies(second)) == (50, ["0"])

    @pytest.mark.parametrize("cursor", ["x", "cD1ub3cmcj0x", "cD0lMDA="])
    def test_a_made_up_cursor_is_not_found(self, anonymous, cursor):
        assert anonymous.get(URL, {"cursor": cursor}).status_code == 404

    def test_an_archived_one_stays_at_its_address(self, anonymous, make_submission):
        submission = make_submission(approved_at=PAST, archived_at=NOW)
        response = anonymous.get(f"{URL}{submission.pk}/")
        assert (response.status_code, response.json()["status"]) == (200, "archived")

    def test_nobody_reads_anothers_that_is_not_approved(self, api, anonymous, make_submission):
        for fields in ({}, {"flagged_at": NOW}, {"answered_at": NOW}):
            submission = make_submission(**fields)
            for client in (api, anonymous):
                assert client.get(f"{URL}{submission.pk}/").status_code == 404

    def test_one_reads_ones_own(self, api, author, make_submission):
        submission = make_submission(author=author)
        assert api.get(f"{URL}{submission.pk}/").status_code == 200

    @pytest.mark.parametrize("key", ["0", "9" * 30, "x"])
    def test_what_is_not_there_is_not_found(self, anonymous, key):
        assert anonymous.get(f"{URL}{key}/").status_code == 404

    def test_takes_the_same_queries_however_many(
        self, anonymous, make_submission, django_assert_num_queries
    ):
        for _ in range(5):
            make_submission(approved_at=NOW)
        with django_assert_num_queries(1):
            assert len(bodies(anonymous.get(URL))) == 5


class TestMine:
    def test_holds_all_of_ones_own(self, api, author, make_submission):
        make_submission(body="another", approved_at=NOW)
        make_submission(body="archived", author=author, archived_at=NOW)
        make_submission(body="expired", author=author, expires_at=PAST)
        make_submission(body="pending", author=author)
        assert bodies(api.get(f"{URL}mine/")) == ["pending", "expired", "archived"]
        assert bodies(api.get(f"{URL}mine/", {"include_archived": "false"})) == ["pending"]

    def test_says_what_is_wrong(self, api):
        response = api.get(f"{URL}mine/", {"include_archived": "perhaps"})
        assert (response.status_code, list(response.json())) == (400, ["include_archived"])

    def test_needs_a_login(self, anonymous):
        assert anonymous.get(f"{URL}mine/").status_code == 401


class TestLogin:
    def test_by_token(self, anonymous, author):
        response = anonymous.post(
            "/api/token/", {"username": "author", "password": "secret"}, format="json"
        )
        token = response.json()["token"]
        assert token == Token.objects.get(user=author).key
        anonymous.credentials(HTTP_AUTHORIZATION=f"Token {token}")
        assert anonymous.get(f"{URL}mine/").status_code == 200

    def test_by_session(self, client, author):
        client.force_login(author)
        assert client.get(f"{URL}mine/").status_code == 200

    def test_guessing_passwords_is_throttled(self, anonymous, author):
        statuses = [
            anonymous.post(
                "/api/token/", {"username": "author", "password": str(number)}, format="json"
            ).status_code
            for number in range(11)
        ]
        assert statuses == [400] * 10 + [429]


class TestSchema:
    def test_is_complete(self, capsys):
        call_command("spectacular", "--validate", "--fail-on-warn")
        assert "/api/submissions/mine/" in capsys.readouterr().out

    def test_has_a_page(self, anonymous):
        assert "swagger-ui" in anonymous.get("/api/docs/").text
