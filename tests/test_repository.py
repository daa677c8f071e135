"""The files around the code, here and in a generated service: policies, updates, linting."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from tests.conftest import ROOT, get_tracked
from tests.test_answers import HOSTILE, plain

TEMPLATE = ROOT / "{{cookiecutter.project_slug}}"


@pytest.mark.parametrize(
    "name",
    """
    .github/dependabot.yml .pre-commit-config.yaml CHANGELOG.md CONTRIBUTING.md LICENSE README.md
    SECURITY.md docs/decisions.md
    """.split(),
)
def test_the_repository_has(name):
    assert (ROOT / name).read_text().strip()


def test_the_repository_declares_its_license():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "MIT"
    assert project["license-files"] == ["LICENSE"]


def test_no_file_names_a_package_index_or_a_path_of_this_machine():
    hosts = r"\b(pypi|pythonhosted|npmjs|crates)\.(org|com|io)\b"
    folders = "|".join(re.escape(f"{path}/") for path in (ROOT, Path.home()))
    # Not as a part of a longer path, such as one in /proc
    pattern = re.compile(rf"{hosts}|(?<![\w}}])({folders})", re.IGNORECASE)
    for path in get_tracked():
        found = pattern.search(path.read_text(errors="replace"))
        assert not found, f"{path.relative_to(ROOT)}: {found.group()}"


def test_relative_links_lead_to_files(default_project):
    for folder in (ROOT, default_project):
        documents = [*folder.glob("*.md"), *folder.glob("docs/*.md")]
        assert documents
        for document in documents:
            for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
                # GitHub's pages about a workflow are relative to the repository too.
                if page := re.match(
                    r"\.\./\.\./actions/workflows/([\w.]+?)(/badge\.svg)?$", target
                ):
                    target = f".github/workflows/{page[1]}"
                assert (document.parent / target).exists(), f"{document.name}: {target}"


# Workflows and updates


#: The jobs that may write; these run no code of others.
WRITERS = {
    ("ci.yml", "release"): {"contents": "write"},
    ("example.yml", "push"): {"contents": "write"},
    ("upgrade.yml", "pull-request"): {"contents": "write", "pull-requests": "write"},
    ("newest.yml", "issue"): {"issues": "write"},
    ("docs.yml", "publish"): {"pages": "write", "id-token": "write"},
}


def steps(folder):
    """Return the steps of all jobs of all workflows in the folder."""
    workflows = sorted(folder.glob(".github/workflows/*.yml"))
    assert workflows
    found = []
    for path in workflows:
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}, path
        for name, job in workflow["jobs"].items():
            assert job.get("permissions") == WRITERS.get((path.name, name)), path
            assert job["timeout-minutes"] <= 60, path
            found += job["steps"]
    return found


def test_only_a_push_to_main_is_released_after_all_tests():
    """A pull request, and a branch of a fork that is named main, cannot start it."""
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert {*jobs["release"]["needs"]} == jobs.keys() - {"release"}
    for condition in ("github.event_name == 'push'", "github.ref == 'refs/heads/main'"):
        assert condition in jobs["release"]["if"]
    texts = [path.read_text() for path in ROOT.glob(".github/workflows/*.yml")]
    assert not [text for text in texts if "workflow_run" in text or "pull_request_target" in text]


def test_tests_that_upgrade_have_the_whole_history():
    """The default is the last commit alone, without the releases."""
    complete = []
    for path in ROOT.glob(".github/workflows/*.yml"):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            commands = "\n".join(step.get("run", "") for step in job["steps"])
            if ".ci/run" in commands or "pytest -m long" in commands:
                complete.append(path.name)
                checkout = job["steps"][0]["with"]
                assert checkout.get("fetch-depth") == 0, path
    assert sorted(complete) == ["ci.yml", "long.yml"]


def test_the_workflow_lints():
    commands = [step.get("run") for step in steps(ROOT)]
    assert "uv run ruff check" in commands
    assert "uv run ruff format --check" in commands


def test_the_cheap_hooks_run_at_every_push():
    commands = [step.get("run", "") for step in steps(ROOT)]
    assert any(command.endswith("pre-commit run --all-files") for command in commands)


def updates(folder):
    """Return the ecosystems that Dependabot updates; fail where one is not weekly and grouped."""
    config = yaml.safe_load((folder / ".github" / "dependabot.yml").read_text())
    assert config["version"] == 2
    for update in config["updates"]:
        assert update["directory"] == "/"
        assert update["schedule"] == {"interval": "weekly"}
        assert update["groups"] == {"minor": {"update-types": ["minor", "patch"]}}
    return [update["package-ecosystem"] for update in config["updates"]]


def test_dependabot_updates_this_repository():
    assert updates(ROOT) == ["uv", "github-actions"]


@pytest.mark.parametrize(
    ("answers", "dockerfile"),
    [({}, False), ({"deploy": "dockerfile"}, True), ({"compose": True}, True)],
)
def test_dependabot_updates_images_where_there_is_a_dockerfile(bake, answers, dockerfile):
    """Without a Dockerfile the ecosystem is an error."""
    project = bake(**answers)
    assert (project / "Dockerfile").exists() is dockerfile
    expected = ["uv", "github-actions"] + ["docker"] * dockerfile
    assert updates(project) == expected + ["docker-compose"] * ("compose" in answers)
    config = yaml.safe_load((project / ".github" / "dependabot.yml").read_text())
    ignored = {update["package-ecosystem"]: update.get("ignore") for update in config["updates"]}
    python = {
        "dependency-name": "python",
        "update-types": ["version-update:semver-major", "version-update:semver-minor"],
    }
    database = {"dependency-name": "postgres", "update-types": ["version-update:semver-major"]}
    expected = {"docker": [python], "docker-compose": [python, database]}
    assert all(ignored[name] == expected.get(name) for name in ignored)


def test_actions_are_pinned_by_commit(bake):
    project = bake(deploy="dockerfile")
    for folder in (ROOT, project):
        workflows = [path.read_text() for path in (folder / ".github" / "workflows").iterdir()]
        actions = re.findall(r"uses: *(.*)", "\n".join(workflows))
        assert actions
        for action in actions:
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", action)


def actions(folder):
    """Return the version of each action that the workflows use."""
    used = [step["uses"].split("@") for step in steps(folder) if "uses" in step]
    versions = dict(used)
    assert sorted(versions.items()) == sorted({tuple(pair) for pair in used})
    return versions


def requirements(folder):
    """Return the version range of each development dependency."""
    groups = tomllib.loads((folder / "pyproject.toml").read_text())["dependency-groups"]
    return dict(re.fullmatch(r"([\w-]+\S*?\]?)([<>=].*)", line).groups() for line in groups["dev"])


def hooks(folder):
    """Return the version of each repository of pre-commit hooks."""
    config = yaml.safe_load((folder / ".pre-commit-config.yaml").read_text())
    return {repo["repo"]: repo["rev"] for repo in config["repos"] if "rev" in repo}


@pytest.mark.parametrize("versions", [actions, requirements, hooks])
def test_the_template_uses_the_versions_of_this_repository(bake, versions):
    """Dependabot reads the repository alone; this test carries its updates to the template."""
    own, generated = versions(ROOT), versions(bake(compose=True))
    shared = own.keys() & generated.keys()
    assert shared
    assert {name: own[name] for name in shared} == {name: generated[name] for name in shared}


# Security policies


def test_vulnerabilities_of_the_template_are_reported_on_github():
    policy = (ROOT / "SECURITY.md").read_text()
    assert "private vulnerability reporting" in policy
    assert "@" not in policy


@pytest.mark.parametrize(
    "address", ["you@example.com", "o'brien+x@example.com", "_*a*_`@x.example"]
)
def test_vulnerabilities_of_a_service_are_reported_to_its_author(bake, address):
    policy = (bake(author_email=address) / "SECURITY.md").read_text()
    inlines = [token for token in MarkdownIt("commonmark").parse(policy) if token.children]
    texts = [
        child.content
        for inline in inlines
        for before, child in zip(inline.children, inline.children[1:], strict=False)
        if before.type == "link_open"
    ]
    assert texts == [address]


@pytest.mark.parametrize("text", HOSTILE)
def test_the_policy_of_a_service_has_its_name_as_typed(bake, text):
    policy = (bake(project_name=text, project_slug="service") / "SECURITY.md").read_text()
    inlines = [token for token in MarkdownIt("commonmark").parse(policy) if token.type == "inline"]
    last = " ".join(plain(inlines[-1]).split())
    assert last.startswith(f"This policy covers the code of {' '.join(text.split())}. ")


def test_next_release_is_sorted_by_what_it_means_for_a_service():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    text = changelog.partition("## [Unreleased]\n")[2].partition("\n## [")[0]
    headings = re.findall(r"^### (.*)$", text, re.M)
    assert headings == [
        name for name in ("Do this", "Good to know", "Done for you") if name in headings
    ]
    assert "*Generated" not in text
