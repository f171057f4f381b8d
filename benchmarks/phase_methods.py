"""What a step without a full backward pass may do instead: the package's prediction, what it must beat, candidates.

All ranks take turns in one process; the schedule and the predictor are the package's own, told what the ranks agreed on
one step late, as `PhasedTrainer` does it.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.tasks import Task
from vsa_ddp import GradientPredictor, Phase, PhaseConfig, PhaseSchedule
from vsa_ddp.phase import Measured, Verdict
from vsa_ddp.snapshot import Snapshot

Gradients = dict[str, Tensor]


@dataclass
class PhasedRun:
    """A model in training on ranks that take turns, by phases."""

    task: Task
    model: nn.Module
    optimizer: torch.optim.Optimizer
    config: PhaseConfig
    orders: list[torch.Generator]
    skip: "Skip"
    backwards: float = 0.0
    """Passes over the whole batch."""
    forwards: int = 0
    """Passes over the whole batch, those of backward passes included."""
    gradients_sent: float = 0.0
    """All-reduces of the whole gradient."""
    losses: list[float] = field(default_factory=list)
    """Of steps with a backward pass, before it."""

    def __post_init__(self) -> None:
        self.parameters = dict(self.model.named_parameters())
        self.schedule = PhaseSchedule(self.config)
        self.predictor = GradientPredictor(self.parameters.items(), self.config)
        self.section_start = Snapshot(self.model, self.optimizer)
        self._late: Measured | None = None

    def step(self) -> None:
        """One optimizer step."""
        info = self.schedule.begin_step()
        if info.keeps:
            self.section_start.take()
        self.optimizer.zero_grad()
        loss: float | None
        if info.phase is Phase.PREDICT:
            loss = self.skip(self, self.predictor.predict_gradient(step=info.total_step))
            now = Measured()
        else:
            loss, gradients = self.backward()
            now = self.predictor.take(gradients, info)
            self.losses.append(loss)
            self.take(gradients)
        now = now._replace(loss=loss if loss is not None and math.isfinite(loss) else None)
        verdict = self.schedule.end_step(self._late)
        self.section_start.settle(verdict, in_section=info.phase is Phase.PREDICT)
        if verdict is Verdict.UNDO:
            self.predictor.reset()
            del self.losses[1:]  # the last are of what is undone
            now = Measured()
        self._late = now

    def take(self, gradients: Gradients) -> None:
        """An optimizer step with these gradients."""
        for name, p in self.parameters.items():
            p.grad = gradients[name]
        self.optimizer.step()

    def backward(self, ranks: slice = slice(None)) -> tuple[float, Gradients]:
        """Mean loss and gradient of some ranks' next batches."""
        orders = self.orders[ranks]
        self.optimizer.zero_grad()
        loss = torch.stack([self._rank_backward(order, len(orders)) for order in orders]).sum().item()
        share = len(orders) / len(self.orders)
        self.backwards += share
        self.gradients_sent += share
        self.forwards += 1  # ranks that wait are not free
        return loss, {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def _rank_backward(self, order: torch.Generator, size: int) -> Tensor:
        loss = self.task.loss(self.model, order) / size
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    @torch.no_grad()
    def forward(self) -> float:
        """Mean loss of all ranks' next batches."""
        self.forwards += 1
        return sum(self.task.loss(self.model, order).item() for order in self.orders) / len(self.orders)

    def slope_along(self, direction: Gradients) -> tuple[float, float]:
        """Mean loss of all ranks' next batches and its derivative along a direction: one pass forward, no graph."""
        self.forwards += 2
        loss = slope = 0.0
        for order in self.orders:

            def loss_at(parameters: Gradients, order: torch.Generator = order) -> Tensor:
                at: Any = lambda *inputs: functional_call(self.model, parameters, inputs)  # noqa: E731
                return self.task.loss(at, order)

            with sdpa_kernel(SDPBackend.MATH), torch.no_grad():  # the fused kernel has no forward mode
                value, derivative = jvp(loss_at, (self.parameters,), (direction,))
            loss += value.item() / len(self.orders)
            slope += derivative.item() / len(self.orders)
        return loss, slope


Skip = Callable[[PhasedRun, Gradients], float | None]
"""Does a step from the predicted gradient, and returns the mean loss if it is known."""


def scaled(gradients: Gradients, factor: float) -> Gradients:
    return {name: factor * g for name, g in gradients.items()}


def predicted(run: PhasedRun, prediction: Gradients) -> float:
    """As the package does it: a forward pass for the loss, the predicted gradient for the optimizer."""
    loss = run.forward()
    run.take(prediction)
    return loss


def zero(run: PhasedRun, prediction: Gradients) -> float:
    """The optimizer's own momentum, and no gradient."""
    return predicted(run, scaled(prediction, 0.0))


def shrunk(run: PhasedRun, prediction: Gradients) -> float:
    """The multiple of the prediction that fitted best when last compared. Costs nothing."""
    gp, pp = run.schedule._at.recent
    return predicted(run, scaled(prediction, min(1.0, max(0.0, gp / pp)) if pp else 1.0))


def directional(run: PhasedRun, prediction: Gradients) -> float:
    """The gradient's projection on the prediction, by forward-mode differentiation: one number to all-reduce.

    Source: Baydin et al. 2022, arXiv:2202.08587, with the predicted direction in place of a random one.
    """
    energy = sum(p.square().sum().item() for p in prediction.values())
    loss, slope = run.slope_along(prediction)
    run.take(scaled(prediction, min(1.0, max(0.0, slope / energy)) if energy else 0.0))
    return loss


def debiased(run: PhasedRun, prediction: Gradients) -> float:
    """One rank's true gradient corrects the prediction, half-way; it costs that rank's backward pass.

    The control variate of arXiv:2511.05187 is that prediction's difference between the whole batch and the part with
    true gradients. Ours does not depend on the batch: the difference is zero, and an unbiased estimate is the part's
    gradient alone. What is left to choose is how much bias to take for how much less noise.
    """
    loss, gradients = run.backward(slice(len(run.losses) % len(run.orders), len(run.losses) % len(run.orders) + 1))
    run.take({name: 0.5 * (p + gradients[name]) for name, p in prediction.items()})
    return loss


def rolled_back(run: PhasedRun, prediction: Gradients) -> float:
    """Each predicted step is undone if the loss of the same batches rises: two passes forward.

    Source: the accept-or-reject rule of arXiv:2602.19580.
    """
    batches = [order.get_state() for order in run.orders]
    before = run.forward()
    kept = [p.detach().clone() for p in run.parameters.values()]
    kept_optimizer = copy.deepcopy(run.optimizer.state_dict())
    run.take(prediction)
    for order, state in zip(run.orders, batches, strict=True):
        order.set_state(state)
    if not run.forward() <= before:
        with torch.no_grad():
            for p, old in zip(run.parameters.values(), kept, strict=True):
                p.copy_(old)
        run.optimizer.load_state_dict(kept_optimizer)
    return before


FIXED: dict[str, Any] = {"adapt": "none", "predictor": "linear"}
"""The deterministic schedule: 9 backward passes in 26 steps, whatever comes of it."""

FORWARD: dict[str, Any] = {"roll_back": False, "predictor": "linear"}
"""No section is undone. Candidates predict by a line."""

METHODS: dict[str, tuple[PhaseConfig, Skip]] = {
    "plain": (PhaseConfig(predict_steps=0), predicted),
    **{f"gate, {name}": (PhaseConfig(predictor=name), predicted) for name in ("ema", "linear", "last", "momentum")},
    "gate, ema, 2 full steps": (PhaseConfig(full_steps=2), predicted),
    "gate, ema, 40 predicted": (PhaseConfig(predict_steps=40), predicted),
    "fixed, linear": (PhaseConfig(**FIXED), predicted),
    "fixed, ema": (PhaseConfig(**{**FIXED, "predictor": "ema"}), predicted),
    "fixed, repeat the last": (PhaseConfig(**{**FIXED, "predictor": "last"}), predicted),
    "fixed, zero gradient": (PhaseConfig(**{**FIXED, "predictor": "last"}), zero),
    "gate, ema, never back": (PhaseConfig(**{**FORWARD, "predictor": "ema"}), predicted),
    "gate, linear, never back": (PhaseConfig(**FORWARD), predicted),
    "gate, shrunk": (PhaseConfig(**FORWARD), shrunk),
    "gate, directional": (PhaseConfig(**FORWARD), directional),
    "gate, debiased": (PhaseConfig(**FORWARD), debiased),
    "gate, rolled back": (PhaseConfig(**FORWARD), rolled_back),
    "fixed, directional": (PhaseConfig(**FIXED), directional),
    "fixed, debiased": (PhaseConfig(**FIXED), debiased),
    "fixed, rolled back": (PhaseConfig(**FIXED), rolled_back),
}
