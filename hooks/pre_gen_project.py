"""Check every answer once more, for a replay file that was written by hand."""
# {{ cookiecutter | check_all }}
