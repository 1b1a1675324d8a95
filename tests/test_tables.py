"""08_tables: a number has the digits that mean something, a table has one shape, a cell is only text."""
import pytest

from distill_nb import tables as tb
from distill_nb.core import DistillError, write_json

SCORE = {"value": 0.312, "low": 0.28, "high": 0.35, "n": 48, "backend": "rouge_score 0.1.2"}
METRICS = {"version": 2, "models": {"base": {"parameters": 134_515_008, "cut_off": 5, "trimmed": 3, "metrics": {"rougeL": SCORE}},
                                    "small": {"metrics": {}}},
           "paired": {"baseline": "base", "differences": {"small": {"rougeL": {"difference": 0.0, "low": -0.03, "high": 0.004, "p": 0.2}}}}}


@pytest.mark.parametrize("value, metric, text", [
    (0.31249, "rougeL", "0.312"),
    (31.2345, "bleu", "31.23"),
    (2.5201, "perplexity", "2.52"),
    (17564.9187, "perplexity", "17565"),
    (67_688_179.3, "perplexity", "6.77e+07"),
])
def test_a_number_has_the_digits_that_mean_something(value, metric, text):
    assert tb.number_text(value, metric) == text


@pytest.mark.parametrize("value, text", [
    (134_515_008, "134.5 million"), (1_100_048_384, "1.1 billion"), (9_999, "9,999")])
def test_counts(value, text):
    assert tb.count_text(value) == text


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (59, "59 s"), (60, "1 min 0 s"), (185, "3 min 5 s"), (5430, "1 h 30 min")])
def test_times(seconds, text):
    assert tb.time_text(seconds) == text


@pytest.mark.parametrize("value, text", [
    (True, "yes"), (None, "unknown"), (1480, "1,480"), (1.23456e-5, "1.235e-05"), ({}, "none"), ({"a": [1, 2.0]}, "a 1, 2"), ("x", "x")])
def test_a_small_value_is_read_aloud(value, text):
    assert tb.plain(value) == text


def test_a_difference_has_a_sign_and_a_value_has_none():
    assert tb.interval_text({"difference": -0.012, "low": -0.03, "high": 0.004}, "f1") == "-0.012 [-0.030, +0.004]"
    assert tb.interval_text(SCORE, "rougeL") == "0.312 [0.280, 0.350]"


def test_every_column_and_row_is_there():
    header, rows = tb.table_cells(METRICS)
    assert header == ["model", "parameters", "rougeL (0 to 1)"]
    assert rows == [["base", "134.5 million", "0.312 [0.280, 0.350]"], ["small", "unknown", "none"]]
    frame = tb.metrics_frame(METRICS)
    assert list(frame.index) == ["base", "small"] and frame.loc["base"].tolist() == rows[0][1:]
    bare = {"version": 2, "models": {"mine": {"metrics": {"rougeL": SCORE}}}}
    assert tb.table_cells(bare)[0] == ["model", "rougeL (0 to 1)"] and not tb.paired_cells(bare)[1]
    assert "48 test rows" in tb.render_table(bare) and "Difference" not in tb.render_table(bare)


def test_the_notes_say_how_many_answers_were_cut():
    note, = [n for n in tb.table_notes(METRICS) if "limit of tokens" in n]
    assert "base 5 (3 cut back" in note and "small" not in note


def test_nothing_measured_is_still_a_table():
    assert tb.render_table({"version": 2, "models": {"mine": {"metrics": {}}}, "paired": {}}).startswith("model")


@pytest.mark.parametrize("metrics, message", [
    ({"base": {"rougeL": SCORE}, "paired": {}}, "has version 1.*evaluate stage again"),
    ({"version": 3, "models": {}}, "has version 3"),
    ([], "has version None"),
    ({"version": 2}, "no `models`"),
])
def test_metrics_of_another_version_are_refused(tmp_path, metrics, message):
    write_json(tmp_path/"metrics.json", metrics)
    with pytest.raises(DistillError, match=f"metrics.json: .*{message}"): tb.read_metrics(tmp_path/"metrics.json")


def test_metrics_of_this_version_are_read(tmp_path):
    write_json(tmp_path/"metrics.json", METRICS)
    assert tb.read_metrics(tmp_path/"metrics.json") == METRICS


def test_a_cell_is_only_text():
    table = tb.md_table(["a|b", "c"], [["<b>x</b>\n# y", "[l](http://evil.example) `z` ![i](j)"]])
    header, rule, row = table.split("\n")
    assert row == r"| &lt;b&gt;x&lt;/b&gt; # y | \[l\](http://evil.example) \`z\` \!\[i\](j) |"
    assert header == r"| a\|b | c |" and rule == "|---|---|"


def test_a_block_cannot_be_left():
    assert tb.md_block("a\n````\nb").split("\n") == ["`````text", "a", "````", "b", "`````"]
