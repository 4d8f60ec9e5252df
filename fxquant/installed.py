"""Packages that are extras of fxquant: imported when asked for, with an error that says how to get them."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from fxquant.errors import MissingPackageError

__all__ = ["is_installed", "require"]


def is_installed(package: str) -> bool:
    """Whether ``package`` can be imported."""
    return importlib.util.find_spec(package) is not None


def require(package: str, what: str, extra: str) -> ModuleType:
    """The module ``package``.

    Args:
        package: its name.
        what: what needs it, as the beginning of a sentence.
        extra: the extra of fxquant that brings it.

    Raises:
        MissingPackageError: it is not installed.
    """
    if not is_installed(package):
        raise MissingPackageError(
            f"{what} needs the package {package}, which is not installed.\n  what to do: pip install 'fxquant[{extra}]'"
        )
    return importlib.import_module(package)
