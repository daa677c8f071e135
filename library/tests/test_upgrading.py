"""Upgrades: the template's repository, merges, and the notes of releases."""

import json
import subprocess
from unittest.mock import Mock

import pytest
from django.core.management import CommandError, call_command

from prodserver_ops.console import release_notes, upgrades

CHANGELOG = """\
# Changelog

## [Unreleased]

## [2.2.0] - 2027-02-01

### Do this

- Copy a
  file.

### Done for you

Pages:

- It is faster.

## [2.1.0] - 2027-01-01

### Added

- A page. More about it. *Generated service:* nothing to do.
- A table, `settings.py` too. *Generated service:*
  nothing to do; `migrate` adds it.

### Changed

- A view is faster. *Generated service:* take `a/` and `b.py`.
- A setting has another
  name. *Generated
  service:* rename it. *Project with `add_settings()`:* the same.

## [2.0.0] - 2026-01-01

- Old. *Generated service:* rewrite it.
"""


def git(folder, *arguments):
    command = ["git", "-c", "user.name=A", "-c", "user.email=a@example.com", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def commit(folder, files=None):
    write(folder, files or {})
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "-m", "Commit")
    return git(folder, "rev-parse", "HEAD")


def record(template, commit, version="2.0.0"):
    context = {"cookiecutter": {"_version": version, "setup": True}}
    return {"template": str(template), "commit": commit, "checkout": None, "context": context}


@pytest.fixture
def template(tmp_path):
    """The repository of a template with three releases, and a later commit."""
    folder = tmp_path / "template"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch=main")
    for tag in ("2.0.0", "2.10.0", "v2.9.0", "3.0.0-rc1"):
        commit(folder)
        git(folder, "tag", tag)
    commit(folder)
    return folder


@pytest.fixture
def service(tmp_path, settings):
    """The folder of a service in a repository, with 20 lines in each of two files."""
    root = tmp_path / "repository"
    folder = settings.BASE_DIR = root / "services" / "rooms"
    folder.mkdir(parents=True)
    git(root, "init", "--quiet", "--initial-branch=main")
    commit(folder, {"pyproject.toml": "", **FILES})
    return folder


LINES = "".join(f"line {number}\n" for number in range(20))

FILES = {
    "example/models.py": LINES,
    "example/views.py": LINES.replace("line", "view"),
    "run": "a\n",
}


def merge(tmp_path, old, new, skipped=()):
    for name, files in (("old", old), ("new", new)):
        write(tmp_path / name, files)
    return upgrades.merge(tmp_path / "old", tmp_path / "new", list(skipped), "2.1.0")


@pytest.fixture
def sign(template, tmp_path, monkeypatch):
    """A function that signs a tag of the template with a key of a name."""
    trusted = tmp_path / "trusted"
    config = tmp_path / "gitconfig"
    config.write_text(f'[gpg]\nformat = ssh\n[gpg "ssh"]\nallowedSignersFile = {trusted}\n')
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))

    def sign(tag, name):
        key = tmp_path / name
        if not key.exists():
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(key)]
            subprocess.run(command, check=True)
        # The team trusts one of them.
        trusted.write_text(f"anna@example.com {(tmp_path / 'anna.pub').read_text()}")
        git(template, "-c", f"user.signingKey={key}", "tag", "--force", "--sign", "-m", tag, tag)

    return sign


def test_signature_of_a_release_is_verified_with_the_keys_of_the_user(
    template, service, sign, tmp_path
):
    clones = (tmp_path / f"clone-{number}" for number in range(4))

    def find_target():
        return upgrades.Template(str(template), next(clones)).find_target(None)[1]

    sign("2.10.0", "anna")
    (tmp_path / "trusted").unlink()
    assert find_target() == "release 2.10.0 (signed, but git does not know the key)"
    sign("2.10.0", "anna")
    assert find_target() == "release 2.10.0 (its signature is verified)"
    # From then on, another key is refused, and a release without a signature.
    sign("2.10.0", "bert")
    with pytest.raises(CommandError, match="git does not know the key; that of the last upgrade"):
        find_target()
    git(template, "tag", "2.11.0")
    with pytest.raises(CommandError, match=r"is unsigned; .* manage.py upgrade --to 2\.11\.0"):
        find_target()


