"""The program of the CUDA kernels' mutation tests, which take too long to run here; see cuda_mutants.md."""

import cuda_mutants as program
import pytest


def test_a_mutant_changes_one_line():
    for source in program.SOURCES:
        lines = source.read_text().splitlines()
        found = list(program.mutants(source))
        assert len({mutant.text for mutant in found}) == len(found) > 100
        for mutant in found:
            changed = mutant.text.splitlines()
            different = [i for i, (a, b) in enumerate(zip(lines, changed, strict=True)) if a != b]
            assert different == [mutant.line - 1]


def test_a_wrong_kernel_is_noticed(tmp_path):
    if program.emulation.COMPILER is None:
        pytest.skip("there is no g++ for the kernels")
    for source in program.SOURCES:
        wrong = source.read_text().replace("] += ", "] = ")  # no sum of an array
        (tmp_path / source.name).write_text(wrong)
    assert program.noticed(tmp_path) not in (None, program.NO_MUTANT)
