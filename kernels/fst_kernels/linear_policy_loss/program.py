"""dLoss/d(log-prob of a label) as a program that a kernel runs once per label, made from label_terms itself.

A fused kernel needs the derivative between reading a row and writing its gradient, where no Python can run. Writing the objectives a
second time in C++ is how two implementations of one loss drift apart. So label_terms is called with symbols in place of tensors
(torch.fx), and what it did to them becomes a list of instructions over fp32 numbers. A label costs some thirty of them, a row of a
vocabulary of 150,000 a million operations. An operation that the kernels do not know is an error here, not a wrong gradient.
"""

from __future__ import annotations

import builtins
import functools
import operator
from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import fx

from fst_kernels.linear_policy_loss.objective import PolicyObjective, label_terms

INPUTS = ("logprob", "token_weight", "advantages", "old_logprob", "rollout_weight", "ref_logprob")
MAX_INSTRUCTIONS = 64


class Op(IntEnum):
    """The order is that of FstOp in csrc/policy_rows.h."""

    INPUT = 0
    CONSTANT = 1
    ADD = 2
    SUB = 3
    MUL = 4
    NEG = 5
    EXP = 6
    EXPM1 = 7
    MIN = 8
    MAX = 9
    GT = 10
    LE = 11
    WHERE = 12


class Instruction(NamedTuple):
    """Instruction i makes value i from earlier values; INPUT: from INPUTS[a]. The last value is the result."""

    op: Op
    a: int = 0
    b: int = 0
    c: int = 0
    constant: float = 0.0


_OPS: dict[Any, Op] = {
    operator.add: Op.ADD, operator.sub: Op.SUB, operator.mul: Op.MUL, operator.neg: Op.NEG, operator.gt: Op.GT, operator.le: Op.LE,
    torch.exp: Op.EXP, "exp": Op.EXP, torch.expm1: Op.EXPM1, "expm1": Op.EXPM1, torch.minimum: Op.MIN, torch.maximum: Op.MAX,
    torch.where: Op.WHERE,
}  # fmt: skip


@functools.lru_cache(maxsize=64)
def coefficient_program(objective: PolicyObjective, given: frozenset[str]) -> tuple[Instruction, ...]:
    """PolicyTerms.coefficient from INPUTS; given: those of the optional ones that label_terms gets. RuntimeError: unknown operation."""
    return compile_program(functools.partial(policy_coefficient, objective), given)


def policy_coefficient(objective: PolicyObjective, **inputs: Any) -> Any:
    return label_terms(objective=objective, **inputs).coefficient


def compile_program(function: Callable[..., Any], given: frozenset[str]) -> tuple[Instruction, ...]:
    """What `function` does to the keyword arguments `given` (names of INPUTS) and logprob, token_weight, advantages."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    names = [n for n in INPUTS if n in given or n in ("logprob", "token_weight", "advantages")]
    result = function(**{name: fx.Proxy(graph.placeholder(name), tracer) for name in names})
    graph.output(result.node)
    graph.eliminate_dead_code()
    program: list[Instruction] = []
    place: dict[Instruction, int] = {}

    def emit(op: Op, a: int = 0, b: int = 0, c: int = 0, constant: float = 0.0) -> int:
        instruction = Instruction(op, a, b, c, constant)
        if instruction not in place:
            place[instruction] = len(program)
            program.append(instruction)
        return place[instruction]

    at: dict[fx.Node, int] = {}

    def value(x: Any) -> int:
        return at[x] if isinstance(x, fx.Node) else emit(Op.CONSTANT, constant=float(x))

    for node in graph.nodes:
        unused = node.op == "placeholder" and not node.users
        if node.op == "output" or unused or node.target is builtins.getattr:  # getattr: the dtype of a number
            continue
        if node.op == "placeholder":
            at[node] = emit(Op.INPUT, INPUTS.index(node.name))
        elif node.target == "to":  # every number is fp32, a bool 0 or 1
            at[node] = at[node.args[0]]
        elif node.target is torch.zeros_like:
            at[node] = emit(Op.CONSTANT)
        elif node.target == "clamp":
            low, high = (*node.args[1:], None, None)[:2]
            low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
            at[node] = at[node.args[0]]
            if low is not None:
                at[node] = emit(Op.MAX, at[node], value(low))
            if high is not None:
                at[node] = emit(Op.MIN, at[node], value(high))
        elif node.target in _OPS and not node.kwargs:
            at[node] = emit(_OPS[node.target], *(value(x) for x in node.args))
        else:
            raise RuntimeError(f"label_terms uses {node.target}, which the kernels' programs do not have")
    answer = at[result.node]
    program = program[: answer + 1] if answer < len(program) - 1 else program
    if len(program) > MAX_INSTRUCTIONS:
        raise RuntimeError(
            f"label_terms takes {len(program)} operations per label; the kernels run {MAX_INSTRUCTIONS}"
        )
    return tuple(program)
