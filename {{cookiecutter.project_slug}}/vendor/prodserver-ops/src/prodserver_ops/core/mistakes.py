"""``prodserver PROCESS --reload`` while the code or the settings of the service cannot be imported.

Django cannot load a command then. The process shows the error, and starts again when a Python file is
saved, so that it heals by itself and honcho keeps the other processes.
"""

import os
import socket
import sys
import threading
import traceback
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from django.apps import apps
from django.template import Context, Engine

TEMPLATES = Path(__file__).parent.parent / "templates"

#: How often to check whether the parent process is running, in milliseconds.
PARENT_INTERVAL = 500


def install(values: dict[str, Any] | None = None) -> None:
    """Wait for a change if the apps cannot be loaded.

    ``values`` are the settings by name, if they could be loaded.
    """
    if sys.argv[1:2] != ["prodserver"] or "--reload" not in sys.argv[3:]:
        return

    def report(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        sys.__excepthook__(kind, error, trace)
        if isinstance(error, Exception) and not apps.ready:
            with suppress(KeyboardInterrupt, ImportError):
                wait(sys.argv[2], "".join(traceback.format_exception(error)), values or guess())

    sys.excepthook = report


def guess() -> dict[str, Any]:
    """Return what the settings would be that are needed here, unless the service changes them."""
    base = Path(sys.argv[0]).resolve().parent
    return {
        "BASE_DIR": base,
        "VAR_DIR": os.environ.get("VAR_DIR") or base / "var",
        "DEBUG": not os.environ.get("DJANGO_MODE"),
        "BIND_HOST": os.environ.get("BIND_HOST") or "127.0.0.1",
        "PORT": int(os.environ.get("PORT") or 8000),
    }


def wait(name: str, output: str, values: dict[str, Any]) -> None:
    """Show an error until a Python file changes, and start this process again."""
    import watchfiles

    base = Path(values["BASE_DIR"])
    print(f"{name} starts when you save a Python file", file=sys.stderr, flush=True)
    path = Path(values["VAR_DIR"], "failures", f"{name}.txt")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(output)
    if name == "web" and values["DEBUG"]:
        serve((values["BIND_HOST"], values["PORT"]), name, output)
    parent = os.getppid()
    packages = [each.parent for each in base.glob("*/__init__.py")]
    for changes in watchfiles.watch(
        *packages,
        watch_filter=watchfiles.PythonFilter(),
        rust_timeout=PARENT_INTERVAL,
        yield_on_timeout=True,
    ):
        if os.getppid() != parent:
            return
        if changes:
            os.execv(sys.executable, [sys.executable, *sys.argv])


def get_family(address: tuple[str, int]) -> socket.AddressFamily:
    """Return the family of an address."""
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET


def serve(address: tuple[str, int], name: str, output: str) -> ThreadingHTTPServer | None:
    """Serve a page with the output of a process, with status 500, in another thread."""
    template = Engine(dirs=[str(TEMPLATES)]).get_template("ops/failure.html")
    page = template.render(Context({"name": name, "output": output})).encode()

    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            self.send_response(500)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(page)

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = respond

        def log_message(self, *args: Any) -> None:
            """Log nothing: the page reloads itself all the time."""

    class Server(ThreadingHTTPServer):
        address_family = get_family(address)
        daemon_threads = True

    try:
        server = Server(address, Handler)
    except OSError:
        return None  # The terminal shows the output.
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
    return server