def test_wrong_signature_of_a_release_is_refused(template, service, sign, tmp_path):
    sign("2.10.0", "anna")
    text = git(template, "cat-file", "tag", "2.10.0").replace("tagger A", "tagger B") + "\n"
    command = ["git", "hash-object", "-w", "-t", "tag", "--stdin"]
    done = subprocess.run(command, cwd=template, input=text, capture_output=True, text=True)
    git(template, "update-ref", "refs/tags/2.10.0", done.stdout.strip())
    found = upgrades.Template(str(template), tmp_path / "clone")
    with pytest.raises(CommandError, match=r"the signature of the tag 2\.10\.0 is wrong"):
        found.find_target(None)


def test_newest_release_is_chosen_not_the_newest_commit(template, service, tmp_path):
    found = upgrades.Template(str(template), tmp_path / "clone")
    assert list(found.get_releases()) == ["2.0.0", "2.9.0", "2.10.0"]
    target = git(template, "rev-parse", "2.10.0")
    assert found.find_target(None) == (target, "release 2.10.0 (unsigned)")
    newest = git(template, "rev-parse", "main")
    assert found.find_target("main") == (newest, "main")
    # A service of a later commit is not brought back.
    assert found.contains(newest, target)
    assert not found.contains(git(template, "rev-parse", "2.0.0"), target)
    with pytest.raises(CommandError, match=r"no tag, branch or commit 4\.0\.0"):
        found.find_target("4.0.0")


@pytest.mark.parametrize("commit", [None, "0" * 40])
def test_unknown_commit_is_found_by_its_version(template, tmp_path, commit):
    """The record of a zip has no commit, and a template that moved may have others."""
    found = upgrades.Template(str(template), tmp_path / "clone")
    expected = git(template, "rev-parse", "2.0.0")
    assert found.find_commit(record(template, commit)) == expected
    with pytest.raises(
        CommandError, match=r'Write the commit of version 1\.5\.0 to "commit"'
    ) as caught:
        found.find_commit(record(template, commit, "1.5.0"))
    named = f"does not have the commit {commit} of .cruft.json, nor" if commit else "does not have"
    assert f"{named} a tag 1.5.0" in str(caught.value)


def test_template_that_cannot_be_read_is_two_lines(tmp_path):
    with pytest.raises(CommandError) as caught:
        upgrades.Template(str(tmp_path / "gone"), tmp_path / "clone")
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"the template {tmp_path / 'gone'} cannot be read: fatal: ")
    assert "manage.py upgrade --template URL" in second


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("gh:team/template", "https://github.com/team/template"),
        ("git+https://example.com/template", "https://example.com/template"),
        ("git@example.com:template", "git@example.com:template"),
    ],
)
def test_addresses_as_cookiecutter_knows_them(text, address):
    assert upgrades.get_address(text) == address


def test_token_is_for_the_template_alone(monkeypatch):
    assert upgrades.get_credentials() == {}
    monkeypatch.setenv("TEMPLATE_TOKEN", "secret")
    assert upgrades.get_credentials()["GIT_CONFIG_COUNT"] == "2"
    assert "TEMPLATE_TOKEN" not in upgrades.execute(["env"]).stdout


