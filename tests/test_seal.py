"""A message that was damaged, or is about something else, is named and never decoded."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

import vsa_ddp
from tests.models import loss_of, net
from tests.ranks import run_ranks
from vsa_ddp.wires import WIRES, Inspection, Subject, link
from vsa_ddp.wires.link import CHUNK_BYTES
from vsa_ddp.wires.seal import complaint_about, contents, seal, verdict

SUBJECT = Subject(5, "bucket of mix.weight")


def random_bytes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@given(
    num=st.integers(0, 700),
    dtype=st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.int64]),
    many=st.sampled_from([(), (1,), (3,)]),
)
def test_a_sealed_message_is_whole_and_comes_back(num: int, dtype: torch.dtype, many: tuple[int, ...]) -> None:
    size = torch.empty(0, dtype=dtype).element_size()
    message = random_bytes(math.prod(many) * num * size).view(dtype).view(*many, num)
    sealed = seal(message, SUBJECT)
    assert sealed.shape == (*many, 2 + -(-num * size // 8))
    assert verdict(sealed, SUBJECT).all()
    assert torch.equal(contents(sealed, message).flatten().view(torch.uint8), message.flatten().view(torch.uint8))


@given(num=st.integers(1, 300), place=st.integers(0, 2**20), bit=st.integers(0, 63), seed=st.integers(0, 9))
def test_every_flipped_bit_is_found(num: int, place: int, bit: int, seed: int) -> None:
    sealed = seal(random_bytes(8 * num, seed=seed), SUBJECT)
    damaged = sealed.clone()
    damaged[place % len(sealed)] ^= 1 << bit if bit < 63 else -(2**63)
    assert not verdict(damaged, SUBJECT).all()


@given(first=st.integers(0, 199), second=st.integers(0, 199))
def test_words_that_change_places_are_found(first: int, second: int) -> None:
    sealed = seal(random_bytes(8 * 200), SUBJECT)
    damaged = sealed.clone()
    damaged[[2 + first, 2 + second]] = sealed[[2 + second, 2 + first]]
    assert verdict(damaged, SUBJECT).all() == ((first - second) % 61 == 0)


def test_parts_that_change_places_are_found() -> None:
    words = CHUNK_BYTES // 8
    sealed = seal(random_bytes(3 * CHUNK_BYTES), SUBJECT)
    sealed[2 : 2 + 2 * words] = sealed[2 : 2 + 2 * words].roll(words)
    assert verdict(sealed, SUBJECT).tolist() == [True, False]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 64])
def test_a_sum_of_sealed_integers_is_sealed(num_ranks: int) -> None:
    lanes = [random_bytes(8 * 150, seed=rank).view(torch.int64) for rank in range(num_ranks)]
    summed = torch.stack([seal(each, SUBJECT) for each in lanes]).sum(0)
    assert verdict(summed, SUBJECT, num_ranks).all()
    assert torch.equal(contents(summed, lanes[0]), torch.stack(lanes).sum(0))
    summed[77] += 1
    assert verdict(summed, SUBJECT, num_ranks).tolist() == [True, False]
    other = torch.stack([seal(each, Subject(6 if rank == 0 else 5)) for rank, each in enumerate(lanes)]).sum(0)
    assert verdict(other, SUBJECT, num_ranks).tolist() == [False, True]


@pytest.mark.parametrize("other", [Subject(6, SUBJECT.bucket), Subject(5, "bucket of head.weight")])
def test_a_message_about_something_else_is_told_from_a_damaged_one(other: Subject) -> None:
    sealed = torch.stack([seal(random_bytes(80), subject) for subject in (SUBJECT, other, SUBJECT)])
    with pytest.raises(RuntimeError, match="the message of rank 1 is about another bucket or step than step 5, bucket"):
        Inspection().expect(verdict(sealed, SUBJECT), lambda good: complaint_about(good, SUBJECT))
    sealed[2, 5] += 1
    with pytest.raises(RuntimeError, match="the message of rank 2 arrived damaged, in step 5, bucket of mix"):
        Inspection().expect(verdict(sealed, SUBJECT), lambda good: complaint_about(good, SUBJECT))


def damaged_run(rank: int, world_size: int, settings: dict[str, Any], out_of_step: bool) -> str:
    """Five good steps, then rank 1 sends what is not right."""
    model = DDP(net(), bucket_cap_mb=0.05)
    state = vsa_ddp.register(model, **settings)
    for step in range(5):
        loss_of(model, step, rank).backward()
    if rank == 1 and out_of_step:
        state.step += 1
    elif rank == 1:

        def damaging(message: torch.Tensor, subject: Subject) -> torch.Tensor:
            sealed = seal(message, subject)
            sealed[..., 10] ^= 1 << 33
            return sealed

        link.seal = damaging
    with pytest.raises(RuntimeError) as error:
        loss_of(model, 5, rank).backward()
    # the ranks' collectives no longer match, so they cannot meet once more
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return str(error.value)


@pytest.mark.parametrize("settings", [*({"wire": wire} for wire in WIRES), {"ranks_per_node": 1, "exact_steps": 3}])
@pytest.mark.parametrize("out_of_step", [False, True])
def test_what_is_not_right_on_the_wire_is_named(tmp_path: Path, settings: dict[str, Any], out_of_step: bool) -> None:
    what = "is about another bucket or step than" if out_of_step else "arrived damaged, in"
    for rank, message in enumerate(run_ranks(damaged_run, 2, tmp_path, settings, out_of_step, seconds=20)):
        seen = rank if not out_of_step else 1 - rank
        whose = r"all ranks, summed" if settings.get("wire") == "all_reduce" else f"rank {seen if out_of_step else 1}"
        own_step = 6 if out_of_step and rank == 1 else 5
        pattern = rf"the message of {whose} {what} step {own_step}, bucket of [\w.]+( and \d+ more)? \(\w+\)"
        assert re.search(pattern, message), message
