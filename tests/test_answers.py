"""Answers: invalid ones stop the run with one line, and valid ones are kept as typed."""

import datetime
import json
import runpy
import subprocess
import sys
import tomllib

import pytest
from markdown_it import MarkdownIt

from local_extensions import (
    RESERVED_NAMES,
    SLUG_LENGTH,
    find_problem,
    package_name,
    python_string,
)
from tests.conftest import ROOT
from tests.generate import get_template, replace

INVALID_ANSWERS = [
    ("project_name", "", "must not be blank"),
    ("project_name", " \n", "must not be blank"),
    ("project_name", "x" * 101, "must have at most 100 characters (it has 101)"),
    ("project_name", "bell\a", "must not contain control characters"),
    ("author_name", "Ann\u202e", "must not contain control characters"),
    ("description", "\u2066a\u2069", "must not contain control characters"),
    ("schedules", "[" * 100_000, "has too many levels"),
    ("description", "x" * 501, "must have at most 500 characters (it has 501)"),
    ("author_name", "", "must not be blank"),
    ("project_slug", "", "must not be blank"),
    ("project_slug", "x" * (SLUG_LENGTH + 1), "must have at most 30 characters (it has 31)"),
    ("project_slug", "prayer-room", "is not a valid package name"),
    ("project_slug", "2fast", "is not a valid package name"),
    ("project_slug", "Prayer", "is not a valid package name"),
    ("project_slug", "prayer room", "is not a valid package name"),
    ("project_slug", "prayer.room", "is not a valid package name"),
    ("project_slug", "../prayer", "is not a valid package name"),
    ("project_slug", "räume", "is not a valid package name"),
    ("project_slug", "_private", "is not a valid package name"),
    ("project_slug", "a__b", "is not a valid package name"),
    ("project_slug", "class", "is a Python keyword"),
    ("project_slug", "site", "is a module of Python's standard library"),
    ("project_slug", "json", "is a module of Python's standard library"),
    ("project_slug", "test", "is a package or app that the service uses"),
    ("project_slug", "django", "is a package or app that the service uses"),
    ("project_slug", "celery", "is a package or app that the service uses"),
    ("project_slug", "admin", "is a package or app that the service uses"),
    ("timezone", "Europe/Atlantis", "is not an IANA time zone"),
    ("timezone", "", "is not an IANA time zone"),
    ("domain_name", "https://example.com", "is not a valid domain name"),
    ("domain_name", "example.com:8000", "is not a valid domain name"),
    ("domain_name", "localhost", "is not a valid domain name"),
    ("domain_name", "127.0.0.1", "is not a valid domain name"),
    ("domain_name", "-x.example.com", "is not a valid domain name"),
    ("domain_name", "bücher.example", "is not a valid domain name"),
    ("domain_name", "", "is not a valid domain name"),
    ("author_email", "you", "is not a valid email address"),
    ("author_email", "you@localhost", "is not a valid email address"),
    ("author_email", "a b@example.com", "is not a valid email address"),
    ("author_email", "a@b@example.com", "is not a valid email address"),
    ("author_email", 'x"@example.com', "is not a valid email address"),
]


@pytest.mark.parametrize(("field", "value", "reason"), INVALID_ANSWERS)
def test_invalid_answer_error_names_field_value_and_reason(cookies, field, value, reason):
    result = cookies.bake(
        extra_context={field: value, "setup": False}, template=str(get_template())
    )
    message = str(result.exception)
    assert result.exit_code != 0
    assert message.startswith(f"{field}: ")
    assert json.dumps(value, ensure_ascii=False)[:70].rstrip('"') in message
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize("hooks", ["yes", "no"])
def test_invalid_answer_prints_one_line_and_creates_no_files(run_cookiecutter, hooks):
    folder, done = run_cookiecutter("--no-input", "--accept-hooks", hooks, "project_slug=site")
    assert done.returncode == 1
    assert done.stdout == (
        'project_slug: "site" is a module of Python\'s standard library; choose another name\n'
    )
    assert list(folder.iterdir()) == []


