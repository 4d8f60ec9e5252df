"""One op, told once: its spellings, behaviour, integer form, ONNX form and an example.

Everything else follows from the entry: tracing recognizes the spellings, ``canonicalize`` writes one of them, passes act
on the behaviour, ``to_integer`` builds the integer form, the docs and the generated tests read the rest.
"""

from __future__ import annotations

import ast
import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.behaviour import Behaviour, FloatOnly
from fxquant.capture.kept import keep, seen_when_called
from fxquant.errors import Refusal
from fxquant.nn.integer import Site
from fxquant.ops.example import Example

__all__ = ["ENTRIES", "Call", "OpEntry", "Parameter", "scalar", "without_dtype"]


ENTRIES: dict[str, OpEntry] = {}
"""Every entry by name, in the order of definition; filled by importing the families (see ``ops.table``)."""

_OWNERS: dict[Any, OpEntry] = {}
"""The first entry of each spelling."""


@dataclass(frozen=True)
class Parameter:
    """One argument of an op: its name, whether it is a tensor, its default, whether it takes all further positionals."""

    name: str
    operand: bool
    required: bool
    default: Any
    variadic: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class OpEntry:
    """An op of the table.

    Args:
        name: torch's functional name.
        function: the canonical function; takes operands by position and attributes by name.
        signature: its arguments in order, as ``"input*, dim=None"``: ``*`` marks a tensor operand, ``...name`` takes all
            further positional arguments.
        behaviour: what passes know of it.
        functions, methods: other spellings. A Python function stays one node however the model reaches it.
        inplace_functions, inplace_methods: spellings that overwrite their first operand.
        modules: module classes, subclasses aside; a module with parameters stays a module, where it has a fake-quant class,
            others become calls of ``function``.
        named_functions: spellings in packages that need not be installed, as ``"package.module.function"``.
        parametric: the module has state (parameters, statistics, a mode), named in the signature as tensors.
        drops: it drops values while training and does nothing in eval mode.
        read: reads the attributes off a module whose own attributes are named otherwise.
        integer: builds the integer form from a ``Site``; None where the op has none.
        fresh: the result is a buffer of its own that no backward formula reads again, so a quantizer may overwrite it.
        views: the result may share memory with the first operand.
        quantized: ``function`` moves values of torch's quantized tensors as well.
        quantized_as: torch's operator for it on quantized tensors, ``(input, output_scale, output_zero_point)``, where that
            is faster than ``function`` between a dequantization and a quantization.
        sensitive: operands in which a rounding error of one step can make an error of any size in the result (a phase, an
            exponent, a denominator), each with why, as ``{"other": "it divides by it"}``; not rounded where they are no
            plain numbers.
        masked: operands in which people write masks: a value far below the others there only vanishes.
        additive: the result is a sum of the operands, so that one of another magnitude leaves the others no integers.
        native: what the native kernels do for its integer form, where that does not say it (``kernels.native``).
        returns: ``tensor`` or ``tuple``.
        order: the positional arguments of the spellings in ``functions``, where they come in another order.
        accepts: whether a call is this op's, where entries with different behaviours share a spelling.
        check: from a call to a ``Refusal`` that leaves it in float; None to accept it.
        macs: multiply-accumulates of a call whose shapes are known.
        onnx: the ONNX operator it exports to.
        exported_as: computes the op where it is written for other runtimes; ``function`` where None.
        example: makes a small model with the op and non-default attributes; mandatory.
        aliases: further names of arguments, as ``{"axis": "dim"}``.

    Raises:
        ValueError: the name or a spelling belongs to another entry, a function is of a kind that no tracer sees called, or
            the signature is not that of the function.
    """

    name: str
    function: Callable[..., Any]
    signature: str
    behaviour: Behaviour
    example: Callable[[], Example]
    functions: tuple[Callable[..., Any], ...] = ()
    methods: tuple[str, ...] = ()
    inplace_functions: tuple[Callable[..., Any], ...] = ()
    inplace_methods: tuple[str, ...] = ()
    modules: tuple[type[nn.Module], ...] = ()
    named_functions: tuple[str, ...] = ()
    parametric: bool = False
    drops: bool = False
    read: Callable[[nn.Module], dict[str, Any]] | None = None
    integer: Callable[[Site], nn.Module] | None = None
    fresh: bool = False
    views: bool = False
    quantized: bool = False
    quantized_as: str = ""
    sensitive: Mapping[str, str] = field(default_factory=dict)
    masked: tuple[str, ...] = ()
    additive: bool = False
    native: str = ""
    returns: str = "tensor"
    order: tuple[str, ...] = ()
    accepts: Callable[[Call], bool] | None = None
    check: Callable[[Call], Refusal | None] | None = None
    macs: Callable[[Call], int] | None = None
    onnx: str = ""
    exported_as: Callable[..., Any] | None = None
    aliases: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name in ENTRIES:
            raise ValueError(f"the op {self.name!r} is entered twice; an op has one entry")
        functions = (self.function, *self.functions, *self.inplace_functions)
        for function in functions:
            if not seen_when_called(function):
                raise ValueError(
                    f"{function!r} of op {self.name!r} is no function that a tracer sees called: it is of class "
                    f"{type(function).__name__}.\n  what to do: enter a plain Python function that calls it, and call that."
                )
        self._check_signature()
        self._claim(functions)
        keep(functions, self.modules, self.named_functions)
        ENTRIES[self.name] = self

    def _check_signature(self) -> None:
        """Refuse a signature that cannot be read, or names what the function does not take where that is known."""
        try:
            parameters = self.parameters
        except (ValueError, SyntaxError) as error:
            raise ValueError(
                f"signature={self.signature!r} of op {self.name!r} cannot be read: {error}.\n"
                '  what to do: write its arguments in order, as "input*, dim=None": * marks a tensor, = a plain default.'
            ) from None
        if not isinstance(self.function, FunctionType):
            return
        own = inspect.signature(self.function).parameters
        if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in own.values()):
            return
        leading = len(list(itertools.takewhile(lambda p: p.operand, parameters)))  # these are passed by position
        unknown = [p.name for p in parameters[leading:] if p.required and p.name not in own]
        if unknown or leading > len(own):
            how = f"no {unknown[0]}" if unknown else f"fewer than {leading} arguments"
            raise ValueError(
                f"signature={self.signature!r} of op {self.name!r} is not that of its function: "
                f"{self.function.__name__}({', '.join(own)}) has {how}.\n"
                "  what to do: give the arguments the names and the order that they have there."
            )

    def _claim(self, functions: tuple[Callable[..., Any], ...]) -> None:
        """Take the spellings, of which each belongs to one entry, or to several that say which calls they accept."""
        if isinstance(self.behaviour, FloatOnly):
            return
        spellings = {*functions, *self.methods, *self.inplace_methods, *self.modules, *self.named_functions}
        for spelling in spellings:
            owner = _OWNERS.get(spelling)
            if owner is not None and owner.accepts is None:
                raise ValueError(
                    f"{getattr(spelling, '__qualname__', spelling)} is a spelling of the op {owner.name!r} already, so that "
                    f"{self.name!r} would never be asked.\n  what to do: enter a function or class of your own."
                )
        _OWNERS.update({spelling: self for spelling in spellings if spelling not in _OWNERS})

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The signature, parsed."""
        return tuple(_parse(part.strip()) for part in _split(self.signature))

    @cached_property
    def title(self) -> str:
        """The op's name as a class is named: ``ReLU``, ``MaxPool2d``, ``Add``."""
        for module in self.modules:
            if module.__name__.lower() == self.name.replace("_", ""):
                return module.__name__
        return "".join(part.capitalize() for part in self.name.split("_"))

    @cached_property
    def operand_names(self) -> tuple[str, ...]:
        """The names of the tensor arguments, in order."""
        return tuple(p.name for p in self.parameters if p.operand)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name, defaults left out.

        Raises:
            Refusal: an argument is unknown, given twice, or missing.
        """
        bound: dict[str, Any] = {}
        remaining = list(args)
        for parameter in self.parameters:
            if parameter.variadic and remaining:
                single = len(remaining) == 1 and isinstance(remaining[0], (tuple, list, fx.Node))
                bound[parameter.name] = remaining[0] if single else tuple(remaining)
                remaining = []
            elif remaining:
                bound[parameter.name] = remaining.pop(0)
        if remaining:
            raise Refusal(f"{self.name} is called with more arguments than {self.signature!r}")
        for key, value in kwargs.items():
            key = self.aliases.get(key, key)
            if key in bound or all(key != p.name for p in self.parameters):
                raise Refusal(f"{self.name} is called with {key}={value!r}, which is not supported")
            bound[key] = value
        missing = [p.name for p in self.parameters if p.required and p.name not in bound]
        if missing:
            raise Refusal(f"{self.name} is called without {', '.join(missing)}")
        return {
            p.name: bound[p.name]
            for p in self.parameters
            if p.name in bound and (p.required or not _same(bound[p.name], p.default))
        }

    def arrange(self, bound: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Bound arguments as a call: leading operands by position, everything else by name."""
        args: list[Any] = []
        for parameter in self.parameters:
            if not parameter.operand or parameter.name not in bound:
                break
            args.append(bound[parameter.name])
        positional = {p.name for p in self.parameters[: len(args)]}
        return tuple(args), {name: value for name, value in bound.items() if name not in positional}

    def read_module(self, module: nn.Module) -> dict[str, Any]:
        """The op's attributes (not its operands) as ``module`` holds them."""
        if self.read is not None:
            return self.read(module)
        names = [p for p in self.parameters if not p.operand and p.name != "training" and hasattr(module, p.name)]
        values = {p.name: getattr(module, p.name) for p in names}
        return {p.name: values[p.name] for p in names if not _same(values[p.name], p.default)}

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _named, (self.name,)

    def __deepcopy__(self, memo: dict[int, Any]) -> OpEntry:
        return self


