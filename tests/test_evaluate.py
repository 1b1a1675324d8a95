"""45_evaluate: what is asked again and what is not, what is scored, and what happens when a run is killed."""
import json
import math
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from distill_nb import evaluate as ev
from distill_nb.core import DistillError, read_json, write_jsonl
from distill_nb.stage import ModelSpec, check

import tiny


def row(key, answer="yes"):
    return {"id": key, "messages": [{"role": "user", "content": f"q {key}"}, {"role": "assistant", "content": answer}], "meta": {}}


ROWS = [row("1"), row("2")]


# The rows

def test_a_row_without_a_reference_is_named():
    rows = [row("r1"), row("r2", " "), row("r3")]
    with pytest.raises(DistillError, match="r2"): ev.load_test_rows({"rows": rows, "validation": 0, "test": 2, "seed": 1})


def test_the_test_split_is_read_from_its_top(tmp_path):
    for split in ("train", "validation", "test"): write_jsonl(tmp_path/f"{split}.jsonl", [row(f"{split}-{i}", f"a{i}") for i in range(5)])
    assert [r["id"] for r in ev.load_test_rows(str(tmp_path), 3)] == ["test-0", "test-1", "test-2"]
    assert len(ev.load_test_rows(str(tmp_path))) == 5


def test_a_persons_label_is_the_reference(tmp_path):
    "What was found to pass the check and fail in the run"
    write_jsonl(tmp_path/"mine.jsonl", [{"text": f"t{i}", "label_text": ("good", "bad")[i % 2]} for i in range(12)])
    rows = ev.load_test_rows({"path": str(tmp_path/"mine.jsonl"), "validation": 0, "test": 4}, task="classify")
    assert len(rows) == 4 and {r["messages"][-1]["content"] for r in rows} <= {"good", "bad"}
    assert all(r["messages"][-1]["role"] == "assistant" for r in rows)


# Parameters

RIGHT = {"models": {"teacher": "mine/teacher"}, "data": "sample"}


@pytest.mark.parametrize("wrong, message", [
    ({"baseline": "techer"}, r"baseline: .techer. is none of the models, did you mean .teacher.\?$"),
    ({"metrics": ["rouge"]}, "rougeL"),
    ({"models": {"a/b": "x"}}, "cannot name a model"),
    ({"models": {" a": "x"}}, "cannot name a model"),
    ({"models": {".a": "x"}}, "cannot name a model"),
    ({"cut_off": "drop"}, "'trim' or 'keep'"),
])
def test_mistakes_in_parameters_are_explained(wrong, message):
    with pytest.raises(DistillError, match=message): check(ev.EvaluateParams, RIGHT | wrong, "mine.yaml, stage 'evaluate'")


# What is scored

@pytest.mark.parametrize("text, reason, cut_off, scored", [
    ("Bees make honey. They eat", "length", "trim", "Bees make honey."),
    ("Bees make honey. They eat", "length", "keep", "Bees make honey. They eat"),
    ("Bees make honey. They eat", "stop", "trim", "Bees make honey. They eat"),
    ("Bees make", "length", "trim", "Bees make"),  # no sentence is whole: nothing to cut back to
])
def test_an_answer_is_cut_as_a_reference_is(text, reason, cut_off, scored):
    answer = {"text": text, "finish_reason": reason}
    assert ev.scored_text(answer, cut_off) == scored
    assert ev.cut_counts([answer], cut_off) == {"cut_off": int(reason == "length"), "trimmed": int(scored != text)}


def test_a_teacher_that_gives_its_own_answers_again_is_perfect():
    "The references were cut to whole sentences when they were made"
    said = ["Bees make honey from nectar. They store it in", "Because they are hungry."]
    rows = [row("1", "Bees make honey from nectar."), row("2", "Because they are hungry.")]
    answers = [{"text": said[0], "finish_reason": "length"}, {"text": said[1], "finish_reason": "stop"}]
    def bleu(cut_off):
        predictions = ev.prediction_rows(rows, {"teacher": [ev.scored_text(a, cut_off) for a in answers]})
        return ev.measure(predictions, ["bleu"], resamples=100)["models"]["teacher"]["metrics"]["bleu"]["value"]
    assert bleu("trim") == pytest.approx(100) and bleu("keep") < 80


# What is handed on

def test_a_prediction_is_a_row_with_every_models_answer():
    rows = [{"id": "1", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "first"},
             {"role": "assistant", "content": "a"}, {"role": "user", "content": "last"}, {"role": "assistant", "content": "right"}]}]
    made = ev.prediction_rows(rows, {"base": ["wrong"], "small": ["right"]})
    assert made == [{"id": "1", "prompt": "last", "references": ["right"], "answers": {"base": "wrong", "small": "right"}}]
    frame = ev.side_by_side_frame(made * 3, 2)
    assert list(frame.columns) == ["prompt", "reference", "base", "small"] and list(frame.index) == ["1", "1"]
    metrics = ev.measure(made, ["exact_match"], known={"base": {"parameters": 7}}, baseline="small", resamples=100)
    assert metrics["version"] == 2 and metrics["models"]["base"]["parameters"] == 7
    assert metrics["models"]["small"]["metrics"]["exact_match"]["value"] == 1
    assert metrics["paired"]["differences"]["base"]["exact_match"]["difference"] == -1


