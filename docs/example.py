"""Write the default service to a folder: ``uv run docs/example.py FOLDER``.

The workflow ``example.yml`` pushes the files to the branch ``example``, so that people can look at a
service without generating one. The folder must not exist, or be empty but for ``.git``.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def write_example(folder):
    """Generate the default service, without setup, and move its files to the folder."""
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "cookiecutter", str(ROOT), "--no-input", "setup=no"]
        environment = os.environ | {"COOKIECUTTER_CONFIG": os.devnull}
        command += ["--output-dir", output]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        (service,) = Path(output).iterdir()
        folder.mkdir(parents=True, exist_ok=True)
        for path in service.iterdir():
            shutil.move(path, folder / path.name)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if target.exists() and {path.name for path in target.iterdir()} - {".git"}:
        sys.exit(f"{target} is not empty")
    write_example(target)
