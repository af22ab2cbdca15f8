"""bench/omniglot.py: who drew what it trains on, what it chooses by, and that it goes on where it was."""

import importlib.util
import io
import json
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image

BENCH = Path(__file__).parents[2] / "bench" / "omniglot.py"
ALPHABETS = ("Latin", "Tagalog", "Sanskrit")


@pytest.fixture(scope="module")
def omniglot():
    spec = importlib.util.spec_from_file_location("omniglot", BENCH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["omniglot"] = module  # for dataclasses
    sys.path.insert(0, str(BENCH.parent))
    spec.loader.exec_module(module)
    sys.path.remove(str(BENCH.parent))
    yield module
    del sys.modules["omniglot"]


@pytest.fixture(autouse=True)
def threads():
    """The number of threads, which a comparison sets, is put back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def archives(tmp_path_factory, omniglot):
    """The two archives: three alphabets of two characters, person n with n + 1 black columns."""
    folder = tmp_path_factory.mktemp("omniglot")
    for name in omniglot.ARCHIVES:
        with zipfile.ZipFile(folder / name, "w") as archive:
            for alphabet in ALPHABETS:
                for character in (1, 2):
                    for person in range(20):
                        image = Image.new("1", (105, 105), 1)
                        image.paste(0, (0, 0, person + 1, 52 * character))
                        content = io.BytesIO()
                        image.save(content, "PNG")
                        path = f"{name[:-4]}/{alphabet}/character{character:02d}/0001_{person + 1:02d}.png"
                        archive.writestr(path, content.getvalue())
    return folder


def test_training_and_measuring_never_share_a_person(omniglot, archives):
    drawings, _ = omniglot.read_drawings(archives)
    assert {name: tuple(d.shape) for name, d in drawings.items()} == dict.fromkeys(
        ALPHABETS, (2, 20, 1, 48, 48)
    )
    ink = drawings["Latin"].mean((2, 3, 4))
    assert (ink.diff(dim=1) > 0).all()  # people in their order

    smaller = None
    for shots in (1, 3, 5, 10):
        (images, labels), (measured, true) = (
            d.tensors for d in omniglot.few_drawings(drawings["Latin"], shots, 7)
        )
        assert labels.tolist() == [0] * shots + [1] * shots
        assert true.tolist() == [0] * 10 + [1] * 10
        torch.testing.assert_close(measured.mean((1, 2, 3)).view(2, 10), ink[:, 10:])
        used = images.mean((1, 2, 3)).view(2, shots)
        for row, known in zip(used, ink[:, :10], strict=True):
            assert len({known.sub(value).abs().argmin().item() for value in row}) == shots
            assert all(known.sub(value).abs().min() < 1e-6 for value in row)
        if smaller is not None:  # a smaller number is part of a larger one
            torch.testing.assert_close(used[:, : smaller.shape[1]], smaller)
        smaller = used


@pytest.mark.full
def test_rates_are_chosen_without_the_test_alphabets_and_a_stopped_run_goes_on(
    omniglot, archives, tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib")
    protocol = omniglot.Protocol(
        pretraining=("Latin",),
        test=("Sanskrit",),
        pretraining_epochs=1,
        methods=("vapt", "linear"),
        epochs={1: 2, 3: 1},
        rates=(0.02, 0.005),
        most_rates=2,
        validation_seeds=(100,),
        test_seeds=(0, 1),
    )
    monkeypatch.setattr(omniglot, "ProcessPoolExecutor", InThisProcess)
    out = tmp_path / "out.json"
    assert omniglot.compare(protocol, archives, out, 1, "choice") is None
    runs = json.loads(out.read_text())["runs"]
    assert {run["alphabet"] for run in runs} == {"Tagalog"}

    carried_out = []
    carry_out = omniglot.carry_out
    monkeypatch.setattr(omniglot, "carry_out", lambda *args: carried_out.append(args[1]) or carry_out(*args))
    results = omniglot.compare(protocol, archives, out, 1)
    assert {run.alphabet for run in carried_out} == {"Sanskrit"}
    assert len(carried_out) == 2 * 2 * 2
    everything = json.loads(out.read_text())
    for method in protocol.methods:
        for shots in protocol.epochs:
            merit = {r["rate"]: r["accuracy"] for r in runs if (r["method"], r["shots"]) == (method, shots)}
            chosen = everything["chosen"][f"{method} {shots}"]
            assert merit[chosen] == max(merit.values())
            assert chosen == min(rate for rate in merit if merit[rate] == merit[chosen])
    assert everything["times"]["linear"]["weights"] == 0

    page = omniglot.section(protocol, results)
    assert "VAPT - linear probe" in page
    omniglot.draw(protocol, results, tmp_path / "figure.svg")
    assert "VAPT" in (tmp_path / "figure.svg").read_text()

    carried_out.clear()
    omniglot.compare(protocol, archives, out, 1)
    assert not carried_out
    with pytest.raises(SystemExit, match="of another protocol"):
        omniglot.compare(omniglot.Protocol(**{**asdict(protocol), "test_seeds": (5,)}), archives, out, 1)


class InThisProcess:
    """An executor without processes."""

    def __init__(self, processes, context, initializer, initargs):
        initializer(*initargs)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *args):
        from concurrent.futures import Future

        future = Future()
        future.set_result(function(*args))
        return future
