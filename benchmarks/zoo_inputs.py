"""Inputs of networks at any batch size and any image size, clip size or length: arguments by position or by name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from zoo_cases import Inputs


def blobs(shape: tuple[int, ...], seed: int) -> Tensor:
    """Colour blobs under noise, ``(batch, channels, *sides)``: plain noise looks the same to a network."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(*shape[:2], *(6 for _ in shape[2:]), generator=generator)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(shape) - 2]
    return F.interpolate(coarse, shape[2:], mode=mode) + 0.5 * torch.randn(shape, generator=generator)


def image(batch: int, side: int, channels: int = 3) -> Inputs:
    return (blobs((batch, channels, side, side), batch),)


def clip(batch: int, size: tuple[int, int]) -> Inputs:
    frames, side = size
    return (blobs((batch, 3, frames, side, side), batch),)


def pair(batch: int, side: int) -> Inputs:
    first = blobs((batch, 3, side, side), batch).tanh()
    return (
        first,
        (first.roll((2, -3), (2, 3)) + 0.1 * blobs((batch, 3, side, side), batch + 100).tanh()).clamp(-1, 1),
    )


def image_list(batch: int, side: int) -> Inputs:
    """``batch`` images of different sizes with values in 0…1, as torchvision's detectors take them."""
    shapes = [(side, side + 32), (side + 16, side), (side, side)]
    return ([blobs((1, 3, *shapes[index % 3]), index)[0].sigmoid() for index in range(batch)],)


def tokens(batch: int, length: int, vocabulary: int = 90, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(batch * 1000 + length + seed)
    return torch.randint(5, vocabulary, (batch, length), generator=generator)


def mask(batch: int, length: int) -> Tensor:
    """Ones, with the last two positions of the last item padded."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, -2:] = 0
    return mask


def text(batch: int, length: int) -> Inputs:
    return {"input_ids": tokens(batch, length), "attention_mask": mask(batch, length)}


def ended_text(batch: int, length: int) -> Inputs:
    ids = tokens(batch, length)
    ids[:, -1] = 2  # the end mark at which BART classifies
    return {"input_ids": ids}


def ids(batch: int, length: int) -> Inputs:
    return {"input_ids": tokens(batch, length)}


def text_to_text(batch: int, length: int) -> Inputs:
    return {**text(batch, length), "decoder_input_ids": tokens(batch, length // 2 + 1, seed=7)}


def pixels(batch: int, side: int) -> Inputs:
    return {"pixel_values": blobs((batch, 3, side, side), batch)}


def video_pixels(batch: int, side: int) -> Inputs:
    return {"pixel_values": blobs((batch, 3, 4, side, side), batch).transpose(1, 2).contiguous()}


def text_and_pixels(batch: int, size: int) -> Inputs:
    return {**text(batch, size // 8), **pixels(batch, 32)}


def sound(batch: int, length: int) -> Inputs:
    return {"input_values": blobs((batch, 1, length), batch)[:, 0]}


def spectrum(batch: int, length: int) -> Inputs:
    return {"input_features": blobs((batch, 16, length), batch), "decoder_input_ids": tokens(batch, 6)}
