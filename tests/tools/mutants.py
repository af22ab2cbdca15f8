"""Mutants of the Triton kernels: which small changes of a kernel's source there are.

Each of them has to be noticed by the checks of kill_mutants.py, unless it computes the same; see mutants.md.
"""

from __future__ import annotations

import ast
import copy
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

__all__ = ["OPERATORS", "Mutant", "chosen", "mutants", "mutants_of"]

FOLDER = Path(__file__).parents[2] / "kernels"

# Mutants of a file that are tried.
PER_FILE = 60


@dataclass(frozen=True)
class Mutant:
    """One change of a file: of what kind, in which function, and what replaces which piece of its source."""

    operator: str
    function: str
    tree: ast.Module
    node: ast.AST
    replacement: ast.AST
    occurrence: int

    @property
    def name(self) -> str:
        """Says all that; where the same change can be made in several places of a function, also where."""
        where = f" ({self.occurrence})" if self.occurrence > 1 else ""
        return f"{self.function}, {self.operator}: {_change(self.node, self.replacement)}{where}"

    @property
    def source(self) -> str:
        """Of the whole file."""
        memo: dict[int, Any] = {}
        tree = copy.deepcopy(self.tree, memo)
        node, replacement = memo[id(self.node)], copy.deepcopy(self.replacement)

        class Replace(ast.NodeTransformer):
            def visit(self, visited: ast.AST) -> ast.AST:
                return replacement if visited is node else self.generic_visit(visited)

        return ast.unparse(ast.fix_missing_locations(Replace().visit(tree)))


def _binary(node: ast.AST, kind: type, to: type) -> Iterator[ast.AST]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, kind):
        yield ast.BinOp(node.left, to(), node.right)


def _comparison(node: ast.AST) -> Iterator[ast.AST]:
    swapped = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq}
    if isinstance(node, ast.Compare) and type(node.ops[0]) in swapped:
        yield ast.Compare(node.left, [swapped[type(node.ops[0])]()], node.comparators)


def _left_or_right(node: ast.AST, *kinds: type) -> Iterator[ast.AST]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, kinds):
        yield node.left
        yield node.right


