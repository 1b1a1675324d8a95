"""09_metrics and 41_measure.intervals: golden numbers with their source, properties, and how far a number could be off."""
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_nb import metrics as mt
from distill_nb.core import DistillError
from distill_nb.measure import intervals as iv

quick = settings(max_examples=150, deadline=None)  # a busy machine has no say in what is right

SAID = ["The cat sat on the mat today.", "A dog barked at me.", "", "It rains.", "Snow fell all night, quietly."]
MEANT = ["The cat sat on a mat today.", "The dog barked at me loudly.", "Nothing was said.", "It rains.", "All night the snow fell."]
# Another right answer to some of the rows; sacreBLEU takes None where a row has none.
ALSO = ["The cat sat on the mat.", None, "Silence.", "There is rain.", "Snow fell quietly, all night."]
SEVERAL = [[m] + [a] * (a is not None) for m, a in zip(MEANT, ALSO)]


def value(statistic):
    return statistic.value(statistic.sums.sum(0))


# Golden numbers

@pytest.mark.parametrize("kind", ["bleu", "chrf"])
@pytest.mark.parametrize("references, streams", [(MEANT, [MEANT]), (SEVERAL, [MEANT, ALSO])], ids=["one reference", "several"])
def test_bleu_and_chrf_are_sacrebleus(kind, references, streams):
    from sacrebleu.metrics import BLEU, CHRF
    expected = {"bleu": BLEU, "chrf": CHRF}[kind]().corpus_score(SAID, streams).score
    assert value(mt.sacrebleu_statistic(SAID, references, kind)) == expected


def test_resampled_bleu_is_the_corpus_bleu_of_the_rows_drawn():
    import sacrebleu
    statistic = mt.sacrebleu_statistic(SAID, MEANT, "bleu")
    sums = iv.resample(statistic.sums, resamples=3, seed=7)
    rng = np.random.default_rng(7)
    for s in sums:
        drawn = rng.integers(len(SAID), size=len(SAID))
        assert statistic.value(s) == sacrebleu.corpus_bleu([SAID[i] for i in drawn], [[MEANT[i] for i in drawn]]).score


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL"])
def test_rouge_on_ascii_is_rouge_scores_own(kind):
    from rouge_score import rouge_scorer
    scorer = rouge_scorer.RougeScorer([kind])
    expected = [scorer.score(r, p)[kind].fmeasure for p, r in zip(SAID, MEANT)]
    assert mt.rouge_statistic(SAID, MEANT, kind).sums[:, 0].tolist() == expected
    best = [max(scorer.score(r, p)[kind].fmeasure for r in rs) for p, rs in zip(SAID, SEVERAL)]
    assert mt.rouge_statistic(SAID, SEVERAL, kind).sums[:, 0].tolist() == best
    assert best != expected, "the second references change nothing"


def test_rouge_through_evaluate_where_it_is_asked_for(monkeypatch):
    asked = {}
    def compute(predictions, references, rouge_types, use_aggregator, tokenizer):
        asked.update(references=references, rouge_types=rouge_types, use_aggregator=use_aggregator, words=tokenizer("আমি গাই।"))
        return {rouge_types[0]: [0.25, 0.75]}
    monkeypatch.setenv("DISTILL_NB_EVALUATE_HUB", "1")
    monkeypatch.setitem(sys.modules, "evaluate", SimpleNamespace(load=lambda name: SimpleNamespace(compute=compute)))
    statistic = mt.rouge_statistic(["a", "b"], ["a", ["c", "d"]], "rougeL")
    assert value(statistic) == 0.5 and statistic.backend.startswith("evaluate ")
    assert asked == {"references": [["a"], ["c", "d"]], "rouge_types": ["rougeL"], "use_aggregator": False, "words": ["আমি", "গাই"]}


def test_rouge_without_the_hub(monkeypatch, capsys):
    def load(name): raise FileNotFoundError("no such script, or no network")
    monkeypatch.setenv("DISTILL_NB_EVALUATE_HUB", "1")
    monkeypatch.setitem(sys.modules, "evaluate", SimpleNamespace(load=load))
    assert mt.rouge_statistic(["a b"], ["a b"], "rougeL").backend.startswith("rouge_score ")
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
    assert mt.exact_match(prediction, reference) == exact
    assert mt.token_f1(prediction, reference) == pytest.approx(f1)


