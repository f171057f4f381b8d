"""The folder listing is the map: imports flow one way, and few rooms know that there are other ranks."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "vsa_ddp"
# Each room may import those before it
ORDER = [
    "config",
    "version",
    "stats",
    "layout",
    "names",
    "whitening",
    "hypervector",
    "ternary",
    "packing",
    "codec",
    "sigma",
    "wires",
    "agreement",
    "state",
    "hook",
    "register",
    "__init__",
]
MAY_COMMUNICATE = {"wires", "agreement", "state", "hook", "register"}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module
            assert node.level == 0
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_has_its_place() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ORDER)


def test_imports_flow_one_way() -> None:
    for path in PACKAGE.glob("*.py"):
        used = {name.split(".")[1] for name in imports(path) if name.startswith("vsa_ddp.")}
        allowed = ORDER[: ORDER.index(path.stem)]
        assert used & set(ORDER) <= set(allowed), f"{path.name} imports {sorted(used - set(allowed))}"


def test_only_a_few_modules_communicate() -> None:
    for path in PACKAGE.glob("*.py"):
        if any("distributed" in name or "DistributedDataParallel" in name for name in imports(path)):
            assert path.stem in MAY_COMMUNICATE, path.name
