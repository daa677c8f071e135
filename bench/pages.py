"""Measure each page of the admin and the API of a generated service with large tables.

    uv run bench/pages.py [ROWS]

Generates the default service and fills a PostgreSQL database (127.0.0.1:5432, user postgres,
trust) with ROWS submissions, deliveries and entries of the admin's history, 1,000,000 unless
given, and a tenth as many users. Follows the links of the admin's lists, filters, orders and
pages, searches, and reads the API. Prints the median of three requests for each page, its
number of queries, and the most rows that one step of a query plan read. Exits with status 1
if a page takes longer than 300 ms, or a plan reads more than 150,000 rows.
"""

import json
import os
import re
import sys

from digest import generate_service

ROWS = 1_000_000

#: The longest time of a page, in milliseconds.
LIMIT_MS = 300

#: The most rows that a step of a query plan may read: the users may all be read.
LIMIT_ROWS = 150_000


def main(rows):
    """Generate the service, fill its database and print the table of pages."""
    with generate_service() as service, service.database():
        service.python("manage.py", "collectstatic", "--noinput", "-v0")
        pages = json.loads(service.python(__file__, "measure", str(rows)))
    print(f"{'ms':>6}  {'queries':>7}  {'plan rows':>9}  page")
    for page in pages:
        print("{ms:>6.0f}  {queries:>7}  {rows:>9}  {url}".format(**page))
    slow = [page for page in pages if page["ms"] > LIMIT_MS or page["rows"] > LIMIT_ROWS]
    slowest = max(page["ms"] for page in pages)
    print(f"{len(pages)} pages, the slowest {slowest:.0f} ms (limit {LIMIT_MS} ms)")
    return f"{len(slow)} pages are over the limit" if slow else None


# The functions below run in the environment of the generated service.

CREATE_DATA = """
INSERT INTO {users} (
    username, email, password, first_name, last_name, is_superuser, is_staff, is_active,
    date_joined, digest_frequency, notify_on_response
)
SELECT 'user' || n, 'user' || n || '@example.com', '', 'First', 'Last', false, n < 20, true,
    now() - n * interval '1 minute', 'daily', true
FROM generate_series(1, {rows} / 10) AS n;
INSERT INTO {submissions} (
    author_id, body, created_at, expires_at, approved_at, flagged_at, archived_at, response,
    answered_at
)
SELECT 1 + n %% ({rows} / 10), 'Please remember us, ' || md5(n::text) || '.', moment,
    CASE WHEN n %% 10 = 1 THEN moment + interval '7 days' END,
    CASE WHEN n %% 10 < 6 THEN moment END,
    CASE WHEN n %% 1000 = 7 THEN moment END,
    CASE WHEN n %% 100 = 2 THEN moment END,
    CASE WHEN n %% 10 = 8 THEN 'We do.' ELSE '' END,
    CASE WHEN n %% 10 = 8 THEN moment END
FROM (
    SELECT n, now() - ({rows} - n) * interval '1 minute' AS moment
    FROM generate_series(1, {rows}) AS n
) AS numbers;
INSERT INTO {deliveries} (digest, recipient_id, period_end, status, reason, created_at)
SELECT CASE WHEN n %% 5000 = 0 THEN 'moderator' ELSE 'daily' END, 1 + n %% ({rows} / 10),
    now() - (n / ({rows} / 10)) * interval '1 day',
    CASE WHEN n %% 10000 = 0 THEN 'failed' ELSE 'sent' END, '', now()
FROM generate_series(0, {rows} - 1) AS n;
INSERT INTO django_admin_log (
    action_time, object_id, object_repr, action_flag, change_message, content_type_id, user_id
)
SELECT now() - n * interval '1 minute', n::text, 'A submission', 2, 'Approved.',
    (SELECT id FROM django_content_type WHERE model = 'submission'), 1 + n %% 10
FROM generate_series(1, {rows}) AS n;
"""

#: Pages that no link of the admin leads to. The first user, 1, is a moderator.
PAGES = [
    "/",
    "/api/docs/",
    "/api/schema/",
    "/api/submissions/",
    "/api/submissions/1/",
    "/api/submissions/{middle}/",
    "/api/submissions/mine/",
    "/api/submissions/mine/?include_archived=false",
    "/admin/{label}/submission/?q=remember",
    "/admin/{label}/submission/?q=nothing",
    "/admin/{label}/submission/?status=all&q=nothing",
    "/admin/{label}/submission/?status=all&q=user77@example.com",
    "/admin/{label}/user/?q=nothing",
    "/admin/{label}/user/?q=user77",
    "/admin/ops/digestdelivery/?q=nothing",
    "/admin/ops/digestdelivery/?q=user77",
]


