"""After training: algorithms that choose roundings, on one engine that runs a prepared graph op by op."""

from fxquant.algorithms.bias_correction import correct_biases
from fxquant.algorithms.bits_per_layer import mixed_precision
from fxquant.algorithms.block_reconstruction import reconstruct
from fxquant.algorithms.equalization import equalize
from fxquant.algorithms.smooth_quant import smooth
from fxquant.algorithms.synthetic import synthesize

__all__ = ["correct_biases", "equalize", "mixed_precision", "reconstruct", "smooth", "synthesize"]
