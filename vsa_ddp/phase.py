"""The schedule of phases: which steps have a backward pass. A pure state machine without torch.

WARMUP -> FULL -> PREDICT .. CORRECT PREDICT .. CORRECT -> FULL -> ...

It knows only its settings and what all ranks agree on, so equal input gives equal phases on every rank.
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from vsa_ddp.config import PhaseConfig, PredictorName
from vsa_ddp.stats import PhaseStats, PredictionQuality

logger = logging.getLogger(__name__)

HISTORY_NEEDED: dict[PredictorName, int] = {"last": 1, "ema": 1, "momentum": 2, "linear": 2}
"""Gradients that a predictor must have seen."""
TREND_STEPS = 20
"""Losses that a trend is read from: the mean of the later half against that of the earlier."""
RISES, FALLS = 0.1, -0.05
"""Changes of the loss that count."""
RECENT_DECAY = 0.7
"""Weight of the comparison before in the gate's sums."""
MAX_PROBE_WAIT = 32
"""FULL sections between two probes of a shut gate, at most."""


class Phase(StrEnum):
    """What a step does."""

    WARMUP = "warmup"
    """Backward pass, before the first cycle."""
    FULL = "full"
    """Backward pass."""
    PREDICT = "predict"
    """No backward pass and no gradient sent: the optimizer gets the predicted gradient."""
    CORRECT = "correct"
    """Backward pass whose gradient is first compared with what would have been predicted."""


class Verdict(StrEnum):
    """What a correction says of the predicted steps before it."""

    KEEP = "keep"
    UNDO = "undo"
    """Gradients turned against the predictions, and the loss rose by a tenth."""


class StepInfo(NamedTuple):
    """What `PhaseSchedule.begin_step` says of a step."""

    phase: Phase
    phase_step: int
    """Steps of this phase just before this one."""
    total_step: int
    """Steps before this one."""
    cycle: int
    """Cycles before this one."""
    phase_changed: bool
    horizon: int
    """Steps since the last backward pass: how far a prediction for this step reaches. At least 1."""
    records: bool
    """Whether its gradient enters the predictor's history."""
    measures: bool
    """Whether its gradient is compared with the prediction."""
    judges: bool
    """Whether the gate decides after that."""
    keeps: bool
    """Whether to keep what it begins from: a section does, and may be undone."""


class Measured(NamedTuple):
    """What the ranks agreed on about a step."""

    loss: float | None = None
    """Mean over the ranks; None if there was none, or it was not finite."""
    rejected: bool = False
    """The gradient was not finite, and did not enter the history."""
    moments: tuple[float, float, float] | None = None
    """[g g, g p, p p] of gradient and prediction; None if they were not compared."""
    horizon: int = 1
    """How far the prediction reached."""
    judges: bool = False
    """Whether the gate decides now."""


@dataclass
class _Position:
    """All that the schedule remembers, as plain numbers."""

    full_steps: int
    predict_steps: int
    total_step: int = 0
    cycle: int = 0
    phase: Phase = Phase.WARMUP
    """Of the last step."""
    phase_step: int = 0
    """Steps of that phase up to the last one."""
    section: int = 0
    """Steps since the last FULL one."""
    section_steps: int = 0
    """How long the section may be: as long as `predict_steps` was when it began."""
    kept: bool = False
    """Whether there is something to go back to."""
    start_loss: float | None = None
    """Loss there."""
    run: int = 0
    """Predictions since the last backward pass."""
    history: int = 0
    """Gradients in the predictor's history."""
    probe_wait: int = 1
    """FULL sections from one probe of a shut gate to the next."""
    undone: int = 0
    """Sections that went back."""
    steps: dict[str, int] = field(default_factory=lambda: {phase.value: 0 for phase in Phase})
    losses: list[float] = field(default_factory=list)
    """The last ones, for the trend."""
    moments: tuple[float, float, float] | None = None
    """Last measured."""
    recent: tuple[float, float] = (0.0, 0.0)
    """Decayed sums of g p and p p, as far back as the gate has been asking."""
    errors: dict[int, tuple[int, float]] = field(default_factory=dict)
    """By horizon: predictions measured, and the sum of the energies that they did not explain."""