# As SQuAD's script: the largest score over the ground truths, for each metric on its own.
@pytest.mark.parametrize("prediction, references, exact, f1", [
    ("two", ["2", "two"], 1, 1),
    ("two", ["2"], 0, 0),
    ("the old city", ["city of Dhaka", "old town"], 0, 1 / 2),    # old city | city of dhaka: 2/5, old town: 2/4
])
def test_the_best_of_several_references_counts(prediction, references, exact, f1):
    assert value(mt.squad_statistic([prediction], [references], "exact_match")) == exact
    assert value(mt.squad_statistic([prediction], [references], "f1")) == pytest.approx(f1)


# What a solution comes to: (text, another that means the same) and pairs that must not.
SAME = [("#### 1,000", "The answer is 1000."), ("Answer: $5", "5.00"), ("Answer: 50%", "#### 50"), ("Answer: 3/4", "so it is .75"),
        ("Answer: 1 1/2 hours", "1.5"), ("**Final answer:** ১২ টি", "Answer: 12"), ("#### -4", "the answer is \u22124"), ("Answer: ১/২", "0.5"),
        ("\\boxed{7}", "3 + 4 = 7"), ("Answer: 6 + 6 = 12", "#### 12"), ("Answer: The Blue Boat", "the answer is the blue boat."),
        ("Answer: 9:40", "Answer: 9:40."), ("first 4, and then 9", "Answer: 9"), ("Answer: 3\nNo, wait.\nAnswer: 4", "#### 4"),
        ("১,০০,০০০ টাকা", "100000"), ("-$5", "-5"), ("Answer: -1 1/2", "-1.5"), ("Dhaka.", "dhaka")]
DIFFERENT = [("Answer: 5", "-5"), ("#### 10", "Answer: 100"), ("Answer: 9:40", "Answer: 940"), ("Answer: 1.5", "15"), ("", "Answer: 3"),
             ("Answer: 3, not 4", "#### 4"), ("Answer: 12 of 15", "12"), ("Answer: 1/0", "1"), ("5-3", "-3"), ("Answer: 50%", "0.5")]


@pytest.mark.parametrize("a, b", SAME)
def test_answers_that_mean_the_same(a, b):
    assert value(mt.final_answer_statistic([a, b], [b, a])) == 1


@pytest.mark.parametrize("a, b", DIFFERENT)
def test_answers_that_do_not(a, b):
    assert value(mt.final_answer_statistic([a], [b])) == 0


@quick
@given(st.integers(-10**9, 10**9), st.integers(1, 999))
def test_a_number_is_the_same_however_it_is_written(whole, thousandths):
    sign, number = ("-" if whole < 0 else ""), abs(whole) + thousandths / 1000
    written = [f"{whole + (-1 if whole < 0 else 1) * thousandths / 1000:,.3f}", f"{sign}{abs(whole)} {thousandths}/1000",
               f"{sign}{abs(whole) * 1000 + thousandths}/1000 km", f"৳{sign}{number:.3f}".translate({48 + i: 0x9e6 + i for i in range(10)})]
    if whole: assert len({mt.same_answer(w) for w in written}) == 1, written


def test_the_best_of_several_final_answers_counts():
    assert value(mt.final_answer_statistic(["Answer: 2"], [["two", "#### 2"]])) == 1


def test_perplexity_of_a_uniform_distribution_is_the_number_of_choices():
    rows = [(n * math.log(49152), n) for n in (1, 7, 30)]
    assert value(mt.likelihood_statistic(rows)) == pytest.approx(49152)


def test_loss_and_token_accuracy_are_means_over_tokens_and_not_over_rows():
    rows = [(2.0, 1, 1), (9.0, 9, 3)]
    assert value(mt.likelihood_statistic(rows, "loss")) == pytest.approx(11 / 10)
    assert value(mt.likelihood_statistic(rows, "token_accuracy")) == pytest.approx(4 / 10)