def measure(rows):
    """Fill the database, visit the pages as a superuser, and print the results as JSON."""
    import django

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "prayer_room_api.settings")
    django.setup()
    from django.db import connection
    from django.test import Client
    from prayer_room_api.models import Submission, User
    from prodserver_ops.models import DigestDelivery
    from rest_framework.settings import api_settings

    api_settings.DEFAULT_THROTTLE_CLASSES.clear()
    tables = {
        "users": User._meta.db_table,
        "submissions": Submission._meta.db_table,
        "deliveries": DigestDelivery._meta.db_table,
    }
    with connection.cursor() as cursor:
        for statement in CREATE_DATA.split(";\n")[:-1]:
            cursor.execute(statement.format(rows=rows, **tables), ())
            print(f"{cursor.rowcount:,} rows", file=sys.stderr, flush=True)
        cursor.execute("VACUUM ANALYZE")
    User.objects.filter(pk=1).update(is_superuser=True, is_staff=True)
    client = Client(headers={"host": "prayer-room-api.example.com"})
    client.defaults |= {"HTTP_X_FORWARDED_PROTO": "https", "wsgi.url_scheme": "https"}
    client.force_login(User.objects.get(pk=1))
    label, middle = Submission._meta.app_label, rows // 2
    todo = ["/admin/", *(page.format(label=label, middle=middle) for page in PAGES)]
    results, seen = [], set()
    while todo:
        url = todo.pop(0)
        shape = re.sub(r"\d+", "0", re.sub(r"cursor=[^&]*", "cursor=", url))
        # One page of each kind: /1/change/ and /2/change/ are alike, orders are not.
        if (shape in seen and "?o=" not in url) or url in seen or "logout" in url:
            continue
        seen |= {shape, url}
        text, result = visit(client, url)
        results.append(result)
        if url.startswith("/admin/"):
            todo += links(url, text)
        elif text.startswith("{") and (more := json.loads(text).get("next")):
            todo.append(re.sub(r"^https?://[^/]*", "", more))
    print(json.dumps(sorted(results, key=lambda result: -result["ms"])))


def links(url, text):
    """Return the addresses that a page of the admin links to."""
    path = url.partition("?")[0]
    found = [each.replace("&amp;", "&") for each in re.findall(r'href="([^"#]+)"', text)]
    # A page that was opened from a filtered list is the same page.
    found = [re.sub(r"[?&]_changelist_filters=[^&]*", "", each) for each in found]
    # From a filtered list, no further filters: their number grows with each step.
    if "?" in url:
        found = [each for each in found if not each.startswith("?") or each.startswith("?p=")]
    return [
        path + each if each.startswith("?") else each
        for each in found
        if each.startswith(("?", "/admin/"))
    ]


def visit(client, url):
    """Return the text of a page, and its measurements."""
    import statistics
    import time

    from django.db import connection
    from django.test.utils import CaptureQueriesContext

    times = []
    for _ in range(3):
        start = time.perf_counter()
        response = client.get(url)
        text = response.text
        times.append((time.perf_counter() - start) * 1000)
    if response.status_code not in (200, 302):
        sys.exit(f"{url}: status {response.status_code}")
    with CaptureQueriesContext(connection) as queries:
        client.get(url)
    selects = [query["sql"] for query in queries if query["sql"].startswith("SELECT")]
    most = max(map(rows_read, selects), default=0)
    result = {"url": url, "ms": statistics.median(times), "queries": len(queries), "rows": most}
    print(f"{result['ms']:>6.0f} ms  {url}", file=sys.stderr, flush=True)
    return text, result


def rows_read(sql):
    """Return the most rows that a step of the query's plan read, whether it kept them or not."""
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {sql}".replace("%", "%%"), ())
        (plan,) = json.loads(json.dumps(cursor.fetchone()[0]))

    def walk(step):
        removed = sum(value for name, value in step.items() if name.startswith("Rows Removed"))
        yield (step["Actual Rows"] + removed) * step["Actual Loops"]
        for child in step.get("Plans", []):
            yield from walk(child)

    return int(max(walk(plan["Plan"])))


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(int(sys.argv[2]))
    else:
        sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else ROWS))
