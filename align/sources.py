"""What the reward sources depend on outside of a run, found and hashed without loading it: for fingerprints and
`align check`."""

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
        ConfigError: the function's module cannot be found.
    """
    if source.function is not None:
        module = source.function.partition(":")[0]
        path = _module_file(module)
        if path is None:
            raise ConfigError(
                f"ppo.rewards.sources: {source.function}: there is no module {module}; it must be installed, or lie in "
                f"the folder that the command is run in, here {Path.cwd()}"
            )
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
