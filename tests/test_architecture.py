"""Who may import whom: the rules of the house, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*(ROOT / "racnn_cli").rglob("*.py"), *(ROOT / "backbones").rglob("*.py")])
HEAVY = {"torch", "torchvision", "timm", "cv2", "albumentations", "onnx", "onnxruntime", "onnxscript"}
LIGHT = {"cli.py", "recipe.py", "run.py", "errors.py", "fetch.py", "__init__.py", "__main__.py"}

# What a part of the house may know, besides itself. `*` is all but the command line.
GROUND = {"racnn_cli", "racnn_cli.errors", "racnn_cli.recipe", "racnn_cli.run"}
MAY_KNOW = {
    "racnn_cli.errors": set(),
    "racnn_cli.recipe": {"racnn_cli.errors"},
    "racnn_cli.run": {"racnn_cli.errors", "racnn_cli.recipe"},
    "racnn_cli.fetch": {"racnn_cli.errors"},
    "backbones": {"racnn_cli.errors", "racnn_cli.fetch"},
    "racnn_cli.core": GROUND | {"backbones"},
    "racnn_cli.data": GROUND | {"racnn_cli.fetch"},
    "racnn_cli.results": GROUND | {"backbones", "racnn_cli.core", "racnn_cli.data"},
    "racnn_cli.training": GROUND | {"backbones", "racnn_cli.core", "racnn_cli.data"},
    "racnn_cli.api": {"*"},
    "racnn_cli.bench": {"*"},
    "racnn_cli.cli": {"*"},
    "racnn_cli.__main__": {"racnn_cli.cli"},
    "racnn_cli": {"*"},  # the lazy public API
}


def module(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> set[str]:
    """Every module that is imported anywhere in a tree; `from a import b` counts as `a.b` where that is a module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            base = node.module or ""
            found |= {f"{base}.{a.name}" if is_module(f"{base}.{a.name}") else base for a in node.names}
    return found


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def part(name: str) -> str:
    """The part of the house that a module belongs to: the longest name in the table."""
    return max((p for p in MAY_KNOW if name == p or name.startswith(p + ".")), key=len)


def at_top(file: Path) -> set[str]:
    """What a module imports when it is imported: not within functions, nor for type checkers alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))

    class Cut(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.If | None:
            return None if "TYPE_CHECKING" in ast.dump(node.test) else node

    return imports(Cut().visit(tree))


def test_the_table_covers_the_house() -> None:
    assert len(FILES) > 30
    assert {part(module(file)) for file in FILES} == set(MAY_KNOW)


@pytest.mark.parametrize("file", FILES, ids=module)
def test_a_module_imports_only_what_it_may_know(file) -> None:
    mine = part(module(file))
    for other in imports(ast.parse(file.read_text(encoding="utf-8"))):
        if other.split(".")[0] not in ("racnn_cli", "backbones"):
            continue
        home = part(other)
        assert home != "racnn_cli.cli" or mine in ("racnn_cli.__main__", "racnn_cli.cli"), f"{mine} -> cli"
        allowed = MAY_KNOW[mine]
        assert home == mine or home in allowed or "*" in allowed, f"{module(file)} imports {other}"


def test_the_rules_forbid_what_the_page_forbids() -> None:
    for mine, other in [
        ("core", "data"),
        ("core", "training"),
        ("core", "results"),
        ("data", "core"),
        ("data", "training"),
        ("data", "results"),
        ("results", "training"),
        ("training", "results"),
    ]:
        assert f"racnn_cli.{other}" not in MAY_KNOW[f"racnn_cli.{mine}"]


def test_augmentation_is_one_modules_business() -> None:
    users = [
        module(f)
        for f in FILES
        if any(name.split(".")[0] == "albumentations" for name in imports(ast.parse(f.read_text("utf-8"))))
    ]
    assert users == ["racnn_cli.data.transforms"]


def test_the_core_is_torch_and_nothing_else() -> None:
    for file in (ROOT / "racnn_cli" / "core").glob("*.py"):
        outside = {name.split(".")[0] for name in imports(ast.parse(file.read_text("utf-8")))}
        assert not outside & {"timm", "cv2", "PIL", "albumentations", "torchvision", "onnx", "rich"}, file


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.parent == ROOT / "racnn_cli" and f.name in LIGHT], ids=module
)
def test_the_ground_floor_loads_nothing_heavy(file) -> None:
    assert not {name.split(".")[0] for name in at_top(file)} & HEAVY
    own = {name for name in at_top(file) if name.startswith(("racnn_cli.", "backbones"))}
    assert {name.split(".")[-1] for name in own} <= {"cli", "recipe", "run", "errors", "fetch"}
