"""The report: its page holds together, asks for nothing from outside, names planted faults first, and works in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest
import torch
from test_errors_by_layer import Sorting, batches, deep, prepared_small
from torch import nn
from trap_inputs import ConvNet

import fxquant
from fxquant.errors import InputError, LevelError
from fxquant.page.recipe_text import recipe_code
from fxquant.page.report import Report

VOID = {"meta", "input", "br", "img", "link"}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.outside: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, name, attributes):
        given = dict(attributes)
        self.ids += [given["id"]] if "id" in given else []
        href = given.get("href", "")
        self.links += [href[1:]] if href.startswith("#") else []
        self.outside += [href] if href and not href.startswith("#") else []
        self.outside += [given[key] for key in ("src", "srcset", "action", "data", "xlink:href") if key in given]
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.handle_starttag(name, attributes)
        if name not in VOID:
            self.open.pop()

    def handle_endtag(self, name):
        assert self.open and self.open.pop() == name

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)


def checked(text: str) -> Page:
    page = Page(text)
    assert len(page.ids) == len(set(page.ids)), "an id is there twice"
    assert set(page.links) <= set(page.ids), "a link leads nowhere"
    assert not page.outside and "@import" not in text and "url(" not in text
    assert not re.search(r"https?://", text), "something is on the network"
    return page


def made(model: nn.Module | None = None, **options: object) -> tuple[Report, nn.Module, list[torch.Tensor]]:
    data = batches()
    model, prepared = prepared_small(data, model or deep())
    return fxquant.report(model, prepared, data, progress=False, **options), prepared, data


@pytest.fixture(scope="module")
def healthy() -> Report:
    return made(title="A <b>title</b> & more", sections={"Latency": "1.25 ms"}, evaluate=lambda model: 12.5)[0]


def test_the_page_holds_together_and_needs_nothing(healthy):
    text = healthy.html()
    page = checked(text)
    assert "A &lt;b&gt;title&lt;/b&gt; &amp; more" in text and "<b>title" not in text
    rows = {id for id in page.ids if id.startswith("row-")}
    nodes = {id for id in page.ids if id.startswith("node-")}
    assert len(rows) >= len(nodes) >= 10 and {id.replace("node-", "row-", 1) for id in nodes} <= rows
    assert ">x_quantizer</a>" in text or ">input_1_quantizer</a>" in text
    words = " ".join(page.text["h2"])
    for title in ("What is wrong", "Graph", "Errors by layer", "Sensitivity", "Histograms", "Recipe", "Latency"):
        assert title in words
    assert "Nothing was found" in text and "12.5 → 12.5" in text and "default-src &#x27;none&#x27;" in text


def test_the_numbers_on_the_page_are_those_of_the_parts(healthy):
    text = healthy.html()
    for layer in healthy.errors.layers:
        assert layer.alone is not None and f">{layer.alone.sqnr:.1f}<" in text
    assert f"{healthy.outputs[0].sqnr:.1f} dB" in text and healthy.outputs[0].rows == 16
    assert healthy.coverage.level == "integer" and healthy.coverage.audit.layers
    assert healthy.bytes["float"] == sum(4 * p.numel() for p in deep().parameters())


def test_it_is_json_and_markdown_too(healthy, tmp_path):
    plain = json.loads(healthy.to_json())
    assert [layer["path"] for layer in plain["errors"]["layers"]] == [layer.path for layer in healthy.errors.layers]
    assert healthy.markdown().startswith("# A <b>") and "```python" in healthy.markdown()
    for ending in (".html", ".md", ".json"):
        healthy.save(tmp_path / f"r{ending}")
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == healthy.html()
    with pytest.raises(InputError, match="names no form"):
        healthy.save(tmp_path / "r.pdf")
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".html", ".json", ".md"]
    assert healthy._repr_html_().startswith("<iframe srcdoc=")


def wrong_scale(factor):
    def plant(prepared):
        quantizer = prepared.get_submodule("5").output_quantizer
        quantizer.set_grid(quantizer.scale * factor, quantizer.zero_point)

    return plant


def outlier(model):
    with torch.no_grad():
        model[2].weight[7] *= 60


def island(model):
    model[4] = Sorting().eval()


@pytest.mark.parametrize(
    "into_model, into_prepared, path, kind",
    [
        (None, wrong_scale(8.0), "5", "scale"),
        (None, wrong_scale(1 / 8), "5", "saturates"),
        (outlier, None, "3", "outliers"),
        (island, None, "4", "island"),
    ],
)
def test_a_planted_fault_is_named_first(into_model, into_prepared, path, kind):
    data, model = batches(), deep()
    if into_model is not None:
        into_model(model)
    _, prepared = prepared_small(data, model)
    if into_prepared is not None:
        into_prepared(prepared)
    found = fxquant.report(model, prepared, data, bits=None, progress=False)
    text = found.html()
    checked(text)
    first = text[text.index('<ol class="faults">') :].split("</li>")[0]
    assert f'<span class="kind">{kind}</span>' in first and f">{path}<" in first
    assert text.index("What is wrong") < text.index("Errors by layer")
    assert f"1. **{kind}** `{path}`" in found.markdown()


def test_recipes_are_code_that_gives_them_back():
    scheme, setting = fxquant.Scheme, fxquant.Setting
    signed = scheme.activation(4, signed=True)
    recipes = [
        fxquant.Recipe(),
        fxquant.Recipe([("fc", None), (nn.Conv2d, setting(weight=scheme.weight(4))), (fxquant.Op("softmax"), None)]),
        fxquant.Recipe(default=setting(weight=scheme.weight(4, estimator="mse"), activation=signed)),
        fxquant.Recipe(default=None, quantize_outputs=True, float_dtype="bfloat16"),
        fxquant.Recipe(default=setting(weight=scheme(bits=3, symmetric=True, signed=True, per_channel=False))),
    ]
    for recipe in recipes:
        code, imports = recipe_code(recipe)
        space: dict[str, object] = {"fxquant": fxquant}
        exec("\n".join(imports), space)
        assert eval(code, space) == recipe


def test_the_recipe_on_the_page_runs(healthy):
    data = batches()
    space: dict[str, object] = {"model": deep(), "example_inputs": data[0], "loader": data}
    exec(healthy.recipe, space)
    assert fxquant.coverage(space["int8"]).level == "integer"


def test_two_models_side_by_side(healthy, tmp_path):
    data, model = batches(), deep()
    four = fxquant.Setting(weight=fxquant.Scheme.weight(4), activation=fxquant.Scheme.activation(4))
    _, prepared = prepared_small(data, model, recipe=four)
    other = fxquant.report(model, prepared, data, title="4 bits", bits=None, progress=False)
    found = healthy.compare(other)
    by_path = {layer.path: layer for layer in found.layers}
    assert by_path["5"].bits == (8, 4) and by_path["5"].gain < -15
    assert by_path["5"].accumulated == (healthy.errors["5"].accumulated.sqnr, other.errors["5"].accumulated.sqnr)
    gains = [abs(layer.gain) for layer in found.layers]
    assert gains == sorted(gains, reverse=True)
    checked(found.html())
    assert "4 bits" in str(found) and "4 bits" in found.markdown()
    found.save(tmp_path / "two.html")
    assert json.loads(found.to_json())["titles"][1] == "4 bits"


def test_errors_say_what_to_do():
    data = batches()
    model, prepared = prepared_small(data, deep())
    with pytest.raises(LevelError, match="report takes a model at level prepared"):
        fxquant.report(model, fxquant.convert(prepared), data)
    with pytest.raises(InputError, match="no data"):
        fxquant.report(model, prepared, [])


def test_a_model_of_another_class_is_refused_and_one_that_cannot_be_captured_again_is_shown():
    import traps

    data = batches()
    _, prepared = prepared_small(data, deep())
    with pytest.raises(InputError, match="not made from the first"):
        fxquant.report(ConvNet().eval(), prepared, data, progress=False)
    trap = traps.TRAPS["split by list"]  # its code does not run on the zeros that stand for the example
    torch.manual_seed(0)
    model, inputs = trap.model().eval(), trap.inputs(2)
    prepared = fxquant.calibrate(fxquant.prepare(model, inputs), [inputs], progress=False)
    found = fxquant.report(model, prepared, [inputs], bits=None, progress=False)
    assert any("begins at the prepared model" in note for note in found.notes)
    assert found.diff.levels == ("prepared", "integer")
    checked(found.html())


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_is_javascript(tmp_path):
    script = resources.files("fxquant.page") / "source" / "page.js"
    (tmp_path / "page.js").write_text(script.read_text(encoding="utf-8"), encoding="utf-8")
    subprocess.run(["node", "--check", str(tmp_path / "page.js")], check=True)


BROWSER = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
ERRORS = "<script>window.said = []; addEventListener('error', e => window.said.push(e.message));</script>"
CLICKS = """<script>
addEventListener('load', function () {
  var table = document.querySelector('#errors table'), head = table.querySelectorAll('th')[5];
  var column = function () { return Array.from(table.tBodies[0].rows).map(r => parseFloat(r.cells[5].textContent)); };
  head.click(); var up = column(); head.click(); var down = column();
  var node = document.querySelector('.graph a'); node.dispatchEvent(new MouseEvent('click', {bubbles: true}));
  var row = document.querySelector('#diff td a'); row.click();
  var marked = document.querySelectorAll('.marked').length;
  var field = document.querySelector('input[data-of=errors]'); field.value = '5'; field.dispatchEvent(new Event('input'));
  var left = Array.from(table.tBodies[0].rows).filter(r => !r.hidden).length;
  var svg = document.querySelector('.graph'), before = svg.getAttribute('viewBox');
  document.querySelector('[data-zoom=in]').click();
  var result = {up: up, down: down, hash: location.hash, marked: marked, left: left, said: window.said,
    zoomed: before !== svg.getAttribute('viewBox'), wide: document.documentElement.scrollWidth <= innerWidth};
  document.title = 'RESULT' + JSON.stringify(result);
});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [420, 1200])
def test_it_works_in_a_browser(healthy, tmp_path, width):
    text = healthy.html().replace("<head>", f"<head>{ERRORS}").replace("</body>", f"{CLICKS}</body>")
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    folder = f"--user-data-dir={tmp_path / 'profile'}"
    page = Path(tmp_path / "page.html").as_uri()
    done = subprocess.run([str(BROWSER), *arguments, folder, page], capture_output=True, text=True, timeout=120)
    found = re.search(r"RESULT(\{.*?\})</title>", done.stdout)
    assert found, done.stderr[-2000:]
    result = json.loads(found[1])
    assert result["said"] == [] and result["zoomed"] and result["marked"] == 1
    assert result["up"] == sorted(result["up"]) and result["down"] == sorted(result["up"], reverse=True)
    assert result["hash"].startswith("#row-") and 0 < result["left"] < len(result["up"])
    assert result["wide"], "the page is wider than the window"


