"""Play the first hour of a newcomer: each line with its second, and each command as it is printed.

    uv run trials/first_hour.py [--user NAME] [--warm] [--rate KILOBYTES] [--log FILE]

A clone of the working tree gets the README's first command, in a terminal, with an empty home folder and
without uv on the PATH; ``--warm`` plays it twice with the same cache, and the second time counts. ``--user``
runs it as an ordinary user, if the trial is started by root: that user must be able to read a Python of 3.12
or later on the PATH. ``--rate`` limits what an HTTPS proxy passes on, in KB per second. Then the trial runs what
the terminal, the home page and the documents of the service name, with the service running.

It fails if nothing is printed for more than 5 seconds before the first page, if that page takes more than a
minute (15 seconds with a warm cache), or if a command fails. It needs the network.
"""

import argparse
import html
import os
import pty
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent

#: The longest time without output, and until the first page without and with a warm cache, in seconds.
MAX_SILENCE = 5
MAX_FIRST_PAGE = {False: 60, True: 15}

#: How long a command may take, in seconds.
TIMEOUT = 300

PORT = 8000

#: What is typed, in this order: the name, address and password of the administrator.
PASSWORD = "the large hall"
ANSWERS = {
    "createsuperuser": f"admin\nadmin@example.com\n{PASSWORD}\n{PASSWORD}\n",
    "read -rs PASSWORD": f"{PASSWORD}\n",
}

#: Values for the words in capitals.
VALUES = {
    "add KIND NAME": "add task count_rooms",
    "-k NAME": "-k health",
    "forget USER": "forget admin --dry-run",
    "unlock NAME": "unlock admin",
}

#: Commands that this trial does not run, and why.
SKIPPED = {
    r"^(dokku|git (remote|push)|sudo|docker|systemctl)\b": "for a server; tests/test_deploy.py",
    r"manage.py (upgrade|change)\b": "needs a release; tests/test_upgrades.py",
    r"prodserver <|(server|worker) (web|worker|beat)$": "runs already",
    r"honcho|prodserver \w+ --reload": "runs already",
    r"manage.py alerts\b": "only in production; the library's test_alerts.py",
    r"manage.py drill /": "needs a backup; the library's test_drill.py",
    r"migrate \w+ \d+|clearsessions|restored --|--overwrite|uv add |pre-commit install": "changes what follows",
    r"[A-Z]{3,}(?<!PASSWORD)(?<!TOKEN)\b": "has a value of one's own",
}


class Terminal:
    """A command in a terminal of its own, and its lines with their seconds."""

    def __init__(self, command, folder, environment, user=None, answers=""):
        self.start = self.last = time.monotonic()
        self.silence, self.text, self.lines = (0.0, ""), "", []
        self.answers = answers
        prefix = ["/usr/sbin/runuser", "-u", user, "--"] if user else []
        prefix += ["env", f"HOME={environment['HOME']}"]  # runuser sets it.
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execvpe(prefix[0], [*prefix, "bash", "-c", command], environment)
        self.status = None

    @property
    def seconds(self):
        return time.monotonic() - self.start

    def read(self, seconds):
        """Read for this time, or until the command ends."""
        end = time.monotonic() + seconds
        while self.status is None and (left := end - time.monotonic()) > 0:
            if not select.select([self.terminal], [], [], left)[0]:
                continue
            try:
                output = os.read(self.terminal, 65536).decode(errors="replace")
            except OSError:
                with suppress(ChildProcessError):  # Another thread has read the end too.
                    self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
                return
            self.add(output)

    def add(self, output):
        now = time.monotonic()
        self.silence = max(self.silence, (now - self.last, self.text[-60:]))
        self.last = now
        for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)):
            if line.strip():
                self.lines.append(f"{self.seconds:7.1f} {line.rstrip()}")
        self.text += output
        # Prompts have no line break.
        if self.answers and re.search(r"\S: ?$", output):
            answer, _, self.answers = self.answers.partition("\n")
            os.write(self.terminal, f"{answer}\n".encode())

    def stop(self):
        """Press Ctrl-C, and wait for the end."""
        os.write(self.terminal, b"\x03")
        end = time.monotonic() + 60
        while self.status is None and time.monotonic() < end:
            self.read(1)
        os.close(self.terminal)  # Processes that still run get SIGHUP.


