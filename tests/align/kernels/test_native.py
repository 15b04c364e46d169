import logging
import shutil
from pathlib import Path

import pytest

from align.kernels import cpu, native

HAS_COMPILER = any(map(shutil.which, native._COMPILERS))  # pyright: ignore[reportPrivateUsage]
pytestmark = pytest.mark.skipif(not (cpu.has_avx512() and HAS_COMPILER), reason="no AVX-512, or no C++ compiler")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(native, "_present", set[str]())
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return ANSWER; }\n')
    return path


def cached(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").iterdir())


def test_what_is_compiled_is_kept_and_another_text_or_flag_is_another(source: Path, tmp_path: Path) -> None:
    for answer in (42, 43, 42):
        library = native.library(source, f"-DANSWER={answer}", loss="slow")
        assert library is not None
        assert library.answer() == answer
    assert len(cached(tmp_path)) == 2
    assert {path.name for path in cached(tmp_path)} <= set(native.present())
    source.write_text(source.read_text() + "// changed\n")
    assert native.library(source, "-DANSWER=42", loss="slow") is not None
    assert len(cached(tmp_path)) == 3


def test_a_damaged_library_is_made_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.library(source, "-DANSWER=42", loss="slow") is not None
    (whole,) = cached(tmp_path)
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "damaged"))
    damaged = tmp_path / "damaged" / whole.name
    damaged.parent.mkdir()
    damaged.write_bytes(whole.read_bytes()[:100])
    library = native.library(source, "-DANSWER=42", loss="slow")
    assert library is not None
    assert library.answer() == 42
    assert list(damaged.parent.iterdir()) == [damaged]
    assert damaged.read_bytes() == whole.read_bytes()


def test_without_a_compiler_it_says_what_is_lost_and_what_to_do(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        assert native.library(source, loss="it is slow") is None
        assert "it is slow: answer.cpp could not be compiled or loaded: there is no C++ compiler" in caplog.text
        monkeypatch.setenv("CXX", f"{tmp_path}/none")
        assert native.library(source, loss="it is slow") is None
        assert f"{tmp_path}/none" in caplog.text
    assert not (tmp_path / "cache").exists() or cached(tmp_path) == []


def test_a_compiler_that_fails_is_quoted(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "bin" / "broken"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho; echo 'In file included' >&2; echo 'error: no space left' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with caplog.at_level(logging.WARNING):
        assert native.library(source, loss="it is slow") is None
    assert caplog.text.strip().endswith("error: no space left")
    assert cached(tmp_path) == []
