from django.apps import AppConfig
from django.conf import settings
from django.core.management import call_command
from django.db.models.signals import post_migrate


class ServiceConfig(AppConfig):
    name = "{{ cookiecutter.project_slug }}"
    verbose_name = settings.SITE_NAME
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self):
        from . import schedules  # noqa: F401  (registers its system check)

        post_migrate.connect(create_cache_tables, sender=self)
        if settings.SENTRY_DSN:
            from . import sentry

            sentry.start()


def create_cache_tables(using, **kwargs):
    """Create the tables of the caches, which Django has no migration for."""
    call_command("createcachetable", database=using, verbosity=0)