@pytest.mark.parametrize("version", ["a", "b"])
def test_changed_address_must_be_confirmed(service, monkeypatch, version):
    """Also if one commit changes both the address and the version, as a stranger might propose."""
    found = record("https://example.com/one", "a" * 40)
    commit(service, {".cruft.json": json.dumps(found)})
    assert upgrades.choose_address(found, None) == "https://example.com/one"
    changed = record("https://example.com/two", version * 40)
    commit(service, {".cruft.json": json.dumps(changed)})
    later = changed | {"commit": "c" * 40}
    commit(service, {".cruft.json": json.dumps(later)})
    with pytest.raises(CommandError, match=r"Confirm it with: --template https://example\.com/two"):
        upgrades.choose_address(later, None)
    assert upgrades.choose_address(later, later["template"]) == later["template"]
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    for answer, accepted in (("", False), ("y", True)):
        monkeypatch.setattr("builtins.input", lambda text, answer=answer: answer)
        if accepted:
            assert upgrades.choose_address(later, None) == "https://example.com/two"
        else:
            with pytest.raises(CommandError, match="not upgraded"):
                upgrades.choose_address(later, None)
    # After an upgrade the address is known in this clone.
    git(service, "config", "--local", upgrades.KNOWN, "https://example.com/two")
    assert upgrades.choose_address(later, None) == "https://example.com/two"


def test_address_is_confirmed_by_a_variable_of_the_repository(service, monkeypatch):
    found = record("https://example.com/one", "a" * 40)
    commit(service, {".cruft.json": json.dumps(found)})
    monkeypatch.setenv("TEMPLATE_URL", "gh:team/template")
    assert upgrades.choose_address(found, None) == "https://github.com/team/template"


def test_archive_cannot_be_upgraded_from(service):
    found = record("https://example.com/main.zip", None)
    commit(service, {".cruft.json": json.dumps(found)})
    with pytest.raises(
        CommandError, match=r"archive .*main\.zip; name the repository .* --template"
    ):
        upgrades.choose_address(found, None)


def test_lock_file_does_not_make_a_tree_dirty(service):
    commit(service, {"uv.lock": "a\n"})
    write(service, {"uv.lock": "b\n"})
    upgrades.require_clean_tree()
    write(service, {"one": "", "run": "b\n"})
    with pytest.raises(CommandError, match=r"changes: .*one, .*run: commit them first|run, .*one"):
        upgrades.require_clean_tree()


@pytest.fixture
def upgrade(service, template, monkeypatch):
    """A function that upgrades the service from 2.0.0 to 2.10.0, without uv."""
    old = git(template, "rev-parse", "2.0.0")
    commit(service, {".cruft.json": json.dumps(record(template, old)), ".gitignore": "local\n"})

    def render(self, uv, revision, given, folder):
        files = FILES if revision == old else FILES | NEW
        version = "2.0.0" if revision == old else "2.10.0"
        write(folder, files | {".cruft.json": json.dumps(record(template, revision, version))})
        return folder

    monkeypatch.setattr(upgrades.Template, "render", render)
    monkeypatch.setattr(upgrades, "install", lambda uv, change: "")
    return lambda *options: call_command("upgrade", "--no-tests", *options)


NEW = {
    "example/models.py": LINES.replace("line 3\n", "line three\n"),
    "example/api.py": "new\n",
    "local": "of the template\n",
}


