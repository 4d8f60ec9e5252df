"""The command line: ``fxquant demo``, ``diff``, ``quantize``, ``bench``, ``report``, ``errors``, ``sensitivity``,
``evaluate``, ``info``, ``ops``, ``doctor``.

Exit codes: 0 it worked; 1 fxquant says what is wrong, in one message; 2 the command was not understood; 130 interrupted.
With ``--json`` standard output holds one JSON value and nothing else; numbers that are not finite are null.
Files are put in place whole, when everything has succeeded, or not at all.
"""

from fxquant.cli.entry import main

__all__ = ["main"]
