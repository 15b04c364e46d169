"""`align check`: everything that can be known to be wrong without torch, Ray or the network, in under two seconds."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from align.base import verify_hub_id, verify_model_folder
from align.config import BaseModelConfig, Config, SourceConfig
from align.errors import AlignError
from align.handover import brought, brought_head
from align.intake import held_out_of, kind_of
from align.lengths import context_length_in, fitted, shortened
from align.sources import source_identity
from data.records import RecordKind
from data.rejects import describe
from data.sources import is_dataset, peek, resolve_path


@dataclass(frozen=True)
class Finding:
    what: str
    verdict: Literal["ok", "wrong", "not checked"]
    detail: str


def check_config(config: Config) -> list[Finding]:
    """One finding for each thing that a run will need; none raises, so that all are said at once."""
    return [
        _check_base(config.base),
        *_check_lengths(config),
        *_check_adapters(config),
        *_check_sources(config),
        *_check_data(config),
    ]


def _found(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, "ok", look())
    except AlignError as error:
        return Finding(what, "wrong", str(error))
    except OSError as error:
        return Finding(what, "wrong", f"{what}: {error.filename} is out of reach: {error.strerror}")


def _check_base(base: BaseModelConfig) -> Finding:
    what = "base.model"
    if base.model.startswith("tiny:"):
        return _found(what, lambda: _tiny(base.model))
    if base.model == "embedded":
        from align.embedded import find_embedded

        return _found(what, lambda: f"embedded, {find_embedded()[0].name}")
    folder = Path(base.model)
    if not folder.is_absolute():  # settings made every folder absolute
        found = _found(what, lambda: _hub_id(base.model))
        return replace(found, verdict="not checked") if found.verdict == "ok" else found
    return _found(what, lambda: _folder(folder))


def _check_lengths(config: Config) -> Iterator[Finding]:
    """Of a base in a folder: what its context has room for."""
    context_length = context_length_in(Path(config.base.model))
    if context_length is None:
        return

    def look() -> str:
        said = [f"the base's context is {context_length:,} tokens", *shortened(config, fitted(config, context_length))]
        return "; ".join(said)

    yield _found("lengths", look)


def _tiny(model: str) -> str:
    from align.tiny import verify_shape

    verify_shape(model.removeprefix("tiny:"))
    return f"{model}, random weights made on the spot"


def _hub_id(model: str) -> str:
    verify_hub_id(model)
    return f"hub id {model}"


def _folder(folder: Path) -> str:
    verify_model_folder(folder, key="base.model")
    return str(folder)


def _check_adapters(config: Config) -> Iterator[Finding]:
    for key, path in (("sft.adapter", config.sft.adapter), ("reward.adapter", config.reward.adapter)):
        if path is not None:
            yield _found(key, lambda path=path, key=key: _adapter(path, key))
    own = config.reward.adapter
    if own is not None and "reward" not in config.run.stages:
        yield _found("reward.adapter's head", lambda: str(brought_head(own, base_identity=None).path))


def _adapter(path: Path, key: str) -> str:
    return str(brought(path, kind="adapter", key=key, base_identity=None).path)


def _check_sources(config: Config) -> Iterator[Finding]:
    for source in config.ppo.rewards.sources if "ppo" in config.run.stages else ():
        if source.kind != "reward":
            what = f"reward source {source.label_in_logs}"
            place = source.function or source.model or ""
            yield _found(what, lambda source=source, place=place: f"{place} ({source_identity(source)[:12]})")


def _check_data(config: Config) -> Iterator[Finding]:
    for stage in config.run.stages:
        section = getattr(config.data, stage)
        for side, source in (("train", section.train), ("held_out", held_out_of(section))):
            if source is not None:
                yield _check_source(f"data.{stage}.{side}", source, kind_of(config, stage))
    if config.data.ptx is not None:
        yield _check_source("data.ptx", config.data.ptx, "demonstration")


def _check_source(what: str, source: SourceConfig, kind: RecordKind) -> Finding:
    if source.path is None:
        return Finding(what, "not checked", f"hub data set {source.hub}")
    path = source.path

    def look() -> str:
        account = peek(source, kind)
        assert account is not None  # only for hub sources
        return f"{path if is_dataset(path) else resolve_path(path)}: first rows: {describe(account)}"

    return _found(what, look)
