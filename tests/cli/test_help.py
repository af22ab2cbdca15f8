"""The help of every command, and the names of options in errors."""

import pytest
import typer
from command import succeed

from vapt_fast.cli import app
from vapt_fast.cli.train_options import with_flags
from vapt_fast.training.sweep.options import BACKBONE

COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("name", COMMANDS)
def test_no_name_is_cut(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = succeed(name, "--help").stdout
    words = set(shown.replace(",", " ").split())
    options = [parameter for parameter in COMMANDS[name].params if parameter.param_type_name == "option"]
    assert words >= {flag for option in options for flag in (*option.opts, *option.secondary_opts)}


def test_options_are_listed_by_panel_and_commands_with_a_sentence():
    shown = succeed("train", "--help").stdout
    places = [shown.index(f"\n{title}:\n") for title in ("Options", "Data", "Model", "Training", "Prompts")]
    assert places == sorted(places)
    assert succeed("--help").stdout.count(".\n") >= len(COMMANDS)


def test_a_sweep_names_its_own_defaults(monkeypatch):
    """And not those of train, where a protocol decides."""
    monkeypatch.setenv("COLUMNS", "80")
    options, training = succeed("sweep", "--help").stdout.split("\nData:\n")
    assert BACKBONE in options
    assert "default:" not in training


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("base_lr must be positive", "--lr must be positive"),
        ("data must be a folder, got data_config", "--data must be a folder, got data_config"),
        ("train_share and train_images exclude", "--train-share and --train-images exclude"),
        ("vapt: num_prompts[1] must be", "vapt: --num-prompts[1] must be"),
        ("no image_size.json in /image_size/a", "no image_size.json in /image_size/a"),
        ("the data has 'image_size'", "the data has 'image_size'"),
    ],
)
def test_errors_name_options_as_they_are_typed(message, expected):
    assert with_flags(message) == expected
