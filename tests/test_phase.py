"""The schedule: counts, lengths, and nothing decided from anything but what it is told."""

import itertools
import json
import logging
import math
import random
from typing import Any

import pytest

from vsa_ddp import Phase, PhaseConfig, PhaseSchedule
from vsa_ddp.phase import MAX_PROBE_WAIT, TREND_STEPS, Measured, StepInfo, trend

DETERMINISTIC: dict[str, Any] = {"adapt": "none"}
CYCLE: dict[str, Any] = {"warmup_steps": 0, "full_steps": 10, "predict_steps": 40, "correct_every": 10}


def measured(info: StepInfo, slope: float, loss: float | None = None) -> Measured:
    """A noisy gradient, of which the prediction has the right direction, and so much too long."""
    moments = (10.0, slope, 1.0) if info.measures else None
    return Measured(loss, moments=moments, horizon=info.horizon, judges=info.judges)


def walk(schedule: PhaseSchedule, steps: int, slope: float = 0.0, loss: float | None = None) -> str:
    """First letters of the phases."""
    letters = ""
    for _ in range(steps):
        info = schedule.begin_step()
        letters += info.phase.value[0]
        schedule.end_step(measured(info, slope, loss))
    return letters


def test_the_deterministic_schedule_has_its_counts() -> None:
    schedule = PhaseSchedule(PhaseConfig(**DETERMINISTIC))
    assert walk(schedule, 36) == "w" * 10 + "fffff" + "pppppc" * 3 + "ppc"
    walk(schedule, 64)
    assert (schedule.backwards, schedule.total_step) == (43, 100)
    assert round(schedule.speedup, 2) == 2.33
    before = schedule.backwards
    walk(schedule, 26 * 100)
    assert schedule.backwards - before == 900


def test_the_default_cycle_has_51_steps_and_14_backward_passes() -> None:
    schedule = PhaseSchedule(PhaseConfig(**CYCLE, adapt="none"))
    cycle = walk(schedule, 51)
    assert cycle == "f" * 10 + ("p" * 10 + "c") * 3 + "p" * 7 + "c"
    assert schedule.backwards == 14
    assert walk(schedule, 51) == cycle
    assert schedule.cycle_count == 1
    assert schedule.begin_step().cycle == 2


def test_one_full_step_and_three_predicted_are_a_speedup_of_4() -> None:
    schedule = PhaseSchedule(PhaseConfig(warmup_steps=0, full_steps=1, predict_steps=3, predictor="last", adapt="none"))
    assert walk(schedule, 4) == "fppp"
    assert schedule.speedup == 4.0


@pytest.mark.parametrize("adapt", ["gate", "trend", "none"])
def test_no_predicted_steps_is_plain_training(adapt: Any) -> None:
    schedule = PhaseSchedule(PhaseConfig(predict_steps=0, adapt=adapt))
    assert walk(schedule, 60, 1.0, 1.0) == "w" * 10 + "f" * 50
    assert schedule.speedup == 1.0


@pytest.mark.parametrize(
    ("predict_steps", "correct_every", "section"),
    [
        (6, 5, "pppppc"),
        (5, 5, "pppppc"),
        (7, 5, "pppppcpc"),
        (1, 1, "pc"),
        (2, 1, "pc"),
        (3, 1, "pcpc"),
        (4, 9, "ppppc"),
    ],
)
def test_a_section_is_closed_by_exactly_one_correction(predict_steps: int, correct_every: int, section: str) -> None:
    config = PhaseConfig(
        warmup_steps=0, full_steps=2, predict_steps=predict_steps, correct_every=correct_every, adapt="none"
    )
    assert walk(PhaseSchedule(config), 2 * (2 + len(section))) == ("ff" + section) * 2


