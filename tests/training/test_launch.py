"""Processes that PyTorch's launcher starts for one call: none outlives it, and their errors are its own."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from vapt_fast.adapters import AdapterError, AdapterNotFoundError
from vapt_fast.training import UserError
from vapt_fast.training.launch import launch
from vapt_fast.training.parallel import add_up, joined, rank

pytestmark = pytest.mark.full


def in_process(fault, folder):
    """Fail as the second process, while the first waits for it."""
    with joined("cpu"):
        if rank() == 1 and fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank() == 1 and fault == "Unreadable":
            raise Unreadable("full", "disk")
        if rank() == 1 and fault == "SystemExit":
            sys.exit("disk")
        if rank() == 1 and fault is not None:
            raise fault
        total = torch.ones(1)
        add_up(total)
        (folder / str(rank())).write_text(str(total.item()))


def call(fault, folder):
    launch(in_process, fault, folder, processes=2)


@pytest.fixture(autouse=True)
def _leaves_nothing():
    """Neither a process nor a handler of signals."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    assert not multiprocessing.active_children()
    assert [signal.getsignal(number) for number in numbers] == handlers


def test_every_process_does_its_part(tmp_path):
    call(None, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "2.0", "1": "2.0"}


def start_method(folder):
    (folder / os.environ["RANK"]).write_text(multiprocessing.get_start_method())


def test_workers_are_started_as_those_of_any_process(tmp_path):
    """Not spawned where others are not, which takes seconds."""
    launch(start_method, tmp_path, processes=2)
    usual = multiprocessing.get_context().get_start_method()
    assert {path.read_text() for path in tmp_path.iterdir()} == {usual}


FAULTS = [
    UserError("what went wrong"),
    KeyError("unexpected"),
    AdapterError("it does not fit", ["one reason", "another"]),
    AdapterNotFoundError("it is not there", []),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_the_first_error_is_raised(fault, tmp_path, capfd):
    with pytest.raises(type(fault)) as raised:
        call(fault, tmp_path)
    assert raised.value.args == fault.args
    assert "in_process" in str(raised.value.__cause__)  # its traceback
    assert "Traceback" not in capfd.readouterr().err


class Unreadable(Exception):
    """One that pickle writes and can't read."""

    def __init__(self, what, why):
        super().__init__(f"{what}: {why}")


@pytest.mark.parametrize("fault", ["Unreadable", "SystemExit"])
def test_an_error_that_cannot_be_sent(fault, tmp_path):
    with pytest.raises(RuntimeError, match=f"{fault}: .*disk") as raised:
        call(fault, tmp_path)
    assert "in_process" in str(raised.value.__cause__)


def test_a_process_that_is_killed(tmp_path):
    with pytest.raises(UserError, match="one of 2 processes was ended by SIGKILL"):
        call("killed", tmp_path)
    assert not list(Path(tmp_path).iterdir())
