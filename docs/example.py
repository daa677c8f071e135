"""Write the default service to a folder: ``uv run docs/example.py FOLDER``.

The workflow ``example.yml`` pushes the files to the branch ``example``, so that people can look at a
service without generating one. The folder must not exist, or be empty but for ``.git``.
"""

import shutil
import sys
from pathlib import Path


def write_example(folder):
    """Generate the default service, without setup, and move its files to the folder."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tests.generate import generated_project

    with generated_project() as service:
        folder.mkdir(parents=True, exist_ok=True)
        for path in service.iterdir():
            shutil.move(path, folder / path.name)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if target.exists() and {path.name for path in target.iterdir()} - {".git"}:
        sys.exit(f"{target} is not empty")
    write_example(target)
