"""Bad settings get an error that names the setting, the rule and the value."""

import pytest
import torch

import vsa_ddp
from vsa_ddp import VsaConfig, VsaState, learning_rate_factor
from vsa_ddp.register import optimizer_family


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("bundle", 0, r"bundle must be in 1\.\.4096, got 0"),
        ("bundle", 4.0, r"bundle must be an int, got 4\.0"),
        ("bundle", True, "bundle must be an int, got True"),
        ("exact_steps", 0, "exact_steps must be at least 1, got 0"),
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
    with pytest.raises(ValueError, match=r"unknown setting bundel; the settings are bundle, sparsity, wire"):
        VsaConfig.from_settings({"bundel": 4})


def test_register_refuses_a_model_that_is_not_ddp() -> None:
    with pytest.raises(
        TypeError, match=r"needs a DistributedDataParallel model, got Linear; wrap it first, .* torch\.compile last"
    ):
        vsa_ddp.register(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_the_learning_rate_factor_is_the_root_of_the_second_moments_growth() -> None:
    assert learning_rate_factor(4) == pytest.approx((4 / 0.8098) ** 0.5, rel=1e-3)
    with pytest.raises(ValueError, match="bundle must be at least 1, got 0"):
        learning_rate_factor(0)


@pytest.mark.parametrize(
    ("make", "family"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "sgd"),
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
    for attribute in ("optim", "optimizer"):
        wrapper = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))])
        setattr(wrapper, attribute, inner)
        assert optimizer_family(wrapper) == "sgd"


def test_a_state_shows_its_settings() -> None:
    assert "bundle=16" in repr(VsaState(config=VsaConfig(bundle=16)))


def test_nodes_need_a_wire_between_them() -> None:
    with pytest.raises(ValueError, match='wire="dense" has no nodes; leave out ranks_per_node, which is 2'):
        VsaConfig(wire="dense", ranks_per_node=2)
