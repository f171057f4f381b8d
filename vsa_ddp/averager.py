"""Local steps: every rank trains by itself, and every so many steps what they changed is averaged, compressed.

parameters at the last average -- minus the parameters now --> lengthened, where Adam made them too short -->
the hook's whole data flow --> subtracted on every rank

Gradients need no all-reduce then. What is averaged is sent as the hook sends gradients, so the bytes fall by the period
times the compression.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.model_averaging.averagers import ModelAverager
from torch.optim import Optimizer

from vsa_ddp.agreement import check_agreement, digests
from vsa_ddp.alignment import SecondMoment
from vsa_ddp.changes import fill_buckets
from vsa_ddp.config import VsaConfig
from vsa_ddp.hook import vsa_hook
from vsa_ddp.names import averaged_parameters, describe
from vsa_ddp.peers import default_wire, local_world_size
from vsa_ddp.register import FAMILY_SETTINGS, Family, layers, optimizer_family
from vsa_ddp.state import VsaState
from vsa_ddp.stats import CompressionStats
from vsa_ddp.version import __version__

logger = logging.getLogger(__name__)

COMPRESSION = 256.0
"""Where nothing is said: four times that of gradients, since no optimizer divides by the noise."""
_SAVED = {"step", "steps_apart", "last_apart", "steps_together", "common", "alignment", "state"}


def default_settings(family: Family) -> dict[str, Any]:
    """Settings of an averager that are not `VsaConfig`'s own, beside `COMPRESSION`."""
    return {"exact_steps": 0, "whiten": FAMILY_SETTINGS[family]["whiten"]}