def test_invalid_answer_at_a_prompt_is_asked_again(run_cookiecutter):
    rest = "\n" * 7
    answers = f"My service\nclass\nsite\nmy_service\nWhat it does\n{rest}no\n\n"
    folder, done = run_cookiecutter(stdin=answers)
    assert done.returncode == 0, done.stdout
    assert 'project_slug: "class" is a Python keyword; choose another name' in done.stdout
    assert 'project_slug: "site" is a module of Python' in done.stdout
    project = tomllib.loads((folder / "my_service" / "pyproject.toml").read_text())["project"]
    assert project["description"] == "What it does"


def test_other_choices_are_asked_only_if_they_are_wanted(run_cookiecutter):
    answers = ["One", *[""] * 9, "n", "y", "2", "2", *[""] * 6, "y", "", ""]
    folder, done = run_cookiecutter(stdin="\n".join(answers) + "\n")
    assert done.returncode == 0, done.stdout
    assert (folder / "one" / "LICENSE").read_text().startswith("MIT License")
    assert (folder / "one" / "compose.yaml").exists()
    folder, done = run_cookiecutter("license=MIT", stdin="\n".join([*answers[:11], "n"]) + "\n")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("[12/23]") == 1
    assert "[13/23]" not in done.stdout
    assert (folder / "one" / "LICENSE").exists()
    assert not (folder / "one" / "compose.yaml").exists()


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            ["realtime=channels"],
            'realtime: "channels" cannot be combined with web_server=gunicorn: Channels needs an'
            " ASGI server, and gunicorn is a WSGI server; choose web_server=uvicorn",
        ),
        (
            ["lifecycle=archive", "example=none"],
            'lifecycle: "archive" cannot be combined with example=none: without the example there'
            " are no submissions to archive; choose lifecycle=none",
        ),
    ],
)
def test_unsupported_combination_is_refused_with_the_nearest_supported_one(
    run_cookiecutter, answers, message
):
    folder, done = run_cookiecutter("--no-input", "setup=no", *answers)
    assert (done.returncode, done.stdout) == (1, f"{message}\n")
    assert list(folder.iterdir()) == []


def test_unsupported_combination_at_a_prompt_is_asked_again(run_cookiecutter):
    # The 18th question is the one about WebSockets.
    answers = [*[""] * 10, "n", "y", *[""] * 5, "2", "1", *[""] * 5]
    folder, done = run_cookiecutter(stdin="\n".join(answers) + "\n")
    assert done.returncode == 0, done.stdout
    assert "choose web_server=uvicorn" in done.stdout
    assert not (folder / "prayer_room_api" / "prayer_room_api" / "consumers.py").exists()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("django_version=4.2", 'django_version: "4.2" must be one of: 6.0, 5.2'),
        ("deploy=heroku", 'deploy: "heroku" must be one of: buildpack, dockerfile'),
        ("compose=maybe", 'compose: "maybe" must be one of: yes, no'),
        ("projekt=x", "projekt: unknown question; the questions are project_name, project_slug,"),
    ],
)
def test_answer_that_is_none_of_the_choices_prints_one_line(run_cookiecutter, answer, message):
    folder, done = run_cookiecutter("--no-input", answer)
    assert done.returncode == 1
    first, *others = done.stdout.splitlines()
    assert first.startswith(message)
    assert others == ["Pre-Prompt Hook script failed"] * ("projekt" not in answer)
    assert list(folder.iterdir()) == []


def test_command_on_a_machine_without_proc(run_cookiecutter, template_copy):
    """macOS and BSD do not tell a process which arguments its parent has."""
    replace(template_copy / "hooks" / "pre_prompt.py", "/proc/", "/nowhere/")
    environment = {"TEMPLATE": str(template_copy), "PATH": ""}  # Without ps, too.
    description = "description=Answers where status=open"
    folder, done = run_cookiecutter("--no-input", "setup=no", description, environment=environment)
    assert done.returncode == 0, done.stdout
    assert "status=open" in (folder / "prayer_room_api" / "pyproject.toml").read_text()
    folder, done = run_cookiecutter("--no-input", "projekt=x", environment=environment)
    assert done.returncode == 1
    assert done.stdout.startswith("projekt: unknown question; the questions are project_name,")
    assert list(folder.iterdir()) == []


