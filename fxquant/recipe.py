"""Which tensors get which scheme: ordered settings, the first that matches wins, one that matched nothing is an error."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from fxquant.errors import RecipeError, SchemeError
from fxquant.numerics.scheme import OBSERVED, QUANTIZERS, Scheme

__all__ = ["FIRST", "INPUT", "LAST", "OUTPUT", "PRESETS", "Op", "Place", "Preset", "Recipe", "Setting", "Site"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How an op is quantized: its weight, if it has one, and its output.

    Example:
        >>> Setting(weight=Scheme.weight(4), activation=Scheme.activation(8, estimator="mse"))

    Args:
        weight: the weight's scheme; None for the target's own.
        activation: the output's scheme; None for the target's own.
        input: the scheme in which an op that multiplies (a weighted op, a product of matrices) reads its tensors, where
            that is not the tensor's own; None for as it is. What only such ops read, in one scheme, is rounded to it at
            once; what others read too, such as a residual sum, is rounded anew for each of them.
    """

    weight: Scheme | None = None
    activation: Scheme | None = None
    input: Scheme | None = None

    def __post_init__(self) -> None:
        for name, maker in (("weight", "weight"), ("activation", "activation"), ("input", "activation")):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Scheme):
                bits = value if isinstance(value, int) and not isinstance(value, bool) and 2 <= value <= 16 else 8
                raise RecipeError(f"{name}={value!r}: write {name}=fxquant.Scheme.{maker}({bits}).")
        if self.weight is not None and not self.weight.symmetric:
            raise RecipeError(
                f"weight scheme {self.weight}: weights need zero point 0. Set symmetric=True, or write "
                f"weight=fxquant.Scheme.weight({self.weight.bits})."
            )
        if self.weight is not None and not self.weight.signed:
            raise RecipeError(
                f"weight scheme {self.weight}: weights take both signs. Set signed=True, or write "
                f"weight=fxquant.Scheme.weight({self.weight.bits})."
            )
        for name in ("activation", "input"):
            scheme = getattr(self, name)
            if scheme is not None and scheme.per_channel:
                raise RecipeError(f"{name} scheme {scheme}: an activation has one scale. Set per_channel=False.")


@dataclass(frozen=True)
class Op:
    """Selects every op of one name, as the op table spells it: ``Op("softmax")``.

    Example:
        >>> Recipe({Op("add"): Setting(activation=Scheme.activation(16))})
    """

    name: str


@dataclass(frozen=True)
class Place:
    """Selects by where an op stands in the model: ``FIRST``, ``LAST``, ``INPUT`` and ``OUTPUT`` are all there are."""

    name: str

    def __repr__(self) -> str:
        return self.name


FIRST = Place("FIRST")
"""The weighted ops that no other weighted op stands before."""
LAST = Place("LAST")
"""Those that no other stands behind."""
INPUT = Place("INPUT")
"""The tensors that the model is given; ``activation`` is their scheme."""
OUTPUT = Place("OUTPUT")
"""The ops whose results the model returns; with an ``activation``, these are rounded where they would leave as floats."""
PLACES = {place.name: place for place in (FIRST, LAST, INPUT, OUTPUT)}


@dataclass(frozen=True)
class Site:
    """What a selector is held against: one op of the user's model, or one of its inputs."""

    path: str
    op: str
    module_type: type[nn.Module] | None = None
    places: frozenset[Place] = frozenset()


Selector = str | type[nn.Module] | Op | Place
Refusals = Callable[[Scheme, str], object]
"""Why the rule that a scheme names cannot quantize a ``"tensor"`` or a ``"weight"`` to it; None where it can."""
FLOAT_DTYPES = ("float32", "bfloat16")