class Proxy(threading.Thread):
    """An HTTPS proxy that passes on a number of kilobytes per second to all connections together."""

    def __init__(self, rate):
        super().__init__(daemon=True)
        self.rate, self.lock, self.free_at = rate * 1024, threading.Lock(), 0.0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"

    def run(self):
        while True:
            threading.Thread(target=self.serve, args=self.server.accept()[:1], daemon=True).start()

    def serve(self, client):
        request = client.recv(65536).split()
        host, port = request[1].decode().rsplit(":", 1)
        upstream = socket.create_connection((host, int(port)))
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        threading.Thread(target=self.copy, args=(client, upstream), daemon=True).start()
        self.copy(upstream, client, slow=True)

    def copy(self, source, target, slow=False):
        with suppress(OSError):
            while data := source.recv(16384):
                if slow:
                    with self.lock:
                        self.free_at = max(self.free_at, time.monotonic()) + len(data) / self.rate
                        wait = self.free_at - time.monotonic()
                    time.sleep(max(wait, 0))
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def make_clone(folder):
    """Copy the files of the working tree that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    run = ["git", "-c", "user.name=A", "-c", "user.email=a@example.com", "-C", folder]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "The template"]):
        subprocess.run([*run, *command], check=True)


def make_environment(home, proxy):
    """Return the environment of a new account: a name for git, and no uv on the PATH."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("LD_", "PIP_", "SSL_", "UV_INDEX"))
    }
    folders = [each for each in os.environ["PATH"].split(os.pathsep) if ".venv" not in each]
    folders = [each for each in folders if not shutil.which("uv", path=each)]
    (home / ".gitconfig").write_text("[user]\n\tname = New\n\temail = new@example.com\n")
    proxies = {"HTTPS_PROXY": proxy.url} if proxy else {}
    return (
        kept
        | proxies
        | {
            "HOME": str(home),
            "PATH": os.pathsep.join(folders),
            "PORT": str(PORT),
            "TERM": "xterm",
            "LANG": "C.UTF-8",
        }
    )


def is_open():
    """Return whether the first page is there."""
    try:
        with urlopen(f"http://127.0.0.1:{PORT}", timeout=1) as response:
            return response.status == 200
    except OSError:
        return False


def find_commands(service, terminal):
    """Return the commands that the terminal, the home page and the documents name, in this order."""
    printed = re.findall(r"(?:create a user|Run|run): (\S+ run .+?)\r?$", terminal.text, re.M)
    with urlopen(f"http://127.0.0.1:{PORT}", timeout=30) as response:
        page = response.read().decode()
    shown = [html.unescape(each) for each in re.findall(r"<code>(.*?)</code>", page, re.S)]
    named = []
    paths = [service / "README.md", service / "AGENTS.md", *sorted(service.glob("docs/*.md"))]
    for path in paths:
        if path.name in {"recipes.md", "move.md"}:  # They have tests of their own.
            continue
        text = path.read_text()
        for block in re.findall(r"^```sh\n(.*?)\n```$", text, re.M | re.S):
            named += re.sub(r"\\\n *", "", block).splitlines()
        named += re.findall(r"`((?:uv|uvx|python|\S*manage\.py) [^`]+)`", text)
    is_command = re.compile(r"^(\S*uvx? |python3? |printf |curl |dokku|git |\S*manage\.py )")
    found = [each.strip() for each in (*printed, *shown, *named) if is_command.match(each.strip())]
    return list(dict.fromkeys(found))


def adapt(command, uv):
    """Return a command as the README says where uv is not installed, with values for names."""
    for words, values in VALUES.items():
        command = re.sub(rf"{words}\b", values, command)
    command = re.sub(r"^(\./)?manage\.py", "uv run manage.py", command)
    command = re.sub(r"^python (?=-m|manage)", "uv run python ", command)
    command = command.replace("localhost:8000", f"localhost:{PORT}")
    return re.sub(r"(^|&& )uv(x?) ", lambda match: f"{match[1]}{uv}{match[2]} ", command)


