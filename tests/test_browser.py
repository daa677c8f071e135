"""Browser: the admin and the API documentation work under the content security policy."""

import re
import shutil

import pytest
from playwright.sync_api import sync_playwright

from tests.conftest import production_variables

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

CREATE_DATA = """
admin = User.objects.create_superuser("admin", "admin@example.com", "secret")
Submission.objects.create(author=admin, body="Please remember us.")
from prodserver_ops.mail import unsubscribe
from prodserver_ops.mail.digests import get_digest
print(unsubscribe.link(admin, get_digest("daily")))
"""

#: Logs violations of the content security policy to the console.
LOG_VIOLATIONS = """
document.addEventListener("securitypolicyviolation", event => console.error(
    "CSP violation:", event.violatedDirective, event.blockedURI, event.sourceFile, event.sample
));
"""


@pytest.fixture(params=["6.0", pytest.param("5.2", marks=pytest.mark.long)])
def service(request, bake, make_service, postgres_url, rabbitmq_url):
    """A service in production mode with a running web process at http://localhost."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed; install the package chromium")
    version = request.param
    service = make_service(
        bake(django_version=version, project_slug=f"browser{version[0]}"),
        ALLOWED_HOSTS="localhost",
        SECURE_SSL_REDIRECT="off",  # Browsers treat http://localhost as a secure origin.
        **production_variables(postgres_url, rabbitmq_url),
    )
    service.deploy()
    service.start("web").wait_for_text("Listening at")
    return service


@pytest.fixture
def context(service):
    """A browser context. ``context.errors`` are the errors of its pages and console."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        context = browser.new_context(base_url=f"http://localhost:{service.port}")
        context.errors = []
        context.add_init_script(LOG_VIOLATIONS)
        context.on("weberror", lambda error: context.errors.append(str(error.error)))
        context.on("console", lambda message: record_error(message, context.errors))
        yield context
        browser.close()


def record_error(message, errors):
    # Browsers request the icon of a site even if it has none.
    if message.type == "error" and not message.location["url"].endswith("/favicon.ico"):
        errors.append(message.text)


def crawl(page):
    """Follow all links in the admin and return the paths of the opened pages."""
    queue, opened = ["/admin/"], []
    while queue:
        path = queue.pop(0)
        assert page.goto(path).status == 200, path
        opened.append(path)
        for link in re.findall(r'href="(/admin/[\w/]*/)"', page.content()):
            if link not in opened and link not in queue and "logout" not in link:
                queue.append(link)
    return opened


def add_schedule(page):
    page.goto("/admin/django_celery_beat/periodictask/add/")
    page.fill("#id_name", "mine")
    page.select_option("#id_regtask", index=1)
    page.select_option("#id_crontab", index=1)
    assert "Every hour" in page.inner_text(".field-crontab .help")
    assert not page.locator(".field-crontab_translation").is_visible()
    for field in ("#id_start_time_0", "#id_start_time_1"):
        page.locator(".field-start_time .datetimeshortcuts a").filter(
            has_text="Today" if field.endswith("0") else "Now"
        ).first.click()
        assert page.input_value(field)
    page.locator("[id^=calendarlink]").first.click()
    assert page.locator(".calendarbox").first.is_visible()
    with page.context.expect_page() as popup:
        page.click("#add_id_crontab")
    popup.value.fill("#id_minute", "5")
    popup.value.click("[name=_save]")
    chosen = page.locator("#id_crontab option:checked")
    chosen.filter(has_text=re.compile(r"^\s*5 ")).wait_for(state="attached")
    page.click("[name=_save]")
    assert "was added successfully" in page.inner_text(".messagelist")


def try_out_api_operations(page):
    page.goto("/api/docs/")
    for kind, status in (("get", "200"), ("post", "201")):
        operation = page.locator(f".opblock-{kind}").first
        operation.click()
        operation.locator(".try-out__btn").click()
        if kind == "post":
            operation.locator("textarea").fill('{"body": "From the docs"}')
        operation.locator("button.execute").click()
        status_cell = operation.locator(".live-responses-table .response .response-col_status")
        assert status_cell.first.inner_text().startswith(status)


def test_pages_do_not_violate_the_content_security_policy(service, context):
    link = service.shell(CREATE_DATA.format(slug=service.folder.name)).split()[-1]
    page = context.new_page()
    page.goto("/")
    page.goto("/admin/")
    page.fill("#id_username", "admin")
    page.fill("#id_password", "secret")
    page.click("[type=submit]")
    opened = crawl(page)
    assert len(opened) > 40
    add_schedule(page)
    try_out_api_operations(page)
    page.goto(re.sub(r"^https://[^/]+", "", link))
    page.click("button")
    assert "is unsubscribed" in page.inner_text("main")
    assert context.errors == []

    # Check that a violation is detected.
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<p style=\"color: red\">')")
    assert context.errors[0].startswith(("CSP violation: style-src", "Applying inline style"))
