"""Drills: restore a backup beside production, and find what is missing.

The functions that compare run with the settings of ``conf/drill.py``: ``default`` is the copy.
"""

import gzip
import json
import os
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from django.apps import apps
from django.conf import settings
from django.db import DatabaseError, connection, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.postgresql.client import DatabaseClient
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.recorder import MigrationRecorder
from django.db.models import AutoField, DateTimeField, Field, Max, Model
from django.db.models.functions import Now
from django.utils import timezone
from django_celery_beat.models import PeriodicTask

from ..core.redaction import redact
from ..models import DelayedTask, Origin, ResumableRun

#: The variable that names settings, folder and database for ``conf/drill.py``.
VARIABLE = "PRODSERVER_DRILL"

#: The comment on a database that a drill has created, and that another may delete.
COMMENT = "A copy of a backup, by manage.py drill"

GZIP, CUSTOM, SQLITE = b"\x1f\x8b", b"PGDMP", b"SQLite format 3\0"

#: Commands outside the database of a dump, of pg_dump --create and pg_dumpall.
OUTSIDE = (b"\\", b"CREATE DATABASE", b"DROP DATABASE", b"ALTER DATABASE", b"CREATE ROLE")

#: What pg_dump writes since 2025 against such commands in data.
ALLOWED = (b"\\restrict ", b"\\unrestrict ")

#: More missing rows than these are a problem; rows may have been added while the dump was made.
MISSING_PERCENT = 10

#: What a database consists of, with definitions: the tables in a list, and what belongs to no extension.
#: Casts and brackets are left out, because PostgreSQL places them anew when it restores an expression.
POSTGRESQL_STRUCTURE = r"""
WITH tables AS (
    SELECT oid, relname FROM pg_class WHERE relname = ANY(%s) AND pg_table_is_visible(oid)
), objects AS (
    SELECT oid, nspname FROM pg_namespace WHERE nspname !~ '^pg_|^information_schema$'
), extended AS (
    SELECT objid FROM pg_depend WHERE deptype = 'e'
), found (name, definition) AS (
    SELECT 'table ' || relname, '' FROM tables
    UNION ALL SELECT 'column ' || attname || ' of ' || relname, concat_ws(' ',
        format_type(atttypid, atttypmod), attnotnull, attidentity, pg_get_expr(adbin, adrelid))
        FROM tables t JOIN pg_attribute ON attrelid = t.oid AND attnum > 0 AND NOT attisdropped
        LEFT JOIN pg_attrdef ON adrelid = t.oid AND adnum = attnum
    UNION ALL SELECT 'constraint or index ' || conname || ' of ' || relname,
        pg_get_constraintdef(c.oid)
        FROM tables t JOIN pg_constraint c ON conrelid = t.oid AND contype <> 'n'
    UNION ALL SELECT 'constraint or index ' || indexrelid::regclass || ' of ' || relname,
        pg_get_indexdef(indexrelid)
        FROM tables t JOIN pg_index ON indrelid = t.oid
        WHERE NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid AND conrelid = t.oid)
    UNION ALL SELECT 'trigger ' || tgname || ' of ' || tgrelid::regclass, pg_get_triggerdef(oid)
        FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL SELECT 'schema ' || nspname, '' FROM objects
    UNION ALL SELECT 'extension ' || extname, '' FROM pg_extension
    UNION ALL SELECT 'view ' || c.oid::regclass, pg_get_viewdef(c.oid)
        FROM pg_class c JOIN objects o ON o.oid = relnamespace
        WHERE relkind IN ('v', 'm') AND c.oid NOT IN (SELECT objid FROM extended)
    UNION ALL SELECT 'function ' || p.oid::regprocedure,
        CASE WHEN prokind IN ('f', 'p') THEN pg_get_functiondef(p.oid) END
        FROM pg_proc p JOIN objects o ON o.oid = pronamespace
        WHERE p.oid NOT IN (SELECT objid FROM extended)
)
SELECT name, regexp_replace(definition, '::[a-z ]+|[][()\s]', '', 'g') FROM found
"""

