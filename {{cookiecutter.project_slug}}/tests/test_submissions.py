"""Submissions: their status, and who can read them."""

from datetime import timedelta

import pytest
from django.contrib.auth.models import AnonymousUser
from django.utils import timezone

from {{ cookiecutter.project_slug }}.models import Submission

NOW = timezone.now()
PAST, FUTURE = NOW - timedelta(days=1), NOW + timedelta(days=1)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, "pending"),
        ({"flagged_at": PAST}, "flagged"),
        ({"approved_at": PAST}, "approved"),
        ({"answered_at": PAST}, "answered"),
        ({"approved_at": PAST, "answered_at": PAST}, "approved"),
        ({"approved_at": PAST, "archived_at": PAST}, "archived"),
        ({"approved_at": PAST, "expires_at": PAST}, "archived"),
        ({"approved_at": PAST, "expires_at": FUTURE}, "approved"),
    ],
)
def test_status_follows_from_the_decisions(make_submission, fields, status):
    assert make_submission(**fields).status == status


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, ["pending", "current"]),
        ({"flagged_at": PAST}, ["flagged", "current"]),
        ({"approved_at": PAST}, ["approved", "current", "visible"]),
        ({"approved_at": PAST, "expires_at": FUTURE}, ["approved", "current", "visible"]),
        ({"approved_at": PAST, "expires_at": PAST}, ["approved", "archived"]),
        ({"approved_at": PAST, "archived_at": PAST}, ["approved", "archived"]),
        ({"answered_at": PAST}, ["current", "answered"]),
    ],
)
def test_querysets_contain_a_submission_according_to_its_status(make_submission, fields, names):
    make_submission(**fields)
    querysets = ("pending", "flagged", "approved", "archived", "current", "visible", "answered")
    found = [name for name in querysets if getattr(Submission.objects, name)().exists()]
    assert found == sorted(names, key=querysets.index)


def test_answered_between_excludes_the_end(make_submission):
    make_submission(answered_at=PAST)
    assert Submission.objects.answered_between(PAST, NOW).count() == 1
    assert Submission.objects.answered_between(PAST - timedelta(days=1), PAST).count() == 0


@pytest.mark.parametrize(
    ("change", "status"), [("approve", "approved"), ("flag", "flagged"), ("archive", "archived")]
)
def test_moderation_changes_the_status(make_submission, change, status):
    submission = make_submission()
    assert getattr(Submission.objects, change)() == 1
    submission.refresh_from_db()
    assert submission.status == status


def test_flagging_hides_an_approved_submission(make_submission):
    make_submission(approved_at=PAST)
    Submission.objects.flag()
    assert not Submission.objects.visible().exists()


def test_approved_submissions_are_readable_by_all_and_others_by_their_author(
    make_submission, make_user
):
    pending = make_submission()
    approved = make_submission(approved_at=PAST)
    archived = make_submission(approved_at=PAST, archived_at=PAST)
    public = {approved, archived}
    assert set(Submission.objects.readable_by(AnonymousUser())) == public
    assert set(Submission.objects.readable_by(make_user("other"))) == public
    assert set(Submission.objects.readable_by(pending.author)) == public | {pending}


def test_corrected_answer_keeps_its_time(make_submission, moderator):
    submission = make_submission()
    assert submission.answer("We do.", moderator) is True
    first = submission.answered_at
    assert submission.answer("We always do.", moderator) is False
    assert (submission.response, submission.answered_at) == ("We always do.", first)
