"""Answers: a bad one ends in one line and leaves nothing; a good one is taken as typed."""

import json
import subprocess
import sys
import tomllib

import pytest
from markdown_it import MarkdownIt

from local_extensions import (
    RESERVED_NAMES,
    SLUG_LENGTH,
    package_name,
    python_string,
)
from tests.conftest import ROOT

BAD = [
    ("project_name", "", "is empty"),
    ("project_name", " \n", "is empty"),
    ("project_name", "x" * 101, "is too long: 101 characters, and 100 are allowed"),
    ("project_name", "bell\a", "holds a control character"),
    ("description", "x" * 501, "is too long: 501 characters, and 500 are allowed"),
    ("author_name", "", "is empty"),
    ("project_slug", "", "is empty"),
    ("project_slug", "x" * (SLUG_LENGTH + 1), "is too long"),
    ("project_slug", "prayer-room", "is no package name"),
    ("project_slug", "2fast", "is no package name"),
    ("project_slug", "Prayer", "is no package name"),
    ("project_slug", "prayer room", "is no package name"),
    ("project_slug", "prayer.room", "is no package name"),
    ("project_slug", "../prayer", "is no package name"),
    ("project_slug", "räume", "is no package name"),
    ("project_slug", "_private", "is no package name"),
    ("project_slug", "a__b", "is no package name"),
    ("project_slug", "class", "is a Python keyword"),
    ("project_slug", "site", "is a module of Python's standard library"),
    ("project_slug", "json", "is a module of Python's standard library"),
    ("project_slug", "test", "is a package or app that the service itself uses"),
    ("project_slug", "django", "is a package or app that the service itself uses"),
    ("project_slug", "celery", "is a package or app that the service itself uses"),
    ("project_slug", "admin", "is a package or app that the service itself uses"),
    ("timezone", "Europe/Atlantis", "is no IANA time zone"),
    ("timezone", "", "is no IANA time zone"),
    ("domain_name", "https://example.com", "is no domain"),
    ("domain_name", "example.com:8000", "is no domain"),
    ("domain_name", "localhost", "is no domain"),
    ("domain_name", "127.0.0.1", "is no domain"),
    ("domain_name", "-x.example.com", "is no domain"),
    ("domain_name", "bücher.example", "is no domain"),
    ("domain_name", "", "is no domain"),
    ("author_email", "you", "is no e-mail address"),
    ("author_email", "you@localhost", "is no e-mail address"),
    ("author_email", "a b@example.com", "is no e-mail address"),
    ("author_email", "a@b@example.com", "is no e-mail address"),
    ("author_email", 'x"@example.com', "is no e-mail address"),
]


@pytest.mark.parametrize(("field", "value", "rule"), BAD)
def test_a_bad_answer_names_the_field_the_value_and_the_rule(cookies, field, value, rule):
    result = cookies.bake(extra_context={field: value, "setup": False}, template=str(ROOT))
    message = str(result.exception)
    assert result.exit_code != 0
    assert message.startswith(f"{field}: ")
    assert json.dumps(value, ensure_ascii=False)[:70].rstrip('"') in message
    assert rule in message
    assert "\n" not in message


@pytest.mark.parametrize("hooks", ["yes", "no"])
def test_a_bad_answer_ends_in_one_line_and_leaves_nothing(run_cookiecutter, hooks):
    folder, done = run_cookiecutter("--no-input", "--accept-hooks", hooks, "project_slug=site")
    assert done.returncode == 1
    assert done.stdout == (
        'project_slug: "site" is a module of Python\'s standard library; choose another name\n'
    )
    assert list(folder.iterdir()) == []


def test_a_bad_answer_at_a_prompt_ends_at_once(run_cookiecutter):
    folder, done = run_cookiecutter(stdin="My service\nclass\n")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].endswith(
        'project_slug: "class" is a Python keyword; choose another name'
    )
    assert list(folder.iterdir()) == []


