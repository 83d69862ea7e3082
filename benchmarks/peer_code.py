"""Runs lines out of the middle of a program: formulas that are no function of their own."""

import ast
from unittest.mock import patch

import torch

# What peers do in another way than docs/vectors/; docs/make_check.py says what it means.
DEVIATION = "sample deviation"
LIMIT = "time limit"
VALUE = "value loss"
LATE = "schedule"
STATISTICS = "statistics"
COUNTED = "last observations"
SUMS = "returns"
SMALL = "small in colour"
FIRST = "first frame"
NORM = "norm"
OFFSET = "epsilon"
ENTROPY = "no bonus"
K2 = "k2"
CLIP = "clip fraction"
AFTER = "place of the score"
ADDED = "penalty"
SCORES = "dead groups"
FLOOR = "floor of groups"


def does(statement, name):
    """Whether it assigns to the variable `name`, or calls what ends in `name()`."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        called = statement.value.func
        return name == f"{getattr(called, 'attr', getattr(called, 'id', None))}()"
    if isinstance(statement, ast.Assign):
        nodes = (node for target in statement.targets for node in ast.walk(target))
        stored = (x for x in nodes if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store))
        return any(x.id == name for x in stored)
    return False


def excerpt(source, first, last=None, before=None):
    """The code of consecutive statements: from the first that does `first` to the next that does
    `last`, with it, or that does `before`, without it; all in one block.
    """
    for node in ast.walk(ast.parse(source)):
        for field in ("body", "orelse"):
            block = getattr(node, field, ())
            if not isinstance(block, list):  # the value of a lambda
                continue
            starts = [i for i, x in enumerate(block) if does(x, first)]
            for i in starts[:1]:
                ends = [k for k, x in enumerate(block[i:], i) if does(x, last or before)]
                if ends:
                    statements = block[i : ends[0] + (before is None)]
                    return compile(ast.Module(statements, []), f"<{first}>", "exec")
    raise LookupError(f"no statements from {first} to {last or before}")


def run(source, names, first, last=None, before=None):
    """Executes such lines; `names` are the variables that they read, and then all there are."""
    exec(excerpt(source, first, last, before), names)
    return names


def with_population_deviation():
    """A context in which `x.std()` of tensors divides by M instead of M - 1."""
    std = torch.Tensor.std
    return patch.object(torch.Tensor, "std", lambda x: std(x, correction=0))
