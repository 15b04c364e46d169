"""What the reward sources depend on outside of a run, found and hashed without loading it: for fingerprints and
`align check`."""

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from align.artifacts import sha256_of_file, sha256_of_json
from align.base import verify_model_folder
from align.config import RewardsConfig, RewardSourceConfig
from align.errors import ConfigError

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def source_identities(config: RewardsConfig) -> Mapping[str, str]:
    """By name; the reward stage's own models are artifacts and stand elsewhere. Raises as source_identity."""
    return {source.label_in_logs: source_identity(source) for source in config.sources if source.kind != "reward"}


def source_identity(source: RewardSourceConfig) -> str:
    """A hash of the classifier's files or of the function's module; of a hub id, its name and revision.

    Raises:
        ModelError: the folder is not there, or is no model of transformers.
        ConfigError: the function's module cannot be found, or its text shows that the function cannot be called.
    """
    if source.function is not None:
        module, _, function = source.function.partition(":")
        path = _module_file(module)
        if path is None:
            raise ConfigError(
                f"ppo.rewards.sources: {source.function}: there is no module {module}; it must be installed, or lie in "
                f"the folder that the command is run in, here {Path.cwd()}"
            )
        _verify_function(path, function, key=f"ppo.rewards.sources: {source.function}")
        return sha256_of_file(path)
    assert source.model is not None
    folder = Path(source.model)
    if not folder.is_absolute():  # settings made every folder absolute
        return f"{source.model}@{source.revision or 'default'}"
    verify_model_folder(folder, key="ppo.rewards.sources")
    files = sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("tokenizer*")])
    return sha256_of_json({file.name: sha256_of_file(file) for file in files})


def _verify_function(path: Path, function: str, *, key: str) -> None:
    """ConfigError if the text of a module shows that it cannot be imported, or has nothing of this name that could be
    called as function(prompt, response). Nothing is imported: what a module does then may take long, and much memory.
    """
    if path.suffix != ".py":
        return
    text = path.read_bytes()
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{key}: {path} is not Python: {error}") from None
    for name in () if re.search(rb"sys\.path|addsitedir|meta_path", text) else _needed(module):
        if _spec(name) is None:
            raise ConfigError(f"{key}: {path} imports {name}, and there is no module of this name")
    made = [node for node in _statements(module) if isinstance(node, _FUNCTIONS) and node.name == function]
    if not made and not re.search(
        rf"\b{function}\b|import\s*\*|__getattr__|globals\(|exec\(", text.decode(errors="replace")
    ):
        raise ConfigError(f"{key}: {path} has no function {function}")
    if made and not made[-1].decorator_list:  # which may change what it takes
        _verify_called_with_two(made[-1], where=f"{key}: {path}:{made[-1].lineno}: {function}")


def _verify_called_with_two(node: ast.FunctionDef | ast.AsyncFunctionDef, *, where: str) -> None:
    if isinstance(node, ast.AsyncFunctionDef):
        raise ConfigError(f"{where} is a coroutine function (async def); it is called as a plain one: take def")
    positional = [*node.args.posonlyargs, *node.args.args]
    least = len(positional) - len(node.args.defaults)
    is_short = len(positional) < 2 and node.args.vararg is None
    if least > 2 or is_short or None in node.args.kw_defaults:
        raise ConfigError(f"{where}({ast.unparse(node.args)}) cannot be called as {node.name}(prompt, response)")


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported, the bodies of functions and classes left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield child
            if not isinstance(child, (*_FUNCTIONS, ast.ClassDef)):
                yield from _statements(child)


def _needed(module: ast.Module) -> Iterator[str]:
    """The top-level names that it imports whatever happens: not under an if or a try."""
    for node in module.body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            yield node.module.partition(".")[0]


def _module_file(module: str) -> Path | None:
    """Where Python would find a module, the current folder first as on a worker; nothing is imported."""
    top, *parts = module.split(".")
    spec = _spec(top)
    for end, _ in enumerate(parts, start=1):
        if spec is None:
            return None
        spec = PathFinder.find_spec(".".join([top, *parts[:end]]), list(spec.submodule_search_locations or []))
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin is not None else None


def _spec(name: str) -> ModuleSpec | None:
    """Of a top-level module; packages that are installed to be edited have finders of their own."""
    found = PathFinder.find_spec(name, [str(Path.cwd()), *sys.path])
    return found or next((spec for finder in sys.meta_path if (spec := finder.find_spec(name, None))), None)
