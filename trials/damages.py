"""Damaged backups for the trial ``bad_days.py drill``, made from the database of a small project."""

import gzip
import subprocess

from small_project import services

#: What a drill has to say about each; None for backups that are intact.
EXPECTED = {
    "intact, custom format": None,
    "intact, SQL": None,
    "intact, SQL with gzip": None,
    "intact, custom format with gzip": None,
    "an older version": "Migrations: 1 are applied",
    "an empty file": "the file is empty",
    "a message of pg_dump": "not a dump",
    "custom format, half": "end of file",
    "custom format, without its last bytes": "end of file",
    "custom format, line breaks of Windows": "- ",
    "custom format, a changed byte": "- ",
    "SQL, half": "the end of the dump is missing",
    "SQL, without its last line": "the end of the dump is missing",
    "gzip, half": "unexpected end of file",
    "gzip, a changed byte": "- ",
    "two dumps in one file": "already exists",
    "another database": "another service",
    "another service with the library": "another service",
    "a newer version": "0099_future",
    "django_migrations without rows of an app": "migrate:",
    "an extension that the server lacks": "no_such_extension",
    "only the schema public": "schema pgmq",
    "an owner that does not exist": 'role "nobody_here" does not exist',
    "bytes that are not UTF-8": "invalid byte sequence",
    "half of a table": "dummy_user lacks 15",
    "without the rows of a table": "ops_digestrun lacks",
    "without a table": "ops_digestdelivery",
    "without a column": "column last_name of dummy_user",
    "only the schema": "no migration is recorded",
    "only the rows": "does not exist",
    "without indexes and constraints": "constraint or index",
    "half of a table with keys of text": "news_note lacks 21 of 40 rows",
    "another default": "not as in production: column level of news_note",
    "another type": "not as in production: column level of news_note",
    "another check constraint": "constraint or index positive of news_note",
    "another index": "constraint or index low of news_note",
    "another function": "not as in production: function notify()",
    "another view": "not as in production: view low_notes",
    "sequences at their start": "the sequence of",
    "pg_dump --create": "more than one database",
    "pg_dumpall": "more than one database",
}

#: Those that would bring the service back.
GOOD = {name for name, said in EXPECTED.items() if said is None} | {"an older version"}


def dump(url, *options):
    """Return a dump of a database, as SQL unless an option says otherwise."""
    command = ["pg_dump", *options, "--dbname", url]
    return subprocess.run(command, check=True, capture_output=True).stdout


def make(project, name):
    """Return the content of a backup."""
    options = {
        "only the schema public": ["--schema=public"],
        "without the rows of a table": ["--exclude-table-data=ops_digestrun"],
        "without a table": ["--exclude-table=ops_digestdelivery"],
        "only the schema": ["--schema-only"],
        "only the rows": ["--data-only"],
        "without indexes and constraints": ["--section=pre-data", "--section=data"],
        "pg_dump --create": ["--create"],
    }
    if name in options:
        return dump(project.database, *options[name])
    if name == "pg_dumpall":
        command = ["pg_dumpall", "--roles-only", "--dbname", project.database]
        return subprocess.run(command, check=True, capture_output=True).stdout
    if name in ("another database", "an older version", "without a column"):
        return make_elsewhere(project, name)
    if "custom" in name:
        return CUSTOM[name](dump(project.database, "--format=custom"))
    return SQL[name](dump(project.database))


def make_elsewhere(project, name):
    """Return a dump of another database."""
    url = services.create(services.POSTGRESQL, "elsewhere")
    try:
        if name == "another database":
            project.run("migrate", "-v0", "auth", DATABASE_URL=url)
            return dump(url, "--exclude-table=dummy*")
        schemas = "SET client_min_messages = error; DROP SCHEMA public, pgmq CASCADE"
        statement = f"{schemas}; CREATE SCHEMA public"
        subprocess.run(["psql", "-q", url, "-c", statement], check=True)
        content = dump(project.database)
        command = ["psql", "-q", "-o", "/dev/null", url]
        subprocess.run(command, input=content, check=True)
        if name == "an older version":
            project.run("migrate", "-v0", "sessions", "zero", DATABASE_URL=url)
        else:
            statement = "ALTER TABLE dummy_user DROP last_name"
            subprocess.run(["psql", "-q", url, "-c", statement], check=True)
        return dump(url)
    finally:
        services.delete(services.POSTGRESQL, url)


def change(content, index):
    """Return bytes of which one is another."""
    return content[:index] + bytes([content[index] ^ 0xFF]) + content[index + 1 :]


def without(content, text):
    """Return the lines that do not contain a text."""
    return b"".join(line for line in content.splitlines(keepends=True) if text not in line)


def halve_table(content, table=b"dummy_user"):
    """Return SQL without the second half of the rows of a table."""
    lines = content.splitlines(keepends=True)
    copy = b"COPY public.%s (" % table
    start = next(n for n, line in enumerate(lines) if line.startswith(copy))
    end = lines.index(b"\\.\n", start)
    return b"".join([*lines[: (start + end) // 2], *lines[end:]])


CUSTOM = {
    "intact, custom format": bytes,
    "intact, custom format with gzip": gzip.compress,
    "custom format, half": lambda content: content[: len(content) // 2],
    "custom format, without its last bytes": lambda content: content[:-50],
    "custom format, line breaks of Windows": lambda content: content.replace(b"\n", b"\r\n"),
    # In the rows, which are at the end: some bytes before them, such as the name of a file in the
    # archive or a command that only --clean uses, change nothing that is restored.
    "custom format, a changed byte": lambda content: change(content, len(content) - 1_000),
}

SQL = {
    "intact, SQL": bytes,
    "intact, SQL with gzip": gzip.compress,
    "an empty file": lambda content: b"",
    "a message of pg_dump": lambda content: b"pg_dump: error: connection to server failed\n",
    "SQL, half": lambda content: content[: len(content) // 2],
    "SQL, without its last line": lambda content: content.rpartition(b"-- PostgreSQL database")[0],
    "gzip, half": lambda content: gzip.compress(content)[: len(gzip.compress(content)) // 2],
    "gzip, a changed byte": lambda content: change(gzip.compress(content), 20_000),
    "two dumps in one file": lambda content: content + content,
    "another service with the library": lambda content: content.replace(b"dummy", b"other"),
    "a newer version": lambda content: content.replace(b"\tops\t0010_", b"\tops\t0099_future"),
    "django_migrations without rows of an app": lambda content: without(
        content, b"\tsessions\t0001"
    ),
    "an extension that the server lacks": lambda content: content.replace(
        b"SET row_security = off;", b"CREATE EXTENSION no_such_extension;"
    ),
    "an owner that does not exist": lambda content: content.replace(
        b"OWNER TO postgres", b"OWNER TO nobody_here"
    ),
    "bytes that are not UTF-8": lambda content: content.replace(b"user7@", b"user\xe9@"),
    "half of a table": halve_table,
    "half of a table with keys of text": lambda content: halve_table(content, b"news_note"),
    "another default": lambda content: content.replace(b"DEFAULT 12", b"DEFAULT 13"),
    "another type": lambda content: content.replace(b"level integer", b"level bigint"),
    "another check constraint": lambda content: content.replace(b"(level > 1)", b"(level > 0)"),
    "another index": lambda content: content.replace(b"(level < 20)", b"(level < 30)"),
    "another function": lambda content: content.replace(b"it is low", b"it is lower"),
    "another view": lambda content: content.replace(b"level = 14", b"level = 15"),
    "sequences at their start": lambda content: without(content, b"setval("),
}
