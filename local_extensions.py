"""The template's Jinja filters, which validate answers and escape free text.

``cookiecutter.json`` applies the ``check`` filter in a private variable after each
field. At a prompt an invalid answer is asked again; otherwise the filter raises
``FailedHookException`` with a one-line message, which cookiecutter prints before it
exits with status 1, and no file is written.

Cookiecutter does not tell an extension whether it asks questions, replays answers or renders
for cruft. The extension finds this out from the call stack; see docs/decisions.md.
"""

import contextlib
import json
import keyword
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zoneinfo
from pathlib import Path

with contextlib.suppress(ImportError):
    import readline  # noqa: F401 makes the arrow keys edit an answer

import yaml as pyyaml
from cookiecutter import prompt
from cookiecutter.exceptions import FailedHookException
from cookiecutter.generate import generate_context
from jinja2 import pass_context
from jinja2.ext import Extension
from slugify import slugify

import local_schedules

ROOT = Path(__file__).resolve().parent

#: Where the command was started. Cookiecutter changes the folder before it renders files.
START = Path.cwd()

#: The files that may contain the questions.
QUESTIONS = "questions.json", "cookiecutter.json"

#: The branch of the weekly pull request of a service.
UPGRADE_BRANCH = "upgrade-template"

#: Maximum length of a package name, which is part of table, host and queue names.
SLUG_LENGTH = 30

#: Names of modules, scripts and app labels that a generated service uses, except those of the
#: standard library. ``tests/test_answers.py`` compares them with the installed packages.
RESERVED_NAMES = frozenset(
    """
    admin auth contenttypes messages sessions staticfiles
    docs manage ops prodserver_ops test tests var vendor
    amqp annotated_types anyio asgiref ast_serialize attr attrs billiard cbs celery certifi
    channels channels_redis click click_didyoumean click_plugins click_repl colorama
    cron_descriptor cronlog crontab crontabs csp dateutil django django_celery_beat
    django_celery_results django_prodserver django_stubs_ext dotenv drf_spectacular
    drf_spectacular_sidecar flower granian gunicorn h11 honcho humanize idna inflection iniconfig
    jsonschema jsonschema_specifications kombu librt msgpack mypy mypy_django_plugin
    mypy_drf_plugin mypy_extensions mypyc packaging pathspec pip pkg_resources pluggy
    prometheus_client prompt_toolkit psycopg psycopg_binary py pygments pytest pytest_django
    pytest_env python_discovery pythonjsonlogger pytz redis referencing rest_framework rpds ruff
    sentry_sdk setuptools six sqlparse time_machine timezone_field tornado typing_extensions
    tzdata tzlocal uritemplate urllib3 uvicorn vine watchfiles wcwidth websockets wheel whitenoise
    yaml
    """.split()
)


def reject(field, value, reason):
    """Stop the generation with one line that names the field, the value and the reason."""
    quoted_value = json.dumps(value, ensure_ascii=False, default=str)
    if len(quoted_value) > 80:
        quoted_value = f'{quoted_value[:76]}..."'
    raise FailedHookException(f"{field}: {quoted_value} {reason}")


def name_conflict(name):
    """Return a description of what uses the name already, or None if it is available."""
    if keyword.iskeyword(name):
        return "a Python keyword"
    if name in sys.stdlib_module_names:
        return "a module of Python's standard library"
    if name in RESERVED_NAMES:
        return "a package or app that the service uses"
    return None


def package_name(text):
    """Convert a project name to a package name: ``Söhne's Räume`` to ``sohnes_raume``."""
    name = slugify(
        re.sub("['`\u2019]", "", text),
        separator="_",
        max_length=SLUG_LENGTH,
        word_boundary=True,
        save_order=True,
    )
    if name[:1].isdigit():
        return f"app_{name}"[:SLUG_LENGTH].rstrip("_")
    return f"{name}_service" if name_conflict(name) else name


def check_length(field, text, max_length):
    """Reject text that is longer than ``max_length``."""
    if len(text) > max_length:
        reject(field, text, f"must have at most {max_length} characters (it has {len(text)})")


