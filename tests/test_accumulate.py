"""Sums of gradients in trits: unbiased, as noisy as their theory, small by count of allocated bytes, repeatable."""

import importlib.util
import io
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.memory import held_bytes, kept_bytes
from launch.charlm import CharTransformer
from vsa_ddp import packing, rounded_sum, ternary
from vsa_ddp.accumulate import TernaryGradientAccumulator, calculate_memory_savings
from vsa_ddp.config import VsaConfig
from vsa_ddp.hypervector import key_counters, key_words, rotate, unpack_keys
from vsa_ddp.layout import plan_bucket

CPU = torch.device("cpu")
Gradients = dict[str, Tensor]


def accumulator(steps: int = 8, *, trits: int = 2, seed: int = 0) -> TernaryGradientAccumulator:
    return TernaryGradientAccumulator(steps, trits=trits, seed=seed, backend="torch")


def micro_batches(number: int, shape: tuple[int, ...] = (128, 256), seed: int = 0) -> list[Gradients]:
    """Gradients that have nothing in common, of rows that differ in size a hundredfold."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.logspace(-1, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return [{"w": torch.randn(shape, generator=generator) * rows} for _ in range(number)]


def exact_sum(batches: Sequence[Gradients]) -> Tensor:
    return torch.stack([batch["w"].double() for batch in batches]).sum(0)


def nmse(estimate: Tensor, truth: Tensor) -> float:
    return ((estimate - truth).square().sum() / truth.square().sum()).item()


def predicted(number: int, q: float) -> float:
    """What so many roundings leave: each adds q of the energy that it finds, noise of earlier ones included."""
    noise = 0.0
    for m in range(1, number + 1):
        noise += q * (m + noise)
    return noise / number


@pytest.mark.parametrize(("trits", "told"), [(1, 1.9), (2, 0.15), (3, 0.021)])
def test_the_noise_of_eight_micro_batches_is_the_theorys(trits: int, told: float) -> None:
    batches = micro_batches(8)
    sums = accumulator(trits=trits)
    for batch in batches:
        sums.accumulate(batch)
    measured = nmse(sums.get_accumulated()["w"], exact_sum(batches))
    assert measured == pytest.approx(predicted(8, ternary.NMSES[trits - 1]), rel=0.15)
    assert measured == pytest.approx(told, rel=0.15)  # the docstring's figure


@pytest.mark.parametrize("trits", [1, 2, 3])
def test_the_sum_is_unbiased(trits: int) -> None:
    batches = micro_batches(3, (64, 64))
    truth, draws = exact_sum(batches), 120
    mean = torch.zeros_like(truth)
    single = 0.0
    for seed in range(draws):
        sums = accumulator(trits=trits, seed=seed)
        for batch in batches:
            sums.accumulate(batch)
        estimate = sums.get_accumulated()["w"]
        single += nmse(estimate, truth) / draws
        mean += estimate / draws
    # noise alone falls as 1 / draws; a bias of a percent of a draw's noise energy would make it 2.2 times that
    assert nmse(mean, truth) == pytest.approx(single / draws, rel=0.3)


def test_the_last_micro_batch_need_not_be_rounded() -> None:
    batches = micro_batches(8)
    sums = accumulator()
    for batch in batches[:-1]:
        sums.accumulate(batch)
    last = {"w": batches[-1]["w"].clone()}
    sums.add_to(last, divisor=8)
    q = ternary.NMSES[1]
    assert nmse(8 * last["w"], exact_sum(batches)) == pytest.approx(predicted(7, q) * 7 / 8, rel=0.15)
    assert predicted(7, q) * 7 / 8 < 0.8 * predicted(8, q)


def votes(batches: Sequence[Gradients]) -> tuple[Tensor, float]:
    """The rival: trits of every micro-batch at one threshold and under one rotation, added up as integers.

    Returns the sum, at its best unbiased level, and bits per element.
    """
    layout = plan_bucket((("w", tuple(batches[0]["w"].shape)),), VsaConfig(bundle=1, rotation_block=256))
    words = key_words(*key_counters(layout, range(1), CPU), 0, 0)
    keys_TK = unpack_keys(words.view(-1, 256 // 32))
    sigma_T, lanes_TL, energy, kept = None, torch.zeros((), dtype=torch.int64), torch.zeros(()), torch.zeros(())
    for batch in batches:
        y_TK = rotate(batch["w"].view(-1, 256) * keys_TK)
        sigma_T = y_TK.square().mean(1).sqrt() if sigma_T is None else sigma_T
        trits_TK, energy_T, kept_T = ternary.quantize(y_TK, sigma_T)
        lanes_TL = lanes_TL + packing.pack_digits(trits_TK, len(batches))
        energy, kept = energy + energy_T, kept + kept_T
    y_TK = ternary.dequantize(packing.unpack_digits(lanes_TL, 256, len(batches)), energy / kept)
    return (rotate(y_TK) * keys_TK).view_as(batches[0]["w"]), 64 * lanes_TL.numel() / y_TK.numel()


def test_a_sum_rounded_again_has_less_noise_than_votes_in_fewer_bits() -> None:
    batches = micro_batches(8)
    sums = accumulator()
    for batch in batches:
        sums.accumulate(batch)
    estimate, vote_bits = votes(batches)
    assert nmse(estimate, exact_sum(batches)) == pytest.approx(0.24, abs=0.02)
    assert nmse(sums.get_accumulated()["w"], exact_sum(batches)) < 0.7 * nmse(estimate, exact_sum(batches))
    assert 8 * sums.num_bytes / (128 * 256) < 0.85 * vote_bits


def test_whitening_keeps_noise_in_proportion_to_rows() -> None:
    batches = micro_batches(8)
    sums = accumulator()
    for batch in batches:
        sums.accumulate(batch)
    error_R = (sums.get_accumulated()["w"] - exact_sum(batches)).square().mean(1)
    relative_R = error_R / exact_sum(batches).square().mean(1)
    # the largest rows have ten thousand times the energy of the smallest
    assert 0.05 < relative_R.min() < relative_R.max() < 0.5


def test_rows_without_a_gradient_stay_zero() -> None:
    sums = accumulator()
    for batch in micro_batches(4):
        batch["w"][5:60] = 0
        sums.accumulate(batch)
    total = sums.get_accumulated()["w"]
    assert not total[5:60].any()
    assert (total[60:] != 0).float().mean() > 0.95


def char_gradients(number: int) -> list[Gradients]:
    torch.manual_seed(0)
    model = CharTransformer(width=128, num_layers=2, num_heads=4, length=64)
    batches = []
    for _ in range(number):
        model.zero_grad()
        text = torch.randint(97, (2, 65))
        model(text[:, :-1], text[:, 1:]).backward()
        batches.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return batches


@pytest.mark.parametrize(("trits", "bits"), [(1, 2.0), (2, 3.6), (3, 5.3)])
def test_a_transformers_sum_takes_few_bits_by_count_of_allocated_bytes(trits: int, bits: float) -> None:
    batches = char_gradients(8)
    num_parameters = sum(gradient.numel() for gradient in batches[0].values())
    sums = accumulator(trits=trits)
    for batch in batches:
        sums.accumulate(batch)
        assert kept_bytes(sums) == sums.num_bytes
        assert 0.8 * bits < 8 * sums.num_bytes / num_parameters < bits
    assert sums.memory_savings() == 1 - sums.num_bytes / (4 * num_parameters)


def test_adding_a_micro_batch_leaves_nothing_else_allocated() -> None:
    first, *others = micro_batches(4, (1024, 512))
    accumulator().accumulate(first)  # what is cached once
    sums = accumulator()
    left = held_bytes(lambda: sums.accumulate(first), CPU).left
    assert left == pytest.approx(sums.num_bytes, rel=0.2)  # torch's allocator rounds up, and Python's objects count
    for batch in others:
        assert held_bytes(lambda batch=batch: sums.accumulate(batch), CPU).left < 0.1 * sums.num_bytes


def test_a_large_parameter_passes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounded_sum, "_PIECE", 64 * 512)
    batches = micro_batches(2, (1000, 512))
    sums = accumulator()
    try:
        for batch in batches:
            peak = held_bytes(lambda batch=batch: sums.accumulate(batch), CPU).peak
        assert len(sums.state_dict()["sums"]["w"]["parts"]) == 16
        assert peak < 4 * 1000 * 512  # one float32 copy of the parameter would be as much
        measured = nmse(sums.get_accumulated()["w"], exact_sum(batches))
    finally:
        rounded_sum._cut.cache_clear()
    assert measured == pytest.approx(predicted(2, ternary.NMSES[1]), rel=0.15)


def test_the_acceptance_figure_and_what_is_allocated_agree() -> None:
    assert calculate_memory_savings(1_000_000, 10) > 0.9
    assert calculate_memory_savings(1_000_000, 10) == pytest.approx(0.990, abs=0.0005)
    assert calculate_memory_savings(1_000_000) == pytest.approx(0.897, abs=0.0005)  # against one sum in float32
    assert calculate_memory_savings(1_000_000, trits=1) > 0.94
    for trits in (1, 2, 3):
        sums = accumulator(trits=trits)
        sums.accumulate({"w": torch.ones(1000, 1000)})
        assert kept_bytes(sums) == sums.num_bytes
        assert sums.memory_savings() == calculate_memory_savings(1_000_000, trits=trits)
    assert calculate_memory_savings(100, 4) == 0.75  # small parameters are summed in float32


@given(
    shape=st.sampled_from([(), (7,), (2000,), (3, 5), (33, 32), (1, 1500), (1500, 1), (40, 4, 3, 3), (0, 9)]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    trits=st.integers(1, 3),
)
def test_every_shape_and_dtype_is_summed(shape: tuple[int, ...], dtype: torch.dtype, trits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [{"w": torch.randn(shape, generator=generator).to(dtype)} for _ in range(2)]
    sums = accumulator(trits=trits)
    for batch in batches:
        sums.accumulate(batch)
    total, truth = sums.get_accumulated()["w"], exact_sum(batches)
    assert total.dtype == torch.float32
    assert total.shape == shape
    if len(shape) < 2 or truth.numel() < 1024:
        torch.testing.assert_close(total.double(), truth, rtol=1e-6, atol=1e-6)
    else:
        assert nmse(total, truth) == pytest.approx(predicted(2, ternary.NMSES[trits - 1]), rel=0.35)


def test_a_sum_is_a_function_of_gradients_names_and_seed() -> None:
    batches = char_gradients(3)

    def total(seed: int, reverse: bool = False) -> Gradients:
        sums = accumulator(seed=seed)
        for batch in batches:
            sums.accumulate(dict(reversed(batch.items())) if reverse else batch)
        return sums.get_accumulated()

    same, other = total(1, reverse=True), total(2)
    for name, gradient in total(1).items():
        assert torch.equal(gradient, same[name])
        assert gradient.dim() < 2 or not torch.equal(gradient, other[name])


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs numba")
def test_backends_have_the_same_bits() -> None:
    batches = char_gradients(2)
    totals = []
    for backend in ("torch", "numba"):
        sums = TernaryGradientAccumulator(8, backend=backend)  # type: ignore[arg-type]
        for batch in batches:
            sums.accumulate(batch)
        totals.append(sums.get_accumulated())
    for name, gradient in totals[0].items():
        assert torch.equal(gradient, totals[1][name]), name


def test_keys_are_fresh_after_a_reset() -> None:
    batch = micro_batches(1)[0]
    sums, totals = accumulator(2), []
    for _ in range(2):
        sums.accumulate(batch)
        totals.append(sums.get_accumulated()["w"])
        sums.reset()
        assert sums.get_accumulated() == {}
        assert sums.num_bytes == sums.count == sums.memory_savings() == 0
    assert not torch.equal(*totals)


def test_it_counts_micro_batches() -> None:
    sums = accumulator(3)
    assert not sums.ready_for_update
    for count in (1, 2, 3, 4):
        sums.accumulate(micro_batches(1)[0])
        assert sums.count == count
        assert sums.ready_for_update == (count >= 3)
    assert repr(sums).startswith("TernaryGradientAccumulator(4 of 3 micro-batches, 1 parameters in ")


def test_gradients_are_not_written_to_and_may_be_missing() -> None:
    batches = char_gradients(3)
    before = {name: gradient.clone() for name, gradient in batches[0].items()}
    sums = accumulator()
    sums.accumulate({"head.weight": batches[0]["head.weight"]})
    sums.accumulate(batches[0])
    sums.accumulate({})
    for name, gradient in batches[0].items():
        assert torch.equal(gradient, before[name])
        times = 2 if name == "head.weight" else 1
        assert nmse(sums.get_accumulated()[name], times * gradient.double()) < 0.1
    assert sums.count == 3


def test_a_strided_gradient_is_summed_in_its_own_order() -> None:
    x = torch.randn(32, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    plain, strided = accumulator(), accumulator()
    plain.accumulate({"w": x})
    strided.accumulate({"w": x.to(memory_format=torch.channels_last)})
    target = x.to(memory_format=torch.channels_last).clone(memory_format=torch.preserve_format)
    strided.add_to({"w": target}, divisor=2)
    assert target.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(target, (plain.get_accumulated()["w"] + x) / 2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_its_own_parameter(bad: float) -> None:
    good = micro_batches(1)[0]["w"]
    spoiled = good.clone()
    spoiled[3, 5] = bad
    sums = accumulator()
    sums.accumulate({"good": good, "bad": spoiled})
    sums.accumulate({"good": good, "bad": good})
    total = sums.get_accumulated()
    assert total["good"].isfinite().all()
    assert not total["bad"].isfinite().all()


def test_a_saved_sum_goes_on_as_if_it_had_not_stopped() -> None:
    batches, file = char_gradients(4), io.BytesIO()
    whole = accumulator()
    for i, batch in enumerate(batches):
        whole.accumulate(batch)
        if i == 1:
            torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = accumulator()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for batch in batches[2:]:
        resumed.accumulate(batch)
    assert resumed.count == 4
    for name, gradient in whole.get_accumulated().items():
        assert torch.equal(gradient, resumed.get_accumulated()[name])


def test_a_sum_of_other_settings_is_refused_and_none_is_not() -> None:
    sums = accumulator()
    accumulator(trits=1).load_state_dict(sums.state_dict())
    sums.accumulate(micro_batches(1)[0])
    with pytest.raises(ValueError, match=r"made with .*'trits': 2.*, and this accumulator has .*'trits': 1"):
        accumulator(trits=1).load_state_dict(sums.state_dict())


def test_mistakes_are_named_and_nothing_is_added() -> None:
    sums = accumulator()
    sums.accumulate(micro_batches(1)[0])
    before = sums.get_accumulated()["w"]
    other = torch.zeros(128, 256)
    for wrong, message in (
        (torch.zeros(128, 255), r"gradient of v has shape \(128, 255\), and its sum \(128, 256\)"),
        (other.to_sparse(), "gradient of v is sparse; make its layer with sparse=False"),
        (other.to(torch.complex64), r"gradient of v must have real floats, got torch\.complex64"),
    ):
        sums._sums["v"] = sums._sums["w"]
        for call in (sums.accumulate, sums.add_to):
            with pytest.raises(ValueError, match=message):
                call({"w": other, "v": wrong})
    assert torch.equal(sums.get_accumulated()["w"], before)
    assert sums.count == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulation_steps": 0}, "accumulation_steps must be an int of at least 1, got 0"),
        ({"accumulation_steps": 2.0}, r"accumulation_steps must be an int of at least 1, got 2\.0"),
        ({"trits": 4}, "trits must be 1, 2 or 3 per element, got 4"),
        ({"seed": -1}, "seed must be in 0"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TernaryGradientAccumulator(**{"accumulation_steps": 8, **settings})  # type: ignore[arg-type]


def test_what_savings_are_asked_of_is_checked() -> None:
    with pytest.raises(ValueError, match="param_count must be an int of at least 1, got 0"):
        calculate_memory_savings(0, 1)
    with pytest.raises(ValueError, match="micro_batches must be an int of at least 1, got 0"):
        calculate_memory_savings(1, 0)