SQLITE_STRUCTURE = """
WITH found AS (
    SELECT * FROM sqlite_master WHERE tbl_name IN (SELECT value FROM json_each(%s))
)
SELECT type || ' ' || name || CASE type WHEN 'table' THEN '' ELSE ' of ' || tbl_name END, ''
    FROM found
UNION ALL SELECT 'column ' || c.name || ' of ' || found.name, ''
    FROM found, pragma_table_info(found.name) c WHERE found.type = 'table'
"""


class Damaged(Exception):
    """A backup cannot be restored; the message says why."""


class Truncated(Damaged):
    """The end of a backup is missing."""


# Databases


def create(name: str) -> None:
    """Create an empty database like that of production; raise DatabaseError if it is not possible."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pg_encoding_to_char(encoding), datcollate, datctype FROM pg_database "
            "WHERE datname = current_database()"
        )
        options = "ENCODING %s LC_COLLATE %s LC_CTYPE %s"
        quoted = connection.ops.quote_name(name)
        cursor.execute(f"CREATE DATABASE {quoted} TEMPLATE template0 {options}", cursor.fetchone())
        cursor.execute(f"COMMENT ON DATABASE {quoted} IS %s", [COMMENT])


def drop(name: str, comment: str | None = COMMENT) -> None:
    """Delete a database, if it exists; raise Damaged if it has another comment."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = %s",
            [name],
        )
        if row := cursor.fetchone():
            if comment and row[0] != comment:
                raise Damaged(f"there is a database {name}, which is not that of a drill")
            cursor.execute(f"DROP DATABASE {connection.ops.quote_name(name)} WITH (FORCE)")


@contextmanager
def restore(path: Path, folder: Path) -> Iterator[str]:
    """Restore a backup to a copy, and delete it afterwards; yield its name.

    Raises Damaged if the backup cannot be restored, and DatabaseError if there can be no copy.
    """
    if connection.vendor == "sqlite":
        restore_sqlite(path, folder / "db.sqlite3")
        yield str(folder / "db.sqlite3")
        return
    name = f"{connection.settings_dict['NAME'][:50]}_drill"
    drop(name)  # That of a drill that was killed.
    try:
        create(name)
        restore_postgresql(path, name)
        yield name
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        connection.close_if_unusable_or_obsolete()
        drop(name, comment=None)


# Files


def get_kind(path: Path) -> tuple[bytes, bool]:
    """Return the first bytes of a dump, and whether it is compressed; raise Damaged."""
    try:
        with path.open("rb") as file:
            is_compressed = file.read(2) == GZIP
        with gzip.open(path) if is_compressed else path.open("rb") as file:
            start = file.read(len(SQLITE))
    except (OSError, EOFError) as error:
        raise Damaged(str(error)) from error
    if not start:
        raise Damaged("the file is empty")
    return start, is_compressed


def restore_sqlite(path: Path, copy: Path) -> None:
    """Copy a database of SQLite; raise Damaged if it is incomplete."""
    start, is_compressed = get_kind(path)
    if not start.startswith(SQLITE):
        raise Damaged("it is not a database of SQLite")
    try:
        with gzip.open(path) if is_compressed else path.open("rb") as file, copy.open("wb") as to:
            shutil.copyfileobj(file, to)
        with closing(sqlite3.connect(copy)) as raw:
            (result,) = raw.execute("PRAGMA integrity_check(1)").fetchone()
    except (OSError, EOFError, sqlite3.DatabaseError) as error:
        raise Damaged(str(error)) from error
    if result != "ok":
        raise Damaged(result)


def restore_postgresql(path: Path, name: str) -> None:
    """Restore a dump of pg_dump to a database; raise Damaged with the first error."""
    start, is_compressed = get_kind(path)
    readers = [["gzip", "-dc"]] if is_compressed else []
    if start.startswith(CUSTOM):
        readers.append(["pg_restore", "--no-owner", "--no-privileges", "--file=-"])
    parameters = connection.settings_dict | {"NAME": name}
    psql, environment = DatabaseClient.settings_to_cmd_args_env(parameters, [])
    with ExitStack() as stack:
        source: Any = stack.enter_context(path.open("rb"))
        programs = []
        for reader in readers:
            programs.append(stack.enter_context(run(reader, stdin=source, stdout=subprocess.PIPE)))
            source = programs[-1][0].stdout
        command = [*psql, "-X", "-q", "-o", os.devnull, "-v", "ON_ERROR_STOP=1"]
        variables = os.environ | (environment or {})
        programs.append(stack.enter_context(run(command, stdin=subprocess.PIPE, env=variables)))
        target: Any = programs[-1][0].stdin
        truncated = None
        try:
            for line in check_lines(source):
                target.write(line)
            target.close()
        except BrokenPipeError:
            programs = programs[-1:]  # The others could not go on.
        except Truncated as error:
            truncated = error
            programs = programs[:-1]
        for process, errors in programs:
            if process.wait():
                errors.seek(0)
                raise Damaged(describe(errors.read().decode(errors="replace")))
        if truncated:
            raise truncated


