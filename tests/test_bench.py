"""The benchmarks measure what they say, and the pages, the README and the cost model are those of the stored runs."""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks import (
    bench_codec,
    bench_compressor,
    bench_phases,
    bench_quickstart,
    bench_training,
    bench_wire,
    bench_wire_loss,
)
from benchmarks.codec_report import PARTS, REFERENCES
from benchmarks.netlab import why_not_shaped
from benchmarks.store import Store, find
from tests.conftest import Shown
from vsa_ddp.cost import CPU_CORE
from vsa_ddp.wires import WIRES

ROOT = Path(__file__).parent.parent


def stored(bench: Any) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(bench.RESULTS.read_text())
    return results


@pytest.mark.parametrize("bench", [bench_codec, bench_compressor, bench_training, bench_wire, bench_wire_loss])
def test_a_page_is_that_of_its_runs(bench: Any) -> None:
    assert bench.RESULTS.with_suffix(".md").read_text() == bench.report(stored(bench))


@pytest.mark.parametrize("bench", [bench_training, bench_wire])
def test_the_readme_has_what_was_measured(bench: Any) -> None:
    assert bench.summary(stored(bench)) in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("suite", bench_training.SUITES)
def test_no_other_method_is_on_the_lower_envelope_of_loss_against_bytes(suite: str) -> None:
    best = bench_training.envelope(bench_training.SUITES[suite], stored(bench_training))
    floors = {"dense", "alone"}  # what sends everything, and what sends nothing
    compared = {r["method"] for r in bench_training.SUITES[suite].among(stored(bench_training)["runs"])}
    assert compared >= {"dense", "powersgd 4"}
    assert best - floors
    ours = (*bench_training.OURS, "drive-local")  # the last is our averaging of updates, in another's code
    assert all(method.startswith(ours) for method in best - floors)


@pytest.mark.parametrize("name", ["sgd-char", "sgd-digits"])
def test_ours_diverge_only_where_plain_ddp_is_about_to(name: str) -> None:
    suite, runs = bench_training.SUITES[name], stored(bench_training)["runs"]
    largest, missing = bench_training.largest_rate(suite, runs)
    assert not missing
    ours = [r for r in suite.among(runs) if r["method"] in bench_training.OUR_METHODS]
    for method in {r["method"] for r in ours}:
        assert not bench_training.missing_seeds(suite, method, largest, runs), method
    assert [r for r in ours if r["heldout_loss"] is None and r["lr"] < 0.99 * largest] == []


def test_the_cost_models_constants_are_those_that_were_fitted() -> None:
    fit = bench_wire.Fit(stored(bench_wire)["records"], stored(bench_wire)["environment"]["rotation_s"])
    found = fit.constants()
    assert CPU_CORE.dense_ns == pytest.approx(found["dense"], rel=0.01)
    assert CPU_CORE.half_ns == pytest.approx(found["half"], rel=0.01)
    assert CPU_CORE.element_ns == pytest.approx(found["element"], rel=0.01)
    assert CPU_CORE.trit_ns == pytest.approx({wire: found[wire] for wire in WIRES}, rel=0.01)
    sparse = {wire: found[f"sparse {wire}"] for wire in fit.SPARSE}
    assert CPU_CORE.sparse_trit_ns == pytest.approx(sparse, rel=0.01)
    assert CPU_CORE.gathered_trit_ns == pytest.approx(found["gathered"], rel=0.01)
    assert CPU_CORE.gathered_code_ns == pytest.approx(found["gathered code"], rel=0.01)
    assert CPU_CORE.bucket_ms == pytest.approx(found["bucket"], rel=0.01)
    assert CPU_CORE.reference_rotation_s == pytest.approx(fit.rotation_s, rel=0.01)


def test_every_wires_loss_is_within_2_percent_of_all_gathers() -> None:
    runs = stored(bench_wire_loss)["runs"]
    assert {(r["wire"], r["ranks_per_node"]) for r in runs} == set(bench_wire_loss.WIRES)
    for wire, ranks in bench_wire_loss.WIRES:
        excesses = [bench_wire_loss.excess(r, runs) for r in runs if (r["wire"], r["ranks_per_node"]) == (wire, ranks)]
        assert len(excesses) == len(bench_wire_loss.SEEDS)
        assert abs(sum(excesses) / len(excesses)) < 0.02, (wire, ranks)


