"""Redaction: a corpus of lines that libraries and people write, in linear time."""

import logging
import sys

import pytest

from prodserver_ops.core import logs
from prodserver_ops.core.redaction import SECRET_NAMES, redact

#: Secrets in quotes, or at the end of a header.
SPACED = ["hunter2", "correct horse battery staple", "x" * 2000, "hunter2,;&)}] p@ss: 1"]
#: Secrets without quotes.
WORDS = ["hunter2", "Zq9%/+-_.~", "x" * 2000]
#: Passwords in URLs, and addresses.
PASSWORDS = ["hunter2", "hun/ter2", "two words", "p@ss", "x" * 500]
ADDRESSES = [
    "bob@example.com",
    "celery@example.com",
    "celerybeat@example.com",
    "bob.o+x@mail.example.com",
    "o'neil@example.com",
    '"john doe"@example.com',
    "bob@[192.0.2.1]",
    "bob%40example.com",
    f"{'x' * 100}@example.com",
    "böb@exämple.com",
]

#: Lines, each with the secrets that are put in at ``%s``.
CORPUS = [
    *((line, SPACED) for line in (
        'password="%s"',
        "password='%s' and more",
        '{"password": "%s", "a": 1}',
        "{'password': '%s', 'a': 1}",
        "<QueryDict: {'username': ['a'], 'password': ['%s']}>",
        '{"body": "{\\"password\\": \\"%s\\", \\"a\\": 1}"}',
        "login(username='a', password='%s')",
        "EMAIL_HOST_PASSWORD: '%s'",
        '{"client_secret":"%s"}',
        "{'HTTP_AUTHORIZATION': 'Basic %s'}",
        "('Set-Cookie', 'x'), {'Cookie': 'sessionid=%s'}",
        "Authorization: Basic %s",
        "authorization: Bearer %s",
        "Proxy-Authorization: Digest %s",
        "Cookie: csrftoken=a; sessionid=%s",
        "Set-Cookie: sessionid=%s; HttpOnly",
        "Authorization:\tBearer %s",
        "authorization : Bearer %s",
        "authorization=Digest %s",
        "HTTP_AUTHORIZATION: Token %s",
        "Cookie : a=b; sessionid=%s",
        "HTTP_COOKIE=a=b; sessionid=%s",
        "kwargs={'api_key': '%s'}",
        "connect(passwd=b'%s')",
        'token: "%s"',
        "os.environ['SECRET_KEY'] = '%s'",
    )),
    *((line, WORDS) for line in (
        "password=%s",
        "password = %s",
        "Password: %s",
        "token = Token %s",
        "X-Access-Token: Bearer  %s",
        "host=db user=a password=%s dbname=b",
        "--password=%s --verbose",
        "PGPASSWORD=%s psql",
        "token=%s",
        "token=%s&next=/",
        "access_token=%s, expires",
        "X-API-Key: %s",
        "apikey=%s",
        "aws_secret_access_key=%s",
        "SECRET_KEY=%s",
        "sessionid=%s; path=/",
        "credentials: %s",
        "pwd=%s;",
        "GET /api/?token=%s HTTP/1.1",
        "Error handling request /a/?b=1&x=%s",
        "Not Found: /secret/%s",
        "passphrase: %s",
    )),
    *((line, PASSWORDS) for line in (
        "Connected to amqp://user:%s@mq:5672//",
        "postgres://user:%s@db.example.com/name is unavailable",
        "a http://example.com/ b redis://:%s@cache:6379/0",
        "smtp+ssl://user:%s@mail:465?ssl=1",
    )),
    *((line, ADDRESSES) for line in (
        "550 5.1.1 <%s>: unknown",
        "to %s: no",
        "recipients=['%s']",
    )),
    *((line, ["bob", "a (b) c", "1, x) y"]) for line in (
        "Key (username)=(%s) already exists.",
        "DETAIL: Key (a, b)=(%s) already exists.",
        "Failing row contains (1, %s, null).",
        "Failing row contains (1, %s\n2, null).\nNext",
        "Failing row contains (1, %s",
        "Invalid request from ip=203.0.113.7 %.0s: no",
    )),
    *((line, ["eyJhbGciOiJIUzI1NiJ9.e30.abc", "dXNlcjpodW50ZXIyaHVudGVy"]) for line in (
        "sent Bearer %s to it",
        "curl -H 'Token %s'",
        "Basic %s",
    )),
]  # fmt: skip
LINES = [(line, secret) for line, secrets in CORPUS for secret in secrets]