def text_check(max_length):
    """Return a check that rejects blank text, long text and control characters."""

    def check_text(field, text):
        if not text.strip():
            reject(field, text, "must not be blank")
        check_length(field, text, max_length)
        if local_schedules.CONTROL.search(text):
            reject(field, text, "must not contain control characters")

    return check_text


def check_slug(field, slug):
    """Reject a name that is not a valid, available package name."""
    if not slug:
        reject(field, slug, "must not be blank; use a name such as prayer_room_api")
    check_length(field, slug, SLUG_LENGTH)
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", slug):
        reject(
            field,
            slug,
            "is not a valid package name: use lowercase letters a-z, digits and single"
            " underscores, and start with a letter",
        )
    if conflict := name_conflict(slug):
        reject(field, slug, f"is {conflict}; choose another name")


def is_domain(text):
    """Return whether the text is a fully qualified ASCII domain name (RFC 1035, RFC 1123)."""
    label = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
    return len(text) <= 253 and bool(
        re.fullmatch(rf"({label}\.)+(?!\d+$){label}", text, re.IGNORECASE)
    )


def check_domain(field, domain):
    """Reject anything but a domain name, for example a URL, an IP address or a host name."""
    if not is_domain(domain):
        reject(
            field,
            domain,
            "is not a valid domain name: use a name such as api.example.com, without https://"
            " or a port (an internationalized name in its xn-- form)",
        )


def check_email(field, address):
    """Reject anything but an email address: local part (RFC 5322 dot-atom), @ and domain."""
    local, _, domain = address.rpartition("@")
    atom = r"[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]+"
    if not re.fullmatch(rf"{atom}(\.{atom})*", local) or not is_domain(domain):
        reject(field, address, "is not a valid email address: use a form such as you@example.com")


def check_timezone(field, name):
    """Reject a name that is not in the IANA time zone database, if there is one."""
    available = zoneinfo.available_timezones()
    if available and name not in available:
        reject(field, name, "is not an IANA time zone: use a name such as Europe/London or UTC")


CHECKS = {
    "project_name": text_check(100),
    "project_slug": check_slug,
    "description": text_check(500),
    "author_name": text_check(100),
    "author_email": check_email,
    "domain_name": check_domain,
    "timezone": check_timezone,
}


def check_folder(slug):
    """Reject the name of an existing folder, which may be the service."""
    main = find_caller("cookiecutter.main", "cookiecutter")
    if not main or main["overwrite_if_exists"] or main["skip_if_file_exists"]:
        return
    folder = Path(main["output_dir"]) / slug
    # uvx sets UV to its own path, which may not be on the PATH.
    uv = shlex.quote("uv" if shutil.which("uv") else os.environ.get("UV") or "uv")
    if folder.exists():
        reject(
            "project_slug",
            slug,
            f"exists already: start it with cd {shlex.quote(str(folder))} && {uv} sync &&"
            f" {uv} run manage.py migrate && {uv} run honcho start -f Procfile.dev,"
            " or choose another name",
        )


@pass_context
def check(context, answer, field):
    """Ask again while the answer at a prompt is invalid; reject any other invalid answer.

    Renders an empty string.
    """
    answers = context["cookiecutter"]
    caller = find_caller("cookiecutter.prompt", "prompt_for_config")
    while True:
        try:
            CHECKS[field](field, answers[field])
            if field == "project_slug":
                check_folder(answers[field])
        except FailedHookException as error:
            if caller is None or caller["no_input"]:
                raise
            print(f"  {error}")
            default = prompt.render_variable(
                caller["env"], caller["context"]["cookiecutter"][field], answers
            )
            answers[field] = prompt.read_user_variable(field, default, caller["prompts"], "  ")
        else:
            return ""


