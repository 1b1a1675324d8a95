"""55_report: a page that needs nothing else, that no answer can change, and that does without what is missing."""
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from distill_nb import report as rp
from distill_nb.core import DistillError, write_json, write_jsonl

from conftest import DEADLINE, ROOT, environment

NASTY = "<script>alert('x')</script> <img src=http://evil.example/x.png onerror=alert(1)> ![a](http://evil.example/y) ``` {{ 7*7 }} </div>"
MEASURED = {"rougeL": {"value": 0.312, "low": 0.28, "high": 0.35, "n": 48, "backend": "rouge_score 0.1.2"},
            "bleu": {"value": 12.3, "low": 10.0, "high": 15.0, "n": 48, "backend": "sacrebleu 2.6.0"}}
PAIRED = {"baseline": "base", "confidence": 0.95, "resamples": 1000, "seed": 42, "method": "percentile bootstrap over rows",
          "differences": {"small": {"rougeL": {"difference": -0.012, "low": -0.03, "high": 0.004, "p": 0.2, "n": 48}}}}


def stage(run, folder, kind, **more):
    manifest = {"stage": kind, "start": 100.0, "end": 165.4, "summary": {}, "parameters": {}, "packages": {"torch": "2.13.0"},
                "hardware": {"hardware": {"name": "a CPU"}, "dtype": "float32"}} | more
    write_json(run/folder/"manifest.json", manifest)
    return run/folder


def measured(folder, models, paired=None):
    write_json(folder/"metrics.json", {"version": 2, "models": models, "paired": paired or {}})


@pytest.fixture
def run(tmp_path):
    "A run with every kind of file a report can use"
    run = tmp_path/"mine"
    write_json(stage(run, "01-annotate", "annotate")/"annotate.json", {"rows": {"train": 40, "test": 8}, "dropped": {}, "tokens": 1234})
    write_jsonl(stage(run, "02-student", "sft", parameters={"data": str(run/"01-annotate"), "model": "/srv/someone/models/llama"})/"train_log.jsonl",
                [{"step": s, "epoch": 0.1, "loss": 3 / s} for s in range(1, 9)] + [{"step": 8, "epoch": 1, "eval_loss": 1.5}])
    write_json(stage(run, "03-merged", "merge")/"merge.json", {"max_abs_logit_difference": 1.23e-5, "folder": str(run/"02-student")})
    folder = stage(run, "04-evaluate", "evaluate", summary={"rougeL base": 0.312})
    measured(folder, {"base": {"parameters": 134_515_008, "cut_off": 3, "trimmed": 2, "metrics": MEASURED}, "small": {"metrics": MEASURED}}, PAIRED)
    write_jsonl(folder/"predictions.jsonl", [{"id": i, "prompt": NASTY, "references": ["ঢাকা", NASTY], "answers": {"base": NASTY, "small": NASTY}}
                                             for i in ("1", "2")])
    return run


class Links(HTMLParser):
    "What a page would fetch, or run"
    def __init__(self, page):
        super().__init__()
        self.tags, self.links = set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [(k, v) for k, v in attrs if k in ("src", "href", "xlink:href", "action", "srcset", "data") or k.startswith("on") or k.startswith("xmlns")]


def test_the_page_fetches_and_runs_nothing(run):
    page = rp.render_html(rp.build_report(run))
    found = Links(page)
    assert not found.tags & {"script", "iframe", "img", "link", "object", "embed", "base", "form", "metadata"}
    assert all(k == "href" and v.startswith("#") for k, v in found.links), found.links
    assert not re.search(r"url\((?!#)", page) and "@import" not in page
    assert {"svg", "table", "style"} <= found.tags and "prefers-color-scheme: dark" in page


def test_references_inside_plots_lead_somewhere_and_ids_are_unique(run):
    page = rp.render_html(rp.build_report(run))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r'(?:url\(#|href="#)([^")]+)', page)) <= set(ids)