@contextmanager
def run(command: list[str], **kwargs: Any) -> Iterator[tuple[subprocess.Popen[bytes], Any]]:
    """Start a program, and yield it with the file of its errors; kill it afterwards."""
    with TemporaryFile() as errors:
        try:
            process = subprocess.Popen(command, stderr=errors, **kwargs)
        except FileNotFoundError as error:
            raise Damaged(f"{command[0]}, which reads the backup, is not installed") from error
        try:
            yield process, errors
        finally:
            process.kill()
            process.wait()
            for pipe in filter(None, (process.stdin, process.stdout)):
                with suppress(BrokenPipeError):
                    pipe.close()


def check_lines(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Return the lines of a dump in SQL; raise Damaged before one that changes other databases."""
    in_data = is_complete = False
    for line in lines:
        if in_data:
            in_data = line.rstrip() != b"\\."
        elif line.startswith(b"COPY ") and line.rstrip().endswith(b"FROM stdin;"):
            in_data = True
        elif line.startswith(OUTSIDE) and not line.startswith(ALLOWED):
            what = line.decode(errors="replace").strip()[:60]
            raise Damaged(
                f"it is for more than one database ({what}): use pg_dump without --create"
            )
        elif line.startswith(b"SET transaction_timeout"):
            continue  # PostgreSQL before 17 does not know it.
        elif line.startswith(b"CREATE SCHEMA public;"):
            continue  # Each database has it.
        is_complete |= line.startswith(b"-- PostgreSQL database dump complete")
        yield line
    if not is_complete:
        raise Truncated("the end of the dump is missing, or it is not a dump of pg_dump")


def describe(output: str) -> str:
    """Return the first error in the output of a program, without secrets."""
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() or "FATAL" in line]
    return redact(" ".join((errors or lines or ["a program failed"])[0].split()))[:300]


# Comparison


def find_foreign() -> Iterator[str]:
    """Return why the copy is not one of this service, or of a newer version of it."""
    loader = MigrationLoader(connection)
    applied = set(loader.applied_migrations)
    known = set(loader.disk_migrations) | set(
        MigrationRecorder(connections["production"]).applied_migrations()
    )
    app = settings.AUTH_USER_MODEL.partition(".")[0]
    if not applied:
        yield "it is not a backup of a Django service: no migration is recorded"
    elif app in loader.migrated_apps and app not in {label for label, _ in applied}:
        yield f"it is a backup of another service: no migration of {app} is recorded"
    elif unknown := sorted(f"{label}.{name}" for label, name in applied - known):
        yield f"it is a backup of a newer version, or of another service: {join(unknown)} is unknown"


def find_missing(newest: datetime | None) -> Iterator[str]:
    """Return what production has, and the copy has not or defines in another way."""
    production = connections["production"]
    applied = [
        set(MigrationRecorder(each).applied_migrations()) for each in (production, connection)
    ]
    if applied[0] == applied[1]:
        expected, found = get_structure(production), get_structure(connection)
        tables = {name[6:] for name in expected.keys() - found if name.startswith("table ")}
        names = {name for name in expected if name.rpartition(" of ")[2] not in tables}
        if missing := sorted(names - found.keys(), key=get_rank):
            yield f"missing: {join(missing)}"
        if changed := sorted(
            name for name in names & found.keys() if expected[name] != found[name]
        ):
            yield f"not as in production: {join(changed)}"
    for model in get_models():
        with suppress(DatabaseError):  # find_missing() has named a table without its parts.
            yield from find_missing_rows(model, production, newest)


def get_rank(text: str) -> tuple[bool, str]:
    """Return where a missing object is listed: first those that contain others."""
    return not text.startswith(("schema ", "extension ", "table ")), text


def get_structure(database: BaseDatabaseWrapper) -> dict[str, str]:
    """Return the parts of the tables of models, and other objects, with their definitions."""
    tables = [model._meta.db_table for model in get_models()]
    with database.cursor() as cursor:
        if database.vendor == "sqlite":
            cursor.execute(SQLITE_STRUCTURE, [json.dumps(tables)])
        else:
            cursor.execute(POSTGRESQL_STRUCTURE, [tables])
        return dict(cursor.fetchall())


def find_missing_rows(
    model: type[Model], production: BaseDatabaseWrapper, newest: datetime | None
) -> Iterator[str]:
    """Compare the rows that existed when the backup was made; a sequence or their time tells which."""
    meta = model._meta
    if isinstance(meta.pk, AutoField):
        last = get_last_number(connection, model)
        highest = model._base_manager.aggregate(last=Max("pk"))["last"] or 0
        # Rows with keys of their own leave the sequence as it is.
        if highest > last < get_last_number(production, model):
            yield f"the sequence of {meta.db_table} is at {last}, below the key {highest}"
            return
        existed: dict[str, Any] = {"pk__lte": last}
    elif newest and (stamp := next(filter(is_first_stamp, meta.local_fields), None)):
        existed = {f"{stamp.name}__lte": newest}
    else:
        return
    count = model._base_manager.filter(**existed).count()
    try:
        expected = model._base_manager.using(production.alias).filter(**existed).count()
    except DatabaseError:
        return  # It takes too long.
    if (missing := expected - count) > count * MISSING_PERCENT / 100:
        yield f"{meta.db_table} lacks {missing} of {expected} rows"


def get_last_number(database: BaseDatabaseWrapper, model: type[Model]) -> int:
    """Return the last key that the sequence of a model has given; 0 for none."""
    table, column = model._meta.db_table, model._meta.pk.column
    with database.cursor() as cursor:
        if database.vendor == "sqlite":
            cursor.execute("SELECT seq FROM sqlite_sequence WHERE name = %s", [table])
        else:
            cursor.execute(
                "SELECT pg_sequence_last_value(pg_get_serial_sequence(%s, %s)::regclass)",
                [database.ops.quote_name(table), column],
            )
        row = cursor.fetchone()
    return row[0] or 0 if row else 0


def get_models() -> list[type[Model]]:
    """Return the models whose tables Django creates, and those of their relations."""
    models = apps.get_models(include_auto_created=True)
    return [model for model in models if model._meta.managed and not model._meta.proxy]


def find_newest() -> datetime | None:
    """Return the newest time that a row was given when it was written."""
    now, times = timezone.now(), []
    fields = [(model, field) for model in get_models() for field in model._meta.local_fields]
    for model, field in fields:
        if is_stamp(field):
            with suppress(DatabaseError):
                rows = model._base_manager.filter(**{f"{field.name}__lte": now})
                times.append(rows.aggregate(newest=Max(field.name))["newest"])
    return max(filter(None, times), default=None)


def is_first_stamp(field: "Field[Any, Any]") -> bool:
    """Return whether a field is set to the time at which a row is created."""
    if not isinstance(field, DateTimeField):
        return False
    is_now = field.auto_now_add or field.default is timezone.now
    return is_now or isinstance(field.db_default, Now)


def is_stamp(field: "Field[Any, Any]") -> bool:
    """Return whether a field is set to the time at which a row is written."""
    is_changed = getattr(field, "auto_now", False) or field is Origin._meta.get_field("seen_at")
    return is_changed or is_first_stamp(field)


def silence() -> None:
    """Let the processes run nothing of the copy but what the drill adds."""
    PeriodicTask.objects.update(enabled=False)
    DelayedTask.objects.all().delete()
    ResumableRun.objects.all().delete()


def join(texts: list[str]) -> str:
    """Return the first texts, and how many more there are."""
    more = f" and {len(texts) - 3} more" if texts[3:] else ""
    return ", ".join(texts[:3]) + more
