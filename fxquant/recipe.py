"""Which tensors get which scheme: ordered settings, the first that matches wins, one that matched nothing is an error."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from fxquant.errors import RecipeError
from fxquant.numerics.scheme import Scheme

__all__ = ["Op", "Recipe", "Setting", "Site"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How an op is quantized: its weight, if it has one, and its output.

    Args:
        weight: the weight's scheme; None for the target's own.
        activation: the output's scheme; None for the target's own.
    """

    weight: Scheme | None = None
    activation: Scheme | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "activation"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Scheme):
                raise RecipeError(f"{name}={value!r}: give a fxquant.Scheme, for example fxquant.Scheme(bits=8).")
        if self.weight is not None and not self.weight.symmetric:
            raise RecipeError(f"weight scheme {self.weight}: weights need zero point 0. Set symmetric=True.")
        if self.weight is not None and not self.weight.signed:
            raise RecipeError(f"weight scheme {self.weight}: weights take both signs. Set signed=True.")
        if self.activation is not None and self.activation.per_channel:
            raise RecipeError(
                f"activation scheme {self.activation}: an activation has one scale. Set per_channel=False."
            )


@dataclass(frozen=True)
class Op:
    """Selects every op of one name, as the op table spells it: ``Op("softmax")``."""

    name: str


@dataclass(frozen=True)
class Site:
    """What a selector is held against: one op of the user's model."""

    path: str
    op: str
    module_type: type[nn.Module] | None = None


Selector = str | type[nn.Module] | Op
FLOAT_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Recipe:
    """Settings in order of precedence.

    Args:
        settings: pairs of a selector and a ``Setting``, or None to keep what it selects in float. A selector is a glob
            over module paths (``"layer1.*"``; a container's path selects all that is in it), a module class, or an
            ``Op``.
        default: the setting of everything else; None keeps it in float.
        quantize_outputs: also quantize what leaves the model straight from a weighted op. By default its wide
            accumulator leaves as a float, which costs nothing and loses nothing.
        float_dtype: what the ops that stay in float compute in: ``float32``; or ``bfloat16``, eight significant bits, where
            a runtime has it (OpenVINO behind ``compile``, on processors that have it) and float32 elsewhere.

    Example:
        >>> Recipe([("fc", None), (nn.Conv2d, Setting(weight=Scheme(bits=4, symmetric=True, signed=True)))])

    Raises:
        RecipeError: a selector or a setting of a wrong kind.
    """

    settings: Sequence[tuple[Selector, Setting | None]] = ()
    default: Setting | None = field(default_factory=Setting)
    quantize_outputs: bool = False
    float_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.float_dtype not in FLOAT_DTYPES:
            raise RecipeError(
                f"float_dtype={self.float_dtype!r} is not known. Choose one of {', '.join(FLOAT_DTYPES)}."
            )
        object.__setattr__(self, "settings", tuple(tuple(pair) for pair in self.settings))
        for pair in self.settings:
            if len(pair) != 2:
                raise RecipeError(f"{pair!r}: each setting is a pair (selector, Setting or None).")
            selector, setting = pair
            is_class = isinstance(selector, type) and issubclass(selector, nn.Module)
            if not (isinstance(selector, (str, Op)) or is_class):
                raise RecipeError(f"{selector!r}: a selector is a module path, a module class or fxquant.Op(name).")
            if not (setting is None or isinstance(setting, Setting)):
                raise RecipeError(f"{selector!r}: {setting!r} is neither a fxquant.Setting nor None (keep in float).")
        if not (self.default is None or isinstance(self.default, Setting)):
            raise RecipeError(f"default={self.default!r} is neither a fxquant.Setting nor None (keep in float).")

    def choose(self, site: Site) -> int | None:
        """The index of the first setting that selects ``site``; None where the default applies."""
        return next((i for i, (selector, _) in enumerate(self.settings) if _selects(selector, site)), None)

    def setting(self, index: int | None) -> Setting | None:
        """The setting at ``index``, the default where that is None."""
        return self.default if index is None else self.settings[index][1]

    def require_all_used(self, sites: Sequence[Site]) -> None:
        """Raise where a selector selects none of ``sites``, with the nearest name that would have.

        Raises:
            RecipeError: names the selector and suggests one.
        """
        for selector, _ in self.settings:
            if not any(_selects(selector, site) for site in sites):
                raise RecipeError(
                    f"the recipe's selector {selector!r} matches nothing in this model.{_nearest(selector, sites)}"
                )


def _selects(selector: Selector, site: Site) -> bool:
    if isinstance(selector, Op):
        return selector.name == site.op
    if isinstance(selector, str):
        return fnmatchcase(site.path, selector) or fnmatchcase(site.path, f"{selector}.*")
    return site.module_type is not None and issubclass(site.module_type, selector)


def _nearest(selector: Selector, sites: Sequence[Site]) -> str:
    if isinstance(selector, Op):
        known, wanted = {site.op for site in sites}, selector.name
    elif isinstance(selector, str):
        parts = [site.path.split(".") for site in sites]
        known, wanted = {".".join(p[:n]) for p in parts for n in range(1, len(p) + 1)}, selector
    else:
        known, wanted = {site.module_type.__name__ for site in sites if site.module_type}, selector.__name__
    close = difflib.get_close_matches(wanted, sorted(known), n=1, cutoff=0.0)
    return f" Did you mean {close[0]!r}?" if close else ""