@pass_context
def supported(context, answer, field):
    """Ask again while an answer cannot be combined with an earlier one; otherwise reject it.

    The table ``_unsupported`` contains these combinations. Renders an empty string.
    """
    answers = context["cookiecutter"]
    caller = find_caller("cookiecutter.prompt", "prompt_for_config")
    while row := find_unsupported(answers, field):
        other = next(name for name in row["answers"] if name != field)
        instead = " ".join(f"{name}={value}" for name, value in row["instead"].items())
        try:
            reject(
                field,
                answers[field],
                f"cannot be combined with {other}={answers[other]}: {row['reason']};"
                f" choose {instead}",
            )
        except FailedHookException as error:
            if caller is None or caller["no_input"]:
                raise
            print(f"  {error}")
        options = caller["context"]["cookiecutter"][field]
        answers[field] = prompt.read_user_choice(field, options, caller["prompts"], "  ")
    return ""


def find_unsupported(answers, field):
    """Return the row of the unsupported combination that an answer is part of, or None."""
    for row in answers["_unsupported"]:
        if field in row["answers"] and row["answers"].items() <= answers.items():
            return row
    return None


@pass_context
def check_schedules(context, field):
    """Reject an invalid table of schedules. On the command line the table is JSON.

    Renders an empty string. Cookiecutter asks for objects last, so it renders this twice. It
    converts numbers in objects to text, except those that were typed at a prompt.
    """
    answers = context["cookiecutter"]
    caller = find_caller("cookiecutter.prompt", "prompt_for_config")
    if field not in answers or caller is None:
        return ""
    schedules = caller["context"]["cookiecutter"][field] if caller["no_input"] else answers[field]
    if isinstance(schedules, str):
        try:
            schedules = json.loads(schedules or "{}")
        except ValueError as error:
            reject(field, schedules, f"is not valid JSON: {error}")
        except RecursionError:
            reject(field, schedules, "has too many levels")
    if problem := local_schedules.find_problem(schedules):
        reject(field, schedules, problem)
    answers[field] = schedules
    return ""


def each(items, text):
    """Format a text for each item, or for each key and value, and join the results."""
    pairs = items.items() if isinstance(items, dict) else ((item,) for item in items)
    return "".join(text.format(*pair) for pair in pairs)


def ask_more(wanted):
    """Use the defaults for all later questions, unless they are wanted.

    Renders an empty string. Cookiecutter has no questions that depend on other answers.
    """
    if not wanted:
        prompt.read_user_choice = lambda name, options, *others: options[0]
        prompt.read_user_yes_no = lambda name, default, *others: default
        prompt.read_user_variable = lambda name, default, *others: default
        prompt.read_user_dict = lambda name, default, *others: default
    return ""


def find_caller(module, function=None):
    """Return the local variables of the nearest caller in a module, or None."""
    frame = sys._getframe(1)
    while frame:
        if frame.f_globals.get("__name__") == module and (
            function is None or frame.f_code.co_name == function
        ):
            return frame.f_locals
        frame = frame.f_back
    return None


def renew_replay():
    """Make a replay use the tables of this template, and defaults for new questions.

    Cookiecutter takes all variables from the replay file, including private variables. The
    answers are checked again. Raises FailedHookException for an invalid answer.
    """
    main = find_caller("cookiecutter.main", "cookiecutter")
    is_rendering = find_caller("cookiecutter.prompt", "prompt_for_config") is None
    if main and main["replay"] and is_rendering:
        replayed = main["context"]["cookiecutter"]
        replayed.update(render_answers(replayed))


def render_answers(answers):
    """Return all variables of ``cookiecutter.json`` for answers; the others have defaults."""
    given = {name: value for name, value in answers.items() if not name.startswith("_")}
    # hooks/pre_prompt.py moves the questions, so that a replay does not ask them.
    files = [path for name in QUESTIONS if (path := ROOT / name).exists()]
    try:
        questions = generate_context(str(files[0]), extra_context=given)
    except ValueError as error:
        raise FailedHookException(str(error)) from None
    return prompt.prompt_for_config({"cookiecutter": questions[files[0].stem]}, no_input=True)


