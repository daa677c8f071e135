"""Schedules that cannot run: the form refuses them at the field, beat marks them once."""

import json
from datetime import timedelta
from importlib.util import find_spec

import create_rows
import pytest
import random_rows
from celery import current_app, shared_task
from django.urls import reverse
from django.utils import timezone
from django_celery_beat.models import (
    CrontabSchedule,
    IntervalSchedule,
    PeriodicTask,
    SolarSchedule,
)
from kombu import Exchange, Queue
from kombu.exceptions import OperationalError

from prodserver_ops.console import schedule_forms
from prodserver_ops.mail.tasks import DIGEST_TASKS, digest_task
from prodserver_ops.models import ScheduleRun
from prodserver_ops.scheduling import heartbeats, validation
from prodserver_ops.scheduling import scheduler as module

pytestmark = pytest.mark.django_db

#: How many random rows a test makes, and with which seed; trials/rows.py makes 10,000.
ROWS, SEED = 300, 23


#: What the form says of headers that RabbitMQ cannot carry.
UNFIT = "Contains a name, a number or a type that a message cannot have."


@shared_task(name="ops-test.report")
def report(period, *, copies=1):
    pass


@digest_task
def send_sample(frequency):
    return frequency


@pytest.fixture
def post(client, make_user):
    """Return a function that posts the form of a new schedule, and returns its errors by field."""
    client.force_login(make_user("admin", is_superuser=True, is_staff=True))
    hourly = IntervalSchedule.objects.create(every=1, period="hours")

    def post(**fields):
        data = {
            "name": "sample",
            "regtask": report.name,
            "enabled": "on",
            "interval": hourly.pk,
            "args": '["daily"]',
            "kwargs": "{}",
            "headers": "{}",
        }
        url = reverse("admin:django_celery_beat_periodictask_add")
        response = client.post(url, data | fields)
        if response.status_code == 302:
            return {}
        return {name: list(texts) for name, texts in response.context["adminform"].errors.items()}

    return post


def test_good_row_is_accepted(post):
    headers = json.dumps({"a": [1, 2.5, None, True, {"b": "\u00fc"}], "c": 2**63 - 1})
    assert post(queue="dummy.mail", priority="5", expire_seconds="60", headers=headers) == {}


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("headers", "[]", "Must be JSON such as {}."),
        ("headers", '"x"', "Must be JSON such as {}."),
        ("headers", "[", "Is not valid JSON: JSONDecodeError."),
        ("headers", '{"a": [NaN]}', "Must not contain NaN or Infinity."),
        ("headers", '{"a": 9223372036854775808}', UNFIT),
        ("headers", json.dumps({"a" * 256: 1}), UNFIT),
        ("headers", '{"a": {"__type__": "date", "__value__": "2030-01-31"}}', UNFIT),
        ("headers", f'{{"a": {"[" * 900}1{"]" * 900}}}', "Has too many levels."),
        ("headers", '{"task": "x", "id": 1}', "Must not contain what Celery sets: id, task."),
        ("headers", json.dumps({"a": "x" * 9999}), "Must have at most 10000 characters."),
        ("args", "[", "Is not valid JSON: JSONDecodeError."),
        ("args", '[{"__type__": "uuid", "__value__": "x"}]', "Is not valid JSON: TypeError."),
        ("args", "{}", 'Must be JSON such as ["daily"].'),
        ("kwargs", "[1]", "Must be JSON such as {}."),
        ("args", "[]", "Does not fit the task: missing a required argument: 'period'."),
        ("args", "[1, 2]", "Does not fit the task: too many positional arguments."),
        (
            "kwargs",
            '{"sheets": 2}',
            "Does not fit the task: got an unexpected keyword argument 'sheets'.",
        ),
        ("queue", "reports", "Is read by no worker; the queues are: dummy, dummy.mail."),
        ("routing_key", "x", "Needs the name of the queue."),
        ("exchange", "x", "Needs the name of the queue."),
        ("args", "[" * 50_000 + "]" * 50_000, "Has too many levels."),
        ("kwargs", '{"a":' * 50_000 + "1" + "}" * 50_000, "Has too many levels."),
        ("headers", '{"a":' * 50_000 + "1" + "}" * 50_000, None),
        ("expire_seconds", "4000000000", None),
        ("priority", "256", None),
    ],
)
def test_faulty_field_is_refused_with_the_reason(post, field, value, error):
    errors = post(**{field: value})
    assert list(errors) == [field]
    if error:
        assert errors[field] == [error]


