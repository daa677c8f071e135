"""Redaction of secrets and personal data in logs, records of tasks, alerts and reports to Sentry.

These are replaced by ``***``, in linear time, whichever library writes the text:

- user names and passwords in URLs: ``scheme://user:password@host``
- query strings
- the values of names that contain one of ``SECRET_NAMES``, after ``=`` or ``:``, as in an assignment,
  a header, a dictionary or JSON
- tokens after ``Bearer``, ``Basic`` or ``Token``
- e-mail addresses, but not Celery's names of nodes, such as ``celery@host``
- the addresses of clients in messages of web servers
- the values of rows in error messages of PostgreSQL
- the rest of a path that starts with one of ``LOG_REDACTED_PATHS``

Other text is not recognized, such as a name of a person, or a password without a name.
"""

import re
import socket

from django.conf import settings

#: Parts of names whose values are secret. The case does not count.
SECRET_NAMES = (
    *("passw", "passphrase", "pwd", "secret", "token", "credential", "authorization", "cookie"),
    *("api_key", "api-key", "apikey", "access_key", "access-key", "private_key", "session_id"),
    *("sessionid", "session_key"),
)

_NAMES = "|".join(SECRET_NAMES)

#: Matches a name with a secret value.
SECRET_NAME = re.compile(_NAMES, re.IGNORECASE)

#: Patterns of secrets, each with its replacement. They take linear time: what they scan without a
#: match has a limited length.
REDACTIONS = [
    # Headers, up to the end of the line
    (
        re.compile(
            r"\b((?:http_)?(?:(?:proxy[_-])?authorization|(?:set[_-])?cookie)[ \t]{0,4}[:=][ \t]{0,4})"
            r"[^\s\"'][^\n]*",
            re.IGNORECASE,
        ),
        r"\1***",
    ),
    # Other values of secret names: in quotes, which may be escaped, or one word
    (
        re.compile(
            rf"((?:{_NAMES})"
            r"[\w-]{0,32}(?:\\{0,4}[\"'])?\]?[ \t]{0,4}[:=][ \t]{0,4})"
            r"(?:[\[({]{0,2}b?(?:"
            r'"(?:[^"\\\n]|\\.)*"?'
            r"|'(?:[^'\\\n]|\\.)*'?"
            r"|\\{1,4}[\"'](?:[^\"'\\\n]|\\+[^\"'\\])*(?:\\+[\"'])?"
            r")|(?!\*\*\*)(?:(?:Bearer|Basic|Digest|Token)[ \t]{1,4})?[^\s\"'&,;)}\]\\]+)",
            re.IGNORECASE,
        ),
        r"\1***",
    ),
    (re.compile(r"\b(Bearer|Basic|Token)[ \t]{1,4}[\w.~+/=-]{16,}", re.IGNORECASE), r"\1 ***"),
    # Query strings
    (re.compile(r"(?<=[\w/])\?[^\s'\"]+"), "?***"),
    # Client addresses in the messages of a web server
    (re.compile(r"\bip=\S+"), "ip=***"),
    # Values of a row in PostgreSQL's error messages, which may span several lines
    (re.compile(r"(?<=\)=)\(.*\)"), "(***)"),
    (re.compile(r"(?<=Failing row contains )\((?s:.*?)(?:\)\.?(?=\\n|\n|[\"']|$)|\Z)"), "(***)."),
]

#: Texts without any of these, in lower case, are not changed. This check is faster than the patterns.
SUSPICIOUS = ("@", "?", "%40", "ip=", "=(", "contains (", "bearer", "basic", *SECRET_NAMES)

#: The end of an e-mail address, and the characters before it from right to left.
DOMAIN = re.compile(r"(?:(?:@|%40)(?:[\w-]+(?:\.[\w-]+)*|\[[\w.:]+\]))+")
LOCAL_PART = re.compile(r"[\w.!#$%&'*+^`{|}~-]*")

#: Celery's names of nodes: on this host, or on a host whose name is no domain.
NODE = re.compile(rf"celery(?:beat)?@(?:[\w-]+|{re.escape(socket.gethostname())})")

SPACE = re.compile(r"\s")

#: A password in a URL that contains spaces: the user before it, but no host with a port.
USER = re.compile(r"[^\s/?#@:]*:(?!\d{1,5}(?:[^\w@]|$))")


def redact(text: str) -> str:
    """Return the text with secrets and personal data replaced by ``***``."""
    lower = text.lower()
    if any(part in lower for part in SUSPICIOUS):
        if "@" in text and "://" in text:
            text = "\n".join(map(redact_urls, text.split("\n")))
        for pattern, replacement in REDACTIONS:
            text = pattern.sub(replacement, text)
        text = redact_addresses(text)
    for path in settings.LOG_REDACTED_PATHS:
        if path in text:
            text = re.sub(rf"(?<={re.escape(path)})[^\s/'\"]+", "***", text)
    return text


def redact_urls(line: str) -> str:
    """Return a line with user names and passwords in URLs replaced."""
    parts, end = [], 0
    last = line.rfind("@")
    while 0 <= (start := line.find("://", end)) < last:
        start += len("://")
        parts.append(line[end:start])
        match = SPACE.search(line, start)
        end = match.start() if match else len(line)
        at = line.rfind("@", start, end)
        if at < 0 and USER.match(line, start) and start < last:
            at = line.find("@", end)
        if at >= 0:
            parts.append("***")
            end = at
        else:
            parts.append(line[start:end])
    return "".join([*parts, line[end:]])


def redact_addresses(text: str) -> str:
    """Return the text with e-mail addresses replaced."""
    parts, end = [], 0
    for match in DOMAIN.finditer(text):
        before = text[end : match.start()]
        end = match.end()
        start = len(before) - _count_local(before)
        local, address = before[start:], before[start:] + match[0]
        is_address = re.search(r"\w", local) and not NODE.fullmatch(address)
        parts += [before[:start], "***@***"] if is_address else [before, match[0]]
    return "".join([*parts, text[end:]])


def _count_local(text: str) -> int:
    """Return how many characters at the end of a text are the local part of an address."""
    if text.endswith('"'):
        start = text.rfind('"', 0, -1)
        return len(text) - start if start > text.rfind("\n") else 0
    match = LOCAL_PART.match(text[::-1])
    return match.end() if match else 0