def check_given():
    """Reject unknown questions, and values in a user's configuration that are not choices.

    Cookiecutter ignores the former, and stops reading the configuration at the first one of the
    latter, so that all later answers in it are lost.
    """
    main = find_caller("cookiecutter.main", "cookiecutter")
    if not main or main["replay"]:
        return
    variables = json.loads((ROOT / "cookiecutter.json").read_text(encoding="utf-8"))
    questions = {name: value for name, value in variables.items() if not name.startswith("_")}
    for name in main["extra_context"] or {}:
        if name not in variables:
            known = ", ".join(questions)
            raise FailedHookException(f"{name}: unknown question; the questions are {known}")
    for name, value in main["config_dict"]["default_context"].items():
        if name in questions and (problem := find_problem(questions[name], value)):
            place = main["config_file"] or os.environ.get(
                "COOKIECUTTER_CONFIG", "~/.cookiecutterrc"
            )
            reject(name, value, f"in {place} {problem}; --default-config ignores that file")


def find_problem(question, value):
    """Return what is wrong with a value of a user's configuration, which YAML has read, or None."""
    if isinstance(question, bool):
        words = prompt.YesNoPrompt.yes_choices + prompt.YesNoPrompt.no_choices
        is_valid = str(value).strip().lower() in words
        return None if is_valid else "must be one of: yes, no"
    if isinstance(question, (str, list)) and not isinstance(value, str):
        return "must be text, in quotes"
    if isinstance(question, list) and value not in question:
        return f"must be one of: {', '.join(question)}"
    return None


def is_comparison():
    """Return whether the project is rendered for a comparison, not for a user.

    This is the case in ``cruft update``, ``diff`` and ``check``, and in a replay whose output
    folder is in the temporary folder of the system.
    """
    if find_caller("cruft._commands.utils.generate"):
        return True
    main = find_caller("cookiecutter.main", "cookiecutter")
    if not (main and main["replay"]):
        return False
    folder = Path(main["output_dir"])
    temporary = Path(tempfile.gettempdir()).resolve()
    return folder.is_absolute() and folder.resolve().is_relative_to(temporary)


def is_interactive():
    """Return whether cookiecutter asks its questions."""
    main = find_caller("cookiecutter.main", "cookiecutter")
    return bool(main) and not main["no_input"] and not main["replay"]


@pass_context
def is_update_from_1(context):
    """Return whether the project is rendered for ``cruft update`` of a service of 1.x."""
    update = find_caller("cruft._commands.update", "update")
    settings = Path(context["cookiecutter"]["project_slug"], "ops", "settings.py")
    return bool(update) and (update["current_template_dir"] / settings).exists()


def is_inside_template():
    """Return whether the project is generated in the folder of the template itself."""
    main = find_caller("cookiecutter.main", "cookiecutter")
    if not main or "base_repo_dir" not in main:
        return False
    return Path(main["output_dir"]).resolve().is_relative_to(Path(main["base_repo_dir"]).resolve())


def is_old_workflow():
    """Return whether the project is rendered by the weekly workflow of release 2.0 or earlier.

    GitHub lets that workflow change no workflow files: they are removed from the version before, and
    the hook removes them from this one. It also overwrites its branch. Raises FailedHookException if
    the branch has commits of others.
    """
    update = find_caller("cruft._commands.update", "update")
    if not update or os.environ.get("GITHUB_WORKFLOW") != "Upgrade":
        return False
    service = os.environ.get("GITHUB_WORKSPACE", ".")
    log = git(service, "log", "--format=%ce %h", f"HEAD..origin/{UPGRADE_BRANCH}")
    others = [commit for email, commit in map(str.split, log.splitlines()) if "[bot]" not in email]
    if others:
        raise FailedHookException(
            f"the branch {UPGRADE_BRANCH} has commits of others, which this workflow would delete:"
            f" {', '.join(others)}. Merge or close its pull request, and delete the branch"
        )
    shutil.rmtree(update["current_template_dir"] / ".github" / "workflows", ignore_errors=True)
    return True


