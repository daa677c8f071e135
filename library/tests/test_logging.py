"""Logs: one line for each event, with its request or task, without personal data."""

import fcntl
import io
import json
import logging
import logging.config
import os
import re
import smtplib
import socket
import sys
import time
from datetime import date
from decimal import Decimal
from unittest.mock import Mock

import pytest
from celery import current_app
from django.http import HttpResponse, StreamingHttpResponse
from django.urls import path

from prodserver_ops.core import logs, sentry


def fail(request, token):
    raise RuntimeError("hunter2@example.com")


def stream(request):
    def parts():
        yield "a"
        time.sleep(0.1)
        yield "b"

    return StreamingHttpResponse(parts())


urlpatterns = [path("secret/<token>/fail/", fail), path("stream/", stream)]


@pytest.fixture(autouse=True)
def sample_service(settings):
    """Paths of this module, one of which contains a secret."""
    settings.ROOT_URLCONF = __name__
    settings.LOG_REDACTED_PATHS = ("/secret/",)


@pytest.fixture(params=[logs.TextFormatter, logs.JsonFormatter])
def formatter(request):
    return request.param()


def record(message="Done", *args, **extra):
    return logging.getLogger("test").makeRecord(
        "test", logging.INFO, "test.py", 1, message, args, None, extra=extra
    )


def failed(error):
    """Return the record of an event with this exception."""
    try:
        raise error
    except Exception:
        failed = record("Failed")
        failed.exc_info = sys.exc_info()
    return failed


class TestEvent:
    def test_json_has_time_level_and_process(self):
        event = json.loads(logs.JsonFormatter().format(record("Done: %s", "all")))
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", event.pop("time"))
        assert event == {
            "level": "INFO",
            "process": "command",
            "logger": "test",
            "message": "Done: all",
        }

    def test_text_has_time_level_and_process(self):
        line = logs.TextFormatter().format(record("Done"))
        assert re.fullmatch(r"\d\d:\d\d:\d\d INFO command test: Done", line)

    def test_json_is_one_line_including_the_traceback(self):
        line = logs.JsonFormatter().format(failed(ValueError("one\ntwo")))
        assert "\n" not in line
        assert json.loads(line)["exception"].endswith("ValueError: one\ntwo")

    def test_event_of_a_task_has_its_id(self):
        @current_app.task(name="tests.log", shared=False)
        def log():
            return logs.JsonFormatter().format(record())

        result = log.apply()
        assert json.loads(result.get())["task_id"] == result.id

    def test_event_of_the_worker_about_a_task_has_its_id(self, formatter):
        assert "some-id" in formatter.format(record(data={"id": "some-id"}))

    @pytest.mark.parametrize("field", ["request", "data", "args_of_a_task"])
    def test_objects_that_a_library_passes_are_left_out(self, formatter, field):
        assert "hunter2" not in formatter.format(record(**{field: {"args": "hunter2"}}))


class TestFields:
    """What a service passes with ``extra``."""

    def test_are_in_json(self):
        extra = {"order": 7, "total": Decimal("1.50"), "paid": None, "day": date(2026, 1, 2)}
        event = json.loads(logs.JsonFormatter().format(record(**extra)))
        assert list(event) == [
            *("time", "level", "process", "logger", "message"),
            *("order", "total", "paid", "day"),
        ]
        assert [event[name] for name in extra] == [7, "1.50", None, "2026-01-02"]

    def test_are_in_text(self):
        text = logs.TextFormatter().format(record(order=7, shop="north"))
        assert text.endswith(" test: Done order=7 shop=north")

    def test_are_redacted(self, formatter):
        text = formatter.format(record(sender="anna@example.com", url="https://a:hunter2@b/?x=1"))
        assert "***@***" in text
        assert not re.search("anna|hunter2|x=1", text)

    def test_do_not_replace_those_of_the_event(self):
        event = json.loads(logs.JsonFormatter().format(record(level="low", logger="other")))
        assert (event["level"], event["logger"]) == ("INFO", "test")

    @pytest.mark.parametrize("name", ["django.db.backends", "celery.app.trace", "uvicorn"])
    def test_of_libraries_are_left_out(self, formatter, name):
        event = record(sql="SELECT secret")
        event.name = name
        assert "secret" not in formatter.format(event)


