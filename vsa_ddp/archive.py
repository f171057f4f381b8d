"""Compressed gradients as a value, and as bytes: the format of gradient archives.

Parts of a file in this order, little-endian; the first four are 24 bytes:

| part     | bytes | what                                                                                       |
|----------|-------|--------------------------------------------------------------------------------------------|
| magic    | 8     | 0x93, then VSAGRAD                                                                         |
| version  | 4     | unsigned: 1                                                                                |
| length   | 4     | unsigned: H, bytes of the header                                                           |
| size     | 8     | unsigned: bytes of the whole file                                                          |
| header   | H     | JSON in UTF-8, filled with spaces: what follows begins at a multiple of 8 bytes            |
| packets  |       | of each gradient, in the order of their names' code points; laid out as in `packing`       |
| checksum | 16    | BLAKE2b of all that is before                                                              |

The header: `{"gradients": [[name, shape, dtype, exponent], ...], "settings": {...}, "step": step}`, gradients in the
order in which they were given. Exponent null: the packet has the gradient's elements as they were, and no other part.
An integer: the gradient over 2**exponent is compressed, as a bucket of its own; its packet has levels, scales if
`settings` say whiten, and trits. With settings, step and names the keys are known, so that nothing else is needed.

Magic, version, size and checksum stay where they are in every later version: what is damaged is told from what is new.
"""

import hashlib
import json
import math
import os
import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vsa_ddp.config import VsaConfig
from vsa_ddp.layout import BucketLayout, plan_bucket
from vsa_ddp.packing import TRITS_PER_BYTE, Packet, packet_bytes
from vsa_ddp.version import __version__

MAGIC = b"\x93VSAGRAD"
VERSION = 1
SETTINGS = ("bundle", "gain", "rotation_block", "seed", "whiten")
"""What of a `VsaConfig` decides how packets are read."""
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_START = struct.Struct("<8sIIQ")
_CHECKSUM_BYTES = 16
_ALIGN = 8
_MOST_ELEMENTS = 2**48


