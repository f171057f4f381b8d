"""What the hook keeps between steps: step counter, scales, codecs, byte counts; and how it is saved."""

import logging
import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket  # dist.GradBucket, which torch does not export to mypy
from torch.distributed.device_mesh import DeviceMesh

from vsa_ddp.agreement import check_agreement, digests
from vsa_ddp.codec import Codec
from vsa_ddp.config import VsaConfig, WireName
from vsa_ddp.kernels import Kernels, Rows, load_kernels, missing
from vsa_ddp.layout import is_compressed, plan_bucket
from vsa_ddp.names import ParameterNames, describe
from vsa_ddp.nodes import check_mesh
from vsa_ddp.peers import MANY_PEERS, find_peers, local_world_size
from vsa_ddp.probe import advise_group
from vsa_ddp.replicas import ReplicaCheck
from vsa_ddp.sigma import SharedSigma
from vsa_ddp.stats import ByteCounter, CompressionStats, Totals
from vsa_ddp.version import __version__
from vsa_ddp.whitening import Whitening
from vsa_ddp.wires import WIRES, Courier, Link, Message, Subject, num_groups_made

logger = logging.getLogger(__name__)


class VsaState:
    """State of `vsa_hook` for one DDP model.

    Args:
        process_group: the group that the DDP model uses; None for the default group. Looked up at the first bucket, so
            a state can be made, copied and unpickled before any group exists.
        config: the settings, the same on all ranks.
        mesh: a DeviceMesh of two dimensions, nodes and ranks of a node, over the ranks of the group; instead of
            `config.ranks_per_node`.

    Parameters are known by the names that `name_parameters` gives (`vsa_ddp.register` calls it), or else by the order
    in which DDP first shows them; with `find_unused_parameters` or several dtypes that order depends on the bucket
    size, so name them there. Nothing is kept by bucket: DDP may rebuild its buckets, and a checkpoint fits any.

    Copying and pickling leave the process group out, with a warning: the copy uses the default group until its
    `process_group` is set.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        config: VsaConfig | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        self.process_group = process_group
        self.config = config if config is not None else VsaConfig()
        self._mesh: list[list[int]] | None = None
        if mesh is not None:
            self._mesh = check_mesh(mesh.mesh.tolist(), self.config.ranks_per_node)
        self.step = 0
        self.whitening = Whitening(self.config.scale_decay)
        self.sigma = SharedSigma()
        self._replicas = ReplicaCheck(self.config.check_interval)
        self._counter = ByteCounter()
        self._names = ParameterNames()
        self._courier: Courier | None = None
        self._kernels: Kernels | None = None  # loaded at the first bucket, for its device
        self._chosen: WireName | None = None  # by wire="auto"
        self._last_bucket: int | None = None  # of the present step; None between steps
        self._codecs: dict[int, tuple[tuple[int, ...], Codec]] = {}  # bucket index -> ids of its parameters, its codec
        logger.info("%r", self)

    def __repr__(self) -> str:
        kernels = f", kernels={self._kernels.name!r}" if self._kernels is not None else ""
        return f"VsaState(step={self.step}{kernels}, config={self.config})"

    @property
    def courier(self) -> Courier:
        """What carries messages; made at the first bucket."""
        assert self._courier is not None
        return self._courier

    # What the hook asks

    def begin(self, bucket: GradBucket) -> tuple[Codec, Link, int]:
        """Check the bucket, and find the codec, the link and the step for it. The first call compares the ranks."""
        if isinstance(bucket, tuple):
            raise TypeError(
                "vsa_hook needs DDP's own reducer, but compiled autograd called it once per parameter; set "
                'torch._dynamo.config.optimize_ddp = "ddp_optimizer".'
            )
        buffer, parameters = bucket.buffer(), bucket.parameters()
        if buffer.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "vsa_hook cannot be captured in a CUDA graph, whose replays would all have one step's keys; leave "
                "backward out of the graph."
            )
        group = self.process_group if self.process_group is not None else dist.group.WORLD
        assert group is not None  # DDP cannot exist without one
        if self._courier is None or self._courier.group is not group:
            self._courier = self._meet(group, buffer)
        ids = tuple(map(id, parameters))
        known = self._codecs.get(bucket.index())
        if known is None or known[0] != ids:
            known = self._codecs[bucket.index()] = ids, self._make_codec(parameters, buffer)
        codec = known[1]
        # DDP may leave out buckets that no rank used (skip_all_reduce_unused_params), also the last one
        starts_step = self._last_bucket is None or bucket.index() <= self._last_bucket
        self.step += starts_step
        step = self.step - 1
        link = self._courier.link(self._counter, Subject(step, codec.layout.label))
        if starts_step:
            self._counter.start_step()
            self._replicas.finish(self._courier.inspection)
            if self._replicas.due(step):
                self._replicas.begin(self._names.parameters(), buffer, link, step)
        self._last_bucket = None if bucket.is_last() else bucket.index()
        self._names.complete |= bucket.is_last()
        self._counter.add(dense_bytes=buffer.nbytes, num_elements=buffer.numel())
        return codec, link, step

    def sends_exact(self, step: int) -> bool:
        """Whether this step travels uncompressed."""
        return self.config.wire == "dense" or step < self.config.exact_steps

    def measure_scales(self, codec: Codec, buffer: Tensor, step: int) -> Tensor:
        """This rank's scales to send along with the step, or an empty tensor when they are not due."""
        due = step & (step - 1) == 0 or step % self.config.scale_interval == 0 or step < self.config.exact_steps
        if self.config.whiten and self.config.wire != "dense" and due:
            return codec.mean_squares(buffer)
        return buffer.new_empty(0, dtype=torch.float32)

    def message(self, codec: Codec, rows: Rows, exact_E: Tensor, scales_S: Tensor, step: int) -> Message:
        """What to send, with what the wire asks for: the last step's standard deviations, keys for another rounding."""
        wire = self.courier.wire
        assert wire is not None
        sigma_T = self.sigma.of(codec.layout, exact_E.device) if wire.shared_sigma else None
        keys_TC = codec.fresh_keys(step) if wire.fresh_keys else None
        return Message(codec.kernels, rows, exact_E, scales_S, sigma_T, keys_TC, codec.config.sparsity)

    def update_scales(self, codec: Codec, step: int, mean_scales_S: Tensor, sigma_T: Tensor | None = None) -> None:
        """Take in the ranks' mean of `measure_scales`, and the standard deviations if the wire shares them."""
        if mean_scales_S.numel():
            self.whitening.update(codec.layout, mean_scales_S)
            codec.refresh_factors()
        is_whitened = step > 0 or not self.config.whiten  # if not, it is no measure for rows that will be
        if sigma_T is not None and is_whitened:
            self.sigma.update(codec.layout, sigma_T)

    def count_local_steps(self, dense_bytes: int, num_elements: int) -> None:
        """Gradients that stay on their ranks."""
        self._counter.add(dense_bytes=dense_bytes, num_elements=num_elements)

    # What the user asks

    def compression_stats(self) -> CompressionStats:
        """Bytes so far, dense and sent, and their quotient."""
        return self._counter.summary(self.step)

    def name_parameters(self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
        """Know the model's parameters by name, as `model.named_parameters()` gives them. Before the first step.

        Raises: ValueError if a loaded state belongs to other names or shapes.
        """
        self._names.assign(named_parameters)

    def state_dict(self) -> dict[str, Any]:
        """Copies, as plain tensors, numbers and strings: loads with `torch.load(..., weights_only=True)`.

        Once parameters have names it has the same keys and shapes at any step, as `torch.distributed.checkpoint` needs.
        """
        compressed = [item for item in self._names.shapes.items() if is_compressed(item[1], self.config)]
        wire = WIRES.get(self._chosen or self.config.wire)
        if self.config.whiten and self.config.wire != "dense":
            self.whitening.prepare(compressed)
        if self.config.wire == "auto" or (wire is not None and wire.shared_sigma):
            blocks = [
                (s.name, s.num_dims // self.config.rotation_block)
                for s in plan_bucket(tuple(compressed), self.config).slices
            ]
            self.sigma.prepare(blocks)
        return {
            "version": __version__,
            "step": self.step,
            "chosen_wire": self._chosen,
            "totals": asdict(self._counter.totals),
            "settings": dict(vars(self.config)),
            "shapes": {name: list(shape) for name, shape in self._names.shapes.items()},
            "scales": self.whitening.state_dict(),
            "sigma": self.sigma.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], *, strict: bool = True) -> None:
        """Continue where `state` was saved: the next gradient has the bits it would have had without the break.

        Settings stay this state's own; those that differ are logged as a warning. Call it on every rank alike, with a
        new DDP model, before or after `register_comm_hook`. With `strict=False` parameters may have been added, taken
        away, renamed or reshaped: the others go on with their scales, and these begin without.
        Raises: ValueError if this state has served a step already, or knows parameters of other names or shapes.
        """
        if absent := sorted(self.state_dict().keys() - state.keys()):
            raise ValueError(f"this is not what VsaState.state_dict gives: it has no {', '.join(absent)}.")
        if self._courier is not None:
            raise ValueError(
                f"this VsaState is in use, at step {self.step}; load into a new one that is registered with a new DDP "
                "model, on every rank."
            )
        saved_shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}
        same = self._names.load(saved_shapes, strict=strict)
        mine, saved = vars(self.config), state["settings"]
        for name in sorted(set(mine) | set(saved)):
            if mine.get(name) != saved.get(name):
                logger.warning(
                    "setting %s was %r in the loaded state and is %r now", name, saved.get(name), mine.get(name)
                )
        self.step = state["step"]
        self._chosen = state["chosen_wire"] if self.config.wire == "auto" else None
        self._counter = ByteCounter(Totals(**state["totals"]))
        # what was measured is no measure for rows that are whitened otherwise
        known = same if mine["whiten"] == saved.get("whiten") else ()
        self.whitening.load_state_dict({name: pair for name, pair in state["scales"].items() if name in known})
        self.sigma.load_state_dict({name: sigma for name, sigma in state["sigma"].items() if name in known})

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            logger.warning("the process group is not copied with a VsaState; the copy uses the default group")
        return {"config": self.config, "mesh": self._mesh, "state": self.state_dict()}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.__init__(None, saved["config"])  # type: ignore[misc]
        self._mesh = saved["mesh"]
        self.load_state_dict(saved["state"])

    def _meet(self, group: dist.ProcessGroup, buffer: Tensor) -> Courier:
        """Compare the ranks, find the nodes, and make what carries messages. Collective, blocks, once."""
        device = buffer.device
        check_agreement(self._mine(group, device), group)
        self._kernels = load_kernels(self.config.backend, device)
        nodes, num_peers = find_peers(group, self.config, self._mesh)
        if nodes and num_peers == 1:
            logger.warning("all %d ranks are one node: gradients lose precision and no byte is saved", group.size())
        if self.config.wire == "auto" and self._chosen is None:
            self._chosen = self._choose_wire(group, buffer, num_peers)
        if self.config.wire == "all_gather" and num_peers > MANY_PEERS and dist.get_rank(group) == 0:
            logger.warning(
                'a rank receives %d packets by wire="all_gather", but less than two by "two_shot", with more noise; '
                '"auto" weighs them for this link',
                num_peers - 1,
            )
        courier = Courier(group, device, WIRES.get(self._chosen or self.config.wire), nodes)
        if self.config.check_interval:
            # not counted, as the settings are not: a resumed run has the bytes of one without a break
            self._replicas.begin(self._names.parameters(), buffer, courier.link(ByteCounter()), self.step)
            self._replicas.finish(courier.inspection)
        where = f" in {num_peers} nodes" if nodes else ""
        logger.info("%d ranks%s, by %r, backend %s", group.size(), where, courier.wire, self._kernels.name)
        return courier

    def _choose_wire(self, group: dist.ProcessGroup, buffer: Tensor, num_peers: int) -> WireName:
        """What suits the link and the size, the same on all ranks. Collective, blocks."""
        # without names the first bucket stands for the model: DDP fills it with all parameters, or up to its cap
        num_elements = sum(math.prod(shape) for shape in self._names.shapes.values()) or buffer.numel()
        advice = advise_group(
            group,
            buffer.device,
            num_elements,
            num_peers,
            gbit_per_s=self.config.link_gbit,
            **self.config.asked(),
        )
        (logger.info if advice.pays else logger.warning)('wire="auto" takes %s: %s', advice.wire, advice)
        return advice.wire

    def _make_codec(self, parameters: list[Tensor], buffer: Tensor) -> Codec:
        """The codec of a bucket that was not seen before.

        Raises: TypeError for sparse or complex gradients; ValueError for parameters of another model.
        """
        names = self._names.of(parameters)
        if buffer.is_sparse:
            raise TypeError(
                f"gradients of {', '.join(names)} are sparse, which vsa_hook cannot bundle; use sparse=False."
            )
        for name, p in zip(names, parameters, strict=True):
            if p.is_complex():
                raise TypeError(
                    f"parameter {name} is {p.dtype}, but vsa_hook compresses real numbers; store it as a real tensor "
                    "and view it with torch.view_as_complex in forward."
                )
        config = self.config.for_wire(self._chosen) if self._chosen else self.config
        layout = plan_bucket(tuple((name, self._names.shapes[name]) for name in names), config)
        self.whitening.to(layout, buffer.device)
        assert self._kernels is not None
        logger.info("bucket of %d elements: %d exact, %d trits", buffer.numel(), layout.num_exact, layout.num_dims)
        return Codec(layout, config, self.whitening, buffer.device, self._kernels)

    def _mine(self, group: dist.ProcessGroup, device: torch.device) -> dict[str, Any]:
        """What must be equal on all ranks before the first bucket is sent."""
        scales = {f"{name} by {side}": t for name, by in self.whitening.state_dict().items() for side, t in by.items()}
        loaded = {**scales, **self.sigma.state_dict()}
        on_cuda = device.type == "cuda"
        wire = WIRES.get(self.config.wire)
        flat = self.config.ranks_per_node == 1 and self._mesh is None
        # Ranks of a part of the job make their groups without the others, and name them by how many they made before
        apart = group is not dist.group.WORLD and not (flat and wire is not None and wire.num_rounds == 1)
        return {
            **self.config.of_all_ranks(),
            "chosen wire": self._chosen,
            "process groups made": num_groups_made() if apart else None,
            "mesh": self._mesh,
            "LOCAL_WORLD_SIZE": local_world_size(self.config),
            "backend": missing(self.config.backend, device) or "there",
            "version": __version__,
            "step": self.step,
            "parameter": describe(self._names.parameters()),
            "loaded scales of": digests(loaded.items()),
            # Other arithmetic rounds otherwise, and the ranks' gradients would part
            "torch": torch.__version__.split("+")[0],
            "device": torch.cuda.get_device_name(device) if on_cuda else torch.backends.cpu.get_cpu_capability(),
        }
