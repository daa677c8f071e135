"""The home page in development: a submission goes through moderation, worker and e-mail."""

import html
import re
import shutil
import subprocess

import pytest
from playwright.sync_api import sync_playwright

from tests.servers import reachable
from tests.test_browser import record_error
from tests.test_development import fetch, start

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

CREATE_ADMIN = 'User.objects.create_superuser("admin", "admin@example.com", "secret-1234")'


@pytest.fixture
def service(bake, make_service):
    """An installed and migrated service with an administrator."""
    service = make_service(bake(project_slug="welcome"))
    service.install()
    service.run("python manage.py migrate")
    service.shell(CREATE_ADMIN)
    return service


def test_home_page_leads_through_the_service(service):
    honcho, port = start(service)
    honcho.wait_for_text("Sign in:     as admin", seconds=60)
    assert reachable(port)

    # The commands of the page and of docs/api.md work as they are printed.
    page = fetch(port)[1]
    commands = [html.unescape(text) for text in re.findall(r"<pre.*?<code>(.*?)</code>", page)]
    assert len(commands) == 3
    document = (service.folder / "docs" / "api.md").read_text()
    for command in commands:
        assert command.replace(f":{port}/", ":8000/") in document
    done = subprocess.run(
        ["bash", "-c", "\n".join(commands)],
        input="secret-1234\n",
        env={"PATH": service.environment["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count('"body":"Is there room for two more?","status":"pending"') == 2

    if CHROMIUM is None:
        pytest.skip("Chromium is not installed; install the package chromium")
    errors = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        context = browser.new_context(base_url=f"http://localhost:{port}")
        context.on("console", lambda message: record_error(message, errors))
        page = context.new_page()
        page.goto("/")
        page.click("a:text-is('Sign in')")
        page.fill("#id_username", "admin")
        page.fill("#id_password", "secret-1234")
        page.click("[type=submit]")
        page.click("form[data-post] button")
        with context.expect_page() as opened:
            page.click("output a")
        assert "is pending" in page.inner_text("output")
        opened.value.fill("#id_response", "Yes, please come.")
        opened.value.click("[name=_save]:visible")
        page.bring_to_front()
        page.wait_for_selector("text=is answered", timeout=60_000)
        page.click("#welcome-state a:has-text('your submission was answered')", timeout=60_000)
        page.wait_for_selector("text=Yes, please come.")
        browser.close()
    assert errors == []
    assert "welcome/state" not in honcho.text()
