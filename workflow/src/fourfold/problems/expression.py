"""Evaluates the small expressions inside downloaded templates, and nothing else.

Templates are data from the network, so they are never handed to Python's own `eval`. An expression is parsed, every
node that is not arithmetic, a comparison, a literal, a variable or a call of a listed function is refused, and sizes
are bounded. Numbers are exact: a quotient is a Fraction, and no rounding error decides whether 29 / 100 * 300 is whole.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

MAX_SOURCE = 4000
MAX_DEPTH = 40
MAX_NUMBER = 10**15
MAX_EXPONENT = 16
MAX_ITEMS = 100_000

Env = Mapping[str, Any]
Compiled = Callable[[Env], Any]
Functions = Mapping[str, Callable[..., Any]]

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda a, b: Fraction(a) / b,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: lambda a, b: _power(a, b),
}
_ORDER: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_EQUALITY: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {ast.Eq: operator.eq, ast.NotEq: operator.ne}


class ExpressionError(Exception):
    """The expression is not one of the kind that templates hold, or its value is out of bounds."""


def compile_expression(source: str, functions: Functions) -> Compiled:
    """Checks an expression and returns a function of its variables.

    Args:
        source: for instance `n - k*x` or `divides(n, 12)`.
        functions: what it may call, by name. They get positional arguments only.
    Raises ExpressionError here for anything but the allowed syntax, and in the returned function for values out of
    bounds, unknown variables, wrong types and divisions by zero.
    """
    if len(source) > MAX_SOURCE:
        raise ExpressionError(f"expression of {len(source)} characters")
    try:
        node = ast.parse(source.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ExpressionError(f"{source!r}: {error}") from None
    run = _compile(node, functions, 0)

    def evaluate(env: Env) -> Any:
        try:
            return run(env)
        except (ArithmeticError, TypeError, ValueError, KeyError, IndexError) as error:
            raise ExpressionError(f"{source!r}: {type(error).__name__} {error}") from None

    return evaluate


def number(value: Any) -> int | Fraction:
    """The value if it is a number within bounds; raises ExpressionError otherwise."""
    # Nearly all are small ints, and templates draw many thousand before their conditions are met.
    if type(value) is int and -MAX_NUMBER <= value <= MAX_NUMBER:
        return value
    if isinstance(value, bool) or not isinstance(value, int | Fraction):
        raise ExpressionError(f"{value!r} is no number")
    exact: Any = value
    if abs(exact) > MAX_NUMBER or exact.denominator > MAX_NUMBER:
        raise ExpressionError("a number out of bounds")
    return exact


def _power(base: Any, exponent: Any) -> Any:
    if not isinstance(exponent, int) or not 0 <= exponent <= MAX_EXPONENT:
        raise ExpressionError(f"power of {exponent}")
    return base**exponent


def _compile(node: ast.expr, functions: Functions, depth: int) -> Compiled:
    if depth > MAX_DEPTH:
        raise ExpressionError("expression nested too deeply")
    for kind, build in _BUILDERS.items():
        if isinstance(node, kind):
            return build(node, functions, depth + 1)
    raise ExpressionError(f"{type(node).__name__} is not allowed")


def _constant(node: ast.Constant, functions: Functions, depth: int) -> Compiled:
    value: Any = node.value
    if isinstance(value, float):
        value = Fraction(repr(value)) if abs(value) <= MAX_NUMBER else None
    if isinstance(value, int | Fraction) and not isinstance(value, bool):
        value = number(value)
    elif not isinstance(value, str | bool):
        raise ExpressionError(f"constant {node.value!r} is not allowed")
    return lambda env: value


def _name(node: ast.Name, functions: Functions, depth: int) -> Compiled:
    name = node.id
    return lambda env: env[name]


def _sequence(node: ast.List | ast.Tuple, functions: Functions, depth: int) -> Compiled:
    items = [_compile(item, functions, depth) for item in node.elts]
    return lambda env: [item(env) for item in items]


def _binary(node: ast.BinOp, functions: Functions, depth: int) -> Compiled:
    apply = _ARITHMETIC.get(type(node.op))
    if apply is None:
        raise ExpressionError(f"{type(node.op).__name__} is not allowed")
    left, right = _compile(node.left, functions, depth), _compile(node.right, functions, depth)
    return lambda env: number(apply(number(left(env)), number(right(env))))


def _unary(node: ast.UnaryOp, functions: Functions, depth: int) -> Compiled:
    operand = _compile(node.operand, functions, depth)
    if isinstance(node.op, ast.USub):
        return lambda env: -number(operand(env))
    if isinstance(node.op, ast.Not):
        return lambda env: not operand(env)
    raise ExpressionError(f"{type(node.op).__name__} is not allowed")


def _compare(node: ast.Compare, functions: Functions, depth: int) -> Compiled:
    first = _compile(node.left, functions, depth)
    steps: list[tuple[Callable[[Any, Any], bool], bool, Compiled]] = []
    for op, comparator in zip(node.ops, node.comparators, strict=True):
        ordered = type(op) in _ORDER
        apply = _ORDER.get(type(op)) or _EQUALITY.get(type(op))
        if apply is None:
            raise ExpressionError(f"{type(op).__name__} is not allowed")
        steps.append((apply, ordered, _compile(comparator, functions, depth)))

    def compare(env: Env) -> bool:
        left = first(env)
        for apply, ordered, comparator in steps:
            right = comparator(env)
            if ordered:
                number(left), number(right)
            if not apply(left, right):
                return False
            left = right
        return True

    return compare


def _boolean(node: ast.BoolOp, functions: Functions, depth: int) -> Compiled:
    parts = [_compile(part, functions, depth) for part in node.values]
    combine = all if isinstance(node.op, ast.And) else any
    return lambda env: combine(part(env) for part in parts)


def _choice(node: ast.IfExp, functions: Functions, depth: int) -> Compiled:
    test, body, other = (_compile(part, functions, depth) for part in (node.test, node.body, node.orelse))
    return lambda env: body(env) if test(env) else other(env)


def _call(node: ast.Call, functions: Functions, depth: int) -> Compiled:
    if not isinstance(node.func, ast.Name) or node.func.id not in functions or node.keywords:
        raise ExpressionError(f"call of {ast.unparse(node.func)[:40]} is not allowed")
    function = functions[node.func.id]
    arguments = [_compile(argument, functions, depth) for argument in node.args]
    return lambda env: function(*[argument(env) for argument in arguments])


_BUILDERS: dict[type[ast.expr] | tuple[type[ast.expr], ...], Callable[..., Compiled]] = {
    ast.Constant: _constant,
    ast.Name: _name,
    (ast.List, ast.Tuple): _sequence,
    ast.BinOp: _binary,
    ast.UnaryOp: _unary,
    ast.Compare: _compare,
    ast.BoolOp: _boolean,
    ast.IfExp: _choice,
    ast.Call: _call,
}


def variables(source: str) -> set[str]:
    """Names that an expression mentions, functions included. Raises ExpressionError when it does not parse."""
    try:
        return {node.id for node in ast.walk(ast.parse(source.strip(), mode="eval")) if isinstance(node, ast.Name)}
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ExpressionError(f"{source!r}: {error}") from None
