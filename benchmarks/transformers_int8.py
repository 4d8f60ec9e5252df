"""int8 against float in dB, beside the same model with positions, masks and norms left in float by hand.

    python benchmarks/transformers_int8.py --models llama gpt2 --length 256

Random weights of a sane size, fixed seeds: what is compared are two ways to round one model. ``by hand`` is a recipe that
keeps in float what one would name for the model: paths of its norms, rotary and time embeddings, and the ops of its masks.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from record import add_output_option, publish
from torch import Tensor, nn

import fxquant
from fxquant import Op, Recipe
from fxquant.capture.islands import graphs_of
from fxquant.errors import RecipeError

WIDTH, HEADS, WORDS = 64, 4, 100
Built = tuple[nn.Module, dict[str, Tensor]]


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sane(model: nn.Module) -> nn.Module:
    """Matrices with rows of length one, embeddings of size one: activations keep their size through the layers."""
    generator = seeded(0)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for parameter in model.parameters():
        if parameter.ndim > 1:
            inputs = 1 if id(parameter) in embeddings else parameter[0].numel()
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * inputs**-0.5)
    return model.eval()


def words(length: int, *, padded: bool = False) -> dict[str, Tensor]:
    """Two sentences, the second shorter where they are padded."""
    inputs = {"input_ids": torch.randint(0, WORDS, (2, length), generator=seeded())}
    if padded:
        inputs["attention_mask"] = (torch.arange(length) < torch.tensor([[length], [length * 2 // 3]])).long()
    return inputs


def llama(length: int) -> Built:
    import transformers as hf

    config = hf.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=2, vocab_size=WORDS, max_position_embeddings=length, use_cache=False,
        attn_implementation="eager",
    )  # fmt: skip
    return hf.LlamaModel(config), words(length, padded=True)


def gpt2(length: int) -> Built:
    import transformers as hf

    config = hf.GPT2Config(
        n_embd=WIDTH, n_layer=2, n_head=HEADS, vocab_size=WORDS, n_positions=length, use_cache=False,
        bos_token_id=None, eos_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    return hf.GPT2Model(config), words(length, padded=True)


def bert(length: int) -> Built:
    import transformers as hf

    config = hf.BertConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=2 * WIDTH,
        vocab_size=WORDS, max_position_embeddings=length, attn_implementation="eager",
    )  # fmt: skip
    return hf.BertModel(config), words(length, padded=True)


def t5(length: int) -> Built:
    import transformers as hf

    config = hf.T5Config(d_model=WIDTH, d_kv=16, d_ff=2 * WIDTH, num_layers=2, num_heads=HEADS, vocab_size=WORDS)
    return hf.T5EncoderModel(config), words(length, padded=True)


def whisper(length: int) -> Built:
    import transformers as hf
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = hf.WhisperConfig(
        d_model=WIDTH, encoder_layers=2, encoder_attention_heads=HEADS, encoder_ffn_dim=2 * WIDTH, num_mel_bins=16,
        max_source_positions=length // 2, attn_implementation="eager",
    )  # fmt: skip
    return WhisperEncoder(config), {"input_features": torch.randn(2, 16, length, generator=seeded())}


def unet(length: int) -> Built:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, {"sample": torch.randn(2, 3, 16, 16, generator=seeded()), "timestep": torch.tensor([17, 803])}


class TimeEmbedding(nn.Module):
    """A sinusoidal embedding of timesteps and two layers, as in diffusion models."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, timestep: Tensor) -> Tensor:
        half = WIDTH // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half)
        phase = timestep[:, None].float() * frequencies[None]
        return self.second(F.silu(self.first(torch.cat([phase.cos(), phase.sin()], -1))))


def time_embedding(length: int) -> Built:
    return TimeEmbedding(), {"timestep": torch.randint(0, 1000, (length,), generator=seeded())}


class Block(nn.Module):
    """A block of nanoGPT: attention with a causal mask in a buffer, and a layer norm of its own."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.norms = nn.ParameterList([nn.Parameter(torch.ones(WIDTH)) for _ in range(2)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.register_buffer("bias", torch.tril(torch.ones(length, length)).view(1, 1, length, length))

    def norm(self, x: Tensor, gain: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-5) * gain

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm(x, self.norms[0])).split(WIDTH, 2)
        q, k, v = (y.view(batch, length, HEADS, width // HEADS).transpose(1, 2) for y in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        attended = (F.softmax(scores, dim=-1) @ v).transpose(1, 2).contiguous().view(batch, length, width)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.norm(x, self.norms[1]))))


class NanoGPT(nn.Module):
    """Learned positions, two blocks, a head."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(length, WIDTH)
        self.blocks, self.head = nn.ModuleList([Block(length) for _ in range(2)]), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids) + self.places(torch.arange(input_ids.size(1)))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def nanogpt(length: int) -> Built:
    return NanoGPT(length), words(length)


