"""45_evaluate: golden numbers with their source, properties, and what happens when a run is killed."""
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_nb import evaluate as ev
from distill_nb.core import DistillError, read_jsonl
from distill_nb.stage import ModelSpec

SAID = ["The cat sat on the mat today.", "A dog barked at me.", "", "It rains.", "Snow fell all night, quietly."]
MEANT = ["The cat sat on a mat today.", "The dog barked at me loudly.", "Nothing was said.", "It rains.", "All night the snow fell."]


def value(statistic):
    return statistic.value(statistic.sums.sum(0))


# Golden numbers

def test_bleu_and_chrf_are_sacrebleus():
    import sacrebleu
    assert value(ev.sacrebleu_statistic(SAID, MEANT, "bleu")) == sacrebleu.corpus_bleu(SAID, [MEANT]).score
    assert value(ev.sacrebleu_statistic(SAID, MEANT, "chrf")) == sacrebleu.corpus_chrf(SAID, [MEANT]).score


def test_resampled_bleu_is_the_corpus_bleu_of_the_rows_drawn():
    import sacrebleu
    statistic = ev.sacrebleu_statistic(SAID, MEANT, "bleu")
    sums = ev.resample(statistic.sums, resamples=3, seed=7)
    rng = np.random.default_rng(7)
    for s in sums:
        drawn = rng.integers(len(SAID), size=len(SAID))
        assert statistic.value(s) == sacrebleu.corpus_bleu([SAID[i] for i in drawn], [[MEANT[i] for i in drawn]]).score


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL"])
def test_rouge_on_ascii_is_rouge_scores_own(kind):
    from rouge_score import rouge_scorer
    scorer = rouge_scorer.RougeScorer([kind])
    expected = [scorer.score(r, p)[kind].fmeasure for p, r in zip(SAID, MEANT)]
    assert ev.rouge_statistic(SAID, MEANT, kind).sums[:, 0].tolist() == expected


def test_rouge_through_evaluate_where_it_is_asked_for(monkeypatch):
    asked = {}
    def compute(predictions, references, rouge_types, use_aggregator, tokenizer):
        asked.update(rouge_types=rouge_types, use_aggregator=use_aggregator, words=tokenizer("আমি গাই।"))
        return {rouge_types[0]: [0.25, 0.75]}
    monkeypatch.setenv("DISTILL_NB_EVALUATE_HUB", "1")
    monkeypatch.setitem(sys.modules, "evaluate", SimpleNamespace(load=lambda name: SimpleNamespace(compute=compute)))
    statistic = ev.rouge_statistic(["a", "b"], ["a", "c"], "rougeL")
    assert value(statistic) == 0.5 and statistic.backend.startswith("evaluate ")
    assert asked == {"rouge_types": ["rougeL"], "use_aggregator": False, "words": ["আমি", "গাই"]}


def test_rouge_without_the_hub(monkeypatch, capsys):
    def load(name): raise FileNotFoundError("no such script, or no network")
    monkeypatch.setenv("DISTILL_NB_EVALUATE_HUB", "1")
    monkeypatch.setitem(sys.modules, "evaluate", SimpleNamespace(load=load))
    assert ev.rouge_statistic(["a b"], ["a b"], "rougeL").backend.startswith("rouge_score ")
    assert "computed directly" in capsys.readouterr().out


# Worked by hand from SQuAD's rules: lower case, no punctuation, no articles; F1 = 2 * same / (words + words).
@pytest.mark.parametrize("prediction, reference, exact, f1", [
    ("The Danube.", "danube", 1, 1),
    ("in the old city of Dhaka", "Dhaka city", 0, 4 / 7),       # in old city of dhaka | dhaka city
    ("Normans Normans", "Normans", 0, 2 / 3),                     # a word counts as often as it is there
    ("10th century", "11th century", 0, 1 / 2),
    ("", "Dhaka", 0, 0),
    ("", "A", 0, 0),                                              # an article that is the whole answer stays
    ("a", "A", 1, 1),
    ("ঢাকা।", "ঢাকা", 1, 1),                                      # the danda is punctuation
    ("twenty-one", "twentyone", 1, 1),                            # as SQuAD does it: punctuation goes, no space comes
])
def test_squad(prediction, reference, exact, f1):
    assert ev.exact_match(prediction, reference) == exact
    assert ev.token_f1(prediction, reference) == pytest.approx(f1)


def test_perplexity_of_a_uniform_distribution_is_the_number_of_choices():
    rows = [(n * math.log(49152), n) for n in (1, 7, 30)]
    assert value(ev.perplexity_statistic(rows)) == pytest.approx(49152)


def test_perplexity_is_weighted_by_tokens():
    rows = [(2.0, 1), (9.0, 9)]
    assert value(ev.perplexity_statistic(rows)) == pytest.approx(math.exp(11 / 10))