@pass_context
def cruft_state(context):
    """Return the content of ``.cruft.json``, exactly as ``cruft create`` writes it.

    The file records the template, its version and the answers. It is part of the first commit:
    cruft writes it again later, and then requires a clean working tree.
    """
    created = find_caller("cruft._commands.create", "create") or {}
    answers = {
        name: value
        for name, value in context["cookiecutter"].items()
        if name not in {"_output_dir", "_repo_dir", "_checkout"}
    }
    main = find_caller("cookiecutter.main", "cookiecutter")
    if main:
        # The template itself, not the copy of it in which a hook has run
        folder = main.get("base_repo_dir", ROOT)
        answers["_template"] = get_template_url(answers["_template"], folder)
        answers["_commit"] = git(folder, "rev-parse", "HEAD") or None
    state = {
        "template": answers["_template"],
        "commit": answers["_commit"],
        "checkout": created.get("checkout"),
        "context": {"cookiecutter": answers},
        "directory": (main or created).get("directory"),
    }
    if created.get("skip"):
        state["skip"] = created["skip"]
    return json.dumps(state, ensure_ascii=False, indent=2, separators=(",", ": "))


def get_template_url(template, folder):
    """Return the URL from which git can clone the template, or its path if there is none."""
    origin = git(folder, "remote", "get-url", "origin")
    if (START / template).exists():
        # The path of a clone means nothing on another machine.
        is_url = re.match(r"\w[\w+.-]*://|[\w.-]+@[\w.-]+:", origin)
        return origin if is_url else os.path.abspath(START / template)
    return origin or template.removeprefix("git+")


def git(folder, *arguments):
    """Return the output of a git command in a folder, or "" if it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def quoted(text):
    """Return the text as a double-quoted string literal for TOML, YAML and Python."""
    escaped = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else escape(c) for c in escaped)


def escape(character):
    """Return the escape sequence of a non-printable character for TOML, YAML and Python."""
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def python_string(text):
    """Return the text as a Python string literal with the quotes that ``ruff format`` prefers."""
    literal = quoted(text)
    if text.count('"') > text.count("'"):
        body = literal[1:-1].replace('\\"', '"').replace("'", "\\'")
        literal = f"'{body}'"
    return literal


def python_value(text):
    """Return the text as a Python string literal; None for an empty text."""
    return python_string(text) if text else "None"


class SchemaDumper(getattr(pyyaml, "CSafeDumper", pyyaml.SafeDumper)):
    """Writes text with line breaks as a block, like drf-spectacular."""

    def represent_text(self, text):
        return self.represent_scalar("tag:yaml.org,2002:str", text, "|" if "\n" in text else None)


SchemaDumper.add_representer(str, SchemaDumper.represent_text)


def yaml(value):
    """Return the value as YAML, formatted as drf-spectacular formats a schema."""
    return pyyaml.dump(value, Dumper=SchemaDumper, sort_keys=False, allow_unicode=True)


def one_line(text):
    """Collapse each run of whitespace into one space."""
    return " ".join(text.split())


def markdown(text):
    """Escape the characters that CommonMark would interpret as markup."""
    text = re.sub(r"([\\`*_\[\]<>~|])", r"\\\1", text)
    text = re.sub(r"&(?=#?\w+;)", r"\\&", text)
    text = re.sub(r"(?m)^(\s*)([#+=-])", r"\1\\\2", text)
    return re.sub(r"(?m)^(\s*\d+)([.)])", r"\1\\\2", text)


def shell_word(text):
    """Quote the text as one shell argument."""
    return shlex.quote(text)


class Filters(Extension):
    """Registers the filters in the template's Jinja environment."""

    def __init__(self, environment):
        super().__init__(environment)
        filters = (
            package_name,
            check,
            ask_more,
            supported,
            check_schedules,
            each,
            quoted,
            python_string,
            python_value,
            yaml,
            one_line,
            markdown,
            shell_word,
            *local_schedules.FILTERS,
        )
        environment.filters.update({function.__name__: function for function in filters})
        environment.globals.update(
            cruft_state=cruft_state,
            is_comparison=is_comparison,
            is_inside_template=is_inside_template,
            is_interactive=is_interactive,
            is_old_workflow=is_old_workflow,
            is_update_from_1=is_update_from_1,
        )
        check_given()
        renew_replay()
        # cruft renders two versions of the template in one process. Each needs its own filters.
        modules = {__name__: __cached__, local_schedules.__name__: local_schedules.__cached__}
        for name, bytecode in modules.items():
            sys.modules.pop(name, None)
            with contextlib.suppress(OSError, TypeError):
                Path(bytecode).unlink()
