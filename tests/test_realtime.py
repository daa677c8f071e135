"""WebSockets: a moderator's open list shows a new submission without being loaded again."""

import asyncio
import contextlib
import json
import shutil
import signal
from urllib.request import Request, urlopen

import pytest
from playwright.sync_api import expect, sync_playwright
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from tests.conftest import production_variables
from tests.servers import Wire, free_port, wait_for
from tests.test_web_servers import STOP_SECONDS, is_ready

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


#: The servers of a test in which their kind matters little.
EITHER = [pytest.param("granian", marks=pytest.mark.long), "uvicorn"]


@pytest.fixture(params=["granian", "uvicorn"])
def service(request, bake, make_service, postgres_url, rabbitmq_url, redis_url):
    """A service with Channels in production mode, with two web processes."""
    project = bake(
        web_server=request.param, realtime="channels", project_slug=f"ws_{request.param}"
    )
    service = make_service(
        project,
        ALLOWED_HOSTS="localhost",
        SECURE_SSL_REDIRECT="off",  # Browsers treat http://localhost as a secure origin.
        WEB_CONCURRENCY=2,
        REDIS_URL=redis_url,
        **production_variables(postgres_url, rabbitmq_url),
    )
    service.deploy()
    service.shell('User.objects.create_superuser("admin", "admin@example.com", "secret")')
    service.web = service.start("web")
    wait_for(lambda: is_ready(service), 30, service.web.text)
    return service


def post_submission(service, text):
    """Post a submission over the API."""
    base = f"http://localhost:{service.port}/api"
    headers = {"Content-Type": "application/json"}
    login = json.dumps({"username": "admin", "password": "secret"}).encode()
    with urlopen(Request(f"{base}/token/", login, headers)) as response:
        token = json.load(response)["token"]
    headers["Authorization"] = f"Token {token}"
    body = json.dumps({"body": text}).encode()
    with urlopen(Request(f"{base}/submissions/", body, headers)) as response:
        assert response.status == 201


