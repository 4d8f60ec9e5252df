"""A recipe held against a target: what the target cannot do is refused, and what the recipe leaves open is filled in."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator
from dataclasses import replace

from fxquant.errors import InputError, RecipeError, SchemeError
from fxquant.numerics.scheme import Scheme
from fxquant.recipe import Op, Recipe, Refusals, Setting
from fxquant.targets import get
from fxquant.targets.target import Target

__all__ = ["filled", "fit_target"]


def fit_target(
    target: str | Target,
    recipe: Recipe,
    *,
    ops: Collection[str],
    refusal: Refusals,
    estimator: str | None = None,
    processor: str | None = None,
) -> tuple[Target, Recipe]:
    """The target of that name, held against the op table and the recipe; and the recipe, completed with its schemes.

    Args:
        target: its name, or one of your own.
        recipe: what it must be able to run.
        ops: the names of the op table.
        refusal: what the rules of quantizers cannot have, for presets.
        estimator: how ranges of tensors are found that the recipe leaves open; as the target has it where None.
        processor: where it will run, by a name of ``PROCESSORS``; as the target has it where None.

    Raises:
        InputError: there is none, or it names ops that are not among ``ops``, or there is no such processor.
        RecipeError: the recipe asks it for what it does not have.
    """
    found = get(target)
    if processor is not None:
        try:
            found = replace(found, processor=processor)
        except SchemeError as error:
            raise InputError(str(error)) from None
    _require_known(found, ops)
    fitted = found if estimator is None else found.with_estimator(estimator)
    recipe = recipe.completed(fitted.activation, fitted.weight, refusal)
    _require_possible(recipe, found)
    return fitted, recipe


def _require_possible(recipe: Recipe, target: Target) -> None:
    """Refuse a recipe that asks ``target`` for what it does not have.

    Raises:
        RecipeError: says which setting, why, and what to do.
    """
    for where, setting in _settings(recipe):
        for kind in ("activation", "input", "weight"):
            scheme: Scheme | None = getattr(setting, kind)
            if scheme is None:
                continue
            refused = target.refuses_weight(scheme) if kind == "weight" else target.refuses_activation(scheme)
            if refused is None:
                continue
            kept = target.weight if kind == "weight" else target.activation
            remedy = f"leave {kind}= out, and get {kept}; or prepare for another target"
            if recipe.title:
                where = f"the preset {recipe.title}"
                bits = "weight_bits" if kind == "weight" else "activation_bits"
                remedy = f"leave {bits}= out, and get {kept.bits} bits; or prepare for another target"
            raise RecipeError(
                f"{where} asks for the {kind} scheme {scheme}, which target {target.name!r} cannot run: {refused}.\n"
                f"  where this is said: {target.source or 'in the target'}\n  what to do: {remedy}."
            )
    for selector, chosen in recipe.pairs:
        lacks = target.lacks(selector.name) if isinstance(selector, Op) and chosen is not None else None
        if lacks is not None:
            raise RecipeError(
                f"the recipe's setting of {selector!r} asks target {target.name!r} for integers that it cannot compute: "
                f"{lacks.why}.\n  what to do: take the setting out, or {lacks.what_to_do}."
            )


def _settings(recipe: Recipe) -> Iterator[tuple[str, Setting]]:
    for selector, setting in recipe.pairs:
        if setting is not None:
            yield f"the recipe's setting of {selector!r}", setting
    if recipe.default is not None:
        yield "the recipe's default", recipe.default


def filled(
    setting: Setting,
    target: Target,
    op: str,
    *,
    path: str,
    has_weight: bool,
    in_groups: bool = False,
    may_share: bool = False,
) -> Setting:
    """``setting`` with the schemes that it leaves open, for one op.

    Args:
        setting: what the recipe says.
        target: what the rest is taken from.
        op: the op's name in the table.
        path: where it stands, for the message.
        has_weight: whether it has a weight to quantize.
        in_groups: whether it computes in several groups.
        may_share: whether its weight gets one scale where the target takes no more, whatever the setting says.

    Raises:
        RecipeError: its weight cannot have one scale per channel there.
    """
    weight = setting.weight
    takes = target.takes_per_channel(op, in_groups=in_groups)
    if may_share and weight is not None and not takes:
        weight = replace(weight, per_channel=False)
    if has_weight and weight is not None and weight.per_channel and not takes:
        raise RecipeError(
            f"the recipe gives {path} the weight scheme {weight}, and {target.title} takes one scale for the weight of a "
            f"{op}{' in groups' if in_groups else ''}.\n"
            "  what to do: give it a setting of its own with per_channel=False, or leave weight= out."
        )
    weight = target.weight_of(op, in_groups=in_groups) if weight is None else target.kept_narrow(weight)
    return Setting(weight=weight, activation=setting.activation or target.activation, input=setting.input)


def _require_known(target: Target, known: Collection[str]) -> None:
    """Refuse a target that names ops which are not in the table.

    Raises:
        InputError: names the op, the field, and the nearest op that there is.
    """
    for name, ops in target.named_ops().items():
        for op in sorted(ops - set(known)):
            near = difflib.get_close_matches(op, sorted(known), n=1)
            raise InputError(
                f"target {target.name!r} names the op {op!r} in {name}, and the op table has none of that name."
                f"{f' Did you mean {near[0]!r}?' if near else ''}\n  what to do: see fxquant ops for the names."
            )
