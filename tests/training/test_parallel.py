"""Training by several processes: the same steps as by one, each image once, one that writes."""

import json
import os
import subprocess
import sys
import time
from itertools import chain

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Subset, TensorDataset

from vapt_fast.training.loader import make_loader

# Without dropout, which each process draws by itself; 10 images in batches of 4, 4 and 2.
OPTIONS = "--data digits --train-images 10 --batch-size 4 --epochs 2 --warmup-epochs 1 --lr 2 --prompts 2"
NO_DROPOUT = "--projector-dropout 0 --channel-dropout 0 --threads 1 --device cpu"


def train(folder, *, processes, options=f"{OPTIONS} {NO_DROPOUT}", **popen):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    start = [sys.executable, *(torchrun if processes > 1 else []), "-m", "vapt_fast", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*start, *options.split(), "--output", str(folder)], env=environment, **popen)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("in_memory", [True, False])
def test_parts_of_batches(in_memory):
    """Together they are the batches of one process; what fills in is an image of the same batch."""
    data = TensorDataset(torch.arange(11).float(), torch.arange(11))
    data = data if in_memory else Subset(data, range(11))
    whole = [batch.tolist() for _, batch in make_loader(data, 5, shuffle_seed=4)]
    parts = [[b.tolist() for _, b in make_loader(data, 5, shuffle_seed=4, part=(i, 3))] for i in range(3)]
    assert [len(batch) for batch in whole] == [5, 5, 1]
    for batch, *of in zip(whole, *parts, strict=True):
        assert all(of)
        assert sorted(chain(*of)) == sorted(batch) if len(batch) > 1 else of == [batch] * 3


@pytest.mark.full
def test_three_processes_train_as_one(tmp_path):
    """The last batch has fewer images than there are processes."""
    assert train(tmp_path / "one", processes=1).wait(200) == 0
    several = train(tmp_path / "three", processes=3, stdout=subprocess.PIPE, text=True)
    output, _ = several.communicate(timeout=300)
    assert several.returncode == 0
    assert output.count("test accuracy") == 1
    for one, three in zip(metrics(tmp_path / "one"), metrics(tmp_path / "three"), strict=True):
        assert three["train_accuracy"] == one["train_accuracy"]
        for name in ("train_loss", "validation_loss"):
            assert three[name] == pytest.approx(one[name], rel=1e-5)
    one, three = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "three"))
    for name, tensor in one.items():
        torch.testing.assert_close(three[name], tensor, rtol=1e-4, atol=1e-6)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "three")]
    assert [result["processes"] for result in results] == [1, 3]
    assert results[0]["test_accuracy"] == results[1]["test_accuracy"]


@pytest.mark.full
def test_stopped_processes_go_on_to_the_same_bits(tmp_path):
    """With dropout too; and not with another number of processes."""
    options = f"{OPTIONS} --threads 1 --device cpu".replace("--epochs 2", "--epochs 30")
    assert train(tmp_path / "whole", processes=2, options=options).wait(300) == 0
    process = train(tmp_path / "stopped", processes=2, options=options)
    deadline = time.monotonic() + 200
    while not (tmp_path / "stopped" / "checkpoint.pt").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()  # torchrun ends the others
    process.wait(60)
    assert not (tmp_path / "stopped" / "result.json").exists()
    one = train(tmp_path / "stopped", processes=1, options="--resume", stderr=subprocess.PIPE, text=True)
    assert "it was trained by 2 processes and is by 1" in one.communicate(timeout=200)[1]
    assert train(tmp_path / "stopped", processes=2, options="--resume --threads 1").wait(300) == 0
    whole, stopped = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "stopped")
    )
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in whole.items())