@pytest.fixture
def page(service):
    """The list of submissions in the browser of a moderator. ``page.errors`` has all errors."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed; install the package chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(base_url=f"http://localhost:{service.port}")
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        path = f"/admin/{service.folder.name}/submission/"
        page.goto(path)
        page.fill("#id_username", "admin")
        page.fill("#id_password", "secret")
        # The list is loaded again once the connection is open.
        with page.expect_response(lambda response: response.request.resource_type == "fetch"):
            page.click("[type=submit]")
        yield page
        browser.close()


def test_new_submission_appears_at_once_and_keeps_the_selection(service, page):
    # The list is empty at first.
    post_submission(service, "The first one")
    page.get_by_role("link", name="The first one").wait_for(timeout=10_000)
    page.evaluate("window.loaded = true")
    page.check("input.action-select")
    for text in ("The second one", "The third one"):
        post_submission(service, text)
    for text in ("The second one", "The third one"):
        page.get_by_role("link", name=text).wait_for(timeout=10_000)
    rows = page.locator("#result_list tbody tr th").all_inner_texts()
    assert rows == ["The third one", "The second one", "The first one"]
    assert page.locator("input.action-select:checked").count() == 1
    # A list that is loaded while a submission is posted may have it, and not count it yet.
    expect(page.locator(".paginator")).to_contain_text("3 submissions", timeout=10_000)
    assert page.evaluate("window.loaded") is True
    assert page.errors == []


@pytest.mark.parametrize("service", EITHER, indirect=True)
def test_an_older_answer_does_not_replace_a_newer_one(service, page):
    held = []

    def hold_the_first(route):
        if held:
            route.continue_()
        else:
            held.append((route, route.fetch()))

    page.route("**/submission/", hold_the_first)
    post_submission(service, "The first one")
    wait_for(lambda: page.wait_for_timeout(100) or held, 10, service.web.text)
    post_submission(service, "The second one")
    page.wait_for_timeout(2_000)
    ((route, answer),) = held
    route.fulfill(response=answer)
    page.get_by_role("link", name="The second one").wait_for(timeout=10_000)
    page.wait_for_timeout(500)
    assert "2 submissions" in page.inner_text(".paginator")
    assert page.errors == []


@pytest.mark.parametrize("service", EITHER, indirect=True)
def test_list_connects_again_after_a_restart_and_shows_what_it_missed(service, page):
    post_submission(service, "Before")
    page.get_by_role("link", name="Before").wait_for(timeout=10_000)
    assert service.web.stop(signal.SIGTERM, seconds=STOP_SECONDS) == 0
    service.shell('Submission.objects.create(author=User.objects.get(), body="Posted meanwhile")')
    service.web = service.start("web")
    page.get_by_role("link", name="Posted meanwhile").wait_for(timeout=30_000)
    assert page.errors == []


@pytest.mark.parametrize("service", EITHER, indirect=True)
def test_connection_lasts_while_nothing_is_posted(service, page):
    others = []
    page.on("websocket", lambda socket: others.append(socket.url))
    # Redis ends a consumer's read after 5 seconds, and redis-py one without an answer after 10.
    page.wait_for_timeout(12_000)
    assert others == []
    levels = {json.loads(line)["level"] for line in service.web.text().splitlines()}
    assert levels == {"INFO"}


@pytest.mark.parametrize("service", ["uvicorn"], indirect=True)
def test_list_shows_what_was_posted_while_redis_did_not_answer(service, page):
    service.web.stop(signal.SIGTERM, seconds=STOP_SECONDS)
    with contextlib.closing(Wire(6379)) as wire:
        service.environment["REDIS_URL"] = f"redis://127.0.0.1:{wire.port}"
        service.web = service.start("web")
        with page.expect_response(lambda response: response.request.resource_type == "fetch"):
            wait_for(lambda: is_ready(service), 30, service.web.text)
        wire.cut()
        post_submission(service, "Posted meanwhile")
        page.wait_for_timeout(15_000)  # Reads of Redis end after 10 seconds.
        wire.mend()
        page.get_by_role("link", name="Posted meanwhile").wait_for(timeout=30_000)
        post_submission(service, "Posted later")
        page.get_by_role("link", name="Posted later").wait_for(timeout=10_000)
        assert service.web.stop(signal.SIGTERM, seconds=STOP_SECONDS) == 0
    events = [json.loads(line) for line in service.web.text().splitlines()]
    problems = {event["message"] for event in events if event["level"] != "INFO"}
    assert problems == {
        "Could not send a message to moderators: TimeoutError",
        "WebSocket closed, Redis is unavailable: TimeoutError",
    }
    assert page.errors == []


@pytest.mark.parametrize("service", EITHER, indirect=True)
def test_strangers_are_refused(service):
    async def get_status(path, origin):
        try:
            async with connect(f"ws://localhost:{service.port}{path}", origin=origin):
                return 101
        except InvalidStatus as error:
            return error.response.status_code

    here = f"http://localhost:{service.port}"
    for path, origin in (
        ("/ws/moderation/", here),
        ("/ws/moderation/", "http://other.example"),
        ("/ws/none/", here),
    ):
        assert asyncio.run(get_status(path, origin)) == 403, path
    levels = {json.loads(line)["level"] for line in service.web.text().splitlines()}
    assert levels == {"INFO"}


@pytest.mark.parametrize("service", EITHER, indirect=True)
def test_post_succeeds_without_redis(service):
    service.web.stop(signal.SIGTERM, seconds=STOP_SECONDS)
    service.environment["REDIS_URL"] = f"redis://127.0.0.1:{free_port()}"
    service.web = service.start("web")
    wait_for(lambda: is_ready(service), 30, service.web.text)
    post_submission(service, "Without Redis")
    (event,) = [
        event
        for event in map(json.loads, service.web.text().splitlines())
        if event["level"] == "ERROR"
    ]
    assert event["message"].startswith("Could not send a message to moderators: ")
