"""The HTML report as a file: one page that needs nothing else, whatever the names in it are."""

import base64
import fnmatch
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from assay.golden.errors import GoldenError
from assay.golden.html.page import page_of, write_page
from assay.golden.html.plot import HEIGHT, TIMES, TOP, grid_of, plot_of, times
from tests.checkpoint_files import opened
from tests.golden.faults import GPT_OSS, golden_of, jolted, report_of, taps_with
from tests.golden.pages import HOSTILE, deep_page, details_of, hostile_page, page_with
from tests.golden.test_diagnose import taps_of

WRONG = "layers.1.attn_heads"


class Reader(HTMLParser):
    """Elements and text of a page, by a parser that is not ours."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.text, self._inside = [], [], "", None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def with_attribute(self, name):
        return [attributes[name] for _, attributes in self.tags if name in attributes]


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    return page_with(tmp_path_factory.mktemp("page") / "wrong.html", {WRONG: jolted})


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return hostile_page(tmp_path_factory.mktemp("page") / "hostile.html")


def test_it_says_where_and_by_how_much(wrong):
    page = Reader(wrong.read_text("utf-8"))
    text = " ".join(page.text.split())
    ratio = report_of(taps_with({WRONG: jolted}, dtype=np.float32), "float32").first_divergence.ratio
    assert f"Diverges first wrong at {WRONG}" in text
    assert f"{times(ratio)} {TIMES}" in text
    assert f"of {len(golden_of().taps)} tensors" in text


def test_nothing_is_fetched(wrong, hostile):
    for path in (wrong, hostile):
        page = Reader(path.read_text("utf-8"))
        assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "embed", "base", "form"}
        assert page.with_attribute("src") == []
        assert all(link.startswith("#") for link in page.with_attribute("href"))
        style = re.search(r"<style>(.*?)</style>", path.read_text("utf-8"), re.S)[1]
        assert "url(" not in style
        assert "@import" not in style


def test_only_the_page_s_own_script_may_run(wrong, hostile):
    for path in (wrong, hostile):
        page = Reader(path.read_text("utf-8"))
        data, script = page.scripts
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
        assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}';" in policy
        assert json.loads(data)["taps"]
        assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_hostile_names_are_text(hostile):
    raw = hostile.read_text("utf-8")
    page = Reader(raw)
    assert raw.count("<script") == 2
    assert "<img" not in raw
    assert HOSTILE in page.text
    assert HOSTILE in json.loads(page.scripts[0])["taps"]
    assert HOSTILE in page.with_attribute("data-tap")


def test_every_tap_is_a_cell_and_a_row(wrong):
    page = Reader(wrong.read_text("utf-8"))
    names = set(golden_of().taps)
    assert set(page.with_attribute("data-tap")) == names
    assert set(json.loads(page.scripts[0])["taps"]) == names
    assert all(name in page.text for name in names)


def test_a_page_of_24_layers_with_all_taps_is_under_5_mb(tmp_path):
    path = deep_page(tmp_path / "deep.html")
    data = json.loads(Reader(path.read_text("utf-8")).scripts[0])
    assert len(data["taps"]) == 3 + 24 * 21
    shapes = [drawn["shape"] for tap in data["taps"].values() for drawn in tap["detail"]["maps"]]
    assert max(shapes) == [32, 64]
    assert path.stat().st_size < 5e6


def test_a_clean_check(tmp_path):
    page = Reader(page_with(tmp_path / "p.html", {}).read_text("utf-8"))
    text = " ".join(page.text.split())
    assert f"Matches all {len(golden_of().taps)} tensors are within their allowance" in text
    assert "Cause" not in text


def test_deviations_are_listed():
    golden, checkpoint, taps, name, _ = taps_of("yarn-ramp-rounded")
    report, details = details_of(taps, golden, checkpoint, name, "mlx-lm-float32")
    text = " ".join(Reader(page_of(report, details.taps, {})).text.split())
    assert f"Matches, but for known deviations 6 of {len(taps)} tensors differ, all of them by design" in text
    assert "YaRN ramp rounded yarn-ramp-rounded" in text


@pytest.mark.parametrize("keep", ["logits", "*block_out", "*expert_ids"])
def test_few_taps_do(tmp_path, keep):
    data = json.loads(Reader(page_with(tmp_path / "p.html", {}, keep).read_text("utf-8")).scripts[0])
    assert data["taps"]
    assert all(fnmatch.fnmatchcase(name, keep) and tap["detail"] for name, tap in data["taps"].items())
    assert data["opened"] in data["taps"]


def test_the_same_check_makes_the_same_page(tmp_path, wrong):
    assert page_with(tmp_path / "again.html", {WRONG: jolted}).read_bytes() == wrong.read_bytes()


def test_values_that_are_not_finite(tmp_path):
    def lost(array):
        array = array.copy()
        array[3, 1, 5] = np.nan
        return array

    page = Reader(page_with(tmp_path / "p.html", {WRONG: lost}).read_text("utf-8"))
    tap = json.loads(page.scripts[0], parse_constant=pytest.fail)["taps"][WRONG]
    assert tap["nonfinite"] == 1
    assert (tap["detail"]["worst"]["at"], tap["detail"]["worst"]["got"]) == ([3, 1, 5], "nan")
    assert "not finite" in page.text


def test_a_check_that_could_not_be_made(tmp_path):
    report, details = details_of({"something": np.ones(3)}, checkpoint=opened(GPT_OSS))
    page = Reader(page_of(report, details.taps, {}))
    assert "Cannot be compared" in page.text
    assert "none of the taps" in page.text


def test_it_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    report, details = details_of({"logits": golden_of().taps["logits"]})
    with pytest.raises(GoldenError, match="cannot be written"):
        write_page(tmp_path / "no" / "p.html", report, details.taps, {})
    (tmp_path / "p.html").write_text("before")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(GoldenError, match="full"):
        write_page(tmp_path / "p.html", report, details.taps, {})
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("p.html", "before")]


# --- the pictures' coordinates ---


def row(tap, ratio, verdict="match", nonfinite=0):
    return {"tap": tap, "ratio": ratio, "verdict": verdict, "nonfinite": nonfinite}


def report_with(*rows):
    return {"taps": list(rows), "allowance": 4.0, "scope": "forced"}


def test_the_plot_s_scale_is_logarithmic():
    ratios = (0.01, 0.1, 1.0, 10.0, 100.0)
    plot = plot_of(report_with(*(row(f"layers.{i}.q", ratio) for i, ratio in enumerate(ratios))))
    steps = -np.diff([point.y for point in plot.points])
    assert steps == pytest.approx(steps[0], abs=0.11)
    assert plot.noise.y == plot.points[2].y
    assert plot.points[2].y > plot.allowance.y > plot.points[3].y
    assert (plot.allowance.y - plot.noise.y) == pytest.approx(-steps[0] * np.log10(4), abs=0.11)
    assert list(np.diff([point.x for point in plot.points]) > 0) == [True] * 4


@pytest.mark.parametrize("bad", [row("q", None, "diverges"), row("q", 1.0, "diverges", 3)])
def test_what_has_no_number_is_at_the_upper_edge(bad):
    plot = plot_of(report_with(row("embed", 1e9), bad))
    assert plot.points[1].y == TOP < plot.points[0].y < HEIGHT
    assert plot.first is plot.points[1]


def test_the_grid_has_a_column_for_a_layer():
    layers, rows = grid_of(
        report_with(
            row("embed", 0.0),
            row("layers.2.q", 0.5),
            row("layers.7.q", 5e6, "diverges"),
            row("layers.7.k", 40.0, "known-deviation"),
            row("logits", 3.0, "diverges", nonfinite=1),
        )
    )
    assert layers == [2, 7]
    shown = [(kind, [None if cell is None else (cell.text, cell.shade) for cell in cells]) for kind, cells in rows]
    assert shown == [
        ("embed", [("0", "ok0"), None]),
        ("q", [("0.5", "ok1"), ("5e6", "out2")]),
        ("k", [None, ("40", "known")]),
        ("logits", [None, ("NaN", "out2")]),
    ]


def test_weights_are_rows_of_the_grid():
    name = "weights.model.layers.1.self_attn.q_proj.weight"
    layers, rows = grid_of(report_with(row(name, 1e6, "diverges"), row("layers.0.q", 1.0)))
    assert layers == [0, 1]
    places = [(kind, [None if cell is None else cell.tap for cell in cells]) for kind, cells in rows]
    assert places == [("weights self_attn.q_proj.weight", [None, name]), ("q", ["layers.0.q", None])]


def test_weights_that_differ_and_rows_that_were_not_computed(tmp_path):
    taps = taps_with({}, dtype=np.float32)
    checkpoint = opened(GPT_OSS)
    weight = "model.layers.0.self_attn.q_proj.weight"
    taps[f"weights.{weight}"] = checkpoint.tensors[weight].decode()[::-1]
    taps["logits"] = taps["logits"][-1:]
    report, details = details_of(taps, checkpoint=checkpoint)
    page = Reader(page_of(report, details.taps, {}))
    assert f"first wrong at weights.{weight}" in " ".join(page.text.split())
    data = json.loads(page.scripts[0])
    assert data["taps"][f"weights.{weight}"]["detail"] is None
    assert data["taps"]["logits"]["positions"] == [39]


def test_a_grid_without_layers():
    layers, rows = grid_of(report_with(row("embed", 1.0), row("logits", 1.0)))
    assert layers == []
    assert [(kind, len(cells)) for kind, cells in rows] == [("embed", 1), ("logits", 1)]


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        *(
            (0.0, "0"),
            (0.449, "0.45"),
            (12.34, "12.3"),
            (999.0, "999"),
            (1000.0, "1 thousand"),
            (1.18e6, "1.18 million"),
        ),
        *((4e9, "4 billion"), (3e14, "3e+14"), (None, "unknown"), (float("inf"), "infinitely many")),
    ],
)
def test_multiples_in_words(ratio, text):
    assert times(ratio) == text
