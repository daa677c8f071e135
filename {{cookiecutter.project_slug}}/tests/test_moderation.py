"""Moderation: the list, the actions and the permissions of moderators in the admin."""

import pytest
from django.urls import reverse
from django.utils import timezone
from django_celery_beat.models import PeriodicTask

from {{ cookiecutter.project_slug }}.models import Submission, User

LIST = reverse(f"admin:{Submission._meta.app_label}_submission_changelist")


@pytest.fixture
def admin(client, moderator):
    """A client that is logged in as a moderator."""
    client.force_login(moderator)
    return client


def shown(admin, **query):
    response = admin.get(LIST, query)
    assert response.status_code == 200
    return set(response.context["cl"].result_list)


def act(admin, action, *submissions, **fields):
    chosen = [submission.pk for submission in submissions]
    return admin.post(LIST, {"action": action, "_selected_action": chosen, **fields}, follow=True)


def test_list_shows_pending_submissions_by_default(admin, make_submission):
    pending = make_submission()
    flagged = make_submission(flagged_at=timezone.now())
    assert shown(admin) == {pending}
    assert shown(admin, status="flagged") == {flagged}
    assert shown(admin, status="all") == {pending, flagged}


def test_filter_shows_counts(admin, make_submission):
    make_submission()
    make_submission()
    make_submission(flagged_at=timezone.now())
    text = admin.get(LIST).text
    assert "Pending (2)" in text
    assert "Flagged (1)" in text


def test_list_can_be_searched(admin, make_submission):
    found = make_submission(body="A needle")
    make_submission(body="Hay")
    assert shown(admin, q="needle") == {found}
    assert shown(admin, q=found.author.email) == {found}


def test_list_of_any_length_takes_the_same_number_of_queries(
    admin, make_submission, django_assert_num_queries
):
    for _ in range(3):
        make_submission()
    with django_assert_num_queries(9):
        assert len(shown(admin)) == 3
    for _ in range(20):
        make_submission()
    with django_assert_num_queries(9):
        assert len(shown(admin)) == 23


@pytest.mark.parametrize(
    ("action", "status"), [("approve", "approved"), ("flag", "flagged"), ("archive", "archived")]
)
def test_action_changes_all_selected_submissions(admin, make_submission, action, status):
    one, two, other = make_submission(), make_submission(), make_submission()
    response = act(admin, action, one, two)
    assert f"2 submissions were {status}." in response.text
    found = {each.pk: each.status for each in Submission.objects.all()}
    assert found == {one.pk: status, two.pk: status, other.pk: "pending"}


def test_answer_action_asks_for_the_answer_and_saves_it_for_all_selected(
    admin, moderator, make_submission, queue
):
    one, two = make_submission(body="<b>One</b>"), make_submission()
    response = act(admin, "answer", one, two)
    assert "&lt;b&gt;One&lt;/b&gt;" in response.text
    assert Submission.objects.pending().count() == 2

    response = act(admin, "answer", one, two, response="")
    assert "This field is required." in response.text

    response = act(admin, "answer", one, two, response="We do.")
    assert "2 submissions were answered." in response.text
    for submission in Submission.objects.all():
        assert (submission.response, submission.answered_by) == ("We do.", moderator)


def test_answer_can_be_given_on_the_page_of_a_submission(admin, moderator, make_submission, queue):
    submission = make_submission()
    page = submission.get_admin_url()
    admin.post(page, {"response": "We do.", "expires_at_0": "", "expires_at_1": ""})
    submission.refresh_from_db()
    assert (submission.status, submission.answered_by) == ("answered", moderator)


def test_text_of_a_submission_cannot_be_changed(admin, make_submission):
    submission = make_submission(body="Mine")
    admin.post(submission.get_admin_url(), {"body": "Yours", "response": ""})
    submission.refresh_from_db()
    assert submission.body == "Mine"


@pytest.mark.parametrize("model", [PeriodicTask, User])
def test_moderator_has_no_access_to_other_models(admin, model):
    for page in ("changelist", "add"):
        url = reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_{page}")
        assert admin.get(url).status_code == 403


def test_other_staff_cannot_moderate(client, make_user, make_submission):
    client.force_login(make_user("staff", is_staff=True))
    submission = make_submission()
    assert client.get(LIST).status_code == 403
    assert act(client, "approve", submission).status_code == 403
    assert Submission.objects.pending().count() == 1
