from pathlib import Path

import pytest

from align.kernels import cpu


def test_amds_cores_are_known_by_what_the_kernel_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for vendor, is_amd in (("AuthenticAMD", True), ("GenuineIntel", False), (None, False)):
        told = tmp_path / str(vendor)
        if vendor is not None:
            told.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
        monkeypatch.setattr(cpu, "_INFO", told)
        assert cpu.is_made_by_amd() == is_amd


def test_two_cpus_of_one_model_are_told_apart_by_what_they_can_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: set[str] = set()
    for flags in ("avx512f", "avx512f amx_bf16"):
        told = tmp_path / flags
        told.write_text(f"model name\t: Some Processor\nflags\t\t: {flags}\n")
        monkeypatch.setattr(cpu, "_INFO", told)
        cpu.description.cache_clear()
        said.add(cpu.description())
    cpu.description.cache_clear()
    assert len(said) == 2
    assert all("Some Processor" in one for one in said)
