"""The phases in one process, without DDP: the same schedule and predictor, under the names of the seed system."""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from vsa_ddp.config import PhaseConfig
from vsa_ddp.history import Gradients
from vsa_ddp.phase import Measured, Phase, PhaseSchedule, StepInfo
from vsa_ddp.predictor import GradientPredictor
from vsa_ddp.stats import PhaseStats


class DeterministicPredictor(GradientPredictor):
    """`GradientPredictor` by a line through all gradients, whatever `config.predictor` says."""

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]], config: PhaseConfig | None = None) -> None:
        super().__init__(named_parameters, replace(config or PhaseConfig(), predictor="linear"))


class PhaseTrainer:
    """Asked for the phase of each step, given the gradients or asked for them, told the loss.

        phases = PhaseTrainer(model.named_parameters())
        for x, y in loader:
            phases.begin_step()
            optimizer.zero_grad()
            with torch.set_grad_enabled(phases.should_compute_full()):
                loss = loss_fn(model(x), y)
            if phases.should_compute_full():
                loss.backward()
                phases.record_full_gradients({name: p.grad for name, p in model.named_parameters()})
            else:
                for name, gradient in phases.get_predicted_gradients().items():
                    model.get_parameter(name).grad = gradient
            optimizer.step()
            phases.end_step(loss.item())

    With several ranks take `PhasedTrainer`: this one decides from the loss of its own process, and cannot take steps
    back (`config.roll_back`), for it knows neither parameters nor optimizer. Without a `config` the
    lengths follow the trend of the loss: 10 full steps, then 40 with a correction after every tenth.
    """

    DEFAULT: ClassVar[PhaseConfig] = PhaseConfig(
        warmup_steps=0, full_steps=10, predict_steps=40, correct_every=10, adapt="trend", predictor="momentum"
    )

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]], config: PhaseConfig | None = None) -> None:
        parameters = dict(named_parameters)
        self.config = config if config is not None else self.DEFAULT
        self.schedule = PhaseSchedule(replace(self.config, roll_back=False))
        self.predictor = GradientPredictor(parameters.items(), self.config)
        self._dense_bytes = sum(p.nbytes for p in parameters.values())
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.schedule.reset()
        self.predictor.reset()
        self._measured = Measured()
        self._seconds = {phase.value: 0.0 for phase in Phase}
        self._began = time.perf_counter()

    def begin_step(self) -> StepInfo:
        """The step to come."""
        self._began = time.perf_counter()
        return self.schedule.begin_step()

    def should_compute_full(self) -> bool:
        """Whether it has a backward pass."""
        return self.schedule.should_compute_full()

    def record_full_gradients(self, gradients: Mapping[str, Tensor | None]) -> None:
        """The true gradients of a step with a backward pass: compared with the prediction first where the step asks for
        it, then taken into the history. Parameters without one may be left out, or None.

        Raises: ValueError in a predicted step; TypeError for a sparse or complex gradient.
        """
        info = self.schedule.begin_step()
        if info.phase is Phase.PREDICT:
            raise ValueError(
                "this step is predicted: get_predicted_gradients has its gradients, there are no true ones."
            )
        there = {name: gradient for name, gradient in gradients.items() if gradient is not None}
        self._measured = self.predictor.take(there, info)

    def get_predicted_gradients(self) -> Gradients:
        """The gradients of a predicted step, by name, corrected as `config.correction` says.

        Raises: ValueError in a step that has a backward pass.
        """
        info = self.schedule.begin_step()
        if info.phase is not Phase.PREDICT:
            raise ValueError(
                f"this {info.phase} step has a backward pass: give its gradients to record_full_gradients."
            )
        return self.predictor.predict_gradient(step=info.total_step)

    def end_step(self, loss: float) -> None:
        """The step is done."""
        phase = self.schedule.current_phase
        self.schedule.end_step(self._measured._replace(loss=loss if math.isfinite(loss) else None))
        self._measured = Measured()
        self._seconds[phase] += time.perf_counter() - self._began

    @property
    def current_phase(self) -> Phase:
        """Of the step to come, or that has begun."""
        return self.schedule.current_phase

    @property
    def total_step(self) -> int:
        """Steps done."""
        return self.schedule.total_step

    @property
    def cycle_count(self) -> int:
        """Cycles done."""
        return self.schedule.cycle_count

    @property
    def speedup_ratio(self) -> float:
        """Steps per backward pass."""
        return self.schedule.speedup

    def get_stats(self) -> PhaseStats:
        """Counts, lengths, quality of prediction, bytes of gradients not calculated, and time so far."""
        return self.schedule.stats(self._dense_bytes, self._seconds)


class DeterministicPhaseTrainer(PhaseTrainer):
    """`PhaseTrainer` with lengths that stay as they are and a predictor that fits lines: 10 steps to warm up, then 5
    full ones and 20 with a correction after every fifth."""

    DEFAULT: ClassVar[PhaseConfig] = PhaseConfig(adapt="none", predictor="linear")
