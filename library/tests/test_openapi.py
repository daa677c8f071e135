"""The OpenAPI schema: a file that describes the current API."""

import sys

import pytest
from django.conf import settings
from django.core.management import CommandError, call_command
from django.urls import reverse
from django.utils import translation

from prodserver_ops.api.openapi import generate_schema
from prodserver_ops.console.checks import check_schema


@pytest.fixture
def folder(settings, tmp_path):
    """An empty folder in place of the project's."""
    settings.BASE_DIR = tmp_path
    return tmp_path


def test_openapi_yaml_is_current():
    # The file is in English, whatever the language of this run is.
    with translation.override("en"):
        call_command("openapi", "--check")


def test_openapi_yaml_is_written(folder, capsys):
    call_command("openapi")
    assert (folder / "openapi.yaml").read_text(encoding="utf-8") == generate_schema()
    call_command("openapi", "--check")
    assert capsys.readouterr().out == "openapi.yaml was written.\nopenapi.yaml is up to date.\n"


@pytest.mark.parametrize("text", [None, "openapi: 3.0.3\n"])
def test_a_check_writes_nothing_and_names_the_command(folder, text):
    if text:
        (folder / "openapi.yaml").write_text(text)
    with pytest.raises(CommandError, match=r"^openapi\.yaml is outdated; .* manage\.py openapi$"):
        call_command("openapi", "--check")
    assert [path.read_text() for path in folder.iterdir()] == ([text] if text else [])


def test_a_folder_that_cannot_be_written_is_named(folder):
    (folder / "openapi.yaml").mkdir()
    with pytest.raises(CommandError, match=r"openapi\.yaml cannot be written: Is a directory$"):
        call_command("openapi")


def test_production_has_no_generator(monkeypatch):
    monkeypatch.setitem(sys.modules, f"{generate_schema.__module__}", None)
    with pytest.raises(CommandError, match=r"; install the packages for development: uv sync$"):
        call_command("openapi")


def test_a_deploy_without_the_file_is_refused(folder):
    (error,) = check_schema(None)
    assert (error.id, error.msg) == ("openapi.E001", "openapi.yaml is missing.")
    (folder / "openapi.yaml").touch()
    assert check_schema(None) == []


def test_the_service_serves_the_file(client):
    response = client.get(reverse("schema"))
    assert response["Content-Type"] == "application/vnd.oai.openapi; charset=utf-8"
    assert response.text == (settings.BASE_DIR / "openapi.yaml").read_text(encoding="utf-8")


def test_development_serves_the_schema_of_the_code(client, folder, settings):
    settings.DEBUG = True
    assert client.get(reverse("schema")).text == generate_schema()
