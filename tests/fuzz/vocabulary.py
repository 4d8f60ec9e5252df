"""The vocabulary of random networks: how people write layers, gates, masks, positions, norms and the rest.

Each function writes a few lines of a model. Its first choice of everything is the simplest one.
"""

from __future__ import annotations

from generator import Builder, DoesNotFitError, word
from torch import Tensor

SCALES = (None, None, None, "1e-3", "30", "1e3", None, "0.1")
"""What a layer's weights are multiplied by."""


def rank(*ranks: int):
    return lambda x: x.ndim in ranks


def scaled(b: Builder, layer: str) -> None:
    scale = b.choose(SCALES)
    if scale:
        b.make(f"for p in {layer}.parameters(): p.data *= {scale}")


# Layers that multiply ---------------------------------------------------------------------------------------------------


@word(weight=6)
def conv2d(b: Builder) -> None:
    x = b.pick(rank(4))
    c = b.shape(x)[1]
    kernel = b.choose([1, 3, (3, 1), 2, 5])
    out, groups = b.choose([(4, 1), (c, c), (8, 1), (5, 1), (2 * c, c), (1, 1), *([(4, 2)] if c % 2 == 0 else [])])
    stride, padding = b.choose([(1, 0), (1, 1), (2, 1), (1, "'same'"), ((1, 2), 0), (3, 2)])
    more = b.choose(["", ", bias=False", ", dilation=2", ", padding_mode='reflect'", ", padding_mode='circular'"])
    layer = b.layer(
        f"nn.Conv2d({c}, {out}, {kernel}, stride={stride}, padding={padding}, groups={groups}{more})", "conv"
    )
    scaled(b, layer)
    b.layers[layer] = (4, c)
    b.out(f"{layer}({x})")


@word(weight=2)
def conv_block(b: Builder) -> None:
    """Convolution, batch norm and activation in a Sequential."""
    x = b.pick(rank(4))
    c, out = b.shape(x)[1], b.choose([4, 8, 3])
    act = b.choose(["nn.ReLU()", "nn.ReLU(inplace=True)", "nn.ReLU6()", "nn.SiLU(inplace=True)", "nn.Hardswish()"])
    eps = b.choose(["", ", eps=1e-3", ", eps=0.1", ", affine=False"])
    layer = b.layer(f"nn.Sequential(nn.Conv2d({c}, {out}, 3, padding=1), nn.BatchNorm2d({out}{eps}), {act})", "block")
    if "affine" not in eps:
        gamma(b, f"{layer}[1]")
    b.layers[layer] = (4, c)
    b.out(f"{layer}({x})")


@word()
def conv_transpose2d(b: Builder) -> None:
    x = b.pick(rank(4))
    c = b.shape(x)[1]
    groups = b.choose([1, c])
    kernel, more = b.choose(
        [(2, "stride=2"), (3, "stride=2, padding=1, output_padding=1"), (3, "dilation=2"), (1, "bias=False")]
    )
    layer = b.layer(f"nn.ConvTranspose2d({c}, {groups * 2}, {kernel}, {more}, groups={groups})", "up")
    scaled(b, layer)
    b.out(f"{layer}({x})")


@word(weight=2)
def conv1d(b: Builder) -> None:
    x = b.pick(rank(3))
    c = b.shape(x)[1]
    kernel = b.choose([1, 3, 2])
    out, groups = b.choose([(4, 1), (c, c), (6, 1), (2 * c, c)])
    more = b.choose(
        ["", ", padding=1", ", stride=2, padding=2", ", dilation=2, padding=2", ", padding='same'", ", bias=False"]
    )
    layer = b.layer(f"nn.Conv1d({c}, {out}, {kernel}, groups={groups}{more})", "conv")
    scaled(b, layer)
    b.layers[layer] = (3, c)
    b.out(f"{layer}({x})")


@word()
def conv_transpose1d(b: Builder) -> None:
    x = b.pick(rank(3))
    c = b.shape(x)[1]
    more = b.choose(["stride=2", "stride=2, padding=1", "bias=False", "stride=3, output_padding=1"])
    layer = b.layer(f"nn.ConvTranspose1d({c}, 4, 3, {more})", "up")
    scaled(b, layer)
    b.out(f"{layer}({x})")


