"""What leaves a host and how long a step takes: every wire, the averager, plain DDP, 16-bit hooks and PowerSGD, on
real links.

    python -m benchmarks.bench_wire                 # 2 and 4 hosts, three links, four sizes; about 45 min on 2 cores
    python -m benchmarks.bench_wire --quick         # 2 hosts, 100 Mbit/s and unshaped, one small model; about 1 min
    python -m benchmarks.bench_wire --report        # rebuild page, plots and cost model from the stored runs

Hosts are network namespaces on a bridge, links are shaped by the kernel (see `netlab`; needs root and iproute2), and
bytes are read from each host's interface. All methods take turns in one run, so compare within a run: the machine has
two cores, four hosts share them. A step is forward, backward and plain SGD's of an MLP, 64 rows per host, one thread.
"""

import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import numpy as np
import torch
import typer
from tqdm import tqdm

from benchmarks.netlab import NetLab, NetLabError, why_not_shaped
from benchmarks.store import Record, Results, Store, find, page_head
from launch.cli import run_command
from vsa_ddp import cost, probe

mpl.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "wire_cpu2_202611.json"
USUAL_MIB, SMALL_MIB, WHOLE_MIB = 25, 4, 4096
"""Buckets: DDP's own size, one for each large matrix, one for all, since torch's PowerSGD hangs on gloo with two."""
METHODS = [
    ("compute", 0, 0, USUAL_MIB),
    ("dense", 0, 0, USUAL_MIB),
    ("bf16", 0, 0, USUAL_MIB),
    ("fp16", 0, 0, USUAL_MIB),
    ("powersgd", 0, 0, WHOLE_MIB),
    ("all_gather", 1, 8, USUAL_MIB),
    ("all_gather", 1, 8, SMALL_MIB),
    ("two_shot", 2, 2, USUAL_MIB),
    ("all_gather", 1, 64, USUAL_MIB),
    ("all_gather", 4, 1, USUAL_MIB),
    ("all_gather", 4, 1, SMALL_MIB),
    ("all_reduce", 4, 1, USUAL_MIB),
    ("two_shot", 4, 1, USUAL_MIB),
    ("all_gather", 16, 1, USUAL_MIB),
    ("averager 1", 1, 64, USUAL_MIB),
    ("averager 8", 1, 64, USUAL_MIB),
]
"""Method, bundle, sparsity, MiB of a bucket. Of our hooks the default first, at 64 times fewer bytes; "averager" is
`VsaModelAverager` with its period, as it would be with AdamW."""
QUICK = ("compute", "dense", "powersgd", "all_gather", "all_reduce", "two_shot", "averager 1")
"""Of each the first."""
IN_SUMMARY = [
    ("compute", 0, 0, USUAL_MIB),
    ("dense", 0, 0, USUAL_MIB),
    ("bf16", 0, 0, USUAL_MIB),
    ("powersgd", 0, 0, WHOLE_MIB),
    ("all_gather", 1, 8, USUAL_MIB),
    ("averager 1", 1, 64, USUAL_MIB),
    ("averager 8", 1, 64, USUAL_MIB),
]
LABELS = {
    "compute": "no communication",
    "dense": "plain DDP",
    "bf16": "bf16 hook",
    "fp16": "fp16 hook",
    "powersgd": "PowerSGD 4",
    "averager 1": "averager, period 1",
    "averager 8": "averager, period 8",
}
PRICED = ("dense", "half", *cost.WIRE_METHODS)
"""What the cost model describes."""
HOSTS = (2, 4)
LINKS: tuple[float | None, ...] = (100.0, 1000.0, None)
"""Mbit/s each way; None is the bridge's own speed."""
WIDTHS = {930: "fit", 1400: "held out", 2048: "fit", 2500: "held out"}
"""Hidden units: 2.5, 5.0, 10.0 and 14.5 M parameters."""
HEADLINE_PARAMETERS = 10_000_000
ROUNDS = 5


def label(record: Record) -> str:
    letters = {"B": record["bundle"], "n": record["sparsity"]}
    code = " ".join(f"{letter}={value}" for letter, value in letters.items() if value > 1)
    buckets = f"buckets of {SMALL_MIB} MiB" if record["bucket_mib"] == SMALL_MIB else ""
    return ", ".join(filter(None, (LABELS.get(record["method"], record["method"]), code, buckets)))


def of_method(records: list[Record], method: tuple[str, int, int, int]) -> list[Record]:
    """Those of one of `METHODS`."""
    return find(records, **dict(zip(("method", "bundle", "sparsity", "bucket_mib"), method, strict=True)))


