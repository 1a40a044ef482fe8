"""An environment from a file or a folder, without packaging: `path/file.py:Class` and `path/to/folder:Class`.

    path/file.py       -> that file; its folder goes to the end of sys.path, so that it may import its neighbours
    path/to/package    -> the package (it has an __init__.py), with relative imports as usual
    path/to/folder     -> the file in it that defines Class, also one package deeper: a scaffolded project's folder will do

Two plugins may hold files of the same name: a module's name here is made from its absolute path. Text that holds no path separator
and does not end in `.py` is a module's name, and none of this page's business.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

PREFIX = "polyrl_plugin_"


def is_path(module: str) -> bool:
    """Whether the part before the colon names a file or a folder, and not a module."""
    return "/" in module or module.endswith(".py") or module in (".", "..")


def absolute(target: str) -> str:
    """`target` with its path made absolute: another process may work in another folder. Ids and modules stay as they are."""
    module, colon, name = target.rpartition(":")
    return f"{Path(module).expanduser().absolute()}{colon}{name}" if is_path(module) else target


def target_of(found: type) -> str:
    """The `module:Class` or `file:Class` under which any process can load this class."""
    module = found.__module__
    if module.startswith(PREFIX):
        module = str(sys.modules[module].__file__)
    return f"{module}:{found.__qualname__}"


def import_path(text: str, class_name: str) -> ModuleType:
    """The module behind a file or folder. Raises ImportError that says what is missing, or whatever the file raises."""
    path = Path(text).expanduser().absolute()
    if path.is_file():
        return _import_file(path)
    if not path.is_dir():
        raise ImportError(f"there is no file or folder {str(path)!r}")
    if (path / "__init__.py").is_file():
        package = _import_file(path / "__init__.py")
        if hasattr(package, class_name):
            return package
    defining = [file for pattern in ("*.py", "*/*.py", "src/*/*.py") for file in sorted(path.glob(pattern)) if _defines(file, class_name)]
    if not defining:
        raise ImportError(f"no Python file in {str(path)!r} defines a class {class_name!r}")
    return _import_file(defining[0])


def _defines(file: Path, class_name: str) -> bool:
    """Read, not run: a folder may hold scripts and tests."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return False
    return any(isinstance(node, ast.ClassDef) and node.name == class_name for node in tree.body)


def _import_file(file: Path) -> ModuleType:
    """Import one file, as a part of its package if it lies in one."""
    package = None  # the outermost folder of an unbroken chain of packages above the file
    for parent in itertools.takewhile(lambda folder: (folder / "__init__.py").is_file(), file.parents):
        package = parent
    home = str((package or file).parent)
    if home not in sys.path:
        sys.path.append(home)  # at the end: a plugin's `json.py` must not become everybody's
    if package is None:
        return _load(_name(file), file)
    name = _name(package / "__init__.py")
    _load(name, package / "__init__.py")
    inner = file.relative_to(package).with_suffix("").parts
    inner = inner[:-1] if inner[-1] == "__init__" else inner
    return importlib.import_module(".".join([name, *inner]))


def _load(name: str, file: Path) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    folders = [str(file.parent)] if file.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=folders)
    if spec is None or spec.loader is None:
        raise ImportError(f"{str(file)!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _name(file: Path) -> str:
    stem = file.parent.name if file.name == "__init__.py" else file.stem
    clean = "".join(c if c.isalnum() else "_" for c in stem)
    return f"{PREFIX}{clean}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}"