@word(weight=5)
def linear(b: Builder) -> None:
    x = b.pick(rank(2, 3, 4))
    d = b.shape(x)[-1]
    out, bias = b.choose([4, d, 8, 1, 6]), b.choose(["", ", bias=False"])
    layer = b.layer(f"nn.Linear({d}, {out}{bias})", "fc")
    scaled(b, layer)
    b.layers[layer] = (0, d)
    b.out(f"{layer}({x})")


@word()
def functional_conv(b: Builder) -> None:
    """Parameters of the model's own, and arithmetic on weights."""
    x = b.pick(rank(4))
    c = b.shape(x)[1]
    w = b.layer(f"nn.Parameter(torch.randn(4, {c}, 3, 3) * 0.3)", "w")
    weight = b.choose([w, f"{w} * 0.5", f"{w} - {w}.mean((1, 2, 3), keepdim=True)"])
    bias = b.choose(["", f", bias={b.layer('nn.Parameter(torch.randn(4))', 'b')}"])
    b.out(f"F.conv2d({x}, {weight}{bias}, padding={b.choose([1, 0])})")


@word()
def functional_linear(b: Builder) -> None:
    x = b.pick(rank(2, 3))
    d = b.shape(x)[-1]
    w = b.layer(f"nn.Parameter(torch.randn({d}, {d}) * 0.3)", "w")
    b.out(b.choose([f"F.linear({x}, {w})", f"{x} @ {w}", f"torch.matmul({x}, {w}.t())", f"F.linear({x}, {w}[:3])"]))


@word(weight=2)
def reuse(b: Builder) -> None:
    """A layer is called again, on another tensor."""
    layer = b.choose(list(b.layers)[::-1][:4])
    ndim, c = b.layers[layer]
    x = b.pick(lambda v: (v.ndim == ndim and v.shape[1] == c) if ndim else v.shape[-1] == c)
    b.out(f"{layer}({x})")


@word()
def shared_weight(b: Builder) -> None:
    layer = b.choose([n for n, (ndim, _) in b.layers.items() if ndim == 0][::-1])
    d = b.layers[layer][1]
    x = b.pick(lambda v: v.shape[-1] == d)
    twin = b.layer(f"nn.Linear({d}, {layer}.out_features)", "fc")
    b.make(f"{twin}.weight = {layer}.weight")
    b.out(f"{twin}({x})")


@word()
def embedding(b: Builder) -> None:
    x = b.pick(lambda v: v.ndim <= 2 and int(v.max()) < 11 and int(v.min()) >= 0, dtype="int")
    layer = b.layer(f"nn.Embedding(11, {b.choose([8, 6])})", "embed")
    scaled(b, layer)
    b.out(f"{layer}({x})")


@word("island")
def recurrent(b: Builder) -> None:
    x = b.pick(rank(3))
    d = b.shape(x)[-1]
    layer = b.layer(f"nn.{b.choose(['GRU', 'LSTM'])}({d}, 4, batch_first=True)", "rnn")
    b.out(f"{layer}({x})[0]")


# Norms -----------------------------------------------------------------------------------------------------------------


def gamma(b: Builder, layer: str) -> None:
    """Statistics and factors that are not what a fresh layer has."""
    kind = b.choose(["spread", "fresh", "mixed", "small"])
    if kind == "fresh":
        return
    b.make(f"{layer}.running_mean.normal_(); {layer}.running_var.uniform_(0.5, 2)")
    values = {"spread": "uniform_(0.5, 1.5)", "mixed": "normal_()", "small": "fill_(1e-3)"}
    b.make(f"{layer}.weight.data.{values[kind]}; {layer}.bias.data.normal_()")
    if kind == "mixed":
        b.make(f"{layer}.weight.data[:1] = 0")


@word(weight=3)
def batch_norm(b: Builder) -> None:
    x = b.pick(rank(2, 3, 4))
    c, ndim = b.shape(x)[1], len(b.shape(x))
    eps = b.choose(["", ", eps=1e-3", ", eps=0.1"])
    layer = b.layer(f"nn.BatchNorm{2 if ndim == 4 else 1}d({c}{eps})", "bn")
    gamma(b, layer)
    b.layers[layer] = (ndim, c)
    b.out(f"{layer}({x})")


