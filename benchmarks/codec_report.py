"""The page and the plot of `bench_codec`, from its stored records."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.codec_methods import POWERSGD_RANK
from benchmarks.store import Record, Results, find, page_head

mpl.use("Agg")
from matplotlib import pyplot as plt

DTYPES = ("float32", "bfloat16")
PASSES_BUNDLE = 4
REFERENCES = ("memcpy", "bf16 and back", "PowerSGD")
PARTS = ("encode", "decode", "hook", "hook with scales")


def label(record: Record) -> str:
    if record["method"] == "PowerSGD":
        return f"PowerSGD {POWERSGD_RANK}"
    return f"{record['backend']}: {record['method']}" if record["backend"] else record["method"]


def spread(record: Record) -> str:
    return f"{record['median_ms']:.3g} ({min(record['ms']):.3g} to {max(record['ms']):.3g})"


def table(*columns: str) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]


def mib_of(records: list[Record]) -> list[float]:
    return sorted({r["mib"] for r in records if r["what"] == "time"})


def middle(records: list[Record]) -> float:
    """The size that passes and memory were measured at."""
    return next((r["mib"] for r in records if r["what"] == "memory"), mib_of(records)[0])


def codec_names(records: list[Record]) -> Iterator[tuple[str, int]]:
    """Backends and bundles, in the order of measuring."""
    yield from dict.fromkeys((r["backend"], r["bundle"]) for r in records if r["what"] == "time" and r["backend"])


def report(results: Results) -> str:
    records = results["records"]
    lines = page_head("What the codec and the hook cost on a bucket", "bench_codec", results)
    lines += [
        "",
        "Median ms (least to most) of turns taken in one run, by one rank; GB/s are the bucket's bytes per time.",
    ]
    lines += [
        "encode: from the bucket to the packet. decode: from two ranks' packets to the bucket. hook: all of it, a "
        "packet's way to itself included; every tenth step also measures scales. PowerSGD: PyTorch's hook. Both hooks "
        "run in a group of one rank, so that arithmetic is what remains."
    ]
    if mib_of(records):
        lines += [*_ceiling(records), *_growth(records), *_passes(records), *_memory(records), *_steps(records)]
        lines += _times(records, on_cuda=results["environment"]["device"] == "cuda")
    return "\n".join(lines) + "\n"


def _ceiling(records: list[Record]) -> list[str]:
    """Encode and decode against the least that they must move."""
    copies = find(records, what="copy")
    if not copies:
        return []
    (copy,) = copies
    rate = 2 * copy["bucket_bytes"] / copy["median_ms"]
    lines = ["", "## Against the memory's own rate", ""]
    lines += [
        f"A copy of {copy['bucket_bytes'] / 2**20:.0f} MiB moves {rate / 1e6:.1f} GB/s, read and written. Encode has "
        "to read the bucket once and decode to write it once: the bound below, and its share of the time of both.",
        "",
    ]
    bundles = list(dict.fromkeys(bundle for _, bundle in codec_names(records)))
    lines += table("bucket", "backend", "bound, ms", *(f"B={bundle}, ms (share)" for bundle in bundles))
    for mib, backend in itertools.product(mib_of(records), dict.fromkeys(b for b, _ in codec_names(records))):
        cells = []
        for bundle in bundles:
            at = find(records, what="time", mib=mib, dtype="float32", backend=backend, bundle=bundle)
            both = [r for r in at if r["method"] in ("encode", "decode")]
            if both:
                ms, bound = sum(r["median_ms"] for r in both), 2 * both[0]["bucket_bytes"] / rate
                cells.append(f"{ms:.3g} ({100 * bound / ms:.1f} %)")
        if cells:
            lines.append(f"| {mib:g} MiB float32 | {backend} | {bound:.3g} | {' | '.join(cells)} |")
    return lines


def _growth(records: list[Record]) -> list[str]:
    """Nanoseconds per element against N, constant if time is linear, and against B."""
    sizes, at = mib_of(records), middle(records)
    bundles = list(dict.fromkeys(bundle for _, bundle in codec_names(records)))
    lines = ["", f"## Growth with N (float32, B={PASSES_BUNDLE}): ns per element", ""]
    lines += table("", *(f"{mib:g} MiB" for mib in sizes))
    shown = [r for r in find(records, what="time", mib=at, dtype="float32") if r["method"] in (*REFERENCES, *PARTS)]
    for r in [r for r in shown if r["bundle"] in (0, PASSES_BUNDLE)]:
        row = [find(records, **_identity(r), dtype="float32", mib=mib) for mib in sizes]
        lines.append(f"| {label(r)} | {' | '.join(_ns(cell) for cell in row)} |")
    lines += ["", f"## Growth with B (float32, {at:g} MiB): ns per element", ""]
    lines += table("", *(f"B={bundle}" for bundle in bundles))
    for r in [r for r in shown if r["bundle"] == bundles[0]]:
        row = [find(records, **{**_identity(r), "bundle": bundle}, dtype="float32", mib=at) for bundle in bundles]
        lines.append(f"| {label(r)} | {' | '.join(_ns(cell) for cell in row)} |")
    return lines


def _identity(r: Record) -> Record:
    return {name: r[name] for name in ("what", "method", "backend", "bundle")}


def _ns(cell: list[Record]) -> str:
    return f"{cell[0]['median_ms'] * 1e6 / cell[0]['num_elements']:.3g}" if cell else ""


def _passes(records: list[Record]) -> list[str]:
    lines = ["", f"## Passes ({middle(records):g} MiB, B={PASSES_BUNDLE})", ""]
    lines += [
        "Each alone, by way of floats. In encode and in decode the last two of a direction are one pass; the bundle's "
        "size, not the bucket's, decides those in between.",
        "",
    ]
    lines += table("", "dtype", "ms", "times memcpy")
    for r in records:
        if r["what"] == "time" and r["method"] not in (*REFERENCES, *PARTS):
            lines.append(f"| {label(r)} | {r['dtype']} | {spread(r)} | {_times_memcpy(r, records):.2f} |")
    return lines


def _memory(records: list[Record]) -> list[str]:
    lines = ["", f"## Memory ({middle(records):g} MiB)", ""]
    lines += [
        "Kept between steps, in bytes per parameter; the rest in buckets, beyond the bucket itself: the most at once "
        "in encode, what waits for the ranks' packets, the most at once from encode to decode.",
        "",
    ]
    lines += table("", "B", "dtype", "bytes kept per parameter", "peak of encode", "in flight", "peak of all")
    for r in find(records, what="memory"):
        held = [
            f"{r[name] / r['bucket_bytes']:.2f}" if name in r else ""
            for name in ("encode_peak_bytes", "in_flight_bytes", "peak_bytes")
        ]
        kept = r["kept_bytes"] / r["num_elements"]
        lines.append(f"| {label(r)} | {r['bundle'] or ''} | {r['dtype']} | {kept:.4f} | {' | '.join(held)} |")
    return lines


def _steps(records: list[Record]) -> list[str]:
    steps = find(records, what="step")
    if not steps:
        return []
    plain, hook = steps
    share = hook["median_ms"] / plain["median_ms"] - 1
    return [
        "",
        f"## A step of a GPT with {plain['num_parameters'] / 1e6:.1f} M parameters, bfloat16",
        "",
        f"Batch {plain['batch']}, length {plain['length']}, forward, backward and AdamW on one rank; "
        f"{hook['backend']}, B={PASSES_BUNDLE}. The hook adds {hook['median_ms'] - plain['median_ms']:.3g} ms, "
        f"{100 * share:.1f} %.",
        "",
        *table("", "ms per step"),
        *(f"| {r['method']} | {spread(r)} |" for r in steps),
    ]


def _times(records: list[Record], *, on_cuda: bool) -> list[str]:
    lines = []
    for dtype, mib in itertools.product(DTYPES, mib_of(records)):
        at = find(records, what="time", dtype=dtype, mib=mib)
        if not at:
            continue
        lines += ["", f"## {mib:g} MiB, {dtype}", ""]
        lines += table("", "B", "ms", "GB/s", "times memcpy", *(["ms on the host"] if on_cuda else []))
        for r in at:
            if r["method"] in (*REFERENCES, *PARTS):
                row = [label(r), str(r["bundle"] or ""), spread(r), f"{r['bucket_bytes'] / r['median_ms'] / 1e6:.3g}"]
                row += [f"{_times_memcpy(r, records):.2f}", *([f"{r['host_ms']:.3g}"] if on_cuda else [])]
                lines.append(f"| {' | '.join(row)} |")
    return lines


def _times_memcpy(r: Record, records: list[Record]) -> float:
    (memcpy,) = find(records, what="time", method="memcpy", dtype=r["dtype"], mib=r["mib"])
    quotient: float = r["median_ms"] / memcpy["median_ms"]
    return quotient


def plot(results: Results, file: Path) -> None:
    """Every method against memcpy at the middle size, by dtype; and times against the bucket's size."""
    records = results["records"]
    at, sizes = middle(records), mib_of(records)
    dtypes = [dtype for dtype in DTYPES if find(records, what="time", dtype=dtype, mib=at)]
    figure, axes = plt.subplots(1, len(dtypes) + 1, figsize=(5.6 * (len(dtypes) + 1), 5), layout="constrained")
    for axis, dtype in zip(axes, dtypes, strict=False):
        _plot_bars(axis, find(records, what="time", dtype=dtype, mib=at), f"{at:g} MiB, {dtype}")
    shown = [r for r in find(records, what="time", dtype="float32", mib=at) if r["method"] in (*REFERENCES, "hook")]
    for r in shown:
        if r["bundle"] in (0, PASSES_BUNDLE):
            row = [find(records, **_identity(r), dtype="float32", mib=mib) for mib in sizes]
            style = "-o" if r["backend"] else "--o"
            axes[-1].plot(
                [mib for mib, cell in zip(sizes, row, strict=True) if cell],
                [cell[0]["median_ms"] for cell in row if cell],
                style,
                label=label(r),
            )
    axes[-1].set(xscale="log", yscale="log", xlabel="bucket, MiB", ylabel="ms", title=f"float32, B={PASSES_BUNDLE}")
    axes[-1].set_xticks(sizes, [f"{mib:g}" for mib in sizes], minor=False)
    axes[-1].minorticks_off()
    axes[-1].grid(alpha=0.3)
    axes[-1].legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _plot_bars(axis: Any, records: list[Record], title: str) -> None:
    """Encode and decode end to end, and the hook; in grey what they are compared with."""
    (memcpy,) = find(records, method="memcpy")
    names = []
    for r in records:
        if r["method"] in REFERENCES:
            names.append(label(r))
            width = r["median_ms"] / memcpy["median_ms"]
            axis.barh(len(names), width, color="tab:gray")
            axis.text(width, len(names), f" {r['median_ms']:.3g} ms", va="center", fontsize=8)
    for backend, bundle in codec_names(records):
        left = 0.0
        names.append(f"{backend}, B={bundle}")
        for method, colour in (("encode", "tab:blue"), ("decode", "tab:cyan")):
            (r,) = find(records, method=method, backend=backend, bundle=bundle)
            width = r["median_ms"] / memcpy["median_ms"]
            axis.barh(len(names), width, left=left, color=colour)
            left += width
        (hook,) = find(records, method="hook", backend=backend, bundle=bundle)
        width = hook["median_ms"] / memcpy["median_ms"]
        axis.plot(width, len(names), "k|", markersize=14)
        axis.text(max(left, width), len(names), f"  {hook['median_ms']:.3g} ms", va="center", fontsize=8)
    axis.set_yticks(range(1, len(names) + 1), names, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set(xlabel="times memcpy: encode (dark), decode (light), the whole hook (mark)", title=title)
