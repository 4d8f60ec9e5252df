"""export_program: a quantized model as a ``torch.export`` program, for AOTInductor, Inductor and ExecuTorch.

    prepared ──freeze──▶ frozen ──to_integer──▶ integer ──────────────────────────▶ torch.export      form="integer"
                                                └──to_decomposed──▶ decomposed ──▶ torch.export      form="decomposed"

The program takes what the model takes and gives what it gives, in the user's own structure; weights are integers in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxquant.capture.calls import Call, signature_of
from fxquant.capture.islands import map_graphs
from fxquant.errors import ExportError, FxquantError, InputError
from fxquant.export.deployment import example_call, integer_model
from fxquant.export.trace import has_free_batch, refusal, trace, two_rows
from fxquant.graph.leveled import LeveledModule
from fxquant.inputs import move_to
from fxquant.passes.levels import check
from fxquant.passes.to_decomposed import to_decomposed

__all__ = ["export_program"]

FORMS = ("integer", "decomposed")
DYNAMIC = {"auto": ("sizes", "batch", "none"), "batch": ("batch", "none"), None: ("none",)}


def export_program(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    form: str = "integer",
    dynamic: str | None = "auto",
    signed: bool | None = None,
) -> torch.export.ExportedProgram:
    """A quantized model as a program of ATen operators: ``torch.export.save`` writes it, AOTInductor compiles it.

    ``torch.export.export(int8, (x,))`` gives the integer form too, for models that take and return plain tensors by
    position; dicts, keywords and the like need this function, since torch.export runs a graph module by its flat inputs.

    Example:
        >>> torch.export.save(export_program(int8, images), "int8.pt2")

    Args:
        model: what ``calibrate``, ``freeze`` or ``convert`` returned, or a trained prepared model; not touched. The
            program shares the tensors of a converted one.
        example_inputs: as for ``prepare``; None for noise of the shapes that the model was prepared with. Numbers and
            flags among them become constants of the program.
        form: ``integer``, the integer model's own arithmetic, with the same bits; or ``decomposed``, ordinary float
            operators between ``quantized_decomposed``'s quantize and dequantize, the pattern of PT2E quantization, which
            Inductor (with torchao's passes, under freezing) and ExecuTorch turn into integer kernels.
        dynamic: which sizes stay free: ``auto``, every one that the model does not fix; ``batch``, the first axis; None.
            A size that the model's code fixes is fixed in the program.
        signed: in the decomposed form, whether tensors are stored as ``int8`` (XNNPACK takes nothing else) or ``uint8``
            (oneDNN's choice); the numbers are the same. None for what the recipe says, ``uint8`` by default.

    Raises:
        LevelError, CalibrationError: the model is not ready.
        InputError: an argument or the example does not fit.
        ExportError: torch.export cannot follow a part of the model, and which; or torch lacks the operators.
    """
    if form not in FORMS:
        raise InputError(f"form={form!r} is not known. Choose one of {', '.join(FORMS)}.")
    if dynamic not in DYNAMIC:
        raise InputError(f"dynamic={dynamic!r} is not known. Choose one of {', '.join(map(str, DYNAMIC))}.")
    if signed is not None and form != "decomposed":
        raise InputError(
            "signed= is how the decomposed form stores tensors: leave it out, or ask for form='decomposed'."
        )
    made = integer_model(model).eval()
    if form == "decomposed":
        made = map_graphs(made, lambda graph: check(to_decomposed(graph, signed=signed), by="to_decomposed")).eval()
    call = example_call(model, move_to(made, example_inputs))
    args, kwargs = move_to(made, (call.args, call.kwargs))
    return _traced(made, Call(args, kwargs), DYNAMIC[dynamic])


def _traced(model: nn.Module, call: Call, attempts: tuple[str, ...]) -> torch.export.ExportedProgram:
    """The program with the most free sizes that can be had."""
    entered = _Entered(model) if isinstance(model, LeveledModule) else model

    def attempt(which: str) -> torch.export.ExportedProgram:
        example = (call.args, call.kwargs)
        given = example if which == "none" else two_rows(example)
        args, kwargs = given
        try:
            program = trace(entered, args, kwargs, which)
        except FxquantError:
            raise
        except Exception as error:  # torch.export lets through whatever the model's own code raises
            raise refusal(error, model) from error
        if which != "none" and not has_free_batch(program) and given is not example:
            raise ExportError("the batch size cannot be free")  # the second row was ours
        return program

    for which in attempts[:-1]:
        try:
            return attempt(which)
        except FxquantError:
            continue
    return attempt(attempts[-1])


class _Entered(nn.Module):
    """A graph behind the signature of the user's forward, as a plain module: torch.export runs graph modules otherwise.

    It holds the graph's own parts, so that parameters and buffers have their names.
    """

    forward: Callable[..., Any]

    def __init__(self, graph: LeveledModule) -> None:
        super().__init__()
        for registry in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[registry] = graph.__dict__[registry]
        spec, run = graph.meta.get("call"), type(graph).forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return run(self, *args) if spec is None else spec.restore(run(self, *spec.bind(args, kwargs)))

        forward.__signature__ = signature_of(graph)  # type: ignore[attr-defined]
        self.__dict__["forward"] = forward
        self.training = graph.training