# Intervals

def test_the_seed_decides_and_nothing_else():
    s = ev.mean_statistic(np.random.default_rng(0).random(50), "x")
    assert ev.bootstrap(s, seed=1) == ev.bootstrap(s, seed=1) != ev.bootstrap(s, seed=2)


def test_interval_of_a_mean_is_near_the_textbooks():
    scores = np.random.default_rng(0).random(400)
    got, half = ev.bootstrap(ev.mean_statistic(scores, "x"), resamples=2000), 1.96 * scores.std() / math.sqrt(400)
    assert got["low"] == pytest.approx(scores.mean() - half, abs=0.1 * half)
    assert got["high"] == pytest.approx(scores.mean() + half, abs=0.1 * half)


def test_coverage():
    rng = np.random.default_rng(3)
    held = [(b := ev.bootstrap(ev.mean_statistic(rng.random(60), "x"), resamples=200))["low"] <= 0.5 <= b["high"] for _ in range(150)]
    assert 0.88 <= np.mean(held) <= 0.99


@pytest.mark.parametrize("scores", [[0.1], [0.1] * 7, [0.0], [1.0] * 3])
def test_rows_that_do_not_vary_have_an_interval_without_width(scores):
    got = ev.bootstrap(ev.mean_statistic(scores, "x"))
    assert got["low"] == got["value"] == got["high"] == pytest.approx(scores[0])


def test_one_row_in_every_metric():
    metrics = list(ev.Metric.__args__)
    made = ev.compare({"a": ev.statistics(["x y"], ["x z"], metrics, [(2.0, 2)]), "b": ev.statistics([""], ["x z"], metrics, [(4.0, 2)])})
    for of in (made["a"], made["b"]):
        for m in of.values(): assert m["low"] <= m["value"] <= m["high"] and all(math.isfinite(m[k]) for k in ("value", "low", "high"))
    assert all(d["p"] == 1 for d in made["paired"]["differences"]["b"].values())
    assert all(made["b"][m]["value"] == 0 for m in metrics if m != "perplexity")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_the_value_is_inside_its_interval(scores, seed):
    got = ev.bootstrap(ev.mean_statistic(scores, "x"), resamples=100, seed=seed)
    assert got["low"] <= got["value"] <= got["high"] and got["n"] == len(scores)


WORD = st.text(st.characters(categories=["L", "M", "N"]), min_size=1, max_size=8)


@given(st.lists(WORD, min_size=4, max_size=8))
@settings(max_examples=60, deadline=None)
def test_an_answer_equal_to_the_reference_is_perfect_in_any_script(some):
    text = " ".join(["w1", "w2", *some])
    made = ev.score([text], [text], ["rouge1", "rouge2", "rougeL", "exact_match", "f1"], resamples=100)
    assert {m["value"] for m in made.values()} == {1.0}


@given(WORD)
@settings(deadline=None)
def test_a_word_stays_whole(word):
    assert len(ev.words(word)) <= 1


# Comparison

def test_paired_bleu_finds_what_sacrebleus_own_test_finds():
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest
    rng = np.random.default_rng(0)
    references = [" ".join(f"w{i}" for i in rng.integers(30, size=12)) for _ in range(60)]
    spoil = lambda share: [" ".join(w if rng.random() > share else "x" for w in r.split()) for r in references]
    weak, close, strong = spoil(0.3), spoil(0.3), spoil(0.15)
    _, theirs = PairedTest([("weak", weak), ("close", close), ("strong", strong)], {"BLEU": BLEU()}, [references], test_type="bs", n_samples=1000)()
    base = ev.sacrebleu_statistic(weak, references, "bleu")
    for i, texts in ((1, close), (2, strong)):
        ours = ev.paired(ev.sacrebleu_statistic(texts, references, "bleu"), base)
        assert ours["difference"] == pytest.approx(theirs["BLEU"][i].score - theirs["BLEU"][0].score)
        assert (ours["p"] < 0.05) == (theirs["BLEU"][i].p_value < 0.05)


def test_p_is_calibrated_where_nothing_differs():
    rng = np.random.default_rng(5)
    ps = [ev.paired(ev.mean_statistic(rng.random(40), "x"), ev.mean_statistic(rng.random(40), "x"), resamples=200)["p"] for _ in range(150)]
    assert np.mean(np.array(ps) < 0.05) < 0.12 and np.mean(np.array(ps) < 0.5) > 0.3


def test_few_rows_cannot_prove_much():
    for n, least in ((1, 1.0), (4, 0.125), (6, 2 / 64)):
        assert ev.paired(ev.mean_statistic([1.0] * n, "x"), ev.mean_statistic([0.0] * n, "x"))["p"] == least


