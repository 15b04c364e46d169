"""From a YAML file and `section.key=value` overrides to a Config, or to one message that names what is wrong.

Relative paths in the file resolve against the file's own folder, those in overrides against the current folder;
`run.root` alone always means the folder that the command is run in.
"""

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from align.config import Config, expand_user
from align.errors import ConfigError

_PATH_KEY = re.compile(
    r"data\.\w+\.(train|held_out)(\.path)?|data\.ptx(\.path)?|sft\.adapter|reward\.adapter|base\.model|"
    r"ppo\.rewards\.sources\.model"
)


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override and validate. Raises ConfigError, which names every wrong key at once."""
    raw, lines = _read(path)
    places = {key: f"{path}:{line}" for key, line in lines.items()}
    raw = cast(dict[str, object], _absolute(raw, key="", folder=Path(os.path.abspath(path)).parent))
    for override in overrides:
        key, value = _split_override(override)
        _put(raw, key, _absolute(value, key=key, folder=Path.cwd()), override=override)
        places = {place: at for place, at in places.items() if not f"{place}.".startswith(f"{key}.")}
        places[key] = f"override {override}"
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        found = error.errors()
        inside = {item["loc"][:end] for item in found for end in range(len(item["loc"]))}
        # A list whose entries are wrong is to pydantic also one without them
        found = [item for item in found if not (item["type"] == "too_short" and item["loc"] in inside)]
        messages = [_explain(cast(Mapping[str, Any], item), places, str(path)) for item in found]
        raise ConfigError("\n".join(dict.fromkeys(messages))) from None


def dump(config: Config) -> str:
    """The resolved config as YAML: every key, defaults included."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _parse(text: str, *, name: str) -> tuple[object, dict[str, int]]:
    try:
        loader = yaml.SafeLoader(text)  # reads 1e-4 as a string, for want of a dot; pydantic makes it a number
        node = loader.get_single_node()
        lines = dict(_lines(node, prefix="", name=name, above=()))
        return (loader.construct_document(node) if node is not None else None), lines
    except (yaml.YAMLError, ValueError, KeyError, AttributeError) as error:  # of what its tag, or its look, says it is
        mark = getattr(error, "problem_mark", None)
        place = f"{name}:{mark.line + 1}" if mark is not None else name
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{place}: not valid YAML: {reason}") from None


def _lines(node: yaml.Node | None, *, prefix: str, name: str, above: tuple[int, ...]) -> Iterator[tuple[str, int]]:
    """The line of every dotted key. ConfigError at a key that stands twice: YAML would silently keep the last."""
    if not isinstance(node, yaml.MappingNode):
        return
    if id(node) in above:
        raise ConfigError(f"{name}:{node.start_mark.line + 1}: {prefix.rstrip('.')} contains itself through an alias")
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in seen and key != "<<":
            raise ConfigError(f"{name}:{line}: {prefix}{key} stands twice (first in line {seen[key]}); keep one")
        seen[key] = line
        yield f"{prefix}{key}", line
        yield from _lines(value_node, prefix=f"{prefix}{key}.", name=name, above=(*above, id(node)))


