from django.apps import AppConfig
from django.conf import settings


class ServiceConfig(AppConfig):
    name = "{{ cookiecutter.project_slug }}"
    verbose_name = settings.SITE_NAME
    default_auto_field = "django.db.models.BigAutoField"