class VsaModelAverager(ModelAverager):
    """Averages the ranks' models every `period` steps, in place of their gradients in each.

        averager = vsa_ddp.VsaModelAverager(model, optimizer)
        for x, y in loader:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
            averager.average_parameters()
        averager.synchronize()

    The model is a plain one, or a DDP model whose forward and backward run inside `no_sync()`: gradients stay on their
    rank, and so do optimizer states and buffers. All ranks call `average_parameters` after every step, also those whose
    step was skipped. The parameters are those that required a gradient when the averager was made; after others are
    unfrozen, or the model was loaded from elsewhere, make a new one.

    Args:
        model: the same on every rank, from the same parameters on.
        optimizer: this rank's. Decides by its family: changes by torch's SGD, and by what has SGD in its name, are
            neither whitened nor lengthened, those by all others are both, and where this is None they are whitened.
            `whiten=False` is right for an SGD by another name, and turns both off.
        period: steps between two averages. 1 averages the updates of every step.
        rescale: lengthen what ranks that divide by second moments of their own make too short, parameter by parameter:
            in averages of every step by 1 to the root of the ranks' number, as `vsa_ddp.alignment` finds, in averages
            of several by less. Weight decay is lengthened with the rest. None decides by the optimizer.
        warmup_steps: first steps, in which DDP averages gradients as ever and this one only counts.
        process_group: the ranks; None for all.
        settings: fields of `VsaConfig`; `compression` is 256 if neither it nor `bundle` nor `sparsity` is given, and
            `exact_steps` is 0, since an exact average has the bytes of 150 and more; `gain` is "unbiased" for every
            optimizer, since nothing makes up for steps that "shrunk" makes too short; `wire` is "two_shot" where the
            ranks are all of a job's, and more than 4, or in more than 4 nodes. Where settings speak of steps, these are
            averages: after every `check_interval` of them the ranks are compared.

    It is one of torch's model averagers, so `PostLocalSGDOptimizer(optimizer, averager)` takes it too. Keeps a copy of
    the parameters: where all ranks were last. Source: local SGD, Stich 2018, arXiv:1805.09767; its compressed changes,
    Basu et al. 2019, arXiv:1906.02367.

    Making one is collective over the group, and blocks. Raises: ValueError for an impossible setting, or an optimizer
    that the ranks share; and on every rank if settings or parameters differ between ranks. TypeError for complex
    parameters, or an `optimizer` that is none.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Optimizer | None,
        *,
        period: int = 1,
        warmup_steps: int = 0,
        rescale: bool | None = None,
        process_group: dist.ProcessGroup | None = None,
        **settings: Any,
    ) -> None:
        if not isinstance(rescale, bool | None):
            raise ValueError(f"rescale must be True, False or None, got {rescale!r}.")
        for name, value, least in (("period", period, 1), ("warmup_steps", warmup_steps, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an int of at least {least}, got {value!r}.")
        _check_optimizer(optimizer, model)
        super().__init__(process_group)
        self.period = period
        self.warmup_steps = warmup_steps
        family = optimizer_family(optimizer)
        settings = {**default_settings(family), **settings}
        if all(settings.get(name) is None for name in ("compression", "bundle", "sparsity")):
            settings["compression"] = COMPRESSION
        config = VsaConfig.from_settings(settings)
        if "wire" not in settings:
            config = config.for_wire(default_wire(self.process_group, config))
        if rescale and config.gain == "shrunk":
            raise ValueError('rescale=True needs gain="unbiased", got "shrunk", which would seem to be noise.')
        known = optimizer is not None and family == "adam"
        self._rescale = known and config.whiten and config.gain == "unbiased" if rescale is None else rescale
        self._state = VsaState(process_group, config)
        self._model = model
        self._parameters = _trained(model)
        mine = {"period": period, "warmup_steps": warmup_steps, "rescale": self._rescale, "version": __version__}
        mine["LOCAL_WORLD_SIZE"] = local_world_size(config)
        shapes = {"parameter": describe(self._parameters.items())}
        values = {"parameters at the start:": digests(self._parameters.items())}
        check_agreement({**mine, **config.of_all_ranks(), **shapes, **values}, self.process_group)
        self._common = {name: p.detach().clone().requires_grad_() for name, p in self._parameters.items()}
        self._state.name_parameters(self._common.items())  # type: ignore[arg-type]
        self._buckets = fill_buckets(self._common, self._parameters)
        if self._rescale:
            ranks = dist.get_world_size(self.process_group)
            logger.info("changes are lengthened, by a factor of up to %.2f", 1 + (ranks**0.5 - 1) / period)
            for bucket in self._buckets:
                bucket.align(ranks)
        self._second_moment = SecondMoment(layers(optimizer)[-1], warmup_steps)
        self._num_bytes = sum(p.nbytes for p in self._parameters.values())
        self._num_elements = sum(p.numel() for p in self._parameters.values())
        self._counted = 0  # what `step` is, if nobody else sets it
        self._steps_apart = 0
        self._last_apart = 0  # at the last average
        self._failure: BaseException | None = None

    def __repr__(self) -> str:
        return f"VsaModelAverager(step={self.step}, period={self.period}, rescale={self._rescale}, state={self._state})"

    @torch.no_grad()
    def average_parameters(self, params: Iterable[Any] | None = None) -> None:
        """Count a step, and average if it is the last of a period. After every optimizer step, on all ranks alike.

        Args:
            params: not needed; parameters or param_groups, as torch's averagers get them.

        Raises: see `synchronize`; ValueError if `params` has one that is not the model's, or if something else has set
            `step`.
        """
        self._check(params)
        if self.step != self._counted:
            raise ValueError(
                f"step was set to {self.step}, as PostLocalSGDOptimizer does when it is loaded, but this averager is "
                f"at {self._counted}; load its own state too, or it would take what was loaded for a change."
            )
        self._counted = self.step = self.step + 1
        if self.step <= self.warmup_steps:
            if self.step == self.warmup_steps:
                for name, common in self._common.items():
                    common.copy_(self._parameters[name])
            return
        self._steps_apart += 1
        if (self.step - self.warmup_steps) % self.period == 0:
            self.synchronize()

    @torch.no_grad()
    def synchronize(self) -> None:
        """Average now, if there was a step since the last average: before an evaluation, and after the last step.

        Raises: ValueError, on every rank, if the ranks are not at the same step; or if the model trains a parameter
            that it did not train when this was made. RuntimeError as `vsa_hook` does, and if an average before this
            one failed here.
        """
        self._raise_failure()
        self._meet()
        if not self._steps_apart:
            return
        skipped = self._steps_apart - 1
        self._state.count_local_steps(skipped * self._num_bytes, skipped * self._num_elements)
        if self._steps_apart != self._last_apart:
            self._state.sigma.forget()  # the change of one step is no measure for that of twenty
        self._last_apart, self._steps_apart = self._steps_apart, 0
        try:
            self._average(self._second_moment.own_share(self.step - self.warmup_steps))
        except BaseException as failure:  # this rank has some of the means, and the others may have all of them
            self._failure = failure
            raise

    def _average(self, own_share: float) -> None:
        futures = []
        for bucket in self._buckets:
            bucket.begin(self._last_apart, own_share)
            futures.append(vsa_hook(self._state, bucket))
        for bucket, future in zip(self._buckets, futures, strict=True):
            future.wait()
            bucket.finish()
        if self._device.type == "cuda":  # what it found out, nobody would ask for after the last average
            torch.cuda.synchronize(self._device)
            self._state.courier.inspection.raise_late()

    def compression_stats(self) -> CompressionStats:
        """Bytes so far, against those of a gradient in every step after the warm-up; `steps` are rounds."""
        return self._state.compression_stats()

    def state_dict(self) -> dict[str, Any]:
        """Loads with `torch.load(..., weights_only=True)`. Every rank saves this and its optimizer, and between two
        averages its model too. Raises: RuntimeError after an average that failed here."""
        self._raise_failure()
        common = {name: t.detach().clone() for name, t in self._common.items()}
        alignment = {name: t.clone() for bucket in self._buckets for name, t in bucket.alignment().items()}
        return {
            "step": self.step,
            "steps_apart": self._steps_apart,
            "last_apart": self._last_apart,
            "steps_together": self._second_moment.steps_together,
            "common": common,
            "alignment": alignment,
            "state": self._state.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on where `saved` was. Into a new averager, on every rank alike; the models are loaded after it was made.

        Raises: ValueError if it is no such state, belongs to another model, or this averager was used.
        """
        if absent := sorted(_SAVED - saved.keys()):
            raise ValueError(f"this is not what VsaModelAverager.state_dict gives: it has no {', '.join(absent)}.")
        self._state.load_state_dict(saved["state"])
        self._counted = self.step = saved["step"]
        self._steps_apart, self._last_apart = saved["steps_apart"], saved["last_apart"]
        for name, common in self._common.items():
            common.copy_(saved["common"][name])
        self._second_moment.steps_together = saved["steps_together"]
        if bool(saved["alignment"]) != self._rescale:
            logger.warning(
                "the state was saved with rescale=%s, this averager has %s", not self._rescale, self._rescale
            )
        for bucket in self._buckets:
            bucket.load_alignment(saved["alignment"])

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RuntimeError(
                f"an average failed on this rank: {self._failure!r}; go on from a checkpoint, on every rank."
            ) from self._failure

    @property
    def _device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    def _meet(self) -> None:
        """Make sure that all ranks average the same step. Collective, blocks. Raises: see `synchronize`."""
        known = {id(p) for p in self._parameters.values()}
        new = [name for name, p in averaged_parameters(self._model) if id(p) not in known]
        count = torch.tensor([1, self.step, self.step**2, bool(new)], device=self._device)
        dist.all_reduce(count, group=self.process_group)
        ranks, total, squares, changed = count.tolist()
        if changed:
            raise ValueError(
                f"{', '.join(new[:3]) or 'a parameter of another rank'} was unfrozen or replaced after the averager "
                "was made, and would never be averaged; make a new averager then, on every rank."
            )
        if ranks * squares != total**2:
            remedy = (
                "Call average_parameters equally often on each: cut every epoch to that of the rank with least data."
            )
            check_agreement({"step": self.step}, self.process_group, "average in the same step", remedy)

    def _check(self, params: Iterable[Any] | None) -> None:
        """Raises: ValueError for parameters that are not the model's."""
        entries = [] if params is None else list(params)
        given = [p for entry in entries for p in (entry["params"] if isinstance(entry, dict) else [entry])]
        known = {id(p) for p in self._model.parameters()} if given else set()
        for p in given:
            if id(p) not in known:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is none of the model's; make the averager with the model "
                    "that is trained."
                )


