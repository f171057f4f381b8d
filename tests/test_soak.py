"""A short soak test; and the long one would see what it looks for, and repeats itself."""

import itertools
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import soak
from tests.soak import Group, SoakError, Watch, fitted_rise, main, run_soak
from tests.soak_plan import FAULTS, Life, Soak, lives, plan
from tests.soak_rank import Observed

SHORT = Soak(
    seed=7645,
    steps=70,
    ranks=3,
    timeout=20.0,
    life_steps=8,
    checkpoint_every=8,
    measure_every=1,
    intensity=5.0,
    crashes=("raise", "kill"),
)
"""Four lives, by each wire; the last has phases, begins where a crash was and repeats seven steps."""
STEADY = Soak(intensity=0.0)
LIFE = Life(
    number=0,
    start=0,
    end=1000,
    crash=None,
    crash_rank=0,
    crash_parameter="net.scale",
    world_size=2,
    settings={"wire": "all_gather"},
    find_unused=False,
    adapt=None,
)


def test_a_short_soak_finds_nothing() -> None:
    found = run_soak(SHORT)
    assert all(count > 0 for count in found["faults"].values()), found["faults"]
    assert set(found["ends"]) == {"raise", "kill", "told to stop"}
    assert found["taken"] == sum(life.end - life.start for life in lives(SHORT))
    assert found["taken again"] == 7
    assert 0 < found["skipped"] < found["taken"] / 2
    assert 0 < found["predicted"] < found["taken"] / 2
    assert max(found["seconds to end after"].values()) < SHORT.timeout


def drawn(run: Soak, life: Life, number: int) -> dict[str, Any]:
    step = vars(plan(run, life, number))
    return {**step, "spoils": [(spoil.rank, spoil.parameter) for spoil in step["spoils"]]}


def test_a_seed_decides_all_that_happens() -> None:
    first, other, longer = (list(lives(s)) for s in (Soak(), Soak(seed=1), Soak(steps=30_000)))
    assert first == list(lives(Soak()))
    assert first != other
    assert first[:-1] == longer[: len(first) - 1]
    for life in first:
        numbers = range(life.start, life.start + 30)
        assert [drawn(Soak(), life, n) for n in numbers] == [drawn(Soak(), life, n) for n in numbers]
        assert [drawn(Soak(), life, n) for n in numbers] != [drawn(Soak(seed=1), life, n) for n in numbers]


def test_lives_follow_each_other_and_all_kinds_come_about() -> None:
    found = list(lives(Soak()))
    assert found[0].start == 0
    assert found[-1].end == Soak.steps
    for life, following in itertools.pairwise(found):
        lost = life.end - following.start
        assert 0 <= lost < Soak.checkpoint_every if life.crash else lost == 0
    assert {life.crash for life in found} == {None, "raise", "kill", "stall"}
    assert {life.world_size for life in found} == {2, 3, 4}
    assert {life.settings["wire"] for life in found} == {"all_gather", "all_reduce", "two_shot"}
    assert {name for life in found for name in life.settings} == {"wire", "ranks_per_node", "bundle", "sparsity"}
    faults = (plan(Soak(), life, life.start + n).faults for life in found for n in range(100))
    assert set(itertools.chain(*faults)) == set(FAULTS)


def seen(number: int, **changes: Any) -> Observed:
    """A step in which nothing is wrong, but for the changes."""
    good = Observed(
        step=number,
        loss=1.0,
        digest=f"after {number}",
        finite=True,
        skipped=False,
        predicted=False,
        hook_step=number + 1,
        backwards=number + 1,
        wire_bytes=100 * (number + 1),
        usage=None,
    )
    return good._replace(**changes)


def watched(num_steps: int = 3) -> Watch:
    """Has seen some good steps."""
    watch = Watch(STEADY)
    watch.begin(LIFE)
    for number in range(num_steps):
        see_all(watch, number, {}, {})
    return watch


def see_all(watch: Watch, number: int, *changes: dict[str, Any]) -> None:
    """Of one rank each."""
    for rank, change in enumerate(changes):
        watch.see(rank, seen(number, **change))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{}, {"digest": "another"}], r"parameters differ between ranks: \['after 3', 'another'\]"),
        ([{}, {"finite": False}], r"parameters of rank 1 are not finite"),
        ([{}, {"hook_step": 3}], r"state\.step of rank 1 is 3 after 4 backward passes"),
        ([{}, {"wire_bytes": 300}], r"wire_bytes of rank 1 were 300 and are 300, backward passes 3 and 4"),
        ([{}, {"predicted": True}], r"only some ranks predicted: \[False, True\]"),
        ([{"skipped": True}] * 2, r"nothing was wrong, and the optimizer made no step"),
        ([{"loss": float("nan")}] * 2, r"the loss was nan and is nan"),
    ],
)
def test_what_is_wrong_is_named_with_step_and_seed(changes: list[dict[str, Any]], message: str) -> None:
    watch = watched()
    with pytest.raises(
        SoakError, match=rf"^step 3 \(no fault; life 0: wire=all_gather, 2 ranks\): {message}\. Seed 0\.$"
    ):
        see_all(watch, 3, *changes)


