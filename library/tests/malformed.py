"""Messages that no Celery client sends, from a grammar: one part of a valid message is replaced.

``make_kinds()`` returns the messages by name. Each has a body (bytes, in base64), a content type
and encoding, headers and properties, all of which fit into JSON.
"""

import base64
import json

#: Values that a header, a property or an item of the body may have instead of a valid one.
VALUES = {
    "null": None,
    "true": True,
    "zero": 0,
    "negative": -5,
    "huge": 2**62,
    "fraction": 1.5,
    "text": "abc",
    "empty": "",
    "long": "x" * 100_000,
    "nul": "a\0b",
    "surrogate": "a\ud800b",
    "newlines": "a\r\nERROR forged\n" * 3,
    "array": ["x"],
    "numbers": [1, 2, 3],
    "object": {"a": 1},
    "deep": json.loads("[" * 60 + "]" * 60),
    "far": "9999-12-31T23:59:59.999999-23:59",
    "date": "2026-02-30T25:61:00",
}

#: The headers of Celery's protocol 2, and those of this library.
HEADERS = [
    "task",
    "id",
    "lang",
    "shadow",
    "eta",
    "expires",
    "group",
    "group_index",
    "retries",
    "timelimit",
    "root_id",
    "parent_id",
    "argsrepr",
    "kwargsrepr",
    "origin",
    "ignore_result",
    "replaced_task_nesting",
    "stamped_headers",
    "stamps",
    "queued_at",
    "request_id",
    "schedule",
    "schedule_run",
    "schedule_attempt",
    "unknown_since",
    "unknown_from",
]

#: Headers that no client sends, but that would replace parts of Celery's request object.
FORGED_HEADERS = [
    "headers",
    "get",
    "update",
    "clear",
    "__dict__",
    "__class__",
    "_children",
    "properties",
    "delivery_info",
    "chord",
    "chain",
    "callbacks",
    "errbacks",
    "called_directly",
    "is_eager",
    "hostname",
    "args",
    "kwargs",
    "reply_to",
    "compression",
    "redelivered",
    "x-delivery-count",
    "x-death",
]

#: Properties of a message.
PROPERTIES = ["correlation_id", "reply_to", "priority"]

#: The third item of the body.
EMBED = ["callbacks", "errbacks", "chain", "chord"]

