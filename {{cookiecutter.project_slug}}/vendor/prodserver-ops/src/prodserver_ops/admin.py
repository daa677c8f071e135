"""The admin of the app ``ops``, which Django finds here."""

from .console import admin as admin