def test_value_of_a_users_configuration_that_is_no_choice_prints_one_line(
    run_cookiecutter, tmp_path
):
    """Cookiecutter would drop all answers behind it."""
    config = tmp_path / "config.yaml"
    config.write_text(
        "default_context:\n  github_user: anna\n  license: BSD-3-Clause\n  author_name: Anna\n"
    )
    options = ["--no-input", "setup=no", "--config-file", str(config)]
    folder, done = run_cookiecutter(*options)
    assert done.returncode == 1
    expected = (
        f'license: "BSD-3-Clause" in {config} must be one of: proprietary, MIT, Apache-2.0;'
        " --default-config ignores that file"
    )
    assert done.stdout.splitlines()[-1] == expected
    assert list(folder.iterdir()) == []
    # Names of other templates and valid values are no problem.
    config.write_text(config.read_text().replace("BSD-3-Clause", "MIT"))
    folder, done = run_cookiecutter(*options)
    assert done.returncode == 0, done.stdout
    assert "Anna" in (folder / "prayer_room_api" / "pyproject.toml").read_text()
    assert (folder / "prayer_room_api" / "LICENSE").exists()


@pytest.mark.parametrize(
    ("question", "value", "expected"),
    [
        (False, "maybe", "must be one of: yes, no"),
        (False, True, None),
        (True, " No", None),
        (["6.0", "5.2"], 5.2, "must be text, in quotes"),
        (["6.0", "5.2"], "4", "must be one of: 6.0, 5.2"),
        (["6.0", "5.2"], "5.2", None),
        ({}, {"a": 1}, None),
        ("", datetime.date(2027, 1, 1), "must be text, in quotes"),
    ],
)
def test_problem_of_a_value_in_a_users_configuration(question, value, expected):
    assert find_problem(question, value) == expected


def test_service_in_the_clone_of_the_template_is_told_to_leave(run_cookiecutter, template_copy):
    """Cookiecutter copies the whole clone, with the environment of that service, for the next one."""
    options = ["--no-input", "setup=no", "--output-dir", str(template_copy)]
    _, done = run_cookiecutter(*options, environment={"TEMPLATE": str(template_copy)})
    assert done.returncode == 0
    assert "use --output-dir .. from now on" in done.stdout
    _, done = run_cookiecutter(
        "--no-input", "setup=no", environment={"TEMPLATE": str(template_copy)}
    )
    assert done.returncode == 0
    assert "--output-dir" not in done.stdout


def test_windows_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(SystemExit, match=r"^Windows is supported through WSL: \S+$"):
        runpy.run_path(str(ROOT / "hooks" / "pre_prompt.py"), run_name="__main__")


def test_name_of_an_existing_folder_says_how_to_start_what_is_there(run_cookiecutter):
    folder, _ = run_cookiecutter("--no-input", "setup=no")
    before = sorted(folder.rglob("*"))
    options = ["--no-input", "setup=no", "--output-dir", str(folder)]
    _, done = run_cookiecutter(*options, environment={"UV": ""})
    assert done.returncode == 1
    assert done.stdout == (
        f'project_slug: "prayer_room_api" exists already: start it with cd {folder}/prayer_room_api'
        " && uv sync && uv run manage.py migrate && uv run honcho start -f Procfile.dev, or choose "
        "another name\n"
    )
    assert sorted(folder.rglob("*")) == before


def test_old_cookiecutter_is_refused(tmp_path, monkeypatch):
    hook = runpy.run_path(str(ROOT / "hooks" / "pre_prompt.py"))
    find_error = hook["find_error"]
    assert find_error({}, []) is None
    monkeypatch.setattr("cookiecutter.__version__", "2.6.0")
    assert find_error({}, []) == (
        "This template needs cookiecutter 2.7 or later, but this is 2.6.0:"
        " python3 -m pip install -U cookiecutter"
    )