@word(weight=2)
def layer_norm(b: Builder) -> None:
    x = b.pick(rank(2, 3, 4))
    d = b.shape(x)[-1]
    if d == 1:
        raise DoesNotFitError
    more = b.choose(["", ", eps=1e-2", ", elementwise_affine=False"])
    layer = b.layer(f"nn.LayerNorm({d}{more})", "norm")
    b.out(f"{layer}({x})")


@word()
def other_norm(b: Builder) -> None:
    x = b.pick(lambda v: v.ndim in (3, 4) and v.shape[1] % 2 == 0 and v.shape[-1] > 1)
    c = b.shape(x)[1]
    kind = b.choose(
        [f"nn.GroupNorm(2, {c})", f"nn.GroupNorm(1, {c}, eps=1e-3)", f"nn.InstanceNorm{len(b.shape(x)) - 2}d({c})"]
    )
    b.out(f"{b.layer(kind, 'norm')}({x})")


@word("division")
def norm_by_hand(b: Builder) -> None:
    x = b.pick(lambda v: v.ndim >= 2 and v.shape[-1] > 1)
    kind = b.choose(["layer", "rms", "l2", "normalize", "sum"])
    if kind == "layer":
        mean = b.out(f"{x}.mean(-1, keepdim=True)", "mean")
        var = b.out(f"({x} - {mean}).pow(2).mean(-1, keepdim=True)", "var")
        b.unread -= {mean, var}
        b.out(f"({x} - {mean}) / torch.sqrt({var} + 1e-5)")
    elif kind == "rms":
        b.out(f"{x} * torch.rsqrt({x}.pow(2).mean(-1, keepdim=True) + 1e-6)")
    elif kind == "l2":
        b.out(f"{x} / ({x}.norm(dim=-1, keepdim=True) + 1e-6)")
    elif kind == "normalize":
        b.out(f"F.normalize({x}, dim=1)")
    else:
        p = b.out(f"torch.relu({x})")
        b.unread.discard(p)
        b.out(f"{p} / ({p}.sum(-1, keepdim=True) + 1e-5)")


# Between elements ------------------------------------------------------------------------------------------------------

ACTIVATIONS = (
    *("torch.relu({})", "F.relu6({})", "torch.sigmoid({})", "torch.tanh({})", "F.gelu({})", "F.silu({})"),
    *("F.hardswish({})", "F.hardsigmoid({})", "F.leaky_relu({}, 0.2)", "F.elu({})", "F.softplus({})", "F.mish({})"),
    *("{}.clamp(-0.5, 1.5)", "F.hardtanh({}, -2, 0.5)", "F.gelu({}, approximate='tanh')", "{}.clamp(min=0.25)"),
)
MODULES = (
    "nn.ReLU()",
    "nn.ReLU(inplace=True)",
    "nn.PReLU()",
    "nn.Hardswish(inplace=True)",
    "nn.GELU()",
    "nn.LeakyReLU(0.1)",
)
MATHS = (
    *(
        "{}.abs()",
        "-{}",
        "({}.abs() + 1e-3).sqrt()",  # a root at zero has no gradient, in float as well
        "torch.exp(-{}.abs())",
        "{}.pow(2)",
        "{} ** 3",
        "{}.square()",
        "torch.sin({})",
    ),
    *("torch.cos({})", "torch.log1p({}.abs())", "{}.sign()", "torch.floor({})", "torch.erf({})"),
    "torch.maximum({0}, -{0})",
)


@word(weight=4)
def activation(b: Builder) -> None:
    x = b.pick()
    b.out(b.choose(ACTIVATIONS).format(x))


@word(weight=2)
def activation_module(b: Builder) -> None:
    x = b.pick(lambda v: v.ndim > 1)
    layer = b.layer(b.choose(MODULES), "act")
    b.layers[layer] = (len(b.shape(x)), b.shape(x)[1])
    b.out(f"{layer}({x})")


@word(weight=2)
def maths(b: Builder) -> None:
    x = b.pick()
    b.out(b.choose(MATHS).format(x))


def broadcasts(to: tuple[int, ...]):
    def fits(v: Tensor) -> bool:
        return v.ndim <= len(to) and all(n in (1, m) for n, m in zip(tuple(v.shape)[::-1], to[::-1], strict=False))

    return fits


