import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import typer
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from analysis import cli, plots
from analysis import page as page_module
from analysis.intervals import Interval
from analysis.page import Answered, Facts, Gallery, Heading, Links, Page, Picture, Table, Text, cell
from analysis.report import report
from tests.analysis import simulated
from tests.tracking import stores
from twinrl.config.errors import InputError
from twinrl.machine import files
from twinrl.machine.text import harmless
from twinrl.run import layout, runlog
from twinrl.tracking import store


class Addresses(HTMLParser):
    """Everything that a page would fetch, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name == "src" or (tag == "link" and name == "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.slow
def test_the_page_needs_nothing_from_elsewhere(drawn_page: Path) -> None:
    page = Addresses(drawn_page.read_text())
    assert len(page.fetched) >= 4
    assert all(address.startswith("data:image/") and len(address) > 1000 for address in page.fetched)


@pytest.mark.slow
def test_the_page_says_what_is_planted(study_page: Path) -> None:
    text = Addresses(study_page.read_text()).text
    assert "3 arms, 6 seeds an arm, 400 steps; base: base" in text
    assert "0 of 6 diverged in clip, ema, which excludes only rates above 46 % (95 %)." in text
    assert re.search(r"ema\s*6\s*2\s*0\.333 \[.*?\]\s*two in 2", text)  # healthy runs that lost a prompt
    assert "With 6 common seeds no difference can pass Wilcoxon's test in 2 comparisons; 7 seeds could, and 14" in text
    for heading in ("Ranking", "Time to divergence", "Factors", "Reward against recall", "Prompts", "Cost", "seed 0"):
        assert heading in text


@pytest.mark.slow
def test_the_top_of_the_page_answers_which_factor_how_sure_and_what_it_costs(study_page: Path) -> None:
    """What a second person asks, from the page alone: the planted teacher, its interval, its time a step."""
    markdown = (study_page.parent / "report.md").read_text().split("## The evidence")[0]
    answered, which, sure, cost = (line for line in markdown.splitlines() if line.startswith("**"))
    assert answered.startswith("**Fell: base 4 of 6, none of the 12 in other arms, seen at step 40 (median); ")
    rank = (
        r"teacher \(ema instead of live\) moves a run's rank in val/quality by −[\d.]+ \[−.*?, −.*?\] of 18, medians "
    )
    assert re.search(rank + r"0\.1\d* against 0\.\d+ \(better\)", which)
    assert re.search(r"First of the arms is ema: 0\.1\d* \[.*?\]; the base has", which)
    assert "p after Holm" in sure
    assert re.search(r"teacher \(ema instead of live\): 1\.3\d* \[1\.[23]\d*, 1\.3\d*\] times the time a step", cost)
    assert "recall changes by" in cost


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_nothing_is_named_at_the_top_where_nothing_is_planted(tmp_path: Path) -> None:
    alike = {name: {**arm, "rate": 0.0, "quality": 0.2} for name, arm in simulated.ARMS.items()}
    page = report(simulated.make_study(tmp_path, seeds=5, arms=alike, steps=80)).page.with_suffix(".md").read_text()
    top = page.split("## The evidence")[0]
    assert "No arm is found to differ in val/quality beyond chance (nearest:" in top
    assert "No run fell (0 of 15, so rates up to 22 % remain possible)." in top
    assert re.search(r"What is not found is not absent: \w+ \(.*?\) may still change val/quality by", top)
    assert "★ " not in top.replace("★: found", "")


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_critical_learning_rates_of_a_search_are_read(tmp_path: Path) -> None:
    folder = simulated.make_study(tmp_path, seeds=3, steps=60)
    brackets: list[dict[str, object]] = []
    for arm, rate in (("base", 1e-3), ("ema", 4e-3)):
        rates = [rate * (1 + 0.1 * seed) for seed in range(3)]
        brackets += [{"arm": arm, "seed": k, "healthy": r, "diverged": 1.2 * r} for k, r in enumerate(rates)]
    brackets.append({"arm": "clip", "seed": 0, "healthy": 0.1, "diverged": None})
    arms = [{"name": name, "config_hash": arm["hash"]} for name, arm in simulated.ARMS.items()]
    page = report(folder, tmp_path / "out", index={"name": "lr", "arms": arms, "critical": brackets}).page
    markdown = page.with_suffix(".md").read_text()
    assert "## Critical learning rate" in markdown
    assert re.search(r"\| ema \| 3 of 3 \| 0\.0048\d* \[.*?\] \| 2 \[1\.\d+, 2\.\d+\] \|", markdown)
    assert "| clip | 0 of 1 (1 above) | – | – |" in markdown
    assert (tmp_path / "out/figures/margins.svg").is_file()


@pytest.mark.slow
def test_markdown_figures_and_tables_are_there(study_page: Path, study_folder: Path, drawn_page: Path) -> None:
    folder = study_page.parent
    images = re.findall(r"!\[.*?\]\((.+?)\)", (folder / "report.md").read_text())
    assert len(images) >= 8
    assert all((folder / image).is_file() for image in images)
    assert len(pd.read_csv(folder / "trials.csv")) == 18
    assert len(list(study_folder.glob(f"*/{layout.METRICS}"))) == 18
    vector, paper = ({path.stem for path in drawn_page.parent.glob(f"figures/*.{kind}")} for kind in ("svg", "pdf"))
    assert vector == paper != set()


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_report_can_be_repeated(study_page: Path, study_folder: Path, tmp_path: Path) -> None:
    again = report(study_folder, tmp_path).page
    assert again.parent == tmp_path
    assert (tmp_path / "trials.csv").read_bytes() == (study_page.parent / "trials.csv").read_bytes()
    first, second = ((folder / "report.md").read_text() for folder in (study_page.parent, tmp_path))
    assert re.sub(r"\]\(.*?\)", "](a file)", second) == re.sub(r"\]\(.*?\)", "](a file)", first)


@pytest.mark.slow
def test_a_figure_that_is_drawn_again_is_the_same(tmp_path: Path) -> None:
    for name in ("first.svg", "second.svg"):
        plots.save(plots.forest({"a": Interval(1.0, 0.5, 2.0, 5, "")}, "hazard ratio"), tmp_path / name)
    for kind in (".svg", ".pdf"):
        first, second = ((tmp_path / name).with_suffix(kind).read_bytes() for name in ("first.svg", "second.svg"))
        assert first == second


@pytest.mark.slow
def test_a_name_is_no_formula(tmp_path: Path) -> None:
    """Neither shown as one nor refused for being a wrong one; the numbers of a logarithmic axis are formulas."""
    names = (r"a$_b$", r"$\frac{$", "$", "\x1b[2J")
    figure = plots.forest({name: Interval(1.0, 0.01, 99.0, 5, "") for name in names}, names[1], log_scale=True)
    drawn = plots.save(figure, tmp_path / "a.svg").read_text()
    assert [name for name in map(harmless, names) if f"<!-- {name} -->" not in drawn] == []
    ElementTree.fromstring(drawn)
    assert "mathdefault" in drawn


@pytest.mark.slow
def test_a_pdf_is_drawn_again_where_its_figure_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    seen = []
    for high in (2.0, 2.0, 3.0):
        plots.save(plots.forest({"a": Interval(1.0, 0.5, high, 5, "")}, "hazard ratio"), path)
        stat = path.with_suffix(".pdf").stat()
        seen.append((stat.st_mtime_ns, path.with_suffix(".pdf").read_bytes()))
    assert seen[0] == seen[1]
    assert seen[1][1] != seen[2][1]
    path.with_suffix(".pdf").unlink()
    plots.save(plots.forest({"a": Interval(1.0, 0.5, 3.0, 5, "")}, "hazard ratio"), path)
    assert path.with_suffix(".pdf").read_bytes() == seen[2][1]


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_one_seed_gives_a_report_without_a_ranking(tmp_path: Path) -> None:
    page = report(simulated.make_study(tmp_path, seeds=1, steps=60)).page.read_text()
    assert "There is no ranking: arm base has 1 finished seed" in page
    assert "run 13 more" in page
    assert "Time to divergence" in page


@pytest.mark.usefixtures("undrawn")
def test_a_run_and_its_arm(tmp_path: Path) -> None:
    run = simulated.make_run(tmp_path, spikes_at=(120, 200, 330), diverges_at=340)
    simulated.make_run(tmp_path, seed=1)
    text = Addresses(report(run).page.read_text()).text
    assert "It diverged between steps 320 and 340" in text
    assert re.search(r"rectify led 3 of 3 spikes, 3 steps before the total \(median\); the largest, [\d,]+ times", text)
    assert "First to stand out: rectify, 3 steps before the total (median)." in text
    assert re.search(
        r"before \(median of all spikes\): RMS_t 2\.\d times its usual value \(quiet steps: 1\.?\d*\)", text
    )
    assert re.search(r"rectify led, 3 steps before the total\. At the spike rectify is 0\.9\d* of the gradient\.", text)
    assert "Mean cosines before, where they are telling: base·rectify 0.2" in text
    assert "twinflow-0a1b2c3d-s1" in text
    assert "17" in text
    assert "t 0.80–0.90" in text
    assert "branch any" in text
    assert (run / layout.METRICS).is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_learning_rates_as_a_factor_give_critical_ones(tmp_path: Path) -> None:
    rates = ("0.001", "0.002", "0.004", "0.008", "0.016")
    arms = [{"name": f"{t} {lr}", "config_hash": f"{t}{lr}", "levels": {"teacher": t, "optim.lr": lr}, "steps": 100}
            for t in ("live", "ema") for lr in rates]  # fmt: skip
    limit = {"live": 0.003, "ema": 0.006}
    lines = []
    for arm in arms:
        for seed in range(4):
            levels = arm["levels"]
            assert isinstance(levels, dict)
            broken = float(levels["optim.lr"]) > limit[levels["teacher"]]
            lines.append({
                "format": "twinrl-ledger/1", "config_hash": arm["config_hash"], "seed": seed, "fingerprint": "f",
                "status": "diverged" if broken else "finished", "step": 40 if broken else 100, "message": "",
                "metrics": {} if broken else {"val/quality": 0.1 + 0.01 * seed}, "seconds": 1.0, "where": {},
                "diverged": {"step": 40, "kind": "nonfinite"} if broken else None,
            })  # fmt: skip
    (tmp_path / "study.json").write_text(json.dumps({"name": "lr", "metric": "val/quality", "arms": arms}))
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    markdown = report(tmp_path).page.with_suffix(".md").read_text()
    assert re.search(r"\| teacher=ema \| 4 of 4 \| 0\.00566 \[.*?\] \| 1 \[0\.2\d*, 1\.8\d*\] \|", markdown)
    assert "change of val/quality (ranks)" in markdown
    assert "| live 0.016 | 4 | ∞ |" in markdown


@pytest.mark.usefixtures("undrawn")
def test_a_ledger_alone_is_enough(tmp_path: Path) -> None:
    lines = [
        {"format": "twinrl-ledger/1", "config_hash": arm, "seed": seed, "fingerprint": "f", "status": "finished",
         "step": 100, "message": "", "metrics": {"val/quality": quality + 0.01 * seed}, "diverged": None,
         "seconds": 1.0, "where": {}}
        for arm, quality in (("a", 0.1), ("b", 0.5)) for seed in range(6)
    ]  # fmt: skip
    ledger = tmp_path / "host.jsonl"
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(ledger, base="b").page.read_text()
    assert "The arms differ in val/quality (p &lt; 0.001); better than b: a." in page
    assert "No run diverged." in page
    assert (tmp_path / "host-report" / "report.md").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_mlflow_experiments_are_studies(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from twinrl.tracking.mlflow_view import publish

    folder, uri = tmp_path / "runs", f"sqlite:///{tmp_path / 'mlflow.db'}"
    shutil.copy(stores.empty(tmp_path_factory), tmp_path / "mlflow.db")
    for k, kind in enumerate(("base", "ema")):
        for seed in range(2):
            run = simulated.make_run(folder, name=kind, config_hash=f"0000000{k}", seed=seed, steps=40,
                                     quality=0.3 - 0.2 * k, settings={"teacher": {"kind": kind}})  # fmt: skip
            run_id = publish(run, uri, "lab", {"arm": kind, "seed": seed, "config_hash": f"0000000{k}"}, final=True)
    page = report("lab", tmp_path / "out", tracking_uri=uri).page.read_text()
    assert "2 arms, 2 seeds an arm, 40 steps; base: base" in page
    assert "teacher.kind" in page
    linked = report(folder, tmp_path / "linked").page.read_text()
    assert linked.count('<a href="http://127.0.0.1:5000/#/') == 5
    assert run_id in report(run).page.read_text()
    files = store.connect(uri).list_artifacts(run_id, "report")
    assert "report/report.html" in {file.path for file in files}
    with pytest.raises(InputError, match="no finished runs of 'nothing'"):
        report("nothing", tmp_path / "out", tracking_uri=uri)
    with pytest.raises(InputError, match="no MLflow store at"):
        report("lab", tmp_path / "out", tracking_uri=f"sqlite:///{tmp_path}/gone.db")
    assert not (tmp_path / "gone.db").exists()


# --- bad input, command line ------------------------------------------------------------------------------


@pytest.mark.slow
def test_bad_input_is_one_line(study_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing at"):
        report(tmp_path / "absent")
    with pytest.raises(InputError, match="nothing at nnn"):
        report("n" * 400)
    with pytest.raises(InputError, match=r"/proc/x cannot be written; got .*; fix: name another --out"):
        report(study_folder, "/proc/x")
    with pytest.raises(InputError, match="holds no trials"):
        report(tmp_path)
    with pytest.raises(InputError, match="no run logged val/fid; expected one of"):
        report(study_folder, tmp_path, metric="val/fid")
    simulated.make_run(tmp_path / "one")
    with pytest.raises(InputError, match="got one arm, twinflow; expected two or more"):
        report(tmp_path / "one")


def app() -> typer.Typer:
    command = typer.Typer()
    command.command()(lambda: None)
    cli.register(command)
    return command


@pytest.mark.usefixtures("undrawn")
def test_the_command_prints_where_the_report_is(tmp_path: Path) -> None:
    rows = "\n".join(f"{k},{50 if k == 90 else 1 + 0.01 * (k % 7)}" for k in range(120))
    (tmp_path / "log.csv").write_text(f"s,norm\n{rows}\n119,1.5\n119,1\n")  # as a resumed run may log
    arguments = ["analyze", str(tmp_path / "log.csv"), "--column", "step=s", "--column", "grad/total/norm_raw=norm"]
    done = CliRunner().invoke(app(), arguments)
    assert done.exit_code == 0, done.output
    assert f"report: {tmp_path}/log-report/report.html" in done.output.replace("\n", "")
    assert "1 spikes" not in (page := (tmp_path / "log-report/report.html").read_text())
    assert "1 spike" in page
    assert "2 values were logged again for their step" in page


def test_an_interaction_of_no_factors_is_refused(study_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nix is no factor of this study; expected two of"):
        report(study_folder, tmp_path, interactions=[("teacher", "nix")])


def test_logs_of_other_programs_ask_for_their_columns(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,norm\n1,2\n")
    (tmp_path / "tb").mkdir()
    (tmp_path / "tb/events.out.tfevents.1.host").touch()
    for path, kind in ((tmp_path / "log.csv", "a CSV file"), (tmp_path / "tb", "a folder of TensorBoard events")):
        with pytest.raises(InputError, match=f"is {kind} of another program.*--column step=global_step"):
            report(path)
    (tmp_path / "history.jsonl").write_text('{"_step": 1, "norm": 2}\n')
    with pytest.raises(InputError, match=r"is no ledger.*--column"):
        report(tmp_path / "history.jsonl")


def test_a_pair_that_is_none_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app(), ["analyze", str(tmp_path), "--interaction", "lr"])
    assert isinstance(done.exception, InputError)
    assert "'lr' is no pair" in str(done.exception)


def test_registering_imports_nothing_heavy() -> None:
    code = (
        "import sys, analysis.cli; heavy = {'pandas', 'matplotlib', 'scipy', 'torch', 'mlflow'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.slow
def test_analysis_never_imports_torch_or_ray(tmp_path: Path) -> None:
    run = simulated.make_run(tmp_path, steps=60)
    code = (
        f"import sys, analysis.study_page; from analysis.report import report; report({str(run)!r}); "
        "print(sorted({'torch', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# --- pages ------------------------------------------------------------------------------------------------


def test_text_cannot_break_a_page(tmp_path: Path) -> None:
    picture = tmp_path / "a b.png"
    picture.write_bytes(b"png")
    table = pd.DataFrame({"arm|x": ["<b>|"], "value": [0.5]})
    page = Page("<t>", [Heading("a<b"), Text("x & y", note=True), Table(table), Gallery([Picture(picture, '"q"')]),
                        Links([("here", 'http://x/"y')])])  # fmt: skip
    html = page.html(tmp_path)
    assert "<b>" not in html
    assert "&lt;b&gt;|" in html
    assert 'href="http://x/&quot;y"' in html
    markdown = page.markdown(tmp_path)
    assert "| arm\\|x | value |" in markdown
    assert "](a%20b.png)" in markdown


def test_names_make_no_elements_links_or_lines_of_a_markdown_page(tmp_path: Path) -> None:
    attack = "<img src=x onerror=alert(1)> ![p](http://evil) [a\\](http://evil) [b][c]\n\n# h\n[c]: http://evil <!-- "
    table = pd.DataFrame({attack: [attack]})
    links = Links([(attack, "http://x/a)![p](http://evil)")])
    blocks = [Heading(attack), Text(attack), Answered(attack, attack), Table(table), Facts([(attack, attack)]), links]
    page = Page(attack, blocks)
    tokens = MarkdownIt("commonmark").enable("table").parse(page.markdown(tmp_path))
    kinds = [inner.type for token in tokens for inner in [token, *(token.children or [])]]
    assert not {"html_inline", "html_block", "image"} & set(kinds)
    assert kinds.count("link_open") == 1
    assert kinds.count("heading_open") == 2


def test_what_cannot_be_written_or_would_steer_is_escaped_in_files(tmp_path: Path) -> None:
    """As of a run's folder whose name is no UTF-8."""
    Page("run-\udcff\x1b[2J", [Text("\u202e\0")]).write(tmp_path)
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert r"run-\xff\x1b[2J" in text
        assert r"\u202e\x00" in text


