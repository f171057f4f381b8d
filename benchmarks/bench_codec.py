"""What the codec and the hook cost on a bucket: time against memcpy, a bf16 cast and PowerSGD; memory kept and held.

    python -m benchmarks.bench_codec                      # 1, 25 and 100 MiB, every backend; about 15 min on 2 cores
    python -m benchmarks.bench_codec --quick              # small buckets, a tiny GPT; some seconds, only printed
    python -m benchmarks.bench_codec --backend numba --threads 1 --json numba.json
    python -m benchmarks.bench_codec --report             # rebuild page and plot from the stored runs

On CUDA it also times training steps of a GPT (`--gpt`, `--batch`, `--length`), elsewhere if asked to.

All methods take turns on the same gradients, in one process that is the only rank: what is timed is arithmetic. Buckets
are used in rotation, more bytes than the cache has. On CUDA the launches of a turn are queued behind a pause, so that
times are the device's; what the host needs for them is stored beside. Every setting is stored as it ends; a benchmark
that was stopped goes on where it was.
"""

import itertools
import re
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from tqdm import tqdm

from benchmarks import codec_methods, gpt_step
from benchmarks.codec_methods import Bucket, Buckets, InstantGroup, Method, Ours, PowerSgd, process_group
from benchmarks.codec_report import DTYPES, PASSES_BUNDLE, plot, report
from benchmarks.gpt_step import GptConfig
from benchmarks.memory import held_bytes, kept_bytes
from benchmarks.store import Record, Store, find
from launch.cli import run_command
from vsa_ddp.config import Backend
from vsa_ddp.kernels import missing

RESULTS = Path(__file__).parent / "results" / "codec_cpu2_202611.json"
MIB: tuple[float, ...] = (1, 25, 100)
"""Bucket sizes; passes and memory are measured at the second."""
QUICK_MIB = (1 / 16, 1 / 4)
BUNDLES = (1, 4, 16)
ROUNDS = 11
GPT_ROUNDS = 5
CPU_CACHE_BYTES = 32 * 2**20
MOST_CALLS = 16
"""Of a method in one turn."""


def backends_there(device: torch.device) -> list[str]:
    return [b for b in get_args(Backend) if b != "auto" and missing(b, device) is None]


def results_file(device: torch.device) -> Path:
    """Where the results of a machine like this one belong."""
    if device.type == "cpu":
        return RESULTS
    name = re.search(r"[A-Za-z]*\d+\w*", torch.cuda.get_device_name(device))
    return RESULTS.with_name(f"codec_{name[0].lower() if name else 'cuda'}_202611.json")


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


# Measuring


def turn(method: Method, buckets: Buckets, queue_ms: float) -> tuple[float, float]:
    """Milliseconds per call, and what the host needs for it. On CUDA launches queue up for `queue_ms` at first."""
    buckets.reset()
    turns = list(zip(buckets.list, buckets.copies, strict=True))[:MOST_CALLS]
    if method.prepare is not None:
        for bucket, _ in turns:
            method.prepare(bucket)
    on_cuda = buckets.device.type == "cuda"
    if on_cuda:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(buckets.device)
        torch.cuda._sleep(int(2e6 * queue_ms))
        first.record()
    start = time.perf_counter()
    for bucket, copy_N in turns:
        method.run(bucket, copy_N)
    host_ms = (time.perf_counter() - start) * 1e3
    if not on_cuda:
        return host_ms / len(turns), host_ms / len(turns)
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / len(turns), host_ms / len(turns)


def measure_times(methods: list[Method], buckets: Buckets, rounds: int, advance: Callable[[], Any]) -> list[Record]:
    """All methods in turns, after one that compiles and one that shows what the host needs."""
    hosts_ms = [min(turn(m, buckets, 0)[1] for _ in range(2)) for m in methods]
    times: list[list[float]] = [[] for _ in methods]
    for _ in range(rounds):
        for method, host_ms, ms in zip(methods, hosts_ms, times, strict=True):
            ms.append(turn(method, buckets, 1.5 * MOST_CALLS * host_ms)[0])
        advance()
    return [
        {
            "what": "time",
            "method": method.name,
            "backend": method.backend,
            "bundle": method.bundle,
            "ms": ms,
            "median_ms": statistics.median(ms),
            "host_ms": host_ms,
        }
        for method, host_ms, ms in zip(methods, hosts_ms, times, strict=True)
    ]


def measure_memory(ours: Ours, bucket: Bucket) -> Record:
    device = bucket.buffer().device
    encoded = held_bytes(lambda: ours.encode(bucket), device)
    whole = held_bytes(lambda: ours.encode_and_decode(bucket), device)
    return {
        "what": "memory",
        "method": "vsa_ddp",
        "backend": ours.backend,
        "bundle": ours.bundle,
        "kept_bytes": kept_bytes(ours.state),
        "encode_peak_bytes": encoded.peak,
        "in_flight_bytes": encoded.left,
        "peak_bytes": whole.peak,
    }


def measure_powersgd_memory(bucket: Bucket) -> Record:
    power, device = PowerSgd(InstantGroup()), bucket.buffer().device
    power.hook(bucket)
    replaced = dict(power.state.error_dict)  # kept here, or the profiler would complain of memory that it never saw
    peak = held_bytes(lambda: power.hook(bucket), device).peak
    del replaced
    return {
        "what": "memory",
        "method": "PowerSGD",
        "backend": "",
        "bundle": 0,
        "kept_bytes": kept_bytes([power.state.error_dict, power.state.p_memory_dict, power.state.q_memory_dict]),
        "peak_bytes": peak,
    }