@word(weight=5)
def two(b: Builder) -> None:
    """Residual sums, products and differences, broadcast too."""
    x = b.pick(among=3)
    z = b.pick(broadcasts(b.shape(x)), among=6)
    b.out(
        b.choose(
            ["{} + {}", "{} * {}", "{} - {}", "torch.add({}, {}, alpha=2)", "torch.maximum({}, {})", "{} + 0.1 * {}"]
        ).format(x, z)
    )


@word("division")
def quotient(b: Builder) -> None:
    x = b.pick(among=3)
    z = b.pick(broadcasts(b.shape(x)), among=6)
    b.out(
        b.choose(
            [
                f"{x} / ({z}.abs() + 1)",
                f"{x} / (1 + {z} * {z})",
                f"{x} / ({z}.exp().clamp(max=10) + 1e-3)",
                f"1 / (1 + {x}.abs())",
                f"torch.rsqrt({x}.abs() + 1)",
            ]
        )
    )


@word(weight=2)
def scale_by_number(b: Builder) -> None:
    x = b.pick()
    b.out(
        b.choose(
            ["{} * 0.5", "{} + 1", "{} / 3", "1 - {}", "{} * 1e-3", "{} * 1e3", "2 * {} - 1", "{} * -1", "{} + 0"]
        ).format(x)
    )


@word(weight=2)
def constant(b: Builder) -> None:
    x = b.pick(rank(2, 3, 4))
    shape = b.shape(x)
    inner = (shape[1], *[1] * (len(shape) - 2))
    value = b.choose(
        [f"torch.randn({inner})", f"torch.ones({inner})", f"torch.zeros({inner})", f"torch.rand({inner}) * 1e-3"]
    )
    name = f"self.{b.name('c')}"
    if b.choose([True, False]):
        b.make(f"{name} = nn.Parameter({value})")
    else:
        b.make(f"self.register_buffer('{name[5:]}', {value})")
    b.out(f"{x} {b.choose(['*', '+', '-'])} {name}")


@word(weight=2)
def made_constant(b: Builder) -> None:
    """Tensors that forward makes from sizes."""
    x = b.pick(rank(2, 3, 4))
    b.out(
        b.choose(
            [
                f"{x} + torch.zeros_like({x})",
                f"{x} * torch.ones({x}.shape[-1])",
                f"{x} + torch.full(({x}.size(0), *[1] * ({x}.ndim - 1)), 0.5)",
                f"torch.cat([{x}, torch.zeros_like({x}[:, :1])], 1)",
                f"torch.cat([{x}, {x}.new_ones({x}.shape)], -1)",
                f"{x} * torch.eye({x}.shape[-1])[0]",
            ]
        )
    )


@word(weight=3)
def gate(b: Builder) -> None:
    """Squeeze and excite, and gated linear units."""
    x = b.pick(rank(3, 4))
    c, ndim = b.shape(x)[1], len(b.shape(x))
    dims, kind = ("(2, 3)" if ndim == 4 else "2"), b.choose(["se", "hard", "glu", "chunk"])
    if kind in ("se", "hard"):
        down = b.layer(f"nn.Conv{ndim - 2}d({c}, 2, 1)", "down")
        up = b.layer(f"nn.Conv{ndim - 2}d(2, {c}, 1)", "up")
        act = "torch.sigmoid" if kind == "se" else "F.hardsigmoid"
        s = b.out(f"{x}.mean({dims}, keepdim=True)", "s")
        b.unread.discard(s)
        b.out(f"{x} * {act}({up}(F.relu({down}({s}))))")
    elif kind == "glu":
        b.out(f"F.glu({x}, dim=1)")
    else:
        a, z = b.name("a"), b.name("a")
        b.line(f"{a}, {z} = {x}.chunk(2, dim=1)")
        b.out(f"{a} * torch.sigmoid({z})")


# Shapes ----------------------------------------------------------------------------------------------------------------


@word(weight=3)
def join(b: Builder) -> None:
    x = b.pick(lambda v: v.ndim > 1, among=3)
    shape = b.shape(x)
    z = b.pick(lambda v: v.ndim == len(shape) and v.shape[0] == shape[0] and v.shape[2:] == shape[2:], among=6)
    b.out(
        b.choose([f"torch.cat([{x}, {z}], 1)", f"torch.cat(({z}, {x}), dim=1)", f"torch.cat([{x}, {z}, {x} * 2], 1)"])
    )