def resnet18():
    import torchvision

    return torchvision.models.resnet18(), [torch.randn(2, 3, 224, 224) for _ in range(2)], None


def mobilenet():
    import torchvision

    return torchvision.models.mobilenet_v3_large(), [torch.randn(2, 3, 224, 224) for _ in range(2)], None


def fasterrcnn():
    from torchvision.models import detection

    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    return model, [([torch.rand(3, 320, 320)],) for _ in range(2)], None


def bert():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 1024}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    ids = [torch.randint(0, 30000, (4, 64)) for _ in range(2)]
    return model, [{"input_ids": own, "attention_mask": torch.ones_like(own)} for own in ids], None


def resnet20_w4a4():
    from cifar import CifarResNet

    recipe = fxquant.Setting(weight=fxquant.Scheme.weight(4), activation=fxquant.Scheme.activation(4))
    return CifarResNet(3), [torch.randn(32, 3, 32, 32) for _ in range(2)], recipe


@pytest.mark.long
@pytest.mark.parametrize("make", [resnet18, mobilenet, fasterrcnn, bert, resnet20_w4a4], ids=lambda make: make.__name__)
def test_real_networks_fit_on_a_page(make, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    torch.manual_seed(0)
    model, data, recipe = make()
    model.eval()
    prepared = fxquant.calibrate(fxquant.prepare(model, data[0], recipe=recipe), data, progress=False)
    found = fxquant.report(model, prepared, data, progress=False)
    text = found.html()
    checked(text)
    assert len(text.encode()) < 3e6 and found.seconds < 60
    quantized = {layer.path for layer in found.errors.layers}
    assert len(quantized) > 15 and not found.errors.left_out
    drawn = [name for graph in found.graphs for name, *_ in graph.nodes]
    assert len(drawn) > 20 and all(layer.alone is not None for layer in found.errors.layers)
    if make is fasterrcnn:
        assert "island" in {fault.kind for fault in found.faults} and "Islands" in text
    elif make is resnet20_w4a4:
        assert {layer.bits for layer in found.errors.layers} >= {4} and 'class="level"' in text


@pytest.mark.long
@pytest.mark.parametrize("qat", [False, True])
def test_awkward_models_have_a_page_and_stay_as_they_were(qat):
    import awkward
    import traps

    cases = {**awkward.AWKWARD, **{name: (trap.model, trap.inputs) for name, trap in traps.TRAPS.items()}}
    shown = 0
    for name, (make, inputs) in cases.items():
        torch.manual_seed(0)
        model, example = make().eval(), inputs(2)
        call = (lambda m, b: m(**b)) if isinstance(example, dict) else (lambda m, b: m(*b))
        try:
            prepared = fxquant.prepare(model, example, qat=qat)
            fxquant.freeze(fxquant.calibrate(prepared, [example], forward=call, progress=False))
        except fxquant.FxquantError:  # what cannot be quantized is for other tests
            continue
        before = {key: value.clone() for key, value in prepared.state_dict().items()}
        found = fxquant.report(model, prepared, [example], forward=call, seconds=1.0, progress=False)
        checked(found.html())
        json.loads(found.to_json())
        after = prepared.state_dict()
        assert all(torch.equal(value, after[key]) or value.isnan().any() for key, value in before.items()), name
        assert all(layer.alone is not None or layer.not_measured for layer in found.errors.layers), name
        shown += 1
    assert shown > 100


def test_what_a_report_cannot_use_is_told_before_anything_is_measured(tmp_path):
    data = batches()
    model, prepared = prepared_small(data, deep())
    for options, words in (
        ({"bits": (1,)}, "each 2 to 16"),
        ({"bits": 8}, "each 2 to 16"),
        ({"batches": -1}, "batches=-1: give how many"),
        ({"batches": 0}, "1 or more"),
        ({"sections": ["a text"]}, "sections=list: give a dict"),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            fxquant.report(model, prepared, data, progress=False, **options)
    with pytest.raises(InputError, match="evaluate gave a str; it has to give one number"):
        fxquant.report(model, prepared, data, bits=None, evaluate=lambda model: "good", progress=False)
    found = fxquant.report(model, prepared, data, bits=None, progress=False)
    with pytest.raises(InputError, match="it was given a int"):
        found.compare(3)
    (tmp_path / "r.html").mkdir()
    for shown in (found, found.compare(found)):
        with pytest.raises(InputError, match="there is no folder"):
            shown.save(tmp_path / "no" / "r.html")
        with pytest.raises(InputError, match="is a folder"):
            shown.save(tmp_path / "r.html")
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_a_model_of_the_same_class_that_it_was_not_made_of_is_refused():
    """nn.Sequential is the class of many: here one gives other shapes."""
    data = batches()
    _, prepared = prepared_small(data, nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)))
    with pytest.raises(InputError, match="not made from the first"):
        fxquant.report(nn.Sequential(nn.Conv2d(3, 8, 3)).eval(), prepared, data, bits=None, progress=False)
