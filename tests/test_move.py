"""Moving: a service in the old style comes here, with its users, rows, messages and schedule."""

import re
import subprocess

import pytest

from tests.conftest import connect_to_rabbitmq, production_variables
from tests.servers import wait_for

pytestmark = pytest.mark.slow

#: A project with ``auth.User`` or a user of its own, and a schedule in code.
OLD_PROJECT = {
    "manage.py": """\
import os, sys
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "oldproject.settings")
from django.core.management import execute_from_command_line
execute_from_command_line(sys.argv)
""",
    "oldproject/__init__.py": "from .celery import app as celery_app\n",
    "oldproject/celery.py": """\
import os
from celery import Celery
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "oldproject.settings")
app = Celery("oldproject", broker=os.environ["RABBITMQ_URL"])
app.conf.update(task_ignore_result=True, task_default_queue="QUEUE", beat_schedule={
    "count": {"task": "OLDAPP.tasks.count", "schedule": 1.0, "args": ["scheduled"]},
})
app.autodiscover_tasks(["OLDAPP"])
""",
    "oldproject/urls.py": """\
from django.contrib import admin
from django.urls import path
urlpatterns = [path("admin/", admin.site.urls)]
""",
    "oldproject/settings.py": """\
import os, re
match = re.match(r"postgres://(\\w+)@([^:]+):(\\d+)/(\\w+)", os.environ["DATABASE_URL"])
USER, HOST, PORT, NAME = match.groups()
SECRET_KEY, DEBUG, ALLOWED_HOSTS, USE_TZ = "old", False, ["*"], True
ROOT_URLCONF = "oldproject.urls"
INSTALLED_APPS = ["django.contrib.admin", "django.contrib.auth", "django.contrib.contenttypes",
    "django.contrib.sessions", "django.contrib.messages", "rest_framework",
    "rest_framework.authtoken", "OLDAPP"]
AUTH_USER_MODEL = "THE_USER"
DATABASES = {"default": {"ENGINE": "django.db.backends.postgresql", "USER": USER, "HOST": HOST,
    "PORT": PORT, "NAME": NAME}}
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
MIDDLEWARE = ["django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware"]
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True,
    "OPTIONS": {"context_processors": ["django.template.context_processors.request",
    "django.contrib.auth.context_processors.auth",
    "django.contrib.messages.context_processors.messages"]}}]
""",
    "OLDAPP/__init__.py": "",
    "OLDAPP/migrations/__init__.py": "",
    "OLDAPP/tasks.py": """\
import os
from celery import shared_task
@shared_task(name="OLDAPP.tasks.count")
def count(name):
    with open(os.environ["COUNTS"], "a") as file:
        file.write(f"{name}\\n")
""",
    "OLDAPP/models.py": """\
from django.conf import settings
from django.contrib.auth.models import AbstractUser
from django.db import models
USER_CLASS
class Room(models.Model):
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE)
    guests = models.ManyToManyField(settings.AUTH_USER_MODEL, related_name="visited")
    name = models.CharField(max_length=50)
""",
}

USER_CLASS = """
class Member(AbstractUser):
    nickname = models.CharField(max_length=20, default="")
"""

FILL = """
from django.apps import apps
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Group, Permission
from rest_framework.authtoken.models import Token
User, Room = get_user_model(), apps.get_model("OLDAPP", "Room")
users = [User.objects.create_user(f"user{n}", password=f"secret{n}") for n in range(3)]
User.objects.create_superuser("boss", password="secret")
group = Group.objects.create(name="staff")
name = User._meta.model_name
group.permissions.add(Permission.objects.get(codename=f"change_{name}"))
users[0].groups.add(group)
room = Room.objects.create(owner=users[0], name="Attic")
room.guests.add(users[1], users[2])
Token.objects.create(key="k" * 40, user=users[1])
"""

#: The models that the team brings along.
NEW_MODELS = """

class Room(models.Model):
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE)
    guests = models.ManyToManyField(settings.AUTH_USER_MODEL, related_name="visited")
    name = models.CharField(max_length=50)
    floor = models.IntegerField(default=1)

    class Meta:
        db_table = "OLDAPP_room"
        indexes = [models.Index(fields=["floor"], name="room_floor")]
        constraints = [models.CheckConstraint(condition=models.Q(floor__gt=0), name="no_cellar")]
"""

NEW_TASK = '''

from celery import shared_task


@shared_task(name="OLDAPP.tasks.count")
def count(name):
    """Write a line."""
    import os

    with open(os.environ["COUNTS"], "a") as file:
        file.write(f"{name}\\n")
'''

