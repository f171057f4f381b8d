"""Named gradients outside DDP: archives, logs, federated rounds. The hook's codec, one gradient after the other.

gradient -> over 2**e -> whiten -> bind -> bundle -> rotate -> ternarise -> pack -> CompressedGradients
                                                                                 |
gradient <- times 2**e <- unwhiten <- unbind <- unbundle <- rotate <- unpack <---+

There are no other ranks and no past: a gradient is whitened by its own scales, which travel in its packet. The power of
two brings gradients of any size to where float32 neither overflows nor loses bits.

Shape letters: N elements of a gradient, T rotation blocks of K elements, S row and column factors.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsa_ddp.archive import DTYPES, SETTINGS, CompressedGradients, Entry, check_step, packet_like, plan
from vsa_ddp.codec import Codec
from vsa_ddp.config import VsaConfig
from vsa_ddp.kernels import Kernels, Packed, load_kernels
from vsa_ddp.layout import is_compressed
from vsa_ddp.packing import Packet, pack_packet, packet_bytes, unpack_packet
from vsa_ddp.ternary import level
from vsa_ddp.whitening import Whitening

Progress = Callable[[int, int], object]
"""Called after each gradient with the number of elements done and of all."""


class CompressorStats(NamedTuple):
    """What `VSAGradientCompressor.get_compression_stats` tells: totals of all calls of `compress`."""

    compression: float = 1.0
    """dense_bytes / file_bytes: higher is smaller. 1.0 before the first call."""
    dense_bytes: int = 0
    """Bytes of the gradients in their own dtypes."""
    file_bytes: int = 0
    """Bytes of the archives, as `CompressedGradients.save` writes them: header, packets and checksum."""
    bits_per_element: float = 0.0
    """8 * file_bytes / num_elements. 0.0 before the first call."""
    num_elements: int = 0
    num_exact: int = 0
    """Elements that are stored as they were."""
    calls: int = 0


class VSAGradientCompressor:
    """Compresses dicts of named gradients into packed-trit hypervectors and back, outside DDP.

    Args:
        config: of its settings count `bundle`, `whiten`, `gain`, `rotation_block`, `min_numel`, `seed` and `backend`;
            the others are the hook's. It has to name a bundle, since the hook's own choice sends not all trits. None
            is a bundle of 4.

    Gradients of one dimension, those with less than `min_numel` elements, and those that would not become smaller are
    stored as they are and come back bit for bit. Of the others comes back an estimate: unbiased over steps and seeds
    with noise over signal v = 1.2348 B - 1 in full slots, so that its cosine with the gradient is 1 / sqrt(1 + v); or,
    with `gain="shrunk"`, that of least squared error. Names, shapes, dtypes and their order come back as they were.

    Keys are drawn from seed, step and name: packets are the same bytes in any process, on any machine, by any backend
    and in any order of the dict. With one seed and step the errors of several senders do not average out; give each a
    `seed` of its own, which travels along.

    One gradient is worked on at a time: beside its input and its result a call holds little more than a float32 copy of
    the largest gradient.
    """

    def __init__(self, config: VsaConfig | None = None) -> None:
        self.config = config if config is not None else VsaConfig(bundle=4)
        if self.config.sparsity > 1:
            raise ValueError(
                f"files hold all trits of a hypervector, so sparsity must be 1, got {self.config.sparsity}; name a "
                "bundle, VsaConfig(bundle=B), for about 20 * B times fewer bytes."
            )
        self._coders: dict[tuple[str, torch.device], _Coder] = {}
        self._stats = CompressorStats()
        self._last_dims = 0

    def __repr__(self) -> str:
        return f"VSAGradientCompressor({self.config})"

    @torch.no_grad()
    def compress(
        self, gradients: Mapping[str, Tensor], step: int, progress: Progress | None = None
    ) -> CompressedGradients:
        """Compress gradients of any shape and device, in float64, float32, bfloat16 or float16.

        Args:
            step: the number of the step or round. Keys are fresh in each: what one loses, another has.
            progress: called after each gradient.

        Raises: TypeError for what is no mapping from strings to dense real tensors; ValueError for an empty one, a
            value that is not finite, or an impossible step.
        """
        _check(gradients)
        check_step(step)
        config = VsaConfig.from_settings({name: getattr(self.config, name) for name in SETTINGS})
        entries, packets = [], []
        done, total = 0, sum(gradient.numel() for gradient in gradients.values())
        for name, gradient in gradients.items():
            entry, packet = self._compress(name, gradient, step, config)
            entries.append(entry)
            packets.append(packet)
            done += entry.numel
            if progress is not None:
                progress(done, total)
        compressed = CompressedGradients(config, step, tuple(entries), tuple(packets))
        self._count(compressed)
        return compressed

    @torch.no_grad()
    def decompress(
        self, compressed: CompressedGradients, device: torch.device | str = "cpu", progress: Progress | None = None
    ) -> dict[str, Tensor]:
        """The gradients, on `device`, in the order in which they were given. Settings are those of `compressed`.

        An estimate beyond its dtype's range (float16's most likely) becomes the greatest finite value.
        """
        gradients = {}
        done, total = 0, sum(entry.numel for entry in compressed.entries)
        for entry, packet in zip(compressed.entries, compressed.packets, strict=True):
            gradients[entry.name] = self._decompress(entry, packet.to(device), compressed)
            done += entry.numel
            if progress is not None:
                progress(done, total)
        return gradients

    @property
    def compressed_dim(self) -> int:
        """D, dimensions of all hypervectors of the last `compress`; 0 before it."""
        return self._last_dims

    def get_compression_stats(self) -> CompressorStats:
        """Bytes so far, dense and compressed, and their quotient."""
        return self._stats

    def clear_cache(self) -> None:
        """Free what is kept for the next call: tables and scales of each gradient. It changes no bit."""
        self._coders.clear()

    def _compress(self, name: str, gradient: Tensor, step: int, config: VsaConfig) -> tuple[Entry, Tensor]:
        """One gradient's entry and the bytes of its packet."""
        wide = torch.promote_types(gradient.dtype, torch.float32)
        flat_N = torch.empty(gradient.numel(), dtype=wide, device=gradient.device)
        flat_N.view(gradient.shape).copy_(gradient)
        exact = Entry(name, tuple(gradient.shape), gradient.dtype, None)
        entry = replace(exact, exponent=_exponent(name, flat_N))
        if not is_compressed(entry.shape, self.config) or _num_bytes(entry, config) >= _num_bytes(exact, config):
            none = flat_N.new_empty(0, dtype=torch.bfloat16)
            packet = Packet(flat_N.new_empty((0, 1), dtype=torch.uint8), none, none, flat_N.to(gradient.dtype))
            return exact, pack_packet(packet).cpu()
        assert entry.exponent is not None
        _scale_(flat_N, -entry.exponent)
        coder = self._coder(entry, config, gradient.device)
        codec, scales_S = coder.codec, flat_N.new_empty(0, dtype=torch.float32)
        if config.whiten:
            scales_S = codec.mean_squares(flat_N)
            coder.whiten_by(scales_S)
        rows, exact_E = codec.encode(flat_N, codec.keys(step))
        packed_TP, energy_T, kept_T = codec.kernels.quantize(rows)
        levels_T = level(energy_T, kept_T).bfloat16()
        return entry, pack_packet(Packet(packed_TP, levels_T, scales_S.bfloat16(), exact_E)).cpu()

    def _decompress(self, entry: Entry, data: Tensor, compressed: CompressedGradients) -> Tensor:
        """One gradient from the bytes of its packet."""
        config = compressed.config
        packet = unpack_packet(data, like=packet_like(entry, config))
        if entry.exponent is None:
            return packet.exact_E.clone().view(entry.shape)
        coder = self._coder(entry, config, data.device)
        if config.whiten:
            coder.whiten_by(packet.scales_S.float())
        wide = torch.promote_types(entry.dtype, torch.float32)
        flat_N = torch.empty(entry.numel, dtype=wide, device=data.device)
        shape = len(packet.packed_TP), config.rotation_block
        mean = Packed(packet.packed_TP[None], packet.levels_T[None], shape)
        coder.codec.decode_(flat_N, mean, flat_N.new_empty(0), coder.codec.keys(compressed.step))
        _scale_(flat_N, entry.exponent)
        limit = torch.finfo(entry.dtype).max
        return flat_N.clamp_(-limit, limit).to(entry.dtype).view(entry.shape)

    def _coder(self, entry: Entry, config: VsaConfig, device: torch.device) -> "_Coder":
        known = self._coders.get((entry.name, device))
        if known is None or known.made_for != (entry.shape, config):
            known = _Coder(entry, config, device, load_kernels(self.config.backend, device))
            self._coders[entry.name, device] = known
        return known

    def _count(self, compressed: CompressedGradients) -> None:
        self._last_dims = compressed.num_dims
        dense_bytes = self._stats.dense_bytes + compressed.dense_bytes
        file_bytes = self._stats.file_bytes + compressed.num_bytes
        num_elements = self._stats.num_elements + sum(entry.numel for entry in compressed.entries)
        exact = sum(entry.numel for entry in compressed.entries if entry.exponent is None)
        self._stats = CompressorStats(
            compression=dense_bytes / file_bytes,
            dense_bytes=dense_bytes,
            file_bytes=file_bytes,
            bits_per_element=8 * file_bytes / num_elements if num_elements else 0.0,
            num_elements=num_elements,
            num_exact=self._stats.num_exact + exact,
            calls=self._stats.calls + 1,
        )


