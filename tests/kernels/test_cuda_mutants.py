"""The mutants of the CUDA kernels, which are tried by hand: ``make mutants``, see cuda_mutants.md."""

import cuda_mutants


def test_a_mutant_changes_one_line():
    every = [mutant for source in cuda_mutants.sources() for mutant in cuda_mutants.mutants(source)]
    assert len({(mutant.source, mutant.text) for mutant in every}) == len(every) > 0
    for mutant in every:
        pairs = zip(mutant.source.read_text().splitlines(), mutant.text.splitlines(), strict=True)
        assert [i for i, (a, b) in enumerate(pairs) if a != b] == [mutant.line - 1]
