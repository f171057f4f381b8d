"""Gradients predicted from past ones. Local: what is built from gradients that all ranks share is the same on all.

A predictor is a few buffers of the gradient's size, updated in place, and a prediction is a sum of them with two
weights: nothing else is kept of the history.

| method     | buffers                      | prediction at h steps after the last gradient                          |
|------------|------------------------------|------------------------------------------------------------------------|
| `last`     | g                            | g                                                                      |
| `ema`      | sum of w g                   | their mean, with w = decay ** age                                      |
| `momentum` | g1, g0, the last two         | g1 + (d + d^2 + ... + d^h) (g1 - g0): a damped trend, d the damping    |
| `linear`   | sums of w g and of w t g     | the line a + b t through all gradients, weighted least squares, at t=h |

Source: the damped trend is Gardner and McKenzie 1985 (Management Science 31), discounted least squares Brown 1963.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsa_ddp.config import PhaseConfig
from vsa_ddp.history import Buffer, Gradients, make_buffer
from vsa_ddp.phase import HISTORY_NEEDED, Measured, StepInfo
from vsa_ddp.stats import PredictionQuality

logger = logging.getLogger(__name__)


class PredictorStats(NamedTuple):
    """What `GradientPredictor.stats` tells."""

    total_steps: int
    """Steps so far, recorded or predicted."""
    num_recorded: int
    """Gradients in the history."""
    horizon: int
    """Steps from the last recorded gradient to the present one."""
    num_buffers: int
    """Of the gradient's size."""
    buffer_bytes: int
    quality: PredictionQuality | None
    """Of the whole gradient, last measured."""


