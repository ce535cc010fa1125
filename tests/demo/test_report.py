"""The demo's pictures and its report: complete, self-contained, escaped."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from golden_weights import image
from PIL import Image

from gigatok_ds.demo import figures as pictures
from gigatok_ds.demo.demo_report import Figure, ReportContent, Section, flatten, format_number, write_report
from gigatok_ds.demo.figures import loss_curves, reconstruction_grid, sample_grid
from gigatok_ds.errors import InputError

VOID = {"meta", "img", "br", "link", "hr"}


class Page(HTMLParser):
    """Tags with attributes, text, and that every element is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def batch(name, *shape):
    return 1.2 * torch.as_tensor(image(f"test_report/{name}", shape))


def read(path):
    return np.array(Image.open(path).convert("RGB"))


def content(tmp_path, **changes):
    picture = tmp_path / "picture.png"
    Image.fromarray(np.full((4, 6, 3), 200, np.uint8)).save(picture)
    values = dict(
        title="Demo of <digits> & more",
        subtitle="a tokenizer and a generator",
        facts=[("Command", "gigatok-ds demo --out 'runs/demo'"), ("Time", "3 min 20 s")],
        figures=[
            Figure(name="PSNR", value=24.36789, unit="dB", target="at least 20", passed=True,
                   explanation="Mean <over> all"),
            Figure(name="Usage", value=0.31, target="at least 0.5", passed=False),
            Figure(name="Samples", value=12345),
        ],
        images=[("Reconstructions \"above\" & below", picture)],
        sections=[Section(title="Tokenizer",
                          values={"model": {"cnn": {"depth": 2}, "sizes": [1, 2]}, "name": "<script>"})],
        files=[("export/token izer", "the standalone tokenizer"), ("javascript:alert(1)", "not a script")],
        tokenizer_export="export/tokenizer",
        gpt_export="export/gpt",
    )
    return ReportContent(**values | changes)


@pytest.fixture
def page(tmp_path):
    write_report(tmp_path / "report.html", content(tmp_path))
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_the_report_states_everything(page, tmp_path):
    text = re.sub(r"\s+", " ", page.text)
    for expected in ("Demo of <digits> & more", "a tokenizer and a generator",
                     "gigatok-ds demo --out 'runs/demo'", "3 min 20 s", "PSNR", "24.37 dB", "at least 20",
                     "✓ pass",
                     "Mean <over> all", "Usage", "0.31", "at least 0.5", "✗ fail", "Samples", "12,345",
                     "1 of 2 targets met", "model.cnn.depth", "[1, 2]", "the standalone tokenizer"):
        assert expected in text, expected
    assert text.count("✓ pass") == text.count("✗ fail") == 1
    assert not (tmp_path / ".report.html.partial").exists()


def test_the_report_is_escaped_and_runs_nothing(page):
    assert page.attributes("script") == [] and "<script>" in page.text
    links = [link["href"] for link in page.attributes("a")]
    assert links == ["export/token%20izer", "javascript%3Aalert%281%29"]
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_the_report_holds_its_images_and_loads_nothing(page, tmp_path):
    (shown,) = page.attributes("img")
    assert shown["alt"] == "Reconstructions \"above\" & below"
    kind, data = shown["src"].split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == (tmp_path / "picture.png").read_bytes()
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.attributes("link") == []
    assert not any(outside in text for outside in ("http", "url(", "@import"))
    assert "prefers-color-scheme: dark" in text and ":root {" in text


def test_the_snippet_is_python_that_names_the_exports(page):
    start = page.text.index("import torch\n")
    snippet = page.text[start : page.text.index("\n\n", page.text.index("images =", start))]
    names = compile(snippet, "snippet", "exec").co_names
    assert {"generate", "load_gpt", "load_tokenizer"} <= set(names)
    assert 'load_tokenizer("export/tokenizer")' in snippet and 'load_gpt("export/gpt")' in snippet


def test_without_targets_images_and_sections(tmp_path):
    bare = content(tmp_path, figures=[Figure(name="A", value="text")], images=[], sections=[], files=[])
    write_report(tmp_path / "report.html", bare)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "targets met" not in page.text and not page.attributes("figure") and not page.attributes("details")


def test_a_bad_image_leaves_the_earlier_report(tmp_path):
    (tmp_path / "report.html").write_text("earlier")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(InputError, match=r"text.png is not a PNG"):
        write_report(tmp_path / "report.html", content(tmp_path, images=[("x", tmp_path / "text.png")]))
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path / "report.html", content(tmp_path, images=[("x", tmp_path / "missing.png")]))
    assert (tmp_path / "report.html").read_text() == "earlier"


def test_numbers_and_settings():
    numbers = [format_number(value) for value in (0.123456, 1e-5, 1234567, "n/a")]
    assert numbers == ["0.1235", "1e-05", "1,234,567", "n/a"]
    nested = {"a": {"b": None, "c": {}}, "d": True, "e": "x", "f": (1, 2)}
    assert dict(flatten(nested)) == {"a.b": "null", "a.c": "{}", "d": "true", "e": "x", "f": "[1, 2]"}


