"""The API: schemathesis, against the live service, finds no crash and nothing off the schema."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

#: Production without the throttles, which would answer most of the requests.
SETTINGS = """
from fuzzed.settings import ProdSettings

class FuzzSettings(ProdSettings):
    REST_FRAMEWORK = ProdSettings.REST_FRAMEWORK | {"DEFAULT_THROTTLE_CLASSES": []}
    SECURE_SSL_REDIRECT = False
    ALLOWED_HOSTS = ["127.0.0.1"]

__getattr__, __dir__ = FuzzSettings.use(default="fuzz", env="NO_MODE")
"""

FILL = """
from django.utils import timezone
from rest_framework.authtoken.models import Token
user = User.objects.create_user("user", "user@example.com", "secret")
now = timezone.now()
for n in range(60):
    Submission.objects.create(author=user, body=f"{n}", approved_at=now if n % 2 else None)
print(Token.objects.create(user=user))
"""


def test_schemathesis(bake, make_service, postgres_url, rabbitmq_url):
    project = bake(project_slug="fuzzed")
    (project / "fuzz.py").write_text(SETTINGS)
    service = make_service(
        project,
        DJANGO_MODE="prod",
        DJANGO_SETTINGS_MODULE="fuzz",
        SECRET_KEY="a-key-for-this-test-alone-of-more-than-fifty-characters",
        DATABASE_URL=postgres_url,
        RABBITMQ_URL=rabbitmq_url,
    )
    service.install("--no-dev")
    service.run(service.procfile()["release"])
    token = service.shell(FILL).split()[-1]
    web = service.start("web")
    web.wait_for_text("Listening at")

    address = f"http://127.0.0.1:{service.port}/api/schema/"
    for headers in ([], ["--header", f"Authorization: Token {token}"]):
        done = subprocess.run(
            [
                sys.executable,
                *("-m", "schemathesis.cli", "run", address),
                *("--checks", CHECKS, "--max-examples", "60", "--seed", "1", "--no-color"),
                *("--generation-deterministic", "--suppress-health-check", "all"),
                *headers,
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


CHECKS = ",".join(
    [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
    ]
)
