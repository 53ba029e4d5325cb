"""The rules of the house that a program can check: imports point down, optional packages have one home."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Lowest first. A package imports what stands in lower rows; inside one row only the pairs below, if any.
LAYERS = [
    ["cm3.errors", "cm3.checkpoint", "cm3.distributed", "cm3.config", "cm3.gallery", "cm3.pretrained"],
    ["cm3.tokenizers"],
    ["cm3.data", "cm3.model"],
    ["cm3.generation", "cm3.retrieval", "cm3.diffusion", "cm3.personalize"],
    ["cm3.pipeline", "cm3.drawing", "cm3.interop"],
    ["cm3.eval", "cm3.serve"],
    ["cm3.training"],
    ["cm3.cli_options", "cm3.cli_parser"],
    [
        "cm3.cli",
        "cm3.cli_bench",
        "cm3.cli_compare",
        "cm3.cli_export",
        "cm3.cli_import",
        "cm3.cli_index",
        "cm3.cli_instruct",
        "cm3.cli_requests",
    ],
    ["cm3.__main__"],
]
LAYER_OF = {package: layer for layer, row in enumerate(LAYERS) for package in row}
ALLOWED_INSIDE_A_LAYER = {
    ("cm3.generation", "cm3.retrieval"),
    ("cm3.serve", "cm3.eval"),
    ("cm3.pipeline", "cm3.drawing"),
    ("cm3.cli", "cm3.cli_bench"),
    ("cm3.cli", "cm3.cli_compare"),
    ("cm3.cli", "cm3.cli_export"),
    ("cm3.cli", "cm3.cli_import"),
    ("cm3.cli", "cm3.cli_index"),
    ("cm3.cli", "cm3.cli_instruct"),
    ("cm3.cli", "cm3.cli_requests"),
} | {(importer, imported) for importer in LAYERS[0] for imported in LAYERS[0]}

# Imported in this one place, guarded there, and nowhere else.
HOME_OF_OPTIONAL = {
    "deepspeed": "training/engine.py",
    "faiss": "cm3/retrieval/index.py",
    "flash_attn": "cm3/model/attention.py",
    "transformers": ("cm3/interop/", "cm3/retrieval/foreign_clip.py"),
    "tokenizers": "tokenizers/json_text.py",
    "peft": "cm3/model/lora.py",
    "wandb": "training/trackers.py",
}
MAX_LINES = 600


@cache
def modules() -> dict[str, Path]:
    """Every module of the library, by its full name."""
    found = {}
    for folder in ("cm3", "tokenizers", "training", "eval"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if folder == "cm3" else ("cm3", *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, full name) of every import, those inside functions and behind conditions included."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full cm3. name"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def module_of(name: str) -> str | None:
    """The module of this library that importing `name` runs, or None for a name of another library."""
    while name.split(".")[0] == "cm3":
        if name in modules():
            return name
        name = name.rpartition(".")[0]
    return None


def package_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def may_import(importer: str, imported: str) -> bool:
    if importer == imported:
        return True
    if LAYER_OF[importer] == LAYER_OF[imported]:
        return (importer, imported) in ALLOWED_INSIDE_A_LAYER
    return LAYER_OF[importer] > LAYER_OF[imported]


def test_every_package_has_a_layer():
    packages = {package_of(module) for module in modules()} - {"cm3"}
    assert packages <= set(LAYER_OF), "give it a row in LAYERS and in CONTRIBUTING.md"


def test_imports_point_down():
    faults = []
    for module, path in modules().items():
        for line, name in imports(path):
            target = module_of(name)
            if module == "cm3" or target is None or name == "cm3.__version__":
                continue  # cm3/__init__.py names what it loads later; the version is there at once
            if target == "cm3" or not may_import(package_of(module), package_of(target)):
                faults.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not faults, "\n".join(faults)


def test_the_public_names_are_loaded_lazily():
    eager = [
        node
        for node in tree(ROOT / "cm3/__init__.py").body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "cm3"
    ]
    assert not eager


def test_no_import_cycles():
    edges = {
        module: {target for _, name in imports(path) if (target := module_of(name)) and target != module}
        for module, path in modules().items()
        if module != "cm3"
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, "import cycle: " + " -> ".join((*trail, module))
        if module not in done:
            for target in edges.get(module, ()):
                visit(target, (*trail, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def test_nothing_is_imported_by_a_computed_name():
    faults = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for module, path in modules().items()
        if module != "cm3"
        for node in ast.walk(tree(path))
        if (isinstance(node, ast.Name) and node.id in {"import_module", "__import__"})
        or (isinstance(node, ast.Attribute) and node.attr == "import_module")
    ]
    assert not faults, f"write an import statement: {faults}"


def test_folders_are_not_imported_by_their_own_name():
    files = [*modules().values(), *(ROOT / "tests").glob("*.py")]
    faults = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in files
        for line, name in imports(path)
        if name.split(".")[0] in {"training", "eval"}
    ]
    assert not faults, f"write cm3.training and cm3.eval: {faults}"


@pytest.mark.parametrize("package", HOME_OF_OPTIONAL)
def test_optional_packages_have_one_home(package: str):
    users = {
        path.relative_to(ROOT).as_posix()
        for path in modules().values()
        for _, name in imports(path)
        if name.split(".")[0] == package
    }
    assert all(user.startswith(HOME_OF_OPTIONAL[package]) for user in users), users


def test_files_are_read_in_one_sitting():
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in modules().values()}
    assert not [path for path, count in lines.items() if count > MAX_LINES]


def test_names_say_what_a_file_holds():
    assert not [path for path in modules().values() if path.stem in {"utils", "common", "helpers", "misc"}]
