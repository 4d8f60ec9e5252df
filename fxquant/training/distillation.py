"""Distillation: a quantized model learns from a float one, from its logits and from what its layers give.

    L = T² · KL(softmax(t / T) ‖ softmax(s / T)) + w · Σ MSE(features of student, of teacher)

Source: Hinton et al., Distilling the Knowledge in a Neural Network, 1503.02531, §2 (logits, T²); Romero et al., FitNets,
1412.6550, eq. 3 (features); Mishra & Marr, Apprentice, 1711.05852 (a float teacher of a low-bit network).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.capture.islands import graphs_of
from fxquant.errors import InputError
from fxquant.graph.leveled import LeveledModule, is_container
from fxquant.nn.fake_quantize import FakeQuantize

__all__ = ["Distillation", "distill"]


def distill(
    prepared: nn.Module,
    teacher: str | nn.Module = "float",
    *,
    temperature: float = 1.0,
    features: Iterable[str] | Mapping[str, str] = (),
    feature_weight: float = 1.0,
    logit_weight: float = 1.0,
    output: str | int | None = None,
    axis: int = -1,
) -> Distillation:
    """Let a prepared model learn from a teacher. The result runs both: ``output, loss = distillation(x)``.

    Args:
        prepared: what ``prepare(..., qat=True)`` returned, or a module around it (``DistributedDataParallel``).
        teacher: ``"float"``, a copy of ``prepared`` as it is now with its quantizers off; or any module that takes the
            same inputs. It is put into eval mode, runs without gradients, follows the student's device, and is part of
            no state dict and no optimizer.
        temperature: T of both softmaxes. The term is multiplied by T², so that its gradients keep their size.
        features: paths of layers or blocks whose results are compared; from the student's paths to the teacher's where
            these differ. Of a block it is the result of its last op that counts.
        feature_weight: the weight of the sum of their mean squared errors.
        logit_weight: the weight of the logits' term; 0 leaves it out.
        output: which of several results are the logits: a key, or a position. By default ``"logits"`` of a mapping, or
            the only tensor of real numbers.
        axis: the axis of the classes; the term is the mean over all others. 1 for images of logits.

    Example:
        >>> distillation = fxquant.distill(prepared, temperature=4.0, features=["conv2"])
        >>> output, loss = distillation(images)
        >>> loss.backward()  # or (loss + cross_entropy(output, labels)).backward()

    Raises:
        InputError: a path does not exist or is no module that the model calls, or a setting makes no sense.
    """
    if not (isinstance(teacher, nn.Module) or teacher == "float") or teacher is prepared:
        raise InputError('the teacher is "float", or a module other than the student.')
    if temperature <= 0 or feature_weight < 0 or logit_weight < 0:
        raise InputError(f"temperature={temperature} has to be positive, and weights must not be negative.")
    taught = _float_copy(prepared) if isinstance(teacher, str) else teacher
    pairs = dict(features) if isinstance(features, Mapping) else {path: path for path in features}
    for role, model, paths in (("student", prepared, pairs), ("teacher", taught, pairs.values())):
        for path in paths:
            _called(model, path, role)
    return Distillation(prepared, taught.eval(), temperature, pairs, (logit_weight, feature_weight), output, axis)


def _float_copy(prepared: nn.Module) -> nn.Module:
    """The float network that a prepared model is with quantizers off; without gradients."""
    made = copy.deepcopy(_inner(prepared)).requires_grad_(False)
    quantizers = [part for part in made.modules() if isinstance(part, FakeQuantize)]
    if not quantizers:
        raise InputError(f"a {type(prepared).__name__} without quantizers: give what fxquant.prepare returned.")
    for part in quantizers:
        part.enabled = False
    return made


class Distillation:
    """A student and its teacher; no module, so that nothing registers the teacher. Made by ``distill``."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        temperature: float,
        features: dict[str, str],
        weights: tuple[float, float],
        output: str | int | None,
        axis: int,
    ) -> None:
        self.student, self.teacher, self.temperature, self.features = student, teacher, temperature, features
        self.weights, self.output, self.axis = weights, output, axis

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Run the student, then the teacher on the same inputs.

        Returns:
            What the student gives, and the loss, a float32 scalar with gradients.

        Raises:
            InputError: the two give results that cannot be compared.
        """
        with _watched(self.student, list(self.features), "student") as seen:
            given = self.student(*args, **kwargs)
        device = next((p.device for p in self.student.parameters()), None)
        if device is not None and any(p.device != device for p in self.teacher.parameters()):
            self.teacher.to(device)
        with torch.no_grad(), _watched(self.teacher.eval(), list(self.features.values()), "teacher") as wanted:
            taught = self.teacher(*args, **kwargs)
        logits, features = self.weights
        losses = [features * _squares(seen[own], wanted[other], own) for own, other in self.features.items()]
        if logits:
            found, target = (
                _logits(result, self.output, who) for result, who in ((given, "student"), (taught, "teacher"))
            )
            losses.append(logits * self._divergence(found, target))
        return given, torch.stack(losses).sum() if losses else torch.zeros((), device=device)

    def _divergence(self, logits: Tensor, target: Tensor) -> Tensor:
        """T² · KL of the two distributions, the mean over all that is not ``axis``."""
        if logits.shape != target.shape:
            raise InputError(f"the student gives logits {tuple(logits.shape)}, the teacher {tuple(target.shape)}.")
        log_q, log_p = (torch.log_softmax(x.float() / self.temperature, self.axis) for x in (logits, target))
        return (log_p.exp() * (log_p - log_q)).sum(self.axis).mean() * self.temperature**2


def _squares(found: Tensor, wanted: Tensor, path: str) -> Tensor:
    if found.shape != wanted.shape:
        raise InputError(f"{path} gives {tuple(found.shape)} in the student and {tuple(wanted.shape)} in the teacher.")
    return (found.float() - wanted.float()).square().mean()


def _logits(result: Any, output: str | int | None, who: str) -> Tensor:
    """The logits among a model's results."""
    if output is None and isinstance(result, Mapping) and "logits" in result:
        output = "logits"
    if output is not None:
        try:
            result = result[output]
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(f"the {who} gives {_told(result)}, which has no output={output!r}.") from error
    if isinstance(result, Tensor):
        return result
    values = list(result.values() if isinstance(result, Mapping) else result if isinstance(result, Sequence) else ())
    reals = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    if len(reals) != 1:
        raise InputError(
            f"the {who} gives {_told(result)}, and it is not clear what of it are logits.\n"
            "  what to do: name them with output=, a key or a position."
        )
    return reals[0]


