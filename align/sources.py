"""What the reward sources depend on outside of a run, found and hashed without loading it: for fingerprints and
`align check`."""

import ast
import re
import sys
from collections.abc import Mapping
from importlib.machinery import PathFinder
from pathlib import Path

from align.artifacts import sha256_of_file, sha256_of_json
from align.base import missing_files
from align.config import RewardsConfig, RewardSourceConfig
from align.errors import ConfigError, ModelError


def source_identities(config: RewardsConfig) -> Mapping[str, str]:
    """By name; the reward stage's own models are artifacts and stand elsewhere. Raises as source_identity."""
    return {source.label_in_logs: source_identity(source) for source in config.sources if source.kind != "reward"}


def source_identity(source: RewardSourceConfig) -> str:
    """A hash of the classifier's files or of the function's module; of a hub id, its name and revision.

    Raises:
        ModelError: the folder is not there, or is no model of transformers.
        ConfigError: the function's module cannot be found, or does not have it.
    """
    if source.function is not None:
        module, _, function = source.function.partition(":")
        path = _module_file(module)
        if path is None:
            raise ConfigError(
                f"ppo.rewards.sources: {source.function}: there is no module {module}; it must be installed, or lie in "
                f"the folder that the command is run in, here {Path.cwd()}"
            )
        _verify_named(path, function, key=f"ppo.rewards.sources: {source.function}")
        return sha256_of_file(path)
    assert source.model is not None
    folder = Path(source.model)
    if not folder.is_absolute():  # settings made every folder absolute
        return f"{source.model}@{source.revision or 'default'}"
    missing = missing_files(folder)
    if missing:
        raise ModelError(
            f"ppo.rewards.sources: {folder} holds no {' and no '.join(missing)}; give a folder of a sequence classifier"
        )
    files = sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("tokenizer*")])
    return sha256_of_json({file.name: sha256_of_file(file) for file in files})


def _verify_named(path: Path, function: str, *, key: str) -> None:
    """ConfigError if a module is not Python, or its text cannot give anything of this name; nothing is imported."""
    if path.suffix != ".py":
        return
    text = path.read_bytes()
    try:
        ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{key}: {path} is not Python: {error}") from None
    if not re.search(rf"\b{function}\b|import\s*\*|__getattr__|globals|exec", text.decode(errors="replace")):
        raise ConfigError(f"{key}: {path} has no function {function}")


def _module_file(module: str) -> Path | None:
    """Where Python would find a module, the current folder first as on a worker; nothing is imported."""
    search: list[str] | None = [str(Path.cwd()), *sys.path]
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:end]), search)
        if spec is None:
            return None
        if end == len(parts):
            return Path(spec.origin) if spec.origin is not None else None
        search = list(spec.submodule_search_locations or [])
    return None