@pytest.fixture
def replay(run_cookiecutter, tmp_path):
    """A function that changes recorded answers and replays them."""

    def replay(template=None, **changes):
        environment = {"HOME": str(tmp_path)}
        _, done = run_cookiecutter("--no-input", "setup=no", environment=environment)
        assert done.returncode == 0
        (path,) = tmp_path.glob(".cookiecutter_replay/*.json")
        recorded = json.loads(path.read_text())
        answers = recorded["cookiecutter"] | changes
        recorded["cookiecutter"] = {k: v for k, v in answers.items() if v is not None}
        file = tmp_path / "replay.json"
        file.write_text(json.dumps(recorded))
        environment = {"TEMPLATE": str(template)} if template else {}
        return run_cookiecutter("--replay-file", str(file), environment=environment)

    return replay


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"timezone": "Europe/Atlantis"}, 'timezone: "Europe/Atlantis" is not an IANA time zone'),
        ({"example": "gone"}, "gone provided for choice variable example, but the choices are"),
    ],
    ids=str,
)
def test_invalid_answer_in_a_replay_file_prints_one_line(replay, answer, message):
    folder, done = replay(**answer)
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert line.startswith(message)
    assert list(folder.iterdir()) == []


def test_replay_takes_tables_of_this_template_and_defaults_for_new_questions(replay, template_copy):
    file = template_copy / "cookiecutter.json"
    questions = json.loads(file.read_text())
    django = questions["_django_versions"]["6.0"]
    django["requirements"] = ["django>=6.0.99,<6.1"]
    django["csp_middleware"] = "other.Middleware"
    questions = {"city": "Berlin", "__check_city": "{{ cookiecutter.city | upper }}"} | questions
    file.write_text(json.dumps(questions))
    readme = template_copy / "{{cookiecutter.project_slug}}" / "README.md"
    readme.write_text("{{ cookiecutter.city }} {{ cookiecutter.__check_city }}")
    # The recorded answers are older than the question about the license, too.
    folder, done = replay(template_copy, license=None, timezone="Europe/Berlin")
    assert done.returncode == 0, done.stdout
    project = folder / "prayer_room_api"
    assert (project / "README.md").read_text() == "Berlin BERLIN"
    pyproject = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    assert "django>=6.0.99,<6.1" in pyproject["dependencies"]
    assert pyproject["license"] == "LicenseRef-Proprietary"
    settings = (project / "prayer_room_api" / "settings.py").read_text()
    assert '"other.Middleware",' in settings
    assert 'TIME_ZONE = "Europe/Berlin"' in settings


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
def test_default_slug_is_derived_from_the_project_name(name, slug):
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
def test_free_text_is_preserved_in_the_output(bake, text):
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
    """Return the rendered text of a Markdown token. Fail if it contains markup."""
    kinds = {"text": None, "text_special": None, "softbreak": "\n"}
    return "".join(kinds[token.type] or token.content for token in inline.children)


@pytest.mark.parametrize("text", HOSTILE)
def test_python_string_matches_ruff_format(text):
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


def test_answer_at_a_prompt_is_not_rendered_as_a_template(run_cookiecutter):
    """Cookiecutter does render the values that it gets on the command line."""
    answers = ["My service", "", "What {{ 7*7 }} is", *[""] * 7, "n", ""]
    folder, done = run_cookiecutter(stdin="\n".join(answers) + "\n")
    assert done.returncode == 0, done.stdout
    project = tomllib.loads((folder / "my_service" / "pyproject.toml").read_text())["project"]
    assert project["description"] == "What {{ 7*7 }} is"


@pytest.mark.slow
def test_installed_module_names_are_reserved(bake, make_service):
    service = make_service(bake())
    service.install()
    modules = service.run(
        "python -c 'import importlib.metadata as m; print(*m.packages_distributions())'"
    ).split()
    installed = {name for name in modules if name.isidentifier() and name.islower()}
    public = {name for name in installed if not name.startswith("_")}
    assert public - RESERVED_NAMES - set(sys.stdlib_module_names) == set()
    assert len(public) > 30
