"""docs/seed.md: its example runs, and the tests that it names exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "seed.md").read_text()


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    written = {
        name
        for path in Path(__file__).parent.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert len(named) > 10
    assert named <= written


def test_the_example_runs() -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    shown: list[object] = []
    exec(example, {"print": shown.append})
    cosine, stats = shown
    assert abs(cosine - float(re.findall(r"# (0\.\d+)", example)[0])) < 0.02  # type: ignore[operator]
    assert stats[:3] == (2, 16, 0)  # type: ignore[index]