def test_perplexity_is_weighted_by_tokens():
    rows = [(2.0, 1), (9.0, 9)]
    assert value(mt.likelihood_statistic(rows)) == pytest.approx(math.exp(11 / 10))


# Intervals

def test_the_seed_decides_and_nothing_else():
    s = mt.mean_statistic(np.random.default_rng(0).random(50), "x")
    assert iv.bootstrap(s, seed=1) == iv.bootstrap(s, seed=1) != iv.bootstrap(s, seed=2)


def test_interval_of_a_mean_is_near_the_textbooks():
    scores = np.random.default_rng(0).random(400)
    got, half = iv.bootstrap(mt.mean_statistic(scores, "x"), resamples=2000), 1.96 * scores.std() / math.sqrt(400)
    assert got["low"] == pytest.approx(scores.mean() - half, abs=0.1 * half)
    assert got["high"] == pytest.approx(scores.mean() + half, abs=0.1 * half)


def test_coverage():
    rng = np.random.default_rng(3)
    made = [iv.bootstrap(mt.mean_statistic(rng.random(60), "x"), resamples=200) for _ in range(150)]
    assert 0.88 <= np.mean([b["low"] <= 0.5 <= b["high"] for b in made]) <= 0.99


@pytest.mark.parametrize("scores", [[0.1], [0.1] * 7, [0.0], [1.0] * 3])
def test_rows_that_do_not_vary_have_an_interval_without_width(scores):
    got = iv.bootstrap(mt.mean_statistic(scores, "x"))
    assert got["low"] == got["value"] == got["high"] == pytest.approx(scores[0])


# Newcombe 1998, Two-sided confidence intervals for the single proportion, table I, method 3.
@pytest.mark.parametrize("right, rows, low, high", [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_a_share_of_right_answers_has_wilsons_interval(right, rows, low, high):
    said = ["Answer: 5"] * right + ["no idea"] * (rows - right)
    for metric in ("final_answer", "exact_match"):
        got = iv.score(said, ["Answer: 5"] * rows, [metric])[metric]
        assert (got["low"], got["high"], got["n"]) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5), rows)


def test_one_row_in_every_metric():
    metrics = list(mt.Metric.__args__)
    made = iv.compare({"a": mt.statistics(["x y"], ["x z"], metrics, [(2.0, 2, 1)]), "b": mt.statistics([""], ["x z"], metrics, [(4.0, 2, 0)])})
    for of in made["models"].values():
        for m in of["metrics"].values():
            assert m["low"] <= m["value"] <= m["high"] and all(math.isfinite(m[k]) for k in ("value", "low", "high"))
    assert all(d["p"] == 1 for d in made["paired"]["differences"]["b"].values())
    assert all(made["models"]["b"]["metrics"][m]["value"] == 0 for m in metrics if m not in ("loss", "perplexity"))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_the_value_is_inside_its_interval(scores, seed):
    got = iv.bootstrap(mt.mean_statistic(scores, "x"), resamples=100, seed=seed)
    assert got["low"] <= got["value"] <= got["high"] and got["n"] == len(scores)


WORD = st.text(st.characters(categories=["L", "M", "N"]), min_size=1, max_size=8)


@given(st.lists(WORD, min_size=4, max_size=8))
@settings(max_examples=60, deadline=None)
def test_an_answer_equal_to_one_of_its_references_is_perfect_in_any_script(some):
    text = " ".join(["w1", "w2", *some])
    for references in (text, ["something else", text]):
        made = iv.score([text], [references], ["rouge1", "rouge2", "rougeL", "exact_match", "f1"], resamples=100)
        assert {m["value"] for m in made.values()} == {1.0}


@given(WORD)
@settings(deadline=None)
def test_a_word_stays_whole(word):
    assert len(mt.words(word)) <= 1


# Comparison

