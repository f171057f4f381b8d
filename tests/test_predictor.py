"""Predictions are what their formulas say, in the memory that they say, and are judged by what they have not seen."""

import io
import math
import re
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from vsa_ddp import GradientPredictor, PhaseConfig, PredictionQuality
from vsa_ddp.agreement import digest, fingerprint
from vsa_ddp.config import PredictorName

METHODS = get_args(PredictorName)
SHAPES = {"weight": (5, 7), "bias": (7,), "scale": ()}


def make(method: str = "linear", **settings: Any) -> GradientPredictor:
    parameters = {name: torch.zeros(shape, requires_grad=True) for name, shape in SHAPES.items()}
    return GradientPredictor(parameters.items(), PhaseConfig(predictor=method, **settings))  # type: ignore[arg-type]


def random_gradient(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def line(t: float) -> dict[str, Tensor]:
    start, slope = random_gradient(1), random_gradient(2)
    return {name: start[name] + 0.1 * t * slope[name] for name in SHAPES}


def combine(*terms: tuple[float, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(factor * g[name] for factor, g in terms) for name in SHAPES}  # type: ignore[misc]


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=rtol, atol=rtol)


def test_last_repeats_the_last_gradient_exactly() -> None:
    predictor = make("last")
    for seed in range(3):
        predictor.record_gradient(random_gradient(seed))
    for _ in range(4):
        for name, predicted in predictor.predict_gradient().items():
            assert torch.equal(predicted, random_gradient(2)[name])


def test_ema_is_the_decayed_mean() -> None:
    predictor = make("ema", decay=0.5)
    for seed in range(3):
        predictor.record_gradient(random_gradient(seed))
    expected = combine(*((w / 1.75, random_gradient(seed)) for seed, w in ((0, 0.25), (1, 0.5), (2, 1.0))))
    assert_same(predictor.predict_gradient(), expected)


def test_momentum_goes_on_with_a_damped_trend() -> None:
    predictor = make("momentum", damping=0.5)
    g0, g1 = random_gradient(0), random_gradient(1)
    predictor.record_gradient(g0)
    assert_same(predictor.predict_gradient(step=0), g0)  # no trend in one gradient
    predictor.record_gradient(g1)
    for trend in (0.5, 0.75, 0.875):
        assert_same(predictor.predict_gradient(), combine((1.0 + trend, g1), (-trend, g0)))


def test_momentum_divides_a_change_by_the_steps_that_it_took() -> None:
    predictor = make("momentum", damping=1.0)
    predictor.record_gradient(line(0), step=0)
    predictor.record_gradient(line(4), step=4)
    assert_same(predictor.predict_gradient(step=7), line(7))


@pytest.mark.parametrize("steps", [range(2), range(12), range(0, 300, 1), (0, 1, 2, 8, 9, 30)])
def test_linear_recovers_an_exact_line_at_any_steps(steps: Any) -> None:
    predictor = make("linear", decay=0.9)
    for step in steps:
        predictor.record_gradient(line(step), step=step)
    for ahead in (1, 2, 10):
        # float32 sums of hundreds of gradients around values of 30: a few units in the sixth place
        assert_same(predictor.predict_gradient(step=steps[-1] + ahead), line(steps[-1] + ahead), rtol=1e-3)


def test_linear_is_weighted_least_squares() -> None:
    predictor, decay, last = make("linear", decay=0.8), 0.8, 5
    seeds = (0, 1, 3, 4, 5)  # one step was skipped
    for seed in seeds:
        predictor.record_gradient(random_gradient(seed), step=seed)
    times = torch.tensor(seeds, dtype=torch.float64)
    root = (decay ** (last - times)).sqrt()[:, None]
    design = torch.stack([torch.ones_like(times), times], 1)
    targets = torch.stack([random_gradient(seed)["weight"].flatten().double() for seed in seeds])
    fit = torch.linalg.lstsq(root * design, root * targets).solution
    expected = (fit[0] + fit[1] * 8).view(5, 7).float()
    torch.testing.assert_close(predictor.predict_gradient(step=8)["weight"], expected, rtol=1e-4, atol=1e-4)


def test_predictions_follow_the_horizon() -> None:
    for method in ("momentum", "linear"):
        predictor = make(method)
        for step in range(4):
            predictor.record_gradient(line(step))
        first, second = predictor.predict_gradient(), predictor.predict_gradient()
        assert not torch.equal(first["weight"], second["weight"]), method


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("correction", [0.0, 0.5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_most_three_buffers_of_the_gradients_size(method: str, correction: float, dtype: Any) -> None:
    predictor = make(method, correction=correction, history_dtype=dtype)
    for seed in range(30):
        if seed > 2:
            predictor.compute_correction(random_gradient(seed))
        predictor.record_gradient(random_gradient(seed))
    stats = predictor.stats()
    gradient_bytes = sum(g.nbytes for g in random_gradient(0).values())
    assert stats.num_buffers == (1 if method in ("last", "ema") else 2) + (correction > 0) <= 3
    assert stats.buffer_bytes == stats.num_buffers * gradient_bytes // (2 if dtype == "bfloat16" else 1)
    kept = sum(t.nbytes for t in tensors_of(vars(predictor)))
    assert kept - stats.buffer_bytes <= gradient_bytes + 1024  # the parameters, which it does not own


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for v in values for tensor in tensors_of(v)]


@pytest.mark.parametrize("method", METHODS)
def test_history_in_bfloat16_is_close(method: str) -> None:
    exact, half = make(method), make(method, history_dtype="bfloat16")
    for seed in range(20):
        for predictor in (exact, half):
            predictor.record_gradient(line(seed))
    ours, theirs = exact.predict_gradient(), half.predict_gradient()
    error = sum((ours[n] - theirs[n]).square().sum() for n in ours) / sum(g.square().sum() for g in ours.values())
    assert error < 0.05  # 2**-9 per rounding, some 20 of which a sum remembers, and a slope amplifies


WIDE = {"weight": torch.zeros(64, 128), "bias": torch.zeros(7)}


def wide_gradient(seed: int) -> dict[str, Tensor]:
    """A direction and as much noise."""
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + seed)
    return {n: torch.randn(p.shape, generator=common) + torch.randn(p.shape, generator=own) for n, p in WIDE.items()}


@pytest.mark.parametrize(("method", "most"), [("last", 0.006), ("ema", 0.06), ("momentum", 0.015), ("linear", 0.35)])
def test_history_in_trits_is_unbiased_and_near(method: PredictorName, most: float) -> None:
    exact, rounded = (
        GradientPredictor(WIDE.items(), PhaseConfig(predictor=method, history_dtype=dtype, correction=0.1))
        for dtype in ("float32", "trits")
    )
    for seed in range(60):
        for predictor in (exact, rounded):
            if seed > 2:
                predictor.compute_correction(wide_gradient(seed))
            predictor.record_gradient(wide_gradient(seed))
    expected, found = (predictor.predict_gradient(step=62) for predictor in (exact, rounded))
    assert torch.equal(found["bias"], expected["bias"])  # too small for trits
    p, q = expected["weight"], found["weight"]
    energy = p.square().sum().item()
    assert 0 < (p - q).square().sum().item() < most * energy
    assert (p * q).sum().item() == pytest.approx(energy, rel=0.01)
    stats = rounded.stats()
    assert 8 * stats.buffer_bytes < 5.1 * stats.num_buffers * sum(p.numel() for p in WIDE.values())


@pytest.mark.parametrize("method", METHODS)
def test_a_history_in_trits_goes_on_where_it_was_saved(method: PredictorName) -> None:
    config = PhaseConfig(predictor=method, history_dtype="trits", correction=0.1)
    whole, resumed = GradientPredictor(WIDE.items(), config), GradientPredictor(WIDE.items(), config)
    new = structure(whole.state_dict())
    for seed in range(6):
        whole.record_gradient(wide_gradient(seed) if seed else {"bias": wide_gradient(0)["bias"]})
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert structure(saved) == new
    assert resumed.load_state_dict(saved)
    for predictor in (whole, resumed):
        predictor.compute_correction(wide_gradient(7), step=8)
        predictor.record_gradient(wide_gradient(7), step=8)
    expected = whole.predict_gradient(step=10)
    assert all(torch.equal(g, expected[n]) for n, g in resumed.predict_gradient(step=10).items())
    floats = GradientPredictor(WIDE.items(), PhaseConfig(predictor=method, correction=0.1))
    for state, other, kept in ((saved, floats, "in trits"), (floats.state_dict(), whole, "as floats")):
        with pytest.raises(ValueError, match=f"the saved history is kept {kept}, but history_dtype is"):
            other.load_state_dict(state)


def test_the_parameters_dtype_is_that_of_the_prediction() -> None:
    parameters = {"half": torch.zeros(4, dtype=torch.bfloat16), "double": torch.zeros(4, dtype=torch.float64)}
    predictor = GradientPredictor(parameters.items(), PhaseConfig())
    value = 1.0 + 2.0**-40
    for _ in range(3):
        predictor.record_gradient({n: torch.full_like(p, value) for n, p in parameters.items()})
    predicted = predictor.predict_gradient()
    assert {n: p.dtype for n, p in predicted.items()} == {n: p.dtype for n, p in parameters.items()}
    torch.testing.assert_close(predicted["double"], torch.full((4,), value, dtype=torch.float64), rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("method", METHODS)
def test_scaled_gradients_are_unscaled_in_the_history_and_scaled_in_predictions(method: str) -> None:
    plain, scaled = make(method, correction=0.5), make(method, correction=0.5)
    for seed in range(6):
        gradient = random_gradient(seed)
        big = {name: 1024 * g for name, g in gradient.items()}
        if seed > 3:
            torch.testing.assert_close(plain.compute_correction(gradient), scaled.compute_correction(big, scale=1024.0))
        plain.record_gradient(gradient)
        scaled.record_gradient(big, scale=1024.0)
    ours, theirs = plain.predict_gradient(), scaled.predict_gradient(scale=64.0)
    for name in SHAPES:
        assert torch.equal(64 * ours[name], theirs[name])


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_that_is_not_finite_leaves_no_trace(method: str, value: float) -> None:
    clean, hit = make(method, correction=0.5), make(method, correction=0.5)
    for seed in range(6):
        if seed == 4:
            bad = random_gradient(9)
            bad["weight"][2, 3] = value
            hit.compute_correction(bad, step=seed)
            assert not hit.record_gradient(bad, step=seed)
            continue
        for predictor in (clean, hit):
            if seed > 2:
                predictor.compute_correction(random_gradient(seed), step=seed)
            assert predictor.record_gradient(random_gradient(seed), step=seed)
    ours, theirs = clean.predict_gradient(step=6), hit.predict_gradient(step=6)
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)


def test_parameters_without_a_gradient_are_not_predicted() -> None:
    predictor = make("ema")
    both = random_gradient(0)
    predictor.record_gradient(both)
    predictor.record_gradient({"weight": both["weight"]})
    assert predictor.predict_gradient(step=2).keys() == {"weight"}
    predictor.record_gradient(both, step=2)  # `bias` had none in between: that counts as zero
    decay = predictor.config.decay
    share = (1 + decay**2) / (1 + decay + decay**2)
    torch.testing.assert_close(predictor.predict_gradient()["bias"], share * both["bias"])


# Quality


def test_quality_is_that_of_the_definition() -> None:
    predictor = make("last")
    p, g = random_gradient(0), random_gradient(1)
    predictor.record_gradient(p)
    quality = PredictionQuality.of(predictor.compute_correction(g).tolist())
    flat_p, flat_g = (torch.cat([x[n].flatten() for n in SHAPES]) for x in (p, g))
    assert quality.cosine == pytest.approx(torch.cosine_similarity(flat_p, flat_g, dim=0).item(), abs=1e-5)
    error = (flat_g - flat_p).square().sum() / flat_g.square().sum()
    assert quality.explained == pytest.approx(1 - error.item(), abs=1e-5)
    each = predictor.quality_by_parameter()
    assert each.keys() == SHAPES.keys()
    cosine = torch.cosine_similarity(p["bias"], g["bias"], dim=0).item()
    assert each["bias"].cosine == pytest.approx(cosine, abs=1e-5)
    assert predictor.quality == quality
    assert quality.slope == pytest.approx((flat_g @ flat_p / (flat_p @ flat_p)).item(), abs=1e-5)


@pytest.mark.parametrize(
    ("moments", "expected"),
    [
        ((4.0, 4.0, 4.0), (1.0, 1.0, 1.0)),
        ((4.0, 0.0, 0.0), (0.0, math.nan, math.nan)),
        ((1.0, -1.0, 1.0), (-3.0, -1.0, -1.0)),
        ((4.0, 1.0, 1.0), (0.25, 0.5, 1.0)),
    ],
)
def test_quality_of_extreme_predictions(moments: tuple[float, ...], expected: tuple[float, ...]) -> None:
    assert PredictionQuality.of(moments) == pytest.approx(expected, nan_ok=True)
    assert math.isnan(PredictionQuality.of((0.0, 0.0, 1.0)).explained)


def test_the_gradients_own_noise_does_not_change_the_slope() -> None:
    predictor, slopes, explained = make("last"), [], []
    predictor.record_gradient(random_gradient(0))
    for seed in range(1, 400):
        quality = PredictionQuality.of(
            predictor.compute_correction(
                combine((1.0, random_gradient(0)), (1.5, random_gradient(seed))), step=1
            ).tolist()
        )
        slopes.append(quality.slope)
        explained.append(quality.explained)
    assert sum(slopes) / len(slopes) == pytest.approx(1.0, abs=0.05)  # 1.5 / sqrt(43 elements) / sqrt(399) is 0.011
    assert sum(explained) / len(explained) < 0.5


def test_a_comparison_does_not_see_the_gradient_that_it_judges() -> None:
    predictor = make("last")
    predictor.record_gradient(random_gradient(0))
    for seed in range(1, 6):
        quality = PredictionQuality.of(predictor.compute_correction(random_gradient(seed)).tolist())
        assert abs(quality.cosine) < 0.6  # of independent gradients; a comparison afterwards would say 1
        predictor.record_gradient(random_gradient(seed))


def test_corrections_take_a_constant_error_away() -> None:
    predictor = make("last", correction=1.0, decay=0.5)
    drift = random_gradient(5)
    errors = []
    for t in range(12):
        gradient = {name: t * drift[name] for name in SHAPES}
        if t:
            errors.append(1 - PredictionQuality.of(predictor.compute_correction(gradient).tolist()).explained)
        predictor.record_gradient(gradient)
    assert errors[-1] < 1e-4 * errors[0]


def test_a_full_gradient_is_wanted_for_lack_of_history_age_and_quality() -> None:
    predictor = make("momentum", predict_steps=3)
    for seed in range(2):
        assert predictor.should_compute_full()
        predictor.record_gradient(line(seed))
    wanted = []
    for _ in range(4):
        wanted.append(predictor.should_compute_full())
        predictor.predict_gradient()
    assert wanted == [False, False, False, True]
    predictor.compute_correction({n: -g for n, g in line(6).items()})
    predictor.record_gradient(line(6))
    assert predictor.should_compute_full()
    predictor.compute_correction(line(7))
    predictor.record_gradient(line(7))
    assert not predictor.should_compute_full()
    assert (predictor.total_steps, predictor.stats().num_recorded, predictor.stats().horizon) == (8, 4, 1)
    predictor.reset()
    assert predictor.should_compute_full()


# State


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_predictor_goes_on_where_it_was_saved(method: str, dtype: Any) -> None:
    whole = make(method, correction=0.3, history_dtype=dtype)
    for seed in range(10):
        if seed > 3:
            whole.compute_correction(random_gradient(seed))
        if seed == 6:
            file = io.BytesIO()
            torch.save(whole.state_dict(), file)
            file.seek(0)
            resumed = make(method, correction=0.3, history_dtype=dtype)
            resumed.load_state_dict(torch.load(file, weights_only=True))
        for predictor in (whole,) if seed < 6 else (whole, resumed):
            if seed > 6 and predictor is resumed:
                predictor.compute_correction(random_gradient(seed))
            predictor.record_gradient(random_gradient(seed))
    ours, theirs = whole.predict_gradient(), resumed.predict_gradient()
    assert digest(fingerprint(ours.values())) == digest(fingerprint(theirs.values()))
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "trits"])
def test_a_saved_correction_need_not_be_that_of_now(method: str, dtype: Any) -> None:
    for before, now in ((0.5, 0.0), (0.0, 0.5)):
        predictor, other = (make(method, correction=share, history_dtype=dtype) for share in (before, now))
        for seed in range(3):
            if seed:
                predictor.compute_correction(random_gradient(seed))
            predictor.record_gradient(random_gradient(seed))
            other.record_gradient(random_gradient(seed))
        resumed = make(method, correction=now, history_dtype=dtype)
        assert resumed.load_state_dict(predictor.state_dict())
        assert_same(resumed.predict_gradient(step=4), other.predict_gradient(step=4))  # no residual yet
        resumed.compute_correction(random_gradient(5), step=5)


