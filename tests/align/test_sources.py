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
    module.write_text("from elsewhere import *\n")
    assert source_identity(function("scoring_of_mine:scores"))
    module.write_text("def scores(prompt, response:\n")
    with pytest.raises(ConfigError, match=rf"scoring_of_mine:scores: {module} is not Python"):
        source_identity(function("scoring_of_mine:scores"))


@pytest.mark.parametrize("target", ["nowhere_to_be_found:f", "tests.nowhere:f", "nowhere.at.all:f"])
def test_a_module_that_is_not_there_is_told_with_where_it_was_looked_for(target: str, in_folder: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{target}: there is no module .*, here {in_folder}"):
        source_identity(function(target))


def test_a_classifiers_identity_is_its_files(tmp_path: Path) -> None:
    one, other = (write_classifier(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    of = [source_identity(RewardSourceConfig(kind="classifier", model=str(folder))) for folder in (one, one, other)]
    assert of[0] == of[1] != of[2]
    with pytest.raises(ModelError, match=r"holds no config\.json and no \*\.safetensors"):
        source_identity(RewardSourceConfig(kind="classifier", model=str(tmp_path / "missing")))
    hub = RewardSourceConfig(kind="classifier", model="owner/name", revision="v2")
    assert source_identity(hub) == "owner/name@v2"


def test_only_sources_from_outside_of_the_run_are_hashed() -> None:
    from align.config import RewardsConfig

    rewards = RewardsConfig(sources=(RewardSourceConfig(), function("tests.align.scoring_functions:nan")))
    assert list(source_identities(rewards)) == ["function"]