@dataclass(frozen=True)
class Entry:
    """What an archive tells about one gradient."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    exponent: int | None
    """The gradient over 2**exponent, which is less than 1, was compressed; None: its elements are stored as they were.
    """

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def plan(entry: Entry, config: VsaConfig) -> tuple[BucketLayout, VsaConfig]:
    """Layout and settings of the codec of a compressed gradient, which is a bucket of its own.

    One that does not fill all slots is bundled in as many as it fills: the same trits, and a gain that suits them.
    """
    parameter = ((entry.name, entry.shape),)
    config = replace(config, min_numel=1)
    (share,) = plan_bucket(parameter, config).slices
    config = replace(config, bundle=-(-share.numel // share.num_dims))
    return plan_bucket(parameter, config), config


def packet_like(entry: Entry, config: VsaConfig) -> Packet:
    """Shapes and dtypes of a gradient's packet, without memory."""
    block = config.rotation_block
    num_rows = num_scales = 0
    if entry.exponent is not None:
        layout, _ = plan(entry, config)
        num_rows, num_scales = layout.num_dims // block, layout.num_factors if config.whiten else 0
    num_exact = entry.numel if entry.exponent is None else 0
    return Packet(
        torch.empty(num_rows, -(-block // TRITS_PER_BYTE), dtype=torch.uint8, device="meta"),
        torch.empty(num_rows, dtype=torch.bfloat16, device="meta"),
        torch.empty(num_scales, dtype=torch.bfloat16, device="meta"),
        torch.empty(num_exact, dtype=entry.dtype, device="meta"),
    )


def check_step(step: object) -> None:
    """Raises: ValueError if it is not a step number."""
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**63:
        raise ValueError(f"step must be an int in 0..{2**63 - 1} (keys are drawn from it), got {step!r}.")


@dataclass(frozen=True, eq=False, repr=False)
class CompressedGradients:
    """Named gradients as packets, with all that it takes to decompress them.

    `VSAGradientCompressor.compress` makes them, `load` and `from_bytes` read them. They can be pickled.
    """

    config: VsaConfig
    """The settings they were compressed with; those that no packet depends on are the defaults."""
    step: int
    entries: tuple[Entry, ...]
    """In the order in which the gradients were given."""
    packets: tuple[Tensor, ...]
    """(bytes,) uint8 on the CPU, one for each entry."""

    def __repr__(self) -> str:
        return (
            f"CompressedGradients({len(self.entries)} gradients of step {self.step}, "
            f"{self.dense_bytes} bytes in {self.num_bytes}, {self.compression:.1f} x)"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return CompressedGradients.from_bytes, (self.to_bytes(),)  # packets may be views of one large storage

    @property
    def num_bytes(self) -> int:
        """What `save` writes: header, packets and checksum."""
        return len(self._head) + sum(packet.numel() for packet in self.packets) + _CHECKSUM_BYTES

    @property
    def dense_bytes(self) -> int:
        """Bytes of the gradients in their own dtypes."""
        return sum(entry.numel * entry.dtype.itemsize for entry in self.entries)

    @property
    def compression(self) -> float:
        """dense_bytes / num_bytes: higher is smaller."""
        return self.dense_bytes / self.num_bytes

    @property
    def num_dims(self) -> int:
        """D, dimensions of all hypervectors."""
        return sum(plan(entry, self.config)[0].num_dims for entry in self.entries if entry.exponent is not None)

    def to_bytes(self) -> bytes:
        """The file's content; see the format in `vsa_ddp.archive`. Exact: `from_bytes` inverts it."""
        return b"".join(self._chunks())

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "data") -> "CompressedGradients":
        """Read what `to_bytes` gave. Errors call it `source`.

        Raises: ValueError if it is damaged, truncated, foreign or of a newer version.
        """
        return _parse(bytearray(data), source)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file. Whoever reads it, or is killed meanwhile, has the old one or the new one. Raises: OSError."""
        path = Path(path)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            with partial.open("xb") as file:
                file.writelines(self._chunks())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CompressedGradients":
        """Read a file that `save` wrote.

        Raises: ValueError naming the file if it is damaged, truncated, foreign or of a newer version; OSError.
        """
        return _parse(bytearray(Path(path).read_bytes()), str(path))

    @cached_property
    def _head(self) -> bytes:
        names = {dtype: name for name, dtype in DTYPES.items()}
        header = {
            "gradients": [[e.name, e.shape, names[e.dtype], e.exponent] for e in self.entries],
            "settings": {name: getattr(self.config, name) for name in SETTINGS},
            "step": self.step,
        }
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-(_START.size + len(text)) % _ALIGN)
        size = _START.size + len(text) + sum(packet.numel() for packet in self.packets) + _CHECKSUM_BYTES
        return _START.pack(MAGIC, VERSION, len(text), size) + text

    def _chunks(self) -> Iterator[bytes]:
        """The file in parts."""
        checksum = hashlib.blake2b(self._head, digest_size=_CHECKSUM_BYTES)
        yield self._head
        packets = dict(zip((entry.name for entry in self.entries), self.packets, strict=True))
        for name in sorted(packets):
            packet = packets[name].numpy().tobytes()
            checksum.update(packet)
            yield packet
        yield checksum.digest()


def _parse(data: bytearray, source: str) -> CompressedGradients:
    """What `to_bytes` gave, in order of trust: is it ours, is it whole, is it of this version, is it well formed."""
    again = "save or copy it again."
    if not data or data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise ValueError(
            f"{source} is no gradient archive of vsa_ddp, or its first bytes are damaged: it begins with "
            f"{bytes(data[: len(MAGIC)])!r}; give a file that CompressedGradients.save wrote."
        )
    if len(data) < _START.size + _CHECKSUM_BYTES:
        raise ValueError(f"{source} is truncated: {len(data)} bytes are fewer than any gradient archive has; {again}")
    _, version, header_bytes, size = _START.unpack_from(data)
    if len(data) != size:
        kind = "truncated" if len(data) < size else "damaged"
        raise ValueError(f"{source} is {kind}: it has {len(data)} bytes and was written with {size}; {again}")
    content, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if hashlib.blake2b(content, digest_size=_CHECKSUM_BYTES).digest() != checksum:
        raise ValueError(f"{source} is damaged: its bytes are not those of its checksum; {again}")
    if version > VERSION:
        raise ValueError(
            f"{source} has version {version} of the format, and vsa_ddp {__version__} reads versions up to {VERSION}; "
            "install a newer vsa_ddp."
        )
    try:
        return _read(content, version, header_bytes)
    except (ValueError, RecursionError) as error:  # json's own for nesting without end
        raise ValueError(
            f"{source} is sound, but not as vsa_ddp writes gradient archives: {error} Ask its writer for another."
        ) from error


def _read(content: bytearray, version: int, header_bytes: int) -> CompressedGradients:
    """An archive from all bytes before its checksum. Raises: ValueError or RecursionError."""
    start = _START.size + header_bytes
    if version < 1 or start > len(content) or start % _ALIGN:
        raise ValueError(f"version {version} with a header of {header_bytes} bytes.")
    config, step, entries = _read_header(content[_START.size : start].decode())
    sizes = {entry.name: packet_bytes(packet_like(entry, config)) for entry in entries}
    if len(sizes) != len(entries):
        raise ValueError("two gradients have the same name.")
    if sum(sizes.values()) != len(content) - start:
        raise ValueError(f"{len(content) - start} bytes of packets where the header means {sum(sizes.values())}.")
    whole, packets = torch.frombuffer(content, dtype=torch.uint8), {}
    for name in sorted(sizes):
        packets[name] = whole[start : start + sizes[name]]
        start += sizes[name]
    return CompressedGradients(config, step, entries, tuple(packets[entry.name] for entry in entries))


def _read_header(text: str) -> tuple[VsaConfig, int, tuple[Entry, ...]]:
    header = json.loads(text)
    if not isinstance(header, dict) or set(header) != {"gradients", "settings", "step"}:
        raise ValueError("the header must have gradients, settings and step, and nothing else.")
    settings, step, gradients = header["settings"], header["step"], header["gradients"]
    if not isinstance(settings, dict) or set(settings) != set(SETTINGS):
        raise ValueError(f"the settings must be {', '.join(SETTINGS)}, got {settings!r}.")
    if settings["bundle"] is None:
        raise ValueError("bundle must be an int, got None.")
    check_step(step)
    if not isinstance(gradients, list) or not gradients:
        raise ValueError("there must be a list of gradients, at least one.")
    return VsaConfig.from_settings(settings), step, tuple(map(_read_entry, gradients))


def _read_entry(item: Any) -> Entry:
    if not isinstance(item, list) or len(item) != 4:
        raise ValueError(f"a gradient must be a name, a shape, a dtype and an exponent, got {item!r}.")
    name, shape, dtype, exponent = item
    if not isinstance(name, str) or not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"gradient {name!r} has dtype {dtype!r}.")
    name.encode()  # a ValueError for half a surrogate pair
    whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    if not whole or math.prod(max(n, 1) for n in shape) > _MOST_ELEMENTS:
        raise ValueError(f"gradient {name!r} has shape {shape!r}.")
    entry = Entry(name, tuple(shape), DTYPES[dtype], exponent)
    if exponent is not None:
        info = torch.finfo(entry.dtype)
        low, high = (math.frexp(size)[1] for size in (info.tiny * info.eps, info.max))
        if type(exponent) is not int or not low <= exponent <= high or len(shape) < 2 or not entry.numel:
            raise ValueError(f"gradient {name!r} of shape {shape} and dtype {dtype} has exponent {exponent!r}.")
    return entry
