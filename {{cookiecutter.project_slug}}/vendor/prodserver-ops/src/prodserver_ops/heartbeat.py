"""``python -m prodserver_ops.heartbeat PROCESS``: report whether a process runs on this host.

It looks for a recent file of the process, which must have the same ``BASE_DIR`` as the current
folder, and the same user. It imports no other module of the service, so that health checks of
containers cost little. ``manage.py heartbeat`` reads the heartbeats in the database instead.
"""

import os
import stat
import sys
import time
import zlib
from contextlib import suppress

#: Age in seconds from which a process counts as not running; that of heartbeats in the database.
MAX_AGE = 60

#: A file system in memory, which is writable if others are read-only or full.
MEMORY = "/dev/shm"


def get_base() -> str:
    """Return the folder for temporary files; that in memory if the file system is read-only."""
    base = os.environ.get("TMPDIR") or "/tmp"
    return base if os.access(base, os.W_OK) else MEMORY


def get_folder() -> str:
    """Return the folder of the files of this user. Raise OSError if it belongs to another."""
    folder = os.path.join(get_base(), f"prodserver-{os.getuid()}")
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        status = os.lstat(folder)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise
    return folder


def get_suffix(base: str | os.PathLike[str]) -> str:
    """Return what follows the name of a process in the name of its file, before its number."""
    return f".{zlib.crc32(os.path.realpath(base).encode()):08x}."


def touch(process: str, base: str | os.PathLike[str]) -> None:
    """Note that this process is running."""
    path = os.path.join(get_folder(), f"{process}{get_suffix(base)}{os.getpid()}")
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600))
    os.utime(path)


def remove_all(base: str | os.PathLike[str]) -> None:
    """Note that this process ends, whatever its name."""
    with suppress(OSError):
        folder, suffix = get_folder(), f"{get_suffix(base)}{os.getpid()}"
        for name in os.listdir(folder):
            if name.endswith(suffix):
                os.unlink(os.path.join(folder, name))


def get_age(process: str, base: str | os.PathLike[str]) -> float | None:
    """Return how many seconds ago a process was running, the last one if there are several."""
    folder, start = get_folder(), f"{process}{get_suffix(base)}"
    times = []
    for name in os.listdir(folder):
        if name.startswith(start):
            with suppress(FileNotFoundError):  # The process has just ended.
                times.append(os.lstat(os.path.join(folder, name)).st_mtime)
    return time.time() - max(times) if times else None


def main() -> int:
    """Print the age of the newest file; return the exit status, 0 if it is recent."""
    if len(sys.argv) != 2:
        print("usage: python -m prodserver_ops.heartbeat PROCESS", file=sys.stderr)
        return 2
    process, base = sys.argv[1], os.getcwd()
    age = get_age(process, base)
    if age is None:
        print(f"{process} in {base}: no heartbeat")
        return 1
    print(f"{process} in {base}: heartbeat {age:.0f} seconds ago")
    return 0 if age < MAX_AGE else 1


if __name__ == "__main__":
    sys.exit(main())
