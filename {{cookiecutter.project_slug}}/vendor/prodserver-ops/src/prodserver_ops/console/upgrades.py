"""Merge a change of the template into a service: another version of it, or another answer.

Two versions of the template are rendered with the answers in ``.cruft.json``, and git merges the
difference between them into the working tree. Git finds files and folders that the service has
renamed.
"""

import base64
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

from django.conf import settings
from django.core.management import CommandError

from ..api.schema import get_path

#: Renders a version of the template.
CRUFT = ["tool", "run", "--from", "cruft>=2.16,<3", "--with", "cookiecutter>=2.7.1,<2.8", "cruft"]

#: How many lines of a command's output the report contains.
SHOWN_LINES = 30

RECORD = ".cruft.json"

#: Written by each ``uv run``, also before this command runs.
LOCK = "uv.lock"

#: The token of a private template in the weekly workflow.
TOKEN = "TEMPLATE_TOKEN"

#: Short forms of addresses, as for cookiecutter.
HOSTS = {"gh": "https://github.com/", "gl": "https://gitlab.com/", "bb": "https://bitbucket.org/"}

#: The setting of git, in this clone alone, with the address that was upgraded from last.
KNOWN = "prodserver.template"

#: The variable with the address of a template that has moved, for clones without that setting.
CONFIRMED = "TEMPLATE_URL"

#: The setting of git, in this clone alone, with the Unix time of the last check for a release.
CHECKED = "prodserver.checked"

#: The setting of git, in this clone alone, that the last release was signed with a known key.
SIGNED = "prodserver.signed"

#: The branch of the weekly pull request.
BRANCH = "upgrade-template"

#: A tag of a release, such as ``2.1.0``
RELEASE = re.compile(r"v?(\d+)\.(\d+)\.(\d+)")

#: Finds the environment variables that settings read.
VARIABLE = re.compile(
    r"""^    ([A-Z]\w+) = env\(|env\(key="(\w+)"|^    @env\(.*\n    def ([A-Z]\w+)""", re.M
)

#: Git must store rendered files and merge in the same way, whatever a user has configured. What the
#: working tree of the service is like, such as ``core.autocrlf``, is up to the user.
STORE = ["-c", "core.fileMode=true", "-c", "core.autocrlf=false", "-c", "core.safecrlf=false"]
MERGE = [
    part
    for option in (
        "merge.conflictStyle=merge",
        "merge.directoryRenames=true",
        "merge.renames=true",
        "rerere.enabled=false",
    )
    for part in ("-c", option)
]

IDENTITY = {
    f"GIT_{role}_{part}": value
    for role in ("AUTHOR", "COMMITTER")
    for part, value in (("NAME", "upgrade"), ("EMAIL", "upgrade@localhost"))
}

LOST = (
    "The template changed these files, but the service does not have them: they were renamed or "
    "deleted. Make each change where the code is now. Add files that you do not need to `skip` in "
    "`[tool.cruft]` of `pyproject.toml`:"
)

KEPT = "The template deleted these files. They are kept, because the service has changed them:"

KILLED = (
    "an upgrade was killed; undo what it has left with `git reset --hard` and `git clean -fd`, and run "
    "it again"
)

CONFLICTS = (
    "Resolve the marked lines of these files, then run `uv run manage.py upgrade --continue`, which "
    "reports the rest:"
)


@dataclass
class Merge:
    """A change of the template that was merged, until ``--continue`` has reported it."""

    #: The service's commit before the merge
    base: str
    title: str = ""
    notes: str = ""
    lost: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)

    def save(self) -> None:
        """Store the merge in git's folder."""
        get_state_path().write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls) -> "Merge":
        """Return the stored merge, or raise CommandError."""
        with suppress(FileNotFoundError):
            merge = cls(**json.loads(get_state_path().read_text()))
            if not merge.title:
                raise CommandError(KILLED)
            if not git("diff", "--name-only", merge.base, "--", ".", f":!{LOCK}"):
                raise CommandError("nothing is left of the upgrade; run: uv run manage.py upgrade")
            return merge
        # In another clone, such as one of the branch of the weekly pull request
        commit = git("log", "-1", "--format=%H", "--", RECORD)
        before, after = (read_version(each) for each in (f"{commit}^", commit))
        if before is None:
            raise CommandError(
                "no upgrade to continue; `upgrade --report FROM` reports what changed since a "
                "release such as 2.0.0, or since a commit or branch of the service"
            )
        return cls(
            git("rev-parse", f"{commit}^"),
            f"Template {before} → {after}",
            conflicts=execute(["git", "grep", "-l", "^<<<<<<< "]).stdout.splitlines(),
        )


