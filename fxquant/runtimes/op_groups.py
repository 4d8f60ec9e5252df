"""Names of ops that targets list together."""

from __future__ import annotations

__all__ = ["AVERAGES", "CLAMPS", "CONVOLUTIONS", "MAX_POOLS", "MOVES", "TRANSPOSED_CONVOLUTIONS"]

MOVES = frozenset(
    {
        *("identity", "contiguous", "clone", "dropout", "stochastic_depth", "drop_path"),
        *("flatten", "view", "reshape", "unflatten", "squeeze", "unsqueeze", "expand", "repeat"),
        *("permute", "transpose", "movedim", "channel_shuffle", "pixel_shuffle", "pixel_unshuffle"),
        *("select", "narrow", "getitem", "chunk", "split", "unbind", "flip", "roll", "cat", "stack", "pad"),
    }
)
"""Ops that move values and compute nothing: any runtime does them on integers as on floats."""

CLAMPS = frozenset({"relu", "relu6", "hardtanh", "clamp"})

AVERAGES = frozenset(
    {
        *("avg_pool1d", "avg_pool2d", "avg_pool3d", "mean"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    }
)

MAX_POOLS = frozenset(
    {
        *("max_pool1d", "max_pool2d", "max_pool3d"),
        *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    }
)

CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})

TRANSPOSED_CONVOLUTIONS = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
