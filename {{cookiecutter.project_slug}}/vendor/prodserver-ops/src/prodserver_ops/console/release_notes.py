"""Sort the entries of the template's changelog by what they mean for a service.

The headings of a release are those of the report. In 2.0 and earlier, an entry ends with
``*Generated service:*`` and what the service has to do: the report shows first what is left to do,
and for the rest one line for each entry.
"""

import re

#: The titles of the groups, in the order of the report.
DO_THIS, GOOD_TO_KNOW, DONE = "Do this", "Good to know", "Done for you"

#: What an entry says to services.
SERVICE = re.compile(r"\s*\*Generated\s+service:\*\s+(.*?)(?=\s*\*Project\b|\Z)", re.S)

#: The end of a sentence, which is not that of a name such as ``settings.py``.
SENTENCE = re.compile(r"(?<=\.)\s+(?=[A-Z`*\[])")

NOTHING = "nothing to do"

#: An action that the upgrade itself has done, such as "take `ops/` and `app.json`."
FILES = re.compile(r"take (`[^`]+`(,| and| if [\w ]+)? ?)+\.")


def get_newer(changelog: str, version: str) -> list[str]:
    """Return the sections of a changelog above the heading of a version."""
    sections = re.split(r"^(?=## \[)", changelog, flags=re.M)[1:]
    headings = [section.startswith(f"## [{version}]") for section in sections]
    return sections[: headings.index(True)] if True in headings else sections


def sort_notes(changelog: str, version: str) -> str:
    """Return the entries that are newer than a version as Markdown, in groups."""
    groups: dict[str, list[str]] = {DO_THIS: [], GOOD_TO_KNOW: [], DONE: []}
    for section in get_newer(changelog, version):
        for part in re.split(r"^(?=### )", section.partition("\n")[2], flags=re.M):
            heading = part.splitlines()[0] if part.startswith("### ") else ""
            blocks = re.split(r"^(?=- )", part.removeprefix(heading), flags=re.M)
            if (title := heading.removeprefix("### ")) in groups:
                groups[title] += [part.removeprefix(heading).strip()]
                continue
            if prose := blocks.pop(0).strip():
                # Instructions, such as the commands of a major release, are shown as a whole.
                groups[DO_THIS].append(f"\n#{heading}\n\n{prose}\n" if heading else prose)
            for block in blocks:
                group, text = _sort_entry(block.strip())
                groups[group].append(text)
    return "\n\n".join(
        f"## {title}\n\n" + "\n".join(items).strip() for title, items in groups.items() if items
    )


def _sort_entry(entry: str) -> tuple[str, str]:
    """Return the group of an entry, and what is shown of it."""
    text, found = SERVICE.sub("", entry, count=1), SERVICE.search(entry)
    action = " ".join(found[1].split()) if found else ""
    first = SENTENCE.split(" ".join(text.split()), maxsplit=1)[0]
    if FILES.fullmatch(action):
        return DONE, first
    if found and not action.startswith(NOTHING):
        # GitHub would show each line break.
        return DO_THIS, entry if "\n\n" in entry else " ".join(entry.split())
    rest = action.removeprefix(NOTHING).strip(" .,;")
    if rest.startswith("unless"):
        return GOOD_TO_KNOW, f"{first} Nothing to do, {rest}."
    if rest:
        return GOOD_TO_KNOW, f"{first} {rest[0].upper()}{rest[1:]}."
    return (DONE if found else GOOD_TO_KNOW), first