@dataclass(frozen=True)
class State:
    """What a report compares: the template's version, and the service's migrations and variables."""

    version: str
    migrations: set[str]
    variables: set[str]


def execute(
    command: list[str], env: Mapping[str, str] | None = None, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in the service's folder, or in another, with more environment variables."""
    return subprocess.run(
        command,
        cwd=folder or settings.BASE_DIR,
        env={name: value for name, value in os.environ.items() if name != TOKEN} | dict(env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def run(
    command: list[str], env: Mapping[str, str] | None = None, folder: Path | None = None
) -> str:
    """Run a command; return its output, or raise CommandError."""
    done = execute(command, env, folder)
    if done.returncode:
        raise CommandError(f"{' '.join(command)} failed:\n{get_last_lines(done.stdout)}")
    return done.stdout


def git(*arguments: str) -> str:
    """Run git in the service's folder; return its output without the line break at its end."""
    return run(["git", "-c", "log.showSignature=false", *arguments]).rstrip("\n")


def get_last_lines(text: str) -> str:
    """Return the last lines of a command's output."""
    return "\n".join(text.splitlines()[-SHOWN_LINES:])


def get_state_path() -> Path:
    """Return the file in git's folder that describes an upgrade that is not reported yet."""
    return Path(settings.BASE_DIR, git("rev-parse", "--git-path", "prodserver-upgrade.json"))


def find_uv() -> str:
    """Return the path of uv, or raise CommandError."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        raise CommandError("uv not found; run: python3 -m pip install uv")
    return uv


def read_record() -> dict[str, Any]:
    """Return ``.cruft.json``: the template, its commit and the answers."""
    path = Path(settings.BASE_DIR, RECORD)
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise CommandError(f"{RECORD} not found: it records the template and the answers") from None
    except ValueError as error:
        raise CommandError(f"{RECORD} is not valid JSON: {error}") from None
    return record


def write_record(record: dict[str, Any]) -> None:
    """Write ``.cruft.json`` as cruft does, and stage it."""
    text = json.dumps(record, ensure_ascii=False, indent=2, separators=(",", ": "))
    Path(settings.BASE_DIR, RECORD).write_text(text + "\n")
    git("add", "--", RECORD)


def get_answers(record: dict[str, Any]) -> dict[str, Any]:
    """Return the answers of a record, without private variables."""
    answers = record["context"]["cookiecutter"]
    return {name: value for name, value in answers.items() if not name.startswith("_")}


def read_answers(service: Path, record: dict[str, Any], address: str) -> dict[str, Any]:
    """Return the answers of a rendered service, as ``.cruft.json`` records them."""
    rendered = json.loads((service / RECORD).read_text())
    answers: dict[str, Any] = rendered["context"]["cookiecutter"]
    setup = record["context"]["cookiecutter"].get("setup", answers["setup"])
    return answers | {"setup": setup, "_template": address}


def require_clean_tree() -> None:
    """Raise CommandError with the changed files, unless all but the lock file are committed."""
    # Paths of the status are those of the repository, also in a folder of it.
    lock = git("rev-parse", "--show-prefix") + LOCK
    status = git("status", "--porcelain", "--untracked-files=normal")
    entries = [line[3:] for line in status.splitlines()]
    changed = [name for name in entries if name.strip('"') != lock]
    if not changed:
        return
    shown = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if changed[5:] else "")
    hint = "commit them first"
    if get_state_path().exists():
        Merge.load()
        hint = "resolve its conflicts, if there are any, and run: uv run manage.py upgrade --continue"
    raise CommandError(f"the working tree has changes: {shown}: {hint}")


# The template


def get_address(text: str) -> str:
    """Return the address from which git can clone what a user has written."""
    text = text.removeprefix("git+")
    host, _, name = text.partition(":")
    if host in HOSTS:
        return f"{HOSTS[host]}{name}"
    return os.path.abspath(text) if Path(text).exists() else text


def choose_address(record: dict[str, Any], given: str | None) -> str:
    """Return the template's address; ask about one that has changed and was not confirmed."""
    if given := given or os.environ.get(CONFIRMED):
        return get_address(given)
    address = get_address(record["template"])
    if address.endswith(".zip"):
        raise CommandError(
            f"the service was generated from the archive {address}; name the repository of the "
            "template: uv run manage.py upgrade --template URL"
        )
    known = execute(["git", "config", "--local", KNOWN]).stdout.strip()
    known = known or read_earlier_address(address)
    if known == address:
        return address
    question = (
        f"The address of the template has changed.\n  {known}\n"
        f"  {address}, which {RECORD} names now\nAn upgrade runs code from there."
    )
    if not sys.stdin.isatty():
        raise CommandError(
            f"{question} Confirm it with: --template {address}, and for the weekly workflow with "
            f"the variable {CONFIRMED} of the repository"
        )
    if input(f"{question} Continue? [y/N] ").strip().lower() not in ("y", "yes"):
        raise CommandError("not upgraded")
    return address


def read_committed_record(revision: str) -> dict[str, Any]:
    """Return the record in a commit of the service; it is empty if it cannot be read."""
    done = execute(["git", "show", f"{revision}:./{RECORD}"])
    try:
        record: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return {}
    return record


def get_last_check() -> datetime | None:
    """Return when this clone last checked for a release, or when its last upgrade was committed."""
    commands = [["config", "--local", CHECKED]] + [
        ["log", "-1", "--format=%ct", *revision] for revision in (["--", RECORD], [f"origin/{BRANCH}"])
    ]
    try:
        found = [execute(["git", *command]).stdout.strip() for command in commands]
    except OSError:
        return None  # No git, as in an image
    times = [int(text) for text in found if text.isdecimal()]
    return datetime.fromtimestamp(max(times), UTC) if times else None


def is_earlier(earlier: dict[str, Any], record: dict[str, Any]) -> bool:
    """Return whether a record is that of another version of the template."""
    return bool(earlier) and earlier["commit"] not in (None, record["commit"])


def read_earlier_address(address: str) -> str:
    """Return the last other address in the history, or the same one if there is none.

    Whoever proposes another address can propose a commit with it, so neither confirms the other.
    """
    commits = git("log", "--full-history", "--format=%H", "--", RECORD).splitlines()
    found = [read_committed_record(commit).get("template", address) for commit in commits]
    return next((each for each in map(get_address, found) if each != address), address)


class Template:
    """A clone of the template's repository."""

    def __init__(self, address: str, folder: Path) -> None:
        """Clone the repository to a new folder, or raise CommandError."""
        self.address = address
        self.folder = folder
        environment = {"GIT_TERMINAL_PROMPT": "0", **get_credentials()}
        command = ["git", "clone", "--quiet", "--no-checkout", "--", address, str(folder)]
        done = execute(command, environment)
        if done.returncode:
            lines = done.stdout.strip().splitlines() or ["no output"]
            reason = next((line for line in lines if line.startswith("fatal: ")), lines[-1])
            raise CommandError(
                f"the template {address} cannot be read: {reason}\n"
                "If it has moved, run: uv run manage.py upgrade --template URL. If it is private, "
                f"give git access to it; the weekly workflow needs the secret {TOKEN}"
            )

    def git(self, *arguments: str) -> str:
        """Run git in the clone; return its output without white space at its end."""
        return run(["git", *arguments], folder=self.folder).rstrip()

    def has(self, commit: str) -> bool:
        """Return whether the repository has a commit."""
        command = ["git", "cat-file", "-e", commit + "^{commit}"]
        return execute(command, folder=self.folder).returncode == 0

    def get_releases(self) -> dict[str, str]:
        """Return the tags of releases by version, from the oldest to the newest."""
        found = [match for tag in self.git("tag").splitlines() if (match := RELEASE.fullmatch(tag))]
        found.sort(key=lambda match: tuple(map(int, match.groups())))
        return {".".join(match.groups()): match[0] for match in found}

    def find_commit(self, record: dict[str, Any]) -> str:
        """Return the commit that the service is of, or raise CommandError."""
        commit: str | None = record["commit"]
        if commit and self.has(commit):
            return commit
        version = record["context"]["cookiecutter"]["_version"]
        if tag := self.get_releases().get(version):
            return self.git("rev-parse", tag + "^{commit}")
        missing = f"the commit {commit} of {RECORD}, nor a tag" if commit else "a tag"
        raise CommandError(
            f"the template {self.address} does not have {missing} {version}\n"
            f'Write the commit of version {version} to "commit" in {RECORD}, or run: '
            "uv run manage.py upgrade --template URL, with the repository that has it"
        )

    def find_target(self, revision: str | None) -> tuple[str, str]:
        """Return the commit of a revision or of the newest release, and how it is named."""
        if revision is not None:
            for name in (revision, f"origin/{revision}"):
                if self.has(name):
                    return self.git("rev-parse", name + "^{commit}"), revision
            raise CommandError(
                f"the template {self.address} has no tag, branch or commit {revision}"
            )
        if releases := self.get_releases():
            version, tag = list(releases.items())[-1]
            signature = self.check_signature(tag)
            return self.git("rev-parse", tag + "^{commit}"), f"release {version} ({signature})"
        return self.git("rev-parse", "HEAD"), "newest commit; the template has no release tags"

    def check_signature(self, tag: str) -> str:
        """Return what git says about the signature of a tag, with the keys that the user trusts.

        Raises CommandError for a wrong signature, and for one that cannot be verified if that of
        the last upgrade was.
        """
        state = "unsigned"
        is_tag = self.git("cat-file", "-t", f"refs/tags/{tag}") == "tag"
        if is_tag and "\n-----BEGIN " in self.git("cat-file", "tag", tag):
            done = execute(["git", "verify-tag", "--raw", tag], folder=self.folder)
            if done.returncode == 0:
                git("config", "--local", SIGNED, "true")
                return "its signature is verified"
            if re.search(r"\bBADSIG\b|incorrect signature", done.stdout):
                raise CommandError(f"the signature of the tag {tag} is wrong:\n{done.stdout.strip()}")
            state = "signed, but git does not know the key"
        if execute(["git", "config", "--local", SIGNED]).returncode == 0:
            raise CommandError(
                f"the tag {tag} is {state}; that of the last upgrade was verified. To use it: "
                f"uv run manage.py upgrade --to {tag}"
            )
        return state

    def contains(self, commit: str, other: str) -> bool:
        """Return whether a commit is another one, or comes after it."""
        command = ["git", "merge-base", "--is-ancestor", other, commit]
        return execute(command, folder=self.folder).returncode == 0

    def read_changelog(self, commit: str) -> str:
        """Return the changelog of a commit; it is empty if there is none."""
        done = execute(["git", "show", f"{commit}:CHANGELOG.md"], folder=self.folder)
        return done.stdout if done.returncode == 0 else ""

    def render(self, uv: str, commit: str, record: dict[str, Any], folder: Path) -> Path:
        """Render a commit with the answers of a record into a new folder; return the service."""
        answers = json.dumps(get_answers(record) | {"setup": False})
        folder.mkdir()
        config, output = folder / "config.yaml", folder / "output"
        output.mkdir()
        # The defaults of a user are not answers of the service.
        config.write_text(json.dumps({"replay_dir": str(folder), "cookiecutters_dir": str(folder)}))
        place = ["--directory", record["directory"]] if record.get("directory") else []
        command = ["create", str(self.folder), "--checkout", commit, *place, "--no-input"]
        options = ["--config-file", str(config), "--output-dir", str(output)]
        done = execute([uv, *CRUFT, *command, *options, "--extra-context", answers])
        if done.returncode:
            last = get_last_lines(done.stdout)
            raise CommandError(f"the template's commit {commit[:12]} cannot be rendered:\n{last}")
        (service,) = output.iterdir()
        return service


def get_credentials() -> dict[str, str]:
    """Return variables that let git read a private template on GitHub with ``TEMPLATE_TOKEN``."""
    token = os.environ.get(TOKEN)
    if not token:
        return {}
    login = base64.b64encode(f"x-access-token:{token}".encode()).decode()
    return {
        "GIT_CONFIG_COUNT": "2",
        "GIT_CONFIG_KEY_0": "http.https://github.com/.extraheader",
        "GIT_CONFIG_VALUE_0": f"Authorization: Basic {login}",
        "GIT_CONFIG_KEY_1": "url.https://github.com/.insteadOf",
        "GIT_CONFIG_VALUE_1": "git@github.com:",
    }


# The merge


def list_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder, by their paths."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def read_skipped(record: dict[str, Any]) -> list[str]:
    """Return the paths and patterns of files that upgrades leave out."""
    project = tomllib.loads(Path(settings.BASE_DIR, "pyproject.toml").read_text())
    skipped: list[str] = project.get("tool", {}).get("cruft", {}).get("skip", [])
    return [RECORD, *skipped, *record.get("skip", [])]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a path, or a folder that it is in, matches a pattern."""
    path = PurePosixPath(name)
    return any(
        fnmatch(str(each), pattern) for each in (path, *path.parents) for pattern in patterns
    )


def store_tree(service: Path, parent: str | None, message: str) -> str:
    """Store a rendered service in the repository as a commit that no branch has; return its id."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        place = tree / git("rev-parse", "--show-prefix")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(service, place)
        environment = IDENTITY | {
            "GIT_DIR": git("rev-parse", "--absolute-git-dir"),
            "GIT_WORK_TREE": str(tree),
            "GIT_INDEX_FILE": str(Path(folder, "index")),
            # The marks of conflicts name the commit: the same upgrade has the same marks.
            "GIT_AUTHOR_DATE": "2000-01-01T00:00:00Z",
            "GIT_COMMITTER_DATE": "2000-01-01T00:00:00Z",
        }
        run(["git", *STORE, "add", "--force", "--all"], environment, tree)
        stored = run(["git", "write-tree"], environment, tree).strip()
        parents = ["-p", parent] if parent else []
        command = ["git", "commit-tree", *parents, "-m", message, stored]
        return run(command, environment, tree).strip()


def merge(old: Path, new: Path, skipped: list[str], name: str) -> Merge:
    """Merge the difference between two rendered services into the working tree and the index."""
    result = Merge(git("rev-parse", "HEAD"))
    before, after = list_files(old), list_files(new)
    for service, files in ((old, before), (new, after)):
        for path in [path for path in files if matches(path, skipped)]:
            (service / path).unlink()
            del files[path]
    known = set(git("ls-files").splitlines())
    folders = get_folders(known)
    if ignored := sorted(
        path
        for path in set(after) - set(before) - known
        if os.path.lexists(Path(settings.BASE_DIR, path))
    ):
        # Git would overwrite them.
        raise CommandError(
            f"the template has new files of the names of files that are not in git: "
            f"{', '.join(ignored)}: commit or rename them, or add them to `skip` in `[tool.cruft]`"
        )
    base = store_tree(old, None, "The template before")
    change = store_tree(new, base, f"Template {name}")
    # A file may have been committed with line breaks of Windows.
    pick = ["cherry-pick", "--no-commit", "--strategy-option=ignore-cr-at-eol", change]
    done = execute(["git", *MERGE, *pick], IDENTITY)
    stages: dict[str, set[str]] = {}
    for line in git("ls-files", "--unmerged", "-z").split("\0"):
        if line:
            mode, _, path = line.partition("\t")
            stages.setdefault(path, set()).add(mode[-1])
    if done.returncode and not stages:
        raise CommandError(f"git could not merge:\n{get_last_lines(done.stdout)}")
    for path, found in sorted(stages.items()):
        match sorted(found):
            case ["1", "3"]:
                result.lost.append(path)
            case ["1", "2"]:
                result.kept.append(path)
                git("add", "--", path)
            case ["1"]:
                git("rm", "--quiet", "--cached", "--", path)
            case ["2"] | ["3"]:
                git("add", "--", path)
            case _:
                result.conflicts.append(path)
    # A new file belongs to a folder that the service has renamed or deleted.
    gone, present = get_folders(before) - folders, set(git("ls-files").splitlines())
    result.lost += [
        path
        for path in (set(after) - set(before)) & present
        if str(PurePosixPath(path).parent) in gone and path not in stages
    ]
    for path in result.lost:
        git("rm", "--quiet", "--force", "--ignore-unmatch", "--", path)
        Path(settings.BASE_DIR, path).unlink(missing_ok=True)
    result.lost.sort()
    return result


@contextmanager
def undo_if_interrupted() -> Iterator[None]:
    """Leave the working tree as it was if what is in this context does not end.

    There was nothing in it that is not committed; see ``require_clean_tree()``.
    """
    # For a process that is killed: load() refuses to continue this.
    Merge(git("rev-parse", "HEAD")).save()
    try:
        yield
    except BaseException:
        undo()
        raise


@contextmanager
def explain_interrupt() -> Iterator[None]:
    """Say after Ctrl-C how to go on, in one line."""
    try:
        yield
    except KeyboardInterrupt:
        state = "nothing was changed"
        if get_state_path().exists():
            state = "the rest is reported by: uv run manage.py upgrade --continue"
        raise CommandError(f"interrupted; {state}", returncode=130) from None


def undo() -> None:
    """Bring the working tree back to the last commit, without untracked files."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    git("reset", "--hard", "--quiet")
    git("clean", "-d", "--force", "--quiet")
    get_state_path().unlink(missing_ok=True)
    signal.signal(signal.SIGINT, handler)


def get_folders(names: Iterable[str]) -> set[str]:
    """Return the folders of paths."""
    return {str(parent) for name in names for parent in PurePosixPath(name).parents}


def render_both(
    template: Template, uv: str, versions: list[tuple[str, dict[str, Any]]], folder: Path
) -> list[Path]:
    """Render two pairs of a commit and a record at the same time; return the services."""
    with ThreadPoolExecutor() as pool:
        started = [
            pool.submit(template.render, uv, commit, record, folder / str(number))
            for number, (commit, record) in enumerate(versions)
        ]
        return [each.result() for each in started]


# The report


def read_state(revision: str | None = None) -> State:
    """Return the state of the working tree, or of a commit."""
    if revision is None:
        return _read_state(Path(settings.BASE_DIR))
    done = subprocess.run(
        ["git", "archive", "--format=tar", revision],
        cwd=settings.BASE_DIR,
        capture_output=True,
    )
    if done.returncode:
        raise CommandError(done.stderr.decode(errors="replace").strip())
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
            archive.extractall(folder, filter="data")
        return _read_state(Path(folder))


def _read_state(base: Path) -> State:
    record = json.loads((base / RECORD).read_text())
    # The library in vendor/ has the same version as the service's files.
    paths = [*base.glob("*/settings.py"), *base.glob("vendor/*/src/prodserver_ops/conf/*.py")]
    text = "\n".join(path.read_text() for path in paths)
    return State(
        record["context"]["cookiecutter"]["_version"],
        {
            path.relative_to(base).as_posix()
            for path in base.glob("*/**/migrations/0*.py")
            if ".venv" not in path.parts
        },
        {name for match in VARIABLE.findall(text) for name in match if name},
    )


def find_start(start: str) -> str:
    """Return the service's commit of a revision, or the last one with a version of the template."""
    done = execute(["git", "rev-parse", "--verify", "--quiet", start + "^{commit}"])
    if done.returncode == 0 and not RELEASE.fullmatch(start):
        return done.stdout.strip()
    later = "HEAD"
    for commit in git("log", "--format=%H", "--", RECORD).splitlines():
        version = read_version(commit)
        if version == start:
            # All commits until the next upgrade have this version.
            return later if later == "HEAD" else f"{later}^"
        later = commit
    raise CommandError(f"no commit of the service has version {start} of the template")


def read_version(revision: str) -> str | None:
    """Return the version of the template that a commit of the service has, if it is known."""
    with suppress(KeyError):
        version: str = read_committed_record(revision)["context"]["cookiecutter"]["_version"]
        return version
    return None


def has_markers(path: str) -> bool:
    """Return whether a file still has the marks of a conflict."""
    with suppress(FileNotFoundError):
        return b"\n<<<<<<< " in b"\n" + Path(settings.BASE_DIR, path).read_bytes()
    return False


def list_section(title: str, items: Iterable[str], introduction: str = "") -> str:
    """Return a section with a list, or an empty string if there are no items."""
    lines = "\n".join(f"- `{item}`" for item in items)
    start = f"## {title}\n\n{introduction}\n\n" if introduction else f"## {title}\n\n"
    return start + lines if lines else ""


def output_section(title: str, output: str) -> str:
    """Return a section about a command that failed, with its last lines."""
    return f"## {title}\n\nFailed:\n\n```\n{get_last_lines(output)}\n```"


def get_schema() -> str:
    """Return the name of the file with the schema of the API, which is generated."""
    return get_path().name


def install(uv: str, change: Merge) -> str:
    """Install the packages and write the schema of the API; return a section about failures."""
    done = execute([uv, "sync", "--quiet"])
    if done.returncode:
        return output_section("Packages", done.stdout)
    schema = get_schema()
    # The schema is generated, not merged. If that fails, a test shows why.
    if schema in change.conflicts and (
        execute([uv, "run", "--quiet", "manage.py", "openapi"]).returncode == 0
    ):
        git("add", "--", schema)
        change.conflicts.remove(schema)
    return ""


def run_tests(uv: str) -> tuple[bool, str]:
    """Run the service's tests; return whether they passed, and a section about them."""
    done = execute(["env", "-u", "DJANGO_MODE", uv, "run", "--quiet", "pytest", "-q"])
    if done.returncode:
        return False, output_section("Tests", done.stdout)
    return True, f"## Tests\n\nPassed: {done.stdout.splitlines()[-1]}"


def run_deploy_checks(uv: str, record: dict[str, Any]) -> str:
    """Return a section with the checks of production, with values for what it requires."""
    answers = record["context"]["cookiecutter"]
    required = {
        "SECRET_KEY": secrets.token_hex(32),
        "DATABASE_URL": "postgres://postgres@localhost:5432/postgres",
        "CELERY_BROKER_URL": answers["_brokers"][answers["broker"]]["local_url"],
        "REDIS_URL": "redis://localhost:6379/0",
        "FLOWER_PASSWORD": secrets.token_hex(16),
    }
    environment = required | os.environ | {"DJANGO_MODE": "prod"}
    check = ["manage.py", "check", "--deploy", "--fail-level", "WARNING"]
    done = execute([uv, "run", "--quiet", *check], environment)
    if done.returncode:
        return output_section("Checks of production", done.stdout)
    return "## Checks of production\n\nPassed."


def build_report(uv: str, change: Merge, *, with_tests: bool) -> tuple[bool, str]:
    """Install, check and test what was merged; return whether that is a success, and the report.

    While there are conflicts, the report says only where they are.
    """
    problem = ""
    # Whoever interrupts the tests can continue.
    change.save()
    if set(change.conflicts) <= {get_schema()}:
        problem = install(uv, change)
    elif "pyproject.toml" not in change.conflicts:
        # Whoever resolves the conflicts on the branch of a pull request does not install first.
        execute([uv, "lock", "--quiet"])
    sections = [
        f"# {change.title}",
        list_section("Conflicts", change.conflicts, CONFLICTS),
        list_section("Changes to missing files", change.lost, LOST),
        list_section("Files that the template deleted", change.kept, KEPT),
        change.notes,
    ]
    passed = not change.lost and not problem
    if change.conflicts or problem:
        change.save()
        sections += [
            problem,
            "Migrations, variables, tests and the checks of production are not in this report: "
            "`uv run manage.py upgrade --continue` reports them when what is above is resolved.",
        ]
    else:
        before, after = read_state(change.base), read_state()
        sections += [
            list_section("New migrations", sorted(after.migrations - before.migrations)),
            list_section("New environment variables", sorted(after.variables - before.variables)),
            list_section(
                "Removed environment variables", sorted(before.variables - after.variables)
            ),
        ]
        tests_passed = True
        if with_tests:
            tests_passed, section = run_tests(uv)
            passed = passed and tests_passed
            sections += [section, run_deploy_checks(uv, read_record())]
        if tests_passed:
            get_state_path().unlink(missing_ok=True)
    return passed, "\n\n".join(section for section in sections if section) + "\n"