def link_name(mbit: float | None) -> str:
    if mbit is None:
        return "unshaped"
    return f"{mbit / 1000:g} Gbit/s" if mbit >= 1000 else f"{mbit:g} Mbit/s"


def run_setting(
    hosts: int,
    mbit: float | None,
    methods: list[tuple[str, int, int, int]],
    widths: list[int],
    rounds: int,
    bar: "tqdm[Any]",
) -> list[Record]:
    """The methods on so many hosts with this link. Raises: NetLabError if a host failed."""
    with NetLab(hosts) as lab, tempfile.TemporaryDirectory() as folder:
        lab.shape(mbit)
        out = Path(folder) / "records.json"

        def worker(host: int) -> list[str]:
            command = [sys.executable, "-m", "benchmarks.wire_worker", "--rank", str(host), "--hosts", str(hosts)]
            command += ["--master", lab.address(0), "--rounds", str(rounds), "--out", str(out)]
            command += ["--widths", *map(str, widths), "--methods", *(":".join(map(str, method)) for method in methods)]
            return command

        job = lab.start_job(worker, cwd=ROOT)
        note = out.with_suffix(".note")
        while not job.finished():
            if note.exists():
                bar.set_postfix_str(note.read_text())
            time.sleep(0.5)
        job.wait(seconds=1)
        records: list[Record] = json.loads(out.read_text())
    return [{"hosts": hosts, "mbit": mbit, **record} for record in records]


def headline(records: list[Record]) -> int:
    """Parameters of the model that the tables show: the one nearest to 10 M."""
    sizes = sorted({r["num_parameters"] for r in records})
    return min(sizes, key=lambda n: abs(n - HEADLINE_PARAMETERS))


# The cost model


def priced_as(record: Record) -> str:
    """The cost model's name of a method."""
    return {"bf16": "half", "fp16": "half"}.get(record["method"], record["method"])


class Fit:
    """The cost model's constants from the records whose size is not held out, by least squares of relative errors.

    Known: parameters, bytes, buckets, and by how much four hosts on two cores slow each other (compute alone). Unknown:
    the arithmetic of each method, what a bucket costs, how much longer than ideal a link takes for floats (`link`), and
    what share of a link's time for packets is not hidden behind the backward pass (`packets`). The links have no delay,
    so hops cost nothing here.
    """

    SPARSE = ("all_gather", "two_shot")
    UNKNOWNS = ("dense", "half", "element", *cost.WIRE_METHODS, "gathered", *(f"sparse {wire}" for wire in SPARSE))
    UNKNOWNS += ("gathered code", "bucket", "link", "packets")

    def __init__(self, records: list[Record], rotation_s: float) -> None:
        self._records = records
        self._sizes = sorted({r["num_parameters"] for r in records})
        self.held_out = {n for n, use in zip(self._sizes, self._uses(), strict=True) if use == "held out"}
        self.rotation_s = rotation_s
        fitted = [r for r in self.usable() if r["num_parameters"] not in self.held_out]
        weights = np.array([1 / r["median_ms"] for r in fitted])
        values = np.array([r["median_ms"] - self._compute_ms(r) for r in fitted]) * weights
        self.unknowns = np.ones(len(self.UNKNOWNS))
        features = np.zeros(0)
        # linear, once it is known whether arithmetic or the link is what an all-reduce waits for
        while not np.array_equal(features, now := np.array([self._features(r) for r in fitted])):
            features = now
            self.unknowns = _nonnegative_least_squares(features * weights[:, None], values)

    def _uses(self) -> list[str]:
        return list(WIDTHS.values()) if len(self._sizes) == len(WIDTHS) else ["fit"] * len(self._sizes)

    def usable(self) -> list[Record]:
        """Those that the model describes, in buckets of the usual size."""
        return [r for r in self._records if priced_as(r) in PRICED and r["bucket_mib"] == USUAL_MIB]

    def predict_ms(self, r: Record) -> float:
        return self._compute_ms(r) + float(self._features(r) @ self.unknowns)

    def advised_error(self, r: Record) -> float | None:
        """Relative error of compute plus what `advise` says; None for what it does not price, or is not told."""
        if r["mbit"] is None:
            return None
        advice = cost.advise(
            r["num_parameters"],
            r["hosts"],
            gbit_per_s=r["mbit"] / 1000,
            bundle=r["bundle"] or 1,
            sparsity=r["sparsity"] or 1,
            slowdown=self._slowdown(r),
        )
        return abs((self._compute_ms(r) + advice.ms[priced_as(r)]) / r["median_ms"] - 1)

    def constants(self) -> dict[str, float]:
        return {name: float(value) for name, value in zip(self.UNKNOWNS, self.unknowns, strict=True)}

    def _compute_ms(self, r: Record) -> float:
        """Without communication: of all links' turns, since none was used."""
        alone = find(self._records, method="compute", hosts=r["hosts"], num_parameters=r["num_parameters"])
        return statistics.median(ms for c in alone for ms in c["step_ms"])

    def _slowdown(self, r: Record) -> float:
        """Of 4 hosts on the 2 cores that 2 hosts have to themselves: one ratio of all sizes."""
        at = [
            statistics.mean(
                c["median_ms"] / c["num_parameters"] for c in find(self._records, method="compute", hosts=h)
            )
            for h in (min(HOSTS), r["hosts"])
        ]
        return at[1] / at[0]

    def _features(self, r: Record) -> np.ndarray:
        """Milliseconds per unit of each unknown: ns per element or trit, ms per bucket, seconds per ideal second.

        An all-reduce sums what has arrived while more arrives: what takes longer counts, by the unknowns as they are.
        """
        n, w = r["num_parameters"], r["hosts"]
        d = n / r["bundle"] if r["bundle"] else 0
        method = priced_as(r)
        priced = cost.cost(method, n, w, r["bundle"] or 1, r["sparsity"] or 1)
        ms = dict.fromkeys(self.UNKNOWNS, 0.0)
        local = 1e-6 * self._slowdown(r)
        if method in ("dense", "half"):
            ms[method] = n * local
        else:
            sparse = r["sparsity"] > 1
            ms["element"], ms[f"sparse {method}" if sparse else method] = n * local, d * local
            if method == "all_gather":
                ms["gathered code" if sparse else "gathered"] = w * d / r["sparsity"] * local
        ms["bucket"] = cost.num_buckets(n) * self._slowdown(r)
        if r["mbit"] is not None:
            ms["link" if priced.pipelined else "packets"] = priced.received_bytes * 8e-3 / r["mbit"]
        if priced.pipelined:
            known = self.constants()
            ms[min((method, "link"), key=lambda name: ms[name] * known[name])] = 0.0
        return np.array([ms[name] for name in self.UNKNOWNS])