def _check_optimizer(optimizer: Optimizer | None, model: torch.nn.Module) -> None:
    """Raises: ValueError for one that ranks share, or that steps another model."""
    if optimizer is None:
        return
    # torch's ZeroRedundancyOptimizer, whose import warns
    if any(hasattr(layer, "_overlap_with_ddp") for layer in layers(optimizer)):
        raise ValueError(
            "ZeroRedundancyOptimizer sends every rank's share of the parameters in each step, so ranks cannot step "
            "alone; give every rank an optimizer of its own."
        )
    known = {id(p) for p in model.parameters()}
    is_known = [id(p) in known for group in optimizer.param_groups for p in group["params"]]
    if is_known and not any(is_known):
        raise ValueError(
            "the optimizer has none of the model's parameters, which it would never step; make it of those that are "
            "averaged."
        )
    if not all(is_known):
        logger.warning(
            "%d of the optimizer's %d parameters are none of the model's: this averager leaves them to each rank",
            is_known.count(False),
            len(is_known),
        )


def _trained(model: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters to average, by name."""
    named = averaged_parameters(model)
    if not named:
        raise ValueError("the model has no parameter that requires a gradient, so there is nothing to average.")
    for name, p in named:
        if p.is_complex():
            raise TypeError(f"parameter {name} is {p.dtype}, but only reals can be averaged; use torch.view_as_real.")
    if len(devices := {p.device for _, p in named}) > 1:
        raise ValueError(f"the parameters are on {', '.join(map(str, devices))}, but one averager has one device.")
    return dict(named)
