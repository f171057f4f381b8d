"""The DDP communication hook: the whole data flow of a gradient bucket on one screen.

bucket -> whiten -> bind -> bundle -> rotate -> ternarise -> pack -> wire (all ranks)
                                                                      |
bucket <- unwhiten <- unbind <- unbundle <- rotate <- dequantise <- unpack
"""

from typing import Any

import torch
import torch.distributed as dist

from vsa_ddp.state import VsaState
from vsa_ddp.wires import keep_for_current_stream


# DDP compares the annotations by identity: no `from __future__ import annotations` in this module
def vsa_hook(
    state: VsaState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # torch does not export it to mypy
) -> torch.futures.Future[torch.Tensor]:
    """Replace a bucket's gradients by the ranks' mean, sent as packed-trit hypervectors.

    Register it with `ddp_model.register_comm_hook(VsaState(...), vsa_hook)`, or let `vsa_ddp.register` choose the
    settings. The first `exact_steps` steps and the small parameters are exact up to rounding; all else is lossy (see
    `rates.unbiased_nmse`). Every rank gets the same bits. A value that is not finite on one rank makes the gradient
    around it not finite on all. The host waits for the device or a peer at the very first bucket only.

    Shapes: `bucket.buffer()` (N,) of any float dtype, written in place -> a future of that buffer.
    Raises: ValueError or TypeError, on every rank, if settings differ between ranks, the state already serves another
        model, a gradient is sparse or complex, or a loaded state belongs to other parameters.
    """
    codec, link, step = state.begin(bucket)
    buffer: torch.Tensor = bucket.buffer()
    scales_S = state.measure_scales(codec, buffer, step)

    exact = state.sends_exact(step)
    if exact:
        future = link.all_reduce_mean_(buffer, scales_S)
    else:
        keys = codec.keys(step)
        rows, exact_E = codec.encode(buffer, keys)
        message = state.message(codec, rows, exact_E, scales_S, step)
        future, receive = state.courier.carry(message, link)

    @torch.no_grad()
    def decode(done: torch.futures.Future[Any]) -> torch.Tensor:
        try:
            done.value()  # raises here if a collective failed: never hand out a gradient that was not exchanged
            if exact:
                keep_for_current_stream(scales_S)
                state.update_scales(codec, step, scales_S)
            else:
                keep_for_current_stream(keys.words)
                mean = receive()
                codec.decode_(buffer, mean.rows, mean.exact_E, keys)
                state.update_scales(codec, step, mean.scales_S, mean.sigma_T)
        except Exception as error:
            state.courier.fail(error)
            raise
        return buffer

    return future.then(decode)