@dataclass(frozen=True)
class Call:
    """One call of an op in a graph: the entry with its arguments by name.

    Args:
        entry: the op.
        arguments: bound arguments, defaults left out; nodes where the graph computes them.
        node: the node, for its facts.
        module: the module where the op is called as one.
    """

    entry: OpEntry
    arguments: dict[str, Any]
    node: fx.Node
    module: nn.Module | None = None

    def __getitem__(self, name: str) -> Any:
        """The value of argument ``name``, or its default."""
        if name in self.arguments:
            return self.arguments[name]
        return next(p.default for p in self.entry.parameters if p.name == name)

    @property
    def operands(self) -> list[fx.Node]:
        """The nodes that the tensor arguments are, lists of tensors flattened, in order."""
        found: list[fx.Node] = []
        for name in self.entry.operand_names:
            value = self.arguments.get(name)
            items = value if isinstance(value, (list, tuple)) else [value]
            found.extend(item for item in items if isinstance(item, fx.Node))
        return found

    def operand(self, name: str) -> fx.Node | None:
        """The node given for tensor argument ``name``."""
        value = self.arguments.get(name)
        return value if isinstance(value, fx.Node) else None

    def shape(self, name: str | None = None) -> tuple[int, ...]:
        """The recorded shape of operand ``name``, of the result where None; parameters of modules are operands too."""
        if name is None:
            return tuple(self.node.meta["shape"])
        held: Any = getattr(self.module, name, None)
        operand = self.operand(name)
        return tuple(held.shape if operand is None else operand.meta["shape"])

    @property
    def attributes(self) -> dict[str, Any]:
        """The arguments that are not operands."""
        return {name: value for name, value in self.arguments.items() if name not in self.entry.operand_names}