class TestAnyText:
    @pytest.mark.parametrize(
        "text", ["a\0b", "a\ud800b", "é\udcff", "\0" * 100_000, "🙏" * 100_000]
    )
    def test_event_can_be_written_and_is_short(self, formatter, text):
        event = failed(ValueError(text))
        event.msg = text
        line = formatter.format(event).encode()
        assert b"\0" not in line
        assert b"ValueError" in line
        assert len(line) < 16 * 1024

    def test_start_and_end_of_a_long_event_are_kept(self, formatter):
        line = formatter.format(record("first" + "x" * 100_000 + "last"))
        assert "first" in line
        assert "last" in line
        assert "characters omitted" in line

    def test_event_with_many_fields_ends(self, formatter):
        fields = {f"field{number}": "x" * 30 for number in range(1000)}
        assert "Done" in formatter.format(record(**fields))

    def test_short_event_is_complete(self, formatter):
        assert "x" * 5_000 in formatter.format(record("x" * 5_000))


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("Connected to broker://user:hunter2@mq:5672//", "Connected to broker://***@mq:5672//"),
        ("postgres://user:hun/ter@2@db/name", "postgres://***@db/name"),
        ("550 5.1.1 <bob.o+x@example.com>: unknown", "550 5.1.1 <***@***>: unknown"),
        ("Error handling request /a/?token=hunter2", "Error handling request /a/?***"),
        ("Not Found: /secret/WzEsImRp:x-y_z/", "Not Found: /secret/***/"),
        ("Invalid request from ip=203.0.113.7: no", "Invalid request from ip=*** no"),
        ("Key (username)=(bob) already exists.", "Key (username)=(***) already exists."),
        ("Key (a, b)=(1, x) y) already exists.", "Key (a, b)=(***) already exists."),
        ("Failing row contains (1, bob, null).", "Failing row contains (***)."),
        ("Failing row contains (1, bob (x).y, null).", "Failing row contains (***)."),
        ("Failing row contains (1, bob\n2, null).\nNext", "Failing row contains (***)."),
        (repr("Failing row contains (1, bob, null).\n"), "Failing row contains (***)."),
        ('to "john doe"@example.com: no', "to ***@***: no"),
        ("to root@localhost: no", "to ***@***: no"),
        ("to o'neil@mail.example.com", "to ***@***"),
        ("to bob@[192.0.2.1] now", "to ***@*** now"),
        ("to bob%40example.com", "to ***@***"),
        ("celery@web-1 ready.", "celery@web-1 ready."),
        ("Why? Because.", "Why? Because."),
    ],
)
def test_secrets_and_personal_data_are_redacted(formatter, text, redacted):
    assert redacted in formatter.format(record(text))


def test_exception_is_redacted(formatter):
    error = smtplib.SMTPRecipientsRefused({"bob@example.com": (550, b"no such user")})
    line = formatter.format(failed(error))
    assert "SMTPRecipientsRefused" in line
    assert "bob@example.com" not in line