def _nonnegative_least_squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Least squares without the unknowns that would be negative, the worst (in units of its effect) left out first."""
    scale = np.linalg.norm(a, axis=0)
    kept = [column for column in range(a.shape[1]) if scale[column]]
    while True:
        found = np.linalg.lstsq(a[:, kept] / scale[kept], b, rcond=None)[0]
        if (found >= 0).all():
            full = np.zeros(a.shape[1])
            full[kept] = found / scale[kept]
            return full
        del kept[int(found.argmin())]


# The report


def summary(results: Results) -> str:
    """The README's table: two hosts, milliseconds per step and how many times faster than plain DDP."""
    at = find(results["records"], hosts=2, num_parameters=headline(results["records"]))
    lines = ["| ms per step | " + " | ".join(link_name(mbit) for mbit in LINKS) + " | MiB sent |"]
    lines += ["|---" * (len(LINKS) + 2) + "|"]
    for method in IN_SUMMARY:
        cells = []
        for mbit in LINKS:
            (r,) = of_method(find(at, mbit=mbit), method)
            (dense,) = find(at, mbit=mbit, method="dense", bucket_mib=USUAL_MIB)
            cells.append(f"{r['median_ms']:.0f} ({dense['median_ms'] / r['median_ms']:.1f} x)")
        lines.append(f"| {label(r)} | {' | '.join(cells)} | {r['interface_sent'] / 2**20:.2f} |")
    return "\n".join(lines)