def test_paired_bleu_finds_what_sacrebleus_own_test_finds():
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest
    rng = np.random.default_rng(0)
    references = [" ".join(f"w{i}" for i in rng.integers(30, size=12)) for _ in range(60)]
    def spoil(share): return [" ".join(w if rng.random() > share else "x" for w in r.split()) for r in references]
    weak, close, strong = spoil(0.3), spoil(0.3), spoil(0.15)
    systems = [("weak", weak), ("close", close), ("strong", strong)]
    _, theirs = PairedTest(systems, {"BLEU": BLEU()}, [references], test_type="bs", n_samples=1000)()
    base = mt.sacrebleu_statistic(weak, references, "bleu")
    for i, texts in ((1, close), (2, strong)):
        ours = iv.paired(mt.sacrebleu_statistic(texts, references, "bleu"), base)
        assert ours["difference"] == pytest.approx(theirs["BLEU"][i].score - theirs["BLEU"][0].score)
        assert (ours["p"] < 0.05) == (theirs["BLEU"][i].p_value < 0.05)


def test_p_is_calibrated_where_nothing_differs():
    rng = np.random.default_rng(5)
    def luck(): return mt.mean_statistic(rng.random(40), "x")
    ps = np.array([iv.paired(luck(), luck(), resamples=200)["p"] for _ in range(150)])
    assert np.mean(ps < 0.05) < 0.12 and np.mean(ps < 0.5) > 0.3


def test_few_rows_cannot_prove_much():
    for n, least in ((1, 1.0), (4, 0.125), (6, 2 / 64)):
        assert iv.paired(mt.mean_statistic([1.0] * n, "x"), mt.mean_statistic([0.0] * n, "x"))["p"] == least


def test_perplexities_are_compared_on_the_log_scale():
    rng = np.random.default_rng(0)
    bad, good = ([(float(x), 10) for x in rng.normal(mean, 12, 60)] for mean in (90, 20))
    assert iv.paired(mt.likelihood_statistic(good), mt.likelihood_statistic(bad))["p"] < 0.01


def test_what_a_comparison_writes_is_version_2():
    models = {m: mt.statistics(texts, ["x z"] * 2, ["f1"]) for m, texts in {"base": ["x", "x"], "small": ["x z", ""]}.items()}
    made = iv.compare(models, {"base": {"parameters": 7}}, resamples=100)
    assert set(made) == {"version", "models", "paired"} and made["version"] == 2
    assert made["models"]["base"]["parameters"] == 7 and set(made["models"]) == {"base", "small"}
    assert set(made["models"]["small"]["metrics"]["f1"]) == {"value", "low", "high", "n", "backend"}
    assert set(made["paired"]["differences"]["small"]["f1"]) == {"difference", "low", "high", "p", "n"}
    assert made["paired"]["baseline"] == "base" and made["paired"]["resamples"] == 100


# Mistakes

@pytest.mark.parametrize("call, message", [
    (lambda: iv.score(["a"], [" "], ["f1"]), "row 0: the reference is empty"),
    (lambda: iv.score(["a"], [["a", ""]], ["f1"]), "row 0: the reference is empty"),
    (lambda: iv.score(["a"], [[]], ["f1"]), "row 0: the reference is empty"),
    (lambda: iv.score([], [], ["f1"]), "no rows"),
    (lambda: iv.score(["a"], ["a", "b"], ["f1"]), "1 predictions for 2 references"),
    (lambda: iv.score(["a"], ["a"], ["rougel"]), "did you mean 'rougeL'"),
    (lambda: iv.score(["a"], ["a"], ["perplexity"]), "needs `nll`"),
    (lambda: iv.score(["a"], ["a"], ["perplexity"], [(math.nan, 3)]), "perplexity: test row 0"),
    (lambda: iv.score(["a"], ["a"], ["perplexity"], [(0.0, 0)]), "perplexity: test row 0"),
    (lambda: iv.score(["a"], ["a"], ["perplexity"], [(1e6, 3)]), "perplexity: test row 0"),  # exp of it would be infinite
    (lambda: mt.statistics(["a"], ["a"], ["perplexity"], [(math.inf, 3)], ["bees-1"]), "perplexity: test row bees-1"),
    (lambda: iv.paired(mt.mean_statistic([1], "x"), mt.mean_statistic([1, 2], "x")), "cannot be paired"),
])
def test_errors_say_what_and_where(call, message):
    with pytest.raises(DistillError, match=message): call()
