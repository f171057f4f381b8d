"""What it takes to archive the gradient of GPT-2 small, 124 M parameters: time, memory, bytes, and what comes back.

    python -m benchmarks.bench_compressor            # every backend, B of 1, 4 and 16; about 3 min on 2 cores
    python -m benchmarks.bench_compressor --quick    # a tiny GPT, B=4, only printed
    python -m benchmarks.bench_compressor --report   # rebuild the page from the stored runs

Each setting runs in a process of its own, whose peak of resident memory is then that of the setting: interpreter,
torch, the gradient and the result included. Every setting is stored as it ends; a benchmark that was stopped goes on
where it was.
"""

import itertools
import math
import multiprocessing
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from tqdm import tqdm

from benchmarks.gpt_step import GptConfig, gpt
from benchmarks.store import Record, Results, Store, find, page_head
from launch.cli import run_command
from vsa_ddp import CompressedGradients, VsaConfig, VSAGradientCompressor
from vsa_ddp.config import Backend
from vsa_ddp.rates import unbiased_nmse

RESULTS = Path(__file__).parent / "results" / "compressor_cpu2_202611.json"
BACKENDS: tuple[Backend, ...] = ("numba", "torch")
BUNDLES = (1, 4, 16)
QUICK_BUNDLES = (4,)
ROUNDS = 3
PARTS = ("compress", "save", "load", "decompress")
TINY = GptConfig(length=32, width=64, num_layers=2, num_heads=2, vocabulary=512)


def gradients_like(config: GptConfig) -> dict[str, Tensor]:
    """Noise in the shapes of a GPT's parameters, with loud and quiet rows."""
    cpu, meta = torch.device("cpu"), torch.device("meta")
    with meta:
        shapes = {name: p.shape for name, p in gpt(config, meta).named_parameters()}
    generator = torch.Generator(cpu).manual_seed(0)
    gradients = {}
    for name, shape in shapes.items():
        gradients[name] = torch.randn(shape, generator=generator)
        gradients[name] *= torch.randn(shape[:1], generator=generator).exp_().view(-1, *[1] * (len(shape) - 1))
    return gradients


def peak_bytes() -> int:
    """The most resident memory that this process has had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def cosine(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Of all gradients together."""
    dot = aa = bb = 0.0
    for name in a:
        x, y = a[name].flatten().double(), b[name].flatten().double()
        dot, aa, bb = dot + (x @ y).item(), aa + (x @ x).item(), bb + (y @ y).item()
    return dot / math.sqrt(aa * bb)


def measure(size: GptConfig, backend: Backend, bundle: int, rounds: int, threads: int) -> Record:
    """One setting, in a process of its own."""
    torch.set_num_threads(threads)
    compressor = VSAGradientCompressor(VsaConfig(bundle=bundle, backend=backend))
    compressor.decompress(compressor.compress(gradients_like(TINY), 0))  # compiles
    compressor.clear_cache()
    gradients = gradients_like(size)
    before = peak_bytes()
    seconds: dict[str, list[float]] = {name: [] for name in PARTS}
    with tempfile.TemporaryDirectory() as folder, tqdm(unit_scale=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.n, bar.total = done, total
            bar.refresh()

        file = Path(folder) / "gradients.vsa"
        for step in range(rounds):
            bar.set_description(f"{backend}, B={bundle}, round {step + 1} of {rounds}")
            times, back = [time.perf_counter()], {}
            compressed = compressor.compress(gradients, step, progress)
            times.append(time.perf_counter())
            compressed.save(file)
            times.append(time.perf_counter())
            read = CompressedGradients.load(file)
            times.append(time.perf_counter())
            back = compressor.decompress(read, progress=progress)
            times.append(time.perf_counter())
            for name, (start, end) in zip(PARTS, itertools.pairwise(times), strict=True):
                seconds[name].append(end - start)
        file_bytes = file.stat().st_size
    peak = peak_bytes()
    return {
        "backend": backend,
        "bundle": bundle,
        "num_parameters": sum(gradient.numel() for gradient in gradients.values()),
        "gradient_bytes": compressed.dense_bytes,
        "file_bytes": file_bytes,
        "compression": compressed.compression,
        **{f"{name}_s": took for name, took in seconds.items()},
        "cosine": cosine(gradients, back),
        "theory": 1 / math.sqrt(1 + unbiased_nmse(bundle)),
        "peak_bytes": peak,
        "peak_before_bytes": before,
    }


def report(results: Results) -> str:
    records = results["records"]
    lines = page_head("What it takes to archive a gradient", "bench_compressor", results)
    if records:
        millions, gib = records[0]["num_parameters"] / 1e6, records[0]["gradient_bytes"] / 2**30
        lines += [
            "",
            f"The gradient of a GPT of {millions:.1f} M parameters in float32, {gib:.2f} GiB: noise, rows of unequal "
            "size. Median seconds of the rounds (least to most); save and load with checksum, flushed to disk. Peak "
            "of resident memory of the whole process, and before the first compress: interpreter, torch, the gradient.",
        ]
    lines += [
        "",
        "| backend | B | compress s | save s | load s | decompress s | file MiB | compression | cosine | theory ",
    ]
    lines[-1] += "| peak GiB | before |"
    lines += ["|---" * 12 + "|"]
    for r in records:
        times = (spread(r[f"{name}_s"]) for name in PARTS)
        lines.append(
            f"| {r['backend']} | {r['bundle']} | {' | '.join(times)} | {r['file_bytes'] / 2**20:.2f} | "
            f"{r['compression']:.1f} x | {r['cosine']:.4f} | {r['theory']:.4f} | {r['peak_bytes'] / 2**30:.2f} | "
            f"{r['peak_before_bytes'] / 2**30:.2f} |"
        )
    return "\n".join(lines) + "\n"


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def main(
    quick: Annotated[bool, typer.Option("--quick", help="A tiny GPT, B=4; printed.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Results file to continue or to make.")] = None,
    rebuild: Annotated[bool, typer.Option("--report", help="No runs: rebuild the page from the results.")] = False,
) -> None:
    """Compress, save, load and decompress the gradient of a GPT, by every backend on the CPU."""
    threads, rounds = torch.get_num_threads(), 2 if quick else ROUNDS
    store = Store(json_file or (None if quick else RESULTS), "records", rebuild=rebuild, threads=threads, rounds=rounds)
    for backend, bundle in [] if rebuild else itertools.product(BACKENDS, QUICK_BUNDLES if quick else BUNDLES):
        if not find(store.list, backend=backend, bundle=bundle):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                size = TINY if quick else GptConfig()
                store.add(alone.submit(measure, size, backend, bundle, rounds, threads).result())
    store.write_page(report)


if __name__ == "__main__":
    run_command(main)