def test_reconstructions_show_each_pair_pixel_by_pixel(tmp_path):
    originals, restored = batch("originals", 5, 3, 32, 32), batch("restored", 5, 3, 32, 32)
    reconstruction_grid(tmp_path / "pairs.png", originals, restored, [20.0, 21.5, 22, 23, 24], columns=3)
    drawn = read(tmp_path / "pairs.png")
    assert drawn.shape == (2 * (2 * 96 + 34) + 4, 118 + 3 * 100, 3)
    for number in range(5):
        left, top = 118 + number % 3 * 100, 4 + number // 3 * (2 * 96 + 34)
        for offset, images in ((0, originals), (100, restored)):
            tile = drawn[top + offset : top + offset + 96, left : left + 96]
            expected = (127.5 * images[number] + 128).clamp(0, 255).byte().permute(1, 2, 0).numpy()
            assert (tile == expected.repeat(3, 0).repeat(3, 1)).all()
        caption = drawn[top + 196 : top + 226, left : left + 96]
        assert caption.min() < 100, "a PSNR is written below each pair"
    assert (drawn[4 + 226 :, 118 + 2 * 100 :] == 255).all(), "the sixth place is empty"


@pytest.mark.parametrize("size, side", [(16, 64), (32, 64), (64, 64), (100, 100), (300, 128)])
def test_samples_have_a_row_for_each_class(tmp_path, size, side):
    images = torch.linspace(-1, 1, 6).view(2, 3, 1, 1, 1).expand(2, 3, 3, size, size)
    sample_grid(tmp_path / "samples.png", images, ["cat", "$\\alpha$ dog"])
    drawn = read(tmp_path / "samples.png")
    margin = 24 + 9 * len("$\\alpha$ dog")
    assert drawn.shape == (3 + 2 * (side + 3) + 3, margin + 3 * (side + 3), 3)
    for row in range(2):
        for column in range(3):
            tile = drawn[3 + row * (side + 3) :, margin + column * (side + 3) :][:side, :side]
            assert (tile == int(127.5 * images[row, column, 0, 0, 0] + 128)).all()
        assert drawn[3 + row * (side + 3) :, :margin][:side].min() < 100, "the class's name is written"


def test_a_grid_of_many_classes_says_what_it_leaves_out(tmp_path):
    names = [f"class number {number} of many" for number in range(60)]
    sample_grid(tmp_path / "many.png", torch.zeros(60, 1, 3, 64, 64), names)
    drawn = read(tmp_path / "many.png")
    assert drawn.shape[0] == 3 + pictures.MAX_CLASSES * 67 + 30 and drawn[-30:].min() < 200


def spy_on_figures(monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: drawn.append(figure))
    return drawn


def test_curves_draw_what_was_logged(tmp_path, monkeypatch):
    drawn = spy_on_figures(monkeypatch)
    metrics = {
        "Tokenizer": [{"step": 10 * i, "loss": 10.0 ** -i, "lr": 1.0} for i in range(4)],
        "GPT": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 2.0},
                {"step": 3, "validation/loss": 2.5, "validation/psnr": 20.0}],
        "Empty": [{"step": 1, "lr": 1.0}],
    }
    loss_curves(tmp_path / "x.png", metrics, ["loss", "validation/psnr", "validation/loss", "other"])
    first, second, third = drawn[0].axes
    titles = [axes.get_title(loc="left") for axes in drawn[0].axes]
    assert titles == ["Tokenizer: losses", "GPT: losses", "GPT: validation/psnr"]
    assert [line.get_xydata().tolist() for line in third.lines] == [[[3, 20]]]
    assert (first.get_yscale(), second.get_yscale()) == ("log", "linear")
    assert [line.get_label() for line in second.lines] == ["loss", "validation/loss"]
    np.testing.assert_array_equal(first.lines[0].get_xydata(), [[0, 1], [10, 0.1], [20, 0.01], [30, 0.001]])
    np.testing.assert_array_equal(second.lines[0].get_xydata(), [[1, 3], [2, np.nan], [3, 2]])


def test_curves_become_a_light_png_and_nothing_else(tmp_path):
    metrics = {"GPT": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 20.0}]}
    loss_curves(tmp_path / "loss.png", metrics, ["loss"])
    drawn = read(tmp_path / "loss.png")
    assert (drawn[0, 0] == 255).all() and drawn.min() < 120
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    before = (tmp_path / "loss.png").read_bytes()
    with pytest.raises(InputError, match="none of psnr, usage was logged"):
        loss_curves(tmp_path / "loss.png", metrics, ["psnr", "usage"])
    assert (tmp_path / "loss.png").read_bytes() == before