SCHEDULE = """\
from datetime import timedelta

from django.db import migrations
from prodserver_ops.scheduling.operations import CreateSchedule


class Migration(migrations.Migration):
    dependencies = [
        ("SLUG", "0001_initial"),
        ("django_celery_beat", "0019_alter_periodictasks_options"),
    ]

    operations = [
        CreateSchedule(
            "count", task="OLDAPP.tasks.count", interval=timedelta(seconds=1), args=["scheduled"]
        ),
    ]
"""

CHECK = """
from django.contrib.auth import authenticate, get_user_model
from django.db import connection
from SLUG.models import Room
assert authenticate(username="boss", password="secret").is_superuser
users = [authenticate(username=f"user{n}", password=f"secret{n}") for n in range(3)]
assert all(users), users
room = Room.objects.get()
assert (room.owner, room.name, room.floor) == (users[0], "Attic", 1)
assert set(room.guests.all()) == set(users[1:])
label, name = users[0]._meta.app_label, users[0]._meta.model_name
assert users[0].has_perm(f"{label}.change_{name}"), users[0].get_all_permissions()
from rest_framework.settings import api_settings
with connection.cursor() as cursor:
    found = connection.introspection.get_constraints(cursor, Room._meta.db_table)
assert {"room_floor", "no_cellar"} <= set(found), found
(method,) = [
    each for each in api_settings.DEFAULT_AUTHENTICATION_CLASSES if each.__name__.startswith("Token")
]
assert method().authenticate_credentials("k" * 40)[0] == users[1]
print("all there")
"""


def write_old_project(folder, app, custom_user, queue):
    """Write the old project."""
    for name, text in OLD_PROJECT.items():
        path = folder / name.replace("OLDAPP", app)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = text.replace("OLDAPP", app).replace("USER_CLASS", USER_CLASS if custom_user else "")
        text = text.replace("QUEUE", queue)
        path.write_text(text.replace("THE_USER", f"{app}.Member" if custom_user else "auth.User"))


def bring_code(project, app, custom_user):
    """Do what part 1 of the document says."""
    slug = project.name
    document = (project / "docs" / "move.md").read_text()
    (model,) = re.findall(r"^```python\n(.*?)^```$", document, re.M | re.S)
    if custom_user:
        model = model.replace("class User", "class Member").replace("auth_user", f"{app}_member")
        field = '    nickname = models.CharField(max_length=20, default="")\n\n    class Meta'
        model = model.replace("    class Meta", field)
        settings = project / slug / "settings.py"
        settings.write_text(settings.read_text().replace(f'"{slug}.User"', f'"{slug}.Member"'))
        admin = project / slug / "admin.py"
        admin.write_text(re.sub(r"\bUser\b", "Member", admin.read_text()))
    imports = "from django.conf import settings\nfrom django.db import models\n"
    models = imports + model + NEW_MODELS.replace("OLDAPP", app)
    (project / slug / "models.py").write_text(models)
    with (project / slug / "tasks.py").open("a") as file:
        file.write(NEW_TASK.replace("OLDAPP", app))
    settings = project / slug / "settings.py"
    text = settings.read_text()
    text = text.replace(
        '        "rest_framework",\n',
        '        "rest_framework",\n        "rest_framework.authtoken",\n',
    )
    text = text.replace(
        '                "rest_framework.authentication.SessionAuthentication",\n',
        '                "rest_framework.authentication.SessionAuthentication",\n'
        '                "rest_framework.authentication.TokenAuthentication",\n',
    )
    # The two kinds of tokens have the same scheme; the old one is tried first.
    text = text.replace('                "prodserver_ops.api.tokens.TokenAuthentication",\n', "")
    settings.write_text(text)


def get_document_command(project, start):
    """Return a command of the document."""
    document = (project / "docs" / "move.md").read_text()
    (line,) = re.findall(rf"^ *({re.escape(start)}.*)$", document, re.M)
    return line.removeprefix("uv run ").replace("manage.py", "python manage.py", 1)


