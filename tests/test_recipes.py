"""Recipes: each one is applied as it is printed, passes the checks, and keeps its promise.

The long form also installs the packages with the recipe's own command, lints, runs the tests of the
service and ``smoke``.
"""

import os
import shlex
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.conftest import made_once, require_server
from tests.generate import TEMPLATE
from tests.kitchen import SLUG, Kitchen, create_database, drop_database
from tests.recipes import get_path, read_recipes
from tests.test_output import ANSWERS

RECIPES = read_recipes(get_path(TEMPLATE))

#: The tests of promises by the title of the recipe.
PROMISES = {}

slow = pytest.mark.slow


def promise(title):
    """Mark the test of what a recipe promises."""

    def mark(test):
        assert PROMISES.setdefault(title, test) is test
        return pytest.mark.slow(pytest.mark.parametrize("titles", [(title,)], ids=[title])(test))

    return mark


@pytest.fixture(scope="session")
def kitchen(request, uv, shared_folder, database_copies):
    """The service without recipes."""
    require_server(request, "PostgreSQL", 5432, "docker run -d -p 5432:5432 postgres:16")
    folder = shared_folder / "kitchen"
    if os.environ.get("RECIPES_KITCHEN"):
        folder = Path(os.environ["RECIPES_KITCHEN"])
    with made_once(folder) as is_missing:
        if is_missing:
            Kitchen(folder, uv).prepare()
            database_copies.append(Kitchen(folder, uv).database)
    return Kitchen(folder, uv)


@pytest.fixture
def dish(kitchen, titles, tmp_path):
    """The service with the recipe of the test."""
    dish = kitchen.serve(tmp_path / SLUG, *titles)
    yield dish
    dish.close()


def test_each_recipe_has_a_test_of_its_promise():
    assert set(PROMISES) == set(RECIPES)


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS)
def test_each_recipe_applies_to_services_with_other_choices(bake, tmp_path, answers):
    project = bake(**answers)
    for title, recipe in read_recipes(get_path(project)).items():
        folder = tmp_path / title
        shutil.copytree(project, folder, ignore=shutil.ignore_patterns("vendor"))
        recipe.apply(folder)
        for path in folder.rglob("*.py"):
            compile(path.read_text(), path, "exec")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("title", RECIPES)
def test_service_with_the_recipe_passes_its_tests_and_works(bake, make_service, title):
    service = make_service(bake(project_slug=SLUG))
    recipe = read_recipes(get_path(service.folder))[title]

    def run(command):
        service.run(shlex.join([service.uv, *command[1:]] if command[0] == "uv" else command))

    run(["uv", "sync", "--quiet"])
    recipe.apply(service.folder, run)
    run(["uv", "sync", "--quiet"])
    for command in (
        *("ruff check --fix", "ruff format", "ruff check", "mypy", "pytest -q"),
        *("python manage.py makemigrations --check", "python manage.py migrate"),
        "python manage.py smoke",
    ):
        service.run(command)


#: How a service logs in with a form and with the API, and whether that is limited.
GUARD = """
def is_guarded(log_in, right):
    # The right password is refused from an address after ten wrong ones, but not from another.
    wrong = [log_in(make_client("192.0.2.9"), f"wrong {number}") for number in range(11)]
    assert right not in wrong, wrong
    return log_in(make_client("192.0.2.9"), PASSWORD) != right == log_in(
        make_client("192.0.2.10"), PASSWORD
    )
"""


class Bucket(ThreadingHTTPServer):
    """A server that stores what is put, as S3 does."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), BucketHandler)
        self.files = {}


class BucketHandler(BaseHTTPRequestHandler):
    def do_PUT(self):
        # The SDK sends chunks with their signatures.
        self.server.files[self.path.partition("?")[0]] = self.read_body()
        self.reply(200)

    def do_GET(self):
        content = self.server.files.get(self.path.partition("?")[0])
        self.reply(404 if content is None else 200, content or b"")

    do_HEAD = do_GET

    def read_body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def reply(self, status, content=b""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        """Log nothing."""


@pytest.fixture
def bucket():
    """A running server, and the files that it received by path."""
    with Bucket() as bucket:
        threading.Thread(target=bucket.serve_forever, daemon=True).start()
        yield bucket
        bucket.shutdown()


@promise("Uploaded files in S3")
def test_uploads_are_stored_in_the_bucket_and_nothing_on_the_disk(dish, bucket):
    output = dish.ask(
        """
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from django.templatetags.static import static
name = default_storage.save("hall.txt", ContentFile(b"the large hall"))
with default_storage.open(name) as file:
    print(file.read())
print(default_storage.url(name), static("site.css"))
""",
        MEDIA_BUCKET="uploads",
        AWS_ENDPOINT_URL_S3=f"http://127.0.0.1:{bucket.server_port}",
        AWS_ACCESS_KEY_ID="a",
        AWS_SECRET_ACCESS_KEY="b",
        AWS_DEFAULT_REGION="eu-central-1",
    )
    assert "b'the large hall'" in output
    assert any(b"the large hall" in content for content in bucket.files.values())
    assert "Signature=" in output
    # Static files are still those of production.
    assert "/static/site." in output and "/static/site.css" not in output
    assert not list(dish.folder.rglob("hall*"))


@promise("Cache in Redis")
def test_processes_share_the_cache_and_logins_are_limited_without_it(dish, redis_url):
    url = {"CACHE_URL": redis_url}
    dish.ask("from django.core.cache import cache; cache.set('room', 'hall')", **url)
    dish.ask(
        GUARD
        + """