def _called(node: ast.AST, *names: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names


def _accumulation(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add):
        yield ast.AugAssign(node.target, ast.Sub(), node.value)
        yield ast.Assign([node.target], node.value)


def _no_mask(node: ast.AST) -> Iterator[ast.AST]:
    first = {"load": 1, "store": 2}
    if _called(node, *first):
        end = first[node.func.attr]
        if len(node.args) > end or node.keywords:
            yield ast.Call(node.func, node.args[:end], [])


def _neighbours(node: ast.AST) -> Iterator[ast.AST]:
    """Two arguments in a row of a kernel's own function, swapped."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        for i, (left, right) in enumerate(zip(node.args, node.args[1:], strict=False)):
            if ast.dump(left) != ast.dump(right):
                yield ast.Call(node.func, [*node.args[:i], right, left, *node.args[i + 2 :]], node.keywords)


def _axis(node: ast.AST) -> Iterator[ast.AST]:
    if _called(node, "sum", "max") and node.keywords:
        yield ast.Call(node.func, node.args, [ast.keyword("axis", ast.Constant(1 - _axis_of(node)))])


def _axis_of(node: ast.Call) -> int:
    return next(keyword.value.value for keyword in node.keywords if keyword.arg == "axis")


def _constant(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield ast.Constant(node.value + 1)


def _zeros(node: ast.AST) -> Iterator[ast.AST]:
    if _called(node, "zeros"):
        yield ast.BinOp(node, ast.Add(), ast.Constant(1))


def _32_bits(node: ast.AST) -> Iterator[ast.AST]:
    """No cast to 64-bit integers. Casts of numbers make no difference where another operand is as wide."""
    if _called(node, "to", "cast") and ast.unparse(node.args[-1]) == "tl.int64":
        yield node.func.value if node.func.attr == "to" else node.args[0]
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "wide":
        yield node.args[0]


def _broadcast(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple) and len(node.slice.elts) == 2:
        yield ast.Subscript(node.value, ast.Tuple(node.slice.elts[::-1], ast.Load()), node.ctx)


def _function(node: ast.AST) -> Iterator[ast.AST]:
    other = {"exp2": "exp", "log2": "log", "maximum": "minimum", "minimum": "maximum", "max": "min"}
    if _called(node, *other):
        func = ast.Attribute(node.func.value, other[node.func.attr], ast.Load())
        yield ast.Call(func, node.args, node.keywords)
    if _called(node, "trans", "sqrt", "erf"):
        yield node.args[0]
    if _called(node, "where"):
        yield node.args[1]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node.operand


def _loop(node: ast.AST) -> Iterator[ast.AST]:
    """A loop without its first or its last turn, blocks without the last one."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
        if len(node.args) == 3:
            start, end, step = node.args
            yield ast.Call(node.func, [ast.BinOp(start, ast.Add(), step), end, step], [])
            yield ast.Call(node.func, [start, ast.BinOp(end, ast.Sub(), step), step], [])
        else:
            *start, end = node.args
            start = start[0] if start else ast.Constant(0)
            yield ast.Call(node.func, [ast.BinOp(start, ast.Add(), ast.Constant(1)), end], [])
            yield ast.Call(node.func, [start, ast.BinOp(end, ast.Sub(), ast.Constant(1))], [])
    if _called(node, "cdiv"):
        yield ast.BinOp(node.args[0], ast.FloorDiv(), node.args[1])


OPERATORS: dict[str, Callable[[ast.AST], Iterator[ast.AST]]] = {
    "comparison": _comparison,
    "+ to -": partial(_binary, kind=ast.Add, to=ast.Sub),
    "- to +": partial(_binary, kind=ast.Sub, to=ast.Add),
    "* to +": partial(_binary, kind=ast.Mult, to=ast.Add),
    "/ to *": partial(_binary, kind=ast.Div, to=ast.Mult),
    "// to %": partial(_binary, kind=ast.FloorDiv, to=ast.Mod),
    "% to //": partial(_binary, kind=ast.Mod, to=ast.FloorDiv),
    "half a mask": lambda node: _left_or_right(node, ast.BitAnd),
    "dropped term": lambda node: _left_or_right(node, ast.Add, ast.Sub),
    "dropped factor": lambda node: _left_or_right(node, ast.Mult),
    "accumulation": _accumulation,
    "no mask": _no_mask,
    "neighbours": _neighbours,
    "axis": _axis,
    "constant": _constant,
    "zeros": _zeros,
    "32 bits": _32_bits,
    "broadcast": _broadcast,
    "function": _function,
    "loop": _loop,
}


class _Functions(ast.NodeVisitor):
    """Every expression and statement of every function, but not what only names things."""

    def __init__(self, tree: ast.Module) -> None:
        self.nodes: list[tuple[str, list[str], ast.AST]] = []
        for function in tree.body:
            if isinstance(function, ast.FunctionDef):
                self.name, self.parameters = function.name, [arg.arg for arg in function.args.args]
                for statement in function.body:
                    self.visit(statement)

    def generic_visit(self, node: ast.AST) -> None:
        self.nodes.append((self.name, self.parameters, node))
        super().generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if _called(node, "program_id"):  # of the only axis
            return
        self.nodes.append((self.name, self.parameters, node))
        for child in (*node.args, *(k.value for k in node.keywords if k.arg not in NOT_COMPUTED)):
            self.visit(child)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """A name for a dtype."""


# What the interpreter doesn't compute, and what the operator "axis" is for.
NOT_COMPUTED = ("input_precision", "out_dtype", "axis")


def _wrong_parameter(node: ast.AST, parameters: list[str]) -> Iterator[ast.AST]:
    """The next parameter in the signature: another stride, another tensor, another size."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in parameters[:-1]:
        yield ast.Name(parameters[parameters.index(node.id) + 1], ast.Load())


def mutants_of(source: str) -> list[Mutant]:
    """All mutants there are, function by function."""
    tree = _without_docstrings(ast.parse(source))
    found = []
    occurrences: Counter = Counter()
    for function, parameters, node in _Functions(tree).nodes:
        operators = OPERATORS | {"parameter": partial(_wrong_parameter, parameters=parameters)}
        for operator, change in operators.items():
            for changed in change(node):
                key = function, operator, _change(node, changed)
                occurrences[key] += 1
                found.append(Mutant(operator, function, tree, node, changed, occurrences[key]))
    return found


def _change(node: ast.AST, replacement: ast.AST) -> str:
    return f"{ast.unparse(node)} -> {ast.unparse(ast.fix_missing_locations(replacement))}"


def mutants(file: str) -> list[Mutant]:
    """All mutants of a file of kernels/."""
    return mutants_of((FOLDER / f"{file}.py").read_text())


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return tree


def chosen(file: str, count: int = PER_FILE) -> list[Mutant]:
    """``count`` mutants of a file, the same number of each operator as far as there are so many."""
    kinds = defaultdict(list)
    everything = mutants(file)
    for mutant in everything:
        kinds[mutant.operator].append(mutant)
    for operator, same in kinds.items():
        random.Random(f"{file} {operator}").shuffle(same)
    picked: list[Mutant] = []
    while len(picked) < min(count, len(everything)):
        picked += [same.pop() for same in kinds.values() if same][: count - len(picked)]
    return sorted(picked, key=lambda mutant: (mutant.node.lineno, mutant.name))
