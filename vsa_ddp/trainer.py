"""The training loop's side of the phases: one decision per step, the same on all ranks, then backward or prediction.

What travels, beside DDP's own gradients: at the end of each step one message of some hundred bytes, which says what the
rank measured and in which phase it will go on. It is received before the next collective of DDP's, or a step later when
there is none, and what it says decides the phase after that. So no rank waits for it, no rank decides from what it
alone knows, and ranks that part raise before they wait for each other.
"""

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from vsa_ddp.agreement import StepAgreement, check_agreement, digest, fingerprint
from vsa_ddp.config import PhaseConfig
from vsa_ddp.names import averaged_parameters, describe
from vsa_ddp.phase import Measured, Phase, PhaseSchedule, StepInfo, Verdict
from vsa_ddp.predictor import GradientPredictor
from vsa_ddp.snapshot import Snapshot
from vsa_ddp.stats import PhaseStats
from vsa_ddp.version import __version__
from vsa_ddp.wires import make_cpu_twin

logger = logging.getLogger(__name__)


class Step:
    """One optimizer step. Made by `PhasedTrainer.step`."""

    def __init__(self, trainer: "PhasedTrainer", info: StepInfo) -> None:
        self._trainer = trainer
        self.info = info
        self.loss: Tensor | None = None
        """Sum of the losses given to `backward`, detached."""
        self.done = False
        """Whether the gradients are there."""

    @property
    def phase(self) -> Phase:
        """The same on all ranks."""
        return self.info.phase

    @property
    def predicted(self) -> bool:
        """Whether there is no backward pass: the forward pass may be left out too, on all ranks alike."""
        return self.info.phase is Phase.PREDICT

    def backward(self, loss: Tensor | None = None) -> None:
        """Backward pass and all-reduce, or else the predicted gradient into `.grad`.

        Call it once; or for each micro-batch of an accumulated gradient, all but the last inside `ddp_model.no_sync()`.
        Args: `loss`, not yet scaled where the trainer has a GradScaler. It may be None on a predicted step.
        Raises: ValueError if it is None on another, or the gradients are complete already.
        """
        if self.done:
            raise ValueError(
                "this step's gradients are complete; for several micro-batches call step.backward inside "
                "ddp_model.no_sync() for all but the last."
            )
        if loss is not None:
            self.loss = loss.detach() + (0.0 if self.loss is None else self.loss)
        elif not self.predicted:
            raise ValueError(f"a {self.phase} step needs its loss, got None; only predicted steps may do without.")
        self.done = self._trainer._backward(self.info, loss)