# Each has a queue of its own: they run at the same time. "celery" is Celery's default.
@pytest.mark.parametrize(
    ("slug", "app", "custom_user", "queue"),
    [
        pytest.param("rooms", "rooms", False, "celery", marks=pytest.mark.long),
        pytest.param("lodge", "oldapp", False, "old", marks=pytest.mark.long),
        ("guesthouse", "oldapp", True, "older"),
    ],
    ids=["same name", "other name", "custom user"],
)
def test_old_service_moves_here_and_back(
    bake, make_service, postgres_url, rabbitmq_url, tmp_path, slug, app, custom_user, queue
):
    counts = tmp_path / "counts"
    counts.touch()
    service = make_service(
        bake(project_slug=slug, example="none"),
        COUNTS=counts,
        **production_variables(postgres_url, rabbitmq_url),
    )
    service.install()
    with connect_to_rabbitmq() as broker:
        broker.channel().queue_delete(queue)
    old = tmp_path / "old"
    write_old_project(old, app, custom_user, queue)
    environment = service.environment | {"DJANGO_SETTINGS_MODULE": "oldproject.settings"}

    def run_old(command):
        done = subprocess.run(
            command.split(" ", 5), cwd=old, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start_old(name, arguments):
        return service.spawn(
            f"old-{name}",
            "celery",
            "--workdir",
            str(old),
            "-A",
            "oldproject",
            *arguments.split(),
            DJANGO_SETTINGS_MODULE="oldproject.settings",
            PYTHONPATH=str(old),
        )

    def get_counts():
        lines = counts.read_text().split()
        return {name: lines.count(name) for name in set(lines)}

    run_old(f"python manage.py makemigrations {app}")
    run_old("python manage.py migrate --verbosity=0")
    run_old("python manage.py shell -v0 -c " + FILL.replace("OLDAPP", app))
    publish = f"from {app}.tasks import count\nfor n in range(5): count.delay(f'queued{{}}')"
    run_old("python manage.py shell -v0 -c " + publish.format("{n}"))

    bring_code(service.folder, app, custom_user)
    for start in (f"rm {slug}", f"uv run manage.py makemigrations {slug}"):
        service.run(get_document_command(service.folder, start), DJANGO_MODE="")
    schedule = SCHEDULE.replace("SLUG", slug).replace("OLDAPP", app)
    (service.folder / slug / "migrations" / "0002_seed_schedules.py").write_text(schedule)

    check = get_document_command(service.folder, "uv run manage.py check")
    refused = subprocess.run(
        check.split(), cwd=service.folder, env=service.environment, capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert "database.E002" in refused.stderr
    assert "Run python manage.py adopt; see docs/move.md." in refused.stderr
    adopt = get_document_command(service.folder, "uv run manage.py adopt")
    print(service.run(adopt))
    assert "Nothing to adopt" in service.run(adopt)
    service.run(check)
    service.run("python manage.py migrate --check")
    service.run("python manage.py makemigrations --check --dry-run")
    assert "all there" in service.shell(CHECK.replace("SLUG", slug))

    # The processes: the worker also consumes the old queue.
    command = get_document_command(service.folder, "export EXTRA_QUEUES=")
    assert command.endswith("=celery")
    service.environment["EXTRA_QUEUES"] = queue
    service.run("python manage.py collectstatic --noinput")
    running = [service.start(name) for name in ("web", "worker", "beat")]
    expected = {f"queued{number}": 1 for number in range(5)}
    wait_for(
        lambda: expected.items() <= get_counts().items() and get_counts().get("scheduled", 0) >= 3,
        60,
        lambda: running[1].text(),
    )
    assert [process.stop(seconds=30) for process in running] == [0, 0, 0]
    service.shell(f"from {slug}.tasks import count; [count.delay(f'late{{n}}') for n in range(3)]")

    # Back: the old code runs on the same database, and the new worker finishes what it has.
    del service.environment["EXTRA_QUEUES"]
    last = service.start("worker")
    worker = start_old("worker", "worker --concurrency 1")
    before = get_counts()["scheduled"]
    beat = start_old("beat", f"beat --schedule {tmp_path}/schedule")
    expected |= {f"late{number}": 1 for number in range(3)}
    wait_for(
        lambda: expected.items() <= get_counts().items() and get_counts()["scheduled"] > before,
        60,
        lambda: worker.text() + last.text(),
    )
    assert last.stop(seconds=30) == 0
    run_old("python manage.py migrate --verbosity=0")
    run_old(
        "python manage.py shell -v0 -c "
        "from django.contrib.auth import authenticate, get_user_model\n"
        "assert authenticate(username='user1', password='secret1')\n"
        "get_user_model().objects.create_user('another', password='x')"
    )
    beat.kill_all()
    worker.kill_all()
    for name, count in get_counts().items():
        assert name == "scheduled" or count == 1


#: Two more apps, with renames that the database has had, rows that a migration has created, and code
#: that imports Django's own user.
MORE_APPS = {
    "halls/__init__.py": "",
    "halls/models.py": """\
from django.db import models
class Hall(models.Model):
    title = models.CharField(max_length=50)
    class Meta:
        db_table = "great_hall"
""",
    "halls/migrations/__init__.py": "",
    "halls/migrations/0001_initial.py": """\
from django.db import migrations, models
class Migration(migrations.Migration):
    initial = True
    operations = [migrations.CreateModel("Hall", [
        ("id", models.AutoField(primary_key=True)), ("name", models.CharField(max_length=50)),
    ])]
""",
    "halls/migrations/0002_rename.py": """\
from django.db import migrations
class Migration(migrations.Migration):
    dependencies = [("halls", "0001_initial")]
    operations = [
        migrations.AlterModelTable("Hall", "great_hall"),
        migrations.RenameField("Hall", "name", "title"),
    ]
""",
    "halls/migrations/0003_seed.py": """\
from django.db import migrations
def seed(apps, editor):
    for title in ("Attic", "Cellar", "Tower"):
        apps.get_model("halls", "Hall").objects.create(title=title)
class Migration(migrations.Migration):
    dependencies = [("halls", "0002_rename")]
    operations = [migrations.RunPython(seed)]
""",
    "bookings/__init__.py": "",
    "bookings/views.py": "from django.contrib.auth.models import User\n",
    "bookings/models.py": """\
from django.conf import settings
from django.db import models
class Booking(models.Model):
    hall = models.ForeignKey("halls.Hall", models.CASCADE)
    guest = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE)
""",
    "bookings/migrations/__init__.py": "",
    "bookings/migrations/0001_initial.py": """\
from django.conf import settings
from django.db import migrations, models
class Migration(migrations.Migration):
    initial = True
    dependencies = [("halls", "0001_initial"),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL)]
    operations = [migrations.CreateModel("Booking", [
        ("id", models.AutoField(primary_key=True)),
        ("hall", models.ForeignKey("halls.Hall", models.CASCADE)),
        ("guest", models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE)),
    ])]
""",
}

BROKEN = """\
from django.db import migrations
def fail(apps, editor):
    raise ValueError("not today")
class Migration(migrations.Migration):
    dependencies = [("bookings", "0001_initial")]
    operations = [migrations.RunPython(fail)]
"""

FILL_MORE = """
from bookings.models import Booking
from django.contrib.auth import get_user_model
from django_celery_beat.models import IntervalSchedule, PeriodicTask
from halls.models import Hall
Booking.objects.create(hall=Hall.objects.get(title="Tower"), guest=get_user_model().objects.get(id=1))
interval = IntervalSchedule.objects.create(every=1, period="hours")
PeriodicTask.objects.create(name="report", task="x.report", interval=interval, queue="reports")
"""

CHECK_MORE = """
from bookings.models import Booking
from django_celery_beat.models import PeriodicTask
from halls.models import Hall
print(sorted(Hall.objects.values_list("title", flat=True)), Booking.objects.get().guest.username,
    PeriodicTask.objects.get(name="report").queue)
"""


@pytest.mark.long
def test_service_with_several_apps_moves_here(
    bake, make_service, postgres_url, rabbitmq_url, tmp_path
):
    """Applied renames and data migrations are not repeated; a failure changes nothing.

    The service has a user model of its own, and schedules in the database.
    """
    service = make_service(
        bake(project_slug="inn", example="none"), **production_variables(postgres_url, rabbitmq_url)
    )
    service.install()
    old, project = tmp_path / "old", service.folder
    write_old_project(old, "oldapp", True, "oldest")
    settings = old / "oldproject" / "settings.py"
    more = '"django_celery_beat", "halls", "bookings", "oldapp"]'
    settings.write_text(settings.read_text().replace('"oldapp"]', more))
    for folder in (old, project):
        for name, text in MORE_APPS.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    for command in (
        ["makemigrations", "oldapp"],
        ["migrate", "--verbosity=0"],
        ["shell", "-v0", "-c", FILL.replace("OLDAPP", "oldapp")],
        ["shell", "-v0", "-c", FILL_MORE],
    ):
        subprocess.run(
            ["python", "manage.py", *command],
            cwd=old,
            env=service.environment | {"DJANGO_SETTINGS_MODULE": "oldproject.settings"},
            check=True,
        )
    bring_code(project, "oldapp", True)
    settings = project / "inn" / "settings.py"
    text = settings.read_text()
    settings.write_text(text.replace('        "inn",\n', '        "inn", "halls", "bookings",\n'))
    (project / "inn" / "migrations" / "0001_initial.py").unlink()
    service.run("python manage.py makemigrations inn", DJANGO_MODE="")
    broken = project / "bookings" / "migrations" / "0002_broken.py"
    broken.write_text(BROKEN)

    def adopt():
        done = subprocess.run(
            ["python", "manage.py", "adopt"],
            cwd=project,
            env=service.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    status, output = adopt()
    assert status == 1
    assert output.endswith(
        "CommandError: ValueError: not today\nNothing is adopted: PostgreSQL has undone all changes."
        " Repair the migration, and run adopt again\n"
    )
    broken.unlink()
    status, output = adopt()
    assert status == 0, output
    assert "warning: bookings/views.py:1 imports User" in output
    assert "warning: the schedule report uses the queue reports, which no worker" in output
    assert "Nothing to adopt" in adopt()[1]
    service.run("python manage.py check --database default")
    service.run("python manage.py migrate --check")
    assert service.shell(CHECK_MORE) == "['Attic', 'Cellar', 'Tower'] user0 reports\n"
    assert "all there" in service.shell(CHECK.replace("SLUG", "inn"))
