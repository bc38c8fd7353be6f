"""How a request's gradients are clipped and its weights optimised: what is the recipe's, and what is asked for."""

from __future__ import annotations

import math
from typing import Any

import pytest

from app.catalog.recipes import Phase
from app.privacy.dp_events import event_for
from app.privacy.plan import PrivacyPlan, SampledGaussian
from app.privacy.renyi import Term
from tests.app.jobs.test_planning import budget, file, plan
from tests.privacy import oracles


@pytest.mark.parametrize(
    ("privacy", "expected"),
    [
        ({}, ("flat", 0.3, 0.1)),
        ({"max_grad_norm": 0.5}, ("flat", 0.5, 0.1)),
        ({"clipping": "flat"}, ("flat", 0.3, 0.1)),
        ({"clipping": "adaptive"}, ("adaptive", 1.0, 0.2)),
        ({"clipping": "automatic"}, ("automatic", 1.0, 0.2)),
    ],
)
def test_how_a_head_of_one_class_is_clipped_and_its_rate(privacy: dict[str, Any], expected: tuple[str, float, float]):
    planned = plan(privacy=privacy)
    (part,) = (part for part in planned.plan.parts if isinstance(part, SampledGaussian))
    (phase,) = (Phase.from_dict(phase) for phase in planned.resolved["phases"])
    assert (part.clipping, part.max_grad_norm, phase.head_learning_rate) == expected


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer", "adaptive"])
@pytest.mark.parametrize("loss_curve", [True, False])
def test_what_rides_along_costs_no_epsilon_and_under_a_percent_of_noise_each(clipping: str, loss_curve: bool):
    planned = plan(privacy={"clipping": clipping, "loss_curve": loss_curve})
    (phase,) = (part for part in planned.plan.parts if isinstance(part, SampledGaussian))
    assert (phase.loss is not None, phase.quantile is not None) == (loss_curve, clipping == "adaptive")
    riders = loss_curve + (clipping == "adaptive")
    multipliers = phase.noise_multipliers
    assert multipliers["gradient"] <= phase.noise_multiplier * 1.01**riders
    assert sum(value**-2 for value in multipliers.values()) == pytest.approx(phase.noise_multiplier**-2)
    bare = plan(privacy={"loss_curve": False})
    assert event_for(planned.plan) == event_for(bare.plan)
    assert planned.plan.epsilon == bare.plan.epsilon
    assert PrivacyPlan.from_dict(planned.plan.to_dict()) == planned.plan


def test_where_losses_are_clipped():
    def bound(**privacy: Any) -> float:
        (phase,) = (part for part in plan(privacy=privacy).plan.parts if isinstance(part, SampledGaussian))
        assert phase.loss is not None
        return phase.loss.bound

    assert bound() == pytest.approx(2 * math.log(2))
    assert bound(loss_bound=4.0) == 4.0


def test_the_optimizer_and_the_schedule_are_the_last_phases():
    planned = plan(
        adaptation={"type": "lora"},
        optimizer={"type": "sgd", "learning_rate": 0.3, "momentum": 0.5, "weight_decay": 0.01},
        schedule={"type": "cosine", "warmup_steps": 4},
    )
    warm, main = (Phase.from_dict(phase) for phase in planned.resolved["phases"])
    assert (main.optimizer, main.learning_rate, main.head_learning_rate) == ("sgd", 0.3, 0.3)
    assert (main.momentum, main.weight_decay, main.schedule, main.num_warmup_steps) == (0.5, 0.01, "cosine", 4)
    assert (warm.optimizer, warm.schedule, warm.learning_rate) == ("adamw", "constant", 0.2)


def test_phases_that_were_stored_before_there_was_a_choice_are_read():
    (stored,) = plan().resolved["phases"]
    old = {name: value for name, value in stored.items() if name not in ("momentum", "schedule", "num_warmup_steps")}
    assert Phase.from_dict(old) == Phase.from_dict(stored)


def test_a_temperature_is_a_part_of_the_plan_and_the_job_is_about_the_phase_before():
    body: dict[str, Any] = {
        "adaptation": {"type": "attentive_lora"},
        "evaluation": "none",
        "hyperparameters": {"n_epochs": 2},
        "optimizer": {"type": "sgd", "learning_rate": 0.3},
        "privacy": {"target_epsilon": 8.0, "clipping": "adaptive"},
    }
    planned = plan(file(budget=budget(limit=20.0)), **body)
    parts = [part for part in planned.plan.parts if isinstance(part, SampledGaussian)]
    assert [(part.name, part.num_steps, part.clipping) for part in parts] == [
        ("head", 100, "adaptive"),
        ("main", 4, "adaptive"),
        ("temperature", 30, "flat"),
    ]
    _, main, temperature = (Phase.from_dict(phase) for phase in planned.resolved["phases"])
    assert (main.learning_rate, temperature.learning_rate, temperature.momentum) == (0.3, 1.0, 0.0)
    assert planned.resolved["adaptation"] == {"type": "attentive_lora", "num_layers": 4, "rank": 16, "alpha": 32.0}
    assert planned.hyperparameters == {"n_epochs": 2, "batch_size": 1000, "learning_rate_multiplier": 1.0}
    # By the PRV accountant, which wants rates below 1, from what the parts say.
    (head, main, last), centring = (part.noise_multiplier for part in parts), planned.plan.part("centring")
    all_units = 1.0 - 1e-9
    charged = [
        Term(0.25, head, 100),
        Term(0.5, main, 4),
        Term(all_units, centring.noise_multiplier, 1),
        Term(all_units, last, 30),
    ]
    second = oracles.prv_epsilon(charged, 1e-6)
    assert planned.plan.epsilon <= second <= 8.0 * 1.01 + oracles.PRV_EPS_ERROR
    cheaper = oracles.prv_epsilon(charged[:-1], 1e-6)
    assert cheaper < second