PRESETS = {
    "academic": "first and last layers and the inputs wide, residual sums and what they add wide, all else in few bits",
    "deploy": "everything in few bits, as the target computes it",
}
"""The presets, each with what it says."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings that follow from a target's own schemes; made by ``Recipe.preset``.

    Args:
        name: one of ``PRESETS``.
        weight_bits, activation_bits: the few bits; None for the target's own.
        rule: how grids are made, by a name of ``fxquant.quantizers.RULES``; where a rule has no weights, or no tensors, or
            cannot have the wide bits, those are observed.
        wide_bits: the bits of what is wide, weights of first and last layers included.

    Raises:
        RecipeError: there is no such preset or rule.
    """

    name: str
    weight_bits: int | None = None
    activation_bits: int | None = None
    rule: str = OBSERVED
    wide_bits: int = 8

    def __post_init__(self) -> None:
        for what, value, known in (("preset", self.name, list(PRESETS)), ("rule", self.rule, list(QUANTIZERS))):
            if value not in known:
                near = difflib.get_close_matches(str(value), known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise RecipeError(f"{what} {value!r} is not known. Choose one of {', '.join(known)}.{hint}")

    def __str__(self) -> str:
        bits = (f"{letter}{n}" for letter, n in (("W", self.weight_bits), ("A", self.activation_bits)) if n is not None)
        return " ".join(filter(None, (self.name, "".join(bits), "" if self.rule == OBSERVED else self.rule)))

    def expand(
        self, activation: Scheme, weight: Scheme, refusal: Refusals
    ) -> tuple[tuple[tuple[Place, Setting], ...], Setting]:
        """The settings, and that of everything else, for a target with these schemes.

        Raises:
            SchemeError: bits that no scheme can have.
        """
        low_weight = self._scheme(weight, self.weight_bits or weight.bits, "weight", refusal)
        low = self._scheme(activation, self.activation_bits or activation.bits, "tensor", refusal)
        if self.name == "deploy":
            return (), Setting(weight=low_weight, activation=low)
        wide = self._scheme(activation, self.wide_bits, "tensor", refusal)
        ends = Setting(weight=self._scheme(weight, self.wide_bits, "weight", refusal), activation=wide, input=wide)
        pairs = ((FIRST, ends), (LAST, ends), (INPUT, Setting(activation=wide)))
        return pairs, Setting(weight=low_weight, activation=wide, input=low)

    def _scheme(self, of_target: Scheme, bits: int, kind: str, refusal: Refusals) -> Scheme:
        """``of_target`` with these bits, by the rule where it has such; a refusal of the bits asked for is ``prepare``'s.

        A rule that has one scale gets one.
        """
        observed = replace(of_target, bits=bits)
        learned = replace(of_target, bits=bits, quantizer=self.rule, estimator="")
        tried = (learned, replace(learned, per_channel=False))
        fits = next((scheme for scheme in tried if refusal(scheme, kind) is None), None)
        asked = self.weight_bits if kind == "weight" else self.activation_bits
        refused = learned if bits == asked and not _lacks(refusal, learned, kind) else observed
        return observed if self.rule == OBSERVED else fits or refused


def _lacks(refusal: Refusals, scheme: Scheme, kind: str) -> bool:
    """Whether the rule of ``scheme`` has no such quantizers at all, whatever their bits."""
    return all(refusal(replace(scheme, bits=bits, per_channel=False), kind) is not None for bits in range(2, 17))


@dataclass(frozen=True)
class Recipe:
    """Settings in order of precedence.

    Args:
        settings: pairs of a selector and a ``Setting``, or None to keep what it selects in float; or a dict of them. A
            selector is a glob over module paths (``"layer1.*"``; a container's path selects all that is in it), a module
            class, an ``Op``, or a ``Place``: ``fxquant.recipe.FIRST``, ``LAST``, ``INPUT`` or ``OUTPUT``.
        default: the setting of everything else; None keeps it in float.
        quantize_outputs: also quantize what leaves the model straight from a weighted op. By default its wide
            accumulator leaves as a float, which costs nothing and loses nothing.
        float_dtype: what the ops that stay in float compute in: ``float32``; or ``bfloat16``, eight significant bits, where
            a runtime has it (OpenVINO behind ``compile``, on processors that have it) and float32 elsewhere.
        base: the settings behind these that follow from the target; see ``preset``.
        title: what reports call it: the preset that it was made of.

    Example:
        >>> Recipe([("fc", None), (nn.Conv2d, Setting(weight=Scheme.weight(4)))])

    Raises:
        RecipeError: a selector or a setting of a wrong kind.
    """

    settings: Sequence[tuple[Selector, Setting | None]] | Mapping[Selector, Setting | None] = ()
    default: Setting | None = field(default_factory=Setting)
    quantize_outputs: bool = False
    float_dtype: str = "float32"
    base: Preset | None = None
    title: str = ""

    def __post_init__(self) -> None:
        if self.float_dtype not in FLOAT_DTYPES:
            raise RecipeError(
                f"float_dtype={self.float_dtype!r} is not known. Choose one of {', '.join(FLOAT_DTYPES)}."
            )
        object.__setattr__(self, "settings", _pairs(self.settings))
        for selector, setting in self.pairs:
            is_class = isinstance(selector, type) and issubclass(selector, nn.Module)
            if not (isinstance(selector, (str, Op)) or is_class or selector in PLACES.values()):
                raise RecipeError(
                    f"{selector!r}: a selector is a module path, a module class, fxquant.Op(name), or FIRST, LAST, INPUT or "
                    "OUTPUT of fxquant.recipe."
                )
            if selector == INPUT and (setting is None or getattr(setting, "weight", None) is not None):
                raise RecipeError(
                    "INPUT: an input has no weight, and cannot stay in float where integer ops read it. Write "
                    "{INPUT: fxquant.Setting(activation=...)}; or keep the ops that read it in float: {FIRST: None}."
                )
            if not (setting is None or isinstance(setting, Setting)):
                raise RecipeError(
                    f"{selector!r}: {setting!r} is neither a fxquant.Setting nor None (keep in float). Write, for example, "
                    f"{{{selector!r}: fxquant.Setting(weight=fxquant.Scheme.weight(4))}}."
                )
        if not (self.default is None or isinstance(self.default, Setting)):
            raise RecipeError(f"default={self.default!r} is neither a fxquant.Setting nor None (keep in float).")

    @classmethod
    def preset(
        cls,
        name: str,
        *,
        weight_bits: int | None = None,
        activation_bits: int | None = None,
        rule: str = OBSERVED,
        wide_bits: int = 8,
        settings: Sequence[tuple[Selector, Setting | None]] | Mapping[Selector, Setting | None] = (),
    ) -> Recipe:
        """A recipe by name, which ``prepare`` completes with the target's own schemes.

        ``academic`` is what most papers measure: first and last layers, the inputs, residual sums and what they add have
        ``wide_bits``, and what else is multiplied has the bits asked for, rounded for each reader of a sum. ``deploy`` has
        the bits asked for everywhere, which is what integer hardware computes.

        Example:
            >>> print(Recipe.preset("academic", weight_bits=4, activation_bits=4, rule="lsq").base)
            academic W4A4 lsq

        Args:
            name: ``academic`` or ``deploy``.
            weight_bits, activation_bits, rule, wide_bits: as of ``Preset``.
            settings: settings of your own that come before the preset's.

        Raises:
            RecipeError: there is no such preset or rule.
        """
        base = Preset(
            name=name, weight_bits=weight_bits, activation_bits=activation_bits, rule=rule, wide_bits=wide_bits
        )
        return cls(settings, base=base)

    def completed(self, activation: Scheme, weight: Scheme, refusal: Refusals) -> Recipe:
        """This recipe with the settings of its preset, for a target with these schemes; itself where it has none.

        Raises:
            RecipeError: a number of bits that no scheme can have, or a default beside the preset's.
        """
        if self.base is None:
            return self
        if self.default != Setting():
            raise RecipeError(
                f"the preset {self.base} says how everything else is quantized, and so does default={self.default}.\n"
                "  what to do: leave one of them out."
            )
        try:
            pairs, default = self.base.expand(activation, weight, refusal)
        except SchemeError as error:
            raise RecipeError(f"preset {self.base}: {error}") from error
        return replace(self, settings=(*self.pairs, *pairs), default=default, base=None, title=str(self.base))

    @classmethod
    def of(cls, value: Any) -> Recipe:
        """``value`` as a recipe: itself, a preset's name, or the pairs or the dict that it is; None asks for nothing.

        Raises:
            RecipeError: it is none of these.
        """
        if isinstance(value, Recipe):
            return value
        if isinstance(value, Setting):
            return cls(default=value)
        if isinstance(value, str):
            return cls.preset(value)
        return cls(() if value is None else value)

    @property
    def pairs(self) -> tuple[tuple[Selector, Setting | None], ...]:
        """The settings in order."""
        return _pairs(self.settings)

    def choose(self, site: Site) -> int | None:
        """The index of the first setting that selects ``site``; None where the default applies."""
        return next((i for i, (selector, _) in enumerate(self.pairs) if _selects(selector, site)), None)

    def setting(self, index: int | None) -> Setting | None:
        """The setting at ``index``, the default where that is None."""
        return self.default if index is None else self.pairs[index][1]

    def require_all_used(self, sites: Sequence[Site]) -> None:
        """Raise where a selector selects none of ``sites``, with the nearest name that would have.

        Raises:
            RecipeError: names the selector and suggests one.
        """
        for selector, _ in self.pairs:
            if not any(_selects(selector, site) for site in sites):
                raise RecipeError(
                    f"the recipe's selector {selector!r} matches nothing in this model.{_nearest(selector, sites)}"
                )


def _pairs(settings: Any) -> tuple[tuple[Any, Any], ...]:
    """Settings as a recipe's author wrote them, as pairs.

    Raises:
        RecipeError: they are neither pairs nor a dict.
    """
    what = "a recipe is pairs or a dict of selectors and settings: write Recipe([('fc', None)]) or {'fc': None}"
    if isinstance(settings, Mapping):
        return tuple(settings.items())
    if isinstance(settings, (str, bytes)) or not isinstance(settings, Iterable):
        raise RecipeError(f"recipe={settings!r}: {what}.")
    pairs: list[tuple[Any, Any]] = []
    for given in settings:
        pair = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else ()
        if len(pair) != 2:
            raise RecipeError(f"{given!r}: each setting is a pair (selector, Setting or None); {what}.")
        pairs.append((pair[0], pair[1]))
    return tuple(pairs)


def _selects(selector: Selector, site: Site) -> bool:
    if isinstance(selector, Place):
        return selector in site.places
    if INPUT in site.places:
        return False
    if isinstance(selector, Op):
        return selector.name == site.op
    if isinstance(selector, str):
        return fnmatchcase(site.path, selector) or fnmatchcase(site.path, f"{selector}.*")
    return site.module_type is not None and issubclass(site.module_type, selector)


def _nearest(selector: Selector, sites: Sequence[Site]) -> str:
    if isinstance(selector, Place):
        return (
            " It has no such op, or is captured in parts (fxquant.coverage lists them), where no part knows what is first "
            "or last: name the layers by their paths."
        )
    sites = [site for site in sites if INPUT not in site.places]
    if isinstance(selector, Op):
        known, wanted = {site.op for site in sites}, selector.name
    elif isinstance(selector, str):
        parts = [site.path.split(".") for site in sites]
        known, wanted = {".".join(p[:n]) for p in parts for n in range(1, len(p) + 1)}, selector
    else:
        known, wanted = {site.module_type.__name__ for site in sites if site.module_type}, selector.__name__
    close = difflib.get_close_matches(wanted, sorted(known), n=1, cutoff=0.0)
    return f" Did you mean {close[0]!r}?" if close else ""
