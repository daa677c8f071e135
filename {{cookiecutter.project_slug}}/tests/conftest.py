import pytest
from django.contrib.auth.models import Group
from django.core.cache import cache

from {{ cookiecutter.project_slug }}.models import MODERATORS, Submission, User
from {{ cookiecutter.project_slug }}.ops.celery import Task


@pytest.fixture(autouse=True)
def _empty_cache():
    """Forget the requests of earlier tests, which throttles would count."""
    cache.clear()


@pytest.fixture
def make_user(db):
    """Return a function that creates a user with an e-mail address."""

    def make(username, **fields):
        fields.setdefault("email", f"{username}@example.com")
        return User.objects.create_user(username, password="secret", **fields)

    return make


@pytest.fixture
def make_submission(make_user):
    """Return a function that creates a submission, by a new author unless one is given."""

    def make(created_at=None, **fields):
        fields.setdefault("body", "Please remember us.")
        if "author" not in fields:
            fields["author"] = make_user(f"author{Submission.objects.count()}")
        submission = Submission.objects.create(**fields)
        if created_at:
            Submission.objects.filter(pk=submission.pk).update(created_at=created_at)
            submission.refresh_from_db()
        return submission

    return make


@pytest.fixture
def superuser(make_user):
    return make_user("admin", is_superuser=True, is_staff=True)


@pytest.fixture
def moderator(make_user):
    """A user who may moderate and nothing else."""
    user = make_user("moderator", is_staff=True)
    user.groups.add(Group.objects.get(name=MODERATORS))
    return user


@pytest.fixture
def queue(monkeypatch):
    """Return the list of queued tasks, as (name, arguments), without a broker."""
    queued = []

    def apply_async(task, args=None, kwargs=None, **options):
        queued.append((task.name, tuple(args or ())))

    monkeypatch.setattr(Task, "apply_async", apply_async)
    return queued
