"""Bad settings get an error that names the setting, the rule and the value."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

import vsa_ddp
from vsa_ddp import VsaConfig, VsaState, learning_rate_factor
from vsa_ddp.rates import NMSES, bits_per_trit, num_roundings, unbiased_nmse
from vsa_ddp.register import optimizer_family


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("bundle", 0, r"bundle must be in 1\.\.4096, got 0"),
        ("bundle", 4.0, r"bundle must be an int, got 4\.0"),
        ("bundle", True, "bundle must be an int, got True"),
        ("exact_steps", -1, "exact_steps must be at least 0, got -1"),
        ("rotation_block", 1000, r"rotation_block must be a power of two .*, got 1000"),
        ("rotation_block", 64, r"rotation_block must be a power of two in 128\.\.16384"),
        ("scale_decay", 1.0, r"scale_decay must be a float in \[0, 1\), got 1\.0"),
        (
            "wire",
            "carrier pigeon",
            "wire must be one of all_gather, all_reduce, two_shot, auto, dense, got 'carrier pigeon'",
        ),
        ("gain", "big", "gain must be one of unbiased, shrunk, got 'big'"),
        ("whiten", 1, "whiten must be True or False, got 1"),
        ("seed", -1, r"seed must be in 0\.\.9223372036854775807, got -1"),
    ],
)
def test_a_setting_out_of_bounds_is_named(setting: str, value: object, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        VsaConfig(**{setting: value})  # type: ignore[arg-type]


def test_an_unknown_setting_is_named_with_those_that_exist() -> None:
    with pytest.raises(
        ValueError, match=r"unknown setting bundel; the settings are compression, bundle, sparsity, wire"
    ):
        VsaConfig.from_settings({"bundel": 4})


def test_register_refuses_a_model_that_is_not_ddp() -> None:
    with pytest.raises(
        TypeError, match=r"needs a DistributedDataParallel model, got Linear; wrap it first, .* torch\.compile last"
    ):
        vsa_ddp.register(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_the_learning_rate_factor_is_the_root_of_the_second_moments_growth() -> None:
    assert learning_rate_factor(bundle=4) == pytest.approx((4 / 0.8098) ** 0.5, rel=1e-3)
    assert learning_rate_factor(bundle=4, wire="two_shot") == pytest.approx(2 / 0.8098, rel=1e-3)
    assert learning_rate_factor() == learning_rate_factor(compression=64) == learning_rate_factor(sparsity=8)
    assert learning_rate_factor(320) == pytest.approx(3.41, abs=0.01)
    assert learning_rate_factor(wire="dense") == 1
    with pytest.raises(ValueError, match=r"bundle must be in 1\.\.4096, got 0"):
        learning_rate_factor(bundle=0)


@pytest.mark.parametrize(
    ("settings", "bundle", "sparsity"),
    [
        ({}, 1, 8),
        ({"wire": "all_reduce"}, 2, 1),
        ({"wire": "two_shot"}, 1, 2),
        ({"wire": "auto"}, 1, 8),
        ({"bundle": 3}, 3, 1),
        ({"sparsity": 2}, 1, 2),
        ({"bundle": 3, "sparsity": 2}, 3, 2),
        ({"compression": 1}, 1, 1),
        ({"compression": 20}, 1, 1),
        ({"compression": 20.1}, 1, 2),
        ({"compression": 80}, 1, 16),
        ({"compression": 80, "wire": "all_reduce"}, 4, 1),
        ({"compression": 2000}, 4, 128),
        ({"compression": 2000, "rotation_block": 128}, 20, 16),
    ],
)
def test_compression_chooses_bundle_and_sparsity(settings: dict[str, Any], bundle: int, sparsity: int) -> None:
    config = VsaConfig(**settings)
    assert (config.bundle, config.sparsity) == (bundle, sparsity)
    assert VsaConfig.from_settings(vars(replace(config, seed=5))) == replace(config, seed=5)
    chosen = settings.get("compression", "default") if {"bundle", "sparsity"}.isdisjoint(settings) else None
    assert config.compression == chosen
    assert config.for_wire("two_shot") == VsaConfig(**{**settings, "wire": "two_shot"})


@pytest.mark.parametrize("wire", ["all_gather", "all_reduce", "two_shot"])
def test_the_default_has_one_noise_by_every_wire(wire: Any) -> None:
    config = VsaConfig(wire=wire)
    assert unbiased_nmse(config.bundle, config.sparsity, num_roundings(wire)) == pytest.approx(1.5, abs=0.04)
    assert learning_rate_factor(wire=wire) == pytest.approx(learning_rate_factor(), rel=0.02)


@pytest.mark.parametrize("wire", ["all_gather", "all_reduce", "two_shot"])
@pytest.mark.parametrize("compression", [7, 33, 64, 100, 128, 300, 700])
def test_compression_is_reached_with_the_least_noise(wire: Any, compression: float) -> None:
    found = VsaConfig(compression=compression, wire=wire)
    roundings = 2 if wire == "two_shot" else 1
    noise = unbiased_nmse(found.bundle, found.sparsity, roundings)
    assert 32 * found.bundle / bits_per_trit(found.sparsity) >= compression
    for bundle, sparsity in itertools.product(range(1, 50), NMSES):
        if 32 * bundle / bits_per_trit(sparsity) >= compression and (wire != "all_reduce" or sparsity == 1):
            assert unbiased_nmse(bundle, sparsity, roundings) >= noise


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"compression": 0.5}, r"compression must be a number of at least 1, got 0\.5"),
        ({"compression": float("inf")}, "compression must be a number of at least 1, got inf"),
        ({"compression": "much"}, "compression must be a number of at least 1, got 'much'"),
        (
            {"compression": 80, "bundle": 2},
            "bundle of 1 and a sparsity of 16, but they are 2 and None; leave out the one",
        ),
        (
            {"compression": 1e9},
            r"at most 2097152 with wire=\"all_gather\" and a rotation_block of 1024, got 1000000000\.0",
        ),
        ({"compression": 1e5, "wire": "all_reduce"}, r'at most 81920 with wire="all_reduce"'),
    ],
)
def test_a_compression_that_cannot_be_is_named(settings: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        VsaConfig(**settings)


@pytest.mark.parametrize(
    ("make", "family"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "sgd"),
        (lambda p: torch.optim.LBFGS(p), "sgd"),
        (lambda p: type("FusedSGD", (torch.optim.Optimizer,), {})(p, {}), "sgd"),
        (lambda p: torch.optim.AdamW(p), "adam"),
        (lambda p: torch.optim.RMSprop(p), "adam"),
        (lambda p: torch.optim.Adagrad(p), "adam"),
        (lambda p: None, "adam"),
    ],
)
def test_the_optimizers_family_is_known(make: object, family: str) -> None:
    assert optimizer_family(make([torch.nn.Parameter(torch.zeros(2))])) == family  # type: ignore[operator]


def test_the_family_is_that_of_the_wrapped_optimizer() -> None:
    inner = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    for attribute in ("optim", "optimizer", "base_optimizer"):
        wrapper = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))])
        setattr(wrapper, attribute, inner)
        assert optimizer_family(wrapper) == "sgd"


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match="optimizer must be a torch Optimizer or None, got int"):
        optimizer_family(320)  # type: ignore[arg-type]


def test_a_state_shows_its_settings() -> None:
    assert "bundle=16" in repr(VsaState(config=VsaConfig(bundle=16)))


def test_nodes_need_a_wire_between_them() -> None:
    with pytest.raises(ValueError, match='wire="dense" has no nodes; leave out ranks_per_node, which is 2'):
        VsaConfig(wire="dense", ranks_per_node=2)
