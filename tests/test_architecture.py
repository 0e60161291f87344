"""Imports point downward only, as CONTRIBUTING's table of layers says, and nothing imports the package's front door."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dream_hf

ROOT = Path(dream_hf.__file__).parent

# From the bottom up. A module may import what stands below it, and what stands beside it as long as that makes no circle.
# Modules that are not listed (data, training, benchmarks, the demo) stand above these and below TOP.
LAYERS = [
    [
        "version",
        "tree",
        "verification",
        "caches",
        "static_caches",
        "compiling",
        "compression",
        "downloads",
        "draft_vocabulary",
        "lookups",
        "losses",
        "masked_attention",
        "texts",
        "threads",
        "visibility",
    ],
    ["configuration_dream", "attention", "tree_masks", "tree_proof", "training_args"],
    [
        "loading",
        "card_content",
        "card_sections",
        "model_card",
        "publishing",
        "checkpoints",
        "modeling_dream",
        "lean",
        "levels",
        "rotary",
        "suitability",
        "targets",
    ],
    ["choosing", "outputs", "drafter_state", "drafting", "pausing", "requests", "continuation", "verifying"],
    ["generation", "candidate_generator", "conversion", "hub"],
]
TOP = ["registration", "cli", "__main__"]  # registration hands calls to the loop, when they come
RANKS = {name: rank for rank, layer in enumerate(LAYERS) for name in layer} | {name: len(LAYERS) + 1 for name in TOP}


def modules() -> dict[str, Path]:
    """Every module by its dotted name in the package, templates (which are no part of it) left out."""
    files = [path for path in ROOT.rglob("*.py") if "templates" not in path.parts]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}


def imported(name: str, path: Path) -> set[str]:
    """Dotted names of this package's modules that a module imports, anywhere in its code but under TYPE_CHECKING."""
    package = name.split(".")[:-1]
    found: set[str] = set()
    for node in _running_code(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "dream_hf"}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else None
            parts = (node.module or "").split(".") if node.module else []
            if base is None and parts[:1] != ["dream_hf"]:
                continue
            base = parts[1:] if base is None else base + parts
            for alias in node.names:
                found.add(".".join([*base, alias.name]))
    own_package = ".".join([*package, "__init__"]) if package else name  # which is imported before its modules anyway
    return {_existing(dotted.removeprefix("dream_hf.")) for dotted in found} - {name, own_package}


def _running_code(tree: ast.AST):
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _running_code(child)


def _existing(dotted: str) -> str:
    """The module that `dotted`, a module or something in one, belongs to; `__init__` for the package itself."""
    known = modules()
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        for candidate in (".".join(parts[:end]), ".".join([*parts[:end], "__init__"])):
            if candidate in known:
                return candidate
    return "__init__"


GRAPH = {name: imported(name, path) for name, path in modules().items()}


def rank(module: str) -> int:
    return RANKS.get(module.split(".", maxsplit=1)[0], len(LAYERS))


def test_there_is_something_to_check():
    assert {"tree", "generation", "drafting", "modeling_dream", "candidate_generator"} <= GRAPH.keys() & RANKS.keys()
    assert "drafting" in GRAPH["generation"] and "caches" in GRAPH["drafter_state"]
    assert "generation" in GRAPH["registration"]  # imports inside functions are seen


def test_nothing_imports_the_front_door():
    offenders = [name for name, names in GRAPH.items() if "__init__" in names and name != "__main__"]
    assert not offenders, f"{offenders} import `dream_hf` itself; import the module that has what they need"


@pytest.mark.parametrize("name", sorted(GRAPH.keys() - {"__init__"}))
def test_imports_point_downward(name):
    for other in GRAPH[name]:
        assert rank(other) <= rank(name), f"{name} imports {other}, which stands above it"


def test_no_circles():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"modules import each other: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for other in GRAPH.get(name, ()):
                visit(other, (*path, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


def test_only_targets_knows_that_families_exist():
    import transformers

    names = {path.name for path in (Path(transformers.__file__).parent / "models").iterdir() if path.is_dir()}
    names -= {"auto", "llama"}  # the drafter is made of Llama's layers
    for module in ("generation", "drafting", "verification", "tree", "caches", "attention", "choosing", "outputs"):
        strings = {
            node.value
            for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not strings & names, f"{module} names {strings & names}"
