"""Which part may import which, read from the source. docs/design.md draws the same rules."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "torchvision", "timm", "cv2", "albumentations", "onnx", "onnxruntime", "onnxscript"}
LIGHT = {"api", "cli", "options", "recipe", "run", "errors", "events", "fetch", "threads", "__init__", "__main__"}

# What every part may import, and what each may import in addition. `*` is everything but the command line.
COMMON = {"racnn_cli", "racnn_cli.errors", "racnn_cli.events", "racnn_cli.recipe", "racnn_cli.run"}
ALLOWED = {
    "racnn_cli.errors": set(),
    "racnn_cli.events": {"racnn_cli.errors"},
    "racnn_cli.recipe": {"racnn_cli", "racnn_cli.errors"},
    "racnn_cli.run": COMMON,
    "racnn_cli.fetch": {"racnn_cli.errors"},
    "racnn_cli.threads": set(),
    "racnn_cli.options": COMMON,
    "racnn_cli.backbones": COMMON | {"racnn_cli.fetch"},
    "racnn_cli.core": COMMON | {"racnn_cli.backbones"},
    "racnn_cli.data": COMMON | {"racnn_cli.fetch"},
    "racnn_cli.evaluation": COMMON | {"racnn_cli.core", "racnn_cli.data"},
    "racnn_cli.export": COMMON | {"racnn_cli.backbones", "racnn_cli.core", "racnn_cli.data", "racnn_cli.evaluation"},
    "racnn_cli.results": COMMON | {"racnn_cli.core", "racnn_cli.data", "racnn_cli.evaluation", "racnn_cli.export"},
    "racnn_cli.training": COMMON
    | {"racnn_cli.backbones", "racnn_cli.core", "racnn_cli.data", "racnn_cli.evaluation", "racnn_cli.threads"},
    "racnn_cli.bench": {"*"},
    "racnn_cli.api": {"*"},
    "racnn_cli.cli": {"*"},
    "racnn_cli.__main__": {"racnn_cli.cli"},
    "racnn_cli": {"*"},  # the lazy public API
}


def module_name(file: Path) -> str:
    """The name that a file is imported by; `backbones/` lies beside the package in the repository."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    parts = ["racnn_cli", *parts] if parts[0] == "backbones" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for folder in ("racnn_cli", "backbones") for file in (ROOT / folder).rglob("*.py")}
IDS = pytest.mark.parametrize("name", sorted(FILES))


def imports_in(tree: ast.AST) -> set[str]:
    """Every module that is imported anywhere in a tree; `from a import b` counts as `a.b` where that is a module."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            base = node.module or ""
            modules |= {f"{base}.{a.name}" if f"{base}.{a.name}" in FILES else base for a in node.names}
    return modules


def imports_of(name: str) -> set[str]:
    return imports_in(ast.parse(FILES[name].read_text(encoding="utf-8")))


def imports_at_module_level(name: str) -> set[str]:
    """What is loaded when a module is imported: not within functions, nor for type checkers alone."""

    class Cut(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.If | None:
            return None if "TYPE_CHECKING" in ast.dump(node.test) else node

    return imports_in(Cut().visit(ast.parse(FILES[name].read_text(encoding="utf-8"))))


def part_of(name: str) -> str:
    """The part of the package that a module belongs to: the longest name in the table."""
    return max((part for part in ALLOWED if name == part or name.startswith(part + ".")), key=len)


def test_the_table_covers_the_package() -> None:
    assert len(FILES) > 30
    assert {part_of(name) for name in FILES} == set(ALLOWED)


@IDS
def test_a_module_imports_only_what_its_part_may(name) -> None:
    part = part_of(name)
    for imported in imports_of(name):
        assert imported.split(".")[0] not in ("backbones", "recipes"), "not a top-level package"
        if imported.split(".")[0] != "racnn_cli":
            continue
        target = part_of(imported)
        assert target != "racnn_cli.cli" or part in ("racnn_cli.__main__", "racnn_cli.cli"), f"{name} -> cli"
        assert target == part or target in ALLOWED[part] or "*" in ALLOWED[part], f"{name} imports {imported}"


def test_the_table_forbids_what_the_design_forbids() -> None:
    for part, target in [
        ("core", "data"),
        ("core", "training"),
        ("core", "results"),
        ("data", "core"),
        ("data", "training"),
        ("data", "results"),
        ("evaluation", "training"),
        ("evaluation", "results"),
        ("export", "results"),
        ("export", "training"),
        ("results", "training"),
        ("training", "results"),
        ("training", "export"),
    ]:
        assert f"racnn_cli.{target}" not in ALLOWED[f"racnn_cli.{part}"]


def test_no_modules_import_each_other() -> None:
    """Not even inside of functions or for type checkers, through any number of modules. The package itself is left out:
    every module needs it, and its lazy public API names some of them."""
    imports = {name: {other for other in imports_of(name) if other in FILES and other != name} for name in FILES}
    imports = {name: {other for other in others if other != "racnn_cli"} for name, others in imports.items()}
    remaining = {name: set(others) for name, others in imports.items() if name != "racnn_cli"}
    while free := {name for name, others in remaining.items() if not others & remaining.keys()}:
        remaining = {name: others for name, others in remaining.items() if name not in free}
    circles = {name: sorted(others & remaining.keys()) for name, others in remaining.items()}
    assert not circles


def test_augmentation_is_one_modules_business() -> None:
    users = [name for name in FILES if any(m.split(".")[0] == "albumentations" for m in imports_of(name))]
    assert users == ["racnn_cli.data.transforms"]


def test_the_core_is_torch_and_nothing_else() -> None:
    for name in FILES:
        if part_of(name) == "racnn_cli.core":
            outside = {module.split(".")[0] for module in imports_of(name)}
            assert not outside & {"timm", "cv2", "PIL", "albumentations", "torchvision", "onnx", "rich"}, name


@pytest.mark.parametrize(
    "name", [name for name, file in FILES.items() if file.parent == ROOT / "racnn_cli" and file.stem in LIGHT]
)
def test_what_the_command_line_loads_first_is_light(name) -> None:
    loaded = imports_at_module_level(name)
    assert not {module.split(".")[0] for module in loaded} & HEAVY
    own = {module.split(".")[1] for module in loaded if module.startswith("racnn_cli.")}
    assert own <= LIGHT
