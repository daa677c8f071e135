"""Private APIs of other packages that this library uses, overrides or replaces.

They may change in any release of their packages. ``library/tests/test_patches.py`` fails if one
has changed, or if a use is not listed here.
"""

from dataclasses import dataclass

#: Called or read without changes.
USES = "uses"

#: Extended: a method of a subclass that calls the original one, or a class that refers to another.
OVERRIDES = "overrides"

#: No longer run, or only in part: the library has its own implementation.
REPLACES = "replaces"


@dataclass(frozen=True)
class Patch:
    """Names of another package, and what this library does with them.

    ``names`` are relative to ``owner``, a package, a module or a class. The value of each name is
    its signature, without the values of defaults, or "" if it is not a function. If the library
    depends on the implementation of a function, the first digits of a hash of its source follow.
    ``where`` lists the modules of this library, and ``request`` is the URL of an open issue or pull
    request that may make the patch unnecessary.
    """

    owner: str
    how: str
    where: str
    why: str
    names: dict[str, str]
    request: str = "none"


PATCHES = (
    Patch(
        "amqp",
        OVERRIDES,
        "broker.rabbitmq",
        "RabbitMQ may never reply, so each wait has a timeout. TLS verifies the name of the server. "
        "A task that takes longer than RabbitMQ allows does not end its worker.",
        {
            "abstract_channel.AbstractChannel.wait": "(self, method, callback=..., timeout=..., returns_tuple=...) 063f9143",
            "channel.Channel.basic_publish_confirm": "(self, *args, **kwargs) 1edc1240",
            "channel.Channel.events": "",
            "channel.Channel._on_close": "(self, reply_code, reply_text, class_id, method_id) 29362440",
            "connection.Connection.__init__": "(self, host=..., userid=..., password=..., login_method=...,... 62e249e2",
            "connection.Connection.collect": "(self) 47fafe17",
            "connection.Connection.frame_writer": "(self)",
            "channel.Channel._basic_publish": "(self, msg, exchange=..., routing_key=..., mandatory=..., im... f5c2bb68",
            "method_framing.frame_writer": "(connection, transport, pack=..., pack_into=..., range=..., ... c1e7ef12",
            "abstract_channel.AbstractChannel.connection": "",
            "connection.Connection.ssl": "",
            "connection.Connection.host": "",
            "transport.SSLTransport._wrap_socket_sni": "(self, sock, keyfile=..., certfile=..., server_side=..., cer... 2f704622",
        },
    ),
    Patch(
        "kombu.transport.pyamqp",
        OVERRIDES,
        "broker.rabbitmq",
        "Connections and channels have these timeouts.",
        {"Connection.Channel": "", "Transport.Connection": ""},
    ),
    Patch(
        "kombu.messaging.Producer",
        OVERRIDES,
        "broker.rabbitmq",
        "Publish many messages before the first is confirmed.",
        {
            "__init__": "(self, channel, exchange=..., routing_key=..., serializer=..... 174d8b2d",
            "publish": "(self, body, routing_key=..., delivery_mode=..., mandatory=.... 1e5fb9bf",
            "channel": "(self)",
        },
    ),
    Patch(
        "kombu.transport",
        USES,
        "broker",
        "URLs use the transports of this library.",
        {"TRANSPORT_ALIASES": ""},
    ),
    Patch(
        "kombu.transport.virtual.base",
        OVERRIDES,
        "broker.embedded broker.postgresql broker.redis broker.renewal",
        "A worker stops promptly, and returns its messages. Replies find their queue. What a worker holds is renewed.",
        {
            "Channel.__init__": "(self, connection, **kwargs)",
            "Channel._lookup": "(self, exchange, routing_key, default=...) 49e6b691",
            "Channel.qos": "(self)",
            "Transport.drain_events": "(self, connection, timeout=...) 286977bd",
            "Transport.polling_interval": "",
            "Transport.channels": "",
            "Channel._qos": "",
            "QoS.__init__": "(self, channel, prefetch_count=...)",
            "QoS.append": "(self, message, delivery_tag) 42d214b4",
            "QoS.channel": "",
            "QoS._delivered": "",
            "QoS._dirty": "",
            "QoS.restore_at_shutdown": "",
            "Message._raw": "",
        },
    ),
    Patch(
        "kombu.transport.filesystem",
        REPLACES,
        "broker.embedded",
        "A file is complete before it is visible, and no write of two processes is lost.",
        {
            "Channel._put": "(self, queue, payload, **kwargs) b2437893",
            "Channel._get": "(self, queue) 3d9f10c2",
            "Channel._queue_bind": "(self, exchange, routing_key, pattern, queue) 1516f7a3",
            "Channel._exchange_file": "(self, exchange)",
            "Channel.data_folder_in": "(self)",
            "Channel.data_folder_out": "(self)",
            "Channel.control_folder": "(self)",
            "Transport.Channel": "",
        },
    ),
    Patch(
        "kombu.transport.redis",
        REPLACES,
        "broker.redis",
        "What a worker holds is renewed, by the clock of the server and in keys of the service.",
        {
            "QoS.append": "(self, message, delivery_tag) 73e981d7",
            "QoS.visibility_timeout": "(self)",
            "QoS.restore_visible": "(self, start=..., num=..., interval=...) 972d9f70",
            "QoS.restore_by_tag": "(self, tag, client=..., leftmost=...) c28c1a1b",
            "QoS.pipe_or_acquire": "(self, pipe=..., client=...)",
            "QoS.unacked_key": "(self)",
            "QoS.unacked_index_key": "(self)",
            "QoS.unacked_mutex_key": "(self)",
            "Channel.QoS": "",
            "Channel._lookup": "(self, exchange, routing_key, default=...)",
            "Channel.conn_or_acquire": "(self, client=...)",
            "Channel.active_queues": "(self)",
            "Transport.Channel": "",
            "Transport.register_with_event_loop": "(self, connection, loop) 43ba5672",
        },
    ),
    Patch(
        "kombu.transport.pgmq",
        REPLACES,
        "broker.postgresql",
        "TLS and quoted values in the address, long names of queues, and a pool that ends at once.",
        {
            "Channel.__init__": "(self, *args, **kwargs)",
            "Channel.entity_name": "(self, name, table=...) bd90b0b7",
            "Channel._maybe_enable_notify": "(self, queue, queue_name=...) 13c0c64f",
            "Channel._pgmq_send_kwargs": "(self, message) 26bba901",
            "Channel.QoS": "",
            "Transport.Channel": "",
            "Transport.drain_events": "(self, connection, timeout=...) 18475f52",
            "Transport._create_pgmq_client": "(self) e1483898",
            "Transport._get_notify_waiter": "(self) 17461a58",
            "Transport.close_connection": "(self, connection) 71b74189",
            "Transport._pgmq_client": "",
            "Transport._notify_waiter": "",
            "Transport.client": "",
            "_NotifyWaiter.__init__": "(self, dsn)",
        },
    ),
    Patch(
        "pgmq",
        USES,
        "broker.postgresql",
        "PGMQ with that pool, without a server extension.",
        {"queue.PGMQueue": "", "install.get_embedded_install_sql": "()"},
    ),
    Patch(
        "psycopg.Connection",
        REPLACES,
        "core.database",
        "A server that hangs does not enforce its timeout, so the client limits its wait.",
        {"wait": "(self, gen, interval=..., timeout=...) 2c1b3980"},
    ),
    Patch(
        "celery.app.base.Celery",
        OVERRIDES,
        "worker.app",
        "A URL from the environment passes the same checks as the setting.",
        {"_connection": "(self, url, userid=..., password=..., virtual_host=..., port... d5357f23"},
        "https://github.com/celery/celery/issues/4284",
    ),
    Patch(
        "celery.app",
        OVERRIDES,
        "worker.app",
        "A failed worker has an exit status, and a retry without a broker loses no message.",
        {
            "base.Celery.start": "(self, argv=...) 431773f8",
            "base.Celery.Beat": "(self, **kwargs) ff2d9e6b",
            "base.Celery.task_cls": "",
            "base.Celery.subclass_with_self": "(self, Class, name=..., attribute=..., reverse=..., keep_red... dda5181f",
            "task.Task.retry": "(self, args=..., kwargs=..., exc=..., throw=..., eta=..., co... be678e39",
            "amqp.Queues.new_missing": "(self, name) 4d7f7fd5",
        },
    ),
    Patch(
        "celery.contrib.django.task.DjangoTask",
        OVERRIDES,
        "worker.app",
        "A request whose transaction is committed does not fail if the broker is unavailable.",
        {"delay_on_commit": "(self, *args, **kwargs) cfdc039b"},
    ),
    Patch(
        "celery.bin",
        USES,
        "worker.app",
        "Run commands without importing Celery's full command line.",
        {
            "base.CLIContext.__init__": "(self, app, no_color, workdir, quiet=...)",
            "worker.worker": "",
            "beat.beat": "",
        },
    ),
    Patch(
        "celery.bin.celery",
        USES,
        "web.flower",
        "Flower is a plugin of Celery's full command line.",
        {"celery": ""},
    ),
    Patch(
        "celery.worker",
        REPLACES,
        "worker.app worker.consumer worker.failed",
        "The message of an unknown task returns to its queue instead of being discarded. One that was "
        "delivered too often is moved. A wrong queue ends the worker with one line.",
        {
            "state.active_requests": "",
            "consumer.consumer.Consumer.on_unknown_task": "(self, body, message, exc) e1b21bae",
            "consumer.consumer.Consumer.create_task_handler": "(self, promise=...) b11d189d",
            "consumer.consumer.Consumer.start": "(self) 9ae90a1c",
            "consumer.consumer.Consumer.channel_errors": "",
            "consumer.consumer.Consumer.timer": "",
            "consumer.consumer.Consumer.app": "",
        },
    ),
    Patch(
        "celery.apps.beat.Beat",
        OVERRIDES,
        "scheduling.beat",
        "Beat stops between two passes, and logs through Django's handlers.",
        {
            "Service": "",
            "install_sync_handler": "(self, service) e656af35",
            "start_scheduler": "(self) 319f8661",
            "setup_logging": "(self, colorize=...)",
        },
    ),
    Patch(
        "celery.beat.Service",
        OVERRIDES,
        "scheduling.beat",
        "A SystemExit that is raised in a query can get lost.",
        {
            "start": "(self, embedded_process=...) b06f6fb3",
            "scheduler": "(self)",
            "_is_shutdown": "",
        },
    ),
    Patch(
        "celery.beat.Scheduler",
        REPLACES,
        "scheduling.scheduler",
        "Several beats work, and a run is stored before it is published.",
        {
            "__init__": "(self, app, schedule=..., max_interval=..., Producer=..., la... 4fa9f5a6",
            "setup_schedule": "(self)",
            "tick": "(self, event_t=..., min=..., heappop=..., heappush=...) 91f0969b",
            "apply_async": "(self, entry, producer=..., advance=..., **kwargs) 89f143cf",
            "apply_entry": "(self, entry, producer=...) fd3603b1",
            "producer": "(self)",
            "max_interval": "",
            "app": "",
        },
        "https://github.com/celery/celery/issues/1495",
    ),
    Patch(
        "celery.beat",
        USES,
        "scheduling.scheduler",
        "Publish a run, and find out why that failed.",
        {
            "ScheduleEntry.__init__": "(self, name=..., task=..., last_run_at=..., total_run_count=... 0236b102",
            "SchedulingError": "",
        },
    ),
    Patch(
        "celery.schedules",
        REPLACES,
        "scheduling.crontabs",
        "Celery parses the fields; the library computes due times, because the clock may change.",
        {
            "crontab.__init__": "(self, minute=..., hour=..., day_of_week=..., day_of_month=.... 5eb05acb",
            "crontab.remaining_delta": "(self, last_run_at, tz=..., ffwd=...) 95ebbbc5",
            "ParseException": "",
        },
        "https://github.com/celery/celery/issues/10107",
    ),
    Patch(
        "celery.utils.log.LoggingProxy",
        USES,
        "core.logs",
        "Printed output is logged.",
        {"__init__": "(self, logger, loglevel=...)"},
    ),
    Patch(
        "sentry_sdk.integrations.celery.beat",
        USES,
        "scheduling.scheduler",
        "They replace Scheduler.apply_entry, which must therefore publish all runs.",
        {
            "_patch_beat_apply_entry": "() 8167d93f",
            "_wrap_beat_scheduler": "(original_function) 705a834b",
        },
    ),
    Patch(
        "django_celery_beat",
        REPLACES,
        "scheduling.scheduler",
        "Several beats may run, and each pass reads the schedules.",
        {
            "schedulers.DatabaseScheduler.__init__": "(self, *args, **kwargs)",
            "schedulers.DatabaseScheduler.setup_schedule": "(self) 3d050562",
            "models.PeriodicTask.scheduler": "(self)",
            "models.PeriodicTask.schedule": "(self)",
            "models.PeriodicTask.expires_": "(self)",
        },
        "https://github.com/celery/django-celery-beat/issues/337",
    ),
    Patch(
        "django_prodserver.management.base.BaseProcessCommand",
        OVERRIDES,
        "management.commands.prodserver management.commands.server management.commands.worker",
        "Logs, --reload, and errors that name the processes.",
        {
            "add_arguments": "(self, parser) 52b779ec",
            "list_process_names": "(self)",
            "start_process": "(self, process_name, *args, **kwargs) fe371447",
            "process_label": "",
            "backend_base_class": "",
        },
    ),
    Patch(
        "django_prodserver.backends",
        REPLACES,
        "web.flower web.gunicorn worker.app console.processes scheduling.heartbeats",
        "Flower's password is not an argument; the others start what this library configures.",
        {
            "servers.flower.CeleryFlower.start_server": "(self, *args) 94047df1",
            "servers.gunicorn.GunicornServer.start_server": "(self, *args) 9b62f697",
            "workers.celery.CeleryWorker.start_server": "(self, *args) cd7556fc",
            "workers.celery.CeleryBeat.start_server": "(self, *args) e64e360d",
        },
    ),
    Patch(
        "flower.command",
        USES,
        "web.flower",
        "It reads FLOWER_BASIC_AUTH.",
        {"apply_env_options": "() be3247b8"},
    ),
    Patch(
        "gunicorn.workers.gthread.ThreadWorker",
        OVERRIDES,
        "web.gunicorn_worker",
        "An exiting worker accepts the waiting connections, instead of resetting them.",
        {
            "__init__": "(self, *args, **kwargs)",
            "init_process": "(self)",
            "run": "(self) 7843d111",
            "set_accept_enabled": "(self, enabled) 3e6737d8",
        },
        "https://github.com/benoitc/gunicorn/pull/3612",
    ),
    Patch(
        "gunicorn.workers",
        REPLACES,
        "web.gunicorn_worker",
        "Health checks have their own threads, and silent connections have none.",
        {
            "gthread.ThreadWorker.accept": "(self, listener) 62992d15",
            "gthread.ThreadWorker.enqueue_req": "(self, conn) 1627cea3",
            "gthread.ThreadWorker.handle": "(self, conn)",
            "gthread.ThreadWorker.finish_request": "(self, conn, fs) e8786e0b",
            "gthread.ThreadWorker.on_pending_socket_readable": "(self, conn, client) 99608ce2",
            "gthread.ThreadWorker.method_queue": "",
            "gthread.ThreadWorker.nr_conns": "",
            "gthread.ThreadWorker.pending_conns": "",
            "gthread.ThreadWorker.poller": "",
            "gthread.ThreadWorker.tpool": "",
            "gthread.TConn.__init__": "(self, cfg, sock, client, server) 565cbe34",
            "gthread.TConn.timeout": "",
            "gthread.TConn.sock": "",
            "base.Worker.init_signals": "(self) 7bd21e3d",
            "base.Worker.load_wsgi": "(self)",
            "base.Worker.alive": "",
            "base.Worker.cfg": "",
            "base.Worker.sockets": "",
        },
    ),
    Patch(
        "gunicorn.arbiter.Arbiter",
        USES,
        "web.gunicorn_worker",
        "Contains the signals that arrive between fork and init_signals.",
        {"SIG_QUEUE": "", "signal": "(self, sig, frame) e1f5d431"},
    ),
    Patch(
        "gunicorn",
        OVERRIDES,
        "web.gunicorn",
        "Events go to the handlers of LOGGING, and arguments are checked before the start.",
        {
            "glogging.Logger.setup": "(self, cfg) ca528641",
            "glogging.Logger.error_log": "",
            "config.Config.parser": "(self)",
            "config.Config.set": "(self, name, value)",
            "config.Config.worker_class_str": "(self)",
            "util.load_class": "(uri, default=..., section=...)",
            "util.parse_address": "(netloc, default_port=...)",
        },
    ),
    Patch(
        "granian",
        USES,
        "web.granian",
        "Check arguments before the start; log_dictconfig leaves logging unchanged.",
        {
            "Granian.__init__": "(self, target, address=..., port=..., uds=..., uds_permissio... 5293d6c8",
            "log.LogLevels": "",
        },
    ),
    Patch(
        "cbs",
        REPLACES,
        "conf.environment",
        "All errors at once; each names the variable and what is expected, without secrets.",
        {
            "env.env.__get__": "(self, obj, cls=...) e6e3fd1b",
            "env.env.env_name": "(self)",
            "env.env.getter": "",
            "env.env.cast": "",
            "env.env.default": "",
            "env.env.Required": "",
            "settings.BaseSettings.use": "(cls, default=..., env=...) 9c264931",
            "settings.BaseSettings.get_settings_instance": "(cls, default=..., env=...) 9cb15f09",
            "cast.as_bool": "(value)",
            "cast.as_list": "(value)",
            "urls.parse_dburl": "(url)",
        },
    ),
    Patch(
        "csp.middleware",
        OVERRIDES,
        "web.csp",
        "The policy comes from the setting of Django 6.",
        {
            "CSPMiddleware.get_policy_parts": "(self, request, response, report_only=...) 797a4ebd",
            "PolicyParts": "",
        },
    ),
    Patch(
        "django.contrib.auth",
        REPLACES,
        "web.logins",
        "Each password that is checked passes the limits, whatever the backends of the project.",
        {
            "_get_compatible_backends": "(request, **credentials) 3bf898ca",
            "authenticate": "(request=..., **credentials) d598d0a1",
            "aauthenticate": "(request=..., **credentials) 6037cff0",
        },
    ),
    Patch(
        "django.core.mail.message.EmailMessage",
        OVERRIDES,
        "mail.composing",
        "Links in headers stay on one line.",
        {"message": "(self, *, policy=...)"},
    ),
    Patch(
        "django.contrib.auth.forms.AuthenticationForm",
        OVERRIDES,
        "web.logins",
        "It says when the login is locked.",
        {"get_invalid_login_error": "(self) 1164aabe"},
    ),
    Patch(
        "django.db.migrations",
        USES,
        "console.adoption console.checks console.doctor console.migration_safety management.commands.schedules scheduling.operations",
        "Find unapplied migrations, and what migrations create.",
        {
            "executor.MigrationExecutor.migration_plan": "(self, targets, clean_start=...)",
            "executor.MigrationExecutor.apply_migration": "(self, state, migration, fake=..., fake_initial=...)",
            "loader.MigrationLoader.build_graph": "(self)",
            "loader.MigrationLoader.project_state": "(self, nodes=..., at_end=...)",
        },
    ),
    Patch(
        "django.db.backends.base",
        USES,
        "console.adoption core.database mail.deliveries worker.record",
        "Connections outside of requests, and SQL that Django does not generate.",
        {
            "schema.BaseDatabaseSchemaEditor.effective_default": "(self, field)",
            "schema.BaseDatabaseSchemaEditor.quote_value": "(self, value)",
            "base.BaseDatabaseWrapper.close_if_unusable_or_obsolete": "(self) 08f200cf",
            "base.BaseDatabaseWrapper.get_connection_params": "(self)",
            "operations.BaseDatabaseOperations.adapt_datetimefield_value": "(self, value)",
        },
    ),
    Patch(
        "django.utils",
        USES,
        "core.logs web.asgi",
        "Connections are not shared between threads, and logging is configured once.",
        {
            "connection.BaseConnectionHandler.settings": "(self)",
            "log.configure_logging": "(logging_config, logging_settings)",
        },
    ),
    Patch(
        "django.core.checks",
        USES,
        "console.doctor",
        "Run the checks of manage.py check.",
        {"run_checks": "(self, app_configs=..., tags=..., include_deployment_checks=... b9ea93be"},
    ),
    Patch(
        "rest_framework",
        OVERRIDES,
        "api.throttles api.tokens api.views",
        "Counts do not depend on CACHES; tokens are hashed and expire; a forged cursor is a 404.",
        {
            "throttling.BaseThrottle.get_ident": "(self, request) 5f124c84",
            "throttling.SimpleRateThrottle.cache": "",
            "throttling.SimpleRateThrottle.allow_request": "(self, request, view) af512e80",
            "throttling.SimpleRateThrottle.wait": "(self) 0a874742",
            "throttling.SimpleRateThrottle.parse_rate": "(self, rate)",
            "throttling.UserRateThrottle.get_cache_key": "(self, request, view)",
            "pagination.CursorPagination.paginate_queryset": "(self, queryset, request, view=...) b4c342c2",
            "pagination.CursorPagination.invalid_cursor_message": "",
            "authentication.TokenAuthentication.authenticate_credentials": "(self, key) 8c99a08d",
        },
    ),
    Patch(
        "drf_spectacular.management.commands.spectacular.Command",
        USES,
        "api.openapi",
        "Return the schema as text.",
        {"handle": "(self, *args, **options)"},
    ),
    Patch(
        "email.headerregistry.HeaderRegistry",
        OVERRIDES,
        "mail.composing",
        "The original creates a class for each header of each message.",
        {"__getitem__": "(self, name) 243ad2d4"},
    ),
)
