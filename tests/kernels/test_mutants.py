"""The mutants of the kernels, which are tried by hand: ``make mutants``, see mutants.md."""

import ast

from mutants import OPERATORS, chosen, mutants_of

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
    first, second = ([mutant.name for mutant in chosen("add_norm", 20)] for _ in range(2))
    assert first == second
    assert len(first) == 20
