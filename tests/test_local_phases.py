"""Phases in one process: the schedules counted at a model's own backward passes, and predictions that are used."""

import pytest
import torch

import vsa_ddp
from vsa_ddp import DeterministicPhaseTrainer, DeterministicPredictor, PhaseConfig, PhaseTrainer


def train(phases: PhaseTrainer, model: torch.nn.Linear, steps: int, lr: float = 0.05) -> list[str]:
    """Full batches of least squares. Returns the phase of each step."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    y = x @ torch.randn(8, 1, generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    found = []
    for _ in range(steps):
        found.append(str(phases.begin_step().phase))
        optimizer.zero_grad()
        with torch.set_grad_enabled(phases.should_compute_full()):
            loss = (model(x) - y).square().mean()
        if phases.should_compute_full():
            loss.backward()
            phases.record_full_gradients({name: p.grad for name, p in model.named_parameters()})
        else:
            for name, gradient in phases.get_predicted_gradients().items():
                model.get_parameter(name).grad = gradient
        optimizer.step()
        phases.end_step(loss.item())
    return found


def make(kind: type[PhaseTrainer], config: PhaseConfig | None = None) -> tuple[PhaseTrainer, torch.nn.Linear]:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    return kind(model.named_parameters(), config), model


def test_the_deterministic_trainer_has_43_backward_passes_in_100_steps() -> None:
    phases, model = make(DeterministicPhaseTrainer)
    found = train(phases, model, 100)
    assert len(found) - found.count("predict") == 43 == phases.get_stats().backwards
    assert found[:10] == ["warmup"] * 10
    assert round(phases.speedup_ratio, 2) == 2.33
    assert phases.total_step == 100
    assert phases.cycle_count == 3


def test_the_default_cycle_has_14_backward_passes_in_51_steps() -> None:
    phases, model = make(PhaseTrainer)
    found = train(phases, model, 51)
    assert len(found) - found.count("predict") == 14
    assert phases.current_phase == "full"


def test_a_full_batch_is_learnt_with_a_fraction_of_the_backward_passes() -> None:
    phases, model = make(DeterministicPhaseTrainer)
    train(phases, model, 100, lr=0.02)
    with_predictions = phases.get_stats().loss
    plain, model = make(DeterministicPhaseTrainer, PhaseConfig(predict_steps=0))
    train(plain, model, 43, lr=0.02)
    as_many_backwards = plain.get_stats().loss
    assert with_predictions is not None
    assert as_many_backwards is not None
    assert with_predictions < 0.5 * as_many_backwards
    assert phases.get_stats().quality is not None
    assert phases.get_stats().dense_bytes_skipped == 57 * 9 * 4


def test_a_reset_trainer_begins_anew() -> None:
    phases, model = make(DeterministicPhaseTrainer)
    first = train(phases, model, 40)
    phases.reset()
    assert phases.total_step == phases.predictor.num_recorded == 0
    assert train(phases, model, 40) == first


def test_gradients_that_are_not_of_this_phase_are_an_error() -> None:
    phases, model = make(DeterministicPhaseTrainer)
    with pytest.raises(ValueError, match="this warmup step has a backward pass: give its gradients"):
        phases.get_predicted_gradients()
    while train(phases, model, 1) and phases.current_phase != "predict":
        pass
    with pytest.raises(ValueError, match="this step is predicted: get_predicted_gradients has its gradients"):
        phases.record_full_gradients({})


def test_a_loss_that_is_not_finite_and_gradients_that_are_none_do_not_enter() -> None:
    phases, _ = make(PhaseTrainer)
    phases.begin_step()
    phases.record_full_gradients({"weight": torch.ones(1, 8), "bias": None})
    phases.end_step(float("nan"))
    assert phases.get_stats().loss is None
    assert set(phases.predictor.state_dict()["present"]) == {"weight"}


def test_zeros_are_predicted_while_there_is_no_gradient() -> None:
    config = PhaseConfig(warmup_steps=0, full_steps=1, predict_steps=3, predictor="last", adapt="none")
    phases, model = make(PhaseTrainer, config)
    assert phases.begin_step().phase == "full"
    phases.end_step(float("inf"))  # the loop has left this batch out
    assert phases.begin_step().phase == "predict"
    predicted = phases.get_predicted_gradients()
    for name, parameter in model.named_parameters():
        assert torch.equal(predicted[name], torch.zeros_like(parameter))
    phases.end_step(0.0)


def test_a_gradient_that_is_not_finite_is_asked_for_again() -> None:
    config = PhaseConfig(warmup_steps=0, full_steps=1, predict_steps=3, predictor="last", adapt="none")
    phases, _ = make(PhaseTrainer, config)
    found = []
    for value in (float("inf"), float("nan"), 1.0):
        found.append(str(phases.begin_step().phase))
        phases.record_full_gradients({"weight": torch.full((1, 8), value)})
        phases.end_step(1.0)
    assert found == ["full"] * 3
    assert phases.current_phase == "predict"


def test_the_deterministic_predictor_fits_a_line_exactly() -> None:
    parameters = [("w", torch.zeros(5))]
    predictor = DeterministicPredictor(parameters, PhaseConfig(predictor="last"))
    for step in range(4):
        predictor.record_gradient({"w": torch.arange(5.0) * step + 1})
    torch.testing.assert_close(predictor.predict_gradient()["w"], torch.arange(5.0) * 4 + 1)
    assert predictor.config.predictor == "linear"


def test_the_names_are_there() -> None:
    for name in ("PhaseTrainer", "DeterministicPhaseTrainer", "GradientPredictor", "DeterministicPredictor"):
        assert name in vsa_ddp.__all__
