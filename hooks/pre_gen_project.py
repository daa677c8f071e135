"""Validate every answer again, because a replay file may have been edited by hand."""
# {{ cookiecutter | check_all }}
