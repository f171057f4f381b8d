"""The archive's format: as documented, exact, and never trusted: a damaged file is refused by name."""

import copy
import hashlib
import json
import os
import pickle
import random
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.test_compressor import made
from vsa_ddp import CompressedGradients, VsaConfig, VSAGradientCompressor

SIZE_AT, HEADER_AT = 16, 24
CHECKSUM = 16


def small() -> CompressedGradients:
    """A file of some 600 bytes with all that an archive can hold."""
    config = VsaConfig(bundle=2, rotation_block=128, min_numel=512, seed=11)
    gradients = {"weight": made(32, 32), "bias": made(3).half(), "größe": made().double(), "a/empty": made(0, 2)}
    return VSAGradientCompressor(config).compress(gradients, 2**40)


def signed(content: bytes | bytearray) -> bytes:
    """A whole file with these bytes before the checksum, and with the size and the checksum that they need."""
    content = bytearray(content)
    struct.pack_into("<Q", content, SIZE_AT, len(content) + CHECKSUM)
    return bytes(content + hashlib.blake2b(content, digest_size=CHECKSUM).digest())


def with_header(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The small file with another header, well signed."""
    data = small().to_bytes()
    (length,) = struct.unpack_from("<I", data, 12)
    header = json.loads(data[HEADER_AT : HEADER_AT + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return signed(data[:12] + struct.pack("<IQ", len(text), 0) + text + data[HEADER_AT + length : -CHECKSUM])


def same(a: CompressedGradients, b: CompressedGradients) -> bool:
    return (a.config, a.step, a.entries) == (b.config, b.step, b.entries) and all(
        map(torch.equal, a.packets, b.packets)
    )


def test_reading_inverts_writing(tmp_path: Path) -> None:
    compressed = small()
    compressed.save(tmp_path / "round.vsa")
    compressed.save(str(tmp_path / "round.vsa"))  # over the first
    assert os.listdir(tmp_path) == ["round.vsa"]
    for read in (
        CompressedGradients.load(tmp_path / "round.vsa"),
        CompressedGradients.load(str(tmp_path / "round.vsa")),
        CompressedGradients.from_bytes(compressed.to_bytes()),
        pickle.loads(pickle.dumps(compressed)),
        copy.deepcopy(compressed),
    ):
        assert same(read, compressed)
        assert read.to_bytes() == compressed.to_bytes()
        assert len(pickle.dumps(read)) < compressed.num_bytes + 200


def test_a_reader_who_knows_the_documentation_alone_finds_everything() -> None:
    data = small().to_bytes()
    magic, version, length, size = struct.unpack("<8sIIQ", data[:24])
    assert (magic, version, size) == (b"\x93VSAGRAD", 1, len(data))
    assert hashlib.blake2b(data[:-16], digest_size=16).digest() == data[-16:]
    assert (24 + length) % 8 == 0
    header = json.loads(data[24 : 24 + length].decode())
    assert header == {
        "gradients": [
            ["weight", [32, 32], "float32", 1],
            ["bias", [3], "float16", None],
            ["größe", [], "float64", None],
            ["a/empty", [0, 2], "float32", None],
        ],
        "settings": {"bundle": 2, "gain": "unbiased", "rotation_block": 128, "seed": 11, "whiten": True},
        "step": 2**40,
    }
    # by name: "a/empty" has no bytes, "bias" three of two filled to 8, then "größe", then "weight"
    at = 24 + length
    assert data[at : at + 8] == made(3).half().numpy().tobytes() + bytes(2)
    assert data[at + 8 : at + 16] == made().double().numpy().tobytes()
    packet = data[at + 16 : -16]
    # 1024 elements in two slots: 4 blocks of 128 trits in 26 bytes, 4 levels, 64 scales
    assert len(packet) == 8 + 128 + 104
    levels, scales = (np.frombuffer(packet[a:b], "<u2").astype("<u4") << 16 for a, b in ((0, 8), (8, 136)))
    assert (levels.view("<f4") > 0).all()
    rows = made(32, 32).div(2).square().mean(1).numpy()  # over 2**exponent
    np.testing.assert_allclose(scales.view("<f4")[:32], rows, rtol=2**-8)
    trits = np.frombuffer(packet[136:], np.uint8).reshape(4, 26, 1) // 3 ** np.arange(5) % 3 - 1.0
    assert not trits.reshape(4, 130)[:, 128:].any()
    assert 0.4 < np.abs(trits).mean() < 0.7  # of a Gaussian 0.54 are beyond the threshold


def test_files_written_today_are_read_for_ever() -> None:
    assert hashlib.sha256(small().to_bytes()).hexdigest() == GOLDEN


GOLDEN = "6e14492e590848b1750ef2e7084d835f9cfd53cb113c50437ebbc59312d82fca"
"""Of `small`. If it changes, files that users have are read otherwise: raise the format's version."""


# What is damaged


def damaged(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """What can happen to a file, and what it is then."""
    at, length = rng.randrange(len(data)), rng.randint(1, 16)
    bits = rng.randbytes(length)
    kinds: dict[str, Callable[[], bytes]] = {
        "flipped": lambda: data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
        "truncated": lambda: data[:at],
        "inserted": lambda: data[:at] + bits + data[at:],
        "removed": lambda: data[:at] + data[at + length :],
        "overwritten": lambda: data[:at] + bits[: len(data) - at] + data[at + length :],
        "zeroed": lambda: data[:at] + bytes(min(length, len(data) - at)) + data[at + length :],
        "repeated": lambda: data[: at + length] + data[at:],
        "swapped": lambda: data[at:] + data[:at],
    }
    kind = rng.choice(list(kinds))
    return kind, kinds[kind]()


def test_ten_thousand_damaged_files_give_a_clear_error_or_the_exact_result(tmp_path: Path) -> None:
    whole, rng = small().to_bytes(), random.Random(0)
    file = tmp_path / "round.vsa"
    refused: Counter[str] = Counter()
    for number in range(10_000):
        kind, data = damaged(whole, rng)
        try:
            if number % 20:
                read = CompressedGradients.from_bytes(data, source=str(file))
            else:  # the same by way of the disk
                file.write_bytes(data)
                read = CompressedGradients.load(file)
        except ValueError as error:
            message = str(error)
            assert message.startswith(f"{file} is "), message
            assert message.endswith(("save or copy it again.", "give a file that CompressedGradients.save wrote."))
            assert data != whole
            refused[kind] += 1
        else:
            assert data == whole, kind
            assert same(read, small())
    assert len(refused) == 8
    assert refused.total() > 9_900


def test_two_thousand_forged_files_give_an_error_or_a_result_never_a_crash() -> None:
    # damage in front of the checksum: what a program with another idea of the format might write
    content, rng = small().to_bytes()[:-CHECKSUM], random.Random(1)
    (length,) = struct.unpack_from("<I", content, 12)
    outcomes: Counter[str] = Counter()
    for _ in range(2_000):
        data = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(8, HEADER_AT + length)
            data[at] = rng.choice(b'0123456789-.eE[]{},:" \\untrfalse') if at >= HEADER_AT else rng.randrange(256)
        try:
            read = CompressedGradients.from_bytes(signed(data), source="the file")
        except ValueError as error:
            outcomes["refused" if str(error).startswith("the file ") else str(error)] += 1
        else:
            back = VSAGradientCompressor().decompress(read)
            assert [tuple(g.shape) for g in back.values()] == [entry.shape for entry in read.entries]
            outcomes["read"] += 1
    assert set(outcomes) == {"refused", "read"}
    assert min(outcomes["refused"], outcomes["read"]) > 20, outcomes


def test_every_truncation_is_one() -> None:
    whole = small().to_bytes()
    for length in range(1, len(whole)):
        with pytest.raises(ValueError, match=rf"f is truncated: .*{length} .* save or copy it again"):
            CompressedGradients.from_bytes(whole[:length], source="f")


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\r\n\x1a\n" + bytes(500), b"PK\x03\x04" + bytes(500), b"VSAGRAD", b"{}"]
)
def test_a_foreign_file_is_told_from_a_damaged_one(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "other.bin"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.bin is no gradient archive of vsa_ddp.* it begins with b'.*give a"):
        CompressedGradients.load(file)


def test_a_newer_version_is_told_from_a_damaged_file() -> None:
    newer = bytearray(small().to_bytes()[:-CHECKSUM])
    newer[8] = 2
    with pytest.raises(ValueError, match=r"f has version 2 .* reads versions up to 1; install a newer vsa_ddp"):
        CompressedGradients.from_bytes(signed(newer), source="f")
    damaged_version = bytearray(small().to_bytes())
    damaged_version[8] = 2
    with pytest.raises(ValueError, match="f is damaged: its bytes are not those of its checksum"):
        CompressedGradients.from_bytes(bytes(damaged_version), source="f")


def gradient(index: int, field: int, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: header["gradients"][index].__setitem__(field, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.pop("step"), "must have gradients, settings and step"),
        (lambda h: h.update(note="x"), "must have gradients, settings and step, and nothing else"),
        (lambda h: h.update(step=-1), "step must be an int"),
        (lambda h: h.update(gradients=[]), "a list of gradients, at least one"),
        (lambda h: h.update(gradients=[3]), "must be a name, a shape, a dtype and an exponent, got 3"),
        (lambda h: h["settings"].pop("seed"), "settings must be bundle, gain"),
        (lambda h: h["settings"].update(bundle=0), r"bundle must be in 1\.\.4096, got 0"),
        (lambda h: h["settings"].update(bundle=None), "bundle must be an int, got None"),
        (lambda h: h["settings"].update(gain=[]), "gain must be one of"),
        (gradient(0, 0, "bias"), "two gradients have the same name"),
        (gradient(0, 0, 5), "gradient 5 has dtype"),
        (gradient(0, 0, "\ud800"), "surrogates not allowed"),
        (gradient(0, 1, [32, 16]), "256 bytes of packets where the header means 176"),
        (gradient(0, 1, [32, -32]), "'weight' has shape"),
        (gradient(0, 1, [32, True]), "'weight' has shape"),
        (gradient(3, 1, [0, 2**62, 2**62]), "'a/empty' has shape"),
        (gradient(0, 1, [1024]), "'weight' of shape .* has exponent 1"),
        (gradient(3, 3, 0), "'a/empty' of shape .* has exponent 0"),
        (gradient(0, 2, "int8"), "'weight' has dtype 'int8'"),
        (gradient(0, 2, []), r"'weight' has dtype \[\]"),
        (gradient(0, 3, 129), "'weight' .* has exponent 129"),
        (gradient(0, 3, -149), "'weight' .* has exponent -149"),
        (gradient(0, 3, 1.0), r"'weight' .* has exponent 1\.0"),
    ],
)
def test_a_header_that_cannot_be_is_refused_with_the_reason(
    change: Callable[[dict[str, Any]], object], message: str
) -> None:
    assert same(CompressedGradients.from_bytes(with_header(lambda header: None)), small())
    with pytest.raises(ValueError, match=f"f is sound, but not as vsa_ddp writes .*{message}"):
        CompressedGradients.from_bytes(with_header(change), source="f")


@pytest.mark.parametrize("text", [b"[" * 100_000, b"{" * 8, b"\xff" * 8, b"null    ", b'{"step":' + b"9" * 9000 + b"}"])
def test_a_header_that_is_no_json_is_refused(text: bytes) -> None:
    text += b" " * (-len(text) % 8)
    start = small().to_bytes()[:12] + struct.pack("<IQ", len(text), 0)
    with pytest.raises(ValueError, match="f is sound, but not as vsa_ddp writes"):
        CompressedGradients.from_bytes(signed(start + text), source="f")


@pytest.mark.parametrize(("version", "length"), [(0, None), (1, 7), (1, 2**32 - 1)])
def test_a_start_that_cannot_be_is_refused(version: int, length: int | None) -> None:
    content = bytearray(small().to_bytes()[:-CHECKSUM])
    struct.pack_into("<I", content, 8, version)
    if length is not None:
        struct.pack_into("<I", content, 12, length)
    with pytest.raises(ValueError, match=f"f is sound, but not .* version {version} with a header of"):
        CompressedGradients.from_bytes(signed(content), source="f")


# Writing


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "round.vsa"
    old = small()
    old.save(file)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        VSAGradientCompressor().compress({"other": made(64, 64)}, 1).save(file)
    assert os.listdir(tmp_path) == ["round.vsa"]
    assert same(CompressedGradients.load(file), old)


def test_a_folder_that_is_not_there_is_told() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        small().save("/nowhere/round.vsa")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CompressedGradients.load("/nowhere/round.vsa")