def test_several_references_are_scored_by_the_best():
    rows = [{"id": "1", "prompt": "?", "references": ["two", "2"], "answers": {"m": "2"}}]
    assert ev.measure(rows, ["exact_match"], resamples=100)["models"]["m"]["metrics"]["exact_match"]["value"] == 1
    assert ev.side_by_side_frame(rows).loc["1", "reference"] == "two\n2"


# Asked again, or not

@pytest.fixture
def models(monkeypatch):
    "Models that count what they are asked; `broken` ones fail where they are told to"
    seen = SimpleNamespace(loads=[], asked=[], judged=[], broken={}, nll=1.0)
    def load(spec):
        seen.loads.append(spec.name)
        return SimpleNamespace(model=SimpleNamespace(name=spec.name, num_parameters=lambda: 7))
    def fail(name, what):
        if seen.broken.get(name) == what: raise KeyboardInterrupt
    def generate(loaded, conversations, max_new_tokens, batch_size):
        name = loaded.model.name
        seen.asked.append(name)
        fail(name, "answers")
        answers = [{"text": f"{name}: {c[-1]['content']}", "tokens": 2, "finish_reason": "stop"} for c in conversations]
        yield list(range(len(conversations))), answers
    def judge(loaded, rows, batch_size):
        seen.judged.append(loaded.model.name)
        fail(loaded.model.name, "likelihoods")
        return [(seen.nll, 2, 1)] * len(rows)
    monkeypatch.setattr(ev, "load_model", load)
    monkeypatch.setattr(ev, "identity", lambda spec: spec.model_dump())
    monkeypatch.setattr(ev, "generate_batches", generate)
    monkeypatch.setattr(ev, "completion_nll", judge)
    monkeypatch.setattr(ev, "free", lambda model: None)
    return seen


@pytest.fixture
def ask(models, tmp_path):
    return lambda name, rows=ROWS, **more: ev.predict(name, ModelSpec(name=name), rows, tmp_path, **more)


def test_a_killed_run_asks_only_what_is_missing(models, ask, tmp_path):
    models.broken["b"] = "answers"
    ask("a", nll=True)
    with pytest.raises(KeyboardInterrupt): ask("b", nll=True)
    models.broken.clear()
    assert [ask(m, nll=True)["answers"][1]["text"] for m in "ab"] == ["a: q 2", "b: q 2"]
    assert models.loads == ["a", "b", "b"]
    assert [r["id"] for r in read_json(tmp_path/"predictions"/"a.json")["answers"]] == ["1", "2"]


def test_what_goes_wrong_with_likelihoods_throws_no_answer_away(models, ask):
    models.broken["a"] = "likelihoods"
    with pytest.raises(KeyboardInterrupt): ask("a", nll=True)
    models.broken.clear()
    assert [tuple(x) for x in ask("a", nll=True)["nll"]] == [(1.0, 2, 1)] * 2
    assert models.asked == ["a"] and models.judged == ["a", "a"]


def test_a_perplexity_that_is_asked_for_later_generates_nothing(models, ask):
    assert ask("a")["nll"] is None
    assert len(ask("a", nll=True)["nll"]) == 2
    assert models.asked == ["a"] and models.judged == ["a"] and models.loads == ["a", "a"]
    assert len(ask("a", nll=True)["nll"]) == 2 and models.loads == ["a", "a"]


def test_saved_answers_are_used_only_for_the_same_question(models, ask, monkeypatch):
    ask("a"), ask("a"), ask("a", batch_size=1)
    assert models.asked == ["a"]
    ask("a", ROWS[:1])
    ask("a", ROWS[:1], max_new_tokens=3)
    monkeypatch.setattr(ev, "identity", lambda spec: "other weights under the same name")
    ask("a", ROWS[:1], max_new_tokens=3)
    monkeypatch.setattr(ev, "plan_hardware", lambda: SimpleNamespace(dtype="float64"))
    ask("a", ROWS[:1], max_new_tokens=3)
    assert models.asked == ["a"] * 5


def test_a_corrected_reference_is_judged_again_and_asks_nothing(models, ask):
    ask("a", nll=True)
    ask("a", [row("1", "no"), row("2")], nll=True)
    assert models.asked == ["a"] and models.judged == ["a", "a"]


def test_a_damaged_file_is_made_anew(models, ask, tmp_path):
    ask("a")
    (tmp_path/"predictions"/"a.json").write_text('{"key": ', encoding="utf-8")
    assert ask("a")["answers"][0]["text"] == "a: q 1" and models.asked == ["a", "a"]


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e9])
def test_a_loss_that_is_no_number_names_model_metric_and_row_and_keeps_the_answers(models, ask, loss):
    models.nll = loss
    with pytest.raises(DistillError, match="a: likelihood: test row 1"): ask("a", nll=True)
    models.nll = 1.0
    ask("a", nll=True)
    assert models.asked == ["a"]


