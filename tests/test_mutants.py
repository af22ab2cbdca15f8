"""The mutation tests of the kernels: their record is of these kernels and complete, and a sample holds."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import FOLDER, OPERATORS, TABLE, chosen, mutants, mutants_of, source_hash

RECORDED = json.loads(TABLE.read_text())
FILES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
EXPLAINED = re.findall(r"^- `(\w+)`, `([^`]+)`:", TABLE.with_suffix(".md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("file", FILES)
def test_record_is_of_these_sources(file):
    """``make mutants`` brings it up to date."""
    assert RECORDED[file]["source"] == source_hash((FOLDER / f"{file}.py").read_text())


def share_noticed(files):
    rows = [row for file in files for row in RECORDED[file]["mutants"]]
    return sum(row["noticed_by"] is not None for row in rows) / len(rows)


def test_at_least_95_percent_are_noticed():
    assert share_noticed(FILES) >= 0.95
    for file in FILES:
        assert share_noticed([file]) >= 0.9, file
        assert len(RECORDED[file]["mutants"]) >= min(40, len(mutants(file))), file


def test_what_survives_is_explained():
    survived = [
        (file, row["mutant"])
        for file in FILES
        for row in RECORDED[file]["mutants"]
        if row["noticed_by"] is None
    ]
    assert sorted(EXPLAINED) == sorted(survived)


def test_nothing_else_is_recorded():
    assert sorted(RECORDED) == FILES


def test_a_sample_is_still_noticed():
    pytest.importorskip("triton", minversion="3.6")
    command = [sys.executable, str(Path(__file__).with_name("kill_mutants.py")), "--sample", "10"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


# ---- the mutants themselves

KERNEL = '''
"""A module."""

@triton.jit
def kernel(x, size, stride, BLOCK: tl.constexpr):
    """A kernel."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        total += tl.load(x + at[None, :] * stride, (at < size) & (at // 2 % 3 == 0), 0.0)
    mean = -tl.sum(helper(total, at), axis=0) / size - 1
    tl.store(x + at, tl.sqrt(mean), at < size)
'''


def test_every_operator_makes_a_mutant():
    found = mutants_of(KERNEL)
    assert {mutant.operator for mutant in found} == {*OPERATORS, "parameter"}
    for operator, change in {
        "comparison": "at < size -> at <= size",
        "half a mask": "(at < size) & (at // 2 % 3 == 0) -> at < size",
        "neighbours": "helper(total, at) -> helper(at, total)",
        "axis": "tl.sum(helper(total, at), axis=0) -> tl.sum(helper(total, at), axis=1)",
        "32 bits": "tl.program_id(0).to(tl.int64) -> tl.program_id(0)",
        "broadcast": "at[None, :] -> at[:, None]",
        "loop": "range(0, size, BLOCK) -> range(0 + BLOCK, size, BLOCK)",
        "parameter": "stride -> BLOCK",
    }.items():
        assert f"kernel, {operator}: {change}" in {mutant.name for mutant in found}


def test_a_mutant_changes_one_place():
    original = ast.unparse(ast.parse(KERNEL))
    for mutant in mutants_of(KERNEL):
        ours, theirs = mutant.source.splitlines(), original.splitlines()
        different = [line for line in ours if line not in theirs]
        assert len(different) <= 1, mutant.name
        compile(mutant.source, "mutant", "exec")


def test_the_same_mutants_are_chosen_every_time():
    file = FILES[0]
    first, second = ([mutant.name for mutant in chosen(file, 20)] for _ in range(2))
    assert first == second
    assert len(first) == 20


def test_the_hash_is_of_what_is_computed():
    same = KERNEL.replace("A kernel.", "The same kernel.").replace("size - 1", "size - 1  # one less")
    assert source_hash(same) == source_hash(KERNEL)
    assert source_hash(KERNEL.replace("size - 1", "size - 2")) != source_hash(KERNEL)