@word()
def stacked(b: Builder) -> None:
    x = b.pick(lambda v: v.ndim < 4, among=3)
    z = b.pick(lambda v: tuple(v.shape) == b.shape(x), among=6)
    b.out(
        b.choose(
            [
                f"torch.stack([{x}, {z}], 1).mean(1)",
                f"torch.stack([{x}, {z}], -1)",
                f"torch.stack(({x}, {z}), 1)",
            ]
        )
    )


@word(weight=2)
def pool2d(b: Builder) -> None:
    x = b.pick(rank(4))
    b.out(
        b.choose(
            [
                "F.max_pool2d({}, 2)",
                "F.avg_pool2d({}, 2)",
                "F.max_pool2d({}, 3, stride=2, padding=1)",
                "F.max_pool2d({}, 2, ceil_mode=True)",
                "F.avg_pool2d({}, 3, stride=2, padding=1, count_include_pad=False)",
                "F.avg_pool2d({}, 3, stride=1, padding=1, ceil_mode=True)",
                "F.adaptive_avg_pool2d({}, 1)",
                "F.adaptive_avg_pool2d({}, (3, 2))",
                "F.adaptive_max_pool2d({}, 2)",
                "F.max_pool2d({}, 2, stride=1, dilation=2)",
            ]
        ).format(x)
    )


@word()
def pool1d(b: Builder) -> None:
    x = b.pick(rank(3))
    b.out(
        b.choose(
            [
                "F.max_pool1d({}, 2)",
                "F.avg_pool1d({}, 3, stride=2, padding=1)",
                "F.adaptive_avg_pool1d({}, 1)",
                "F.adaptive_max_pool1d({}, 2)",
            ]
        ).format(x)
    )


@word(weight=2)
def resize(b: Builder) -> None:
    x = b.pick(rank(4))
    b.out(
        b.choose(
            [
                "F.interpolate({}, scale_factor=2)",
                "F.interpolate({}, scale_factor=2, mode='bilinear')",
                "F.interpolate({}, size=(5, 7), mode='bilinear', align_corners=True)",
                "F.interpolate({0}, size={0}.shape[-2:])",
                "F.interpolate({}, scale_factor=1.5, mode='nearest')",
                "F.interpolate({}, size=4, mode='bilinear', antialias=True)",
            ]
        ).format(x)
    )


@word(weight=3)
def layout(b: Builder) -> None:
    x = b.pick(rank(2, 3, 4))
    ndim = len(b.shape(x))
    options = {
        2: ["{}.unsqueeze(1)", "{0}.view({0}.size(0), 1, -1)", "{}[:, None, :, None]", "{}.unsqueeze(-1)"],
        3: ["{}.transpose(1, 2)", "{}.permute(0, 2, 1).contiguous()", "{}.flatten(1)", "{}.unsqueeze(1)", "{}[:, 0]"],
        4: [
            "{}.flatten(2).transpose(1, 2)",
            "{}.flatten(1)",
            "{}.permute(0, 2, 3, 1)",
            "{0}.reshape({0}.size(0), {0}.size(1), -1)",
            "F.channel_shuffle({}, 2)",
            "F.pixel_shuffle({}, 2)",
            "{}.squeeze(1)",
            "F.pixel_unshuffle({}, 2)",
        ],
    }
    b.out(b.choose(options[ndim]).format(x))


@word(weight=3)
def parts(b: Builder) -> None:
    x = b.pick(lambda v: v.ndim > 1)
    last = "[..., 1:]", "[:, 1:]", "[..., ::2]", "[:, :2]", ".narrow(1, 0, 1)", "[..., :-1]", ".flip(-1)", "[:, [0, 0]]"
    more = ".roll(1, -1)", ".repeat_interleave(2, dim=1)", ".index_select(1, torch.tensor([0]))", ".split(1, dim=1)[0]"
    b.out(f"{x}{b.choose([*last, *more, '.unbind(1)[0]', '.clone()', '.tile(2)', '.expand_as(' + x + ')'])}")