#: What the body may be instead of JSON for ``[args, kwargs, embed]``, and how it is described.
JSON = ("application/json", "utf-8")
BODIES = {
    "empty": (b"", *JSON),
    "not JSON": (b"{[", *JSON),
    "cut off": (b'[[1], {}, {"callba', *JSON),
    "bytes": (bytes(range(256)), *JSON),
    "object": (b'{"a": 1}', *JSON),
    "number": (b"5", *JSON),
    "null": (b"null", *JSON),
    "text": (b'"abc"', *JSON),
    "no items": (b"[]", *JSON),
    "two items": (b"[[], {}]", *JSON),
    "four items": (b"[[], {}, {}, {}]", *JSON),
    "args is an object": (b"[{}, {}, {}]", *JSON),
    "args is a number": (b"[5, {}, {}]", *JSON),
    "args is null": (b"[null, {}, {}]", *JSON),
    "kwargs is an array": (b"[[], [], {}]", *JSON),
    "kwargs is null": (b"[[], null, {}]", *JSON),
    "kwargs has an empty name": (b'[[], {"": 1}, {}]', *JSON),
    "kwargs has a NUL": (b'[[], {"\\u0000": 1}, {}]', *JSON),
    "args have a surrogate": (b'[["\\ud800"], {}, {}]', *JSON),
    "args have a NUL": (b'[["\\u0000"], {}, {}]', *JSON),
    "args are deep": (b"[" * 5_000 + b"]" * 5_000, *JSON),
    "args are very deep": (b"[[" + b"[" * 200_000 + b"]" * 200_000 + b"], {}, {}]", *JSON),
    "a number of 10,000 digits": (b"[[" + b"9" * 10_000 + b"], {}, {}]", *JSON),
    "NaN": (b"[[NaN, Infinity], {}, {}]", *JSON),
    "a megabyte": (b'[["' + b"x" * 2**20 + b'"], {}, {}]', *JSON),
    "embed is an array": (b"[[], {}, []]", *JSON),
    "embed is a text": (b'[[], {}, "x"]', *JSON),
    "embed is null": (b"[[], {}, null]", *JSON),
    "embed has other keys": (b'[[], {}, {"id": 5, "delivery_info": 5, "args": 5}]', *JSON),
    "kombu's own types": (b'[[{"__type__": "x", "__value__": 5}], {}, {}]', *JSON),
    "kombu's date": (b'[[{"__type__": "datetime", "__value__": "x"}], {}, {}]', *JSON),
    "protocol 1 in a body": (b'{"args": [], "kwargs": {}}', *JSON),
    "hybrid with other args": (b'{"args": 5, "kwargs": 5}', *JSON),
    "pickle": (b"\x80\x04K\x05.", "application/x-python-serialize", "binary"),
    "YAML": (b"- 5", "application/x-yaml", "utf-8"),
    "unknown content type": (b"[[], {}, {}]", "application/x-unknown", "utf-8"),
    "no content type": (b"[[], {}, {}]", None, None),
    "a content type with a NUL": (b"[[], {}, {}]", "a\0b", "utf-8"),
    "unknown encoding": (b"[[], {}, {}]", "application/json", "utf-99"),
    "an empty encoding": (b"[[], {}, {}]", "application/json", ""),
    "binary encoding": (b"[[], {}, {}]", "application/json", "binary"),
    "UTF-16": ('[["x"], {}, {}]'.encode("utf-16"), "application/json", "utf-16"),
    "UTF-7": (b"[[], {}, {}]", "application/json", "utf-7"),
    "raw data": (b"\xff\x00\xfe", "application/data", "binary"),
}

#: Messages of protocol 1, which have everything in the body, and no header.
PROTOCOL_1 = {
    "valid": {"args": [], "kwargs": {}},
    "no id": {"id": None},
    "id is an array": {"id": ["x"]},
    "task is an array": {"task": ["x"]},
    "task is an object": {"task": {}},
    "args is a number": {"args": 5},
    "kwargs is an array": {"kwargs": []},
    "eta is a number": {"eta": 5},
    "expires is a number": {"expires": 5},
    "retries is a text": {"retries": "x"},
    "timelimit is a text": {"timelimit": "x"},
    "callbacks is a number": {"callbacks": 5},
    "chord is a text": {"chord": "x"},
    "utc is a text": {"utc": "x"},
    "headers is a text": {"headers": "x"},
    "taskset is an object": {"taskset": {}},
}