def report(results: Results) -> str:
    records, size = results["records"], headline(results["records"])
    lines = page_head("Wires on real links: bytes at the interface, and step times", "bench_wire", results)
    lines += ["", "Median ms per step (least to most) of turns taken in one run; MiB that one host sent per step."]
    for hosts in sorted({r["hosts"] for r in records}):
        lines += ["", f"## {hosts} hosts, {size / 1e6:.1f} M parameters", ""]
        links = [m for m in LINKS if find(records, hosts=hosts, mbit=m)]
        lines += ["| method | " + " | ".join(f"{link_name(m)}, ms | times plain DDP" for m in links) + " | MiB sent |"]
        lines += ["|---|" + "---|---|" * len(links) + "---|"]
        for method in (m for m in METHODS if of_method(records, m)):
            row, sent = [], "0"
            for mbit in links:
                at = find(records, hosts=hosts, mbit=mbit, num_parameters=size)
                (r,) = of_method(at, method)
                (dense,) = find(at, method="dense", bucket_mib=USUAL_MIB)
                row += [f"{r['median_ms']:.0f} ({min(r['step_ms']):.0f} to {max(r['step_ms']):.0f})"]
                row += [f"{dense['median_ms'] / r['median_ms']:.2f}"]
                sent = f"{r['interface_sent'] / 2**20:.3f}"
            lines.append(f"| {label(r)} | {' | '.join(row)} | {sent} |")
    lines += ["", "## Counted bytes against the interface's", ""]
    lines += ["Counted at the collective, received per step; the interface adds headers and acknowledgements.", ""]
    lines += [
        "| hosts | link | wire | parameters | counted KiB | interface KiB | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in records:
        if r["counted_received"] and r["num_parameters"] == size:
            difference = 100 * (r["interface_received"] / r["counted_received"] - 1)
            lines.append(
                f"| {r['hosts']} | {link_name(r['mbit'])} | {label(r)} | {r['num_parameters'] / 1e6:.1f} M | "
                f"{r['counted_received'] / 1024:.1f} | {r['interface_received'] / 1024:.1f} | {difference:+.1f} % |"
            )
    return "\n".join([*lines, *_cost_model(results), *_advice(results)]) + "\n"


def _cost_model(results: Results) -> list[str]:
    fit = Fit(results["records"], results["environment"]["rotation_s"])
    lines = ["", "## Cost model", ""]
    lines += [
        "Fitted to the sizes not held out, in buckets of 25 MiB. `vsa_ddp/cost.py` has all but link and packets.",
        "",
    ]
    share = "of the ideal time"
    units = dict.fromkeys(Fit.UNKNOWNS, "ns") | {"bucket": "ms", "link": share, "packets": share}
    lines += [f"- {name}: {value:.3g} {units[name]}" for name, value in fit.constants().items()]
    lines += [f"- rotation of 2**20 elements: {fit.rotation_s * 1e3:.2f} ms", ""]
    lines += [
        "Errors of the predicted step time, compute alone being known. The last column is that of `vsa_ddp.advise` "
        "for shaped links, told the nominal rate and 0.1 ms.",
        "",
    ]
    lines += [
        "| parameters | | settings | median | worst | within 20 % | median of advise |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in sorted({r["num_parameters"] for r in results["records"]}):
        errors = sorted(abs(fit.predict_ms(r) / r["median_ms"] - 1) for r in find(fit.usable(), num_parameters=size))
        inside = sum(error <= 0.2 for error in errors)
        advised = [e for r in find(fit.usable(), num_parameters=size) if (e := fit.advised_error(r)) is not None]
        lines.append(
            f"| {size / 1e6:.1f} M | {'held out' if size in fit.held_out else 'fitted'} | {len(errors)} | "
            f"{100 * statistics.median(errors):.0f} % | {100 * errors[-1]:.0f} % | {inside} of {len(errors)} | "
            f"{100 * statistics.median(advised):.0f} % |"
        )
    missed = [
        f"- {r['hosts']} hosts, {link_name(r['mbit'])}, {r['num_parameters'] / 1e6:.1f} M, {label(r)}: "
        f"{r['median_ms']:.0f} ms, predicted {fit.predict_ms(r):.0f}"
        for r in fit.usable()
        if r["num_parameters"] in fit.held_out and abs(fit.predict_ms(r) / r["median_ms"] - 1) > 0.2
    ]
    return [*lines, "", "Held-out settings that are off by more than 20 %:" + ("" if missed else " none."), *missed]


def _advice(results: Results) -> list[str]:
    size = headline(results["records"])
    lines = ["", "## Advice", "", "What `vsa_ddp.advise` says of the settings measured, and whether it was right:", ""]
    for hosts, mbit in itertools.product(HOSTS, LINKS):
        at = find(results["records"], hosts=hosts, mbit=mbit, num_parameters=size)
        if at and mbit is not None:
            advice = cost.advise(size, hosts, gbit_per_s=mbit / 1000)
            (ours,) = of_method(at, (advice.wire, advice.bundle, advice.sparsity, USUAL_MIB))
            others = [r["median_ms"] for r in at if r["method"] in ("dense", "bf16", "fp16")]
            paid = "paid" if ours["median_ms"] < min(others) else "did not pay"
            lines.append(f"- {hosts} hosts, {link_name(mbit)}: {advice}; it {paid}")
    return lines


def plot_steps(results: Results, file: Path) -> None:
    """Step times by method, one panel for each number of hosts and link."""
    records, size = results["records"], headline(results["records"])
    hosts_of, links = sorted({r["hosts"] for r in records}), [m for m in LINKS if find(records, mbit=m)]
    figure, axes = plt.subplots(
        len(hosts_of), len(links), figsize=(4.4 * len(links), 3.2 * len(hosts_of)), squeeze=False, layout="constrained"
    )
    for (row, hosts), (column, mbit) in itertools.product(enumerate(hosts_of), enumerate(links)):
        at = find(records, hosts=hosts, mbit=mbit, num_parameters=size)
        axis = axes[row][column]
        colours = ["tab:blue" if r["bundle"] else "tab:gray" for r in at]
        bars = axis.barh([label(r) for r in at], [r["median_ms"] for r in at], color=colours)
        axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        axis.set(title=f"{hosts} hosts, {link_name(mbit)}", xlabel="ms per step")
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def plot_advice(file: Path) -> None:
    """On paper: how many times faster than the better of a dense and a 16-bit all-reduce, and by which wire."""
    ranks = [2**k for k in range(3, 11)]
    gbits = [1, 2.5, 5, 10, 25, 50, 100, 200, 400]
    marks = {"all_gather": "g", "two_shot": "2"}
    speeds = [(1.0, "codec as on one CPU core here"), (0.01, "codec 100 times faster: an assumption for GPUs")]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for axis, (slowdown, title) in zip(axes, speeds, strict=True):
        gain = np.zeros((len(ranks), len(gbits)))
        for (i, w), (j, gbit) in itertools.product(enumerate(ranks), enumerate(gbits)):
            advice = cost.advise(1_000_000_000, w, gbit_per_s=gbit, latency_ms=0.02, slowdown=slowdown)
            gain[i, j] = min(advice.ms["dense"], advice.ms["half"]) / advice.ms[advice.wire]
            colour = "black" if advice.pays else "dimgray"
            axis.text(
                j, i, f"{gain[i, j]:.1f} {marks[advice.wire]}", ha="center", va="center", fontsize=7, color=colour
            )
        shown = axis.imshow(np.log10(gain), cmap="RdYlGn", vmin=-1.5, vmax=1.5, aspect="auto", origin="lower")
        axis.set_xticks(range(len(gbits)), [f"{g:g}" for g in gbits])
        axis.set_yticks(range(len(ranks)), ranks)
        axis.set(xlabel="Gbit/s per rank", ylabel="ranks", title=title)
    figure.colorbar(shown, ax=axes, label="log10 of times faster than dense or 16 bits")
    figure.suptitle(
        "Model, not measured: 1000 M parameters, 64 times compressed, 20 us a hop. g all_gather, 2 two_shot",
        fontsize=10,
    )
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="2 hosts, 2 links, one small model; printed.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Results file to continue or to make.")] = None,
    rebuild: Annotated[
        bool, typer.Option("--report", help="No runs: rebuild page and plots from the results.")
    ] = False,
) -> int:
    """Measure bytes and step times of every wire and its rivals on emulated hosts."""
    rounds = 2 if quick else ROUNDS
    store = Store(json_file or (None if quick else RESULTS), "records", rebuild=rebuild, rounds=rounds)
    if not rebuild:
        if reason := why_not_shaped():
            print(f"error: {reason}.", file=sys.stderr)
            return 1
        torch.set_num_threads(1)
        store.results["environment"].setdefault("rotation_s", probe.rotation_s(torch.device("cpu")))
        settings = [(2, 100.0), (2, None)] if quick else list(itertools.product(HOSTS, LINKS))
        widths = [930] if quick else list(WIDTHS)
        methods = [next(m for m in METHODS if m[0] == name) for name in QUICK] if quick else METHODS
        waiting = [s for s in settings if not find(store.list, hosts=s[0], mbit=s[1])]
        for hosts, mbit in (bar := tqdm(waiting, unit="setting")):
            bar.set_description(f"{hosts} hosts, {link_name(mbit)}")
            try:
                store.add(*run_setting(hosts, mbit, methods, widths, rounds, bar))
            except NetLabError as error:
                print(f"error: {hosts} hosts, {link_name(mbit)}: {error}", file=sys.stderr)
                return 1
    store.write_page(report)
    if store.file is not None:
        plot_steps(store.results, store.file.with_suffix(".png"))
        plot_advice(store.file.with_name(f"{store.file.stem}_advice.png"))
    return 0


if __name__ == "__main__":
    run_command(main)