def synthetic(constants: dict[str, float]) -> list[dict[str, Any]]:
    """Records of a machine on which the cost model holds exactly."""
    records: list[dict[str, Any]] = []
    for hosts in bench_wire.HOSTS:
        for mbit in bench_wire.LINKS:
            for size in (2_000_000, 10_000_000):
                for method in bench_wire.METHODS:
                    what = dict(zip(("method", "bundle", "sparsity", "bucket_mib"), method, strict=True))
                    record = {"hosts": hosts, "mbit": mbit, "num_parameters": size, **what}
                    records.append({**record, "median_ms": 10.0 * hosts, "step_ms": [10.0 * hosts]})
    fit = bench_wire.Fit(records, 1.0)
    fit.unknowns[:] = [constants[name] for name in fit.UNKNOWNS]
    for record in fit.usable():
        record["median_ms"] = fit.predict_ms(record)
    return records


def test_the_fit_finds_the_constants_of_a_machine_that_has_them() -> None:
    constants = dict(
        zip(
            bench_wire.Fit.UNKNOWNS,
            (1.0, 2.0, 5.0, 11.0, 13.0, 17.0, 3.0, 7.0, 9.0, 19.0, 40.0, 1.05, 0.3),
            strict=True,
        )
    )
    assert bench_wire.Fit(synthetic(constants), 1.0).constants() == pytest.approx(constants, rel=1e-6)