def test_a_bad_answer_in_a_replay_file_leaves_nothing(run_cookiecutter, tmp_path):
    folder, done = run_cookiecutter("--no-input", "setup=no", environment={"HOME": str(tmp_path)})
    assert done.returncode == 0
    (replay,) = tmp_path.glob(".cookiecutter_replay/*.json")
    answers = json.loads(replay.read_text())
    answers["cookiecutter"]["timezone"] = "Europe/Atlantis"
    (tmp_path / "replay.json").write_text(json.dumps(answers))
    folder, done = run_cookiecutter("--replay-file", str(tmp_path / "replay.json"))
    assert done.returncode == 1
    assert 'timezone: "Europe/Atlantis" is no IANA time zone' in done.stdout.splitlines()[-1]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("Prayer Room API", "prayer_room_api"),
        ('Ångström & Söhne\'s "Räume"', "angstrom_sohnes_raume"),
        ("祈祷室", "qi_dao_shi"),
        ("Молитва", "molitva"),
        ("24-7 Prayer", "app_24_7_prayer"),
        ("  lots -- of___space  ", "lots_of_space"),
        ("O\u2019Brien's", "obriens"),
        ("The quite unreasonably long name of a service", "the_quite_unreasonably_long"),
        ("Site", "site_service"),
        ("🙏", ""),
    ],
)
def test_a_name_gives_a_sensible_slug(name, slug):
    assert package_name(name) == slug


HOSTILE = [
    'Ångström & Söhne\'s "Räume"',
    "back\\slash \\n and trailing \\",
    "quotes ' \" \"\"\" ''' `",
    "braces {x} {0} }} { %} $HOME ${x} %s %(y)s",
    "line one\nline two",
    "# not a heading\n- no list\n1. no list\n> no quote\n    no code",
    "<script>alert(1)</script> &amp; *no* _no_ [no](no) ![no](no) | no | ~~no~~ https://no.example",
    "🙏🏽 👩‍👩‍👧 祈祷 молитва تسبيح",
    "tab\tand no-break\u00a0space \u2028 \ufeff",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_free_text_comes_out_as_it_was_typed(bake, text):
    project = bake(project_name=text, project_slug="service", description=text, author_name=text)
    metadata = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    assert metadata["description"] == text
    assert metadata["authors"][0]["name"] == text

    settings = (project / "service" / "settings.py").read_text()
    (line,) = [line for line in settings.splitlines() if "SITE_NAME = " in line]
    assert eval(line.partition(" = ")[2]) == " ".join(text.split())

    readme = MarkdownIt("commonmark").parse((project / "README.md").read_text())
    heading, paragraph = (token for token in readme[:6] if token.type == "inline")
    assert plain(heading) == " ".join(text.split())
    assert plain(paragraph).split() == text.split()


def plain(inline):
    """Return the text that a reader of the rendered Markdown sees; fail where there is mark-up."""
    kinds = {"text": None, "text_special": None, "softbreak": "\n"}
    return "".join(kinds[token.type] or token.content for token in inline.children)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_python_string_needs_no_reformatting(text):
    line = f"x = {python_string(text)}\n"
    formatted = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length=320", "-"],
        input=line,
        capture_output=True,
        text=True,
        check=True,
    )
    assert formatted.stdout == line
    assert eval(python_string(text)) == text


def test_a_typed_brace_pair_is_no_template(run_cookiecutter):
    """At a prompt; on the command line cookiecutter renders what it is given."""
    answers = ["My service", "", "What {{ 7*7 }} is", "", "", "", "", "", "", "", "n"]
    folder, done = run_cookiecutter(stdin="\n".join(answers) + "\n")
    assert done.returncode == 0, done.stdout
    project = tomllib.loads((folder / "my_service" / "pyproject.toml").read_text())["project"]
    assert project["description"] == "What {{ 7*7 }} is"


@pytest.mark.slow
def test_every_module_that_a_service_installs_is_a_reserved_name(bake, make_service):
    service = make_service(bake())
    service.install()
    modules = service.run(
        "python -c 'import importlib.metadata as m; print(*m.packages_distributions())'"
    ).split()
    installed = {name for name in modules if name.isidentifier() and name.islower()}
    public = {name for name in installed if not name.startswith("_")}
    assert public - RESERVED_NAMES - set(sys.stdlib_module_names) == set()
    assert len(public) > 30