def measure_bucket(
    buckets: Buckets, backends: list[str], bundles: tuple[int, ...], rounds: int, *, in_detail: bool, bar: "tqdm[Any]"
) -> list[Record]:
    """Everything about buckets of one size and dtype; passes and memory too if `in_detail`."""
    bucket = buckets.list[0]
    ours = [Ours(bucket, backend, bundle) for backend, bundle in itertools.product(backends, bundles)]
    methods = [*codec_methods.references(bucket.buffer().dtype), *(m for o in ours for m in o.methods())]
    if in_detail:
        methods += [m for o in ours if o.bundle == PASSES_BUNDLE for m in o.passes()]
    records = measure_times(methods, buckets, rounds, bar.update)
    if in_detail:
        buckets.reset()
        records += [measure_powersgd_memory(bucket), *(measure_memory(o, bucket) for o in ours)]
    size = {"num_elements": buckets.numel, "bucket_bytes": buckets.nbytes}
    return [{**size, **record} for record in records]


def measure_copy(mib: float, device: torch.device, rounds: int) -> Record:
    """The machine's own rate: memcpy of a large buffer."""
    buckets = Buckets(mib, torch.float32, device, cache_bytes=0)
    (record,) = measure_times(codec_methods.references(torch.float32)[:1], buckets, rounds, lambda: None)
    return {**record, "what": "copy", "bucket_bytes": buckets.nbytes}


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Small buckets, few turns, a tiny GPT; printed.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Results file to continue or to make.")] = None,
    rebuild: Annotated[bool, typer.Option("--report", help="No runs: rebuild page and plot from the results.")] = False,
    device_type: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = (
        "cuda" if torch.cuda.is_available() else "cpu"
    ),
    backend: Annotated[
        str | None, typer.Option(help="torch, numba or triton; default: all that are there.", show_default=False)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default: torch's own number.", show_default=False)
    ] = None,
    gpt: Annotated[
        bool | None, typer.Option(help="Time steps of a GPT too; default: on CUDA, and with --quick.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="The GPT's sequences per step.")] = GptConfig.batch,
    length: Annotated[int, typer.Option(min=1, help="The GPT's tokens per sequence.")] = GptConfig.length,
) -> None:
    """Time the codec and the hook on buckets of gradients against memcpy, a bf16 cast and PowerSGD."""
    if device_type not in ("cpu", "cuda") or (device_type == "cuda" and not torch.cuda.is_available()):
        raise typer.BadParameter(f"there is no {device_type!r} device here.", param_hint="'--device'")
    device = torch.device(device_type)
    if backend is not None and (reason := why_not(backend, device)):
        raise typer.BadParameter(reason, param_hint="'--backend'")
    if threads is not None:
        torch.set_num_threads(threads)
    backends = [backend] if backend is not None else backends_there(device)
    cache_bytes = CPU_CACHE_BYTES
    if device.type == "cuda":
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    store = Store(
        json_file or (None if quick else results_file(device)),
        "records",
        rebuild=rebuild,
        device=device_type,
        backends=backends,
        threads=torch.get_num_threads(),
        rounds=3 if quick else ROUNDS,
        cache_bytes=0 if quick else cache_bytes,
        numba=version_of("numba"),
        triton=version_of("triton"),
    )
    if not rebuild:
        with process_group(device):
            config = GptConfig(2, 32, 64, 2, 2, 512) if quick else GptConfig(batch, length)
            measure(store, device, quick, config if gpt or (gpt is None and (quick or device.type == "cuda")) else None)
    store.write_page(report)
    if store.file is not None and store.list:
        plot(store.results, store.file.with_suffix(".png"))


def why_not(backend: str, device: torch.device) -> str | None:
    if backend == "auto" or backend not in get_args(Backend):
        return f"must be one of torch, numba, triton, got {backend!r}."
    return missing(backend, device)


def measure(store: Store, device: torch.device, quick: bool, config: GptConfig | None) -> None:
    """What the store does not have yet."""
    environment = store.results["environment"]
    backends, rounds = environment["backends"], environment["rounds"]
    sizes, bundles = (QUICK_MIB, BUNDLES[:2]) if quick else (MIB, BUNDLES)
    if quick and device.type == "cpu" and "triton" in backends:
        sizes = (sizes[0] / 16,)  # its interpreter takes milliseconds for each row
    if not find(store.list, what="copy"):
        large = 16 if quick else 1024 if device.type == "cuda" else 256
        store.add(measure_copy(large, device, rounds))
    waiting = [s for s in itertools.product(DTYPES, sizes) if not find(store.list, dtype=s[0], mib=s[1])]
    with tqdm(total=len(waiting) * rounds, unit="round") as bar:
        for dtype, mib in waiting:
            bar.set_description(f"{mib:g} MiB {dtype}")
            buckets = Buckets(mib, getattr(torch, dtype), device, environment["cache_bytes"])
            found = measure_bucket(buckets, backends, bundles, rounds, in_detail=mib == sizes[len(sizes) // 2], bar=bar)
            store.add(*({"mib": mib, "dtype": dtype, **record} for record in found))
        if config is not None and not find(store.list, what="step"):
            bar.set_description("GPT")
            store.add(*gpt_step.measure(config, device, backends[-1], 2 if quick else GPT_ROUNDS))


if __name__ == "__main__":
    run_command(main)