@pytest.mark.parametrize("name", ["write_record", "store_tree", "get_folders"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_upgrade_leaves_the_tree_as_it_was(service, upgrade, monkeypatch, name, error):
    def fail(*args, **kwargs):
        (service / "left").touch()
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(upgrades, name, fail)
        expected = OSError if isinstance(error, OSError) else CommandError
        with pytest.raises(expected, match=r"No space|interrupted; nothing was changed"):
            upgrade()
    assert git(service, "status", "--porcelain") == ""
    assert (service / "example" / "models.py").read_text() == LINES
    with pytest.raises(CommandError, match="no upgrade to continue"):
        upgrade("--continue")
    upgrade()
    assert (service / "example" / "api.py").read_text() == "new\n"


def test_killed_upgrade_is_not_continued(service, upgrade, monkeypatch):
    # Nothing undoes what a process has done that is killed.
    monkeypatch.setattr(upgrades, "undo", lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(upgrades, "write_record", lambda found: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            upgrade()
    for options in [], ["--continue"]:
        with pytest.raises(CommandError, match="an upgrade was killed; undo what it has left with"):
            upgrade(*options)
    git(service, "reset", "--hard", "--quiet")
    upgrade()


def test_interrupted_tests_are_continued(service, upgrade, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(upgrades, "read_state", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(CommandError, match=r"interrupted; .* upgrade --continue"):
            upgrade()
    with pytest.raises(CommandError, match=r"run: uv run manage\.py upgrade --continue"):
        upgrade()
    capsys.readouterr()
    upgrade("--continue")
    assert capsys.readouterr().out.startswith("# Template 2.0.0 → 2.10.0\n")


def test_upgrade_that_was_given_up_is_not_continued(service, upgrade, monkeypatch):
    commit(service, {"example/models.py": LINES.replace("line 3\n", "our line\n")})
    with pytest.raises(SystemExit):
        upgrade()
    git(service, "reset", "--hard", "--quiet")
    with pytest.raises(CommandError, match="nothing is left of the upgrade; run: uv run manage"):
        upgrade("--continue")


def test_files_that_are_not_in_git_are_not_overwritten(service, upgrade):
    write(service, {"local": "ours\n"})
    with pytest.raises(CommandError, match="files that are not in git: local: commit or rename"):
        upgrade()
    assert (service / "local").read_text() == "ours\n"
    assert git(service, "status", "--porcelain") == ""


def test_untracked_files_are_found_whatever_git_shows(service, upgrade):
    git(service, "config", "status.showUntrackedFiles", "no")
    write(service, {"note": "ours\n"})
    with pytest.raises(CommandError, match=r"changes: .*note: commit them first"):
        upgrade()


@pytest.mark.parametrize("setting", ["core.autocrlf=true", "core.fileMode=false"])
def test_upgrade_of_a_clone_with_settings_for_windows(service, upgrade, setting):
    """Its files have other line breaks or modes than those in git."""
    git(service, "config", *setting.split("="))
    git(service, "rm", "-r", "--cached", "--quiet", ".")
    git(service, "reset", "--hard", "--quiet")
    if setting == "core.fileMode=false":
        (service / "example" / "models.py").chmod(0o777)
    else:
        assert b"\r\n" in (service / "run").read_bytes()
    upgrade()
    assert "line three" in (service / "example" / "models.py").read_text()
    assert git(service, "ls-files", "--eol", "--stage", "example/api.py").startswith("100644 ")


def test_committed_line_breaks_of_windows_are_no_conflicts(service, upgrade):
    with (service / "example" / "models.py").open("w", newline="\r\n") as models:
        models.write(LINES.replace("line 15", "our line 15"))
    commit(service)
    upgrade()
    text = (service / "example" / "models.py").read_text()
    assert "line three" in text
    assert "our line 15" in text


@pytest.mark.parametrize("branch", [True, False])
def test_bundle_of_a_detached_shallow_clone_with_hooks_and_signing(
    service, upgrade, tmp_path, settings, branch
):
    commit(service)
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", "--depth=1", f"file://{service.parents[1]}", str(clone))
    settings.BASE_DIR = clone / "services" / "rooms"
    git(clone, "config", "commit.gpgSign", "true")
    git(clone, "config", "user.signingKey", "none")
    git(clone, "config", "log.showSignature", "true")
    hook = clone / ".git" / "hooks" / "pre-commit"
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    if not branch:
        git(clone, "switch", "--quiet", "--detach")
    upgrade("--bundle", str(tmp_path / "bundle"))
    assert git(clone, "log", "-1", "--format=%s", upgrades.BRANCH) == "Template 2.0.0 → 2.10.0"
    git(service, "fetch", "--quiet", str(tmp_path / "bundle" / "upgrade.bundle"), upgrades.BRANCH)


def test_renamed_package_gets_changes_and_new_files(service, tmp_path):
    git(service, "mv", "example", "rooms")
    commit(service)
    new = FILES | {
        "example/models.py": LINES.replace("line 3\n", "line three\n"),
        "example/api.py": "new\n",
    }
    found = merge(tmp_path, FILES, new)
    assert (found.conflicts, found.lost, found.kept) == ([], [], [])
    assert "line three" in (service / "rooms" / "models.py").read_text()
    assert (service / "rooms" / "api.py").read_text() == "new\n"
    assert not (service / "example").exists()


def test_what_cannot_be_merged_is_listed(service, tmp_path):
    edited = LINES.replace("line 3\n", "our line\n")
    git(service, "rm", "--quiet", "run")
    commit(service, {"example/models.py": edited, "example/views.py": "ours\n" + LINES})
    new = {"example/models.py": LINES.replace("line 3\n", "their line\n"), "run": "b\n", "skip": ""}
    found = merge(tmp_path, FILES, new, skipped=["skip"])
    assert found.conflicts == ["example/models.py"]
    assert found.lost == ["run"]
    assert found.kept == ["example/views.py"]
    assert not (service / "run").exists()
    assert not (service / "skip").exists()
    assert (service / "example" / "views.py").read_text().startswith("ours\n")
    assert upgrades.has_markers("example/models.py")
    # The same upgrade of the same commit is the same, also in another year.
    marked = (service / "example" / "models.py").read_text()
    git(service, "reset", "--quiet", "--hard")
    merge(tmp_path / "again", FILES, new, skipped=["skip"])
    assert (service / "example" / "models.py").read_text() == marked


def test_nothing_is_merged_twice(service, tmp_path):
    assert merge(tmp_path, FILES, FILES).conflicts == []
    assert git(service, "status", "--porcelain") == ""


def test_a_release_is_found_in_the_history(service, template):
    first = git(template, "rev-parse", "2.0.0")
    commit(service, {".cruft.json": json.dumps(record(template, first))})
    last = commit(service, {"note": ""})
    later = record(template, git(template, "rev-parse", "2.10.0"), "2.10.0")
    commit(service, {".cruft.json": json.dumps(later)})
    assert git(service, "rev-parse", upgrades.find_start("2.0.0")) == last
    assert upgrades.find_start("main~1") == last
    assert upgrades.read_state(last).version == "2.0.0"
    with pytest.raises(CommandError, match=r"no commit of the service has version 1\.0\.0"):
        upgrades.find_start("1.0.0")


def test_notes_are_sorted_by_what_is_left_to_do():
    assert release_notes.sort_notes(CHANGELOG, "2.0.0") == (
        "## Do this\n\n"
        "- Copy a\n  file.\n"
        "- A setting has another name. *Generated service:* rename it."
        " *Project with `add_settings()`:* the same.\n\n"
        "## Good to know\n\n"
        "- A table, `settings.py` too. `migrate` adds it.\n\n"
        "## Done for you\n\n"
        "Pages:\n\n- It is faster.\n"
        "- A page.\n"
        "- A view is faster."
    )
    assert release_notes.sort_notes(CHANGELOG, "2.2.0") == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["brokers=redis"], "brokers=redis: write NAME=VALUE with one of: broker, project_slug"),
        (["redis"], "redis: write NAME=VALUE"),
        (["project_slug=rooms"], "project_slug cannot be changed: rename the package yourself"),
        (["broker=rabbitmq"], "these are the answers that the service has already"),
    ],
)
def test_answers_that_cannot_be_changed(service, arguments, message):
    answers = {"broker": "rabbitmq", "project_slug": "example", "_version": "2.0.0"}
    found = record("gone", "a" * 40) | {"context": {"cookiecutter": answers}}
    commit(service, {".cruft.json": json.dumps(found)})
    with pytest.raises(CommandError, match=message):
        call_command("change", *arguments)
