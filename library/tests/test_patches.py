"""The table of private APIs of other packages that the library uses."""

import ast
import hashlib
import importlib
import inspect
import io
import json
import os
import pkgutil
import re
import sys
import textwrap
import tokenize
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
from patches import PATCHES

import prodserver_ops

LIBRARY = Path(prodserver_ops.__file__).parent

#: Tokens that do not affect what a function does.
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}

#: Maximum length of a signature in the table; the hash of a longer one covers the rest.
MAX_SIGNATURE = 60

LISTED = [(patch, name) for patch in PATCHES for name in patch.names]


def load(dotted):
    """Return the object of a dotted name."""
    module, rest = dotted, []
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError as error:
            if "." not in module or not module.startswith(error.name):
                raise
            module, _, name = module.rpartition(".")
            rest.insert(0, name)
    for name in rest:
        found = getattr(found, name)
    return found


def get_function(owner, name):
    """Return the function of a name, or of a property; otherwise None."""
    found = inspect.getattr_static(owner, name)
    # Properties and cached properties of Python, Django and kombu
    for attribute in ("fget", "func", "_CachedProperty__get", "__func__", "__wrapped__"):
        inner = getattr(found, attribute, None)
        if inspect.isfunction(inner):
            found = inner
    return found if inspect.isfunction(found) else None


def describe(dotted, with_source):
    """Return the value for a name in the table: its signature, and optionally a hash of its source.

    Raises AttributeError if there is no such name, and no such attribute of an object.
    """
    owner, _, name = dotted.rpartition(".")
    owner = load(owner)
    try:
        function = get_function(owner, name)
    except AttributeError:
        if not isinstance(owner, type) or not sets_attribute(owner, name):
            raise
        return ""
    if function is None:
        return ""
    parameters = [
        parameter.replace(
            annotation=parameter.empty,
            default=parameter.empty if parameter.default is parameter.empty else ...,
        )
        for parameter in inspect.signature(function).parameters.values()
    ]
    text = str(inspect.Signature(parameters)).replace("Ellipsis", "...")
    if len(text) > MAX_SIGNATURE:
        return f"{text[:MAX_SIGNATURE]}... {get_hash(function)}"
    return f"{text} {get_hash(function)}" if with_source else text


def sets_attribute(owner, name):
    """Return whether a class sets an attribute of its objects."""
    sources = [inspect.getsource(base) for base in owner.__mro__ if base.__module__ != "builtins"]
    return any(re.search(rf"\bself\.{name}\b[^=\n]*=[^=]", source) for source in sources)


def get_hash(function):
    """Return the first digits of a hash of a function's tokens, without comments and docstring."""
    source = textwrap.dedent(inspect.getsource(function))
    docstring = inspect.getdoc(function) and ast.parse(source).body[0].body[0]
    tokens = [
        token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in LAYOUT
        and not (docstring and docstring.lineno <= token.start[0] <= docstring.end_lineno)
    ]
    return hashlib.sha256("\n".join(tokens).encode()).hexdigest()[:8]


