"""200 mangled configs and artifacts: whatever is wrong with them, a user meets one message and no traceback."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import align.cluster
from align import settings
from align.cli import app
from align.driver import run_pipeline
from align.errors import AlignError, PlacementError
from align.pipeline import RunCall
from tests.align import fake_stages
from tests.align.recipe import write_recipe
from tests.align.test_driver import COMMAND, Recorder, run, run_of
from tests.shell import TINY

CONFIGS, ARTIFACTS = 100, 100
# What may stand where something else belongs
_JUNK: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**70, 1e400, float("nan"), "", "no", "\x1b[2J", "../..", "x" * 5000, "ä\0b"),
    *([], {}, [[]], {"": None}, {"path": 3}, ["a", 1], "${HOME}", "samples:none.jsonl", "/", "1e-3", "08:30"),
)


def mangled_text(generator: random.Random) -> bytes:
    """tiny.yaml with bytes and lines changed, lost, doubled or moved."""
    lines = TINY.read_bytes().splitlines(keepends=True)
    for _ in range(generator.randint(1, 3)):
        at = generator.randrange(len(lines))
        how = generator.randrange(6)
        if how == 0:
            del lines[at]
        elif how == 1:
            lines.insert(at, lines[generator.randrange(len(lines))])
        elif how == 2:
            lines[at] = b" " * generator.randrange(6) + lines[at].lstrip()
        elif how == 3:
            lines[at] = lines[at][: generator.randrange(len(lines[at]))]
        elif how == 4:
            lines[at] = bytes(generator.randrange(256) for _ in range(9)) + lines[at]
        else:
            lines[at] = lines[at].replace(b":", generator.choice((b"", b"::", b": &a *a", b": !!python/object:os ")), 1)
    return b"".join(lines)


def mangled_tree(generator: random.Random) -> bytes:
    """The resolved config of tiny.yaml with junk in the place of one to three keys or values."""
    tree = yaml.safe_load(settings.dump(settings.load(TINY)))
    for _ in range(generator.randint(1, 3)):
        section, key = generator.choice(list(places_in(tree)))
        if generator.random() < 0.2:
            section[f"{key}{generator.choice(('', 's', '.x', ' '))}"] = section.pop(key, None)
        else:
            section[key] = generator.choice(_JUNK)
    return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")


def places_in(section: dict[Any, Any]) -> list[tuple[dict[Any, Any], Any]]:
    found: list[tuple[dict[Any, Any], Any]] = []
    for key, value in section.items():
        found.append((section, key))
        if isinstance(value, dict):
            found += places_in(value)
    return found


def refuse(address: str) -> bool:
    raise PlacementError("as far as this test goes")


@pytest.mark.parametrize("mangle", [mangled_text, mangled_tree])
def test_a_mangled_config_is_met_with_a_message(
    mangle: Callable[[random.Random], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(align.cluster, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    path, refused = tmp_path / "mangled.yaml", 0
    for number in range(CONFIGS // 2):
        path.write_bytes(mangle(random.Random(number)))
        for command in ("check", "plan", "run"):
            result = CliRunner().invoke(app, [command, str(path)])
            assert isinstance(result.exception, SystemExit | None), (number, command, result.exception)
            assert result.exit_code in (0, 1, 2), (number, command)
            assert "Traceback" not in result.output, (number, command)
            assert (result.exit_code == 0) or "error: " in result.output, (number, command, result.output)
            assert not {"\x1b", "\0"} & set(result.output), (number, command)
            refused += command == "check" and result.exit_code != 0
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    assert refused > CONFIGS // 4  # or the mangling did nothing


# What an artifact or a record of a run may have become
_CONTENTS = (b"", b"null", b"[]", b"{}", b'{"files": 3}', b"\x00\xff", b'"text"', b"[" * 3000)


def mangle_file(path: Path, generator: random.Random) -> str:
    content = bytearray(path.read_bytes())
    how = generator.choice(("flip", "cut", "gone", "other", "folder", "lost key"))
    if how == "flip" and content:
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
    elif how == "cut" and content:
        path.write_bytes(content[: generator.randrange(len(content))])
    elif how == "gone":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "lost key" and b'": ' in content:
        path.write_bytes(content.replace(b'": ', b'_": ', generator.randrange(1, 4)))
    else:
        path.write_bytes(generator.choice(_CONTENTS))
    return how


@pytest.fixture(scope="module")
def stopped(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has finished two stages, and was stopped in the third."""
    folder = tmp_path_factory.mktemp("stopped")
    write_recipe(folder)
    with pytest.raises(AlignError):
        run(folder, "cluster.max_failures=0", change={"ppo": fake_stages.stopping_half_way})
    return folder


def test_a_mangled_run_folder_is_met_with_a_message(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(align.cluster, "connect", refuse)
    found = 0
    for number in range(ARTIFACTS):
        generator = random.Random(number)
        folder = tmp_path / str(number)
        shutil.copytree(stopped, folder)
        files = sorted(path for path in run_of(folder).rglob("*") if path.is_file() and path.name != ".lock")
        path = generator.choice(files)
        how = mangle_file(path, generator)
        config = settings.load(folder / "small.yaml", [f"run.root={folder / 'runs'}", "cluster.cpus=1"])
        with pytest.raises(AlignError) as raised:  # at the latest when Ray is needed
            run_pipeline(config, RunCall(COMMAND, resume=True), stages=fake_stages.STAGES, display=Recorder())
        is_found = not isinstance(raised.value, PlacementError)
        named = str(folder) in str(raised.value) or path.name == "started.json"  # that is told by the keys' names
        assert named or not is_found, (number, how, path, raised.value)
        found += is_found
        result = CliRunner().invoke(app, ["status", str(run_of(folder))])
        assert isinstance(result.exception, SystemExit | None), (number, how, path, result.exception)
    assert found > ARTIFACTS // 3