def _read(path: Path) -> tuple[dict[str, object], dict[str, int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such config file; the recipes are in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; give a YAML file in UTF-8") from None
    raw, lines = _parse(text, name=str(path))
    if raw is None:
        raise ConfigError(f"{path}: is empty; a config needs at least run.name and data")
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds a {type(raw).__name__}; a config is a mapping of sections (run:, base:, ...)")
    return cast(dict[str, object], raw), lines


def _split_override(override: str) -> tuple[str, object]:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write section.key=value, for example ppo.updates=20")
    if key not in _KNOWN_KEYS:
        raise ConfigError(f"override {override}: {key}: unknown key; {_nearest(key)}")
    of_list = next((listed for listed in _LISTS if key.startswith(f"{listed}.")), None)
    if of_list is not None:
        raise ConfigError(f"override {override}: {of_list} is a list; give all of it: '{of_list}=[{{...}}]'")
    value, _ = _parse(text, name=f"override {override}")
    return key, value


def _put(raw: dict[str, object], key: str, value: object, *, override: str) -> None:
    *above, last = key.split(".")
    section = raw
    for name in above:
        inner = section.get(name)
        if inner is None:
            inner = {}
        elif isinstance(inner, str) and last in ("path", "limit", "split", "subset", "revision"):
            inner = {"path": inner}  # the short form of a source
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override}: {name} is {inner!r} in the config, not a section")
        section[name] = inner
        section = cast(dict[str, object], inner)
    section[last] = value


def _absolute(value: object, *, key: str, folder: Path) -> object:
    """The same value with its relative paths made absolute."""
    if isinstance(value, dict):
        inner = cast(dict[str, object], value)
        return {str(k): _absolute(v, key=f"{key}.{k}".lstrip("."), folder=folder) for k, v in inner.items()}
    if isinstance(value, list):
        return [_absolute(item, key=key, folder=folder) for item in cast("list[object]", value)]
    if not isinstance(value, str) or not _PATH_KEY.fullmatch(key):
        return value
    path = os.path.abspath(folder / expand_user(Path(value)))
    if key.endswith(".model"):
        is_folder = value.startswith(("./", "../", "~", "/")) or value in (".", "..") or Path(path).is_dir()
        return path if is_folder and value != "embedded" and not value.startswith("tiny:") else value
    return value if value.startswith("samples:") else path


def _explain(item: Mapping[str, Any], places: Mapping[str, str], file: str) -> str:
    dotted = ".".join(str(part) for part in item["loc"] if not isinstance(part, int))
    if item["type"] == "extra_forbidden":
        return f"{places.get(dotted, file)}: {dotted}: unknown key; {_nearest(dotted)}"
    # pydantic adds the branch of a union to the location: cut back to what the user can write
    while dotted and dotted not in _KNOWN_KEYS:
        dotted = dotted.rpartition(".")[0]
    place = next((places[key] for key in _upwards(dotted) if key in places), file)
    if item["type"] == "missing":
        return f"{place}: {dotted}: is missing; add it"
    if item["type"] == "model_type" and item["input"] is None:
        return f"{place}: {dotted}: is empty; put its keys under it or remove the line"
    message = str(item["msg"]).removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if item["type"] in ("tuple_type", "model_type"):  # what pydantic calls them says nothing to a writer of YAML
        first = f"{dotted}: [{item['input']}]" if item["type"] == "tuple_type" else f"{dotted}.KEY=VALUE"
        message = f"{'must be a list' if item['type'] == 'tuple_type' else 'is a section, not a value'}: write {first}"
    place = _culprit(dotted, message, places) or place
    if item["type"] == "string_type" and not isinstance(item["input"], dict | list | type(None)):
        quoted = f'"{item["input"]}"'
        wanted = f"'{dotted}={quoted}'" if place.startswith("override") else quoted
        message += f"; YAML reads it as {type(item['input']).__name__}, so write it in quotes: {wanted}"
    seen = "" if isinstance(item["input"], dict | BaseModel) else f"{item['input']!r}: "
    return f"{place}: {dotted}: {seen}{message}" if dotted else f"{place}: {message}"


def _culprit(dotted: str, message: str, places: Mapping[str, str]) -> str | None:
    """Where a key of a section stands that a message about the whole section names; an override is the likelier."""
    named = [
        key for key in places if key.startswith(f"{dotted}.") and re.search(rf"\b{key[len(dotted) + 1 :]}\b", message)
    ]
    return next((places[key] for key in named if places[key].startswith("override")), None)


def _upwards(dotted: str) -> Iterator[str]:
    while dotted:
        yield dotted
        dotted = dotted.rpartition(".")[0]


def _keys_of(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        inner = _section_in(field.annotation)
        if inner is not None:
            yield from _keys_of(inner, f"{prefix}{name}.")


def _section_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_section_in(inner) for inner in get_args(annotation))
    return next((section for section in found if section is not None), None)


def _lists_of(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The keys that hold a list of sections."""
    for name, field in section.model_fields.items():
        inner = _section_in(field.annotation)
        if inner is not None and get_origin(field.annotation) is tuple:
            yield f"{prefix}{name}"
        elif inner is not None:
            yield from _lists_of(inner, f"{prefix}{name}.")


_KNOWN_KEYS = tuple(_keys_of(Config))
_LISTS = tuple(_lists_of(Config))


def _nearest(dotted: str) -> str:
    """What was meant by an unknown key: a neighbour that is spelt alike, else the same name elsewhere."""
    section, _, name = dotted.rpartition(".")
    neighbours = [key for key in _KNOWN_KEYS if key.rpartition(".")[0] == section]
    by_name = {key.rpartition(".")[2]: key for key in neighbours}
    close = difflib.get_close_matches(name, by_name, n=1, cutoff=0.6)
    if close:
        return f"did you mean {by_name[close[0]]}?"
    elsewhere = [key for key in _KNOWN_KEYS if key.rpartition(".")[2] == name]
    inside = [key for key in elsewhere if section and key.startswith(f"{section.split('.')[0]}.")]
    spelt = inside or elsewhere or difflib.get_close_matches(dotted, _KNOWN_KEYS, n=1, cutoff=0.6)
    if spelt:
        return f"did you mean {' or '.join(spelt[:3])}?"
    if neighbours:
        return f"{section or 'the top level'} knows: {', '.join(by_name)}"
    return f"the sections are: {', '.join(Config.model_fields)}"
