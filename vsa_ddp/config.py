"""Settings of the hook and of the phases: frozen dataclasses, every default and every bound."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vsa_ddp.nodes import RanksPerNode
from vsa_ddp.rates import MAX_BUNDLE, NMSES, least_noise

Gain = Literal["unbiased", "shrunk"]
Backend = Literal["auto", "torch", "numba", "triton"]
WireName = Literal["all_gather", "all_reduce", "two_shot", "auto", "dense"]
PredictorName = Literal["last", "ema", "momentum", "linear"]
Adapt = Literal["gate", "trend", "none"]
HistoryDtype = Literal["float32", "bfloat16", "trits"]

COMPRESSIONS: dict[str, float] = {"all_gather": 64.0, "all_reduce": 40.0, "two_shot": 32.0}
"""By wire, where nothing is said: noise over signal is 1.5, so a gradient of mostly noise is as good as one from two
fifths of the batch."""


@dataclass(frozen=True, kw_only=True)
class VsaConfig:
    """How gradients are compressed. The same on every rank: the first step compares them and raises if they differ.

    Raises: ValueError naming the setting, the rule and the value.
    """

    compression: float | Literal["default"] | None = None
    """How many times fewer bits than float32's an element has, at least. Chooses `bundle` and `sparsity`, for the least
    noise by the wire. Levels, 16 bits for each rotation block, padding and small parameters come on top. None if those
    two were given instead; "default" if nothing was: 64, 40 for "all_reduce" and 32 for "two_shot", all with one noise.
    """
    bundle: int = None  # type: ignore[assignment]  # `__post_init__` chooses
    """B, how many slots share one hypervector. Given alone, all trits are sent: 20 * B times fewer bytes."""
    sparsity: int = None  # type: ignore[assignment]
    """n, a power of two up to 128: of every n trits the largest alone is sent, in 1 + log2 n bits. 1 sends all of them,
    1.6 bits each. Half the noise of a bundle that sends as little: bundle=1 with sparsity=16 sends what bundle=5 does.
    """
    wire: WireName = "all_gather"
    """How messages travel; `register` and `VsaModelAverager` begin with "two_shot" for more than 4 ranks or nodes (see
    there). "auto" takes what `advise` finds best for the number of ranks, the size of the model and
    the link, as stated in `link_gbit` or else measured at the first step, and logs why. "dense" compresses nothing and
    equals DDP without a hook, bit for bit; only where gradients stay in DDP's buckets (`gradient_as_bucket_view` and
    `zero_grad(set_to_none=False)`) and the world size is no power of two, DDP itself rounds otherwise by a unit in the
    last place."""
    link_gbit: float | None = None
    """What one rank's link carries each way, in Gbit/s, for `wire="auto"`; None measures it."""
    ranks_per_node: RanksPerNode = 1
    """So many consecutive ranks form a node and average their hypervectors in full precision before the wire; "local"
    takes torchrun's LOCAL_WORLD_SIZE. It pays where a node's own link is much faster than the network."""
    whiten: bool = True
    """Divide by the ranks' shared scale before bundling. Right for Adam-like optimizers, wrong for SGD."""
    gain: Gain = "unbiased"
    """"unbiased": the decoded gradient has the right mean (Adam-like). "shrunk": it has the least squared error, at
    1 / (1 + noise) of the length (SGD-like)."""
    exact_steps: int = 1
    """First steps that travel uncompressed. They measure the first scales; with 0 the first step has none, and
    its noise is spread over each matrix evenly."""
    rotation_block: int = 1024
    """Elements mixed by one Walsh-Hadamard transform."""
    min_numel: int = 1024
    """Parameters with fewer elements, and all that have one dimension or none, travel uncompressed."""
    scale_interval: int = 10
    """Steps between two measurements of the scales (also after steps 1, 2, 4, 8 ...)."""
    scale_decay: float = 0.9
    """Weight of the past in the scales' running mean."""
    check_interval: int = 100
    """Steps between two comparisons of the ranks' parameters, beside the one at the first step; 0 for none. If they
    differ, every rank raises and names the first."""
    seed: int = 0
    """Seed of the keys."""
    backend: Backend = "auto"
    """What calculates: "triton" on CUDA, "numba" on a CPU, "torch" on both; "auto" takes the fastest that is installed.
    The gradients are the same, bit for bit."""

    def __post_init__(self) -> None:
        block = self.rotation_block
        if not isinstance(block, int) or block < 128 or block > 16384 or block & (block - 1):
            raise ValueError(
                f"rotation_block must be a power of two in 128..16384 (larger ones are not exact), got {block!r}."
            )
        self._choose()
        for name, low, high in (
            ("bundle", 1, MAX_BUNDLE),
            ("exact_steps", 0, None),
            ("min_numel", 1, None),
            ("scale_interval", 1, None),
            ("check_interval", 0, None),
            ("seed", 0, 2**63 - 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} must be an int, got {value!r}.")
            if value < low or (high is not None and value > high):
                bounds = f"at least {low}" if high is None else f"in {low}..{high}"
                raise ValueError(f"{name} must be {bounds}, got {value}.")
        if not isinstance(self.sparsity, int) or self.sparsity not in NMSES:
            raise ValueError(f"sparsity must be a power of two in 1..128, got {self.sparsity!r}.")
        if self.sparsity > 1 and self.wire == "all_reduce":
            raise ValueError(
                f'wire="all_reduce" sums every trit and saves nothing where most are zero, but sparsity is '
                f'{self.sparsity}; use wire="all_gather" or "two_shot".'
            )
        if block < 8 * self.sparsity:
            raise ValueError(
                f"rotation_block must be at least 8 times the sparsity of {self.sparsity}, since eights of block codes "
                f"fill whole bytes, got {block}."
            )
        if not isinstance(self.scale_decay, float) or not 0.0 <= self.scale_decay < 1.0:
            raise ValueError(f"scale_decay must be a float in [0, 1), got {self.scale_decay!r}.")
        for name, choices in (("wire", get_args(WireName)), ("gain", get_args(Gain)), ("backend", get_args(Backend))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        if self.link_gbit is not None:
            if not isinstance(self.link_gbit, int | float) or not self.link_gbit > 0:
                raise ValueError(f"link_gbit must be a number greater than 0, got {self.link_gbit!r}.")
            if self.wire != "auto":
                raise ValueError(f'link_gbit is for wire="auto", but wire is {self.wire!r}; leave one of them out.')
        nodes = self.ranks_per_node
        if nodes != "local" and (not isinstance(nodes, int) or isinstance(nodes, bool) or nodes < 1):
            raise ValueError(f'ranks_per_node must be an int of at least 1 or "local", got {nodes!r}.')
        if nodes != 1 and self.wire == "dense":
            raise ValueError(f'wire="dense" has no nodes; leave out ranks_per_node, which is {nodes!r}.')
        if not isinstance(self.whiten, bool):
            raise ValueError(f"whiten must be True or False, got {self.whiten!r}.")

    def _choose(self) -> None:
        """Give `bundle` and `sparsity` their values where they were left out."""
        given: tuple[int | None, int | None] = self.bundle, self.sparsity
        compression = "default" if self.compression is None and given == (None, None) else self.compression
        least = COMPRESSIONS.get(self.wire, COMPRESSIONS["all_gather"]) if compression == "default" else compression
        if least is None:
            chosen = (1 if given[0] is None else given[0], 1 if given[1] is None else given[1])
        elif isinstance(least, bool) or not isinstance(least, int | float) or not 1 <= least < math.inf:
            raise ValueError(f"compression must be a number of at least 1, got {compression!r}.")
        else:
            chosen = least_noise(least, self.wire, self.rotation_block)
            if given not in ((None, None), chosen):
                raise ValueError(
                    f"compression={compression!r} chooses a bundle of {chosen[0]} and a sparsity of {chosen[1]}, but "
                    f"they are {given[0]!r} and {given[1]!r}; leave out the one or the others."
                )
        for name, value in zip(("compression", "bundle", "sparsity"), (compression, *chosen), strict=True):
            object.__setattr__(self, name, value)

    def asked(self) -> dict[str, Any]:
        """What decides the code: the compression, or else bundle and sparsity; nothing if nothing was given."""
        if self.compression == "default":
            return {}
        if self.compression is not None:
            return {"compression": self.compression}
        return {"bundle": self.bundle, "sparsity": self.sparsity}

    def of_all_ranks(self) -> dict[str, Any]:
        """The settings that ranks must share: all but the backend, since all have its bits."""
        return {name: value for name, value in vars(self).items() if name != "backend"}

    def for_wire(self, wire: WireName) -> "VsaConfig":
        """The same for a wire, which compression chooses another code for."""
        code = {"compression": None, "bundle": None, "sparsity": None, **self.asked()}
        return dataclasses.replace(self, wire=wire, link_gbit=None, **code)

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "VsaConfig":
        """The config with `settings` over the defaults. Raises ValueError for a name that does not exist."""
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(settings) - set(names)):
            raise ValueError(f"unknown setting {', '.join(unknown)}; the settings are {', '.join(names)}.")
        return cls(**settings)


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """When to predict, and how. The same on every rank: `PhasedTrainer` compares them and raises if they differ.

    A cycle has `full_steps` backward passes and then a section of `predict_steps`, in which every `correct_every`
    predictions are followed by a correction; a correction closes it. Raises: ValueError naming setting, rule and value.
    """

    warmup_steps: int = 10
    """First steps, all with a backward pass."""
    full_steps: int = 5
    """Backward passes at the start of a cycle."""
    predict_steps: int = 20
    """Steps of the section that follows, corrections inside it included. 0 is plain training. With `adapt="gate"` the
    most that there may be: it begins with none."""
    correct_every: int = 5
    """Predictions between two corrections."""
    adapt: Adapt = "gate"
    """"gate": sections grow while the gradients that come bear predictions out and the loss does not rise, and shrink
    to nothing while not. "trend": lengths follow the loss alone. "none": they stay as they are."""
    min_slope: float = 0.5
    """The gate's threshold for the slope g p / p p of true gradients against predictions, which may exceed 1 by no more
    than it may fall short of it. The gradient's own noise does not change the slope: above a half, a prediction is
    nearer to the gradient without that noise than zero is."""
    roll_back: bool = True
    """The gate's: predicted steps are undone if their correction shows that gradients turned against the predictions
    and the loss rose by a tenth. Costs a copy of parameters, buffers and optimizer state while a section lasts."""
    predictor: PredictorName = "ema"
    """"last" gradient; "ema", the decayed mean of all; "momentum", the last one and a damped trend; "linear", a line
    through all of them by weighted least squares."""
    decay: float = 0.95
    """Weight of a gradient that is one step older, for "ema" and "linear"."""
    damping: float = 0.9
    """Share of the last change that goes on for another step, for "momentum"."""
    correction: float = 0.0
    """Share of the mean error of past predictions that is added to the next ones: 0 saves a buffer of the gradient's
    size."""
    history_dtype: HistoryDtype = "float32"
    """How the predictor stores its buffers of the gradient's size: one for "last" and "ema", two for the others,
    and one more with a `correction`. "trits" are 4.9 bits per element, rounded anew with every gradient."""

    def __post_init__(self) -> None:
        for name, low, remedy in (
            ("warmup_steps", 0, "0 starts with a cycle"),
            ("full_steps", 1, "a prediction needs a gradient to start from"),
            ("predict_steps", 0, "0 is plain training"),
            ("correct_every", 1, "predict_steps or more means one correction, at the end of each section"),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} must be an int, got {value!r}.")
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}; {remedy}.")
        for name in ("decay", "damping", "correction"):
            value = getattr(self, name)
            if not isinstance(value, float | int) or isinstance(value, bool) or not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be a number in [0, 1], got {value!r}.")
        if not self.decay:
            raise ValueError('decay must be greater than 0, got 0; predictor="last" forgets all but one gradient.')
        if not isinstance(self.roll_back, bool):
            raise ValueError(f"roll_back must be True or False, got {self.roll_back!r}.")
        slope = self.min_slope
        if not isinstance(slope, float | int) or isinstance(slope, bool) or not slope >= 0.0:
            raise ValueError(
                f'min_slope must be a number of at least 0, got {slope!r}; adapt="none" predicts whatever it is.'
            )
        for name, choices in (
            ("adapt", get_args(Adapt)),
            ("predictor", get_args(PredictorName)),
            ("history_dtype", get_args(HistoryDtype)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