def make_kinds(task):
    """Return the messages by name; ``task`` is the name of a task that accepts any arguments."""
    kinds = {}

    def add(name, body=None, description=JSON, headers=None, properties=None, without=()):
        identity = f"kind-{len(kinds)}"
        valid = {
            "task": task,
            "id": identity,
            "lang": "py",
            "root_id": identity,
            "retries": 0,
            "timelimit": [None, None],
            "argsrepr": "()",
            "kwargsrepr": "{}",
        }
        all_headers = {**valid, **(headers or {})}
        for header in without:
            del all_headers[header]
        if body is None:
            embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
            body = json.dumps([[name], {}, embed]).encode()
        kinds[name] = {
            "body": base64.b64encode(body).decode(),
            "content_type": description[0],
            "content_encoding": description[1],
            "headers": all_headers,
            "properties": {"correlation_id": identity, "delivery_mode": 2, **(properties or {})},
        }

    add("valid")
    for header in HEADERS + FORGED_HEADERS:
        for name, value in VALUES.items():
            add(f"{header} is {name}", headers={header: value})
    for header in ("id", "task"):
        add(f"no {header}", without=[header])
    add("timelimit is an array of texts", headers={"timelimit": ["x", "y"]})
    add("timelimit is one number", headers={"timelimit": [5]})
    add("timelimit is negative", headers={"timelimit": [-1, -1]})
    add("timelimit is endless", headers={"timelimit": [1e300, 1e300]})
    add("timelimit is nested", headers={"timelimit": [[5], {}]})
    add("compression is unknown", headers={"compression": "application/x-unknown"})
    add("compression is false", headers={"compression": "application/x-gzip"})
    add("unknown task", headers={"task": "trial.unknown"})
    add("unknown task without id", headers={"task": "trial.unknown"}, without=["id"])
    add("unknown task, since nonsense", headers={"task": "trial.unknown", "unknown_since": "abc"})
    add("unknown task, since NaN", headers={"task": "trial.unknown", "unknown_since": "nan"})
    add("stamps of another type", headers={"stamped_headers": ["x"], "stamps": "x"})
    add("1,000 headers", headers={f"header-{number}": number for number in range(1000)})
    for name in PROPERTIES:
        for value_name in ("text", "nul", "array", "object", "negative", "true"):
            value = VALUES[value_name]
            add(f"property {name} is {value_name}", properties={name: value})
    for name, (body, *description) in BODIES.items():
        add(f"body: {name}", body, description)
    for item in EMBED:
        for name, value in VALUES.items():
            add(f"{item} in the body is {name}", json.dumps([[], {}, {item: value}]).encode())
        for name, value in {
            "array of a signature without a task": [{"args": []}],
            "array of a signature of an array": [{"task": ["x"], "args": 5, "options": "x"}],
            "array of an unknown task": [{"task": "trial.unknown", "args": [], "options": {}}],
            "array of an unknown type": [{"task": task, "subtask_type": "x", "options": 5}],
        }.items():
            add(f"{item} in the body is {name}", json.dumps([[], {}, {item: value}]).encode())
    for name, change in PROTOCOL_1.items():
        message = {"task": task, "id": f"kind-{len(kinds)}", "args": [], "kwargs": {}, **change}
        body = json.dumps(message).encode()
        add(
            f"protocol 1: {name}",
            body,
            without=[
                "task",
                "id",
                "lang",
                "root_id",
                "retries",
                "timelimit",
                "argsrepr",
                "kwargsrepr",
            ],
        )
    return kinds


#: What the queue of a broker without properties of its own may contain instead of a message: Redis,
#: PGMQ and folders store JSON.
ENVELOPES = {
    "an object": {},
    "an array": [],
    "a number": 5,
    "a text": "abc",
    "null": None,
    "no properties": {"body": "", "headers": {}},
    "properties is a text": {"body": "", "properties": "x"},
    "no delivery_tag": {"body": "", "properties": {"delivery_info": {}}},
    "no delivery_info": {"body": "", "properties": {"delivery_tag": "x"}},
    "delivery_info is a text": {"properties": {"delivery_tag": "x", "delivery_info": "x"}},
    "delivery_tag is an array": {"properties": {"delivery_tag": ["x"], "delivery_info": {}}},
    "body is a number": {"body": 5, "properties": {"delivery_tag": "x", "delivery_info": {}}},
    "body is not base64": {
        "body": "!",
        "properties": {"delivery_tag": "x", "delivery_info": {}, "body_encoding": "base64"},
    },
    "unknown body_encoding": {
        "body": "abc",
        "properties": {"delivery_tag": "x", "delivery_info": {}, "body_encoding": "x"},
    },
    "headers is a text": {
        "body": "abc",
        "headers": "x",
        "properties": {"delivery_tag": "x", "delivery_info": {}},
    },
    "headers is an array": {
        "body": "abc",
        "headers": ["x"],
        "properties": {"delivery_tag": "x", "delivery_info": {}},
    },
}
