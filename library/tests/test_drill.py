"""What ``manage.py drill`` reads, and what it refuses; test_bad_days.py restores backups."""

import gzip
import sqlite3
from contextlib import closing

import pytest
from django.core.management import CommandError, call_command

from prodserver_ops import tasks
from prodserver_ops.console import drills

END = b"-- PostgreSQL database dump complete\n"


def filter_lines(*lines):
    return list(drills.check_lines([*lines, END]))[:-1]


class TestLines:
    def test_data_may_look_like_a_command(self):
        lines = [b"COPY public.t (a) FROM stdin;\n", b"\\N\n", b"DROP DATABASE x;\n", b"\\.\n"]
        assert filter_lines(*lines) == lines
        with pytest.raises(drills.Damaged, match="DROP DATABASE"):
            filter_lines(*lines, b"DROP DATABASE x;\n")

    @pytest.mark.parametrize("line", [b"\\connect x\n", b"CREATE ROLE x;\n", b"\\! rm -r /\n"])
    def test_commands_outside_the_copy_are_refused(self, line):
        with pytest.raises(drills.Damaged, match="more than one database"):
            filter_lines(line)

    def test_what_only_some_servers_know_is_left_out(self):
        lines = [b"SET transaction_timeout = 0;\n", b"CREATE SCHEMA public;\n", b"\\restrict x\n"]
        assert filter_lines(*lines) == lines[2:]

    def test_the_end_is_needed(self):
        with pytest.raises(drills.Truncated):
            list(drills.check_lines([b"SELECT 1;\n"]))


class TestSQLite:
    @pytest.fixture
    def backup(self, tmp_path):
        path = tmp_path / "backup"
        with closing(sqlite3.connect(path)) as raw:
            raw.execute("CREATE TABLE t (a)")
            raw.executemany("INSERT INTO t VALUES (?)", [("x" * 500,)] * 100)
            raw.commit()
        return path

    @pytest.mark.parametrize("change", [bytes, gzip.compress])
    def test_a_file_is_copied(self, backup, tmp_path, change):
        content = backup.read_bytes()
        backup.write_bytes(change(content))
        drills.restore_sqlite(backup, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == content

    @pytest.mark.parametrize(
        "change",
        [
            lambda content: b"",
            lambda content: b"x" * 100,
            lambda content: content[: len(content) // 2],
            lambda content: gzip.compress(content)[:-20],
            lambda content: content[:9000] + b"x" * 3000 + content[12000:],
        ],
    )
    def test_a_damaged_file_is_refused(self, backup, tmp_path, change):
        backup.write_bytes(change(backup.read_bytes()))
        with pytest.raises(drills.Damaged):
            drills.restore_sqlite(backup, tmp_path / "copy")


def test_a_backup_is_named(settings, tmp_path):
    with pytest.raises(CommandError, match="BACKUP_PATH"):
        call_command("drill")
    settings.BACKUP_PATH = str(tmp_path / "*.dump")
    with pytest.raises(CommandError, match="there is no file"):
        call_command("drill")


def test_a_task_fails_with_what_is_missing(monkeypatch, tmp_path):
    script = tmp_path / "manage.py"
    monkeypatch.setattr(tasks, "get_script", lambda: str(script))
    script.write_text("print('would')")
    assert tasks.drill() == "would\n"
    script.write_text("print('- a table'); raise SystemExit(1)")
    with pytest.raises(tasks.DrillFailedError, match="- a table"):
        tasks.drill()
