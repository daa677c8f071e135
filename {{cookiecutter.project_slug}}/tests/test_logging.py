"""Logs: one line for an event, with its request or task, and nothing about people in it."""

import json
import logging
import logging.config
import re
import smtplib
import sys

import pytest
from django.http import HttpResponse

from {{ cookiecutter.project_slug }} import celery_app, logs, sentry, unsubscribe


@pytest.fixture(params=[logs.TextFormatter, logs.JsonFormatter])
def formatter(request):
    return request.param()


def record(message="Done", *args, **extra):
    return logging.getLogger("test").makeRecord(
        "test", logging.INFO, "test.py", 1, message, args, None, extra=extra
    )


def failed(error):
    """Return the record of an event with that exception."""
    try:
        raise error
    except Exception:
        failed = record("Failed")
        failed.exc_info = sys.exc_info()
    return failed


class TestAnEvent:
    def test_in_json_has_its_time_level_and_process(self):
        event = json.loads(logs.JsonFormatter().format(record("Done: %s", "all")))
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", event.pop("time"))
        assert event == {
            "level": "INFO",
            "process": "command",
            "logger": "test",
            "message": "Done: all",
        }

    def test_in_text_has_them_too(self):
        line = logs.TextFormatter().format(record("Done"))
        assert re.fullmatch(r"\d\d:\d\d:\d\d INFO command test: Done", line)

    def test_in_json_is_one_line_with_its_traceback(self):
        line = logs.JsonFormatter().format(failed(ValueError("one\ntwo")))
        assert "\n" not in line
        assert json.loads(line)["exception"].endswith("ValueError: one\ntwo")

    def test_tells_the_task_that_runs(self):
        @celery_app.task(name="tests.log", shared=False)
        def log():
            return logs.JsonFormatter().format(record())

        done = log.apply()
        assert json.loads(done.get())["task_id"] == done.id

    def test_tells_the_task_that_a_worker_speaks_of(self, formatter):
        assert "some-id" in formatter.format(record(data={"id": "some-id"}))

    @pytest.mark.parametrize("field", ["request", "data", "args_of_a_task"])
    def test_holds_no_object_that_a_library_hands_over(self, formatter, field):
        assert "hunter2" not in formatter.format(record(**{field: {"args": "hunter2"}}))


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Connected to amqp://user:hunter2@mq:5672//", "Connected to amqp://***@mq:5672//"),
        ("postgres://user:hun/ter@2@db/name", "postgres://***@db/name"),
        ("550 5.1.1 <bob.o+x@example.com>: unknown", "550 5.1.1 <***@***>: unknown"),
        ("Error handling request /a/?token=hunter2", "Error handling request /a/?***"),
        ("Not Found: /unsubscribe/WzEsImRp:x-y_z/", "Not Found: /unsubscribe/***/"),
        ("Invalid request from ip=203.0.113.7: no", "Invalid request from ip=*** no"),
        ("Key (username)=(bob) already exists.", "Key (username)=(***) already exists."),
        ("Failing row contains (1, bob, null).", "Failing row contains (***)."),
        ("celery@host.example.com ready.", "celery@host.example.com ready."),
        ("Why? Because.", "Why? Because."),
    ],
)
def test_people_and_secrets_are_masked(formatter, text, masked):
    assert masked in formatter.format(record(text))


def test_an_exception_is_masked_too(formatter):
    error = smtplib.SMTPRecipientsRefused({"bob@example.com": (550, b"no such user")})
    line = formatter.format(failed(error))
    assert "SMTPRecipientsRefused" in line
    assert "bob@example.com" not in line


