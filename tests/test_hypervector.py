"""The algebra: keys as Random123 has them, binding and rotation that undo themselves, bundles that add up."""

import pytest
import torch

from vsa_ddp import hypervector as hv

# Random123's known answers of philox4x32-10: counter, key, output
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


BLOCK = 1024


def keys(step: int = 0, seed: int = 0, stream: int = 0, slots: int = 4, dims: int = 1024) -> torch.Tensor:
    counter_BC = torch.arange(slots * dims // hv.KEYS_PER_COUNTER).view(slots, -1)
    words = hv.key_words(counter_BC, torch.full_like(counter_BC, stream), step, seed)
    return hv.unpack_keys(words.view(slots, -1, BLOCK // 32)).flatten(1)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    out = hv.philox((torch.tensor(counter[0]), *counter[1:]), key[0] | key[1] << 32)
    assert out.tolist() == words


def test_a_key_is_a_bit_of_a_word() -> None:
    words = hv.key_words(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64), 0, 0)
    assert [w & 0xFFFFFFFF for w in words[0].tolist()] == KNOWN_ANSWERS[0][2]
    keys_K = hv.unpack_keys(words[0])
    assert keys_K.tolist() == [1.0 - 2 * (KNOWN_ANSWERS[0][2][e % 4] >> e // 4 & 1) for e in range(128)]


@pytest.mark.parametrize("change", [{"step": 1}, {"step": 2**32}, {"seed": 1}, {"seed": 2**40}, {"stream": 7}])
def test_other_step_seed_or_parameter_means_independent_keys(change: dict[str, int]) -> None:
    a, b = keys(), keys(**change)
    # 4096 independent signs: the mean product is within 5 standard deviations of 0
    assert (a * b).mean().abs() < 5 / 64
    assert a.unique().tolist() == [-1, 1]


def test_slots_have_independent_keys() -> None:
    gram = keys() @ keys().T / 1024
    assert torch.equal(gram.diagonal(), torch.ones(4))
    assert (gram - torch.eye(4)).abs().max() < 5 / 32


def test_unbinding_inverts_binding_exactly() -> None:
    x = torch.randn(4, 1024)
    assert torch.equal(hv.unbind(hv.bind(x, keys()), keys()), x)


def test_a_bundle_is_near_each_of_its_slots() -> None:
    x_BD = torch.randn(4, 1024)
    bundle_D = torch.zeros(1024)
    for x_D, keys_D in zip(x_BD, keys(), strict=True):
        hv.bundle_bound_(bundle_D, x_D, keys_D)
    seen_BD = hv.unbind(bundle_D, keys())  # each slot sees all of it
    cosines = torch.nn.functional.cosine_similarity(seen_BD, x_BD)
    # 1 / sqrt(B) in expectation; 1 / sqrt(D) is its standard deviation
    assert (cosines - 0.5).abs().max() < 5 / 32


@pytest.mark.parametrize("block", [128, 256, 1024, 2048, 16384])
def test_rotation_is_the_orthonormal_walsh_hadamard_transform(block: int) -> None:
    y_TK = torch.randn(3, block, dtype=torch.float32)
    reference = y_TK @ torch.from_numpy(hv.hadamard(block)) / block**0.5
    # integers of 2**24 / K for the greatest of a row, which is below 8 here: six standard deviations of rounding
    rounding = 6 * 8 * block / 2**24 / 12**0.5
    torch.testing.assert_close(hv.rotate(y_TK), reference, rtol=0, atol=rounding)
    torch.testing.assert_close(hv.rotate(hv.rotate(y_TK)), y_TK, rtol=0, atol=1.5 * rounding)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_rows_rotation_does_not_depend_on_its_neighbours_or_the_threads(threads: int) -> None:
    y_TK = torch.randn(300, 1024)
    whole = hv.rotate(y_TK)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for part in (slice(0, 1), slice(7, 12), slice(100, 300)):
            assert torch.equal(hv.rotate(y_TK[part].clone()), whole[part])
    finally:
        torch.set_num_threads(before)
