"""Packed vectors of trits agree with plain integers, and on bipolar vectors with torchhd's MAP algebra."""

import copy
import io
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vsa_ddp.packing import pack_trits
from vsa_ddp.ternary import ternary_quantize_stochastic
from vsa_ddp.trits import PackedTritVec, TritCounts, popcount, ternary_quantize_packed, vote

TRIT = st.integers(-1, 1)
PAIRS = st.lists(st.tuples(TRIT, TRIT), max_size=200)
WORD = st.integers(-(2**63), 2**63 - 1)


def vector(trits: Any) -> PackedTritVec:
    return PackedTritVec.from_trits(torch.tensor(trits, dtype=torch.int8))


def random_vector(num_trits: int, seed: int) -> PackedTritVec:
    generator = torch.Generator().manual_seed(seed)
    return PackedTritVec.from_trits(torch.randint(-1, 2, (num_trits,), generator=generator, dtype=torch.int8))


def test_planes_are_least_significant_bit_first() -> None:
    trits = [0] * 70
    trits[0], trits[5], trits[63], trits[64] = 1, -1, -1, 1
    assert vector(trits).plus.tolist() == [1, 1]
    assert vector(trits).minus.tolist() == [2**5 - 2**63, 0]


@given(st.lists(TRIT, max_size=200))
def test_trits_and_base_3_bytes_survive(trits: list[int]) -> None:
    v = vector(trits)
    assert len(v) == len(trits)
    assert v.to_trits().tolist() == trits
    assert torch.equal(v.to_bytes(), pack_trits(torch.tensor(trits, dtype=torch.int8)))
    assert PackedTritVec.from_bytes(v.to_bytes(), len(trits)) == v


def test_a_trit_takes_two_bits() -> None:
    v = random_vector(6400, 0)
    assert 8 * sum(plane.numel() * plane.element_size() for plane in (v.plus, v.minus)) == 2 * 6400


@given(PAIRS)
def test_the_algebra_is_that_of_integers(pairs: list[tuple[int, int]]) -> None:
    a, b = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    v, w = vector(a.tolist()), vector(b.tolist())
    assert v.dot(w) == a @ b
    assert v.hamming(w) == (a != b).sum()
    norms = math.sqrt((a @ a) * (b @ b))
    assert v.cosine(w) == pytest.approx(a @ b / norms if norms else 0.0, rel=1e-15)
    assert v.bind(w).to_trits().tolist() == (a * b).tolist()
    assert (-v).to_trits().tolist() == (-a).tolist()
    assert v.bundle(w).to_trits().tolist() == np.sign(a + b).tolist()
    assert v.counts() == TritCounts((a == -1).sum(), (a == 0).sum(), (a == 1).sum())
    assert v.sparsity() == (pytest.approx((a == 0).mean()) if len(a) else 0.0)
    assert (v == w) == (a.tolist() == b.tolist())


@given(st.lists(WORD, max_size=20))
def test_every_bit_of_a_word_is_counted(words: list[int]) -> None:
    counts = popcount(torch.tensor(words, dtype=torch.int64))
    assert counts.tolist() == [(word & 2**64 - 1).bit_count() for word in words]


@given(st.integers(1, 130), st.lists(st.tuples(st.integers(-130, 129), TRIT), max_size=30))
def test_trits_are_written_in_place_and_read_back(num_trits: int, writes: list[tuple[int, int]]) -> None:
    v, expected = PackedTritVec(num_trits), [0] * num_trits
    for index, trit in writes:
        if -num_trits <= index < num_trits:
            v[index] = expected[index] = trit
            assert v[index] == v.get(index) == trit
    assert v == vector(expected)
    assert list(v) == expected


def test_a_cosine_with_itself_is_one_and_with_zeros_none() -> None:
    v = random_vector(1000, 1)
    assert v.cosine(v) == 1.0
    assert v.cosine(-v) == -1.0
    assert v.cosine(PackedTritVec(1000)) == 0.0


def test_binding_twice_gives_the_vector_back_where_the_key_has_no_zero() -> None:
    v = random_vector(1000, 1)
    key = PackedTritVec.from_votes(torch.randn(1000, generator=torch.Generator().manual_seed(2)))
    assert key.sparsity() == 0
    assert v.bind(key).unbind(key) == v
    erased = random_vector(1000, 3)
    expected = torch.where(erased.to_trits() == 0, 0, v.to_trits())
    assert torch.equal(v.bind(erased).unbind(erased).to_trits(), expected)


@given(st.permutations(range(7)), st.integers(1, 6))
def test_a_bundle_does_not_depend_on_order_or_on_parts(order: list[int], cut: int) -> None:
    vectors = [random_vector(100, seed) for seed in range(7)]
    whole = vectors[0].bundle(*vectors[1:])
    shuffled = [vectors[i] for i in order]
    assert shuffled[0].bundle(*shuffled[1:]) == whole
    assert PackedTritVec.from_votes(vote(shuffled[:cut]) + vote(shuffled[cut:])) == whole
    assert torch.equal(whole.to_trits().int(), torch.stack([v.to_trits().int() for v in vectors]).sum(0).sign().int())


def test_signs_of_signs_would_depend_on_the_order() -> None:
    plus, minus = vector([1]), vector([-1])
    assert plus.bundle(plus, minus, minus).to_trits().tolist() == [0]
    assert plus.bundle(plus).bundle(minus).bundle(minus).to_trits().tolist() == [-1]