def test_an_error_in_scoring_names_the_model():
    rows = ev.prediction_rows(ROWS, {"base": ["yes", "no"], "small": ["yes", "no"]})
    with pytest.raises(DistillError, match="small: perplexity: test row 2"):
        ev.measure(rows, ["perplexity"], {"base": [(1.0, 2)] * 2, "small": [(1.0, 2), (math.nan, 2)]})


def test_after_a_change_in_the_code_that_answers_a_model_is_asked_again(models, ask, monkeypatch, tmp_path):
    "The answers outlive a change of parameters, so the stage's fingerprint cannot watch over them"
    package = tmp_path/"package"
    shutil.copytree(ev.package_dir(), package)
    monkeypatch.setattr(ev, "package_dir", lambda: package)
    ask("a", nll=True), ask("a", nll=True)
    assert models.asked == models.judged == ["a"]
    with open(package/"generate.py", "a", encoding="utf-8") as f: f.write("BEAMS = 4\n")
    ask("a", nll=True)
    assert models.asked == models.judged == ["a", "a"]


# With real models, as small as they can be

@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return str(tiny.make(tmp_path_factory.mktemp("tiny")/"llama3", "llama3"))


def test_a_model_answers_and_is_judged(tiny_model, tmp_path):
    from distill_nb.generate import completion_nll, generate
    from distill_nb.models import load_model
    spec = ModelSpec(name=tiny_model)
    given = ev.predict("m", spec, ROWS, tmp_path, max_new_tokens=4, nll=True)
    loaded = load_model(spec)
    expected = generate(loaded, [r["messages"][:1] for r in ROWS], 4)
    assert [a["text"] for a in given["answers"]] == [a["text"] for a in expected]
    assert {a["finish_reason"] for a in given["answers"]} <= {"stop", "length"} and all(0 < a["tokens"] <= 4 for a in given["answers"])
    assert [tuple(x) for x in given["nll"]] == completion_nll(loaded, ROWS, 32)
    assert given["parameters"] == sum(p.numel() for p in loaded.model.parameters())
    again = ev.predict("m", spec, ROWS, tmp_path, max_new_tokens=4, nll=True)
    assert again == json.loads(json.dumps(given)), "what is saved is not what was given"


def test_likelihoods_halve_their_batch_when_memory_runs_out(tiny_model, tmp_path, monkeypatch):
    import torch
    from distill_nb import generate
    sizes, nll_batch = [], generate.nll_batch
    def crowded(loaded, head, encoded):
        sizes.append(len(encoded))
        if len(encoded) > 1: raise torch.OutOfMemoryError("CUDA out of memory")
        return nll_batch(loaded, head, encoded)
    monkeypatch.setattr(generate, "nll_batch", crowded)
    rows = [row(str(i)) for i in range(4)]
    given = ev.predict("m", ModelSpec(name=tiny_model), rows, tmp_path, max_new_tokens=2, batch_size=4, nll=True)
    assert sizes == [4, 2, 1, 1, 1, 1] and len(given["nll"]) == 4


# What a plan says

@pytest.fixture
def estimate(tiny_model, tmp_path):
    from distill_nb.data import open_rows
    from distill_nb.hardware import plan_hardware
    def estimate(text="q", **more):
        for split in ("train", "test"): write_jsonl(tmp_path/f"{split}.jsonl", [row(f"{split}-{i}", text) for i in range(5)])
        params = check(ev.EvaluateParams, {"models": {"m": tiny_model}, "data": str(tmp_path)} | more, "here")
        with open_rows(params.data) as rows: return params.estimate(plan_hardware("t4"), rows, lambda spec: spec)
    return estimate


def test_a_plan_counts_the_rows_as_long_as_they_are(estimate):
    short, long = estimate("word " * 20), estimate("word " * 2000)
    assert long["peak"] > short["peak"]
    assert estimate()["note"].startswith("5 test rows") and estimate(samples=3)["note"].startswith("3 test rows")


def test_a_plan_holds_the_memory_of_likelihoods(estimate):
    sizes = dict(batch_size=64, max_new_tokens=1)  # short answers: few keys and values, and scoring needs all logits' pieces
    without, within = (estimate("word " * 8, metrics=m, **sizes) for m in (["bleu"], ["bleu", "perplexity"]))
    assert within["peak"] > without["peak"]
    assert estimate("word", metrics=["bleu", "perplexity"], max_new_tokens=4000)["peak"] >= estimate("word", metrics=["bleu"], max_new_tokens=4000)["peak"]


def test_importing_needs_no_heavy_library():
    heavy = ("torch", "transformers", "matplotlib", "sacrebleu", "evaluate", "datasets", "rouge_score", "pandas", "numpy")
    code = f"import sys, distill_nb.evaluate, distill_nb.report; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
