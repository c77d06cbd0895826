"""Templates of task files, rendered without a way out of them and within bounds of length and work.

All that a template does is counted by the size of what it takes and gives, so that the bounds hold whatever it is made
of; within them it renders what lm-eval renders. Seeds and clocks have no part in it: the same template always passes.
"""

from __future__ import annotations

import re
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set, ValuesView
from functools import lru_cache, wraps
from typing import Any, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import SandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from evals.errors import TaskError

T = TypeVar("T")

LARGEST = 4_000_000  # characters of a text that is rendered, and of every value on the way
MOST_WORK = 50_000_000  # characters taken and given in one rendering, and STEP for each step
STEP = 500
PART = 16  # of a list or mapping, whatever it is; a work of its own
LONGEST_NUMBER = 100_000  # bits
# filters and methods whose result may be as long as one argument times another
GROWING = {
    *("batch", "center", "expandtabs", "indent", "join", "ljust", "regex_replace", "replace", "rjust", "slice", "sum"),
    *("to_bytes", "tojson", "translate", "wordwrap", "zfill"),
}
PRINTF_WIDTH = re.compile(r"%(?:\([^)%]*\))?([^a-zA-Z%]*)")
FORMAT_WIDTH = re.compile(r"\{[^{}]*:([^{}]*)")
MEND = "write a template that makes less, or put the finished text into the data file"


