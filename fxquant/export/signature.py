"""The user's call of a model as named tensors, which is all that a file can hold, and back.

A forward may take and return dicts, dataclasses, lists and tuples of tensors. Each tensor among them gets a name; what
is no tensor (a number, a flag, None) is the example's and becomes part of the file.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from fxquant.capture.call_spec import Tree, put_together, take_apart
from fxquant.capture.calls import Call, signature_of
from fxquant.errors import InputError, Refusal

__all__ = ["FlatModel", "Signature", "tensors_of"]


class Signature:
    """How one model is called and what it returns.

    Args:
        model: any module.
        call: an example of a call.

    Attributes:
        input_names: one for each tensor of the call, in order.
        output_names: one for each tensor of the result, in order; known once the model was run.
    """

    def __init__(self, model: nn.Module, call: Call) -> None:
        self._signature = signature_of(model)
        self._given = self._bind(call.args, call.kwargs)
        self.input_names: list[str] = []
        self.output_names: list[str] = []
        self._tree, _ = _apart(self._given, "", self._name_input)
        self._output: tuple[Tree, Any] | None = None

    def _name_input(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            self.input_names.append(_free(name.removeprefix("_"), self.input_names))
        return value

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by parameter, defaults included."""
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InputError(f"the call does not fit the model's forward{self._signature}: {error}.") from None
        bound.apply_defaults()
        return bound.arguments

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors of a call, in the order of ``input_names``.

        Raises:
            InputError: the call has another structure than the example's, or other values that are no tensors.
        """
        tree, values = _leaves(self._bind(args, kwargs))
        example_tree, example = _leaves(self._given)
        fits = _same_structure(tree, example_tree) and all(
            isinstance(a, Tensor) == isinstance(b, Tensor) and (isinstance(a, Tensor) or a == b)
            for a, b in zip(values, example, strict=True)
        )
        if not fits:
            raise InputError(
                f"the call differs from the example in more than its tensors ({', '.join(self.input_names)}).\n"
                "  what to do: give the same arguments as in example_inputs, or export with an example like this call."
            )
        return [value for value in values if isinstance(value, Tensor)]

    def call(self, tensors: tuple[Tensor, ...]) -> Call:
        """The call that ``tensors`` stand for."""
        remaining, (_, example) = list(tensors), _leaves(self._given)
        values = [remaining.pop(0) if isinstance(value, Tensor) else value for value in example]
        arguments = put_together(self._tree, values)
        bound = inspect.BoundArguments(self._signature, arguments)
        return Call(bound.args, bound.kwargs)

    def flatten(self, result: Any) -> tuple[Tensor, ...]:
        """The tensors of the model's result; the names of the outputs are those of the first one seen."""
        names: list[str] = []

        def name_output(name: str, value: Any) -> Any:
            if isinstance(value, Tensor):
                names.append(name)
            return value

        tree, _ = _apart(result, "output", name_output)
        values = _leaves(result)[1]
        if self._output is None:
            is_named = tree[0] in ("dict", "fields", "named")
            for name in names:
                wanted = name.removeprefix("output_") if is_named else name
                self.output_names.append(_free(wanted, [*self.output_names, *self.input_names]))
            self._output = tree, [None if isinstance(value, Tensor) else value for value in values]
        return tuple(value for value in values if isinstance(value, Tensor))

    def restore(self, tensors: list[Tensor]) -> Any:
        """The user's own output structure."""
        assert self._output is not None, "the model was run"
        tree, others = self._output
        remaining = list(tensors)
        return put_together(tree, [remaining.pop(0) if other is None else other for other in others])


class FlatModel(nn.Module):
    """A model that takes tensors by position and returns a tuple of them."""

    def __init__(self, model: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.model, self.signature = model, signature

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        call = self.signature.call(tensors)
        return self.signature.flatten(self.model(*call.args, **call.kwargs))


def _apart(value: Any, name: str, leaf: Any) -> tuple[Tree, Any]:
    try:
        return take_apart(value, name, leaf)
    except Refusal as refusal:
        raise InputError(f"the model cannot be written to a file: {refusal.why}.") from None


def _leaves(value: Any) -> tuple[Tree, list[Any]]:
    """The structure of ``value`` and its tensors and numbers in order."""
    found: list[Any] = []

    def keep(_: str, leaf: Any) -> Any:
        found.append(leaf)
        return leaf

    tree, _ = _apart(value, "", keep)
    return tree, found


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors in what a model returned, in order.

    Raises:
        InputError: it holds an object of a class that has no known structure.
    """
    return [value for value in _leaves(result)[1] if isinstance(value, Tensor)]


def _same_structure(a: Tree, b: Tree) -> bool:
    if a[0] != b[0] or len(a) != len(b):
        return False
    if a[0] == "constant":
        return a[1] is b[1] or bool(a[1] == b[1])
    if a[0] == "leaf":
        return True
    keys = [key for key, _ in a[2]] == [key for key, _ in b[2]]
    return keys and all(_same_structure(x, y) for (_, x), (_, y) in zip(a[2], b[2], strict=True))


def _free(name: str, taken: list[str]) -> str:
    number, free = 1, name
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    return free
