"""The demo: its experiment, its picture, and what it needs."""

import importlib.util

import pytest
from command import error_of

from vapt_fast.demo.experiment import Experiment, run_experiment
from vapt_fast.demo.picture import draw


@pytest.mark.parametrize("missing", ["matplotlib", "sklearn"])
def test_the_demo_misses_a_package_at_its_start(missing, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    package = {"sklearn": "scikit-learn"}.get(missing, missing)
    message = error_of("demo", "--output", tmp_path / "out")
    assert f"the demo needs {package}, which is not installed" in message
    assert not (tmp_path / "out").exists()


def test_experiment_and_picture(tmp_path):
    experiment = Experiment(
        methods=("vapt", "full"),
        epochs={5: 2, 10: 1},
        seeds=(0, 1),
        base_lrs=(1.0, 0.1),
        full_base_lrs=(0.01,),
    )
    seen = []
    outcomes = run_experiment(experiment, tmp_path, seen.append, processes=1)
    jobs = [(method, num_train) for num_train in (5, 10) for method in ("vapt", "full")]
    assert [(outcome.method, outcome.num_train) for outcome in outcomes] == jobs
    assert sorted(seen, key=outcomes.index) == outcomes
    for outcome in outcomes:
        assert outcome.base_lr == max(outcome.validation, key=outcome.validation.get)
        assert len(outcome.test) == 2
        assert 0 < outcome.mean < 1
    draw(outcomes, tmp_path / "vapt-10", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