from django.core.cache import cache
assert cache.get("room") == "hall"
settings.CACHES["default"]["LOCATION"] = "redis://127.0.0.1:1/0"
def log_in(client, password):
    return client.post("/api/token/", {"username": "anna", "password": password}, "application/json").status_code
assert is_guarded(log_in, 200)
""",
        **url,
    )


@promise("Read replica")
def test_only_marked_queries_read_from_the_replica_and_none_writes(dish):
    replica = f"{dish.database}_replica"
    create_database(replica, dish.database)
    url = dish.production["DATABASE_URL"] + "_replica"
    try:
        dish.run(
            "python manage.py shell -v0 -c 'User.objects.create_user(\"remote\", pk=1000)'",
            **dish.production | {"DATABASE_URL": url},
        )
        dish.ask(
            f"""
from django.db import DatabaseError
from {SLUG}.routers import for_reading
assert not User.objects.filter(username="remote").exists()
user = for_reading(User.objects.all()).get(username="remote")
user.save()
assert User.objects.filter(username="remote").exists()
try:
    User.objects.using("replica").update(first_name="x")
except DatabaseError as error:
    assert "read-only" in str(error), error
else:
    raise AssertionError("The replica was written to.")
""",
            REPLICA_URL=url,
        )
        dish.ask(f"from {SLUG}.routers import for_reading; for_reading(User.objects.all()).get()")
    finally:
        drop_database(replica)


@promise("Sign-up with allauth")
def test_visitors_sign_up_and_confirm_their_address_and_logins_are_limited(dish):
    dish.run("python manage.py migrate --noinput", **dish.production)
    output = dish.ask(
        GUARD
        + """
import re
from django.core import mail
new = {"username": "berta", "email": "berta@example.com", "password1": PASSWORD, "password2": PASSWORD}
assert client.post("/accounts/signup/", new).status_code == 302
(message,) = mail.outbox
path = re.search(r"https://[^/]+(/accounts/confirm-email/\\S+)", message.body)[1]
log = {"login": "berta", "password": PASSWORD}
assert make_client().post("/accounts/login/", log)["Location"] == "/accounts/confirm-email/"
assert client.get(path).status_code == 200
assert client.post(path).status_code == 302
page = make_client().post("/accounts/login/", log)
assert (page.status_code, page["Location"]) == (302, "/"), page
print("PATH", path)
def log_in(client, password):
    return client.post("/accounts/login/", {"login": "anna@example.com", "password": password}).status_code
from allauth.account.models import EmailAddress
EmailAddress.objects.create(user=anna, email=anna.email, verified=True, primary=True)
assert is_guarded(log_in, 302)
"""
    )
    path = next(line.split()[1] for line in output.splitlines() if line.startswith("PATH"))
    lines = [line for line in output.splitlines() if not line.startswith("PATH")]
    assert "/accounts/confirm-email/" in output
    assert path.split("/")[-2] not in "\n".join(lines)


@promise("Tokens with Simple JWT")
def test_tokens_open_the_api_end_with_the_password_and_are_limited(dish):
    dish.ask(
        GUARD
        + """
def post(client, password):
    return client.post("/api/jwt/", {"username": "anna", "password": password}, "application/json")
tokens = post(client, PASSWORD).json()
def read(path="/api/submissions/mine/"):
    return client.get(path, headers={"authorization": f"Bearer {tokens['access']}"}).status_code
assert client.get("/api/submissions/mine/").status_code == 401
assert read() == 200
def renew():
    return client.post("/api/jwt/refresh/", {"refresh": tokens["refresh"]}, "application/json")
assert renew().status_code == 200
assert is_guarded(lambda client, password: post(client, password).status_code, 200)
anna.set_password("another-long-password-2")
anna.save()
assert read() == 401
tokens = renew().json()
assert "access" not in tokens or read() == 401
schema = client.get("/api/schema/").content.decode()
assert "/api/jwt/refresh/" in schema
"""
    )


@promise("A front end on another origin")
def test_only_the_front_end_may_read_responses_of_the_api(dish):
    dish.ask(
        """
APP = f"https://app.{settings.DOMAIN}"
def preflight(path, origin):
    headers = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    return client.options(path, headers=headers).headers
allowed = preflight("/api/submissions/", APP)
assert allowed["access-control-allow-origin"] == APP, allowed
assert "authorization" in allowed["access-control-allow-headers"]
assert "access-control-allow-credentials" not in allowed
for path, origin in (("/api/submissions/", "https://evil.example"), ("/admin/login/", APP)):
    assert "access-control-allow-origin" not in preflight(path, origin), (path, origin)
# Errors too
for path in ("/api/submissions/", "/api/submissions/mine/", "/api/none/"):
    response = client.get(path, headers={"origin": APP})
    assert response["access-control-allow-origin"] == APP, (path, response.status_code)
"""
    )
