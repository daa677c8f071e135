"""Imports of the library: layers as in pyproject.toml, and no cycles; no Jinja in its files."""

import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

import prodserver_ops

LIBRARY = Path(prodserver_ops.__file__).parent
PROJECT = Path(__file__).parents[1]


def test_each_layer_imports_only_from_those_below_it():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    # The source, not the installed package.
    environment = os.environ | {"PYTHONPATH": str(LIBRARY.parent)}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_module_imports_itself_by_way_of_others():
    graph = grimp.build_graph("prodserver_ops", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    TopologicalSorter(imports).prepare()  # It raises CycleError.


def test_every_module_is_checked():
    """A folder without ``__init__.py`` would be left out."""
    modules = grimp.build_graph("prodserver_ops", cache_dir=None).modules
    for path in LIBRARY.rglob("*.py"):
        name = ".".join(["prodserver_ops", *path.relative_to(LIBRARY).with_suffix("").parts])
        assert name.removesuffix(".__init__") in modules


@pytest.mark.parametrize("mark", ["{{", "{%"])
def test_no_python_file_contains_jinja(mark):
    for path in LIBRARY.rglob("*.py"):
        assert mark not in path.read_text(), path


def test_no_file_has_a_conditional_name():
    names = [path.name for path in LIBRARY.parents[1].rglob("*")]
    assert names
    assert not [name for name in names if "{" in name or "%" in name]
