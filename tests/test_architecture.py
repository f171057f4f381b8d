"""The folder listing is the map: imports flow one way, and few rooms know that there are other ranks."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "vsa_ddp"
# Each room may import those before it
ORDER = [
    "nodes",
    "rates",
    "config",
    "version",
    "cost",
    "stats",
    "phase",
    "layout",
    "names",
    "hypervector",
    "whitening",
    "ternary",
    "sparse",
    "packing",
    "trits",
    "archive",
    "kernels",
    "rounded_sum",
    "accumulate",
    "optimizer",
    "codec",
    "compressor",
    "sigma",
    "wires",
    "peers",
    "probe",
    "agreement",
    "replicas",
    "state",
    "hook",
    "register",
    "alignment",
    "changes",
    "averager",
    "history",
    "predictor",
    "local_phases",
    "snapshot",
    "trainer",
    "__init__",
    "__main__",
]
MAY_COMMUNICATE = {
    "wires",
    "peers",
    "probe",
    "__main__",
    "agreement",
    "names",
    "state",
    "hook",
    "register",
    "averager",
    "trainer",
}


def rooms() -> list[tuple[str, Path]]:
    """Every module with the name of its room: a file, or a folder."""
    return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in PACKAGE.rglob("*.py")]


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
    assert {room for room, _ in rooms()} == set(ORDER)


def test_imports_flow_one_way() -> None:
    for room, path in rooms():
        used = {name.split(".")[1] for name in imports(path) if name.startswith("vsa_ddp.")}
        allowed = {room, *ORDER[: ORDER.index(room)]}
        assert used & set(ORDER) <= allowed, f"{path.name} imports {sorted(used - allowed)}"


def test_only_a_few_modules_communicate() -> None:
    for room, path in rooms():
        if any("distributed" in name or "DistributedDataParallel" in name for name in imports(path)):
            assert room in MAY_COMMUNICATE, path.name


def test_only_the_kernels_import_compilers() -> None:
    for room, path in rooms():
        if {name.split(".")[0] for name in imports(path)} & {"numba", "triton"}:
            assert room == "kernels", path.name


def test_the_schedule_of_phases_is_pure() -> None:
    used = {name.split(".")[0] for name in imports(PACKAGE / "phase.py")}
    assert not used & {"torch", "numpy", "time", "random"}
