import subprocess
import sys
from pathlib import Path

import pytest

from align.installation import import_root, verify_current_folder

ROOT = import_root()


def in_python(code: str, *, folder: Path) -> subprocess.CompletedProcess[str]:
    """`code` in a fresh Python whose path starts with `folder`, as a Ray worker's does with the driver's folder."""
    setup = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]\n"
    command = [sys.executable, "-c", setup + code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def own_package(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("WHOSE = 'the user'\n")
    return folder / name / "__init__.py"


def test_in_a_worker_our_packages_win_over_those_in_the_drivers_folder(tmp_path: Path) -> None:
    own_package(tmp_path, "data")
    own_package(tmp_path, "stages")
    code = (
        "from pathlib import Path; from align.installation import verify_worker\n"
        f"verify_worker(Path({str(ROOT)!r})); import data.records, stages; print(data.__file__, stages.__file__)"
    )
    finished = in_python(code, folder=tmp_path)
    assert finished.stdout.split() == [str(ROOT / "data/__init__.py"), str(ROOT / "stages/__init__.py")], finished


def test_a_worker_that_has_imported_another_data_names_both(tmp_path: Path) -> None:
    own = own_package(tmp_path, "data")
    code = (
        "import data; from pathlib import Path; from align.installation import verify_worker\n"
        f"verify_worker(Path({str(ROOT)!r}))"
    )
    finished = in_python(code, folder=tmp_path)
    last = finished.stderr.splitlines()[-1]
    assert "InstallationError" in last
    assert str(own) in last
    assert str(ROOT / "data/__init__.py") in last


def test_a_worker_on_a_machine_without_our_packages_says_so(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    code = (
        "from pathlib import Path; from align.installation import verify_worker\n"
        f"verify_worker(Path({str(tmp_path / 'nowhere')!r}))"
    )
    last = in_python(code, folder=tmp_path).stderr.splitlines()[-1]
    assert "InstallationError" in last
    assert "nowhere" in last


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_driver_that_would_import_another_data_refuses_before_it_does(tmp_path: Path, command: str) -> None:
    own = own_package(tmp_path, "data")
    own.write_text("raise RuntimeError('imported')\n")
    finished = in_python(f"from align.cli import app; app(['{command}', 'none.yaml'])", folder=tmp_path)
    assert finished.returncode == 1
    assert finished.stderr.startswith(f"error: in this process, the package data is {own}, but align runs from {ROOT}")
    assert "Traceback" not in finished.stderr


def test_an_align_in_the_current_folder_is_refused_since_ray_would_import_it(in_folder: Path) -> None:
    own_package(in_folder, "data")
    verify_current_folder()
    own = own_package(in_folder, "align")
    with pytest.raises(Exception, match=f"the package align is {own}"):
        verify_current_folder()