class PhasedTrainer:
    """Skips the backward pass on all ranks together, where predicted gradients are good enough.

        phases = PhasedTrainer(ddp_model, optimizer)
        for x, y in loader:
            with phases.step() as step:
                loss = loss_fn(ddp_model(x), y)
                step.backward(loss)
                optimizer.step()

    Inside a predicted step grad is disabled until `step.backward`, so the forward pass builds no graph, and nothing is
    sent. Every step begins with `optimizer.zero_grad()`. Whatever follows `step.backward` finds `.grad` as ever.

    Args:
        ddp_model: a DistributedDataParallel model, compiled or not, with or without a communication hook.
        optimizer: the one that steps its parameters.
        config: the same on every rank.
        scaler: the GradScaler, if there is one: `step.backward` scales the loss, or the prediction, by it.

    Making one is collective over the model's group, and blocks. Raises, on every rank: ValueError if settings or
    parameters differ between ranks; in later steps, if phase, step or prediction do. RuntimeError if a rank failed.
    """

    def __init__(
        self,
        ddp_model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        config: PhaseConfig | None = None,
        *,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        model = getattr(ddp_model, "_orig_mod", ddp_model)  # of torch.compile
        if not isinstance(model, DistributedDataParallel):
            raise TypeError(
                f"PhasedTrainer needs a DistributedDataParallel model, got {type(model).__name__}; wrap it first, "
                "DistributedDataParallel(model)."
            )
        self.config = config if config is not None else PhaseConfig()
        self.optimizer = optimizer
        self.scaler = scaler
        self.schedule = PhaseSchedule(self.config)
        self._parameters = dict(averaged_parameters(model))
        self.predictor = GradientPredictor(self._parameters.items(), self.config)
        self._section_start = Snapshot(model.module, optimizer)
        self._ddp = model
        self._dense_bytes = sum(p.nbytes for p in self._parameters.values())
        mine = {**vars(self.config), "parameter": describe(self._parameters.items()), "version": __version__}
        check_agreement(mine, model.process_group)
        self._agreement = StepAgreement(make_cpu_twin(model.process_group))
        self._seconds = {phase.value: 0.0 for phase in Phase}
        self._measuring = _Measuring()
        self._said = _Measuring()
        self._coming: StepInfo | None = None  # as the other ranks have been told
        self._heard: Measured | None = None
        self._loaded: Measured | None = None
        self._inside = False
        self._grad_was_enabled = True
        self._failure: str | None = None
        logger.info("%d parameters, %r", sum(p.numel() for p in self._parameters.values()), self.config)

    @contextlib.contextmanager
    def step(self) -> Iterator[Step]:
        """One optimizer step.

        Raises: ValueError or RuntimeError, see `PhasedTrainer`; ValueError if `step.backward` was not called.
        """
        if self._failure is not None or self._inside:
            raise RuntimeError(self._failure or "this step is inside another; leave that first.")
        start = time.perf_counter()
        if self._coming is None:
            self._coming = self._send()
        step = Step(self, self._coming)
        self._inside = True
        try:
            # DDP's forward pass may broadcast buffers
            if not step.predicted and self._ddp.will_sync_module_buffers():  # type: ignore[no-untyped-call]
                self._hear()
            if step.info.keeps:
                self._section_start.take()
            self.optimizer.zero_grad()
            with self._no_backward() if step.predicted else contextlib.nullcontext():
                yield step
            if not step.done:
                raise ValueError("the step ended without step.backward(loss) outside ddp_model.no_sync().")
            self._measuring.loss = step.loss
            self._hear()
            verdict = self.schedule.end_step(self._heard)
            self._heard = None
            self._section_start.settle(verdict, in_section=step.predicted)
            if verdict is Verdict.UNDO:  # and of this step's gradient nothing is left
                self.predictor.reset()
                self.optimizer.zero_grad()
                self._measuring = _Measuring()
            self._coming = self._send()
        except BaseException:
            self._fail(step.info)
            raise
        finally:
            self._inside = False
            self._seconds[step.phase] += time.perf_counter() - start

    # The parts of a step

    @contextlib.contextmanager
    def _no_backward(self) -> Iterator[None]:
        """No graph until the gradients are there, and no broadcast of buffers by DDP's forward pass."""
        syncs = self._ddp.require_forward_param_sync
        self._ddp.require_forward_param_sync = False
        self._grad_was_enabled = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        try:
            yield
        finally:
            torch.set_grad_enabled(self._grad_was_enabled)
            self._ddp.require_forward_param_sync = syncs

    def _backward(self, info: StepInfo, loss: Tensor | None) -> bool:
        """Returns whether the gradients are complete: not under `no_sync`."""
        complete: bool = self._ddp.require_backward_grad_sync
        if info.phase is Phase.PREDICT:
            if complete:
                self._predict(info)
                torch.set_grad_enabled(self._grad_was_enabled)
            return complete
        assert loss is not None
        if complete:
            self._hear()
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
        if complete and info.records:
            self._record(info)
        return complete

    def _predict(self, info: StepInfo) -> None:
        if self.scaler is not None:
            self.scaler.scale(torch.zeros((), device=next(iter(self._parameters.values())).device))  # it starts lazily
        # zeros if the only gradient so far was not finite, which the schedule hears a step later
        predicted = self.predictor.predict_gradient(step=info.total_step, scale=self._scale())
        for name, p in self._parameters.items():
            p.grad = predicted.get(name)
        self._measuring.bits = fingerprint(predicted.values())

    def _record(self, info: StepInfo) -> None:
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        found = self.predictor.take(gradients, info, scale=self._scale())
        self._measuring.rejected, self._measuring.moments = found.rejected, found.moments
        self._measuring.horizon, self._measuring.judges = found.horizon, found.judges

    def _scale(self) -> float:
        return 1.0 if self.scaler is None else self.scaler.get_scale()

    # What the ranks tell each other

    def _send(self) -> StepInfo:
        """Say what was measured in the last step, and which one comes. Returns that."""
        said, info = self._measuring, self.schedule.begin_step()
        same = {
            "step": info.total_step,
            "phase": info.phase.value,
            "settings": self.config,
            "gradients in the history": self.predictor.num_recorded,
            "last predicted gradient": digest(said.bits) if said.bits is not None else None,
        }
        loss = [0.0, 0.0] if said.loss is None else [1.0, float(said.loss)]
        moments = [0.0] * 4 if said.moments is None else [1.0, *said.moments]
        self._agreement.send(same, [*loss, float(said.rejected), *moments])
        self._said, self._measuring = said, _Measuring()
        return info

    def _hear(self) -> None:
        """Receive what all ranks said, once: before a collective of DDP's, or else at the end of the step."""
        if self._heard is not None:
            return
        try:
            num_losses, loss, rejected, num_measured, gg, gp, pp = self._agreement.receive()
        except (ValueError, RuntimeError) as error:
            self._failure = str(error)
            raise
        if self._loaded is not None:  # the ranks agreed on it before the state was saved
            self._heard, self._loaded = self._loaded, None
            return
        mean = loss / num_losses if num_losses else math.nan
        self._heard = Measured(
            loss=mean if math.isfinite(mean) else None,
            rejected=rejected > 0,
            moments=(gg / num_measured, gp / num_measured, pp / num_measured) if num_measured else None,
            horizon=self._said.horizon,
            judges=self._said.judges,
        )

    def _fail(self, info: StepInfo) -> None:
        """Tell the other ranks, who would wait for this one, unless it was they who told it."""
        if self._failure is None:
            self._failure = f"step {info.total_step} failed on this rank; go on from a checkpoint with a new trainer."
            with contextlib.suppress(RuntimeError):  # the reason why it failed may be that they are gone
                self._agreement.fail()

    # What the user asks

    def stats(self) -> PhaseStats:
        """Counts, lengths, quality of prediction, bytes and time so far."""
        return self.schedule.stats(self._dense_bytes, self._seconds)

    def state_dict(self) -> dict[str, Any]:
        """Copies, as plain tensors, numbers, strings and bytes: loads with `torch.load(..., weights_only=True)`.

        Between steps. The same on all ranks but for the seconds, so that one rank may save it for all; it waits until
        the others have ended the step too. Its keys and the shapes of its tensors are those of a new trainer, so that
        `torch.distributed.checkpoint` can save and load the trainer itself.
        """
        if self._inside or self._failure is not None:
            raise RuntimeError(self._failure or "a state is saved between steps, not inside one.")
        if self._agreement.under_way:
            self._hear()
        heard = self._heard or self._loaded
        return {
            "version": __version__,
            "settings": dict(vars(self.config)),
            "schedule": self.schedule.state_dict(),
            "predictor": self.predictor.state_dict(),
            "measured": list(heard) if heard is not None else None,
            "section_start": self._section_start.to_bytes(),
            "seconds": dict(self._seconds),
        }

    def load_state_dict(self, state: dict[str, Any], *, strict: bool = True) -> None:
        """Go on where `state` was saved, with the bits of a run without the break. On every rank, before any step.

        Settings stay this trainer's own; those that differ are logged as a warning. If not `strict`, so is another
        predictor's history, or that of other parameters: then the schedule goes on, and the history begins anew.
        Raises: ValueError if this trainer has begun, or there is such a history, and `strict`.
        """
        if self._coming is not None:
            raise ValueError(f"this PhasedTrainer is in use, at step {self.schedule.total_step}; load into a new one.")
        mine, saved = vars(self.config), state["settings"]
        for name in sorted(set(mine) | set(saved)):
            if mine.get(name) != saved.get(name):
                logger.warning(
                    "setting %s was %r in the loaded state and is %r now", name, saved.get(name), mine.get(name)
                )
        kept = self.predictor.load_state_dict(state["predictor"], strict=strict)
        self.schedule.load_state_dict(state["schedule"])
        if not kept:
            self.schedule.forget_history()
        if kept and self.schedule.may_undo:
            self._section_start.from_bytes(state["section_start"])
        if not self._section_start.held:
            self.schedule.forget_start()
        self._loaded = Measured(*state["measured"]) if state["measured"] is not None else None
        self._seconds = dict(state["seconds"])


@dataclass
class _Measuring:
    """What this rank finds out during a step, and says at its end."""

    loss: Tensor | None = None
    rejected: bool = False
    moments: tuple[float, float, float] | None = None
    horizon: int = 1
    judges: bool = False
    bits: Tensor | None = None
    """`fingerprint` of the predicted gradient."""
