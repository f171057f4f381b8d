"""The quickstart's command line, its task, and what it writes down."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import bench_quickstart
from launch import quickstart, train
from launch.charlm import NUM_CHARACTERS, CharTransformer, Corpus, windows
from launch.timing import TimedDDP
from launch.train import TrainConfig, learning_rate, schedule, typical
from tests.check_quickstart import check
from tests.conftest import Shown
from vsa_ddp import learning_rate_factor

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--steps", "0"], "--steps"),
        (["--steps", "many"], "--steps"),
        (["--ranks", "0"], "--ranks"),
        (["--compression", "0"], "compression must be a number of at least 1, got 0.0"),
        (["--optimizer", "lion"], "'lion' is not one of 'adamw', 'sgd'"),
        (["--seed", "-1"], "--seed"),
        (["--out", "/dev/null/x"], "cannot make the folder"),
        (["--speed", "9"], "No such option: --speed"),
    ],
)
def test_a_wrong_value_gets_one_line_and_exit_code_2(
    arguments: list[str], named: str, command: Callable[..., Shown]
) -> None:
    outcome = command(quickstart.main, *arguments)
    assert outcome.code == 2
    assert outcome.stdout == ""
    assert len(outcome.stderr.splitlines()) == 1
    assert named in outcome.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--method", "dense", "--period", "5"], "'--period': is for vsa-local, and the method is dense"),
        (["--method", "vsa-local", "--phases"], "'--phases': predicts averaged gradients, and vsa-local has none"),
    ],
)
def test_an_option_of_another_method_is_refused(
    arguments: list[str], named: str, command: Callable[..., Shown]
) -> None:
    assert named in command(train.main, *arguments).stderr


def test_a_typical_step_has_its_share_of_an_average() -> None:
    assert typical([1.0, 1.0, 10.0, 1.0, 1.0, 4.0, 1.0], period=3) == 3.0
    assert typical([5.0], period=3) == 5.0


def test_help_names_every_option(command: Callable[..., Shown]) -> None:
    outcome = command(quickstart.main, "--help")
    assert outcome.code == 0
    for option in ("--steps", "--ranks", "--compression", "--optimizer", "--seed", "--out", "--phases"):
        assert option in outcome.stdout


@pytest.mark.timeout(300)
def test_a_short_run_writes_its_report_and_plot(tmp_path: Path) -> None:
    # the defaults are run by CI, as the README's command
    options = ["--ranks", "1", "--compression", "320", "--optimizer", "sgd", "--seed", "1", "--phases"]
    arguments = [sys.executable, "-m", "launch.quickstart", "--steps", "24", *options, "--out", str(tmp_path)]
    outcome = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert outcome.returncode == 0, outcome.stderr
    check(tmp_path / "quickstart.json")
    for label in ("plain DDP", "PowerSGD 4", "hook", "averager", f"Written: {tmp_path / 'quickstart.json'} and"):
        assert label in outcome.stdout
    assert "…" not in outcome.stdout, "the table fits into 80 columns"
    report = json.loads((tmp_path / "quickstart.json").read_text())
    config, methods, stats = report["config"], report["methods"], report["phases"]
    assert 400_000 <= config["num_parameters"] <= 1_000_000
    assert (config["ranks"], config["compression"], config["optimizer"], config["seed"]) == (1, 320, "sgd", 1)
    assert stats["backwards"] == 24
    assert stats["steps"] == 24 + stats["skipped"]
    assert f"24 backward passes in {stats['steps']} steps" in outcome.stdout
    assert methods["phases"]["wire_bytes_per_step"] == methods["vsa"]["wire_bytes_per_step"]


def test_the_corpus_keeps_held_out_files_apart() -> None:
    corpus = Corpus()
    assert len(corpus.train) > 10 * len(corpus.heldout) > 1e5
    assert corpus.train.max() < NUM_CHARACTERS
    text = bytes(10 if c == 95 else c + 32 for c in corpus.heldout[:200].tolist()).decode()
    assert "def " in text or "import" in text or '"""' in text or "#" in text


def test_windows_are_moved_on_by_one_character() -> None:
    text = torch.arange(90, dtype=torch.uint8)
    x, target = windows(text, 5, 8, torch.Generator().manual_seed(0))
    assert torch.equal(x + 1, target)
    assert x.shape == (5, 8)


def test_an_untrained_transformer_knows_nothing() -> None:
    torch.manual_seed(0)
    model = CharTransformer(32, 2, 4, 16)
    x = torch.randint(NUM_CHARACTERS, (4, 16))
    assert model(x, x.roll(-1, 1)).item() == pytest.approx(torch.tensor(float(NUM_CHARACTERS)).log().item(), abs=0.1)


def test_the_schedule_warms_up_and_decays_to_a_tenth() -> None:
    shares = [schedule(step, 1000) for step in range(1001)]
    assert shares[0] == 1 / 50
    assert max(shares) == shares[50] == 1.0
    assert shares[1000] == pytest.approx(0.1)


def test_learning_rates_are_stated_for_every_method_and_optimizer() -> None:
    dense, ours = (learning_rate(TrainConfig(method=method)) for method in ("dense", "vsa"))  # type: ignore[arg-type]
    assert ours == pytest.approx(dense * learning_rate_factor())
    for optimizer, grid in bench_quickstart.GRIDS.items():
        for method, lrs in grid.items():
            stated = learning_rate(TrainConfig(method=method, optimizer=optimizer))  # type: ignore[arg-type]
            assert any(stated == pytest.approx(lr) for lr in lrs), "a stated rate is one that was searched"
            assert min(lrs) < stated < max(lrs), "and no edge of its grid"


def test_overlapping_buckets_count_once() -> None:
    timed = TimedDDP.__new__(TimedDDP)
    torch.nn.Module.__init__(timed)
    timed.device_type = "cpu"
    timed._intervals = [(3.0, 5.0), (0.0, 2.0), (1.0, 2.5), (4.0, 4.5)]
    assert timed.take_hook_ms() == 4.5
    assert timed.take_hook_ms() == 0.0


def test_the_committed_page_is_what_its_runs_give() -> None:
    results = json.loads(bench_quickstart.RESULTS.read_text())
    assert bench_quickstart.RESULTS.with_suffix(".md").read_text() == bench_quickstart.report(results)


def test_the_readmes_table_is_the_benchmarks() -> None:
    results = json.loads(bench_quickstart.RESULTS.read_text())
    assert bench_quickstart.summary(results) in (ROOT / "README.md").read_text()
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