def test_a_loss_that_rises_is_found() -> None:
    watch = watched(num_steps=100)
    for number in range(100, 122):
        see_all(watch, number, {"loss": 1.9}, {"loss": 1.9})
    with pytest.raises(SoakError, match=r"step 122 .*: the loss was 1 and is 1\.21"):
        see_all(watch, 122, {"loss": 1.9}, {"loss": 1.9})


def test_an_optimizer_step_that_should_not_have_been_made_is_found() -> None:
    number = next(n for n in range(1000) if plan(Soak(), LIFE, n).overflows)
    watch = Watch(Soak())
    watch.begin(LIFE)
    watch.see(0, seen(number))
    with pytest.raises(SoakError, match=r"\((.*, )?(nan|inf)(, .*)?; life 0: .*a gradient was not finite"):
        watch.see(1, seen(number))


@pytest.mark.parametrize("change", [{}, {"find_unused": True}])
def test_other_bits_after_a_crash_are_found_in_the_same_setting(change: dict[str, Any]) -> None:
    watch = watched()
    watch.begin(replace(LIFE, number=1, start=2, **change))
    watch.see(0, seen(2, digest="another"))
    with nullcontext() if change else pytest.raises(SoakError, match=r"step 2 .* has other bits than before it"):
        watch.see(1, seen(2, digest="another"))


@pytest.mark.parametrize(
    ("name", "rise", "is_found"),
    [
        ("resident KiB", lambda step: step, True),
        ("resident KiB", lambda step: step // 10, False),
        ("objects", lambda step: step // 10, True),
        ("objects", lambda step: step % 40, False),
        ("threads", lambda step: step // 100, True),
        ("open files", lambda step: min(step, 400), False),
    ],
)
def test_what_grows_all_the_time_is_found(name: str, rise: Callable[[int], int], is_found: bool) -> None:
    watch = watched()
    for number in range(3, 4000, 25):
        usage = dict.fromkeys(soak.GROWTH, 1000)
        watch.see(1, seen(number, usage={**usage, name: 1000 + rise(number)}))
    if is_found:
        with pytest.raises(SoakError, match=rf"{name} of rank 1 rose by \d+ in the life's second half"):
            watch.end(None)
    else:
        watch.end(None)


def test_a_rise_is_that_of_the_second_half() -> None:
    samples = {step: 7 if step < 500 else 7 + step // 2 for step in range(0, 1000, 10)}
    assert fitted_rise(samples) == pytest.approx((500, 245))
    assert fitted_rise(dict(list(samples.items())[:15])) == (0.0, 0.0)


def test_what_a_move_takes_at_once_is_no_rise() -> None:
    samples = {step: (1000 if step < 700 else 5000) + step // 10 for step in range(0, 1000, 10)}
    assert fitted_rise(samples, [700]) == pytest.approx((100, 48))
    assert fitted_rise(samples)[0] > 5000


def test_an_error_of_a_rank_and_a_crash_that_does_not_come_are_found(tmp_path: Path) -> None:
    for life, message in (
        (replace(LIFE, settings={"bundle": 0}), r"step 0 .*: rank \d raised ValueError: bundle must be in 1\.\.4096"),
        (replace(LIFE, number=1, end=2, crash="raise", crash_rank=5), r"rank 5 did not crash"),
    ):
        watch = Watch(replace(STEADY, life_steps=2, timeout=20.0))
        watch.begin(life)
        with pytest.raises(SoakError, match=message):
            Group(watch.soak, life, tmp_path).run(watch)


def test_the_command_ends_with_one_line_and_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fails(run: Soak, on_step: Callable[[int, float], object]) -> dict[str, Any]:
        on_step(0, 1.0)
        raise SoakError(f"step 1: something. Seed {run.seed}.")

    monkeypatch.setattr(soak, "run_soak", fails)
    assert main(steps=10, seed=3) == 1
    assert capsys.readouterr().err.endswith("\nerror: step 1: something. Seed 3.\n")

    monkeypatch.setattr(soak, "run_soak", lambda run, on_step: {"steps": run.steps, "faults": {"nan": 2}})
    assert main(steps=10, json_file=tmp_path / "soak.json") == 0
    assert json.loads((tmp_path / "soak.json").read_text()) == {"steps": 10, "faults": {"nan": 2}}
    assert 'faults  {"nan": 2}' in capsys.readouterr().out
