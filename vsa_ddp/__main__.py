"""Does compression pay on this link, and by which wire? One line.

    torchrun --nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=host0:29400 -m vsa_ddp --parameters 124e6
    python -m vsa_ddp --parameters 124e6 --ranks 64 --gbit 10        # on paper, without a group

Under torchrun it measures the group's link; NCCL with one rank per GPU when there are GPUs, else gloo.
"""

import argparse
import os
import sys
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from vsa_ddp.cost import Advice, advise
from vsa_ddp.probe import advise_group


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(arguments: list[str] | None = None) -> int:
    """Print the advice; 2 and one line on stderr for a wrong value."""
    parser = _Parser(prog="vsa_ddp", description="Does compression pay on this link, and by which wire?")
    parser.add_argument("--parameters", type=float, required=True, help="elements of the gradient, as 124e6")
    parser.add_argument("--compression", type=float, help="times fewer bytes than float32 (default: by wire)")
    parser.add_argument("--bundle", type=int, help="instead of compression: slots per hypervector")
    parser.add_argument("--sparsity", type=int, help="instead of compression: trits of which one is sent")
    parser.add_argument("--ranks", type=int, help="on paper: ranks that exchange")
    parser.add_argument("--gbit", type=float, help="on paper: Gbit/s of a rank's link")
    parser.add_argument("--latency-ms", type=float, default=0.1, help="on paper: from rank to rank (default: 0.1)")
    parser.add_argument(
        "--slowdown", type=float, default=1.0, help="on paper: see vsa_ddp.advise (default: 1, a CPU core)"
    )
    try:
        options = parser.parse_args(arguments)
        named = {name: getattr(options, name) for name in ("compression", "bundle", "sparsity")}
        settings = {name: value for name, value in named.items() if value is not None}
        if options.ranks is not None and options.gbit is not None:
            advice = advise(
                int(options.parameters),
                options.ranks,
                gbit_per_s=options.gbit,
                latency_ms=options.latency_ms,
                slowdown=options.slowdown,
                **settings,
            )
        elif "RANK" in os.environ and options.ranks is None and options.gbit is None:
            advice = _measured(int(options.parameters), settings)
        else:
            raise ValueError("give both --ranks and --gbit, or neither and start it with torchrun.")
    except (ValueError, OverflowError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if os.environ.get("RANK", "0") == "0":
        print(advice)
    return 0


def _measured(num_parameters: int, settings: dict[str, Any]) -> Advice:
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    group, world_size = dist.group.WORLD, dist.get_world_size()
    assert group is not None
    advice = advise_group(group, device, num_parameters, world_size, **settings)
    dist.destroy_process_group()
    return advice


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # gloo sometimes aborts in the interpreter's own teardown