def _told(result: Any) -> str:
    inside = f" of {', '.join(map(str, result))}" if isinstance(result, Mapping) else ""
    return f"a {type(result).__name__}{inside or (f' of {len(result)}' if isinstance(result, Sequence) else '')}"


@contextmanager
def _watched(model: nn.Module, paths: list[str], role: str) -> Iterator[dict[str, Tensor]]:
    """Inside, what modules give is kept by path: of several calls the last."""
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(part: nn.Module, args: Any, y: Any) -> None:
            seen[path] = y.clone() if isinstance(y, Tensor) else y  # an op behind it may write into it

        return hook

    hooks = [_called(model, path, role).register_forward_hook(keep(path)) for path in paths]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
    wrong = [path for path in paths if not isinstance(seen.get(path), Tensor)]
    if wrong:
        raise InputError(
            f"{wrong[0]!r} of the {role} gave no tensor in this call: choose a layer that every call reaches."
        )


def _inner(model: nn.Module) -> nn.Module:
    """The model inside of wrappers, whose paths users know."""
    for name in ("module", "_orig_mod"):
        inside = model._modules.get(name)
        if inside is not None and len(model._modules) == 1:
            return _inner(inside)
    return model


def _called(model: nn.Module, path: str, role: str) -> nn.Module:
    """The module whose result is that of ``path``: in a graph, the last op that was called inside of it."""
    model = _inner(model)
    for own, graph in graphs_of(model).items():
        inside = [node for node in graph.graph.nodes if _is_within(f"{own}.{node.meta.get('module_path', '')}", path)]
        inside = [node for node in inside if node.op not in ("placeholder", "get_attr", "output")]
        if inside and inside[-1].op == "call_module":
            return graph.get_submodule(str(inside[-1].target))
    try:
        found = model.get_submodule(path)
    except AttributeError as error:
        raise InputError(f"the {role} has no module {path!r}.") from error
    if is_container(found) and not isinstance(found, LeveledModule):
        raise InputError(
            f"{path!r} ends in an op of the {role} that stays a function, in float.\n  what to do: choose a layer in it."
        )
    return found


def _is_within(place: str, path: str) -> bool:
    place = place.strip(".")
    return place == path or place.startswith(f"{path}.")