class Sandbox(SandboxedEnvironment):
    """lm-eval's template environment with its ways out closed, and bounds; a template is compiled once."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, original: jinja2.Environment) -> None:
        super().__init__(
            loader=original.loader,
            undefined=original.undefined,
            keep_trailing_newline=True,
            optimized=False,  # else constant expressions run while a template is compiled
            finalize=_counted_output,
        )
        self.meter = _Meter()
        self.template_class = _Template
        self.concat = self._joined  # type: ignore[method-assign]  # as jinja2's own native environment does
        del self.globals["lipsum"]  # makes any number of words, at random
        self.filters = {name: self._counted(name, made) for name, made in original.filters.items()}
        self.filters |= {_EACH: self._each, _TOGETHER: self._together, _WEIGHED: self._weighed}
        self.tests = {name: self._counted(name, made) for name, made in original.tests.items()}
        self.from_string = lru_cache(maxsize=1024)(self.from_string)  # type: ignore[method-assign, assignment]

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Call an operator whose result may be far larger than what it is given."""
        self.meter.take(left, right)
        if operator == "*":
            _require(_product(left, right) <= LARGEST, "*")
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _require(left.bit_length() * right <= LONGEST_NUMBER, "**")
        elif operator == "%" and isinstance(left, str):
            values = right if isinstance(right, tuple) else (right,)
            _require(_length_of_format(left, values) <= LARGEST, "%")
        return self.meter.give(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # jinja2's names
        """Call a function, method, macro or loop."""
        receiver = getattr(__obj, "__self__", None)
        name = getattr(__obj, "__name__", "")
        if isinstance(receiver, types.ModuleType):
            receiver = None
        if isinstance(__obj, LoopContext):
            args = tuple(map(__self._each, args))
        receiver_and_args, kwargs = __self.meter.check(name, (receiver, *args), kwargs)
        result = super().call(__context, __obj, *receiver_and_args[1:], **kwargs)
        __self.meter.take(receiver)  # which the call may have made longer
        return __self.meter.give(result)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return `str.format` such that the format's widths and fields make a text of a bounded length."""
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None
        text = value.__self__

        @wraps(formatted)
        def bounded(*args: Any, **kwargs: Any) -> str:
            _require(_length_of_format(text, (*args, *kwargs.values())) <= LARGEST, "format")
            return formatted(*args, **kwargs)

        return bounded

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        counted = _Counting().visit(tree)
        counted.set_environment(self)
        return counted

    def _counted(self, name: str, function: Any) -> Callable[..., Any]:
        """Make a filter or test count what it takes and gives."""
        skipped = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0  # context or environment

        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            given, kwargs = self.meter.check(name, args[skipped:], kwargs)
            return self.meter.give(function(*args[:skipped], *given, **kwargs))

        return counted

    def _each(self, values: Iterable[T]) -> Iterator[T]:
        for value in values:
            self.meter.take()
            yield value

    def _together(self, values: Sequence[object]) -> str:
        self.meter.take(*values)
        return self.meter.give("".join(map(str, values)))

    def _weighed(self, value: T) -> T:
        self.meter.take(value)
        return value

    def _joined(self, parts: Iterable[str]) -> str:
        kept, length = [], 0
        for part in parts:
            kept.append(part)
            length += len(part)
            _require(length <= LARGEST, "the text")
        return "".join(kept)


class _Template(jinja2.Template):
    def render(self, *args: Any, **kwargs: Any) -> str:
        assert isinstance(self.environment, Sandbox)
        self.environment.meter.work = 0
        return super().render(*args, **kwargs)


class _Meter(threading.local):
    """The work of the rendering that goes on in this thread."""

    work = 0

    def take(self, *values: object) -> None:
        """Count a step and what it is given."""
        self.work += STEP + sum(map(_size, values))
        if self.work > MOST_WORK:
            raise TaskError(f"a template may take {MOST_WORK // STEP:,} steps, or as much work in longer ones; {MEND}")

    def give(self, value: T) -> T:
        """Count what a step gives."""
        self.work += _size(value)
        return value

    def check(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Count a call before it is made; the arguments, where one had to be read in order to be counted as a list."""
        if name in GROWING:
            args = tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)
        first, *others = (*args, *kwargs.values()) or (None,)
        self.take(first, *others)
        factors = [abs(arg) if isinstance(arg, int) else _size(arg) for arg in others]
        if name in GROWING:
            _require(_size(first) * max([1, *factors]) <= MOST_WORK, name)
        elif name == "round":  # which makes a number of so many digits
            _require(max([0, *factors]) <= LONGEST_NUMBER // 100, name)
        elif name == "format":
            _require(_length_of_format(first, others) <= LARGEST, name)
        return args, kwargs


class _Counting(NodeTransformer):
    """Has loops, `~` and comparisons counted, which run without asking the environment."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _through(_EACH, node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through(_TOGETHER, nodes.List(node.nodes, lineno=node.lineno))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _through(_WEIGHED, node.expr)
        for operand in node.ops:
            operand.expr = _through(_WEIGHED, operand.expr)
        return node


_EACH, _TOGETHER, _WEIGHED = " each", " together", " weighed"  # no template can name them


def _through(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@jinja2.pass_environment
def _counted_output(environment: jinja2.Environment, value: T) -> T:
    assert isinstance(environment, Sandbox)
    environment.meter.take(value)
    return value


def _size(value: object) -> int:
    """Count about how many characters a value has as text; refuse above LARGEST, however often its parts are shared."""
    size, waiting = 0, [value]
    while waiting:
        part = waiting.pop()
        size += PART
        if isinstance(part, str | bytes | bytearray):
            size += len(part)
        elif isinstance(part, int):
            size += part.bit_length() // 3
        elif isinstance(part, Mapping):
            waiting += (*part.keys(), *part.values())
        elif isinstance(part, list | tuple | Set | ValuesView | range):
            waiting += part
        elif isinstance(part, Namespace):
            waiting.append(part._Namespace__attrs)
        _require(size + len(waiting) <= LARGEST, "one of its values")
    return size - PART + 1


def _product(left: object, right: object) -> int:
    """Estimate the size of left * right."""
    if isinstance(left, int) == isinstance(right, int):
        return _size(left) + _size(right)
    times, repeated = (left, right) if isinstance(left, int) else (right, left)
    return _size(repeated) * times if isinstance(times, int) and not isinstance(repeated, float) else 0


def _length_of_format(text: object, values: Sequence[object]) -> int:
    """Return more than the length of a text after its % or {} fields are filled with values."""
    if not isinstance(text, str):
        return 0
    widths = [
        digits for found in (PRINTF_WIDTH, FORMAT_WIDTH) for digits in re.findall(r"\d+", "".join(found.findall(text)))
    ]
    numbers = [abs(value) for value in values if isinstance(value, int)] if re.search(r"\*|:[^}]*\{", text) else []
    largest = max([0, *(int(digits[:9]) for digits in widths), *numbers])
    return len(text) + (text.count("%") + text.count("{")) * (largest + sum(map(_size, values)))


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise TaskError(f"a template may make {LARGEST:,} characters; {what} would make more; {MEND}")
