"""The tools of ``dsv4 chat``: a calculator, a clock, and a table of one's own. Nothing is evaluated as code."""

from __future__ import annotations

import ast
import json
import math
import operator
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from dsv4.text.message import Tool

MAX_EXPRESSION = 200  # characters; also bounds how deep brackets nest
MAX_EXPONENT = 1000
OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Mod: operator.mod, ast.Pow: lambda base, power: _power(base, power),
}  # fmt: skip
SIGNS: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def _tool(name: str, description: str, **properties: str) -> Tool:
    given = {key: {"type": "string", "description": text} for key, text in properties.items()}
    parameters = {"type": "object", "properties": given, "required": list(given), "additionalProperties": False}
    return Tool(function={"name": name, "description": description, "parameters": parameters})


TOOLS = (
    _tool("calculator", "Work out an arithmetic expression.", expression="Numbers with + - * / % ** and brackets."),
    _tool("clock", "Tell the date and the time."),
    _tool("lookup", "Look up the value of a key.", key="What to look up."),
)


def run_tool(name: str, arguments: str, *, table: Mapping[str, str], now: datetime) -> str:
    """Run a call of the model; what is wrong with it is a result too."""
    try:
        given = json.loads(arguments or "{}")
    except ValueError:
        return "error: the arguments are no JSON"
    if not isinstance(given, dict):
        return "error: the arguments are no object"
    if name == "clock":
        return f"{now:%A %Y-%m-%d %H:%M:%S}"
    if name == "lookup":
        return table.get(str(given.get("key", "")).strip().lower(), "not found")
    if name == "calculator":
        return calculate(str(given.get("expression", "")))
    return f"error: there is no tool {name}"


def read_table(text: str) -> dict[str, str]:
    """The values of lines ``key = value``; case and spaces of keys do not count."""
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {key.strip().lower(): value.strip() for key, value in pairs}


def calculate(expression: str) -> str:
    """The value of an arithmetic expression, or what is wrong with it."""
    if len(expression) > MAX_EXPRESSION:
        return f"error: more than {MAX_EXPRESSION} characters"
    try:
        value = _value(ast.parse(expression.strip().replace("^", "**"), mode="eval").body)
        if isinstance(value, float) and not math.isfinite(value):
            return "error: the result is no finite number"
        return f"{value:.12g}" if isinstance(value, float) else str(value)
    except (ValueError, SyntaxError, ArithmeticError, RecursionError) as error:
        return f"error: {error}"


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in SIGNS:
        return SIGNS[type(node.op)](_value(node.operand))
    raise ValueError(f"{ast.unparse(node)} is no arithmetic")


def _power(base: float, power: float) -> float:
    if abs(power) > MAX_EXPONENT or abs(base) > 10**6:
        raise ValueError(f"{base} ** {power} is too large")
    value = base**power
    if isinstance(value, complex):
        raise ValueError(f"{base} ** {power} is no real number")
    return value
