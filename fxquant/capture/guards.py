"""Guards: what Python asks while a model is traced, and what was answered.

A size has an answer, which becomes a specialization; a rank has one, which is checked where inputs enter; a value of a
tensor has none; the mode has one for inference, and for training it has two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxquant.capture.findings import Specialization, expression, require, user_line
from fxquant.capture.proxies import ModeFlag, ValueProxy
from fxquant.capture.values import UNKNOWN, FakeRun
from fxquant.errors import Refusal

__all__ = ["ModeAskedError", "Guards"]


class ModeAskedError(Refusal):
    """Python asked for ``self.training`` while tracing a model that will be trained."""

    def __init__(self) -> None:
        super().__init__(
            "it does something else in training than in eval mode",
            "pass self.training as an argument (F.dropout(x, training=self.training)) instead of branching on it",
        )


class Guards(fx.Tracer):
    """The part of the tracer that answers.

    Attributes:
        uses_ranks: a number of dimensions was asked for.
        asked_mode: where the mode was asked for and answered with that of inference.
    """

    fake: FakeRun | None
    prefix: str
    for_training: bool
    paused: bool
    uses_ranks = False
    asked_mode: str | None = None
    _override: bool | None = None
    _checked: set[tuple[fx.Node, bool]]
    _created: list[fx.Node]
    _places: dict[fx.Node, tuple[int, int]]

    def mode(self, flag: ModeFlag) -> bool:
        """The answer to ``if self.training``."""
        if self.paused:
            return int(flag) != 0
        if not self.for_training:
            self.asked_mode = self.asked_mode or f"{self._here() or 'the top module'}, {user_line()}"
            return int(flag) != 0
        if self._override is None:
            raise ModeAskedError
        return self._override

    def rank(self, value: Any) -> int:
        """A number of dimensions: concrete, and checked where inputs enter."""
        self.uses_ranks = True
        return len(value) if isinstance(value, torch.Size) else value.dim()

    def length(self, proxy: ValueProxy) -> int:
        """``len(x)``, written down as a specialization."""
        value = proxy.value
        if value is UNKNOWN:
            raise Refusal("it needs a length that depends on data", "keep the number of elements fixed")
        if isinstance(value, torch.Size):
            return self.rank(value)
        if isinstance(value, torch.Tensor):
            asked: Any = self.create_proxy("call_method", "size", (proxy, 0), {})
        else:
            asked = self.create_proxy("call_function", len, (proxy,), {})
        return self.concrete(asked, int)

    def concrete(self, proxy: ValueProxy, kind: Any, *, asked_at: tuple[int, int] | None = None) -> Any:
        """The value of a number or shape, written down as a specialization.

        Args:
            asked_at: the instruction that asked for an index.

        Raises:
            Refusal: it depends on data.
        """
        value = proxy.value
        if value is UNKNOWN or isinstance(value, torch.Tensor):
            what = "the truth of" if kind is bool else "a number from"
            if self.fake is None:
                raise Refusal(
                    f"Python needs {what} {expression(proxy.node)}", "give example_inputs, from which shapes are known"
                )
            raise Refusal(
                f"Python needs {what} {expression(proxy.node)}, which depends on data",
                "compute with tensors (torch.where) instead of branching on values",
            )
        answer = value if kind is None else kind(value)
        if kind is bool and isinstance(value, (torch.Size, list, tuple, dict)):
            return answer
        if not self.paused:
            self._check(proxy.node, answer, exact=kind is not bool, asked_at=asked_at)
        return answer

    def withdraw(self, place: tuple[int, int]) -> None:
        """Take back what was written down while torch looked at the arguments of the call at ``place``, which keeps them."""
        while self._created and self._places.get(self._created[-1]) == place:
            check = self._created.pop()
            del self._places[check]
            self._checked.discard((check.args[0], True))  # type: ignore[arg-type]
            self.graph.erase_node(check)

    def _check(self, node: fx.Node, answer: Any, *, exact: bool, asked_at: tuple[int, int] | None = None) -> None:
        if (node, exact) in self._checked:
            return
        self._checked.add((node, exact))
        text, path, source = f"{expression(node)} is {answer}", self._here(), user_line()
        check = self.create_node("call_function", require, (node, answer, text, path, source), {})
        check.meta["specialization"] = Specialization(path, text, source, exact)
        if asked_at is not None:
            self._places[check] = asked_at

    def _here(self) -> str:
        return ".".join(part for part in (self.prefix, self.scope.module_path) if part)