@pytest.mark.parametrize(("patch", "name"), LISTED, ids=[f"{p.owner}.{n}" for p, n in LISTED])
def test_api_has_not_changed(patch, name):
    """If this fails, read the change, adapt the code that depends on it, and update the table."""
    pytest.importorskip(patch.owner.partition(".")[0])
    recorded = patch.names[name]
    with_source = re.search(r" [0-9a-f]{8}$", recorded) is not None
    assert describe(f"{patch.owner}.{name}", with_source) == recorded


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.owner)
def test_patch_is_used_in_the_listed_modules(patch):
    words = {word for name in patch.names for word in name.split(".")}
    words.add(patch.owner.rpartition(".")[2])
    for module in patch.where.split():
        path = LIBRARY.joinpath(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        assert words & set(re.findall(r"\w+", path.read_text())), module


def test_requests_are_urls():
    for patch in PATCHES:
        assert patch.request == "none" or patch.request.startswith("https://github.com/")


# Uses that the table lacks

KNOWN = {f"{patch.owner}.{name}" for patch in PATCHES for name in patch.names}

#: APIs that the documentation of the packages, or of Python, describes for this use.
DOCUMENTED = (
    "celery.app.task.Context",
    "celery.app.task.Task.app",
    "celery.app.task.Task.apply_async",
    "celery.app.task.Task.before_start",
    "celery.app.task.Task.delay",
    "celery.app.task.Task.name",
    "celery.app.task.Task.on_failure",
    "celery.app.task.Task.on_success",
    "celery.app.task.Task.replace",
    "celery.app.task.Task.request",
    "celery.result.AsyncResult.backend",
    "channels.generic.websocket.AsyncWebsocketConsumer.*",
    "django.apps.config.AppConfig.*",
    "django.contrib.admin.*",
    "django.contrib.auth.backends.ModelBackend.authenticate",
    "django.core.files.uploadhandler.FileUploadHandler.*",
    "django.core.management.base.*",
    "django.core.paginator.Paginator.*",
    "django.db.migrations.operations.base.Operation.*",
    "django.db.models.*",
    "django.tasks.backends.base.BaseTaskBackend.*",
    "django.forms.*",
    "django_prodserver.backends.base.*",
    "drf_spectacular.extensions.OpenApiViewExtension.*",
    "drf_spectacular.plumbing.OpenApiGeneratorExtension.*",
    "rest_framework.pagination.CursorPagination.page_size",
    "rest_framework.parsers.JSONParser.parse",
    "rest_framework.request.*",
    "rest_framework.serializers.*",
    "rest_framework.throttling.*Throttle.rate",
    "rest_framework.throttling.*Throttle.scope",
    "rest_framework.views.APIView.*",
)
DOCUMENTED_PRIVATE = {
    "_base_manager",
    "_current_frames",
    "_default_manager",
    "_exit",
    "_meta",
    "_replace",
    "_srcfile",
}

#: Modules whose documentation, if any, does not describe every name that can be imported.
INTERNAL = re.compile(
    r"(celery\.(app|apps|beat|bin|contrib|worker)|kombu\.transport|gunicorn|granian\.log|pgmq|flower"
    r"|cbs\.(cast|env|settings|urls)|django\.db\.migrations\.(executor|loader)|django\.utils\.log"
    r"|django_prodserver\.(backends\.(servers|workers)|management)|drf_spectacular\.management"
    r"|csp|sentry_sdk\.integrations\.celery\.)\b"
)


#: What the settings of a drill read.
DRILL = json.dumps({"settings": "dummy.settings", "folder": "drill", "database": "drill"})


def get_modules():
    """Return the modules of the library, and the tree of each."""
    for info in pkgutil.walk_packages(prodserver_ops.__path__, "prodserver_ops."):
        if ".migrations." not in info.name:
            with mock.patch.dict(os.environ, PRODSERVER_DRILL=DRILL):
                module = importlib.import_module(info.name)
            yield module, ast.parse(Path(module.__file__).read_text())


MODULES = list(get_modules())
SHORT_NAMES = [module.__name__.removeprefix("prodserver_ops.") for module, _ in MODULES]


def is_own(base):
    """Return whether a class is defined by the library, or by Python."""
    package = base.__module__.partition(".")[0]
    return package == "prodserver_ops" or package in sys.stdlib_module_names


def is_listed(names):
    """Return whether one of the dotted names is in the table, or documented."""
    return any(
        name in KNOWN or any(fnmatch(name, pattern) for pattern in DOCUMENTED) for name in names
    )


def get_self_uses(cls):
    """Return the attributes that a class reads of its objects, and those that it sets."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()")
    ]
    # ``self.count += 1`` reads it too.
    counted = {node.target for node in ast.walk(tree) if isinstance(node, ast.AugAssign)}
    written = {
        node.attr for node in found if not isinstance(node.ctx, ast.Load) and node not in counted
    }
    return {node.attr for node in found} - written, written


@pytest.mark.parametrize(("module", "tree"), MODULES, ids=SHORT_NAMES)
class TestTable:
    def test_has_names_that_classes_override_and_use_of_their_base_classes(self, module, tree):
        missing = set()
        for cls in vars(module).values():
            if not inspect.isclass(cls) or cls.__module__ != module.__name__:
                continue
            foreign = [base for base in cls.__mro__ if not is_own(base)]
            own = [base for base in cls.__mro__ if base.__module__.startswith("prodserver_ops")]
            if not foreign:
                continue
            defined = {name for base in own for name in vars(base)}
            used, written = map(set().union, *map(get_self_uses, own))
            written = written.union(*map(inspect.get_annotations, own))
            for name in (defined | used) - written:
                if name.startswith("__") and name != "__init__":
                    continue
                inherited = [base for base in foreign if name in vars(base)]
                if not inherited and (name in defined or name not in used):
                    continue
                names = [f"{base.__module__}.{base.__qualname__}.{name}" for base in foreign]
                if not is_listed(names):
                    missing.add(names[0])
        assert not missing

    def test_has_the_private_names(self, module, tree):
        text = "\n".join(Path(each.__file__).read_text() for each, _ in MODULES)
        missing = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr):
                own = re.search(rf"def {node.attr}\b|self\.{node.attr}\b.* = ", text)
                listed = any(node.attr in name.split(".") for name in KNOWN)
                # django.utils.log.log_response, which is listed, reads this attribute of responses.
                listed |= node.attr == "_has_been_logged"
                if not own and not listed and node.attr not in DOCUMENTED_PRIVATE:
                    missing.add(node.attr)
        assert not missing

    def test_has_names_that_are_imported_from_internal_modules(self, module, tree):
        imported = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level:
                imported |= {(node.module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                imported |= {(alias.name, "") for alias in node.names}
        missing = set()
        for source, name in imported:
            if not INTERNAL.match(f"{source}."):
                continue
            dotted = f"{source}.{name}".rstrip(".")
            target = load(dotted)
            if not isinstance(target, ModuleType) and hasattr(target, "__qualname__"):
                dotted = f"{target.__module__}.{target.__qualname__}"
            listed = any(f"{name}.".startswith(f"{dotted}.") for name in KNOWN)
            if not listed and not is_listed([dotted]):
                missing.add(dotted)
        assert not missing
