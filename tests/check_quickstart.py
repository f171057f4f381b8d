"""Check a quickstart.json: python -m tests.check_quickstart runs/quickstart.json"""

import json
import sys
from pathlib import Path

FIGURES = {"train_loss", "heldout_loss", "wire_bytes_per_step", "compression", "ms_per_step", "hook_ms"}


def check(file: Path) -> None:
    """Raises AssertionError if the file is not what the quickstart promises."""
    report = json.loads(file.read_text())
    methods = report["methods"]
    assert set(methods) - {"phases"} == {"dense", "powersgd", "vsa", "vsa-local"}, sorted(methods)
    if "phases" in methods:
        phases = report["phases"]
        assert phases["backwards"] == report["config"]["steps"] == phases["steps"] - phases["skipped"]
    for method, figures in methods.items():
        assert set(figures) == FIGURES, (method, sorted(figures))
        assert all(isinstance(value, float) and value >= 0 for value in figures.values()), (method, figures)
        assert 0 < figures["heldout_loss"] < 6, (method, figures)
    sent = {method: figures["wire_bytes_per_step"] for method, figures in methods.items()}
    assert sent["vsa-local"] < sent["vsa"] < sent["powersgd"] < sent["dense"], sent
    assert methods["dense"]["hook_ms"] == 0 < min(methods["vsa"]["hook_ms"], methods["vsa-local"]["hook_ms"])
    for name in ("steps", "ranks", "compression", "optimizer", "seed", "learning_rates", "hardware", "corpus"):
        assert name in report["config"], name
    picture = file.with_suffix(".png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


if __name__ == "__main__":
    check(Path(sys.argv[1]))
    print(f"{sys.argv[1]}: as promised")