@word()
def pads(b: Builder) -> None:
    x = b.pick(rank(3, 4))
    b.out(
        b.choose(
            [
                "F.pad({}, (1, 1))",
                "F.pad({}, (0, 2), value=1.0)",
                "F.pad({}, (1, 0), mode='replicate')",
                "F.pad({}, (-1, 1))",
                "F.pad({}, (1, 1), mode='reflect')",
            ]
        ).format(x)
    )


@word(weight=3)
def reduction(b: Builder) -> None:
    x = b.pick(rank(2, 3, 4))
    b.out(
        b.choose(
            [
                "{}.mean(-1, keepdim=True)",
                "{}.mean(-1)",
                "{}.sum(-1)",
                "{}.mean(1, keepdim=True)",
                "{}.amax(-1, keepdim=True)",
                "{}.max(-1).values",
                "{}.sum(1, keepdim=True)",
                "{}.flatten(1).mean(1, keepdim=True)",
                "{}.std(1, keepdim=True, unbiased=False)",
                "{}.cumsum(1)",
                "torch.logsumexp({}, 1, keepdim=True)",
                "{}.softmax(-1)",
                "F.log_softmax({}, 1)",
            ]
        ).format(x)
    )


@word()
def empty_range(b: Builder) -> None:
    x = b.pick(lambda v: v.ndim > 1)
    b.out(b.choose([f"torch.cat([{x}, {x}[:, :0]], 1)", f"torch.cat([{x}[:, :0], {x}], 1)", f"{x} + {x}[:0].sum()"]))


# Attention and positions -----------------------------------------------------------------------------------------------


@word(weight=2)
def attention(b: Builder) -> None:
    x = b.pick(lambda v: v.ndim == 3 and v.shape[-1] > 1)
    d = b.shape(x)[-1]
    kind = b.choose(["hand", "sdpa", "module", "heads", "causal sdpa"])
    if kind == "module":
        if d % 2:
            raise DoesNotFitError
        layer = b.layer(f"nn.MultiheadAttention({d}, 2, batch_first=True)", "mha")
        b.out(f"{layer}({x}, {x}, {x}, need_weights=False)[0]")
        return
    qkv = b.layer(f"nn.Linear({d}, {3 * d})", "qkv")
    q, k, v = (b.name(s) for s in "qkv")
    b.line(f"{q}, {k}, {v} = {qkv}({x}).chunk(3, -1)")
    if kind == "heads" and d % 2 == 0:
        for n in (q, k, v):
            b.line(f"{n} = {n}.view({n}.size(0), {n}.size(1), 2, {d // 2}).transpose(1, 2)")
    b.values = {n: t for n, t in b.values.items() if n not in (q, k, v)} | {n: b.values[n] for n in (q, k, v)}
    if "sdpa" in kind:
        b.out(f"F.scaled_dot_product_attention({q}, {k}, {v}{', is_causal=True' if 'causal' in kind else ''})")
    else:
        p = b.out(f"({q} @ {k}.transpose(-2, -1) / {d}**0.5).softmax(-1)")
        b.unread.discard(p)
        y = b.out(f"{p} @ {v}")
        if kind == "heads" and d % 2 == 0:
            b.unread.discard(y)
            b.out(f"{y}.transpose(1, 2).flatten(2)")
    for n in (q, k, v):
        b.values.pop(n)


@word("mask")
def masked_attention(b: Builder) -> None:
    x = b.pick(lambda v: v.ndim == 3 and v.shape[-1] > 1)
    d = b.shape(x)[-1]
    s = b.out(f"{x} @ {x}.transpose(1, 2) / {d}**0.5")
    b.unread.discard(s)
    mask = b.out(f"torch.triu(torch.ones({x}.shape[1], {x}.shape[1], dtype=torch.bool), 1)", "mask")
    b.unread.discard(mask)
    value = b.choose(["-1e9", "float('-inf')", "-1e4", f"torch.finfo({x}.dtype).min"])
    p = b.choose([f"{s}.masked_fill({mask}, {value}).softmax(-1)", f"torch.where({mask}, {value}, {s}).softmax(-1)"])
    b.out(f"{p} @ {x}")