class TestARequest:
    @pytest.fixture
    def lines(self, caplog):
        """Make the log of what is requested: a list of dictionaries."""
        caplog.set_level(logging.DEBUG)
        formatter = logs.JsonFormatter()
        caplog.handler.setFormatter(formatter)

        def lines():
            events = [json.loads(line) for line in caplog.text.splitlines()]
            return [event for event in events if event["logger"].endswith(".access")]

        return lines

    def test_is_logged_without_its_query(self, client, lines):
        response = client.get("/no/such/page?token=hunter2")
        (event,) = lines()
        assert event["message"].startswith("GET /no/such/page 404 ")
        assert (event["method"], event["path"], event["status"]) == ("GET", "/no/such/page", 404)
        assert 0 <= event["duration_ms"] < 60_000
        assert event["request_id"] == response.headers["X-Request-ID"]

    def test_has_an_id_of_its_own(self, client):
        ids = {client.get("/health/live").headers["X-Request-ID"] for _ in range(2)}
        assert len(ids) == 2

    def test_keeps_the_id_that_the_proxy_gave(self, client, lines):
        response = client.get("/no/such/page", headers={"X-Request-ID": "7f3c-0001"})
        assert response.headers["X-Request-ID"] == "7f3c-0001"
        assert lines()[0]["request_id"] == "7f3c-0001"

    @pytest.mark.parametrize("sent", ["", "short", "x" * 129, "a b c d e f", "<script>alert(1)"])
    def test_gets_a_new_id_for_one_that_is_odd(self, client, sent):
        response = client.get("/health/live", headers={"X-Request-ID": sent})
        assert re.fullmatch("[0-9a-f]{32}", response.headers["X-Request-ID"])

    def test_that_unsubscribes_does_not_show_its_token(self, client, caplog, lines):
        client.get("/unsubscribe/some-token/")
        assert lines()[0]["path"] == "/unsubscribe/***/"
        assert "some-token" not in caplog.text

    def test_for_a_path_with_line_breaks_is_one_line(self, client, lines):
        client.get("/a%0Ab")
        assert lines()[0]["path"] == "/a%0Ab"

    def test_for_a_health_check_is_logged_when_it_fails(self, rf, lines):
        middleware = logs.RequestLogMiddleware(lambda request: HttpResponse(status=503))
        middleware(rf.get("/health/ready"))
        assert lines()[0]["level"] == "INFO"

    def test_for_a_health_check_is_quiet_otherwise(self, client, lines):
        client.get("/health/live")
        assert lines()[0]["level"] == "DEBUG"

    def test_that_fails_gives_its_id_to_what_django_says(self, client, caplog, lines, monkeypatch):
        def fail(token):
            raise RuntimeError("hunter2@example.com")

        monkeypatch.setattr(unsubscribe.signer, "unsign", fail)
        client.raise_request_exception = False
        response = client.get("/unsubscribe/some-token/?x=1")
        assert response.status_code == 500
        django, access = map(json.loads, caplog.text.splitlines())
        assert "RuntimeError" in django["exception"]
        assert django["request_id"] == access["request_id"] == response.headers["X-Request-ID"]
        assert not re.search("hunter2|some-token", caplog.text)


class TestSentry:
    def test_gets_nothing_where_it_is_not_set(self, settings):
        assert settings.SENTRY_DSN == ""
        assert not sentry.sentry_sdk.get_client().is_active()

    def test_gets_events_without_people_and_secrets(self):
        event = {
            "request": {
                "url": "https://example.com/unsubscribe/some-token/",
                "query_string": "email=bob@example.com",
            },
            "exception": {"values": [{"type": "ValueError", "value": "for bob@example.com"}]},
            "level": "error",
        }
        assert sentry.scrub(event, hint=None) == {
            "request": {"url": "https://example.com/unsubscribe/***/"},
            "exception": {"values": [{"type": "ValueError", "value": "for ***@***"}]},
            "level": "error",
        }


class TestAProcess:
    @pytest.fixture(autouse=True)
    def restore(self, monkeypatch):
        """Undo what the start of a process changes."""
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

    def test_logs_to_stdout_under_its_name(self, capsys):
        logs.start("worker")
        logging.getLogger("celery").info("ready")
        out, err = capsys.readouterr()
        assert re.fullmatch(r"\S+ INFO worker celery: ready\n", out)
        assert err == ""

    def test_logs_what_libraries_print(self, capsys, in_json):
        logs.start("beat")
        print("a banner\nof two lines")
        (line,) = capsys.readouterr().out.splitlines()
        assert json.loads(line)["message"] == "a banner\nof two lines"

    def test_logs_its_crash(self, capsys, in_json):
        logs.start("web")
        sys.excepthook(RuntimeError, RuntimeError("for bob@example.com"), None)
        (line,) = capsys.readouterr().out.splitlines()
        assert json.loads(line)["exception"] == "RuntimeError: for ***@***"

    def test_is_none_for_a_command_whose_stdout_is_for_what_it_prints(self, capsys, settings):
        logging.config.dictConfig(settings.LOGGING)
        logging.getLogger("django").info("migrated")
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(r"\S+ INFO command django: migrated\n", err)
