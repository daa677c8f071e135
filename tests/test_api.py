"""API: its OpenAPI schema is current, and Schemathesis tests the running service against it."""

import subprocess
import sys

import pytest

from tests.conftest import production_variables

pytestmark = pytest.mark.slow

#: Production settings without throttling, which would reject most requests.
FUZZ_SETTINGS = """
from fuzzed.settings import ProdSettings
from prodserver_ops.core import limits

limits.Limit.take = lambda limit, value: True

class FuzzSettings(ProdSettings):
    def REST_FRAMEWORK(self):
        return super().REST_FRAMEWORK() | {"DEFAULT_THROTTLE_CLASSES": []}

    SECURE_SSL_REDIRECT = False
    ALLOWED_HOSTS = ["127.0.0.1"]

__getattr__, __dir__ = FuzzSettings.use(default="fuzz", env="NO_MODE")
"""

CREATE_DATA = """
from django.utils import timezone
from prodserver_ops.api.tokens import create_token
user = User.objects.create_user("user", "user@example.com", "secret")
now = timezone.now()
for n in range(60):
    Submission.objects.create(author=user, body=f"{n}", approved_at=now if n % 2 else None)
print(create_token(user)[0])
"""

CHECKS = ",".join(
    [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
    ]
)


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ('  Zeta\'s\t  "Café" & co: #1 ', "Yes"),
        ("1.0", "Long: " + "words that go on " * 20 + "and \U0001f64f."),
        ("null", "Two lines,\nthe second: with 'quotes'.\n\nAnd \ttabs "),
        ("- x", " \n@ leading and trailing\n"),
    ],
)
def test_schema_of_a_new_service_is_current(bake, make_service, name, description):
    project = bake(project_name=name, project_slug="described", description=description)
    service = make_service(project)
    service.install()
    assert service.run("python manage.py openapi --check") == "openapi.yaml is up to date.\n"


@pytest.mark.parametrize("examples", [5, pytest.param(60, marks=pytest.mark.long)])
def test_responses_conform_to_the_openapi_schema(
    bake, make_service, postgres_url, rabbitmq_url, examples
):
    project = bake(project_slug="fuzzed")
    (project / "fuzz.py").write_text(FUZZ_SETTINGS)
    service = make_service(
        project,
        DJANGO_SETTINGS_MODULE="fuzz",
        **production_variables(postgres_url, rabbitmq_url),
    )
    service.install("--no-dev")
    service.run(service.procfile()["release"])
    token = service.shell(CREATE_DATA).split()[-1]
    web = service.start("web")
    web.wait_for_text("Listening at")

    schema_url = f"http://127.0.0.1:{service.port}/api/schema/"
    authenticated = ["--header", f"Authorization: Token {token}", "--exclude-method", "DELETE"]
    for options in ([], authenticated):
        done = subprocess.run(
            [
                sys.executable,
                *("-m", "schemathesis.cli", "run", schema_url),
                *("--checks", CHECKS, "--max-examples", str(examples), "--seed", "1", "--no-color"),
                *("--generation-deterministic", "--suppress-health-check", "all"),
                *options,
            ],
            cwd=project.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        assert "/api/submissions/mine/" in web.text()
    assert '"status": 500' not in web.text()
    assert '"POST /api/submissions/ 201 ' in web.text()