class _Coder:
    """The codec of one gradient, whitened by the scales of each call and nothing of those before."""

    def __init__(self, entry: Entry, config: VsaConfig, device: torch.device, kernels: Kernels) -> None:
        self.made_for = entry.shape, config
        layout, config = plan(entry, config)
        self._whitening = Whitening(decay=0.0)
        self.codec = Codec(layout, config, self._whitening, device, kernels)

    def whiten_by(self, scales_S: Tensor) -> None:
        self._whitening.update(self.codec.layout, scales_S)
        self.codec.refresh_factors()


def _check(gradients: Mapping[str, Tensor]) -> None:
    """Raises: TypeError or ValueError, see `VSAGradientCompressor.compress`."""
    if not isinstance(gradients, Mapping):
        raise TypeError(f"gradients must be a dict of tensors by name, got {type(gradients).__name__}.")
    if not gradients:
        raise ValueError("there are no gradients to compress; call backward first, and give them by name.")
    for name, gradient in gradients.items():
        _check_name(name)
        _check_tensor(name, gradient)


def _check_name(name: Any) -> None:
    if not isinstance(name, str):  # converted, 1 and "1" would clash
        raise TypeError(f"gradients must be named by strings, got the name {name!r}; use str(...) where names differ.")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the name {name!r} cannot be written in UTF-8; use another.") from error


