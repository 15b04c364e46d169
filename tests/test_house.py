"""The project's own house: the import ladder, what loads at import, what the wheel takes, what the pins cover."""

import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = ("align", "stages", "data")
SLOW_TO_IMPORT = ("torch", "ray", "datasets", "transformers", "peft", "trl", "accelerate")

# What `align check` and `align --help` load; the later rungs may need torch.
LIGHT_MODULES = [
    "align.errors",
    "align.config",
    "align.artifacts",
    "align.settings",
    "align.installation",
    "align.messages",
    "align.statistics",
    "align.intake",
    "align.check",
    "align.inspect_view",
    "align.cli",
    "align.pipeline",
    "align.plan.fit",
    "align.plan.forecast",
    "data.records",
    "data.sources",
    "data.formats",
    "data.splits",
    "data.rejects",
    "data.tokenization",
    "data.ingestion.parts",
    "data.ingestion.inspection",
]


def path_of(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    return next((found for found in (path.with_suffix(".py"), path / "__init__.py") if found.is_file()), None)


def test_the_import_ladder_holds() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_the_ladder_names_every_module_of_align() -> None:
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    ladder = next(contract for contract in contracts if contract["id"] == "ladder")
    named = {name.strip(" ()") for layer in ladder["layers"] for name in layer.split(":")}
    modules = {
        f"align.{path.stem}" for path in (ROOT / "align").glob("*.py") if path.stem not in {"__init__", "__main__"}
    }
    modules |= {f"align.{path.parent.name}" for path in (ROOT / "align").glob("*/__init__.py")}
    assert modules - named == set(), "give these a rung in pyproject.toml"


@pytest.mark.parametrize("module", [name for name in LIGHT_MODULES if path_of(name)])
def test_a_light_module_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({set(SLOW_TO_IMPORT)!r} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == []


def test_the_wheel_takes_every_module_of_ours_and_nothing_else() -> None:
    patterns = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    sources = [
        path.relative_to(ROOT) for path in ROOT.glob("[!.]*/**/*.py") if (ROOT / path.parent / "__init__.py").is_file()
    ]
    taken = {path for path in sources if any(fnmatch(".".join(path.parent.parts), pattern) for pattern in patterns)}
    assert {path.parts[0] for path in taken} == set(PACKAGES)
    assert {path for path in sources if path.parts[0] in PACKAGES} - taken == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_of_a_package_with_python_in_it_is_a_package(package: str) -> None:
    # setuptools leaves a folder without __init__.py out of the wheel, and says nothing.
    folders = {path.parent for path in (ROOT / package).rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_wheel_takes_every_sample_file() -> None:
    samples = ROOT / "data" / "samples"
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["data.samples"]
    taken = {path for pattern in patterns for path in samples.glob(pattern)}
    files = {path for path in samples.rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"}}
    assert files - taken == set()


def test_every_dependency_is_pinned_to_a_version_within_its_bounds() -> None:
    lines = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))
    project = PROJECT["project"]
    for requirement in map(Requirement, project["dependencies"] + project["optional-dependencies"]["dev"]):
        version = pins.get(requirement.name.lower().replace("_", "-"))
        assert version is not None, f"{requirement.name} is not in .ci/constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement} does not admit the pinned {version}"
