"""The tests that pages name exist, and the example in docs/seed.md runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["seed.md", "faults.md"])
def test_every_test_that_a_page_names_exists(page: str) -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / page).read_text()))
    written = {
        name
        for path in Path(__file__).parent.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(named) > 10
    assert not named - written


def test_the_example_runs() -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "seed.md").read_text(), re.MULTILINE | re.DOTALL)
    shown: list[object] = []
    exec(example, {"print": shown.append})
    cosine, stats = shown
    assert abs(cosine - float(re.findall(r"# (0\.\d+)", example)[0])) < 0.02  # type: ignore[operator]
    assert stats[:3] == (2, 16, 0)  # type: ignore[index]