def test_bipolar_vectors_have_the_algebra_of_torchhd() -> None:
    torchhd = pytest.importorskip("torchhd")
    generator = torch.Generator().manual_seed(0)
    hvs = torchhd.random(5, 1000, "MAP", generator=generator)
    vectors = [PackedTritVec.from_votes(hv.as_subclass(torch.Tensor)) for hv in hvs]

    def same(v: PackedTritVec, hv: torch.Tensor) -> bool:
        return torch.equal(v.to_trits().float(), hv.as_subclass(torch.Tensor))

    assert same(vectors[0], hvs[0])
    assert same(vectors[0].bind(vectors[1]), torchhd.bind(hvs[0], hvs[1]))
    assert same(-vectors[0], torchhd.negative(hvs[0]))
    # torchhd keeps the votes; an odd number of them has no tie
    assert same(vectors[0].bundle(*vectors[1:]), torchhd.normalize(torchhd.multiset(hvs)))
    assert torch.equal(vote(vectors).float(), torchhd.multiset(hvs).as_subclass(torch.Tensor))
    for v, hv in zip(vectors, hvs, strict=True):
        assert v.dot(vectors[0]) == torchhd.dot_similarity(hv, hvs[0]).item()
        assert v.cosine(vectors[0]) == pytest.approx(torchhd.cosine_similarity(hv, hvs[0]).item(), abs=1e-6)
        assert 1000 - v.hamming(vectors[0]) == torchhd.hamming_similarity(hv, hvs[0]).item()


def test_a_saved_state_loads_without_code() -> None:
    v, file = random_vector(100, 0), io.BytesIO()
    torch.save(v.state_dict(), file)
    file.seek(0)
    loaded = PackedTritVec.from_state_dict(torch.load(file, weights_only=True))
    assert loaded == v
    loaded[3] = 1 if v[3] == 0 else 0
    assert loaded != v
    assert copy.deepcopy(v) == v


@pytest.mark.parametrize(
    ("name", "plane", "message"),
    [
        ("plus", torch.zeros(3, dtype=torch.int64), r"plane plus of 100 trits is \(2,\) torch.int64, got \(3,\)"),
        ("minus", torch.zeros(2), r"got \(2,\) torch.float32"),
        ("plus", torch.full((2,), -1), r"no planes of 100 trits"),
    ],
)
def test_a_damaged_state_is_refused(name: str, plane: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedTritVec.from_state_dict({**PackedTritVec(100).state_dict(), name: plane})


def test_a_trit_that_is_both_is_refused() -> None:
    state = vector([1] * 64).state_dict()
    with pytest.raises(ValueError, match=r"a trit is \+1 and -1"):
        PackedTritVec.from_state_dict({**state, "minus": state["plus"]})


def test_mistakes_are_named() -> None:
    v = vector([1, 0, -1])
    with pytest.raises(TypeError, match=r"must be int8, got torch\.int64"):
        PackedTritVec.from_trits(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"one dimension, got shape \(1, 3\)"):
        PackedTritVec.from_trits(torch.zeros(1, 3, dtype=torch.int8))
    with pytest.raises(ValueError, match="must be -1, 0 or \\+1, got -128 at 1"):
        vector([0, -128, 5])
    with pytest.raises(ValueError, match="byte 243 at 0 is no five trits"):
        PackedTritVec.from_bytes(torch.tensor([243], dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="6 trits take 2 bytes, got 1"):
        PackedTritVec.from_bytes(torch.tensor([0], dtype=torch.uint8), 6)
    with pytest.raises(IndexError, match="index 3 is outside a vector of 3 trits"):
        v[3]
    with pytest.raises(ValueError, match="a trit is -1, 0 or \\+1, got 2"):
        v[0] = 2
    with pytest.raises(ValueError, match="as many trits, got 3 and 4"):
        v.dot(PackedTritVec(4))
    with pytest.raises(ValueError, match="both vectors must be on one device, got cpu and meta"):
        v.hamming(PackedTritVec(3, device="meta"))
    with pytest.raises(ValueError, match="at least one vector"):
        vote([])
    with pytest.raises(ValueError, match="num_trits must be at least 0, got -1"):
        PackedTritVec(-1)
    with pytest.raises(TypeError, match="unhashable"):
        hash(v)


def test_a_vector_shows_its_first_trits() -> None:
    assert repr(vector([1, 0, -1, 0])) == "PackedTritVec(4 trits, 50% zeros, +0-0, cpu)"
    assert "..." in repr(PackedTritVec(17))


def test_a_tensor_is_quantized_into_a_packed_vector() -> None:
    x = torch.randn(30, 410, generator=torch.Generator().manual_seed(0))
    v, scale = ternary_quantize_packed(x)
    estimate = v.to_trits().view_as(x) * scale
    assert ((estimate - x).square().sum() / x.square().sum()).item() == pytest.approx(0.190, abs=0.01)

    generator = torch.Generator().manual_seed(1)
    v, scale = ternary_quantize_packed(x, partial(ternary_quantize_stochastic, generator=generator))
    expected = ternary_quantize_stochastic(x, generator=torch.Generator().manual_seed(1))
    assert torch.equal(v.to_trits().view_as(x), expected.trits)
    assert torch.equal(scale, expected.scale)
