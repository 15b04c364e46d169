"""Whether `align`, `stages` and `data` are ours: the last two are names that a user's own folder may well have."""

import importlib
import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from align.errors import InstallationError

PACKAGES = ("align", "stages", "data")


def import_root() -> Path:
    """The folder that holds the `align` that is running."""
    return Path(__file__).resolve().parent.parent


def verify_packages() -> None:
    """Before any of `data` or `stages` is imported: all three packages would come from the import root.

    Raises:
        InstallationError: names both places.
    """
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        _refuse_other(name, spec.origin if spec else None, import_root(), where="this process")


def verify_current_folder() -> None:
    """The current folder, which Ray puts first on a worker's path, has no `align` of its own.

    A `data` or `stages` there does no harm: `verify_worker` sees to them. Another `align` would be imported before
    we get a word in.

    Raises:
        InstallationError: names both places.
    """
    spec = PathFinder.find_spec("align", [str(Path.cwd())])
    if spec is not None and spec.origin is not None:
        _refuse_other("align", spec.origin, import_root(), where="a worker, which looks into the current folder first")


def verify_worker(root: Path) -> None:
    """Put the driver's import root first on this process's path, and import the three packages from there.

    Raises:
        InstallationError: one of them comes from elsewhere.
    """
    if sys.path[0] != str(root):  # a worker may be asked many times
        sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    for name in PACKAGES:
        if name not in sys.modules and not (root / name / "__init__.py").is_file():
            raise InstallationError(f"{name} is not in {root} on the worker's machine; install the same align there")
        _refuse_other(name, importlib.import_module(name).__file__, root, where="the worker")


def _refuse_other(name: str, origin: str | None, root: Path, *, where: str) -> None:
    expected = root / name / "__init__.py"
    if origin is None or Path(origin).resolve() != expected.resolve():
        raise InstallationError(
            f"in {where}, the package {name} is {origin or 'a folder without __init__.py, or missing'}, but align runs "
            f"from {expected}. Run from another folder, rename your own {name}, or install align anew."
        )