def _split(signature: str) -> list[str]:
    parts, depth, current = [], 0, ""
    for character in signature:
        depth += character in "([{"
        depth -= character in ")]}"
        if character == "," and not depth:
            parts.append(current)
            current = ""
        else:
            current += character
    return [*parts, current] if current.strip() else parts


def _parse(text: str) -> Parameter:
    name, _, default = (part.strip() for part in text.partition("="))
    variadic, operand = name.startswith("..."), name.endswith("*")
    value = ast.literal_eval(default) if default else None
    return Parameter(name.strip(".*"), operand, not default and not variadic, value, variadic)


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, (fx.Node, Tensor)):
        return False
    if isinstance(value, (tuple, list)) and isinstance(default, int):
        return bool(value) and all(type(v) is type(default) and v == default for v in value)
    return type(value) is type(default) and value == default


def _named(name: str) -> OpEntry:
    return ENTRIES[name]


def scalar(value: Any) -> bool:
    """Whether ``value`` is a plain Python number."""
    return isinstance(value, (int, float)) and not isinstance(value, (bool, torch.SymInt, torch.SymFloat))


def without_dtype(call: Call) -> Refusal | None:
    """A check for ops that may be told to compute in another dtype: refused, since integers have their own."""
    return None if call["dtype"] is None else Refusal(f"it is called with dtype={call['dtype']}")