#: Lines without secrets, which are not changed.
HARMLESS = """\
celery@web-1 ready.
missed heartbeat from celery@0123456789ab
Why? Because.
Forbidden (CSRF token missing.): /admin/login/
Task example.tasks.send_user_digest[0b6a-41] succeeded in 0.1s: None
GET /api/token/ 200 12 ms
postgres://db.example.com:5432/name
see https://example.com/a/b and http://localhost:8000/
password authentication failed for user "a"
The password is too short.
Listening at: http://0.0.0.0:8000 (7)
beat: Starting...
a = (1, 2)
decorated with @property, at 10:00 @ home
Connected to amqp://***@mq:5672//
password=***
Invalid basic header. No credentials provided.
Key press (a) already exists.
""".splitlines()


@pytest.fixture(autouse=True)
def _paths(settings):
    settings.LOG_REDACTED_PATHS = ("/secret/",)


def test_corpus_has_200_lines():
    assert len(LINES) + len(HARMLESS) >= 200
    assert all(name in " ".join(line for line, _ in CORPUS).lower() for name in SECRET_NAMES[:8])


@pytest.mark.parametrize("formatter", [logs.TextFormatter(), logs.JsonFormatter()])
@pytest.mark.parametrize(("line", "secret"), LINES)
def test_no_part_of_a_secret_is_logged(formatter, line, secret):
    try:
        raise ValueError(line % secret)
    except ValueError:
        error = sys.exc_info()
    for text in (f"first {line % secret}", line % secret):
        record = logging.LogRecord("a", logging.INFO, "a.py", 1, text, None, error)
        logged = formatter.format(record)
        assert "***" in logged
        for part in {secret, *secret.split(), secret.partition("@")[0]}:
            assert len(part) < 3 or part not in logged, logged


@pytest.mark.parametrize("line", HARMLESS)
def test_other_text_is_unchanged(line):
    assert redact(line) == line


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("password=hunter2 user=a", "password=*** user=a"),
        ('{"password": "a b", "c": 1}', '{"password": ***, "c": 1}'),
        ("Cookie: a=b; c=d", "Cookie: ***"),
        ("amqp://a:b c@mq:5672// at home", "amqp://***@mq:5672// at home"),
        ("http://a.example:80/ from bob@b.example", "http://a.example:80/ from ***@***"),
    ],
)
def test_rest_of_the_line_is_kept(text, redacted):
    assert redact(text) == redacted
    assert redact(redacted) == redacted


@pytest.mark.parametrize(
    "part",
    [
        *("a", "a.", "@", "a@", "a@b.", "://", "://a:", "://a:b ", "?", "/?", '"', '"a', "'", "\\"),
        *(
            "password=",
            "password='",
            'password="',
            "password=\\'",
            "password",
            "token: {",
            "cookie: ",
        ),
        *("Failing row contains (", ")=(", "=(", "ip=", "Bearer ", "%40", "\n", "[", "-", "://a@"),
        *("/secret/", '\\"password\\": ', "password=\\'a\\", "passwords", "é"),
    ],
)
def test_takes_linear_time(part):
    """Count steps instead of seconds: compare the times of a text and of one 8 times as long."""
    times = [
        min(measure(part * (size // len(part))) for _ in range(3)) for size in (16_000, 128_000)
    ]
    assert times[1] < 40 * max(times[0], 0.0005)


def measure(text):
    import time

    start = time.process_time()
    redact(text)
    return time.process_time() - start
