"""Accessibility: axe finds no violation in the service's own pages and e-mail.

On a desktop in the light theme and on a phone in the dark one. Pages that are Django's alone,
such as the form of a group, and Swagger's at ``/api/docs/`` are not looked at.
"""

import shutil

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

CREATE_DATA = """
from django.utils import timezone
from prodserver_ops.models import Heartbeat, TaskRun
admin = User.objects.create_superuser("admin", "admin@example.com", "secret")
author = User.objects.create_user("sam", "sam@example.com")
for number in range(3):
    Submission.objects.create(author=author, body=f"Number {{number}}\\n\\n" + "long text " * 90)
now = timezone.now()
fields = {{"name": "accessible.tasks.send_digest_to_moderators", "arguments": "[[1], {{}}]"}}
fields |= {{"started_at": now, "host": "web." + "x" * 60}}
TaskRun.objects.create(status="failed", error="ValueError: wrong", **fields)
TaskRun.objects.create(status="running", **fields)
Heartbeat.objects.create(process="worker", host="x" * 64, pid=1, seen_at=now)
from prodserver_ops.mail import unsubscribe
from prodserver_ops.mail.digests import get_digest
print(unsubscribe.link(admin, get_digest("daily")))
"""

PAGES = [
    "/",
    "/emails/",
    "/admin/",
    "/admin/ops/taskrun/operations/",
    "/admin/ops/taskrun/",
    "/admin/ops/taskrun/1/change/",
    "/admin/django_celery_beat/periodictask/",
    "/admin/{slug}/submission/",
    "/admin/{slug}/submission/2/change/",
]

#: What Django's own parts of these pages violate: the search box of a list has no visible label.
DJANGO = ("label-title-only", 'id="searchbar"')

EMAILS = ["moderator", "daily", "weekly", "answer"]

#: Rules for all content. Others, such as landmarks, are for pages and not for e-mail.
CONTENT = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}

DEVICES = [(1280, "light"), (390, "dark")]


@pytest.fixture
def service(bake, make_service):
    """A service in development mode with a running web process."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed; install the package chromium")
    service = make_service(bake(project_slug="accessible"))
    service.install()
    service.run("python manage.py migrate -v0")
    service.start("web").wait_for_text("Listening at")
    return service


@pytest.fixture
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


def find_violations(page, options=None):
    """Return the violations of axe in a page, one line each."""
    response = Axe().run(page, options=options).response
    # A page without any content would have no violation either.
    assert response["passes"]
    return [
        f"{violation['id']}: {node['html']}"
        for violation in response["violations"]
        for node in violation["nodes"]
        if not (violation["id"] == DJANGO[0] and DJANGO[1] in node["html"])
    ]


def test_own_pages_and_e_mail_have_no_violation(service, browser):
    slug = service.folder.name
    link = service.shell(CREATE_DATA.format(slug=slug)).split()[-1]
    unsubscribe = "/" + link.split("/", 3)[3]
    found = []
    for width, scheme in DEVICES:
        context = browser.new_context(
            base_url=f"http://localhost:{service.port}",
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
        )
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.goto("/admin/")
        page.fill("#id_username", "admin")
        page.fill("#id_password", "secret")
        page.click("[type=submit]")
        for path in (*PAGES, unsubscribe):
            path = path.format(slug=slug)
            assert page.goto(path).status == 200
            found += [(width, path, each) for each in find_violations(page)]
            assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        page.goto(f"/admin/{slug}/submission/")
        page.check("#action-toggle")
        page.select_option("[name=action]", "answer")
        page.click("button[name=index]")
        assert "will get an e-mail" in page.inner_text("#content")
        found += [(width, "answer", each) for each in find_violations(page)]
        # The pages with previews allow no scripts, so axe gets a copy.
        for name in EMAILS:
            text = context.request.get(f"/emails/{name}.html").text()
            copy = context.new_page()
            copy.set_content(text)
            found += [(width, name, each) for each in find_violations(copy, CONTENT)]
            assert copy.evaluate("document.documentElement.scrollWidth") <= width, name
        # Check that a violation is detected.
        page.evaluate("document.querySelector('#content').innerHTML += '<button></button>'")
        assert any(each.startswith("button-name") for each in find_violations(page))
    assert found == []