def test_a_link_to_a_file_runs_nothing_whatever_it_is_called(tmp_path: Path) -> None:
    picture = tmp_path / "javascript:alert(1)" / "a.png"
    picture.parent.mkdir()
    picture.write_bytes(b"png")
    page = Page("t", [Gallery([Picture(picture, "a")] * 9)])
    for text in (page.html(tmp_path), page.markdown(tmp_path)):
        assert "javascript:" not in text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (3.0, "3"), (0.12345, "0.123"), (12345, "12,345"), ("x", "x")]
)
def test_cells(value: object, text: str) -> None:
    assert cell(value) == text


@pytest.mark.slow
def test_open_intervals_are_drawn_as_arrows(tmp_path: Path) -> None:
    from math import inf, nan

    rows = {
        "a": Interval(1.0, 0.5, 2.0, 5, ""),
        "b": Interval(nan, 0.0, inf, 5, ""),
        "c": Interval(inf, -inf, inf, 5, ""),
    }
    figure = plots.forest(rows, "hazard ratio", reference=1.0, log_scale=True)
    markers = [line.get_marker() for line in figure.axes[0].lines]
    assert markers.count(">") == 2
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert texts == {"no estimate", "estimate ∞"}
    assert plots.save(figure, tmp_path / "f.svg").read_text().startswith("<?xml")