def test_perplexities_are_compared_on_the_log_scale():
    rng = np.random.default_rng(0)
    bad, good = ([(float(x), 10) for x in rng.normal(mean, 12, 60)] for mean in (90, 20))
    assert ev.paired(ev.perplexity_statistic(good), ev.perplexity_statistic(bad))["p"] < 0.01


# Mistakes

@pytest.mark.parametrize("call, message", [
    (lambda: ev.score(["a"], [" "], ["f1"]), "row 0: the reference is empty"),
    (lambda: ev.score([], [], ["f1"]), "no rows"),
    (lambda: ev.score(["a"], ["a", "b"], ["f1"]), "1 predictions for 2 references"),
    (lambda: ev.score(["a"], ["a"], ["rougel"]), "did you mean 'rougeL'"),
    (lambda: ev.score(["a"], ["a"], ["perplexity"]), "needs `nll`"),
    (lambda: ev.score(["a"], ["a"], ["perplexity"], [(math.nan, 3)]), "test row 0"),
    (lambda: ev.score(["a"], ["a"], ["perplexity"], [(0.0, 0)]), "test row 0"),
    (lambda: ev.paired(ev.mean_statistic([1], "x"), ev.mean_statistic([1, 2], "x")), "cannot be paired"),
])
def test_errors_say_what_and_where(call, message):
    with pytest.raises(DistillError, match=message): call()


def row(key, answer="yes"):
    return {"id": key, "messages": [{"role": "user", "content": f"q {key}"}, {"role": "assistant", "content": answer}], "meta": {}}


@pytest.mark.parametrize("rows, message", [([row("r1"), row("r2", "  ")], "'r2' has an empty reference"), ([row("r1"), row("r1", "no")], "'r1' is there more than once")])
def test_errors_name_the_row(monkeypatch, rows, message):
    monkeypatch.setattr(ev, "load_split", lambda data, split: rows)
    with pytest.raises(DistillError, match=message): ev.load_test_rows("mine.jsonl")


# Resuming

@pytest.fixture
def counted(monkeypatch):
    "Models that count how often they are loaded; the second one fails until it is mended"
    seen = {"loads": [], "broken": True}
    def load(spec):
        seen["loads"].append(spec.name)
        return SimpleNamespace(model=spec.name)
    def generate(loaded, conversations, max_new_tokens, batch_size):
        if loaded.model == "b" and seen["broken"]: raise KeyboardInterrupt
        yield list(range(len(conversations))), [{"text": f"{loaded.model}: {c[-1]['content']}", "tokens": 2, "finish_reason": "stop"} for c in conversations]
    monkeypatch.setattr(ev, "load_model", load)
    monkeypatch.setattr(ev, "generate_batches", generate)
    monkeypatch.setattr(ev, "completion_nll", lambda loaded, rows, batch_size: [(1.0, 2)] * len(rows))
    monkeypatch.setattr(ev, "count_parameters", lambda model: 7)
    monkeypatch.setattr(ev, "free", lambda model: None)
    return seen


def test_a_killed_run_asks_only_what_is_missing(counted, tmp_path):
    rows = [row("1"), row("2")]
    ask = lambda name, **more: ev.predict(name, ModelSpec(name=name), rows, tmp_path, **more)
    ask("a", nll=True)
    with pytest.raises(KeyboardInterrupt): ask("b", nll=True)
    counted["broken"] = False
    assert [ask(m, nll=True)["answers"][1]["prediction"] for m in "ab"] == ["a: q 2", "b: q 2"]
    assert counted["loads"] == ["a", "b", "b"]
    assert [r["id"] for r in read_jsonl(tmp_path/"a.jsonl")] == ["1", "2"]


def test_saved_answers_are_used_only_for_the_same_question(counted, tmp_path):
    folder = tmp_path/"model"
    folder.mkdir()
    (folder/"model.safetensors").write_bytes(b"weights")
    ask = lambda rows, **more: ev.predict("m", ModelSpec(name=str(folder)), rows, tmp_path/"predictions", **more)
    ask([row("1")]), ask([row("1")])
    assert len(counted["loads"]) == 1
    for change in (lambda: ask([row("1"), row("2")]), lambda: ask([row("1"), row("2")], max_new_tokens=3), lambda: ask([row("1"), row("2")], max_new_tokens=3, nll=True),
                   lambda: ask([row("1"), row("2")], max_new_tokens=3, nll=True, quantize="4bit")):
        before = len(counted["loads"])
        change()
        assert len(counted["loads"]) == before + 1
    (folder/"model.safetensors").write_bytes(b"other weights")
    ask([row("1"), row("2")], max_new_tokens=3, nll=True, quantize="4bit")
    assert len(counted["loads"]) == 6


def test_importing_needs_no_heavy_library():
    code = ("import sys, distill_nb.evaluate, distill_nb.report;"
            "print([m for m in ('torch', 'transformers', 'matplotlib', 'sacrebleu', 'evaluate', 'datasets', 'rouge_score', 'pandas') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