class GradientPredictor:
    """Predicts the gradients of some parameters, by name.

    Every step is one call of `record_gradient` or `predict_gradient`; the steps count themselves, unless `step` says
    which one it is. A parameter that had no gradient when one was last recorded is not predicted.

    Args:
        named_parameters: those that will have gradients: their shapes, dtypes and devices.
        config: `predictor`, its settings, and `min_slope` and `predict_steps` for `should_compute_full`.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]], config: PhaseConfig | None = None) -> None:
        self.config = config if config is not None else PhaseConfig()
        self._parameters = dict(named_parameters)
        self._num_sums = 1 if self.config.predictor in ("last", "ema") else 2
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.total_steps = 0
        self.num_recorded = 0
        self._last_step = 0
        self._gap = 1
        self._weights = (0.0, 0.0, 0.0)  # sums of w, w t and w t^2, with t = 0 at the last recorded gradient
        labels = [*map(str, range(self._num_sums)), "residual"]
        buffers = [make_buffer(label, self._parameters, self.config.history_dtype) for label in labels]
        self._sums, self._residual = buffers[:-1], buffers[-1]
        self._present: list[str] = []
        self._moments_T3: Tensor | None = None
        self._measured: list[str] = []
        self.quality: PredictionQuality | None = None

    # The history

    @torch.no_grad()
    def record_gradient(self, gradients: Mapping[str, Tensor], *, step: int | None = None, scale: float = 1.0) -> bool:
        """Take the true gradient of this step into the history, divided by `scale`.

        Returns False, and changes nothing but the count of steps, if it is not finite. The host waits for the device.
        Raises: TypeError for a sparse or complex gradient; KeyError for a parameter that is not known.
        """
        now = self._now(step)
        self._check(gradients)
        if not _all_finite(list(gradients.values())):
            return False
        gap = now - self._last_step if self.num_recorded else 1
        names, decay = list(gradients), self.config.decay**gap
        for buffer in self._buffers:
            buffer.allocate(names)
        for portion in self._sums[0].portions():
            sums = [buffer.read(portion) for buffer in self._sums]
            self._add(sums, {n: gradients[n] for n in portion if n in gradients}, gap, scale)
            for buffer, changed in zip(self._sums, sums, strict=True):
                buffer.write(changed, now)
        w, wt, wtt = self._weights
        aged = decay * w, decay * (wt - gap * w), decay * (wtt - 2 * gap * wt + gap * gap * w)
        self._weights = aged[0] + 1.0, aged[1], aged[2]
        self._present, self._gap, self._last_step = names, gap, now
        self.num_recorded += 1
        return True

    def _add(self, sums: list[Gradients], gradients: Gradients, gap: int, scale: float) -> None:
        """To the sums, in place, which are `gap` older by now."""
        method, decay = self.config.predictor, self.config.decay**gap
        g0, gt = list(sums[0].values()), list(sums[-1].values())
        if method == "momentum":
            torch._foreach_copy_(gt, g0)
        if method == "linear" and self.num_recorded:
            # w t of a gradient that is now `gap` older
            torch._foreach_sub_(gt, g0, alpha=gap)
            torch._foreach_mul_(gt, decay)
        torch._foreach_mul_(g0, decay if method in ("ema", "linear") else 0.0)
        if gradients:
            torch._foreach_add_([sums[0][n] for n in gradients], list(gradients.values()), alpha=1.0 / scale)

    @torch.no_grad()
    def predict_gradient(self, *, step: int | None = None, scale: float = 1.0) -> Gradients:
        """The gradient of this step as the history has it, times `scale`: new tensors, in the parameters' dtypes.

        Zeros for all parameters while the history is empty: so it may be where the first gradient was not finite.
        """
        now = self._now(step)
        if not self.num_recorded:
            return {name: torch.zeros_like(parameter) for name, parameter in self._parameters.items()}
        weights = [scale * w for w in self._coefficients(now)]
        predicted: Gradients = {}
        for names in self._sums[0].portions(self._present):
            predicted |= self._weighted(names, weights)
        self.apply_correction(predicted, scale=scale)
        return {n: predicted[n].to(self._parameters[n].dtype) for n in self._present}

    # Correction and quality

    @torch.no_grad()
    def compute_correction(
        self, gradients: Mapping[str, Tensor], *, step: int | None = None, scale: float = 1.0
    ) -> Tensor:
        """Compare the true gradient with the prediction for the same step. Before `record_gradient`, or it is no test.

        Takes in the error for later corrections, unless it is not finite, if `config.correction` is not 0. The host
        waits for the device. Shapes: returns (3,) float64 on the CPU: [g g, g p, p p], from which
        `PredictionQuality.of` makes figures.
        Raises: ValueError while the history is empty.
        """
        now = self.total_steps if step is None else step
        weights = self._coefficients(now)
        self._check(gradients)
        self._measured = sorted(gradients.keys() | set(self._present))
        moments = [self._moments(gradients.get(n), self._predict_one(n, weights), n, scale) for n in self._measured]
        self._moments_T3 = torch.stack([m.to(moments[0].device) for m in moments]).cpu()
        total_3 = self._moments_T3.sum(0)
        self.quality = PredictionQuality.of(total_3.tolist())
        if self.config.correction and bool(total_3.isfinite().all()):
            for name in gradients:
                error = self._predict_one(name, weights, corrected=False)
                if error is None:
                    continue
                error.neg_().add_(gradients[name], alpha=1.0 / scale)
                residual = self._residual.read([name])
                residual[name].mul_(self.config.decay).add_(error, alpha=1.0 - self.config.decay)
                self._residual.write(residual, now)
        return total_3

    def take(self, gradients: Mapping[str, Tensor], info: StepInfo, *, scale: float = 1.0) -> Measured:
        """The true gradient of a step, as far as the schedule wants it: compared with the prediction, then recorded.

        Returns what there is to tell the schedule, but for the loss. Raises: as `record_gradient`.
        """
        found = Measured()
        if info.measures and self.num_recorded:
            gg, gp, pp = self.compute_correction(gradients, step=info.total_step, scale=scale).tolist()
            found = found._replace(moments=(gg, gp, pp), horizon=info.horizon, judges=info.judges)
        if info.records:
            found = found._replace(rejected=not self.record_gradient(gradients, step=info.total_step, scale=scale))
        return found

    @torch.no_grad()
    def apply_correction(self, predicted: Gradients, *, scale: float = 1.0) -> Gradients:
        """Add `config.correction` of the mean error of past predictions, in place. `predict_gradient` has done it."""
        weight = self.config.correction * scale
        for names in self._residual.portions(predicted) if weight else ():
            residual = self._residual.read(names)
            if names:
                torch._foreach_add_([predicted[n] for n in names], list(residual.values()), alpha=weight)
        return predicted

    def quality_by_parameter(self) -> dict[str, PredictionQuality]:
        """Of the last comparison, parameter by parameter. Empty before the first."""
        if self._moments_T3 is None:
            return {}
        return {n: PredictionQuality.of(m) for n, m in zip(self._measured, self._moments_T3.tolist(), strict=True)}

    def should_compute_full(self) -> bool:
        """Whether this step wants a true gradient: for lack of history, for age, or for the quality last measured."""
        if self.num_recorded < HISTORY_NEEDED[self.config.predictor]:
            return True
        if self.total_steps - self._last_step > self.config.predict_steps:
            return True
        return self.quality is not None and not self.quality.slope >= self.config.min_slope

    # What it tells

    def stats(self) -> PredictorStats:
        """Counts, memory and the last quality."""
        return PredictorStats(
            total_steps=self.total_steps,
            num_recorded=self.num_recorded,
            horizon=self.total_steps - self._last_step if self.num_recorded else 0,
            num_buffers=len(self._buffers),
            buffer_bytes=sum(buffer.num_bytes for buffer in self._buffers),
            quality=self.quality,
        )

    def state_dict(self) -> dict[str, Any]:
        """Copies, as plain tensors, numbers and strings: loads with `torch.load(..., weights_only=True)`.

        Its keys, and the shapes of its tensors, depend on parameters and settings alone, since
        `torch.distributed.checkpoint` fills what a new predictor says: buffers are zeros where nothing is recorded.
        """
        return {
            "predictor": self.config.predictor,
            "parameters": self._shapes(),
            "packed": self.config.history_dtype == "trits",
            "sums": {self.config.predictor: [sums.state_dict() for sums in self._sums]},
            "residual": self._residual.state_dict() if self.config.correction else {},
            "present": list(self._present),
            "weights": list(self._weights),
            "counts": [self.total_steps, self.num_recorded, self._last_step, self._gap],
            "quality": list(self.quality) if self.quality is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any], *, strict: bool = True) -> bool:
        """Go on where `state` was taken, on the devices of the parameters. Returns whether its history was taken over.

        That of another predictor or of other parameters is not: the parts that fit would make a history in which the
        rest had gradients of zero. If not `strict`, it is left out with a warning, and a new one begins.
        Raises: ValueError if there is such a difference, and `strict`.
        """
        difference = self._difference(state)
        if difference and strict:
            raise ValueError(f"{difference}; strict=False leaves the history out.")
        self.reset()
        if difference:
            logger.warning("%s: the history begins anew", difference)
            return False
        self.total_steps, self.num_recorded, self._last_step, self._gap = state["counts"]
        if self.num_recorded:  # else there are only zeros
            # one side may have a residual and the other none: `correction` need not be what it was
            saved_buffers = [*state["sums"][self.config.predictor], state["residual"]]
            for buffer, saved in zip(self._buffers, saved_buffers, strict=False):
                buffer.load_state_dict(saved)
        self._present = list(state["present"])
        self._weights = tuple(state["weights"])
        self.quality = PredictionQuality(*state["quality"]) if state["quality"] is not None else None
        return True

    # Parts

    @property
    def _buffers(self) -> list[Buffer]:
        """All that have the gradient's size."""
        return [*self._sums, self._residual] if self.config.correction else self._sums

    def _shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        return [(name, tuple(parameter.shape)) for name, parameter in self._parameters.items()]

    def _difference(self, state: dict[str, Any]) -> str | None:
        """Why a saved history cannot go on here, if it cannot."""
        if state["predictor"] != self.config.predictor:
            return (
                f"the saved history is that of predictor {state['predictor']!r}, but the setting is "
                f"{self.config.predictor!r}"
            )
        if state["packed"] is not (self.config.history_dtype == "trits"):
            kept = "in trits" if state["packed"] else "as floats"
            return f"the saved history is kept {kept}, but history_dtype is {self.config.history_dtype!r}"
        there, here = dict(state["parameters"]), dict(self._shapes())
        for name in there | here:
            if there.get(name) != here.get(name):
                return (
                    f"the saved history belongs to other parameters: {name} is {there.get(name, 'absent')} there and "
                    f"{here.get(name, 'absent')} here"
                )
        return None

    def _now(self, step: int | None) -> int:
        now = self.total_steps if step is None else step
        self.total_steps = now + 1
        return now

    def _coefficients(self, now: int) -> tuple[float, ...]:
        """Weights of the sums in the prediction for step `now`."""
        if not self.num_recorded:
            raise ValueError("there is no gradient to predict from; record one first.")
        h = now - self._last_step
        w, wt, wtt = self._weights
        if self.config.predictor == "last":
            return (1.0,)
        if self.config.predictor == "ema":
            return (1.0 / w,)
        if self.config.predictor == "momentum":
            if self.num_recorded == 1:
                return 1.0, 0.0
            slope = math.fsum(self.config.damping**k for k in range(1, h + 1)) / self._gap
            return 1.0 + slope, -slope
        spread = w * wtt - wt * wt  # 0 with one gradient: a constant
        ahead = (h - wt / w) / spread if self.num_recorded > 1 else 0.0
        return 1.0 / w - ahead * wt, ahead * w

    def _predict_one(self, name: str, weights: tuple[float, ...], *, corrected: bool = True) -> Tensor | None:
        """One parameter's prediction, as a new tensor; None if it is not predicted."""
        if name not in self._present:
            return None
        predicted = self._weighted([name], weights)
        return (self.apply_correction(predicted) if corrected else predicted)[name]

    def _weighted(self, names: list[str], weights: Sequence[float]) -> Gradients:
        """The sums with these weights, as new tensors."""
        if not names:
            return {}
        sums = [buffer.read(names) for buffer in self._sums]
        predicted = torch._foreach_mul([self._working(sums[0][n], n) for n in names], weights[0])
        for more, weight in zip(sums[1:], weights[1:], strict=True):
            torch._foreach_add_(predicted, [more[n] for n in names], alpha=weight)
        return dict(zip(names, predicted, strict=True))

    def _moments(self, gradient: Tensor | None, predicted: Tensor | None, name: str, scale: float) -> Tensor:
        """[g g, g p, p p] of one parameter. Shapes: (3,) float64."""
        zero = torch.zeros((), device=self._parameters[name].device)
        g = self._working(gradient, name).flatten() if gradient is not None else None
        p = predicted.flatten() if predicted is not None else None
        gg = torch.dot(g, g) if g is not None else zero
        gp = torch.dot(g, p) if g is not None and p is not None else zero
        pp = torch.dot(p, p) if p is not None else zero
        return torch.stack([gg / scale**2, gp / scale, pp]).double()

    def _working(self, tensor: Tensor, name: str) -> Tensor:
        """In the precision that is calculated with."""
        return tensor.to(torch.promote_types(self._parameters[name].dtype, torch.float32))

    def _check(self, gradients: Mapping[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            if gradient.is_sparse or gradient.is_complex():
                kind = "sparse" if gradient.is_sparse else str(gradient.dtype)
                raise TypeError(f"the gradient of {name} is {kind}, which cannot be predicted; use dense, real ones.")


def _all_finite(tensors: list[Tensor]) -> bool:
    """Whether no value is infinite or NaN."""
    if not tensors:
        return True
    norms = torch._foreach_norm(tensors, math.inf)
    return bool(torch.stack([norm.float().to(norms[0].device) for norm in norms]).isfinite().all())
