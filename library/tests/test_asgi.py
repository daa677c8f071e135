"""Requests to an ASGI server: their bodies are limited, and those that are slow block no others."""

import asyncio

import pytest
from django.core.asgi import get_asgi_application
from django.http import HttpResponse
from django.urls import path
from rest_framework.response import Response
from rest_framework.views import APIView

from prodserver_ops.web import asgi, uploads

FORM = b"application/x-www-form-urlencoded"
PART = b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n%s\r\n--x--\r\n'


class JsonView(APIView):
    authentication_classes = permission_classes = throttle_classes = ()

    def post(self, request):
        return Response(len(request.data))


urlpatterns = [
    path("form/", lambda request: HttpResponse(len(request.POST))),
    path("file/", lambda request: HttpResponse(request.FILES["file"].size)),
    path("json/", JsonView.as_view()),
    path("page/", lambda request: HttpResponse("page")),
]


@pytest.fixture
def application(settings, monkeypatch):
    monkeypatch.setattr(asgi, "start_web_heartbeat", lambda: None)
    settings.ROOT_URLCONF, settings.WEB_THREADS = __name__, 2
    names = ("CsrfViewMiddleware", "SessionMiddleware", "AuthenticationMiddleware")
    names += ("MessageMiddleware", "HealthMiddleware")
    settings.MIDDLEWARE = [each for each in settings.MIDDLEWARE if not each.endswith(names)]
    return asgi.LimitedApplication(get_asgi_application())


async def request(
    application, path, content_type=b"text/plain", parts=(), method="POST", **headers
):
    """Return status and text of the response to a request without Content-Length."""
    sent, parts, is_complete = [], iter(parts), False

    async def receive():
        nonlocal is_complete
        part = asyncio.Event().wait() if is_complete else next(parts, b"")
        if isinstance(part, bytes):
            is_complete = not part
            return {"type": "http.request", "body": part, "more_body": bool(part)}
        await part  # The client waits, and leaves.
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    named = {"host": "testserver", "transfer-encoding": "chunked"} | headers
    encoded = [(name.encode(), value.encode()) for name, value in named.items()]
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": [*encoded, (b"content-type", content_type)],
    }
    await asyncio.wait_for(application(scope, receive, send), 20)
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], body.decode()


@pytest.mark.parametrize(
    ("path", "content_type", "expected"),
    [("/form/", FORM, 400), ("/json/", b"application/json", 413)],
)
def test_body_without_a_length_is_limited_as_others_are(application, path, content_type, expected):
    parts = [b"a=" + b"x" * 2**20] * 2
    for headers in ({}, {"content-length": str(sum(map(len, parts)))}):
        status, _ = asyncio.run(request(application, path, content_type, parts, **headers))
        assert status == expected


def test_file_without_a_length_is_accepted_and_limited(application, settings):
    async def upload(size):
        parts = [PART % (b"x" * size)]
        return await request(application, "/file/", b"multipart/form-data; boundary=x", parts)

    assert asyncio.run(upload(1000)) == (200, "1000")
    assert asyncio.run(upload(settings.UPLOAD_MAX_SIZE + 1))[0] == 413


@pytest.mark.parametrize("path", ["/page/", "/nothing/", "/health/live"])
def test_endless_body_is_cut_off(application, path, monkeypatch):
    monkeypatch.setattr(uploads, "DRAINED", 2**20)
    limit, read = uploads.get_largest(), 0

    def send_parts():
        nonlocal read
        while True:
            assert read <= limit
            read += 2**20
            yield b"x" * 2**20

    assert asyncio.run(request(application, path, parts=send_parts())) == (413, "")


def test_tunnel_is_refused(application):
    assert asyncio.run(request(application, "/page/", method="CONNECT")) == (405, "")


def test_view_that_accepts_more_raises_the_limit(monkeypatch):
    monkeypatch.setattr(uploads, "_limits", set())
    before = uploads.get_largest()
    uploads.limit_upload(10**9)
    assert uploads.get_largest() == 10**9 + uploads.DRAINED > before


def test_slow_bodies_do_not_block_others(application):
    async def attack():
        loop = asyncio.get_running_loop()
        waiting = [loop.create_future() for _ in range(4)]
        slow = [
            asyncio.ensure_future(request(application, "/page/", parts=[b"x", future]))
            for future in waiting
        ]
        await asyncio.sleep(0)
        result = await request(application, "/page/")
        assert not any(task.done() for task in slow)
        for future in waiting:
            future.set_result(None)
        await asyncio.gather(*slow, return_exceptions=True)
        return result

    assert asyncio.run(attack()) == (200, "page")
