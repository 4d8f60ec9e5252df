"""A model made ready for runtimes once: frozen, in integers, as a QDQ model and as a file, each when it is first asked for.

prepared ──freeze──▶ frozen ──convert──▶ integer ──▶ torch, native
                                         └──▶ QDQ form ──▶ file ──▶ ONNX Runtime, OpenVINO, …
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.capture.calls import Call, as_call
from fxquant.capture.islands import graphs_of, level_of
from fxquant.errors import FxquantError, InputError, LevelError
from fxquant.flow import convert, freeze
from fxquant.inputs import make_inputs

__all__ = ["Deployment", "example_call", "integer_model"]


class Deployment:
    """A quantized model of any level, and what runtimes take of it.

    Args:
        model: what ``calibrate``, ``freeze`` or ``convert`` returned; not touched.
        example_inputs: as for ``prepare``; None for noise of the shapes that the model was prepared with.
        write: what makes its file, see ``to_onnx.deployed``.

    Raises:
        LevelError: it is no such model.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any = None, write: Callable[[Deployment], Any] | None = None
    ) -> None:
        self._model, self._example, self._write = _at_rest(model), example_inputs, write
        self._files: list[Any] = []

    @classmethod
    def of(cls, model: Any, example_inputs: Any = None) -> Deployment:
        """``model`` itself where it is deployed already; its own example stands unless another is given."""
        return model if isinstance(model, cls) and example_inputs is None else cls(model, example_inputs)

    @cached_property
    def frozen(self) -> nn.Module:
        """The frozen model; the integer model where that was given.

        Raises:
            CalibrationError: some quantizers have no range yet.
        """
        return freeze(self._model) if level_of(self._model) == "prepared" else self._model

    @cached_property
    def integer(self) -> nn.Module:
        """The integer model.

        Raises:
            CalibrationError: some quantizers have no range yet.
        """
        return self.frozen if level_of(self.frozen) == "integer" else convert(self.frozen)

    @cached_property
    def example(self) -> Call:
        """The example as a call.

        Raises:
            InputError: there is none, or it does not fit.
        """
        return example_call(self.integer, self._example)

    @property
    def call(self) -> Call | None:
        """The example as a call; None where none was given and the model was prepared without one.

        Raises:
            InputError: it does not fit.
        """
        try:
            return self.example
        except InputError:
            if self._example is not None:
                raise
            return None

    def with_call(self, call: Call) -> Deployment:
        """The same model, and the file if it is made, with another example."""
        _ = self.integer  # made before it is shared
        other = copy.copy(self)
        other.__dict__.update(example=call, _example=call.kwargs or call.args)
        return other

    def file(self) -> Any:
        """The ONNX file, an ``OnnxFile``; made once, and what went wrong is said each time.

        Raises:
            as ``make_onnx``.
        """
        assert self._write is not None, "only what to_onnx.deployed makes has a file"
        if not self._files:
            try:
                self._files.append(self._write(self))
            except FxquantError as error:
                self._files.append(error)
        if isinstance(self._files[0], FxquantError):
            raise self._files[0]
        return self._files[0]


def integer_model(model: nn.Module) -> nn.Module:
    """``model`` converted, if it is not yet.

    Raises:
        LevelError, CalibrationError: it is not ready.
    """
    return Deployment(model).integer


def _at_rest(model: Any) -> nn.Module:
    """``model`` in eval mode: a copy where it is being trained, since parts of it are shared with what is made of it."""
    level = level_of(model) if isinstance(model, nn.Module) else None
    if level in ("prepared", "frozen", "integer"):
        return copy.deepcopy(model).eval() if any(part.training for part in model.modules()) else model
    what = f"a {type(model).__name__}" if level is None else f"a model at level {level!r}"
    raise LevelError(
        f"export_onnx and compile take a calibrated, frozen or converted model; this was given {what}.\n"
        "  what to do: give what fxquant.prepare and fxquant.calibrate, or fxquant.convert, return."
    )


def example_call(model: nn.Module, example_inputs: Any) -> Call:
    """The call that ``example_inputs`` stand for; None for noise of the shapes that ``model`` was prepared with.

    Raises:
        InputError: there are none.
    """
    if example_inputs is not None:
        return as_call(model, example_inputs)
    described = next(iter(graphs_of(model).values())).settings.get("inputs")
    if described is None:
        raise InputError(
            "example_inputs are missing: the model was prepared without any, and a file needs shapes.\n"
            "  what to do: give example_inputs, as for fxquant.prepare."
        )
    generator = torch.Generator().manual_seed(0)
    made = make_inputs(described, torch.device("cpu"))
    return as_call(model, _map(made, lambda x: torch.randn(x.shape, generator=generator).to(x.dtype)))


def _map(value: Any, change: Any) -> Any:
    """``value`` with ``change`` made to the floating tensors in its lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    return type(value)(_map(item, change) for item in value) if isinstance(value, (list, tuple)) else value