class TestRequest:
    @pytest.fixture
    def lines(self, caplog):
        """Return a function that returns the request log as a list of dictionaries."""
        caplog.set_level(logging.DEBUG)
        formatter = logs.JsonFormatter()
        caplog.handler.setFormatter(formatter)

        def lines():
            events = [json.loads(line) for line in caplog.text.splitlines()]
            return [event for event in events if event["logger"].endswith(".access")]

        return lines

    def test_log_has_no_query_string(self, client, lines):
        response = client.get("/no/such/page?token=hunter2")
        (event,) = lines()
        assert event["message"].startswith("GET /no/such/page 404 ")
        assert (event["method"], event["path"], event["status"]) == ("GET", "/no/such/page", 404)
        assert 0 <= event["duration_ms"] < 60_000
        assert event["request_id"] == response.headers["X-Request-ID"]

    def test_each_request_has_its_own_id(self, client):
        ids = {client.get("/health/live").headers["X-Request-ID"] for _ in range(2)}
        assert len(ids) == 2

    def test_id_from_the_proxy_is_kept(self, client, lines):
        response = client.get("/no/such/page", headers={"X-Request-ID": "7f3c-0001"})
        assert response.headers["X-Request-ID"] == "7f3c-0001"
        assert lines()[0]["request_id"] == "7f3c-0001"

    @pytest.mark.parametrize("sent", ["", "short", "x" * 129, "a b c d e f", "<script>alert(1)"])
    def test_invalid_id_is_replaced(self, client, sent):
        response = client.get("/health/live", headers={"X-Request-ID": sent})
        assert re.fullmatch("[0-9a-f]{32}", response.headers["X-Request-ID"])

    def test_stream_is_logged_when_it_ends(self, client, lines):
        response = client.get("/stream/")
        assert lines() == []
        assert list(response.streaming_content) == [b"a", b"b"]
        (event,) = lines()
        assert (event["path"], event["status"]) == ("/stream/", 200)
        assert event["duration_ms"] >= 100
        assert event["request_id"] == response.headers["X-Request-ID"]

    @pytest.mark.django_db
    def test_stream_is_logged_when_the_client_leaves(self, client, lines):
        response = client.get("/stream/")
        next(iter(response.streaming_content))
        response.close()
        assert [event["path"] for event in lines()] == ["/stream/"]

    def test_secret_in_the_path_is_redacted(self, client, caplog, lines):
        client.get("/secret/some-token/")
        assert lines()[0]["path"] == "/secret/***/"
        assert "some-token" not in caplog.text

    def test_path_with_a_line_break_is_one_line(self, client, lines):
        client.get("/a%0Ab")
        assert lines()[0]["path"] == "/a%0Ab"

    def test_failed_health_check_is_logged(self, rf, lines):
        middleware = logs.RequestLogMiddleware(lambda request: HttpResponse(status=503))
        middleware(rf.get("/health/ready"))
        assert lines()[0]["level"] == "INFO"

    def test_successful_health_check_is_logged_only_for_debugging(self, client, lines):
        client.get("/health/live")
        assert lines()[0]["level"] == "DEBUG"

    def test_error_has_the_id_of_its_request(self, client, caplog, lines):
        client.raise_request_exception = False
        response = client.get("/secret/some-token/fail/?x=1")
        assert response.status_code == 500
        django, access = map(json.loads, caplog.text.splitlines())
        assert "RuntimeError" in django["exception"]
        assert django["request_id"] == access["request_id"] == response.headers["X-Request-ID"]
        assert not re.search("hunter2|some-token", caplog.text)


class TestSentry:
    def test_is_inactive_without_a_dsn(self, settings):
        assert settings.SENTRY_DSN == ""
        assert not sentry.sentry_sdk.get_client().is_active()

    def test_events_are_redacted(self):
        event = {
            "request": {
                "url": "https://example.com/secret/some-token/",
                "query_string": "email=bob@example.com",
            },
            "exception": {"values": [{"type": "ValueError", "value": "for bob@example.com"}]},
            "level": "error",
        }
        assert sentry.redact_event(event, hint=None) == {
            "request": {"url": "https://example.com/secret/***/"},
            "exception": {"values": [{"type": "ValueError", "value": "for ***@***"}]},
            "level": "error",
        }


