"""``python manage.py upgrade``: upgrade the service to the newest release of its template."""

import os
import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management import CommandError
from django.core.management.base import BaseCommand

from ...console import upgrades
from ...console.release_notes import sort_notes

#: The weekly workflow of 2.0 pushes over commits of others, and may not push workflow files.
OLD_WORKFLOW = (
    "this workflow is that of an earlier release. Run this command, and commit and push what it "
    "changes: uv run manage.py upgrade --workflows --no-tests"
)


class Command(BaseCommand):
    """Merge the template's changes since the recorded version, and report them.

    The newest release of the template is used, that is, its highest tag such as ``2.1.0``. Both
    versions are rendered, which runs the template's code: the address and the commit are printed
    first, and an address that has changed since the last upgrade must be confirmed.

    The report is Markdown: conflicts, changes to files that the service does not have, the notes of
    the new releases, new migrations, new and removed environment variables, and the results of the
    tests and of the checks of production. Nothing is committed, unless ``--bundle`` is given, and no
    database is changed. Exits with status 1 if the working tree has changes, the template cannot be
    read, there are conflicts, changes cannot be placed, or the tests fail.
    """

    help = "Upgrade the service to the newest release of its template, and report what changed."
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument(
            "--continue",
            action="store_true",
            dest="go_on",
            help="Report the rest, after you have resolved the conflicts or repaired the tests.",
        )
        parser.add_argument(
            "--report",
            metavar="FROM",
            help="Do not upgrade; report what changed since a release of the template such as "
            "2.0.0, or since a commit or branch of the service. (A name that ends in .md is a file "
            "to write the report of an upgrade to, as in 2.0.)",
        )
        parser.add_argument(
            "--template",
            metavar="URL",
            help="Use the template at another address from now on, and do not ask about it.",
        )
        parser.add_argument(
            "--to",
            metavar="REVISION",
            help="A tag, branch or commit instead of the newest release.",
        )
        parser.add_argument(
            "--workflows",
            action="store_true",
            help="Only add the changes to .github/workflows that the weekly pull request left out.",
        )
        parser.add_argument(
            "--bundle",
            type=Path,
            metavar="FOLDER",
            help="Commit the upgrade, and write it and the report to a new folder.",
        )
        parser.add_argument("--no-tests", action="store_true", help="Do not run the tests.")

    @upgrades.explain_interrupt()
    def handle(self, *args: Any, **options: Any) -> None:
        """Upgrade, and print the report."""
        uv = upgrades.find_uv()
        start, file = options["report"] or "", None
        if start.endswith(".md"):
            start, file = "", Path(start)
            if os.environ.get("GITHUB_WORKFLOW") == "Upgrade":
                raise CommandError(OLD_WORKFLOW)
        if start or options["go_on"]:
            merged = self.describe(start) if start else self.go_on()
        else:
            found = self.upgrade(uv, options)
            if found is None:
                return
            merged = found
        if not options["no_tests"] and not merged.conflicts:
            self.say("Running the tests ...")
        passed, report = upgrades.build_report(uv, merged, with_tests=not options["no_tests"])
        self.stdout.write(report)
        if file:
            file.write_text(report)
        if options["bundle"]:
            self.write_bundle(options["bundle"], merged, report)
        elif not passed or merged.conflicts:
            sys.exit(1)

    def say(self, text: str) -> None:
        """Print a line at once."""
        self.stdout.write(text)
        self.stdout.flush()

    def upgrade(self, uv: str, options: dict[str, Any]) -> upgrades.Merge | None:
        """Merge the newest release; return None if there is nothing to merge."""
        upgrades.require_clean_tree()
        record = upgrades.read_record()
        address = upgrades.choose_address(record, options["template"])
        version = record["context"]["cookiecutter"]["_version"]
        self.say(f"Template: {address}")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            template = upgrades.Template(address, folder / "template")
            old = template.find_commit(record)
            if options["workflows"]:
                return self.merge_workflows(template, uv, record, folder)
            new, target = template.find_target(options["to"])
            moved = {"template": address, "commit": old}
            upgrades.git("config", "--local", upgrades.KNOWN, address)
            upgrades.git("config", "--local", upgrades.CHECKED, str(int(time.time())))
            if old == new or (options["to"] is None and template.contains(old, new)):
                if any(record[key] != value for key, value in moved.items()):
                    upgrades.write_record(record | moved)
                    self.say(f"{upgrades.RECORD} names the template now; commit it")
                self.say(f"The template is up to date ({version})")
                return None
            self.say(f"Upgrade: {version}, commit {old[:12]} → {target}, commit {new[:12]}")
            versions = [(old, record), (new, record)]
            before, after = upgrades.render_both(template, uv, versions, folder)
            answers = upgrades.read_answers(after, record, address)
            skipped, later = upgrades.read_skipped(record), answers["_version"]
            notes = sort_notes(template.read_changelog(new), version)
            later_record = record | {"template": address, "commit": new}
            later_record["context"] = {"cookiecutter": answers}
            with upgrades.undo_if_interrupted():
                merged = upgrades.merge(before, after, skipped, later)
                upgrades.write_record(later_record)
                merged.title, merged.notes = f"Template {version} → {later}", notes
                merged.save()
        return merged

    def merge_workflows(
        self, template: upgrades.Template, uv: str, record: dict[str, Any], folder: Path
    ) -> upgrades.Merge:
        """Merge the changes of the last upgrade to workflow files."""
        commits = upgrades.git("log", "--format=%H", "--", upgrades.RECORD).splitlines()
        earlier = next(
            (
                found
                for found in map(upgrades.read_committed_record, commits)
                if upgrades.is_earlier(found, record)
            ),
            None,
        )
        if earlier is None:
            raise CommandError("no earlier version of the template is in the history")
        versions = [(earlier["commit"], earlier), (record["commit"], record)]
        before, after = upgrades.render_both(template, uv, versions, folder)
        for service in (before, after):
            for path in upgrades.list_files(service):
                if not path.startswith(".github/workflows/"):
                    (service / path).unlink()
        with upgrades.undo_if_interrupted():
            merged = upgrades.merge(before, after, upgrades.read_skipped(record), "workflows")
            merged.title = "Workflows"
            merged.save()
        return merged

    def go_on(self) -> upgrades.Merge:
        """Return the upgrade that was not reported completely, or raise CommandError."""
        merged = upgrades.Merge.load()
        schema = upgrades.get_schema()
        left = [path for path in merged.conflicts if upgrades.has_markers(path) and path != schema]
        if left:
            raise CommandError(f"conflicts are left in {', '.join(left)}")
        if merged.conflicts:
            upgrades.git("add", "--all")
        merged.conflicts = [path for path in merged.conflicts if path == schema]
        return merged

    def describe(self, start: str) -> upgrades.Merge:
        """Return what changed since a version or a commit, as an upgrade without conflicts."""
        base, record = upgrades.find_start(start), upgrades.read_record()
        before, after = upgrades.read_version(base), upgrades.read_state().version
        if before is None:
            raise CommandError(f"{upgrades.RECORD} is not in {start}")
        address = upgrades.choose_address(record, None)
        with tempfile.TemporaryDirectory() as folder:
            template = upgrades.Template(address, Path(folder, "template"))
            changelog = template.read_changelog(template.find_commit(record))
        title = f"Template {before} → {after}"
        return upgrades.Merge(base, title, sort_notes(changelog, before))

    def write_bundle(self, folder: Path, merged: upgrades.Merge, report: str) -> None:
        """Commit the upgrade, and write commit and report for the job that proposes it."""
        folder.mkdir(parents=True)
        upgrades.git("add", "--all")
        commit = ["git", "commit", "--quiet", "--no-verify", "--no-gpg-sign", "--message", merged.title]
        upgrades.run(commit, upgrades.IDENTITY)
        upgrades.git("branch", "--force", upgrades.BRANCH)
        bundle = str((folder / "upgrade.bundle").resolve())
        upgrades.git("bundle", "create", "--quiet", bundle, f"{merged.base}..{upgrades.BRANCH}")
        (folder / "report.md").write_text(report)
