from pathlib import Path

import pytest

from align import settings
from align.config import Config
from align.errors import ConfigError
from tests.align.recipe import write_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def message_of(recipe: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as raised:
        settings.load(recipe, overrides)
    return str(raised.value)


def with_text(recipe: Path, old: str, new: str) -> Path:
    text = recipe.read_text(encoding="utf-8")
    assert old in text
    recipe.write_text(text.replace(old, new), encoding="utf-8")
    return recipe


def test_a_number_with_exponent_and_no_dot_is_a_number(recipe: Path) -> None:
    assert settings.load(recipe).sft.learning_rate == 1e-4
    assert settings.load(recipe, ["sft.learning_rate=2e-5"]).sft.learning_rate == 2e-5


def test_an_unknown_key_is_told_with_its_line_and_the_nearest_one(recipe: Path) -> None:
    with_text(recipe, "learning_rate", "learning_rat")
    assert message_of(recipe) == (f"{recipe}:10: sft.learning_rat: unknown key; did you mean sft.learning_rate?")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sft.epoch=2", "did you mean sft.epochs?"),
        ("ppo.episodes=8", "did you mean ppo.rollout.episodes?"),
        ("learning_rate=1", "did you mean sft.learning_rate or reward.learning_rate"),
        ("pppo.updates=8", "did you mean ppo.updates?"),
        ("qqq=1", "the top level knows: run, base"),
        ("qqq.zzz=1", "the sections are: run, base"),
    ],
)
def test_an_unknown_key_in_an_override_names_what_was_meant(recipe: Path, override: str, expected: str) -> None:
    message = message_of(recipe, override)
    assert override in message
    assert "unknown key" in message
    assert expected in message


def test_a_wrong_value_is_told_with_line_key_and_value(recipe: Path) -> None:
    with_text(recipe, "1e-4", "-1")
    assert message_of(recipe) == f"{recipe}:10: sft.learning_rate: -1: input should be greater than 0"


def test_a_wrong_value_in_an_override_is_not_blamed_on_the_file(recipe: Path) -> None:
    message = message_of(recipe, "sft.learning_rate=fast")
    assert message.startswith("override sft.learning_rate=fast: sft.learning_rate: 'fast':")
    assert str(recipe) not in message


def test_an_override_that_needs_quotes_is_shown_as_the_shell_wants_it(recipe: Path) -> None:
    assert message_of(recipe, "run.name=2024").endswith("""write it in quotes: 'run.name="2024"'""")
    assert settings.load(recipe, ['run.name="2024"']).run.name == "2024"


@pytest.mark.parametrize("override", ["ppo.updates=yes", "sft.learning_rate=on", "data.sft.train.limit=true"])
def test_a_truth_value_is_no_number(recipe: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=rf"override {override}: [\w.]+: True: is no number; YAML reads yes, no"):
        settings.load(recipe, [override])
    assert settings.load(recipe, ["sft.gradient_checkpointing=yes"]).sft.gradient_checkpointing


def test_what_the_optimizer_would_refuse_is_told_before(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"betas: 1\.0: input should be less than 1"):
        settings.load(recipe, ["ppo.optimizer.betas=[0.9,1.0]"])


def test_a_wrong_entry_of_a_list_is_one_message_and_an_override_gives_all_of_it(recipe: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        settings.load(recipe, ["ppo.rewards.sources=[{kind: function}]"])
    assert "a reward source of kind function needs function" in str(caught.value)
    assert "too_short" not in str(caught.value)
    assert "at least 1 item" not in str(caught.value)
    with pytest.raises(ConfigError, match="at least 1 item"):
        settings.load(recipe, ["ppo.rewards.sources=[]"])
    with pytest.raises(ConfigError, match=r"ppo\.rewards\.sources is a list; give all of it"):
        settings.load(recipe, ["ppo.rewards.sources.weight=2"])


def test_all_wrong_keys_are_told_at_once(recipe: Path) -> None:
    with_text(recipe, "rank: 2", "rank: 0, alfa: 3")
    assert [line.split(": ")[1] for line in message_of(recipe).splitlines()] == ["adapters.rank", "adapters.alfa"]


def test_a_rule_between_keys_is_told_with_its_section(recipe: Path) -> None:
    with_text(recipe, "episodes: 8", "episodes: 7")
    assert f"{recipe}:11: ppo: rollout.episodes 7 is not a multiple of" in message_of(recipe)


def test_a_rule_that_an_override_breaks_is_told_of_it(recipe: Path) -> None:
    message = message_of(recipe, "ppo.rollout.episodes=7")
    assert message.startswith("override ppo.rollout.episodes=7: ppo: rollout.episodes 7 is not a multiple of")
    message = message_of(recipe, "sft.learning_rate=1e-3", "sft.batch_size=6")
    assert message == "override sft.batch_size=6: sft: batch_size 6 is not a multiple of micro_batch_size 8"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.stages=sft", "run.stages: 'sft': must be a list: write run.stages: [sft]"),
        ("sft=3", "sft: 3: is a section, not a value: write sft.KEY=VALUE"),
        ("cluster.address=head", "cluster.address: 'head': must be local, auto, HOST:PORT or ray://HOST:PORT"),
    ],
)
def test_a_value_of_another_kind_is_told_in_the_words_of_yaml(override: str, said: str, recipe: Path) -> None:
    assert message_of(recipe, override) == f"override {override}: {said}"


