"""Play deploys that go wrong, while web answers requests and a worker runs tasks.

    uv run --directory library python ../trials/bad_deploys.py [SECONDS]

1. A release takes three minutes, or ``SECONDS``.
2. A release fails halfway, and the next one does not.
3. The worker of the new version cannot start.
4. The new version and its migration are rolled back.
5. The secret key changes, and the account of the database does too.

Uses a small project with the PostgreSQL and RabbitMQ of library/tests/services.py. Prints what was
found, and exits with status 1 if a request failed or a task was lost that should not.
"""

import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent))

import limits
import psycopg
import small_project
from limits import services, wait_for

INITIAL = """
from django.db import migrations, models

class Migration(migrations.Migration):
    initial = True
    operations = [
        migrations.CreateModel("Item", [("id", models.BigAutoField(primary_key=True))])
    ]
"""

#: A later migration: an operation after another that adds a column.
LATER = """
from django.db import migrations, models

class Migration(migrations.Migration):
    dependencies = [("limited", "0001_initial")]
    operations = [
        migrations.AddField("item", "name", models.TextField(null=True)),
        {operation},
    ]
"""

COLUMNS = "SELECT count(*) FROM information_schema.columns WHERE table_name = 'limited_item'"


class Project(limits.Project):
    """A project with migrations, and clients."""

    def __init__(self, *args):
        super().__init__(*args)
        self.migrations = self.folder / "limited" / "migrations"
        self.migrations.mkdir()
        (self.migrations / "__init__.py").write_text("")
        (self.migrations / "0001_initial.py").write_text(INITIAL)
        self.statuses, self.queued, self.end = [], 0, threading.Event()

    def write_migration(self, operation):
        """Write the second migration; it ends with an operation."""
        text = LATER.format(operation=operation)
        (self.migrations / "0002_later.py").write_text(text)

    def ask(self):
        while not self.end.is_set():
            self.statuses.append(self.get("/token"))
            time.sleep(0.2)

    def queue_more(self, count=20):
        """Queue tasks, half of which are still waiting when this returns."""
        first, self.queued = self.queued, self.queued + count
        self.queue(f"for n in range({first}, {self.queued}): write.delay(n, 0.2)")

    def take_failures(self):
        """Return the statuses since the last call that are no answer to the request."""
        statuses, self.statuses = self.statuses, []
        assert statuses
        return [status for status in statuses if status != 401]


def play(seconds=180):
    """Play all; return what was found."""
    found = {}
    with ExitStack() as stack:
        database = services.create(services.POSTGRESQL, "deploys")
        stack.callback(services.delete, services.POSTGRESQL, database)
        role = urlsplit(database).path[1:]
        admin = stack.enter_context(psycopg.connect(database, autocommit=True))
        admin.execute(f"CREATE ROLE {role} LOGIN; ALTER DATABASE {role} OWNER TO {role}")
        url = database.replace("postgres@", f"{role}@")
        project = stack.enter_context(small_project.make(Project, services.RABBITMQ, database=url))
        project.start_all()
        project.wait_for_web()
        threading.Thread(target=project.ask, daemon=True).start()
        stack.callback(project.end.set)

        project.write_migration(f"migrations.RunSQL('SELECT pg_sleep({seconds})', 'SELECT 1')")
        project.queue_more()
        done = project.call("migrate", "-v0")
        project.wait_for_tasks(project.queued)
        found["slow release"] = done.returncode, project.take_failures()

        project.run("migrate", "-v0", "limited", "0001")
        project.write_migration("migrations.RunSQL('SELECT 1 / 0')")
        project.queue_more()
        done = project.call("migrate", "-v0")
        columns = project.query(COLUMNS)[0][0]
        project.wait_for_tasks(project.queued)
        found["release that fails"] = done.returncode, columns, project.take_failures()
        project.write_migration("migrations.RunSQL('SELECT 1', 'SELECT 1')")
        project.run("migrate", "-v0")

        settings = project.folder / "limited" / "tasks.py"
        text = settings.read_text()
        settings.write_text(f"{text}\nimport no_such_module\n")
        start = time.monotonic()
        worker = project.start("worker")
        worker.wait(60)
        found["worker that cannot start"] = worker.returncode, round(time.monotonic() - start, 1)
        assert "no_such_module" in project.get_log("worker")
        settings.write_text(text)
        project.processes.remove(worker)
        project.queue_more()
        project.wait_for_tasks(project.queued)
        found["old processes"] = project.take_failures()

        project.start("worker")
        project.queue_more()
        project.run("migrate", "-v0", "limited", "0001")
        project.wait_for_tasks(project.queued)
        found["rollback"] = project.query(COLUMNS)[0][0], project.take_failures()

        sign = "from django.core import signing; print(signing.dumps('x'))"
        token = project.shell(sign).split()[-1]
        old = project.environment["SECRET_KEY"]
        project.environment |= {"SECRET_KEY": old[::-1], "SECRET_KEY_FALLBACKS": old}
        read = f"from django.core import signing; print(signing.loads({token!r}))"
        found["signed with the old key"] = project.shell(read).split()[-1]
        project.queue_more()
        project.wait_for_tasks(project.queued)
        found["another key"] = project.take_failures()

        # The same as another password, which a server that trusts all does not ask for.
        project.queue_more(60)
        admin.execute(f"ALTER ROLE {role} NOLOGIN; CREATE ROLE {role}_2 LOGIN IN ROLE {role}")
        admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", [role]
        )
        wait_for(lambda: project.get("/health/ready") == 503, 60)
        found["running without an account"] = [each.poll() for each in project.processes]
        project.database = database
        project.stop()
        project.environment["DATABASE_URL"] = url.replace(role + "@", f"{role}_2@")
        project.start_all()
        project.wait_for_web()
        project.wait_for_tasks(project.queued, 400)
        found["tasks lost"] = project.queued - project.count()
        project.stop_all()
        admin.execute(f"REASSIGN OWNED BY {role} TO postgres; DROP ROLE {role}_2")
        admin.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
        return found


#: What is expected, apart from how long a worker that cannot start takes.
EXPECTED = {
    "slow release": (0, []),
    "release that fails": (1, 1, []),
    "old processes": [],
    "rollback": (1, []),
    "signed with the old key": "x",
    "another key": [],
    "tasks lost": 0,
}


def is_good(found):
    """Return whether all is as expected."""
    return (
        found | EXPECTED == found
        and found["worker that cannot start"][0] != 0
        and set(found["running without an account"]) == {None}
    )


if __name__ == "__main__":
    found = play(*map(int, sys.argv[1:]))
    print(found)
    sys.exit(0 if is_good(found) else 1)