def test_answers_are_text(run):
    report = rp.build_report(run)
    page = rp.render_html(report)
    assert "&lt;script&gt;alert(" in page and "49" not in re.findall(r"\{\{.*?\}\}", page)[0]
    markdown = rp.render_markdown(report)
    fences = [line for line in markdown.split("\n") if line.startswith("````")]
    assert len(fences) % 2 == 0 and len(fences) >= 16  # NASTY holds a fence of three, so its block's has four
    outside = "".join(re.split(r"^````text\n.*?^````$", markdown, flags=re.S | re.M))
    assert "evil" not in outside


def test_every_reference_is_shown(run):
    report = rp.build_report(run)
    assert report["evaluations"][0]["answers"][0]["references"] == ["ঢাকা", NASTY]
    assert rp.render_html(report).count('<div class="who">reference</div>') == 4
    assert rp.render_markdown(report).count("\nReference\n") == 4


def test_a_models_name_is_text_too(run):
    name = "<b>x</b>|$a$ `c`"
    measured(run/"04-evaluate", {name: {"metrics": MEASURED}})
    report = rp.build_report(run)
    page = rp.render_html(report)
    assert "<b>" not in page and "&lt;b&gt;" in page
    assert "<b>" not in rp.render_markdown(report)


def test_no_path_of_this_machine(run, tmp_path):
    for path in rp.write_report(rp.build_report(run), tmp_path/"out"):
        text = path.read_text(encoding="utf-8")
        assert str(tmp_path) not in text and "/srv/someone" not in text, path.name
    assert json.loads((tmp_path/"out"/"report.json").read_text())["stages"][1]["parameters"] == {"data": "01-annotate", "model": ".../llama"}


def test_the_text_says_all(run):
    text = rp.render_text(rp.build_report(run, title="Mine"))
    for said in ("Mine", "0.312 [0.280, 0.350]", "12.30 [10.00, 15.00]", "134.5 million", "48 test rows", "95% intervals", "rouge_score 0.1.2",
                 "Answers that reached the limit of tokens: base 3 (2 cut back", "Difference from base", "-0.012 [-0.030, +0.004]", "0.200", "no logit by more than 1.23e-05", "rows train 40, test 8"):
        assert said in text, said
    lines = text.split("\n")
    header = next(i for i, line in enumerate(lines) if line.startswith("model"))
    assert {line.index("0.312") for line in lines[header + 1:header + 3]} == {lines[header].index("rougeL")}


def test_only_metrics_are_needed(tmp_path):
    folder = stage(tmp_path/"bare", "01-evaluate", "evaluate", packages={}, hardware={})
    write_json(folder/"metrics.json", {"version": 2, "models": {"mine": {"metrics": {"rougeL": MEASURED["rougeL"]}}}})
    report = rp.build_report(tmp_path/"bare")
    files = rp.write_report(report, tmp_path/"out")
    assert [f.name for f in files] == ["report.json", "report.md", "results.txt", "report.html"]
    page = files[-1].read_text(encoding="utf-8")
    assert "Training" not in page and "Answers side by side" not in page and "Difference" not in page
    assert rp.render_table(report["evaluations"][0]["metrics"]).startswith("model")


def test_values_that_cannot_be_drawn_easily(run):
    flat = {k: {"value": 0.0, "low": 0.0, "high": 0.0, "n": 1, "backend": "x"} for k in ("bleu", "rougeL", "perplexity")}
    wide = flat | {"perplexity": {"value": 2.5e7, "low": 1e7, "high": 6e7, "n": 1, "backend": "x"}}
    measured(run/"04-evaluate", {"a": {"metrics": flat}, "b": {"metrics": wide}, "c": {"metrics": {}}})
    page = rp.render_html(rp.build_report(run))
    assert page.count("<svg") == 4 and "nan" not in page.lower()
    assert "With so few" in page


