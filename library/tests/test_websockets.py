"""WebSockets: they are closed when their user may no longer use them, or sends invalid frames."""

import pytest
from asgiref.sync import async_to_sync
from asgiref.testing import ApplicationCommunicator
from channels.generic.websocket import AsyncJsonWebsocketConsumer
from channels.layers import get_channel_layer
from django.contrib.auth.models import Permission
from django.urls import path

from prodserver_ops.web import websockets

pytestmark = pytest.mark.django_db(transaction=True, serialized_rollback=True)


class News(AsyncJsonWebsocketConsumer):
    groups = ("news",)

    async def news_published(self, message):
        await self.send_json({"type": message["type"]})

    async def receive_json(self, content, **kwargs):
        await self.send_json(content)


@pytest.fixture(autouse=True)
def _settings(settings):
    settings.ALLOWED_HOSTS = ["testserver"]
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}


@pytest.fixture
def user(make_user):
    user = make_user("reader", is_staff=True)
    user.user_permissions.add(Permission.objects.first())
    return user


def run(client, act, *frames, idle=False):
    """Connect, act on the database, send frames or a message to the group; return the output."""

    async def connect():
        headers = [(b"origin", b"http://testserver")]
        headers += [(b"cookie", client.cookies.output(header="", sep=";").encode())]
        scope = {"type": "websocket", "path": "/news/", "headers": headers, "subprotocols": []}
        application = websockets.get_websocket_application([path("news/", News.as_asgi())])
        connection = ApplicationCommunicator(application, scope)
        await connection.send_input({"type": "websocket.connect"})
        assert (await connection.receive_output())["type"] == "websocket.accept"
        await websockets.database_sync_to_async(act)()
        for frame in frames:
            await connection.send_input({"type": "websocket.receive"} | frame)
        if not frames and not idle:
            await get_channel_layer().group_send("news", {"type": "news.published"})
        output = await connection.receive_output(timeout=5)
        await connection.send_input({"type": "websocket.disconnect", "code": 1000})
        await connection.wait()
        return output.get("text") or output["code"]

    return async_to_sync(connect)()


def log_out(client, user):
    client.session.flush()


def deactivate(client, user):
    user.is_active = False
    user.save()


def change_password(client, user):
    user.set_password("another")
    user.save()


def remove_permission(client, user):
    user.user_permissions.clear()


def remove_from_staff(client, user):
    user.is_staff = False
    user.save()


ACTS = [log_out, deactivate, change_password, remove_permission, remove_from_staff]


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("frames", [[], [{"text": "{}"}]])
def test_is_closed_when_its_user_may_no_longer_use_it(client, user, act, frames):
    client.force_login(user)
    assert run(client, lambda: act(client, user), *frames) == websockets.POLICY_VIOLATION


def test_idle_connection_is_closed_too(client, user, monkeypatch):
    monkeypatch.setattr(websockets, "INTERVAL", 0.05)
    client.force_login(user)
    assert run(client, lambda: deactivate(client, user), idle=True) == websockets.POLICY_VIOLATION


@pytest.mark.parametrize("logged_in", [True, False])
def test_stays_open_otherwise(client, user, logged_in):
    if logged_in:
        client.force_login(user)
    assert run(client, lambda: None) == '{"type": "news.published"}'
    assert run(client, lambda: None, {"text": "[1]"}) == "[1]"


@pytest.mark.parametrize(
    "frame", [{"text": "{"}, {"text": ""}, {"bytes": b"\xff"}, {"text": "[" * 100_000}]
)
def test_invalid_frame_closes_it_with_one_line(client, user, caplog, frame):
    client.force_login(user)
    assert run(client, lambda: None, frame) == websockets.INVALID_DATA
    (record,) = [each for each in caplog.records if each.name == websockets.__name__]
    assert (record.levelname, record.exc_info) == ("WARNING", None)
