"""A small project for the tests of the library."""

from .celery import app as celery_app

__all__ = ["celery_app"]