@word("phase")
def position(b: Builder) -> None:
    x = b.pick(lambda v: v.ndim == 3 and v.shape[-1] % 2 == 0)
    d = b.shape(x)[-1]
    kind = b.choose(["learned", "sinusoid", "rotary", "index"])
    if kind == "learned":
        table = b.layer(f"nn.Embedding(64, {d})", "pos")
        b.out(f"{x} + {table}(torch.arange({x}.shape[1]))")
    elif kind == "index":
        b.out(f"{x} + torch.arange({x}.shape[1])[:, None] * 0.1")
    else:
        angle = b.out(f"torch.arange({x}.shape[1]).float()[:, None] * 0.5 ** torch.arange({d // 2})", "angle")
        b.unread.discard(angle)
        if kind == "sinusoid":
            b.out(f"{x} + torch.cat([{angle}.sin(), {angle}.cos()], -1)")
        else:
            one, two = f"{x}[..., :{d // 2}]", f"{x}[..., {d // 2}:]"
            b.line(f"c, s = {angle}.cos(), {angle}.sin()")
            b.out(f"torch.cat([{one} * c - {two} * s, {one} * s + {two} * c], -1)")
            b.values.pop("c"), b.values.pop("s")


@word("phase")
def coordinates(b: Builder) -> None:
    x = b.pick(rank(4))
    b.out(
        b.choose(
            [
                f"{x} + torch.linspace(-1, 1, {x}.shape[-1])",
                f"{x} * torch.arange({x}.shape[-2])[:, None]",
                f"torch.cat([{x}, torch.linspace(0, 1, {x}.shape[-1]).expand({x}.shape[0], 1, {x}.shape[2], -1)], 1)",
            ]
        )
    )


# Masks, bools and integers ---------------------------------------------------------------------------------------------


@word("mask", "bool")
def compare(b: Builder) -> None:
    x = b.pick(lambda v: v.ndim > 1)
    b.out(b.choose(["{} > 0", "{} >= 0.5", "{0} < {0}.mean()", "({} != 0) & ({} < 1)"]).format(x, x), "mask")


def fitting_mask(b: Builder, x: str) -> str:
    shape = b.shape(x)
    mask = b.pick(
        lambda m: tuple(m.shape) == shape or (m.ndim < len(shape) and tuple(m.shape) == shape[: m.ndim]), dtype="bool"
    )
    return mask + "[..., None]" * (len(shape) - len(b.shape(mask)))


@word("mask", weight=2)
def masked(b: Builder) -> None:
    x = b.pick(among=6)
    m = fitting_mask(b, x)
    b.out(
        b.choose(
            [
                f"{x}.masked_fill({m}, 0.0)",
                f"torch.where({m}, {x}, torch.zeros_like({x}))",
                f"torch.where({m}, {x}, 0.5)",
                f"torch.where({m}, {x}, -{x})",
            ]
        )
    )


@word("bool", weight=2)
def bool_operand(b: Builder) -> None:
    x = b.pick(among=6)
    m = fitting_mask(b, x)
    b.out(
        b.choose(
            [
                f"{x} * {m}",
                f"{x} * {m}.float()",
                f"{x} + {m}",
                f"{x} * ~{m}",
                f"{m}.to({x}.dtype) - {x}",
                f"{x} * {m}.long()",
            ]
        )
    )


@word("bool", weight=2)
def integers(b: Builder) -> None:
    x = b.pick(lambda v: v.ndim > 1)
    b.out(
        b.choose(
            [
                f"{x} + torch.arange({x}.shape[-1])",
                f"{x} * {x}.argmax(-1, keepdim=True)",
                f"{x} - torch.tensor([2])",
                f"{x} * {x}.shape[-1]",
                f"{x} / {x}.shape[1]",
                f"{x} * ({x}.size(1) ** -0.5)",
                f"F.one_hot({x}.argmax(-1), {x}.shape[-1]) * {x}",
            ]
        )
    )


@word("bool")
def int_input(b: Builder) -> None:
    k = b.pick(dtype="int")
    x = b.pick(lambda v: v.ndim > len(b.shape(k)) and tuple(v.shape[: len(b.shape(k))]) == b.shape(k), among=6)
    wide = k + "[..., None]" * (len(b.shape(x)) - len(b.shape(k)))
    b.out(b.choose([f"{x} * {wide}", f"{x} + {wide}", f"{x} - {wide}.float()", f"{x} + {wide}.to({x}.dtype)"]))