def test_a_page_of_many_arms_stays_small(tmp_path: Path) -> None:
    """Of a long table the first rows, of many pictures the first; the rest is beside the page, and linked."""
    pictures = []
    for k in range(5):
        pictures.append(Picture(tmp_path / f"grid {k}.png", f"arm {k}"))
        pictures[-1].path.write_bytes(bytes(page_module.PICTURE_BYTES // 3))
    frame = pd.DataFrame({"arm": [f"a{k}" for k in range(500)], "value": [0.5] * 500})
    markdown, page = Page("many", [Table(frame, "ranking"), Gallery(pictures)]).write(tmp_path)
    text = page.read_text()
    assert len(text) < 2e6
    assert text.count("<tr>") == page_module.MOST_ROWS + 1
    assert text.count("<img") == 3
    assert 'href="grid%203.png"' in text
    assert 'href="tables/ranking.csv"' in text
    assert "](tables/ranking.csv)" in markdown.read_text()
    assert pd.read_csv(tmp_path / "tables" / "ranking.csv")["arm"].tolist() == frame["arm"].tolist()


def test_figures_have_as_many_lines_as_can_be_read_and_say_so() -> None:
    rows = {f"arm {k}": Interval(1.0, 0.5, 2.0, 5, "") for k in range(plots.MOST_LINES + 40)}
    axis = plots.forest(rows, "hazard ratio").axes[0]
    assert len(axis.get_yticks()) == plots.MOST_LINES
    assert axis.get_xlabel() == f"hazard ratio; the first {plots.MOST_LINES} of {len(rows)}"
    assert plots.forest({"a": rows["arm 0"]}, "hazard ratio").axes[0].get_xlabel() == "hazard ratio"


def test_a_curve_keeps_its_extremes_and_gaps_at_as_many_points_as_pixels() -> None:
    rng = np.random.default_rng(0)
    values = pd.Series(rng.lognormal(size=20_001))
    values[7_777], values[3_333] = 1e6, 1e-6
    values[15_000:15_200] = math.inf
    x, y = plots.drawn(pd.Series(range(len(values))), values)
    assert len(x) <= plots.MOST_POINTS
    assert (np.diff(x) > 0).all()
    assert (y[x == 7_777], y[x == 3_333]) == ([1e6], [1e-6])
    assert np.isnan(y[(x >= 15_000) & (x < 15_200)]).all()
    assert ((x >= 15_000) & (x < 15_200)).any()
    short = plots.drawn(pd.Series(range(5)), values[:5])
    assert short[1].tolist() == values[:5].tolist()


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_report_from_tables_says_what_one_from_logs_says(tmp_path: Path) -> None:
    """Rollbacks, numbers that are not finite and prompts that are nan among them."""
    study = simulated.make_study(tmp_path, seeds=3)
    rolled, broken, lost = sorted(study.iterdir())[1:4]
    rows = runlog.read(rolled / layout.LOG)
    again = [row | {"iteration": 400 + k} for k, row in enumerate(rows[200:])]
    _write(rolled, [*rows[:300], *again])
    _write(
        broken,
        [row | ({"loss/total": math.nan} if row["step"] > 350 else {}) for row in runlog.read(broken / layout.LOG)],
    )
    _write(lost, [row | {name: math.nan for name in row if name.startswith("val/accuracy/two")}
                  for row in runlog.read(lost / layout.LOG)])  # fmt: skip
    said = [_said(report(study, mlflow=False).page) for _ in range(2)]
    assert len(list(study.glob(f"*/{layout.METRICS}"))) == 9
    for table in study.glob(f"*/{layout.METRICS}"):
        table.write_bytes(b"damaged")
    said.append(_said(report(study, mlflow=False).page))
    assert said[0] == said[1] == said[2]


def _write(run: Path, rows: list[dict[str, Any]]) -> None:
    (run / layout.LOG).unlink()
    with runlog.RunLog(run / layout.LOG) as log:
        for row in rows:
            log.append(row)


def _said(page: Path) -> list[str]:
    return [(page.parent / name).read_text() for name in ("report.md", "report.html", "trials.csv")]


def test_a_refused_report_leaves_no_folder(tmp_path: Path) -> None:
    """A value that only a figure needs is found when the folder is there already."""
    folder = simulated.make_study(tmp_path, seeds=1, steps=20)
    run = next(folder.rglob("log.jsonl")).parent
    rows = (run / "log.jsonl").read_text().splitlines()
    rows[3] = json.dumps(json.loads(rows[3]) | {"opt/rms_max": [1.5]})
    (run / "log.jsonl").write_text("\n".join(rows) + "\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="opt/rms_max"):
        report(run, tmp_path / "new" / "out", mlflow=False)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_two_reports_into_one_folder_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = simulated.make_run(tmp_path), tmp_path / "out"
    monkeypatch.setattr("analysis.report.PATIENCE_SECONDS", 0)
    with files.alone(out / ".lock", TimeoutError()):
        with pytest.raises(InputError, match=r"another process writes a report into .*out; fix: wait"):
            report(run, out, mlflow=False)
        assert [path.name for path in out.iterdir()] == [".lock"]
    report(run, out, mlflow=False)
    assert not (out / ".lock").exists()
