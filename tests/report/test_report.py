"""The page of a run: complete, escaped, the same each time, right in what it shows."""

import html.parser
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch

from command_line import fails
from hostile import HOSTILE
from lcr_fast import cli
from lcr_fast.data.prepared import PreparedData
from lcr_fast.report import charts
from lcr_fast.report.html import join, raw, tag
from lcr_fast.report.make import report
from lcr_fast.report.run import read_run
from lcr_fast.report.sections import results
from lcr_fast.report.users import look_at_users
from lcr_fast.training.evaluation import rank_model
from lcr_fast.training.models import load_model

KNOWN_TAGS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "header",
        "main",
        "footer",
        "nav",
        "section",
    ),
    *("div", "details", "summary", "h1", "h2", "h3", "p", "a", "span", "i", "b", "bdi", "small"),
    *("ul", "ol", "li", "table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption"),
    *("svg", "g", "line", "text", "polyline", "circle"),
}


class Parsed(html.parser.HTMLParser):
    """The elements of a page, its texts, and whether they nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def page(hostile_run):
    out = hostile_run / "page.html"
    assert report(hostile_run / "run", out, data=hostile_run / "data") == []
    return out


@pytest.fixture(scope="module")
def parsed(page):
    return Parsed(page.read_text(encoding="utf-8"))


def test_no_text_of_the_data_is_markup(parsed):
    assert parsed.open == []
    assert set(parsed.tags) <= KNOWN_TAGS
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name == "src"]
    assert all(value.startswith("#") for name, value in parsed.attributes if name == "href")
    text = "".join(parsed.texts)
    for shown in HOSTILE[:6]:
        assert shown in text
    assert "kept <i>all</i>" in text
    assert "A run on <b>shop</b>" in text


def test_letters_that_hide_are_shown(parsed):
    text = "".join(parsed.texts)
    assert "left\ufffdright\ufffd" in text
    assert "bell\ufffd\ufffd" in text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    assert "w" * 60 in text
    assert "w" * 130 not in text


def test_a_page_has_every_section(parsed):
    text = "".join(parsed.texts)
    titles = (
        *("At a glance", "Results", "Against Base", "What searches are worth", "A few users"),
        *("Training", "Inside the models", "The data", "Settings"),
    )
    assert set(titles) <= set(parsed.texts)
    assert "LCR, no searches" in text
    assert "recency, then after the last query" in text
    assert "24 test samples: a 95 % interval" in text.lower()
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert [f"#{name}" for name in ids] == [v for n, v in parsed.attributes if n == "href"]


def test_the_numbers_are_those_of_the_run(hostile_run, parsed):
    run = read_run(hostile_run / "run")
    for result in run.models.values():
        for row in result["ranks"].rows((5,)):
            if row["targets"] == "all" and row["metric"] == "ndcg@5":
                told = f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
                assert told in parsed.texts


def test_the_same_run_gives_the_same_bytes(hostile_run, page, tmp_path):
    cli.main(["report", str(hostile_run / "run"), "--data", str(hostile_run / "data"), "-o",
              str(tmp_path / "again.html")])  # fmt: skip
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_users_are_what_the_model_says(hostile_run):
    data = PreparedData.open(hostile_run / "data")
    model = load_model(hostile_run / "run" / "lcr" / "model.safetensors", data, "cpu")
    model.config = model.config.replace(readout=1.0)
    users = look_at_users(model, data, 9)
    assert len({user.user for user in users}) == 9
    ranks = rank_model(model, data).by_protocol["sampled"]
    samples = data.split("test")
    for user in users:
        row = int(np.flatnonzero(samples.users == data.users.find(user.user))[0])
        assert user.ranks[1] == ranks[row]
        assert user.target == data.items[int(samples.items[row])]
        assert user.candidates == 13
        assert sum(past.times for past in user.events) + user.earlier[0] == min(
            samples.rec_end[row] - data.rec_offsets[samples.users[row]], 6
        )
        for history, hidden in ((user.searches, user.earlier[1]), (user.events, user.earlier[0])):
            assert hidden == 0
            assert sum(past.pooled for past in history) == pytest.approx(1, abs=1e-5)
            for step in range(2):
                assert sum(past.looks[step] for past in history) == pytest.approx(1, abs=1e-5)
        assert [past.before for past in user.events] == sorted(
            (past.before for past in user.events), reverse=True
        )
        assert min(past.before for past in (*user.events, *user.searches)) > 0
        for places, rank in ((user.before, user.ranks[0]), (user.after, user.ranks[1])):
            at = [number for number, place in enumerate(places, 1) if place.is_target]
            assert at == ([rank] if rank <= 10 else [])
        was = {place.item: number for number, place in enumerate(user.before)}
        for number, place in enumerate(user.after):
            if place.item in was:
                assert place.rise == was[place.item] - number


def test_extremes_are_chosen_on_both_sides(hostile_run):
    data = PreparedData.open(hostile_run / "data")
    model = load_model(hostile_run / "run" / "lcr" / "model.safetensors", data, "cpu")
    with torch.no_grad():  # so that steps matter
        for parameter in model.reasoning.parameters():
            parameter.mul_(3)
    model.config = model.config.replace(readout=1.0)
    users = look_at_users(model, data, 6)
    gains = {user.why: [] for user in users}
    for user in users:
        gains[user.why].append(1 / user.ranks[1] - 1 / user.ranks[0])
    assert min(gains["among those whom reasoning helps most"]) > 0
    assert max(gains["among those whom it harms most"]) < 0
    assert len(gains["drawn at random"]) == 2
    base = load_model(hostile_run / "run" / "base" / "model.safetensors", data, "cpu")
    for user in look_at_users(base, data, 3):
        assert user.why == "drawn at random"
        assert user.ranks[0] == user.ranks[1]
        assert user.searches[0].looks == []


def test_without_data_the_page_says_what_it_lacks(hostile_run, tmp_path, capsys):
    run = shutil.copytree(hostile_run / "run", tmp_path / "run")
    cli.main(["report", str(run)])
    assert "without --data there are no facts" in capsys.readouterr().out
    parsed = Parsed((run / "report.html").read_text(encoding="utf-8"))
    assert "Results" in parsed.texts
    assert "A few users" not in parsed.texts


def test_of_a_study_the_first_seed_and_its_tables(hostile_run, tmp_path):
    study = tmp_path / "study"
    for seed in (0, 1):
        shutil.copytree(hostile_run / "run" / "lcr", study / f"seed-{seed}" / "lcr,steps=2")
    rows = "\n".join(f"{k},<script>{k}</script>,{k / 3}" for k in range(250))
    (study / "latency.csv").write_text(f"steps,kind,ms\n{rows}\n")
    report(study, tmp_path / "page.html", data=hostile_run / "data", n_users=1)
    parsed = Parsed((tmp_path / "page.html").read_text(encoding="utf-8"))
    text = "".join(parsed.texts)
    assert "Latency of a forward" in text
    assert "<script>3</script>" in text
    assert "50 more rows" in text
    assert "Against Base" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}/lcr"], "holds no evaluated model, so it is no run"),
        (["{run}", "--data", "{other}"], "it is of other prepared data"),
        (["{run}", "--model", "tcl"], "--model must be one of base, lcr, nosearch, got 'tcl'"),
        (["{run}", "--users", "-1"], "--users must be at least 0, got -1"),
        (["{run}", "-o", "{run}"], "a folder; name a file in it"),
    ],
)
def test_what_cannot_be_is_one_sentence(hostile_run, prepared_folder, arguments, message, capsys):
    names = {"run": hostile_run / "run", "other": prepared_folder}
    assert message in fails(capsys, "report", *(each.format(**names) for each in arguments))


def test_a_damaged_evaluation_is_one_sentence(hostile_run, tmp_path, capsys):
    run = shutil.copytree(hostile_run / "run", tmp_path / "run")
    path = run / "lcr" / "evaluation.json"
    path.write_text(path.read_text().replace('"mean": 0.', '"mean": 1.', 1))
    assert "evaluation.json" in fails(capsys, "report", run)


# elements and charts


def test_elements_escape():
    assert tag("p", "<&>", [1, None, ["a"]], class_='"', data_x=None) == (
        '<p class="&quot;">&lt;&amp;&gt;1a</p>'
    )
    assert join(tag("b", 1), "<") == "<b>1</b>&lt;"
    assert raw("a\u202eb\n") == "<bdi>a\ufffdb </bdi>"
    assert raw("x" * 200, 5) == "<bdi>xxxx…</bdi>"


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0.003, 0.57), (-0.034, 0.012), (5, 5), (0, 0), (1e-9, 2e-9), (0, 9e6)],
)
def test_ticks_span_and_differ(low, high):
    ticks = charts.ticks(low, high)
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-12
    assert 2 <= len(ticks) <= 8
    assert len(set(charts.labels(ticks))) == len(ticks)
    assert charts.ticks(math.nan, 1) == [0, 1]


def test_intervals_stand_where_their_numbers_are():
    rows = [charts.Row("a", "lcr", 0.5, 0.25, 1.0, "t"), charts.Row("b", "base", 0, 0, 0.5, "u")]
    drawn = charts.intervals(rows)
    assert re.findall(r'class="ci" style="left:([\d.]+)%;width:([\d.]+)%"', drawn) == [
        ("25.00", "75.00"),
        ("0.00", "50.00"),
    ]
    assert re.findall(r'class="dot" style="left:([\d.]+)%"', drawn) == ["50.00", "0.00"]
    signed = charts.intervals([rows[0]._replace(low=0.5)], zero=True, sign="+")
    assert 'class="zero" style="left:0.00%"' in signed
    assert ">+1.0<" in signed


def test_one_user_is_a_dot_without_an_interval():
    row = {"protocol": "sampled", "targets": "all", "metric": "ndcg@5", "mean": 0.5, "n": 1}
    row |= {"low": math.nan, "high": math.nan}
    assert "[-]" in results._cell(row)
    drawn = charts.intervals(results._rows({"lcr": ("LCR", [row])}, "sampled", "all"))
    assert "0.500 [-]" in drawn
    assert "width:0.00%" in drawn
    assert "nan" not in drawn


def test_lines_stay_in_their_frame():
    line = charts.Line("a", "lcr", [0, 1, 2], [0.1, math.nan, 0.7])
    drawn = charts.lines([line], "step", "value", whole=True)
    points = re.search(r'points="([^"]+)"', drawn)[1].split()
    assert len(points) == 2
    x, y = zip(*(map(float, point.split(",")) for point in points), strict=True)
    assert (x[0], x[1]) == (44, 350)
    assert 10 <= y[1] < y[0] <= 186
    assert re.findall(r'text-anchor="middle">(\d+)<', drawn) == ["0", "1", "2"]


def test_job_configs_are_shown(hostile_run, parsed):
    job = json.loads((hostile_run / "run" / "job.json").read_text())
    for name in job["model"]:
        assert name in parsed.texts