@word("dtype")
def dtypes(b: Builder) -> None:
    x = b.pick(lambda v: v.ndim > 1)
    b.out(
        b.choose(
            [
                f"{x} + torch.linspace(0, 1, {x}.shape[-1], dtype={x}.dtype)",
                f"torch.ones({x}.shape[-1]).to({x}.dtype) * {x}",
                f"{x}.float()",
                f"{x}.to(torch.float32) * 2",
                f"{x}.clamp(max=torch.finfo({x}.dtype).max)",
                f"{x} if {x}.dtype == torch.float32 else {x} * 0",
                f"{x} if {x}.is_floating_point() else {x} * 0",
                f"{x}.type_as({x}) + 1",
                f"{x}.to({x}.device) * 1.5",
            ]
        )
    )


# In place, control flow, state -----------------------------------------------------------------------------------------


def own(b: Builder, fits=lambda v: v.ndim > 1) -> str:
    """A tensor that forward made, which may be written to."""
    x = b.pick(lambda v: fits(v) and not any(v is b.values[n] or v._base is b.values[n] for n in b.inputs))
    b.unread.add(x)
    return x


@word(weight=3)
def in_place(b: Builder) -> None:
    x = own(b)
    z = b.pick(lambda v: v.shape == b.values[x].shape, among=6)
    b.line(
        b.choose(
            [
                f"{x} += {z}",
                f"{x}.relu_()",
                f"{x}[:, :1] = 0",
                f"{x}.mul_(0.5)",
                f"{x}[:, :1] = {z}[:, -1:]",
                f"{x}[..., 0] *= 2",
                f"{x}.add_({z}, alpha=0.5)",
                f"{x} *= {z}",
                f"F.relu({x}, inplace=True)",
                f"{x}.clamp_(-1, 1)",
                f"{x}[:, :1] += {z}[:, :1]",
                f"{x}.copy_({z} * 2)",
                f"{x} -= {z}.mean()",
                f"F.hardtanh({x}, inplace=True)",
            ]
        )
    )


@word()
def view_written(b: Builder) -> None:
    """A write through a view, read by the base afterwards."""
    x = own(b)
    v = b.out(f"{x}{b.choose(['[:, :1]', '.transpose(0, 1)', '.flatten(1)', '.view_as(' + x + ')'])}", "v")
    b.line(f"{v}{b.choose(['.mul_(2)', '.relu_()', '.zero_()', '.add_(1)'])}")
    b.unread.discard(v)
    b.out(f"{x} * 1.5")


@word()
def control(b: Builder) -> None:
    x = b.pick(rank(2, 3, 4))
    y = b.name("y")
    b.line(
        b.choose(
            [
                f"{y} = {x} * 2 if {x}.shape[1] == 4 else {x} + 1",
                f"{y} = {x}\nfor i in range(3):\n    {y} = {y} * 0.5 + i",
                f"{y} = sum([{x}, {x} * 2, {x}.relu()])",
                f"{y} = {x} if self.training else {x} * 1",
                f"{y} = torch.cat([r * (i + 1) for i, r in enumerate({x}.split(1, dim=1))], 1)",
                f"{y} = {x} + ({x}.ndim - {x}.size(1))",
                f"assert {x}.shape[0] > 0\n{y} = {x}",
            ]
        )
    )
    b.unread.add(y)


BRANCH = """\
class Branch(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.fc = nn.Linear(d, d)

    def forward(self, x):
        if x.sum() > 0:
            return self.fc(x)
        return self.fc(x) * 2"""


@word("island")
def data_branch(b: Builder) -> None:
    x = b.pick(rank(2, 3, 4))
    b.helper(BRANCH)
    b.out(f"{b.layer(f'Branch({b.shape(x)[-1]})', 'branch')}({x})")


@word("state")
def state(b: Builder) -> None:
    x = b.pick(rank(2, 3, 4))
    name = b.name("s")
    b.make(f"self.register_buffer('{name}', torch.zeros(1))")
    b.line(f"self.{name}.copy_(0.5 * self.{name} + 0.5 * {x}.mean().detach())")
    b.out(f"{x} - self.{name}")


@word()
def dropout(b: Builder) -> None:
    x = b.pick()
    b.out(f"{b.layer('nn.Dropout(0.2)', 'drop')}({x})")
