"""Settings: base classes for a class of settings, and a function for a plain module."""

from .defaults import (
    SCHEMA_CLASS,
    Defaults,
    ProductionDefaults,
    StagingDefaults,
    TestDefaults,
)
from .environment import env, use
from .plain import add_settings

__all__ = [
    "SCHEMA_CLASS",
    "Defaults",
    "ProductionDefaults",
    "StagingDefaults",
    "TestDefaults",
    "add_settings",
    "env",
    "use",
]