@pytest.mark.parametrize("field", ["exchange", "routing_key"])
def test_message_that_leads_to_no_queue_is_refused(post, field, settings):
    """RabbitMQ drops it, or closes the connection."""
    queue = settings.CELERY_TASK_QUEUES[0]
    own = queue.exchange.name if field == "exchange" else queue.routing_key
    error = f"Is not that of the queue: {own}."
    assert post(queue=queue.name, **{field: "other"}) == {field: [error]}
    row = PeriodicTask(queue=queue.name, **{field: "other"})
    with pytest.raises(validation.InvalidSchedule, match="is not that of the queue"):
        validation.check_message(row)
    assert post(queue=queue.name, **{field: own}) == {}


def test_routing_key_of_a_pattern_is_accepted(settings):
    exchange = Exchange("reports", "topic")
    settings.CELERY_TASK_QUEUES = [Queue("reports", exchange, "report.*")]
    row = PeriodicTask(queue="reports", exchange="reports", routing_key="report.daily")
    validation.check_message(row)


def test_arguments_of_a_digest_are_those_of_its_function(post):
    assert DIGEST_TASKS.pop(send_sample.name)
    error = "Does not fit the task: too many positional arguments."
    assert post(regtask=send_sample.name, args='["daily", 2]') == {"args": [error]}
    assert post(regtask=send_sample.name) == {}


def test_solar_schedule_without_its_package_is_refused(post):
    solar = SolarSchedule.objects.create(event="sunset", latitude=52, longitude=4)
    assert find_spec("ephem") is None
    (error,) = post(interval="", solar=solar.pk).pop("solar")
    assert error.startswith("Cannot be used: You need to install the ephem library")


def test_json_that_names_a_type_is_refused_if_the_value_does_not_fit(post):
    document = '{"a": {"__type__": "decimal", "__value__": "x"}}'
    assert list(post(headers=document)) == ["headers"]


def test_task_that_no_code_has_is_refused(post):
    assert list(post(regtask="", task="ops-test.gone")) == ["task"]


@pytest.mark.parametrize("task", ["", "a\0", "x" * 201])
def test_task_that_is_no_name_is_refused(post, task):
    assert "task" in post(regtask="", task=task)


def test_crontab_that_never_comes_is_refused_in_one_sentence(post):
    never = CrontabSchedule.objects.create(minute="0", day_of_month="31", month_of_year="2")
    (error,) = post(interval="", crontab=never.pk).pop("crontab")
    assert error.endswith("'2'.")


@pytest.mark.parametrize("field", ["kwargs", "headers"])
def test_json_may_be_left_out(post, field):
    assert post(**{field: ""}) == {}


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (
            "crontabschedule",
            {"minute": "0", "hour": "0", "day_of_month": "31", "month_of_year": "2"},
        ),
        (
            "crontabschedule",
            {"minute": "61", "hour": "0", "day_of_month": "*", "month_of_year": "*"},
        ),
        ("intervalschedule", {"every": "1", "period": "microseconds"}),
        ("intervalschedule", {"every": "2147483647", "period": "days"}),
    ],
)
def test_timing_that_cannot_be_used_is_refused(client, make_user, model, fields):
    client.force_login(make_user("admin", is_superuser=True, is_staff=True))
    url = reverse(f"admin:django_celery_beat_{model}_add")
    response = client.post(url, {"day_of_week": "*", "timezone": "UTC"} | fields)
    assert response.status_code == 200
    assert response.context["adminform"].errors


def as_fields(name, moment):
    """Return the two fields of a form for a time."""
    local = timezone.localtime(moment)
    return {f"{name}_0": f"{local:%Y-%m-%d}", f"{name}_1": f"{local:%H:%M:%S}"}


def test_expiry_after_which_no_run_is_left_is_refused(post):
    now, hour = timezone.now(), timedelta(hours=1)
    past = as_fields("expires", now - hour)
    assert post(**past) == {"expires": ["Is in the past."]}
    start = as_fields("start_time", now + 2 * hour)
    assert post(**as_fields("expires", now + hour), **start) == {
        "expires": ["Is before the start."]
    }
    assert post(**as_fields("expires", now + 3 * hour), **start) == {}
    # A schedule that has expired, and is disabled, can be edited.
    assert post(name="expired", enabled="", **past) == {}