@pytest.mark.timeout(400)
def test_a_quick_run_counts_what_the_interface_counts(tmp_path: Path) -> None:
    if reason := why_not_shaped():
        pytest.skip(reason)
    file = tmp_path / "wire.json"
    command = [sys.executable, "-m", "benchmarks.bench_wire", "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stderr
    records = json.loads(file.read_text())["records"]
    ours = [r for r in records if r["counted_sent"]]
    assert {r["method"] for r in ours} == {*WIRES, "averager 1"}
    for r in ours:
        for way in ("sent", "received"):
            assert r[f"interface_{way}"] == pytest.approx(r[f"counted_{way}"], rel=0.05, abs=4000), r
    dense = find(records, method="dense", mbit=None)[0]
    # two hosts: each sends the whole gradient, half in each phase of the ring
    assert dense["interface_sent"] == pytest.approx(4 * dense["num_parameters"], rel=0.05)


@pytest.mark.timeout(400)
def test_the_triton_kernels_are_timed_too_by_the_interpreter_where_there_is_no_gpu(tmp_path: Path) -> None:
    file = tmp_path / "codec.json"
    command = [sys.executable, "-m", "benchmarks.bench_codec", "--device", "cpu", "--json", str(file), "--quick"]
    command += ["--backend", "triton", "--no-gpt"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())
    assert results["environment"]["backends"] == ["triton"]
    timed = {(r["dtype"], r["method"], r["bundle"]) for r in find(results["records"], what="time", backend="triton")}
    assert timed >= set(itertools.product(bench_codec.DTYPES, PARTS, (1, 4)))


def test_a_quick_run_times_every_method_and_its_report_can_be_rebuilt(tmp_path: Path) -> None:
    file = tmp_path / "codec.json"
    command = [sys.executable, "-m", "benchmarks.bench_codec", "--device", "cpu", "--json", str(file)]
    done = subprocess.run([*command, "--quick"], cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())
    assert results["environment"]["cpu_capability"]
    backends, records = results["environment"]["backends"], results["records"]
    for dtype, mib in itertools.product(bench_codec.DTYPES, bench_codec.QUICK_MIB):
        times = find(records, what="time", dtype=dtype, mib=mib)
        methods = {(r["method"], r["backend"], r["bundle"]) for r in times}
        assert methods >= set(itertools.product(PARTS, backends, (1, 4)))
        assert {r["method"] for r in times} >= set(REFERENCES) - ({"bf16 and back"} if dtype == "bfloat16" else set())
        assert all(len(r["ms"]) == 3 and 0 < min(r["ms"]) <= r["median_ms"] <= max(r["ms"]) for r in times)
        assert all(r["bucket_bytes"] == pytest.approx(mib * 2**20, rel=0.02) for r in times)
    for r in find(records, what="memory"):
        assert 0 < r["kept_bytes"] < (4.5 if r["method"] == "PowerSGD" else 1) * r["num_elements"], r
        # the error that PowerSGD keeps is not in it: a copy of the bucket and the new error. Ours holds packets
        assert r["peak_bytes"] > (2 if r["method"] == "PowerSGD" else 0.2 / r["bundle"]) * r["bucket_bytes"], r
    assert len(find(records, what="step")) == 2

    page = file.with_suffix(".md")
    assert page.read_text() == bench_codec.report(results)
    page.unlink()
    file.with_suffix(".png").unlink()
    subprocess.run([*command, "--report"], cwd=ROOT, capture_output=True, timeout=60, check=True)
    assert page.read_text() == bench_codec.report(results)
    assert file.with_suffix(".png").stat().st_size > 10_000


def test_a_quick_run_archives_a_tiny_gpt_by_every_backend(tmp_path: Path) -> None:
    file = tmp_path / "compressor.json"
    command = [sys.executable, "-m", "benchmarks.bench_compressor", "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    records = json.loads(file.read_text())["records"]
    settings = {(r["backend"], r["bundle"]) for r in records}
    assert settings == set(itertools.product(bench_compressor.BACKENDS, bench_compressor.QUICK_BUNDLES))
    for r in records:
        assert len(r["compress_s"]) == len(r["decompress_s"]) == 2
        assert 0.95 * r["theory"] < r["cosine"] < 1  # small matrices do not fill all slots
        assert r["peak_bytes"] >= r["peak_before_bytes"] > r["gradient_bytes"]


def test_the_gradient_of_gpt_2_fits_in_12_gib() -> None:
    for r in stored(bench_compressor)["records"]:
        assert r["num_parameters"] >= 124e6
        assert r["peak_bytes"] < 12 * 2**30
        assert r["cosine"] == pytest.approx(r["theory"], rel=0.01)


@pytest.mark.parametrize(
    "bench",
    [
        bench_codec,
        bench_compressor,
        bench_phases,
        bench_quickstart,
        bench_training,
        bench_wire,
        bench_wire_loss,
    ],
)
def test_help_names_quick_json_and_report(bench: Any, command: Callable[..., Shown]) -> None:
    outcome = command(bench.main, "--help")
    assert outcome.code == 0
    assert all(option in outcome.stdout for option in ("--quick", "--json", "--report"))


def test_a_results_file_goes_on_only_where_it_was_begun(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    store = Store(file, "runs", rebuild=False, ranks=2)
    store.add({"loss": 1.0}, {"loss": 2.0})
    assert Store(file, "runs", rebuild=False, ranks=2).list == [{"loss": 1.0}, {"loss": 2.0}]
    with pytest.raises(typer.BadParameter, match="ranks is 2 there and 3 here; name another file"):
        Store(file, "runs", rebuild=False, ranks=3)
    assert Store(file, "runs", rebuild=True, ranks=3).results["environment"]["ranks"] == 2


def test_a_commit_is_named_once_it_has_measured(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    begun = Store(file, "runs", rebuild=False).results
    here = begun["environment"]["commit"]
    begun["environment"]["commit"] = "earlier"
    file.write_text(json.dumps(begun))
    store = Store(file, "runs", rebuild=False)
    assert store.results == begun, "a page written now is that of the file"
    store.add({"loss": 1.0})
    store.add({"loss": 2.0})
    assert json.loads(file.read_text())["environment"]["commit"] == f"earlier, {here}"


KILLED = """
import pathlib, sys, time
from benchmarks.store import Store
from benchmarks.workers import work

def live(trial):
    while True:
        pathlib.Path(sys.argv[1]).touch()
        time.sleep(0.1)

if __name__ == "__main__":
    work(Store(None, "runs", rebuild=False), lambda runs: [1], live, str, 1, 600)
"""


def test_a_benchmark_that_is_killed_leaves_no_run_behind(tmp_path: Path) -> None:
    script, sign = tmp_path / "main.py", tmp_path / "alive"
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, script, sign], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not sign.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    while time.time() - sign.stat().st_mtime < 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)
