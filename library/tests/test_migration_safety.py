"""Migrations that break the running version are reported before a deploy."""

import pytest
from django.db import migrations, models
from django.db.migrations.executor import MigrationExecutor
from django.db.migrations.state import ModelState, ProjectState

from prodserver_ops.console import checks, migration_safety

CREATE = migrations.CreateModel(
    "Room",
    [
        ("id", models.BigAutoField(primary_key=True)),
        ("name", models.CharField(max_length=9, default="")),
        ("floor", models.IntegerField(null=True)),
    ],
)


def find(*operations):
    state = ProjectState()
    state.add_model(ModelState("app", "Room", CREATE.fields))
    return [
        problem
        for problem, hint in migration_safety.find_problems(operations, "app", state)
        if hint
    ]


@pytest.mark.parametrize(
    ("operation", "problem"),
    [
        (
            migrations.AddField("room", "size", models.IntegerField(default=1)),
            "the new field room.size is required",
        ),
        (
            migrations.AlterField("Room", "floor", models.IntegerField(default=1)),
            "the field Room.floor becomes required",
        ),
        (migrations.RemoveField("room", "name"), "the field room.name is removed"),
        (migrations.RenameField("room", "name", "title"), "the field room.name is renamed"),
        (migrations.RenameModel("Room", "Hall"), "the table of Room is renamed"),
        (migrations.AlterModelTable("Room", "halls"), "the table of Room is renamed"),
        (migrations.DeleteModel("Room"), "the table of Room is deleted"),
        (
            migrations.SeparateDatabaseAndState([migrations.RemoveField("room", "name")]),
            "the field room.name is removed",
        ),
    ],
)
def test_operation_that_breaks_the_previous_version_is_found(operation, problem):
    assert find(operation) == [problem]


@pytest.mark.parametrize(
    "operation",
    [
        migrations.AddField("room", "size", models.IntegerField(db_default=1)),
        migrations.AddField("room", "size", models.IntegerField(null=True)),
        migrations.AddField("room", "users", models.ManyToManyField("app.Room")),
        migrations.AlterField("room", "name", models.CharField(max_length=90, default="")),
        migrations.AlterField("room", "floor", models.IntegerField(db_default=1)),
        migrations.SeparateDatabaseAndState(
            state_operations=[migrations.RemoveField("room", "name")]
        ),
        migrations.RunPython(migrations.RunPython.noop),
    ],
)
def test_operation_that_the_previous_version_survives_is_accepted(operation):
    assert find(operation) == []


def test_field_of_a_model_that_is_created_at_the_same_time_is_accepted():
    hall = migrations.CreateModel("Hall", [("id", models.BigAutoField(primary_key=True))])
    field = migrations.AddField("hall", "size", models.IntegerField(default=1))
    assert find(hall, field) == []


@pytest.mark.django_db
class TestCheck:
    @pytest.fixture
    def plan(self, monkeypatch):
        """Return an unapplied migration of an app with applied migrations."""
        migration = migrations.Migration("0099_danger", "ops")
        migration.operations = [migrations.DeleteModel("Heartbeat")]
        monkeypatch.setattr(
            MigrationExecutor, "migration_plan", lambda *args, **kwargs: [(migration, False)]
        )
        original = migration_safety.MigrationExecutor.__init__

        def init(self, connection):
            original(self, connection)
            leaf = self.loader.graph.leaf_nodes("ops")[0]
            migration.dependencies = [leaf]
            self.loader.graph.add_node(("ops", migration.name), migration)
            self.loader.graph.add_dependency(migration, ("ops", migration.name), leaf)

        monkeypatch.setattr(MigrationExecutor, "__init__", init)
        return migration

    def test_names_the_migration_and_what_to_do(self, plan):
        (warning,) = checks.check_migrations(None, databases=["default"])
        assert warning.id == "migrations.W001"
        assert "ops.0099_danger: the table of Heartbeat is deleted" in warning.msg
        assert "set old_version_works = True in the migration" in warning.hint

    def test_migration_that_says_so_is_accepted(self, plan):
        plan.old_version_works = True
        assert checks.check_migrations(None, databases=["default"]) == []

    def test_nothing_is_reported_without_a_database(self, plan):
        assert checks.check_migrations(None) == []

    def test_nothing_is_left_to_apply(self):
        assert checks.check_migrations(None, databases=["default"]) == []