class TestRunNow:
    """The action of the list: a schedule that cannot run was a status 500."""

    @pytest.fixture
    def run_now(self, client, make_user):
        """Return a function that runs a schedule, and returns what the page says."""
        client.force_login(make_user("admin", is_superuser=True, is_staff=True))
        url = reverse("admin:django_celery_beat_periodictask_changelist")
        hourly = IntervalSchedule.objects.create(every=1, period="hours")

        def run_now(**fields):
            row = PeriodicTask.objects.create(name="sample", task=report.name, interval=hourly)
            PeriodicTask.objects.filter(pk=row.pk).update(**({"args": '["daily"]'} | fields))
            data = {"action": "run_tasks", "_selected_action": [row.pk]}
            (message,) = client.post(url, data, follow=True).context["messages"]
            return str(message)

        return run_now

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({}, "1 "),
            ({"enabled": False}, "1 "),
            ({"args": "["}, "sample cannot run: args is not valid JSON: JSONDecodeError."),
            ({"args": "{}"}, 'sample cannot run: args must be JSON such as ["daily"].'),
            ({"args": "[1, 2]"}, "sample cannot run: args does not fit the task: too many"),
            ({"queue": "nowhere"}, "sample cannot run: queue is read by no worker; the queues"),
        ],
    )
    def test_says_why_it_cannot(self, run_now, fields, said):
        assert run_now(**fields).startswith(said)

    def test_broker_that_is_unavailable_is_no_error(self, run_now, monkeypatch):
        def fail(*args, **kwargs):
            raise OperationalError

        monkeypatch.setattr(type(report._get_current_object()), "apply_async", fail)
        assert run_now().startswith("The broker is unavailable")


class TestTwoAdministrators:
    """Saving a form that was opened before another change must not undo that change."""

    @pytest.fixture
    def row(self):
        hourly = IntervalSchedule.objects.create(every=1, period="hours")
        return PeriodicTask.objects.create(
            name="sample", task=report.name, args='["daily"]', interval=hourly
        )

    @pytest.fixture
    def open_form(self, client, make_user, row):
        """Return a function that opens the form, and returns one that saves it."""
        client.force_login(make_user("admin", is_superuser=True, is_staff=True))
        url = reverse("admin:django_celery_beat_periodictask_change", args=[row.pk])

        def open_form():
            form = client.get(url).context["adminform"].form
            values = {name: form[name].value() for name in form.fields}
            # The fields that a browser sends
            data = {name: value for name, value in values.items() if value not in (None, False)}

            def save(**fields):
                response = client.post(url, data | fields)
                if response.status_code == 302:
                    return {}
                return response.context["adminform"].errors

            return save

        return open_form

    def test_second_form_is_refused_until_it_is_opened_again(self, open_form, row):
        ann, bob = open_form(), open_form()
        assert ann(enabled="") == {}
        assert bob(description="x") == {"__all__": [schedule_forms.CHANGED]}
        row.refresh_from_db()
        assert (row.enabled, row.description) == (False, "")
        assert open_form()(description="x") == {}
        row.refresh_from_db()
        assert (row.enabled, row.description) == (False, "x")

    def test_one_off_schedule_that_has_run_is_not_enabled_again(self, open_form, row):
        PeriodicTask.objects.update(one_off=True)
        ann = open_form()
        PeriodicTask.objects.update(enabled=False, last_run_at=timezone.now())
        assert ann(description="x") == {"__all__": [schedule_forms.CHANGED]}

    def test_run_in_between_is_no_change(self, open_form, row):
        ann = open_form()
        PeriodicTask.objects.update(last_run_at=timezone.now(), total_run_count=7)
        assert ann(description="x") == {}
        row.refresh_from_db()
        assert row.total_run_count == 7

    def test_field_is_hidden(self, client, open_form, row):
        open_form()
        url = reverse("admin:django_celery_beat_periodictask_change", args=[row.pk])
        assert '<input type="hidden" name="opened"' in client.get(url).content.decode()


def test_rows_with_any_value_in_any_field_do_not_stop_beat(monkeypatch, caplog):
    PeriodicTask.objects.all().delete()
    monkeypatch.setattr(heartbeats, "record", lambda process: None)
    caplog.set_level("ERROR")
    create_rows.create(random_rows.make_rows(ROWS, SEED, report.name, '["daily"]'))
    good = PeriodicTask.objects.filter(name__startswith="good")
    due = timezone.now() - timedelta(minutes=2)
    good.update(date_changed=due, last_run_at=due)
    scheduler = module.Scheduler(app=current_app, max_interval=5)
    for _ in range(3):
        scheduler.run_pass()
    runs = ScheduleRun.objects.filter(schedule__in=good, published_at__isnull=False)
    assert runs.values("schedule").distinct().count() == good.count() > 0
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(set(messages)) > 0
    assert not any(record.exc_info for record in caplog.records)
    # What doctor and the page say of each row
    assert not any(map(validation.find_problems, good))
    rest = PeriodicTask.objects.exclude(pk__in=good)
    faulty = [row.name for row in rest if validation.find_problems(row)]
    named = {row.name for row in rest if any(f"Schedule {row.name} " in text for text in messages)}
    assert 0 < len(named) <= len(faulty)
    assert named <= set(faulty)
