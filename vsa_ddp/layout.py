"""Where each parameter of a bucket goes: exact or compressed, which dimensions of the hypervector. Integers only.

A compressed parameter of n elements fills B slots of D_p dimensions, D_p = ceil(n / B) rounded up to the rotation
block: slot b holds its elements b * D_p .. (b + 1) * D_p - 1, and zeros behind the last. Nothing of it depends on the
bucket it arrives in, so DDP may rebuild its buckets, and a run may resume with others, without a bit changing.

Shape letters: N elements of a parameter, B slots, D dimensions, T rotation blocks of K elements (D = T * K).
"""

import math
import zlib
from dataclasses import dataclass
from functools import cached_property

from vsa_ddp.config import VsaConfig


@dataclass(frozen=True)
class Slice:
    """One parameter inside a bucket."""

    name: str
    shape: tuple[int, ...]
    num_dims: int
    """D_p, its share of the hypervector; 0 if it travels exactly."""
    start: int
    """Where its share starts: in the hypervector if it is compressed, among the exact elements if not."""
    offset: int
    """Where its elements start in the bucket."""
    first_factor: int
    """Where its row and column factors start among the bucket's, if it is compressed."""

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_rows(self) -> int:
        """Rows of the matrix view: the first dimension. All others together are its columns."""
        return self.shape[0]

    @property
    def num_cols(self) -> int:
        return self.numel // self.shape[0]

    @property
    def factors(self) -> slice:
        """Its row factors and then its column factors, among the bucket's."""
        return slice(self.first_factor, self.first_factor + self.num_rows + self.num_cols)

    @cached_property
    def name_hash(self) -> int:
        """32 bits of the name: separates the keys of parameters."""
        return zlib.crc32(self.name.encode())


@dataclass(frozen=True)
class BucketLayout:
    """The plan of one bucket; see `plan_bucket`."""

    bundle: int
    rotation_block: int
    slices: tuple[Slice, ...]

    @cached_property
    def compressed(self) -> tuple[Slice, ...]:
        return tuple(s for s in self.slices if s.num_dims)

    @cached_property
    def exact(self) -> tuple[Slice, ...]:
        return tuple(s for s in self.slices if not s.num_dims)

    @cached_property
    def num_dims(self) -> int:
        """D, dimensions of the bucket's hypervector: a multiple of the rotation block, 0 if all is exact."""
        return sum(s.num_dims for s in self.slices)

    @cached_property
    def num_factors(self) -> int:
        """S, row and column factors of its compressed parameters."""
        return sum(s.num_rows + s.num_cols for s in self.compressed)

    @cached_property
    def num_exact(self) -> int:
        return sum(s.numel for s in self.exact)

    @cached_property
    def label(self) -> str:
        """Tells it from other buckets, on every rank alike."""
        plan = self.bundle, self.rotation_block, [(s.name, s.shape) for s in self.slices]
        more = f" and {len(self.slices) - 1} more" if len(self.slices) > 1 else ""
        return f"bucket of {self.slices[0].name}{more} ({zlib.crc32(repr(plan).encode()):08x})"


def is_compressed(shape: tuple[int, ...], config: VsaConfig) -> bool:
    """Whether a parameter of this shape is compressed: it has two dimensions or more and is not tiny."""
    return len(shape) >= 2 and math.prod(shape) >= config.min_numel


def plan_bucket(parameters: tuple[tuple[str, tuple[int, ...]], ...], config: VsaConfig) -> BucketLayout:
    """Lay out the (name, shape) pairs of a bucket, in the bucket's order."""
    slices = []
    num_dims = num_exact = offset = num_factors = 0
    for name, shape in parameters:
        numel = math.prod(shape)
        dims = 0
        if is_compressed(shape, config):
            tile = config.bundle * config.rotation_block
            dims = -(-numel // tile) * config.rotation_block
        share = Slice(name, shape, dims, num_dims if dims else num_exact, offset, num_factors)
        slices.append(share)
        offset += numel
        num_factors += share.num_rows + share.num_cols if dims else 0
        num_dims += dims
        num_exact += 0 if dims else numel
    return BucketLayout(config.bundle, config.rotation_block, tuple(slices))