class PhaseSchedule:
    """Decides the phase of each step: `begin_step` tells it, `end_step` takes what was measured and goes on."""

    def __init__(self, config: PhaseConfig | None = None) -> None:
        self.config = config if config is not None else PhaseConfig()
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        starts_shut = self.config.adapt == "gate"
        self._at = _Position(self.config.full_steps, 0 if starts_shut else self.config.predict_steps)

    @property
    def may_undo(self) -> bool:
        """Whether it ever returns `Verdict.UNDO`."""
        return self.config.roll_back and self.config.adapt == "gate"

    # The steps

    def begin_step(self) -> StepInfo:
        """The step to come. Asking again changes nothing."""
        at, phase = self._at, self._next_phase()
        changed = phase is not at.phase or at.total_step == 0
        phase_step = 0 if changed else at.phase_step
        is_full = phase in (Phase.WARMUP, Phase.FULL)
        probe = self._probe_section(phase, phase_step) if is_full and at.predict_steps == 0 else None
        compares = phase is Phase.CORRECT or (probe is not None and phase_step in probe)
        measures = compares and at.history >= HISTORY_NEEDED[self.config.predictor]
        return StepInfo(
            phase=phase,
            phase_step=phase_step,
            total_step=at.total_step,
            cycle=at.cycle + (changed and phase is Phase.FULL and at.section > 0),
            phase_changed=changed,
            horizon=at.run + 1,
            records=phase is Phase.CORRECT or (is_full and (at.predict_steps > 0 or probe is not None)),
            measures=measures,
            judges=measures and (phase is Phase.CORRECT or (probe is not None and phase_step == probe[-1])),
            keeps=self.may_undo and phase is Phase.PREDICT and at.section == 0,
        )

    def end_step(self, measured: Measured | None = None) -> Verdict | None:
        """The step is done. `measured` may be of an earlier one, as soon as the ranks have agreed on it.

        Returns, if that was a correction and `config.roll_back`, what becomes of the predicted steps before it.
        """
        at, info = self._at, self.begin_step()
        if info.phase is Phase.FULL and info.phase_changed and self.config.adapt == "trend":
            self._follow_trend()
        if info.phase is Phase.PREDICT and at.section == 0:
            at.section_steps = at.predict_steps
            at.kept = info.keeps
        at.steps[info.phase] += 1
        at.total_step += 1
        at.cycle, at.phase, at.phase_step = info.cycle, info.phase, info.phase_step + 1
        at.run = at.run + 1 if info.phase is Phase.PREDICT else 0
        at.section = at.section + 1 if info.phase in (Phase.PREDICT, Phase.CORRECT) else 0
        at.history += info.records
        verdict = self._observe(measured) if measured is not None else None
        if verdict is not None:
            at.kept = verdict is Verdict.KEEP and info.phase is Phase.PREDICT
        if at.run == 1:
            at.start_loss = measured.loss if measured is not None else None
        return verdict

    def _next_phase(self) -> Phase:
        at = self._at
        if at.total_step < self.config.warmup_steps:
            return Phase.WARMUP
        if at.history < HISTORY_NEEDED[self.config.predictor] or at.total_step == self.config.warmup_steps:
            return Phase.FULL
        if at.phase is Phase.FULL:
            return Phase.PREDICT if at.predict_steps and at.phase_step >= at.full_steps else Phase.FULL
        if at.section >= min(at.section_steps, at.predict_steps):
            return Phase.CORRECT if at.run else Phase.FULL
        return Phase.CORRECT if at.run >= self.config.correct_every else Phase.PREDICT

    # The lengths

    def _probe_section(self, phase: Phase, phase_step: int) -> range | None:
        """The steps, counted like `phase_step`, that probe the shut gate; None if that is not soon.

        A section but for its last step, so that the verdict is there when the section ends.
        """
        if self.config.adapt != "gate" or self.config.predict_steps == 0:
            return None
        if phase is Phase.WARMUP:
            return range(max(1, self.config.warmup_steps - 1))
        length = self._at.full_steps
        section = phase_step // length
        # The section before the probe's is recorded too
        due = next((s for s in (section, section + 1) if (s + 1) % self._at.probe_wait == 0), None)
        return None if due is None else range(due * length, due * length + max(1, length - 1))

    def _observe(self, measured: Measured) -> Verdict | None:
        at = self._at
        if measured.rejected:
            at.history = max(0, at.history - 1)
        if measured.loss is not None:
            at.losses = [*at.losses, measured.loss][-TREND_STEPS:]
        if measured.moments is None:
            return None
        at.moments = measured.moments
        if not all(map(math.isfinite, measured.moments)):
            at.recent = (math.nan, math.nan)
        else:
            _, gp, pp = measured.moments
            at.recent = RECENT_DECAY * at.recent[0] + gp, RECENT_DECAY * at.recent[1] + pp
            explained = PredictionQuality.of(measured.moments).explained
            count, total = at.errors.get(measured.horizon, (0, 0.0))
            if math.isfinite(explained):
                at.errors[measured.horizon] = count + 1, total + 1.0 - explained
        if self.config.adapt != "gate" or not measured.judges:
            return None
        verdict = self._verdict(measured)
        self._judge(measured, verdict)
        return verdict

    def _verdict(self, measured: Measured) -> Verdict | None:
        """Of a correction; a probe is about no predicted step."""
        if not self._at.kept or measured.horizon == 1 or measured.moments is None:
            return None
        loss, before = measured.loss, self._at.start_loss
        rose = loss is None or before is None or not loss <= before + RISES * abs(before)
        return Verdict.UNDO if rose and not measured.moments[1] > 0.0 else Verdict.KEEP

    def _judge(self, measured: Measured, verdict: Verdict | None) -> None:
        """The gate: twice as many predictions if they pay, half as many if not, none if gradients turn against them.

        They must not grow beyond the predictions either: where they do, training is not far from diverging.
        """
        at, before = self._at, self._at.predict_steps
        slope = at.recent[0] / at.recent[1] if at.recent[1] else 0.0
        rises = trend(at.losses) > RISES
        if verdict is Verdict.UNDO:
            at.predict_steps, at.history = 0, 0
            at.losses = [] if at.start_loss is None else [at.start_loss]
            at.undone += 1
        elif self.config.min_slope <= slope <= 2.0 - self.config.min_slope and not rises:
            at.predict_steps = min(self.config.predict_steps, max(1, 2 * before))
            if measured.horizon > 1:  # not a probe alone
                at.probe_wait = 1
        else:
            at.predict_steps = before // 2 if slope > 0.0 else 0
        if at.predict_steps == 0:
            at.probe_wait = min(MAX_PROBE_WAIT, 2 * at.probe_wait)
            at.recent = (0.0, 0.0)
        if at.predict_steps != before:
            logger.info(
                "step %d: gradients go %.2f of what is predicted %d ahead%s: %d -> %d predicted steps%s",
                at.total_step,
                slope,
                measured.horizon,
                ", and the loss rises" if rises else "",
                before,
                at.predict_steps,
                ", and the last ones are undone" if verdict is Verdict.UNDO else "",
            )

    def _follow_trend(self) -> None:
        """Longer FULL and shorter PREDICT where the loss rises, and the other way round where it falls."""
        at, config = self._at, self.config
        if len(at.losses) < TREND_STEPS:
            return
        before = at.full_steps, at.predict_steps
        change = trend(at.losses)
        if change > RISES:
            at.full_steps = min(max(50, config.full_steps), at.full_steps + 5)
            at.predict_steps = max(min(10, config.predict_steps), at.predict_steps - 10)
        elif change < FALLS:
            at.full_steps = max(1, at.full_steps - 2)
            at.predict_steps = min(2 * config.predict_steps, at.predict_steps + 5)
        at.losses = at.losses[-1:]
        if before != (at.full_steps, at.predict_steps):
            logger.info(
                "step %d: loss %+.0f %%: full steps %d -> %d, predicted %d -> %d",
                at.total_step,
                100 * change,
                before[0],
                at.full_steps,
                before[1],
                at.predict_steps,
            )

    # What it tells

    @property
    def total_step(self) -> int:
        """Steps done."""
        return self._at.total_step

    @property
    def current_phase(self) -> Phase:
        """Of the step to come."""
        return self._next_phase()

    @property
    def cycle_count(self) -> int:
        """Cycles done."""
        return self._at.cycle

    @property
    def full_steps(self) -> int:
        """Their present length."""
        return self._at.full_steps

    @property
    def predict_steps(self) -> int:
        """Their present length; 0 while the gate is shut."""
        return self._at.predict_steps

    @property
    def steps(self) -> dict[str, int]:
        """Steps done, by phase."""
        return dict(self._at.steps)

    @property
    def backwards(self) -> int:
        """Steps done with a backward pass."""
        return self._at.total_step - self._at.steps[Phase.PREDICT]

    @property
    def speedup(self) -> float:
        """Steps per backward pass; 1.0 before the first."""
        return self._at.total_step / self.backwards if self.backwards else 1.0

    @property
    def quality(self) -> PredictionQuality | None:
        """Of the prediction last measured."""
        return PredictionQuality.of(self._at.moments) if self._at.moments is not None else None

    @property
    def loss(self) -> float | None:
        """The last that the ranks have agreed on."""
        return self._at.losses[-1] if self._at.losses else None

    def error_by_horizon(self) -> dict[int, float]:
        """Mean share of the gradient's energy that predictions so far ahead did not explain."""
        return {horizon: total / count for horizon, (count, total) in sorted(self._at.errors.items())}

    def stats(self, dense_bytes: int, seconds_by_phase: dict[str, float]) -> PhaseStats:
        """All of it. Args: `dense_bytes` of a gradient; `seconds_by_phase` as they were measured."""
        skipped = self._at.steps[Phase.PREDICT]
        return PhaseStats(
            steps=self.total_step,
            backwards=self.backwards,
            skipped=skipped,
            steps_by_phase=self.steps,
            speedup=self.speedup,
            cycles=self.cycle_count,
            full_steps=self.full_steps,
            predict_steps=self.predict_steps,
            loss=self.loss,
            quality=self.quality,
            error_by_horizon=self.error_by_horizon(),
            undone=self._at.undone,
            dense_bytes_skipped=skipped * dense_bytes,
            seconds_by_phase=dict(seconds_by_phase),
        )

    def should_compute_full(self) -> bool:
        """Whether the step to come has a backward pass."""
        return self._next_phase() is not Phase.PREDICT

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts; keys that are the same at every step."""
        errors = [[horizon, *error] for horizon, error in self._at.errors.items()]
        return {**asdict(self._at), "phase": self._at.phase.value, "errors": errors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        tuples = {
            "moments": tuple(state["moments"]) if state["moments"] is not None else None,
            "recent": tuple(state["recent"]),
            "errors": {horizon: (count, total) for horizon, count, total in state["errors"]},
        }
        copies = {"phase": Phase(state["phase"]), "steps": dict(state["steps"]), "losses": list(state["losses"])}
        self._at = _Position(**{**state, **tuples, **copies})

    def forget_start(self) -> None:
        """Nothing was kept to go back to."""
        self._at.kept = False

    def forget_history(self) -> None:
        """The predictor has begun anew: no predictions until it has seen as many gradients as it needs."""
        self._at.history = 0


def trend(losses: Iterable[float]) -> float:
    """Change of the later half's mean against the earlier half's, in units of the earlier half's mean size.

    The size is that of absolute values, so the sign says the same whatever that of the loss: negative is better. 0.0 if
    there are fewer than `TREND_STEPS`.
    """
    losses = list(losses)
    if len(losses) < TREND_STEPS:
        return 0.0
    half = len(losses) // 2
    early, late = losses[:half], losses[half:]
    size = math.fsum(map(abs, early)) / len(early)
    change = math.fsum(late) / len(late) - math.fsum(early) / len(early)
    return change / size if size else math.copysign(math.inf, change) if change else 0.0
