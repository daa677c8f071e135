"""License: the answer decides the LICENSE file and the project's metadata."""

import hashlib
import json
import tomllib

import pytest

from tests.conftest import ROOT
from tests.test_answers import HOSTILE

#: The text at https://www.apache.org/licenses/LICENSE-2.0.txt, appendix included.
APACHE_SHA256 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def spdx(project):
    return tomllib.loads((project / "pyproject.toml").read_text())["project"]["license"]


def test_proprietary_is_the_default_and_has_no_license_file(default_project):
    assert not (default_project / "LICENSE").exists()
    assert spdx(default_project) == "LicenseRef-Proprietary"


def test_mit(bake):
    project = bake(license="MIT", author_name="Ada Lovelace")
    title, _, copyright_line, *_ = (project / "LICENSE").read_text().splitlines()
    assert title == "MIT License"
    assert copyright_line == "Copyright (c) Ada Lovelace"
    assert spdx(project) == "MIT"


def test_mit_is_the_license_of_this_repository_but_for_the_copyright_line(bake):
    own = (ROOT / "LICENSE").read_text().splitlines()
    generated = (bake(license="MIT") / "LICENSE").read_text().splitlines()
    assert own[2] == "Copyright (c) 2026 cookiecutter-prodserver contributors"
    assert own[:2] + own[3:] == generated[:2] + generated[3:]


@pytest.mark.parametrize("text", HOSTILE)
def test_the_copyright_line_has_the_author_as_typed_on_one_line(bake, text):
    project = bake(license="MIT", author_name=text)
    line = (project / "LICENSE").read_text().split("\n")[2]
    assert line == f"Copyright (c) {' '.join(text.split())}"


def test_apache_is_the_official_text(bake):
    project = bake(license="Apache-2.0")
    assert hashlib.sha256((project / "LICENSE").read_bytes()).hexdigest() == APACHE_SHA256
    assert spdx(project) == "Apache-2.0"


def test_each_choice_has_a_label_and_a_row():
    context = json.loads((ROOT / "cookiecutter.json").read_text())
    choices = context["license"]
    assert list(context["_licenses"]) == choices
    assert list(context["__prompts__"]["license"]) == ["__prompt__", *choices]