class TestProcess:
    @pytest.fixture(autouse=True)
    def restore(self, monkeypatch):
        """Undo the changes of ``configure()``."""
        for name in ("stdout", "__stdout__", "excepthook"):
            monkeypatch.setattr(sys, name, getattr(sys, name))
        for name in ("_process", "_stream"):
            monkeypatch.setattr(logs, name, getattr(logs, name))
        handlers = logging.root.handlers[:]
        yield
        logging.captureWarnings(False)
        logging.root.handlers[:] = handlers

    @pytest.fixture
    def in_json(self, settings):
        console = settings.LOGGING["handlers"]["console"] | {"formatter": "json"}
        settings.LOGGING = settings.LOGGING | {"handlers": {"console": console}}
        settings.LOG_FORMAT = "json"

    def test_log_goes_to_stdout_with_its_name(self, capsys):
        logs.configure("worker")
        logging.getLogger("celery").info("ready")
        out, err = capsys.readouterr()
        assert re.fullmatch(r"\S+ INFO worker celery: ready\n", out)
        assert err == ""

    def test_encoding_that_lacks_a_character_stops_nothing(self, monkeypatch):
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", stream)
        logs.configure("worker")
        logging.getLogger("test").info("Überall \ud800")
        print("\ud800 é")
        stream.flush()
        assert rb"\xdcberall \ud800" in stream.buffer.getvalue()
        assert rb"\ud800 \xe9" in stream.buffer.getvalue()

    def test_output_of_libraries_is_logged(self, capsys, in_json):
        logs.configure("beat")
        print("a banner\nof two lines")
        (line,) = capsys.readouterr().out.splitlines()
        assert json.loads(line)["message"] == "a banner\nof two lines"

    def test_crash_is_logged(self, capsys, in_json):
        logs.configure("web")
        sys.excepthook(RuntimeError, RuntimeError("for bob@example.com"), None)
        (line,) = capsys.readouterr().out.splitlines()
        assert json.loads(line)["exception"] == "RuntimeError: for ***@***"

    def test_command_logs_to_stderr(self, capsys, settings):
        logging.config.dictConfig(settings.LOGGING)
        logging.getLogger("django").info("migrated")
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(r"\S+ INFO command django: migrated\n", err)


class TestReader:
    """The reader of the log hangs."""

    @pytest.fixture(params=["pipe", "pipe of another user", "socket"])
    def ends(self, request, monkeypatch):
        """The reader, which does not read, and the handler."""
        if request.param == "socket":
            reader, writer = socket.socketpair()
            descriptor = writer.detach()
            read = reader.recv
        else:
            source, descriptor = os.pipe()
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, 4096)
            reader = os.fdopen(source, "rb", buffering=0)
            read = reader.read
        if request.param == "pipe of another user":
            monkeypatch.setattr(os, "open", Mock(side_effect=PermissionError))
        monkeypatch.setattr(logs, "PATIENCE", 0.2)
        with reader, open(descriptor, "w") as stream:
            handler = logs.PatientHandler(stream)
            handler.setFormatter(logs.TextFormatter())
            yield read, handler
            handler.close()

    def log(self, handler, text):
        handler.handle(logging.makeLogRecord({"name": "test", "msg": text, "levelname": "INFO"}))

    def fill(self, handler):
        number = 0
        while not handler.lost:
            number += 1
            self.log(handler, f"event {number} {'x' * 900}")
        return number

    def test_events_are_dropped_and_counted(self, ends):
        read, handler = ends
        number = self.fill(handler)
        start = time.monotonic()
        for _ in range(100):
            self.log(handler, "lost")
        # Only the first waits; a hundred would take twenty seconds.
        assert time.monotonic() - start < 10
        text = read(10**7).decode()
        assert f"event {number - 1} " in text
        assert "event lost" not in text
        self.log(handler, "back")
        lines = read(10**7).decode().splitlines()[-2:]
        assert "101 log events were lost: they could not be written for" in lines[0]
        assert lines[1].endswith("test: back")
        assert "back again" in (self.log(handler, "back again"), read(10**7).decode())[1]

    def test_an_event_that_was_cut_ends_its_line(self, ends):
        read, handler = ends
        self.fill(handler)
        text = read(10**7).decode()
        self.log(handler, "x" * 7000)
        text += read(10**7).decode()
        self.log(handler, "whole")
        text += read(10**7).decode()
        assert text.splitlines()[-1].endswith("test: whole")

    def test_a_reader_that_is_gone_stops_nothing(self, capsys):
        source, descriptor = os.pipe()
        os.close(source)
        with open(descriptor, "w") as stream:
            handler = logs.PatientHandler(stream)
            self.log(handler, "nobody")
            handler.close()
        assert handler.lost == 1
        assert capsys.readouterr().err == ""