def _check_tensor(name: str, gradient: Any) -> None:
    if not isinstance(gradient, Tensor):
        raise TypeError(
            f"gradient {name} is a {type(gradient).__name__}, not a tensor; leave out parameters without a gradient."
        )
    if gradient.layout != torch.strided:
        raise TypeError(f"gradient {name} is sparse ({gradient.layout}), which cannot be bundled; use .to_dense().")
    if gradient.is_complex():
        raise TypeError(f"gradient {name} is {gradient.dtype}, but only reals can be bundled; use torch.view_as_real.")
    if gradient.dtype not in DTYPES.values():
        raise TypeError(f"gradient {name} is {gradient.dtype}, which is none of {', '.join(DTYPES)}; use .float().")


def _exponent(name: str, flat_N: Tensor) -> int:
    """The least whose power of two is beyond all magnitudes. Raises: ValueError for a value that is not finite."""
    if not flat_N.numel():
        return 0
    least, greatest = flat_N.aminmax()
    peak = max(-least.item(), greatest.item())
    if not math.isfinite(peak):
        bad = flat_N.numel() - int(flat_N.isfinite().sum())
        raise ValueError(
            f"gradient {name} has {bad} values that are not finite, and one would spoil all around it; leave this step "
            "out, or replace them with torch.nan_to_num."
        )
    return math.frexp(peak)[1]


def _num_bytes(entry: Entry, config: VsaConfig) -> int:
    """Bytes of a gradient's packet."""
    return packet_bytes(packet_like(entry, config))


def _scale_(flat_N: Tensor, exponent: int) -> None:
    """Multiply with 2**exponent, by halves where float32 does not hold it: its least value is 2**-149."""
    half = exponent // 2 if abs(exponent) > 120 else 0
    for part in (half, exponent - half) if half else (exponent,):
        flat_N.mul_(2.0**part)