def run_commands(commands, service, environment, user, uv):
    """Run each command; return those that fail, and print all."""
    failed, values = [], {}
    # The same command may be printed with and without the path of uv.
    for command, printed in {adapt(each, uv): each for each in commands}.items():
        reason = next((why for what, why in SKIPPED.items() if re.search(what, command)), None)
        if reason:
            print(f"       - {printed.splitlines()[0][:90]}: {reason}")
            continue
        answers = next((text for word, text in ANSWERS.items() if word in command), "")
        terminal = Terminal(command, service, environment | values, user, answers)
        while terminal.status is None and terminal.seconds < TIMEOUT:
            terminal.read(1)
        if "TOKEN=$(" in command and terminal.lines:
            values["TOKEN"] = terminal.lines[-1].split()[-1]
        print(
            f"{terminal.seconds:7.1f} {terminal.status} {printed.splitlines()[0][:90]}", flush=True
        )
        if terminal.status != 0:
            failed.append(f"{printed}\n" + "\n".join(terminal.lines[-40:]))
    return failed


def get_command(folder):
    """Return the first command of the README."""
    return re.search(r"^```sh\n(.*?)\n```$", (folder / "README.md").read_text(), re.M | re.S)[1]


def play(folder, environment, user, log):
    """Paste the first command, and wait for the first page. Return the terminal."""
    terminal = Terminal(get_command(folder), folder, environment, user)
    while "Listening at" not in terminal.text or not is_open():
        if terminal.status is not None or terminal.seconds > TIMEOUT:
            sys.exit("\n".join(["The first command failed:", *terminal.lines[-30:]]))
        terminal.read(0.2)
    terminal.first_page = terminal.seconds
    for _ in range(60):
        if "Sign in:" in terminal.text:
            break
        terminal.read(1)
    log.write_text("\n".join(terminal.lines) + "\n")
    return terminal


def judge(terminal, clone, environment, options):
    """Return what was slow or silent, and the commands that fail."""
    problems = []
    limit = MAX_FIRST_PAGE[options.warm]
    seconds, (silence, before) = terminal.first_page, terminal.silence
    print(f"first page: {seconds:.1f} s of {limit}; load {os.getloadavg()[0]:.1f}")
    print(f"longest silence: {silence:.1f} s of {MAX_SILENCE}, after {before[-40:]!r}", flush=True)
    if seconds > limit:
        problems.append(f"the first page took {seconds:.1f} seconds")
    if silence > MAX_SILENCE:
        problems.append(f"nothing was printed for {silence:.1f} seconds")
    # The service keeps writing to the terminal.
    threading.Thread(target=terminal.read, args=(3600,), daemon=True).start()
    if not options.start:
        uv = shlex.quote(str(clone / ".uv/bin/uv"))
        service = (clone / re.search(r"run --directory (\S+)", get_command(clone))[1]).resolve()
        commands = find_commands(service, terminal)
        failed = run_commands(commands, service, environment, options.user, uv)
        problems += [f"failed: {each}" for each in failed]
    return problems


def main():
    """Play, and print what takes how long."""
    global PORT
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--user", help="an account that is not root")
    parser.add_argument("--warm", action="store_true", help="with the cache of a first time")
    parser.add_argument("--rate", type=int, help="KB per second of the network")
    parser.add_argument("--port", type=int, default=PORT, help="of web, if another uses 8000")
    parser.add_argument("--start", action="store_true", help="only the first command")
    parser.add_argument("--log", type=Path, default=Path("first_hour.log"))
    options = parser.parse_args()
    PORT = options.port
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    if is_open():
        sys.exit(f"port {PORT} is in use")
    proxy = Proxy(options.rate) if options.rate else None
    if proxy:
        proxy.start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        place = Path(name)
        place.chmod(0o755)
        home = place / "home"
        home.mkdir()
        environment = make_environment(home, proxy)
        terminal = None
        for number in range(1 + options.warm):
            if terminal:
                terminal.stop()
            clone = home / str(number) / "clone"
            make_clone(clone)
            if options.user:
                subprocess.run(["chown", "-R", options.user, home], check=True)
            terminal = play(clone, environment, options.user, options.log)
        try:
            problems = judge(terminal, clone, environment, options)
        finally:
            terminal.stop()
    if problems:
        sys.exit("\n\n".join(problems))


if __name__ == "__main__":
    main()