def test_what_a_step_is_told() -> None:
    schedule = PhaseSchedule(PhaseConfig(warmup_steps=1, full_steps=2, predict_steps=3, correct_every=2, adapt="none"))
    infos = []
    for _ in range(9):
        infos.append(schedule.begin_step())
        assert schedule.begin_step() == infos[-1]
        schedule.end_step()
    assert "".join(i.phase.value[0] for i in infos) == "wffppcff" + "p"
    assert [i.total_step for i in infos] == list(range(9))
    assert [i.phase_step for i in infos] == [0, 0, 1, 0, 1, 0, 0, 1, 0]
    assert [i.phase_changed for i in infos] == [True, True, False, True, False, True, True, False, True]
    assert [i.cycle for i in infos] == [0] * 6 + [1] * 3
    assert [i.horizon for i in infos] == [1, 1, 1, 1, 2, 3, 1, 1, 1]
    assert [i.measures for i in infos] == [i.phase is Phase.CORRECT for i in infos]
    assert [i.records for i in infos] == [i.phase is not Phase.PREDICT for i in infos]


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"correct_every": 0}, "correct_every must be at least 1, got 0; predict_steps or more means one correction"),
        ({"full_steps": 0}, "full_steps must be at least 1, got 0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"predict_steps": 2.5}, r"predict_steps must be an int, got 2\.5"),
        ({"predict_steps": True}, "predict_steps must be an int, got True"),
        ({"decay": 1.5}, r"decay must be a number in \[0, 1\], got 1\.5"),
        ({"decay": 0.0}, 'decay must be greater than 0.*predictor="last"'),
        ({"damping": math.nan}, "damping must be a number"),
        ({"correction": "half"}, "correction must be a number in .* got 'half'"),
        ({"min_slope": -0.5}, r"min_slope must be a number of at least 0, got -0\.5; adapt=\"none\""),
        ({"min_slope": math.nan}, "min_slope must be a number"),
        ({"roll_back": 1}, "roll_back must be True or False, got 1"),
        ({"predictor": "oracle"}, "predictor must be one of last, ema, momentum, linear, got 'oracle'"),
        ({"adapt": True}, "adapt must be one of gate, trend, none, got True"),
        ({"history_dtype": "int8"}, "history_dtype must be one of float32, bfloat16, trits, got 'int8'"),
    ],
)
def test_impossible_settings_are_named(setting: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        PhaseConfig(**setting)


# The gate


def test_the_gate_opens_after_a_probe_and_grows_while_prediction_pays() -> None:
    schedule = PhaseSchedule(PhaseConfig())
    letters = walk(schedule, 80, slope=0.9)
    lengths = [len(list(run)) for is_section, run in itertools.groupby(letters, lambda c: c in "pc") if is_section]
    assert letters.startswith("w" * 10 + "fffff" + "pc" + "fffff" + "ppc" + "fffff" + "ppppc")
    assert lengths == [2, 3, 5, 9, 21]  # the deterministic section, at last
    assert schedule.predict_steps == 20


def test_a_gate_that_finds_nothing_stays_shut_and_probes_ever_more_rarely() -> None:
    schedule = PhaseSchedule(PhaseConfig())
    probes = []
    for step in range(2000):
        info = schedule.begin_step()
        assert info.phase in (Phase.WARMUP, Phase.FULL)
        assert info.records or not info.measures
        if info.judges:
            probes.append(step)
        schedule.end_step(measured(info, 0.1, 1.0))
    gaps = [b - a for a, b in itertools.pairwise(probes)]
    assert gaps == sorted(gaps)
    assert gaps[-1] == MAX_PROBE_WAIT * 5
    assert len(probes) < 20


def test_a_shut_gate_records_only_what_its_probes_need() -> None:
    schedule = PhaseSchedule(PhaseConfig())
    recorded = 0
    for _ in range(2000):
        info = schedule.begin_step()
        recorded += info.records
        schedule.end_step(measured(info, 0.1, 1.0))
    assert recorded < 2000 * 0.15


def next_verdict(schedule: PhaseSchedule, slope: float) -> int:
    """The length after the gate has judged again."""
    while not (info := schedule.begin_step()).judges:
        schedule.end_step()
    schedule.end_step(measured(info, slope, 1.0))
    return schedule.predict_steps


def test_the_gate_shuts_by_halves_and_opens_again() -> None:
    schedule = PhaseSchedule(PhaseConfig())
    walk(schedule, 120, slope=0.9)
    assert [next_verdict(schedule, 0.1) for _ in range(8)] == [20, 10, 5, 2, 1, 0, 0, 0]  # 0.9 is not forgotten at once
    assert "p" in walk(schedule, 400, slope=0.9)


@pytest.mark.parametrize("slope", [-20.0, math.nan])
def test_the_gate_shuts_at_once_where_gradients_turn_against_predictions(slope: float) -> None:
    schedule = PhaseSchedule(PhaseConfig())
    walk(schedule, 120, slope=0.9)
    assert next_verdict(schedule, slope) == 0
    assert "p" in walk(schedule, 400, slope=0.9)


def test_the_gate_does_not_ask_how_noisy_the_gradient_is() -> None:
    for energy in (1.0, 1e6):
        schedule = PhaseSchedule(PhaseConfig())
        for _ in range(100):
            info = schedule.begin_step()
            schedule.end_step(measured(info, 0.9)._replace(moments=(energy, 0.9, 1.0) if info.measures else None))
        assert schedule.predict_steps == 20


def test_a_rising_loss_shuts_the_gate_whatever_is_explained() -> None:
    schedule = PhaseSchedule(PhaseConfig())
    walk(schedule, 120, slope=0.9, loss=1.0)
    assert schedule.predict_steps == 20
    loss = 1.0
    for _ in range(100):
        info, loss = schedule.begin_step(), loss * 1.05
        schedule.end_step(measured(info, 0.9, loss))
    assert schedule.predict_steps == 0


def test_the_gate_says_what_it_does(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vsa_ddp.phase"):
        walk(PhaseSchedule(PhaseConfig()), 20, slope=0.9)
    assert caplog.messages == [
        "step 9: gradients go 0.90 of what is predicted 1 ahead: 0 -> 1 predicted steps",
        "step 17: gradients go 0.90 of what is predicted 2 ahead: 1 -> 2 predicted steps",
    ]


# Lengths by the loss


@pytest.mark.parametrize("shift", [0.0, -1.5, -100.0])
@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_a_trend_is_right_for_any_sign_of_the_loss(shift: float, size: float) -> None:
    falling = [size * (1.0 - i / TREND_STEPS + shift) for i in range(TREND_STEPS)]
    assert trend(falling) < 0 < trend(falling[::-1])
    assert trend([-x for x in falling]) > 0
    assert trend([size] * TREND_STEPS) == 0.0
    assert trend(falling[1:]) == 0.0  # too few


def test_a_trend_of_positive_losses_is_the_quotient_of_means() -> None:
    losses = [2.0] * (TREND_STEPS // 2) + [1.0] * (TREND_STEPS // 2)
    assert trend(losses) == pytest.approx(-0.5)
    assert trend([-x for x in losses]) == pytest.approx(0.5)
    assert trend([0.0] * TREND_STEPS) == 0.0


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("direction", "lengths"), [(1.0, (15, 30)), (-1.0, (8, 45)), (0.0, (10, 40))])
def test_lengths_follow_the_loss(sign: float, direction: float, lengths: tuple[int, int]) -> None:
    schedule = PhaseSchedule(PhaseConfig(**CYCLE, adapt="trend"))
    for step in range(52):
        schedule.end_step(Measured(sign * 10.0 + direction * step))
    assert (schedule.full_steps, schedule.predict_steps) == lengths


def test_lengths_that_follow_the_loss_keep_their_bounds() -> None:
    for direction, bounds in ((1.1, (50, 10)), (0.9, (1, 80))):
        schedule = PhaseSchedule(PhaseConfig(**CYCLE, adapt="trend"))
        loss = 1.0
        for _ in range(2000):
            loss = min(max(loss * direction, 1e-200), 1e200)
            schedule.end_step(Measured(loss))
            if (schedule.full_steps, schedule.predict_steps) == bounds:
                break
        assert (schedule.full_steps, schedule.predict_steps) == bounds


# What it takes back


def to_a_correction(**settings: Any) -> PhaseSchedule:
    """A schedule whose gate has opened, and whose correction is done but not heard of."""
    schedule = PhaseSchedule(PhaseConfig(warmup_steps=4, full_steps=3, **settings))
    late: Measured | None = None
    while True:
        info = schedule.begin_step()
        assert schedule.end_step(late) is None
        late = measured(info, 1.0, 2.0)
        if info.phase is Phase.CORRECT:
            return schedule


@pytest.mark.parametrize(
    ("slope", "loss", "verdict"),
    [
        (1.0, 2.0, "keep"),
        (1.0, 9.0, "keep"),
        (-1.0, 2.0, "keep"),
        (-1.0, 1.0, "keep"),
        (-1.0, 2.19, "keep"),
        (-1.0, 2.21, "undo"),
        (0.0, 2.21, "undo"),
        (-1.0, None, "undo"),
        (math.nan, 2.21, "undo"),
        (math.nan, None, "undo"),
    ],
)
def test_a_section_is_undone_if_gradients_turned_and_the_loss_rose(
    slope: float, loss: float | None, verdict: str
) -> None:
    schedule = to_a_correction()
    said = Measured(loss, moments=(10.0, slope, 1.0), horizon=2, judges=True)
    assert schedule.end_step(said) == verdict
    assert schedule.stats(0, {}).undone == (verdict == "undo")
    if verdict == "undo":
        assert schedule.predict_steps == 0
        assert schedule.loss == 2.0  # before the section
        assert walk(schedule, 6, slope=1.0, loss=2.0) == "ffffpc"  # the history begins anew, and the gate asks again


@pytest.mark.parametrize(("slope", "opens"), [(0.4, False), (0.6, True), (1.4, True), (1.6, False), (9.0, False)])
def test_the_gate_asks_that_gradients_go_on_as_predicted(slope: float, opens: bool) -> None:
    assert ("p" in walk(PhaseSchedule(PhaseConfig()), 100, slope=slope, loss=1.0)) is opens


def test_nothing_is_undone_without_something_to_go_back_to() -> None:
    schedule = to_a_correction()
    schedule.forget_start()  # as when a state is loaded without it
    assert schedule.end_step(Measured(9.0, moments=(10.0, -1.0, 1.0), horizon=2, judges=True)) is None
    assert schedule.predict_steps == 0


def test_nothing_is_undone_where_that_is_not_asked_for() -> None:
    turned = Measured(9.0, moments=(10.0, -1.0, 1.0), horizon=2, judges=True)
    assert to_a_correction(roll_back=False).end_step(turned) is None
    for adapt in ("trend", "none"):
        schedule = PhaseSchedule(PhaseConfig(adapt=adapt))  # type: ignore[arg-type]
        assert not any(schedule.begin_step().keeps or schedule.end_step(turned) for _ in range(100))


def test_a_section_keeps_where_it_began() -> None:
    schedule = PhaseSchedule(PhaseConfig(warmup_steps=4, full_steps=3, correct_every=2))
    letters = ""
    for _ in range(80):
        info = schedule.begin_step()
        letters += info.phase.value[0].upper() if info.keeps else info.phase.value[0]
        schedule.end_step(measured(info, 1.0, 2.0))
    assert letters.count("fP") == letters.count("P") > 3
    assert "fp" not in letters
    assert "ppcpp" in letters  # a section with several corrections


# What it needs and keeps


def test_gradients_that_were_rejected_are_made_up_for() -> None:
    schedule = PhaseSchedule(
        PhaseConfig(warmup_steps=0, full_steps=2, predict_steps=3, adapt="none", predictor="linear")
    )
    letters = ""
    for step in range(8):
        letters += schedule.begin_step().phase.value[0]
        schedule.end_step(Measured(rejected=step < 2))
    assert letters == "ffffpppc"


def test_errors_are_averaged_by_horizon() -> None:
    schedule = PhaseSchedule(PhaseConfig(adapt="none"))
    for explained, horizon in ((0.5, 6), (0.7, 6), (0.2, 3), (math.nan, 3)):
        schedule.end_step(Measured(1.0, moments=(1.0, (explained + 1.0) / 2, 1.0), horizon=horizon))
    assert schedule.error_by_horizon() == pytest.approx({3: 0.8, 6: 0.4})


@pytest.mark.parametrize("settings", [{}, DETERMINISTIC, {**CYCLE, "adapt": "trend"}, {"full_steps": 1}])
def test_a_schedule_goes_on_where_it_was_saved(settings: dict[str, Any]) -> None:
    config = PhaseConfig(**settings)
    whole = PhaseSchedule(config)
    told = random.Random(0)
    for step in range(400):
        if step % 7 == 0:
            resumed = PhaseSchedule(config)
            resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
        info = whole.begin_step()
        assert resumed.begin_step() == info
        said = measured(info, told.random() * 1.5 - 0.1, told.gauss(1.0, 0.5))._replace(rejected=told.random() < 0.05)
        for schedule in (whole, resumed):
            schedule.end_step(said)
    assert whole.state_dict() == resumed.state_dict()


def test_a_saved_schedule_does_not_change_with_the_run() -> None:
    schedule = PhaseSchedule(PhaseConfig())
    walk(schedule, 30, 0.9, 1.0)
    saved = schedule.state_dict()
    text = json.dumps(saved)
    walk(schedule, 30, 0.9, 2.0)
    assert json.dumps(saved) == text
    other = PhaseSchedule(PhaseConfig())
    other.load_state_dict(saved)
    walk(other, 30, 0.9, 2.0)
    assert json.dumps(saved) == text
