"""Tensors in, tensors out: the arithmetic of quantization. Imports torch and nothing else of fxquant but errors."""