def structure(value: Any) -> Any:
    """What torch.distributed.checkpoint goes by: keys, shapes and dtypes. All else is one value, whatever it holds."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, dict):
        return {name: structure(v) for name, v in value.items()}
    return [structure(v) for v in value] if isinstance(value, list) and tensors_of(value) else None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("correction", [0.0, 0.5])
def test_a_states_structure_is_that_of_a_new_predictor(method: str, correction: float) -> None:
    predictor = make(method, correction=correction, history_dtype="bfloat16")
    new = structure(predictor.state_dict())
    assert new["sums"][method][-1] == {name: (torch.Size(shape), torch.bfloat16) for name, shape in SHAPES.items()}
    assert len(new["residual"]) == (len(SHAPES) if correction else 0)
    predictor.record_gradient({"weight": random_gradient(0)["weight"]})
    assert structure(predictor.state_dict()) == new
    predictor.compute_correction(random_gradient(1))
    predictor.record_gradient(random_gradient(1))
    assert structure(predictor.state_dict()) == new


def test_a_new_predictors_state_is_that_of_an_empty_history() -> None:
    predictor = make(correction=0.5)
    predictor.record_gradient(random_gradient(0))
    predictor.load_state_dict(make(correction=0.5).state_dict())
    assert predictor.stats() == make(correction=0.5).stats()
    assert predictor.stats().buffer_bytes == 0


LINEAR = "the saved history is that of predictor 'linear', but the setting is"
PARAMETERS = "the saved history belongs to other parameters:"


@pytest.mark.parametrize(
    ("method", "shapes", "text"),
    [
        ("ema", SHAPES, f"{LINEAR} 'ema'"),
        ("momentum", SHAPES, f"{LINEAR} 'momentum'"),
        ("linear", SHAPES | {"weight": (5, 8)}, f"{PARAMETERS} weight is (5, 7) there and (5, 8) here"),
        ("linear", {"weight": (5, 7), "scale": ()}, f"{PARAMETERS} bias is (7,) there and absent here"),
        ("linear", SHAPES | {"more": (2,)}, f"{PARAMETERS} more is absent there and (2,) here"),
    ],
)
def test_a_history_of_others_is_refused_or_left_out(
    method: Any, shapes: dict[str, tuple[int, ...]], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    predictor = make("linear")
    predictor.record_gradient(random_gradient(0))
    saved = predictor.state_dict()
    parameters = {name: torch.zeros(shape) for name, shape in shapes.items()}
    other = GradientPredictor(parameters.items(), PhaseConfig(predictor=method))
    other.record_gradient(parameters)
    with pytest.raises(ValueError, match=re.escape(f"{text}; strict=False leaves the history out.")):
        other.load_state_dict(saved)
    assert other.num_recorded == 1
    assert not other.load_state_dict(saved, strict=False)
    assert caplog.messages == [f"{text}: the history begins anew"]
    assert other.num_recorded == other.total_steps == other.stats().buffer_bytes == 0
    assert make("linear").load_state_dict(saved, strict=False)


def test_sparse_and_complex_gradients_are_refused() -> None:
    predictor = make()
    sparse = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (7,), check_invariants=True)
    with pytest.raises(TypeError, match="the gradient of bias is sparse"):
        predictor.record_gradient({"bias": sparse})
    with pytest.raises(TypeError, match=r"bias is torch\.complex64"):
        predictor.record_gradient({"bias": torch.ones(7, dtype=torch.complex64)})


def test_without_a_history_zeros_are_predicted_and_nothing_is_compared() -> None:
    parameters = {"half": torch.ones(4, dtype=torch.bfloat16), "single": torch.ones(3, 2)}
    predictor = GradientPredictor(parameters.items())
    assert not predictor.record_gradient({"half": torch.full((4,), math.inf, dtype=torch.bfloat16)})
    predicted = predictor.predict_gradient(scale=2.0)
    assert all(torch.equal(predicted[n], p - 1) and predicted[n].dtype == p.dtype for n, p in parameters.items())
    with pytest.raises(ValueError, match="no gradient to predict from"):
        predictor.compute_correction(parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fingerprint_is_that_of_the_bits(dtype: torch.dtype) -> None:
    t = torch.randn(64, 33).to(dtype)
    same = digest(fingerprint([t, t]))
    assert digest(fingerprint([t.t().contiguous().t(), t.clone()])) == same
    other = t.clone()
    other[3, 3] = torch.nextafter(other[3, 3].float(), torch.tensor(9.0)).to(dtype) if dtype != torch.bfloat16 else 9.0
    if dtype == torch.float64:
        other[3, 3] = torch.nextafter(t[3, 3], torch.tensor(9.0, dtype=dtype))
    assert digest(fingerprint([t, other])) != same
    assert digest(fingerprint([])) == digest(fingerprint([]))
