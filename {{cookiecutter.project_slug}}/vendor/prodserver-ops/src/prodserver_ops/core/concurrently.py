"""Run functions at the same time, with one time limit for all."""

import time
from collections.abc import Callable, Mapping
from threading import Thread

from django.db import connections


def run[T](
    functions: Mapping[str, Callable[[], T]],
    seconds: float,
    running: dict[str, Thread] | None = None,
) -> dict[str, T | Exception]:
    """Run functions; return the results or exceptions of those that end in time, by name.

    ``running`` keeps the threads by name between calls: a function that is still running is not
    started again.
    """
    results: dict[str, T | Exception] = {}

    def run_one(name: str, function: Callable[[], T]) -> None:
        try:
            results[name] = function()
        except Exception as error:
            results[name] = error
        finally:
            connections.close_all()

    running = {} if running is None else running
    started = []
    deadline = time.monotonic() + seconds
    for name, function in functions.items():
        if name not in running or not running[name].is_alive():
            # A daemon thread does not keep the process alive.
            running[name] = Thread(target=run_one, args=(name, function), daemon=True)
            running[name].start()
            started.append(running[name])
    for thread in started:
        thread.join(max(0, deadline - time.monotonic()))
    return dict(results)
