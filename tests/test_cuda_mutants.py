"""The programs of the CUDA kernels' mutation tests, which take too long to run here; see cuda_mutants.md."""

import cuda_mutants
import cuda_mutants_pool
import pytest

PROGRAMS = pytest.mark.parametrize("program", [cuda_mutants, cuda_mutants_pool])


@PROGRAMS
def test_a_mutant_changes_one_line(program):
    for source in program.SOURCES:
        lines = source.read_text().splitlines()
        found = list(cuda_mutants.mutants(source))
        assert len({mutant.text for mutant in found}) == len(found) > 100
        for mutant in found:
            changed = mutant.text.splitlines()
            different = [i for i, (a, b) in enumerate(zip(lines, changed, strict=True)) if a != b]
            assert different == [mutant.line - 1]


@PROGRAMS
def test_a_wrong_kernel_is_noticed(program, tmp_path):
    if cuda_mutants.emulation.COMPILER is None:
        pytest.skip("there is no g++ for the kernels")
    for source in program.SOURCES:
        wrong = source.read_text().replace("] += ", "] = ")  # no sum of an array
        (tmp_path / source.name).write_text(wrong)
    assert program.noticed(tmp_path) not in (None, cuda_mutants.NO_MUTANT)