@pytest.mark.parametrize("address", ["local", "auto", "head:6379", "10.0.0.1:6379", "[::1]:6379", "ray://head:10001"])
def test_every_address_that_ray_takes_is_taken(address: str, recipe: Path) -> None:
    assert settings.load(recipe, [f"cluster.address='{address}'"]).cluster.address == address


def test_a_key_that_stands_twice_is_refused(recipe: Path) -> None:
    with_text(recipe, "  name: small\n", "  name: small\n  name: other\n")
    assert message_of(recipe) == f"{recipe}:3: run.name stands twice (first in line 2); keep one"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- a\n", "holds a list"),
        ("run: [\n", "not valid YAML"),
        ("run: &a {x: *a}\n", "contains itself"),
        ("run:\n", "run: is empty; put its keys under it or remove the line"),
        ("data: {}\n", "run: is missing"),
        ("1: 2\n", "1: unknown key"),
        ("run: {name: a\x07}\n", "not valid YAML: unacceptable character"),
        ("run: {name: 2024-02-30}\n", "not valid YAML: day"),
        ("run: !!bool foo\n", "not valid YAML: 'foo'"),
        ("run: !!timestamp foo\n", "not valid YAML: "),
        (
            "run: {name: 2024}\n",
            'run.name: 2024: input should be a valid string; YAML reads it as int, so write it in quotes: "2024"',
        ),
    ],
)
def test_a_file_that_is_no_config_is_one_message(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    message = message_of(path)
    assert str(path) in message
    assert expected in message


def test_a_missing_a_binary_and_a_folder_as_config_are_told(tmp_path: Path) -> None:
    assert "no such config file" in message_of(tmp_path / "none.yaml")
    assert "cannot be read" in message_of(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in message_of(tmp_path / "b.yaml")


def test_paths_in_the_file_are_relative_to_it_and_those_in_overrides_to_the_current_folder(
    recipe: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    with_text(recipe, "sft:\n  learning_rate", "sft:\n  adapter: mine\n  learning_rate")
    config = settings.load(recipe, ["data.ppo.train=other.jsonl", "reward.adapter=theirs"])
    assert config.data.sft is not None
    assert config.data.sft.train.path == recipe.parent / "demonstrations.jsonl"
    assert config.sft.adapter == recipe.parent / "mine"
    assert config.data.ppo is not None
    assert config.data.ppo.train.path == elsewhere / "other.jsonl"
    assert config.reward.adapter == elsewhere / "theirs"
    assert config.run.root == Path("runs")


def test_a_base_is_a_folder_only_if_it_is_one_or_looks_like_one(recipe: Path, in_folder: Path) -> None:
    def base(value: str) -> str:
        return settings.load(recipe, [f"base.model={value}"]).base.model

    (in_folder / "local").mkdir()
    assert base("local") == str(in_folder / "local")
    assert base("./missing") == str(in_folder / "missing")
    assert base("owner/name") == "owner/name"
    (in_folder / "embedded_models").mkdir()
    assert base("embedded_models") == str(in_folder / "embedded_models")
    assert base("embedded") == "embedded"


@pytest.mark.parametrize("override", ["run.root=~/runs", "sft.adapter=~/runs"])
def test_the_home_folder_may_be_written_as_the_shell_has_it(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = settings.load(recipe, [override])
    assert tmp_path / "runs" in (config.run.root, config.sft.adapter)
    unknown = settings.load(recipe, [override.replace("~", "~no-such-user")])
    assert any("~no-such-user" in str(path) for path in (unknown.run.root, unknown.sft.adapter))


def test_a_sample_of_ours_is_no_path(recipe: Path) -> None:
    data = settings.load(recipe, ["data.ppo.train=samples:some.jsonl"]).data.ppo
    assert data is not None
    assert str(data.train.path) == "samples:some.jsonl"


def test_an_override_reaches_into_the_short_form_of_a_source(recipe: Path) -> None:
    data = settings.load(recipe, ["data.ppo.train.split=held_out", "data.ppo.train.limit=5"]).data.ppo
    assert data is not None
    assert data.train.path == recipe.parent / "prompts.jsonl"
    assert (data.train.limit, data.train.split) == (5, "held_out")


def test_an_override_of_one_of_two_that_share_an_anchor_leaves_the_other(recipe: Path) -> None:
    with_text(
        recipe, "{train: prompts.jsonl, held_out_fraction: 0.3}", "{train: &p {path: prompts.jsonl}, held_out: *p}"
    )
    data = settings.load(recipe, ["data.ppo.train.limit=5"]).data.ppo
    assert data is not None
    assert data.held_out is not None
    assert (data.train.limit, data.held_out.limit) == (5, None)


def test_an_override_without_a_value_or_through_a_value_is_refused(recipe: Path) -> None:
    assert "write section.key=value" in message_of(recipe, "sft.epochs")
    assert "not a section" in message_of(recipe, "sft=3", "sft.epochs=2")


def test_the_dump_reads_back_as_the_same_config(recipe: Path, tmp_path: Path) -> None:
    config = settings.load(recipe, ["adapters.targets=[q_proj, v_proj]", "ppo.rewards.clip=null"])
    (tmp_path / "dumped.yaml").write_text(settings.dump(config), encoding="utf-8")
    assert settings.load(tmp_path / "dumped.yaml") == config
    assert isinstance(config, Config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward.objective.tie_threshold=2", "tie_threshold is for kind rao-kupper, and kind is bradley-terry"),
        ("reward.objective.positive_weight=2", "positive_weight is for kind unpaired, and kind is bradley-terry"),
        ("reward.objective.tie_threshold=1", "greater than 1"),
        ("reward.objective.kind=thurstone", "'bradley-terry', 'rao-kupper' or 'unpaired'"),
        ("reward.ensemble=17", "less than or equal to 16"),
        ("reward.early_stopping.every=0", "greater than or equal to 1"),
        ("reward.centering=0.1", "did you mean reward.objective.centering?"),
        ("reward.weight_decay=0.1", "unknown key"),
    ],
)
def test_a_setting_of_the_reward_model_that_would_do_nothing_is_refused(
    recipe: Path, override: str, message: str
) -> None:
    assert message in message_of(recipe, override)


def test_the_settings_of_every_objective_are_taken_and_read_back(recipe: Path) -> None:
    for overrides in (
        ["reward.objective.kind=rao-kupper", "reward.objective.tie_threshold=1.5"],
        ["reward.objective.kind=unpaired", "reward.objective.positive_weight=4"],
        ["reward.ensemble=3", "reward.early_stopping.every=5"],
    ):
        config = settings.load(recipe, overrides)
        recipe.with_name("again.yaml").write_text(settings.dump(config), encoding="utf-8")
        assert settings.load(recipe.with_name("again.yaml")).reward == config.reward


def test_texts_beside_ppo_and_their_weight_go_together(recipe: Path) -> None:
    assert "give both or neither" in message_of(recipe, "data.ptx=texts.jsonl")
    assert "give both or neither" in message_of(recipe, "ppo.loss.ptx_coefficient=0.1")


def test_a_clip_that_would_hold_nothing_back_is_refused(recipe: Path) -> None:
    assert "less than 1" in message_of(recipe, "ppo.loss.clip_low=1")


def test_a_section_that_is_given_anew_is_not_blamed_on_the_file(recipe: Path) -> None:
    override = "sft={learning_rate: -1}"
    assert message_of(recipe, override) == f"override {override}: sft.learning_rate: -1: input should be greater than 0"


def test_a_folder_that_is_called_as_a_base_of_ours_does_not_hide_it(recipe: Path, in_folder: Path) -> None:
    (Path.cwd() / "embedded").mkdir()
    assert settings.load(recipe, ["base.model=embedded"]).base.model == "embedded"


def test_a_classifier_beside_the_config_is_found_from_anywhere(recipe: Path) -> None:
    with_text(recipe, "  updates: 4\n", "  updates: 4\n  rewards: {sources: [{kind: classifier, model: ./judge}]}\n")
    assert settings.load(recipe).ppo.rewards.sources[0].model == str(recipe.parent / "judge")
