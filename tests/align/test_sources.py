import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

import pytest

from align.config import RewardSourceConfig
from align.errors import ConfigError, ModelError
from align.sources import source_identities, source_identity
from tests.align.classifiers import write_classifier


def function(target: str) -> RewardSourceConfig:
    return RewardSourceConfig(kind="function", function=target)


def test_a_functions_identity_is_its_modules_contents_without_importing_it(in_folder: Path) -> None:
    (in_folder / "scoring_of_mine.py").write_text("raise SystemExit\nf = max\n")
    first = source_identity(function("scoring_of_mine:f"))
    (in_folder / "scoring_of_mine.py").write_text("raise SystemExit  # changed\nf = max\n")
    assert source_identity(function("scoring_of_mine:f")) != first
    assert source_identity(function("tests.align.scoring_functions:slow")) == source_identity(
        function("tests.align.scoring_functions:nan")
    )


def test_a_module_that_cannot_give_the_function_is_told_without_importing_it(in_folder: Path) -> None:
    module = in_folder / "scoring_of_mine.py"
    module.write_text("raise SystemExit\ndef score(prompt, response): ...\n")
    with pytest.raises(ConfigError, match=rf"scoring_of_mine:scores: {module} has no function scores"):
        source_identity(function("scoring_of_mine:scores"))
    module.write_text("from os import *\n")
    assert source_identity(function("scoring_of_mine:scores"))
    module.write_text("def scores(prompt, response:\n")
    with pytest.raises(ConfigError, match=rf"scoring_of_mine:scores: {module} is not Python"):
        source_identity(function("scoring_of_mine:scores"))


CALLABLE = [
    "def f(prompt, response): ...",
    "def f(prompt, response, scale=1.0, *, names=()): ...",
    "def f(*both): ...",
    "def f(prompt, /, response='', **more): ...",
    "@bound(1)\ndef f(wrapped, prompt, response): ...",
    "def f(prompt): ...\ndef f(prompt, response): ...",
    "try:\n    from fast import f\nexcept ImportError:\n    def f(prompt, response): ...",
    "class f:\n    def __new__(cls, prompt, response): ...",
    "class Other:\n    def f(self): ...\nf = Other().f",
    "import sys\nsys.path.insert(0, 'near')\nimport beside_it\ndef f(prompt, response): ...",
    "import json, os.path\nfrom . import near\nif False:\n    import nowhere_to_be_found\nf = max",
]


@pytest.mark.parametrize("text", CALLABLE)
def test_whatever_may_be_called_with_prompt_and_response_is_let_through(text: str, in_folder: Path) -> None:
    (in_folder / "scoring_of_mine.py").write_text(text)
    assert source_identity(function("scoring_of_mine:f"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ndef f(response): ...", r"2: f\(response\) cannot be called as f\(prompt, response\)"),
        ("def f(prompt, response, label): ...", r"1: f\(prompt, response, label\) cannot be called"),
        ("def f(prompt, response, *, label): ...", r"cannot be called"),
        ("if True:\n    def f(): ...", r"2: f\(\) cannot be called"),
        ("async def f(prompt, response): ...", r"1: f is a coroutine function"),
        (
            "import os, nowhere.near\ndef f(prompt, response): ...",
            "imports nowhere, and there is no module of this name",
        ),
        ("from nowhere import f", "imports nowhere, and there is no module of this name"),
    ],
)
def test_a_function_that_cannot_be_called_with_prompt_and_response_is_told_without_importing_it(
    text: str, message: str, in_folder: Path
) -> None:
    (in_folder / "scoring_of_mine.py").write_text(f"{text}\nraise SystemExit\n")
    with pytest.raises(ConfigError, match=message):
        source_identity(function("scoring_of_mine:f"))


def test_a_package_that_is_installed_to_be_edited_is_found(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (in_folder / "elsewhere").mkdir()
    file = in_folder / "elsewhere" / "scoring.py"
    file.write_text("def f(prompt, response): ...\n")

    class Finder:
        @staticmethod
        def find_spec(name: str, path: object) -> ModuleSpec | None:
            return spec_from_file_location(name, file) if name == "edited_scoring" else None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    assert source_identity(function("edited_scoring:f"))
    with pytest.raises(ConfigError, match="there is no module sys"):  # it has no file
        source_identity(function("sys:exit"))


@pytest.mark.parametrize("target", ["nowhere_to_be_found:f", "tests.nowhere:f", "nowhere.at.all:f"])
def test_a_module_that_is_not_there_is_told_with_where_it_was_looked_for(target: str, in_folder: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{target}: there is no module .*, here {in_folder}"):
        source_identity(function(target))


def test_a_classifiers_identity_is_its_files(tmp_path: Path) -> None:
    one, other = (write_classifier(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    of = [source_identity(RewardSourceConfig(kind="classifier", model=str(folder))) for folder in (one, one, other)]
    assert of[0] == of[1] != of[2]
    with pytest.raises(ModelError, match="missing is no folder that exists"):
        source_identity(RewardSourceConfig(kind="classifier", model=str(tmp_path / "missing")))
    hub = RewardSourceConfig(kind="classifier", model="owner/name", revision="v2")
    assert source_identity(hub) == "owner/name@v2"


def test_only_sources_from_outside_of_the_run_are_hashed() -> None:
    from align.config import RewardsConfig

    rewards = RewardsConfig(sources=(RewardSourceConfig(), function("tests.align.scoring_functions:nan")))
    assert list(source_identities(rewards)) == ["function"]