def test_without_metrics_there_is_no_report(run):
    (run/"04-evaluate"/"metrics.json").unlink()
    with pytest.raises(DistillError, match="`evaluate` stage"): rp.build_report(run)
    with pytest.raises(DistillError, match="no such run"): rp.build_report(run/"nowhere")


def test_a_stage_that_is_not_finished_is_left_out(run):
    (run/"03-merged"/"manifest.json").unlink()
    report = rp.build_report(run)
    assert [s["id"] for s in report["stages"]] == ["01-annotate", "02-student", "04-evaluate"] and not report["merges"]


def test_a_benchmark_adds_costs_and_sizes(run):
    cost = {"parameters": 10_000_000, "bytes": 40_000_000, "latency_ms": {"p50": 12.5}, "samples": [1, 2]}
    write_json(stage(run, "05-benchmark", "benchmark")/"benchmark.json", {"base": cost, "small": cost})
    report = rp.build_report(run)
    models = report["evaluations"][0]["metrics"]["models"]
    assert models["base"]["parameters"] == 134_515_008, "the evaluation knows best"
    assert models["small"]["parameters"] == 10_000_000
    assert "40,000,000" in rp.render_html(report) and "p50 12.5" in rp.render_text(report)


def test_metrics_of_an_earlier_version_are_refused_by_name(run):
    write_json(run/"04-evaluate"/"metrics.json", {"base": MEASURED, "paired": PAIRED})
    with pytest.raises(DistillError, match="04-evaluate.*metrics.json: has version 1.*evaluate stage again"): rp.build_report(run)


def test_only_the_rows_that_are_shown_are_read(run):
    with open(run/"04-evaluate"/"predictions.jsonl", "a", encoding="utf-8") as f: f.write("not JSON")
    assert len(rp.build_report(run, answers=2)["evaluations"][0]["answers"]) == 2


def test_the_stage_writes_into_its_own_folder_only(run, tmp_path):
    "The top of the run is the pipeline's: it copies what the stage has written"
    notebook, out = ROOT/"nbs"/"55_report.ipynb", run/"05-report"
    parameters = [x for name, value in (("run_dir", run), ("out", out)) for x in ("-p", name, str(value))]
    done = subprocess.run([sys.executable, "-m", "papermill", str(notebook), str(tmp_path/"out.ipynb"), *parameters, "-k", "python3",
                           "--no-progress-bar"], cwd=tmp_path, env=environment(None), text=True, capture_output=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    assert not [p.name for p in run.iterdir() if p.is_file()]
    assert {p.name for p in out.iterdir()} >= {"report.html", "report.md", "report.json", "results.txt", "manifest.json"}


def test_validations_stand_in_every_form_beside_the_loss_that_led_up_to_them(run):
    log = [{"step": s, "loss": float(s)} for s in (1, 2)] + [{"step": 2, "epoch": 1.0, "eval_loss": 1.25, "eval_token_accuracy": 0.5}]
    log += [{"step": 3, "loss": 4.0}, {"step": 4, "loss": 6.0}, {"step": 4, "epoch": 2.0, "eval_loss": 1.125, "eval_token_accuracy": 0.75}]
    write_jsonl(run/"02-student"/"train_log.jsonl", log)
    report = rp.build_report(run)
    assert rp.validations(report) == [("02-student", (["step", "epoch", "training loss", "validation loss", "validation token accuracy"],
                                                      [["2", "1", "1.500", "1.250", "0.500"], ["4", "2", "5.000", "1.125", "0.750"]]))]
    for text in (rp.render_text(report), rp.render_markdown(report), rp.render_html(report)):
        assert all(number in text for number in ("1.500", "5.000", "1.125", "0.750")) and "validation token accuracy" in text
    write_jsonl(run/"02-student"/"train_log.jsonl", log[:2])
    assert "validation loss" not in rp.render_text(rp.build_report(run))
