"""Requests whose bodies Django cannot read: no status 500, and no exception in the log."""

import encodings.aliases
from inspect import unwrap

import pytest
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest
from django.test import Client, RequestFactory
from django.urls import reverse

from prodserver_ops.web import bodies, gunicorn_worker

FORM = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data; boundary=x"

NAMES = {*encodings.aliases.aliases.values()}
NAMES |= {"utf-8-sig", "idna", "punycode", "unicode_escape", "undefined", "utf8", "none", "x" * 999}


def make_part(headers, body=b"b"):
    return b"--x\r\nContent-Disposition: form-data; name=a%s\r\n\r\n%s\r\n--x--\r\n" % (
        headers,
        body,
    )


def repeat(part, count):
    return part.removesuffix(b"--x--\r\n") * count + b"--x--\r\n"


#: Bodies that Django rejects with an exception, by name.
BODIES = {
    "no boundary": ("multipart/form-data", b"x"),
    "boundary": ("multipart/form-data; boundary=\xe9", b"x"),
    "base64": (MULTIPART, make_part(b"; filename=f\r\nContent-Transfer-Encoding: base64", b"!!!a")),
    "header": (MULTIPART, make_part(b"\r\n%s: b" % (b"A" * 5000))),
    "encoded name": (MULTIPART, make_part(b"; filename*=undefined''%ff")),
    "many files": (MULTIPART, repeat(make_part(b"; filename=f"), 200)),
    "many multipart fields": (MULTIPART, repeat(make_part(b""), 1500)),
    "large multipart field": (MULTIPART, make_part(b"", b"b" * 2**21)),
    "large file": (MULTIPART, make_part(b"; filename=f", b"b" * 6 * 2**20)),
    "large form": (FORM, b"a=" + b"x" * 2**21),
    "many fields": (FORM, b"&".join(b"a=%d" % number for number in range(1500))),
    "not UTF-8": (FORM, b"%ff%00=%00%fe"),
}

REJECTED = {400, 403, 404, 405, 413, 415, 429}


@pytest.fixture
def post(caplog):
    """Return a function that posts a body with a cookie, so that Django reads it for the token."""

    def post(path, content_type, body, **headers):
        client = Client(enforce_csrf_checks=True, raise_request_exception=False)
        client.cookies["csrftoken"] = "a" * 32
        response = client.generic("POST", path, body, content_type, headers=headers)
        return response.status_code

    yield post
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("host", ["testserver", "evil.example"])
@pytest.mark.parametrize("path", ["login", "/nothing/", "/unsubscribe/x/"])
@pytest.mark.parametrize("name", BODIES)
@pytest.mark.django_db
def test_body_that_cannot_be_read_is_rejected(post, path, name, host):
    path = reverse("admin:login") if path == "login" else path
    assert post(path, *BODIES[name], host=host) in REJECTED


@pytest.mark.parametrize("content_type", [FORM, MULTIPART, "application/json"])
@pytest.mark.django_db
def test_no_encoding_is_an_error(post, content_type):
    paths = [reverse("admin:login"), reverse("token"), "/nothing/"]
    body = make_part(b"", b"+AGE-") if content_type == MULTIPART else b"a=%ff+AGE"
    for name in sorted(NAMES):
        for path in paths:
            status = post(f"{path}?deep=%41", f"{content_type}; charset={name}", body)
            assert status in REJECTED, (name, path)


@pytest.mark.parametrize("name", ["hex", "idna", "punycode", "none"])
def test_unusual_encoding_of_a_form_is_named(client, name):
    response = client.generic("POST", "/nothing/", b"a=1", f"{FORM}; charset={name}")
    assert (response.status_code, response.text) == (415, "Send forms with charset=utf-8.")


@pytest.mark.parametrize("name", ["hex", "idna", "punycode", "none"])
def test_encoding_of_another_body_does_not_count(rf, name):
    request = rf.generic("GET", "/?%41=%c3%a9", b"", f"text/plain; charset={name}")
    assert request.GET == {"A": ["é"]}


@pytest.mark.parametrize("header", ["Content-Type", "Accept"])
@pytest.mark.parametrize("parameter", ["x*=hex''%41", "x* =none''%41", f"x={'y' * 11_000}"])
@pytest.mark.django_db
def test_headers_that_cannot_be_parsed_are_ignored(post, header, parameter):
    for path in (reverse("token"), "/nothing/"):
        headers = {header: f"application/json; {parameter}"}
        assert (
            post(path, headers.pop("Content-Type", "application/json"), b"{}", **headers)
            in REJECTED
        )


@pytest.mark.parametrize("name", ["utf-8", "UTF8", "us-ascii", "iso-8859-1"])
@pytest.mark.django_db
def test_usual_encodings_are_accepted(client, make_user, name):
    make_user("user", password="secret", is_staff=True)
    for body in ("username", "user"), ("password", "secret"):
        part = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
        data = getattr(client, "data", b"") + part % tuple(text.encode() for text in body)
        client.data = data
    response = client.generic(
        "POST", reverse("admin:login"), data + b"--x--\r\n", f"{MULTIPART}; charset={name}"
    )
    assert response.status_code == 302


def test_patches_are_installed_once():
    """Django calls ``ready()`` again for a test with other ``INSTALLED_APPS``."""
    bodies.install()
    assert unwrap(HttpRequest._set_content_type_params) is not bodies.set_content_type


class Chunks:
    """A body as gunicorn provides it: it ends, or fails, and has no length."""

    def __init__(self, *chunks):
        self.chunks = iter(chunks)

    def read(self, size):
        chunk = next(self.chunks, b"")
        if isinstance(chunk, Exception):
            raise chunk
        return chunk


def send_chunks(*chunks, path="/api/token/"):
    """Return status and body of the response to a chunked request that gunicorn has received."""
    started = []
    environ = RequestFactory().post(path, content_type="application/json").environ
    del environ["CONTENT_LENGTH"]
    environ |= {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input": Chunks(*chunks)}
    application = gunicorn_worker.read_chunks(get_wsgi_application())
    response = application(environ, lambda *arguments: started.append(arguments[0]))
    return started[0], b"".join(response)


@pytest.mark.django_db
class TestChunks:
    def test_body_without_length_is_read(self):
        status, text = send_chunks(b'{"username": "a",', b' "password": "b"}')
        assert status.startswith("400")
        assert b"required" not in text
        assert b"non_field_errors" in text

    def test_body_of_any_length_is_not_stored(self, settings, monkeypatch):
        monkeypatch.setattr(gunicorn_worker.uploads, "DRAINED", 0)
        monkeypatch.setattr(gunicorn_worker.uploads, "_limits", set())
        settings.UPLOAD_MAX_SIZE = settings.DATA_UPLOAD_MAX_MEMORY_SIZE = 1000
        assert send_chunks(*[b"x" * 100] * 10, OSError()) == ("400 Bad Request", b"")
        assert send_chunks(*[b"x" * 100] * 11, AssertionError()) == ("413 Content Too Large", b"")
