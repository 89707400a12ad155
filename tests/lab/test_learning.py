"""The learning curve: it stops at its budget, counts people, and the model learns."""

from __future__ import annotations

import itertools

import pytest
from small import small_config

from hmdiff.cli.main import main
from hmdiff.lab.learning import learning_curve


@pytest.mark.slow
def test_a_curve_has_its_points_and_falls() -> None:
    config = small_config(
        "unused",
        "model.tokens=parts",
        "model.mode=direct",
        "training.optimizer=muon",
        "training.learning_rate=0.005",
        "data.block_size=16",
        "training.batch_size=16",
    )
    ticks = itertools.count()
    # The clock advances a second per call: the budget is in steps, on any machine.
    found = list(learning_curve(config, 1.0, (0.1, 1.0), clock=lambda: float(next(ticks))))
    assert [point.people for point in found] == [16 * (6 + 3), 16 * (60 + 3)]
    assert [point.minutes for point in found] == pytest.approx([0.1, 1.0])
    assert found[1].errors["val"] < found[0].errors["val"]


def test_a_budget_of_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--config", "quickstart", "--learning", "0"]) == 2
    assert "--learning 0" in capsys.readouterr().err
