"""Imports point downward only, as on CONTRIBUTING's map, nothing imports the front door, and nothing grows too big."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import dream_hf

ROOT = Path(dream_hf.__file__).parent

# From the bottom up, folders and the files beside them. A module may import what stands below it, and what stands beside it as
# long as that makes no circle.
LAYERS = [
    ["version", "compat"],
    ["runtime"],
    ["targets"],
    ["decoding"],
    ["hub"],
    ["drafters"],
    ["load_models"],
    ["data"],
    ["training", "regeneration"],
    ["benchmark", "demo"],
    ["page"],
    ["cli"],
    ["registration", "compression", "conversion"],  # registration hands calls to the loop, when they come
    ["__init__"],
    ["__main__"],
]
RANKS = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# Where something has always been importable from that now stands higher. No module of the package may use them.
ALIASES = {"compression", "conversion", "hub.__init__"}
MAX_LINES, MAX_FUNCTION_LINES, MAX_ROOT_FILES = 400, 60, 8


def modules() -> dict[str, Path]:
    """Every module by its dotted name in the package, templates (which are no part of it) left out."""
    files = [path for path in ROOT.rglob("*.py") if "templates" not in path.parts]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imported(name: str, tree: ast.AST) -> set[str]:
    """Dotted names of this package's modules that a module imports: anywhere in its code, and for its annotations alone."""
    package = name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(tree):
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


def _existing(dotted: str) -> str:
    """The module that `dotted`, a module or something in one, belongs to; `__init__` for the package itself."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        for candidate in (".".join(parts[:end]), ".".join([*parts[:end], "__init__"])):
            if candidate in MODULES:
                return candidate
    return "__init__"


GRAPH = {name: imported(name, tree) for name, tree in TREES.items()}


def folder(module: str) -> str:
    """The folder at the package's root that a module is in; a file beside them by its own name."""
    return module.split(".", maxsplit=1)[0]


def rank(module: str) -> int:
    return RANKS[folder(module)]


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """The names of one circle, the first of them again at its end; nothing where there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in graph.get(name, ()):
                if circle := visit(other, [*path, name]):
                    return circle
            done.add(name)
        return []

    return next((circle for name in graph if (circle := visit(name, []))), [])


def test_there_is_something_to_check():
    assert {folder(name) for name in GRAPH} == RANKS.keys()
    assert {"decoding.tree", "decoding.loop", "drafters.growth", "drafters.dream.modeling"} <= GRAPH.keys()
    assert "decoding.target_forward" in GRAPH["decoding.loop"] and "runtime.kv_cache" in GRAPH["drafters.dream.state"]
    assert "decoding.loop" in GRAPH["registration"]  # imports inside functions are seen
    assert "decoding.loop" in GRAPH["__init__"]  # and those for annotations alone
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"] and not find_circle({"a": {"b", "c"}})


def test_nothing_imports_the_front_door():
    offenders = [name for name, names in GRAPH.items() if "__init__" in names and name != "__main__"]
    assert not offenders, f"{offenders} import `dream_hf` itself; import the module that has what they need"


@pytest.mark.parametrize("name", sorted(GRAPH.keys() - {"__init__"} - ALIASES))
def test_imports_point_downward(name):
    for other in GRAPH[name]:
        assert rank(other) <= rank(name), f"{name} imports {other}, which stands above it"
        assert other not in ALIASES, f"{name} imports {other}, which only keeps an old name; import what it imports"


def test_aliases_define_nothing_but_names():
    for name in ALIASES:
        defined = [node.name for node in TREES[name].body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert defined in ([], ["__getattr__"])


def test_no_circles():
    circle = find_circle(GRAPH)
    assert not circle, f"modules import each other: {' -> '.join(circle)}"


def test_folders_make_no_circles():
    graph: dict[str, set[str]] = {}
    for name, names in GRAPH.items():
        if name not in ALIASES:
            graph.setdefault(folder(name), set()).update(folder(other) for other in names)
    circle = find_circle({name: others - {name} for name, others in graph.items()})
    assert not circle, f"folders import each other: {' -> '.join(circle)}"


def test_drafters_know_neither_each_other_nor_the_loop():
    kinds = {name.split(".")[1] for name in MODULES if name.startswith("drafters.") and name.count(".") > 1}
    assert {"dream", "retrieval"} <= kinds
    for name, names in GRAPH.items():
        if folder(name) != "drafters":
            continue
        assert "decoding.loop" not in names, f"{name} imports the loop, which runs it"
        own = name.split(".")[1]  # the drafter's folder, or a file that drafters share
        others = {
            other for other in names if other.split(".")[0] == "drafters" and other.split(".")[1] in kinds - {own}
        }
        assert not others, f"{name} imports {others} of another drafter"


def test_decoding_knows_no_drafter():
    for name, names in GRAPH.items():
        found = {other for other in names if folder(other) == "drafters"}
        assert folder(name) != "decoding" or not found, f"{name} imports {found}; it knows `decoding.drafter` alone"


def test_only_targets_knows_that_families_exist():
    import transformers

    names = {path.name for path in (Path(transformers.__file__).parent / "models").iterdir() if path.is_dir()}
    names -= {"auto", "llama"}  # the drafter is made of Llama's layers
    for module, tree in TREES.items():
        if folder(module) in ("targets", "demo"):  # the demo world's own words, and the tiny target of that world
            continue
        strings = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not strings & names, f"{module} names {strings & names}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_files_and_functions_are_small(name):
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= MAX_LINES
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = node.end_lineno - node.lineno + 1
            assert num_lines <= MAX_FUNCTION_LINES, f"`{node.name}` has {num_lines} lines, its docstring included"


def test_few_files_stand_at_the_root():
    files = sorted(name for name in MODULES if "." not in name)
    assert len(files) <= MAX_ROOT_FILES, f"{files}; modules belong into the folder of what they are for"


def test_the_map_shows_every_folder_and_the_walk_every_file_once():
    text = (ROOT.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = [name.removesuffix(".py") for name in re.findall(r"^\| `([\w.]+)/?` \|", text, re.MULTILINE)]
    assert set(shown) == RANKS.keys() - {"version", "compression", "conversion", "__init__", "__main__"}
    assert [RANKS[name] for name in shown] == sorted((RANKS[name] for name in shown), reverse=True)
    walk = text[text.index("## One decoding step") : text.index("## Adding a drafter")]
    files = re.findall(r"`([\w/]+\.py)`", walk)
    assert len(files) > 20 and len(set(files)) == len(files)
    for file in re.findall(r"`([\w/]+\.py)`", text):
        assert (ROOT / file).is_file() or (ROOT.parents[1] / file).is_file(), file
