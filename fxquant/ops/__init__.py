"""The only place that names an op: behaviours, entries, and the families of ops."""

from fxquant.ops import table as _table  # noqa: F401  (fills the table, so that a pickled entry finds itself)