class Attention(nn.Module):
    """Attention by hand with rotary positions, a sum for a mask, and a softmax of exp and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        place = torch.arange(x.size(1)).float()
        phase = torch.outer(place, 1.0 / 10000.0 ** (torch.arange(0, WIDTH, 2).float() / WIDTH)).repeat(1, 2)
        q, k = (y * phase.cos() + torch.cat([-y[..., 32:], y[..., :32]], -1) * phase.sin() for y in (q, k))
        mask = (place[None] > place[:, None]).float() * torch.finfo(x.dtype).min
        scores = q @ k.transpose(-2, -1) / math.sqrt(WIDTH) + mask
        powers = torch.exp(scores - scores.amax(-1, keepdim=True))
        return self.out((powers / powers.sum(-1, keepdim=True)) @ v)


def attention(length: int) -> Built:
    return Attention(), {"x": torch.randn(2, length, WIDTH, generator=seeded())}


MODELS: dict[str, Callable[[int], Built]] = {
    "llama": llama, "gpt2": gpt2, "bert": bert, "t5": t5, "whisper": whisper, "unet": unet,
    "time embedding": time_embedding, "nanogpt": nanogpt, "attention": attention,
}  # fmt: skip

BY_HAND = {
    "llama": ("rotary_emb", "*norm", "norm", Op("softmax")),
    "gpt2": ("*ln_?", "*ln_f", Op("softmax")),
    "bert": ("*LayerNorm", Op("softmax")),
    "t5": ("*layer_norm", Op("softmax")),
    "whisper": ("*layer_norm", Op("softmax")),
    "unet": ("time_proj", "*norm*", Op("softmax")),
    "time embedding": ("mul", "div", "exp", "sin", "cos"),
    "nanogpt": (*(Op(n) for n in ("mean", "sub", "pow", "sqrt", "div", "softmax")), "blocks.?.mul"),
    "attention": (*(Op(n) for n in ("mul", "add", "sub", "exp", "sum", "div", "sin", "cos", "neg")),),
}
"""What one would name for each model: its norms, its positions, and what reads masked scores."""


def by_hand(model: nn.Module, inputs: dict[str, Tensor], name: str) -> Recipe:
    """The recipe of ``BY_HAND``, without the selectors that match nothing: what is float anyhow has no setting."""
    kept: list[Any] = []
    for selector in BY_HAND[name]:
        try:
            fxquant.prepare(model, inputs, recipe=Recipe([(selector, None)]))
        except RecipeError:
            continue
        kept.append((selector, None))
    return Recipe(kept)


def decibels(want: Tensor, got: Tensor) -> float:
    """The ratio of signal to error."""
    return round(float(10 * torch.log10(want.double().pow(2).sum() / (want.double() - got.double()).pow(2).sum())), 1)


def first_tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


@torch.no_grad()
def row(name: str, length: int) -> dict[str, Any]:
    """One model: int8 by default and by hand, and how many ops the default left in float by itself."""
    torch.manual_seed(0)
    model, inputs = MODELS[name](length)
    want, found = first_tensor(sane(model)(**inputs)), {}
    for column, recipe in (("int8 (dB)", None), ("by hand (dB)", by_hand(model, inputs, name))):
        prepared = fxquant.prepare(model, inputs, recipe=recipe)
        fxquant.calibrate(prepared, [inputs], progress=False)
        found[column] = decibels(want, first_tensor(fxquant.convert(prepared)(**inputs)))
        if recipe is None:
            nodes = [node for graph in graphs_of(prepared).values() for node in graph.graph.nodes]
            left = sum("reason" in node.meta and "setting" in node.meta for node in nodes)
    difference = round(found["int8 (dB)"] - found["by hand (dB)"], 1)
    return {"model": name, "length": length, **found, "difference (dB)": difference, "ops left in float": left}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--length", type=int, default=256, help="of sequences (default: 256)")
    add_output_option(parser, "transformers_int8")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows: list[dict[str, Any]] = []
    for name in args.models:
        rows.append(row(name, args.length))
        publish(rows, args, quiet=name != args.models[-1])


if __name__ == "__main__":
    main()
