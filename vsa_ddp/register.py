"""One line for a training script: settings from the optimizer's family, then the hook on the DDP model."""

import logging
import math
from typing import Any, Literal

from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import ASGD, LBFGS, SGD, Optimizer, Rprop

from vsa_ddp.config import VsaConfig, WireName
from vsa_ddp.hook import vsa_hook
from vsa_ddp.names import averaged_parameters
from vsa_ddp.nodes import check_mesh
from vsa_ddp.peers import default_wire
from vsa_ddp.rates import num_roundings, unbiased_nmse
from vsa_ddp.state import VsaState

logger = logging.getLogger(__name__)

Family = Literal["adam", "sgd"]

FAMILY_SETTINGS: dict[Family, dict[str, Any]] = {
    # Adam divides by the root of the second moment: it wants the right mean and noise in proportion to the scale
    "adam": {"whiten": True, "gain": "unbiased"},
    # SGD takes noise as it comes: it wants the least, and no more of it where the gradient is small
    "sgd": {"whiten": False, "gain": "shrunk"},
}


# Where wrappers keep the real one: ZeroRedundancyOptimizer, Accelerate's and Lightning's, SAM's
_WRAPPED = ("optim", "optimizer", "base_optimizer")


def layers(optimizer: Optimizer | None) -> list[Any]:
    """The optimizer's wrappers from outside in, and at the end itself; None alone for None.

    Raises: TypeError for what is no optimizer.
    """
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"optimizer must be a torch Optimizer or None, got {type(optimizer).__name__}; of several pass one, and "
            "settings by name."
        )
    found: list[Any] = [optimizer]
    while inner := next(filter(None, (getattr(found[-1], name, None) for name in _WRAPPED)), None):
        found.append(inner)
    return found


def optimizer_family(optimizer: Optimizer | None) -> Family:
    """ "sgd" for torch's SGD and its kin and for what has SGD in its name, "adam" for all others and for None.

    Raises: TypeError for what is no optimizer.
    """
    optimizer = layers(optimizer)[-1]
    plain = isinstance(optimizer, SGD | ASGD | Rprop | LBFGS) or "SGD" in type(optimizer).__name__
    return "sgd" if plain else "adam"


def learning_rate_factor(
    compression: float | None = None,
    *,
    bundle: int | None = None,
    sparsity: int | None = None,
    wire: WireName = "all_gather",
) -> float:
    """What to multiply an Adam-like optimizer's learning rate by, with the same settings that `register` is given.

    1.6 for the default, 1.9 for compression=80, 3.4 for 320. The unbiased decode's noise multiplies the second moment
    by 1 + its NMSE, and Adam's steps shrink by the root of that; this gives it back. For wire="auto" it is that of a
    wire that rounds once.
    Raises: ValueError for an impossible setting.
    """
    if wire == "dense":
        return 1.0
    config = VsaConfig(compression=compression, bundle=bundle, sparsity=sparsity, wire=wire)  # type: ignore[arg-type]
    return math.sqrt(1.0 + unbiased_nmse(config.bundle, config.sparsity, num_roundings(config.wire)))


def register(
    ddp_model: DistributedDataParallel,
    optimizer: Optimizer | None = None,
    *,
    mesh: DeviceMesh | None = None,
    **settings: Any,
) -> VsaState:
    """Register `vsa_hook` on a DDP model, with settings that suit the optimizer, and return its state.

    Args:
        optimizer: decides whitening and gain by its family; None means Adam-like.
        mesh: nodes and ranks of a node, see `VsaState`; instead of `ranks_per_node`.
        settings: fields of `VsaConfig` that override the choice, `compression=32` for example. If neither a wire nor
            a compression (nor bundle nor sparsity) is given, all of a job's more than 4 ranks, or nodes, begin with
            wire="two_shot" and its compression of 32: bytes do not grow with the ranks, and the noise is that of the
            default where gradients have little in common. A compression alone keeps "all_gather".

    With an Adam-like optimizer, multiply the learning rate by `learning_rate_factor`, of the same settings.
    Raises: TypeError if the model is not a DistributedDataParallel, or the optimizer none; ValueError for an impossible
        setting, or an optimizer that steps inside a hook of its own; RuntimeError if the model has a hook already.
    """
    if not isinstance(ddp_model, DistributedDataParallel):
        raise TypeError(
            f"register needs a DistributedDataParallel model, got {type(ddp_model).__name__}; "
            "wrap it first, DistributedDataParallel(model), and call torch.compile last."
        )
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise ValueError(
            "ZeroRedundancyOptimizer with overlap_with_ddp=True steps inside a hook of its own, and its step() does "
            "nothing; make it with overlap_with_ddp=False."
        )
    family = optimizer_family(optimizer)
    config = VsaConfig.from_settings({**FAMILY_SETTINGS[family], **settings})
    if "wire" not in settings and config.compression == "default":
        members = None if mesh is None else check_mesh(mesh.mesh.tolist(), config.ranks_per_node)
        config = config.for_wire(default_wire(ddp_model.process_group, config, members))
    state = VsaState(ddp_model.process_group, config, mesh)
    state.name_parameters(averaged_parameters(ddp_model))
    try:
        ddp_model.register_comm_hook(state, vsa_hook)
    except RuntimeError as error:
        raise RuntimeError(
            f"{error} This model has a hook already: one of yours, or DDP's own for mixed_precision= or an optimizer "
            "in backward."
        ) from error
    if family == "adam" and config.wire != "dense":
        factor = learning_rate_factor(bundle=config.bundle, sparsity=config.sparsity, wire=config.wire)
        logger.info(
            "learning rate: times %.2f suits bundle=%d, sparsity=%d, wire=%r",
            factor,
            config.bundle,
            config.sparsity,
            config.wire,
        )
    return state
