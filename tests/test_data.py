"""Rows: every way in, the splits that they get, and what is said of rows that cannot be used."""
import csv
import gzip
import io
import json
import shutil
import sqlite3
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from distill_nb import annotate, core, data
from distill_nb.core import DistillError, write_jsonl
from distill_nb.data import SPLITS, open_rows
from distill_nb.stage import DataSpec

from conftest import environment, write_rows

quick = settings(max_examples=60, deadline=None, derandomize=True)
OWN = [{"frage": f"Warum {i}?", "antwort": f"Weil {i}.", "thema": f"t{i % 7}"} for i in range(60)] + \
      [{"frage": " ", "antwort": "x", "thema": "t1"}, {"frage": "Warum 3?", "antwort": "Weil 3.", "thema": "t3"}]
LABELLED = [{"text": f"text {i}", "label": i % 3, "label_text": "abc"[i % 3]} for i in range(20)]
FRAGE = {"prompt": "frage", "response": "antwort"}
GOLDEN = {  # what is read, how it is split, for which task: sizes of train, validation and test; dropped; digest of all rows in order
    "the quickstart": (dict(path="quickstart", group="topic", samples=256, validation=24, test=40, seed=42), "chat", (192, 24, 40), {}, "98af290340a992c6"),
    "the quickstart's smoke run": (dict(path="quickstart", group="topic", samples=48, validation=8, test=8, seed=42), "chat", (32, 8, 8), {}, "832c882b9b8a795b"),
    "no group": (dict(path="quickstart"), "chat", (256, 32, 32), {}, "7542b56df3ffdc75"),
    "rows with answers": (dict(path="sample", validation=5, test=0.25, seed=7), "chat", (25, 5, 10), {}, "16dda842773479ca"),
    "columns by name": (dict(path="own.jsonl", columns=FRAGE), "chat", (48, 6, 6), {"blank prompt": 1, "duplicate": 1}, "d3c9d757ca001722"),
    "columns and groups": (dict(path="own.jsonl", columns=FRAGE, group="thema", test=0.2, validation=0.1, seed=3), "chat", (35, 8, 17),
                           {"blank prompt": 1, "duplicate": 1}, "74078b1da0655ddf"),
    "labels": (dict(path="labelled.jsonl"), "classify", (16, 2, 2), {}, "19de4e48b1de45cc"),
    "labels that are not looked at": (dict(path="labelled.jsonl"), "chat", (16, 2, 2), {}, "ff1ea91d82448f24"),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def splits_of(source, task="chat"):
    with open_rows(source, task) as rows: return {s: list(rows.rows(s)) for s in SPLITS}


@pytest.mark.parametrize("case", GOLDEN)
def test_splits_are_those_of_the_first_release(case, here):
    "Recorded before rows were opened in one place; a run that was begun then goes on now"
    source, task, sizes, dropped, digest = GOLDEN[case]
    write_rows(here/"own.jsonl", OWN)
    write_rows(here/"labelled.jsonl", LABELLED)
    with open_rows(source, task) as rows:
        assert tuple(rows.counts.values()) == sizes and rows.dropped == dropped
        assert core.digest({s: list(rows.rows(s)) for s in SPLITS})[:16] == digest


# Properties of a split

ids = st.lists(st.text("abcdefgh", min_size=1, max_size=6), min_size=1, max_size=40, unique=True)
shares = st.integers(0, 8) | st.floats(0, 0.9)
specs = st.fixed_dictionaries({"samples": st.none() | st.integers(3, 50), "validation": shares, "test": shares, "seed": st.integers(0, 9),
                               "group": st.sampled_from([None, "topic"])})


@st.composite
def own_rows(draw, questions=st.integers(0, 10**6)):
    "Rows with ids and topics; the fewer questions there are, the more often they are repeated"
    names = draw(ids)
    return [{"id": i, "prompt": spelt(draw(questions), draw(st.integers(0, 2))), "topic": draw(st.integers(0, 6))} for i in names]


def spelt(number, how): return [f"What is {number}?", f"what is  {number}?", f" What\nis {number}? "][how]


def outcome(rows, spec):
    try: return splits_of(DataSpec(rows=rows, **spec))
    except DistillError as e: return str(e)


@quick
@given(own_rows() | own_rows(st.integers(0, 5)), specs, st.randoms(use_true_random=False), st.booleans())
def test_the_order_of_rows_does_not_change_the_split(rows, spec, rng, repeats):
    shuffled = rows[:]
    rng.shuffle(shuffled)
    assert outcome(rows, spec | {"repeats": repeats}) == outcome(shuffled, spec | {"repeats": repeats})


@quick
@given(own_rows() | own_rows(st.integers(0, 5)), specs)
def test_a_split_is_a_partition_that_tears_no_group_and_no_question(rows, spec):
    splits = outcome(rows, spec)
    if isinstance(splits, str):
        assert "none to train on" in splits
        return
    found = [r["id"] for part in splits.values() for r in part]
    assert len(found) == len(set(found)) == min(len(rows), spec["samples"] or len(rows))
    for what in [lambda r: data.question_key(r["messages"])] + [lambda r: r["meta"]["topic"]] * bool(spec["group"]):
        one, two, three = [{what(r) for r in part} for part in splits.values()]
        assert not (one & two or one & three or two & three)


@quick
@given(ids, specs)
def test_a_split_without_groups_and_repeats_has_the_sizes_that_were_asked_for(names, spec):
    splits = outcome([{"id": i, "prompt": i, "topic": 0} for i in names], spec | {"group": None})
    if isinstance(splits, str): return
    total = sum(map(len, splits.values()))
    size = lambda part: int(part) if part >= 1 else round(part * total)
    assert len(splits["test"]) == size(spec["test"]) and len(splits["validation"]) == size(spec["validation"])


@quick
@given(own_rows(), st.integers(0, 9))
def test_a_row_that_is_added_moves_no_other(rows, seed):
    "The order is a hash of each row, so rows that stay keep their order"
    order = lambda rows: [r["id"] for r in sorted(rows, key=lambda r: data.hash_rank(r, None, seed))]
    assert [i for i in order(rows) if i != rows[-1]["id"]] == order(rows[:-1])


# Ways in

CHAT = [{"id": f"r{i}", "prompt": f"What is {i}? ভাত \u2028 \"quoted\",\nand so on", "response": f"It is {i}.", "topic": "ab"[i % 2]} for i in range(12)]


def as_text(rows, kind):
    if kind == ".jsonl": return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    if kind == ".json": return json.dumps(rows)
    out = io.StringIO()
    table = csv.DictWriter(out, rows[0], delimiter="\t" if kind == ".tsv" else ",")
    table.writeheader()
    table.writerows(rows)
    return out.getvalue()


def write_kind(folder, name, rows=CHAT):
    "A file of the kind that its name says"
    kind, file = data.kind_of(name), folder/name
    if kind == ".parquet": pq.write_table(pa.Table.from_pylist(rows), file)
    else: file.write_bytes(gzip.compress(as_text(rows, kind).encode()) if name.endswith(".gz") else as_text(rows, kind).encode())
    return file


FILES = ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.parquet", "rows.jsonl.gz", "rows.json.gz", "rows.csv.gz", "rows.tsv.gz", "ROWS.JSONL"]


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows(name, here):
    want = splits_of(CHAT)
    file = write_kind(here, name)
    assert splits_of(str(file)) == splits_of(file) == splits_of({"path": name}) == want
    assert sum(map(len, want.values())) == 12 and want["train"][0]["meta"].keys() == {"topic"}
    with open_rows(file) as rows: assert (rows.files, rows.name) == ([file], name)


JSONS = {"an array, written out": json.dumps(CHAT, indent=2), "an array in one line": json.dumps(CHAT), "with a mark at its start": "\ufeff" + json.dumps(CHAT),
         "objects that follow each other": "\n".join(json.dumps(r, indent=1) for r in CHAT), "objects with nothing between": "".join(map(json.dumps, CHAT)),
         "much white space": json.dumps(CHAT, indent=2).replace("\n", "\r\n \t\n")}


@pytest.mark.parametrize("text", JSONS.values(), ids=JSONS)
@pytest.mark.parametrize("piece", [1, 2, 7, 64, 1 << 16])
def test_json_is_read_in_pieces_of_any_size(text, piece, here, monkeypatch):
    (here/"rows.json").write_text(text, encoding="utf-8")
    monkeypatch.setattr(data.JsonPieces.__init__, "__defaults__", (piece,))
    assert [*data.iter_json("rows.json")] == CHAT


VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6)


@quick
@given(st.lists(st.dictionaries(st.text(max_size=4), VALUES | st.lists(VALUES, max_size=2), max_size=2), max_size=4), st.integers(1, 40), st.booleans(), st.sampled_from([None, 2]))
def test_any_json_is_read_as_the_standard_library_reads_it(rows, piece, ascii, indent):
    text = data.JsonPieces(io.StringIO(json.dumps(rows, ensure_ascii=ascii, indent=indent)), piece)
    found = []
    assert text.take("[")
    while not text.take("]"):
        assert not found or text.take(",")
        text.peek()
        found.append(text.value())
    assert found == rows and not text.peek()


def test_a_mistake_in_a_long_json_file_is_found_where_it_is(here):
    "And not after the whole file has been read in search of its end"
    rest = json.dumps(CHAT * 20_000)[1:]
    (here/"rows.json").write_text('[{"prompt": "a"}, {"prompt" "b"}, ' + rest)
    tracemalloc.start()
    with pytest.raises(DistillError, match="row 2: not valid JSON"): [*data.iter_json("rows.json")]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6 < len(rest)


def test_a_long_row_is_not_decoded_over_and_over():
    "Each time that it turns out to be longer, twice as much is read"
    class Counted(io.StringIO):
        reads = 0
        def read(self, n): self.reads += 1; return super().read(n)
    file = Counted(json.dumps({"prompt": "x" * 1_000_000}))
    text = data.JsonPieces(file, 16)
    text.peek()
    assert len(text.value()["prompt"]) == 1_000_000 and file.reads < 30


def test_our_own_training_file_can_be_read_again(here):
    "`distilled_chat/train_distilled.json` of an annotation"
    rows = [{"messages": [{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": f"A{i}"}]} for i in range(9)]
    core.write_json("train_distilled.json", rows)
    with open_rows({"path": "train_distilled.json", "validation": 0, "test": 0}) as opened:
        assert sorted((r["messages"] for r in opened.require("train").rows()), key=str) == [r["messages"] for r in rows]


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_conversations_in_sharegpts_form_are_conversations(column, here):
    rows = [{column: [{"from": "system", "value": "Be brief."}, {"from": "human", "value": f"Q{i}"}, {"from": "gpt", "value": f"A{i}", "weight": None}]} for i in range(9)]
    core.write_json("rows.json", rows)
    for opened in splits_of("rows.json"), splits_of(rows): assert len(opened["train"]) == 7 and opened["train"][0]["meta"] == {}
    first = opened["train"][0]["messages"]
    assert [m["role"] for m in first] == ["system", "user", "assistant"] and first[2]["content"] == "A" + first[1]["content"][1:]


def test_a_prompt_is_preferred_to_a_column_called_conversations():
    rows = [{"prompt": f"P{i}", "conversations": [{"from": "human", "value": f"C{i}"}]} for i in range(9)]
    assert {r["messages"][0]["content"][0] for r in splits_of(rows)["train"]} == {"P"}
    assert {r["messages"][0]["content"][0] for r in splits_of({"rows": rows, "columns": {"messages": "conversations"}})["train"]} == {"C"}


MEMORY = {"a list": lambda rows: rows, "a Dataset": datasets.Dataset.from_list, "a DataFrame": pd.DataFrame,
          "a parquet file read by pandas": lambda rows: (pd.DataFrame(rows).to_parquet("x.parquet"), pd.read_parquet("x.parquet"))[1]}


@pytest.mark.parametrize("make", MEMORY.values(), ids=MEMORY)
def test_rows_in_memory_are_rows(make, here):
    talks = [{"id": i, "messages": [{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": f"A{i}"}], "score": i / 2} for i in range(9)]
    for rows in CHAT, talks:
        want = splits_of(rows)
        assert splits_of(make(rows)) == splits_of(DataSpec.model_validate(make(rows))) == want == splits_of({"rows": make(rows)})
    with open_rows(make(CHAT)) as rows: assert (rows.name, rows.files) == ("rows in memory", [])
    assert splits_of({"rows": make(CHAT), "group": "topic", "validation": 0, "test": 1}) == splits_of(DataSpec(path="x", rows=CHAT, group="topic", validation=0, test=1))


def test_what_is_missing_in_a_table_is_missing_in_its_rows(here):
    rows = [{"text": f"T{i}", "label": None if i == 4 else i % 3, "score": None if i < 3 else i / 2} for i in range(9)]
    want = splits_of(rows, "classify")
    frame, nan = pd.DataFrame(rows), [r | {k: float("nan") for k, v in r.items() if v is None} for r in rows]
    frame.astype({"label": "Int64"}).to_parquet("rows.parquet")
    for source in (frame, nan, datasets.Dataset.from_list(rows), "rows.parquet"): assert splits_of(source, "classify") == want
    unanswered = [r["id"] for part in want.values() for r in part if r["messages"][-1]["role"] == "user"]
    assert len(unanswered) == 1


@pytest.mark.parametrize("stage", [DataSpec, annotate.AnnotateParams])
def test_a_stage_takes_rows_in_memory_and_records_their_content(stage, here):
    make = DataSpec.model_validate if stage is DataSpec else lambda rows: stage(data=rows, teacher="x").data
    one, two = make(CHAT), make(CHAT[:-1])
    assert one.rows is CHAT and one.model_dump()["rows"] != two.model_dump()["rows"]
    assert one.model_dump(mode="json") == make(pd.DataFrame(CHAT)).model_dump(mode="json")
    with pytest.raises(DistillError, match="rows in memory .*: are not kept"): open_rows(one.model_dump())


def test_a_home_folder_is_found(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    write_kind(here, "rows.csv")
    (here/"mine").mkdir()
    write_kind(here/"mine", "train.csv")
    assert splits_of("~/rows.csv") == splits_of(CHAT) and len(splits_of("~/mine")["train"]) == 12
    assert data.data_files("~/rows.csv") == [here/"rows.csv"]
    with pytest.raises(DistillError, match="~/row.csv: no such file"): open_rows("~/row.csv")


def test_labels_are_answers_where_the_task_is_to_classify():
    rows = [{"text": f"T{i}", "label": i % 3} for i in range(9)]
    answers = lambda rows, task: {r["messages"][-1]["content"] for r in splits_of(rows, task)["train"] if r["messages"][-1]["role"] == "assistant"}
    assert answers(rows, "classify") == {"0", "1", "2"} and answers(rows, "chat") == set()
    assert answers([r | {"label_text": "abc"[r["label"]]} for r in rows], "classify") == {"a", "b", "c"}
    assert answers([{"text": r["text"], "label": "abc"[r["label"]]} for r in rows], "classify") == {"a", "b", "c"}


# A folder with three splits

def write_folder(folder, name="{}.jsonl", **parts):
    "Each letter is a row whose question it is"
    folder.mkdir(exist_ok=True)
    for split, letters in parts.items():
        rows = [{"id": f"{split}-{i}", "messages": [{"role": "user", "content": c}, {"role": "assistant", "content": c}], "meta": {"n": i}} for i, c in enumerate(letters)]
        write_kind(folder, name.format(split), rows)
    return folder


@pytest.mark.parametrize("name", ["{}.jsonl", "{}.json", "{}.parquet", "{}.jsonl.gz"])
def test_a_folder_of_three_files_keeps_its_splits_and_their_order(name, here):
    folder = write_folder(here/"mine", name, train="zebra"[:4], validation="s", test="fg")
    for source in (str(folder), folder, {"path": "mine"}, DataSpec(path="mine")):
        assert {s: "".join(r["messages"][0]["content"] for r in part) for s, part in splits_of(source).items()} == {"train": "zebr", "validation": "s", "test": "fg"}
    with open_rows("mine") as rows: assert rows.name == "mine" and [f.name for f in rows.files] == [name.format(s) for s in SPLITS]


def test_a_folder_may_lack_what_nobody_is_tested_on(here):
    write_folder(here/"mine", train="ab", validation="")
    with open_rows("mine") as rows: assert rows.counts == {"train": 2, "validation": 0, "test": 0}


@pytest.mark.parametrize("option", [{"samples": 3}, {"test": 1}, {"validation": 0.2}, {"group": "topic"}])
def test_splits_that_stand_are_not_split_again(option, here):
    write_folder(here/"mine", train="abc", test="d")
    with pytest.raises(DistillError, match=f"mine: {[*option][0]}: the splits of a folder stand already"): open_rows({"path": "mine"} | option)


# The same question

def test_the_same_question_is_never_in_two_splits_unless_the_recipe_says_so():
    rows = [{"id": i, "prompt": f"{'Why' if i % 2 else '  why'} {i // 2}?", "response": f"{i}"} for i in range(60)]
    for repeats in (False, True):
        places = {}
        for split, part in splits_of({"rows": rows, "repeats": repeats}).items():
            for r in part: places.setdefault(data.question_key(r["messages"]), set()).add(split)
        assert len(places) == 30 and any(len(s) > 1 for s in places.values()) == repeats


def test_groups_that_share_a_question_stay_together():
    rows = [{"prompt": f"Q{g}{i}", "author": g, "id": f"{g}{i}"} for g in range(20) for i in range(3)]
    rows += [{"prompt": f"Q{g}0", "author": g + 1, "id": f"shared {g}"} for g in (0, 1, 7)]  # 0, 1 and 2 are one, and so are 7 and 8
    for seed in range(10):
        where = {}
        for split, part in splits_of({"rows": rows, "group": "author", "seed": seed}).items():
            for r in part: where.setdefault(r["meta"]["author"], set()).add(split)
        assert all(len(s) == 1 for s in where.values()) and where[0] == where[1] == where[2] and where[7] == where[8]


SAME = {"a system message": ([("system", "Be brief."), ("user", "Why?")], [("user", "Why?")]), "the answer": ([("user", "Why?"), ("assistant", "a")], [("user", "Why?"), ("assistant", "b")]),
        "white space": ([("user", "Why  not\n?")], [("user", " Why not ?")]), "capitals": ([("user", "STRASSE")], [("user", "straße")])}
OTHER = {"an earlier turn": ([("user", "a"), ("assistant", "b"), ("user", "Why?")], [("user", "Why?")]), "an earlier answer": ([("user", "a"), ("assistant", "b"), ("user", "c")], [("user", "a"), ("assistant", "x"), ("user", "c")])}


@pytest.mark.parametrize("case", [*SAME, *OTHER])
def test_what_makes_a_question_the_same(case):
    one, two = [data.question_key([{"role": r, "content": c} for r, c in m]) for m in (SAME | OTHER)[case]]
    assert (one == two) == (case in SAME)


def test_a_question_in_two_files_of_a_folder_is_refused_and_may_be_allowed(here):
    write_folder(here/"mine", train="abcd", validation="xB", test="Cya")
    with pytest.raises(DistillError) as e: open_rows("mine")
    for part in ("mine:", "train.jsonl, row 1 (id train-0)", "test.jsonl, row 3 (id test-2)", "2 more", "repeats: true"): assert part in str(e.value)
    with open_rows({"path": "mine", "repeats": True}) as rows: assert rows.counts == {"train": 4, "validation": 2, "test": 3}
    core.write_json("mine/manifest.json", {"parameters": {"data": {"path": "x", "repeats": True}}})
    open_rows("mine").close()  # the recipe that made them said so
    core.write_json("mine/manifest.json", {"parameters": {"data": "@annotate"}})
    with pytest.raises(DistillError, match="ask the same"): open_rows("mine")


# Rows that cannot be used

def lines(*rows): return "".join(json.dumps(r) + "\n" for r in rows)


def packed(text, cut=None): return gzip.compress(text.encode())[:cut]


SIX = [{"prompt": f"Q{i}", "response": f"A{i}", "topic": i % 2} for i in range(6)]
BAD = {  # file, content, and what must be said
    "no such column": ("rows.jsonl", lines({"frage": "x"}),
        ["rows.jsonl: no column for 'prompt'", "frage", "columns: {prompt: ...}"]),
    "a column is missing in one row": ("rows.jsonl", lines(*SIX, {"response": "x"}),
        ["rows.jsonl, row 7:", "'prompt' is missing"]),
    "a prompt is a number": ("rows.jsonl", lines(*SIX, {"prompt": 3, "response": ""}),
        ["rows.jsonl, row 7:", "'prompt' should be text, not int"]),
    "an answer is a list": ("rows.json", json.dumps([*SIX, {"prompt": "x", "response": []}]),
        ["rows.json, row 7:", "'response' should be text, not list"]),
    "an answer is true": ("rows.jsonl", lines(*SIX, {"prompt": "x", "response": True}), ["row 7:", "text, not bool"]),
    "an answer is NaN": ("rows.jsonl", lines(*SIX) + '{"prompt": "x", "response": NaN}\n',
        ["rows.jsonl, row 7:", "text, not nan"]),
    "something else is NaN": ("rows.json", json.dumps([*SIX, {"prompt": "x", "response": "y", "score": {"a": float("nan")}}]),
        ["rows.json, row 7: meta.score.a:", "not a finite number"]),
    "something else is infinite": ("rows.jsonl", lines(*SIX) + '{"prompt": "x", "response": "y", "score": 1e999}\n',
        ["row 7: meta.score:", "not a finite number"]),
    "half a character": ("rows.jsonl", lines(*SIX, {"prompt": "\ud800", "response": ""}),
        ["rows.jsonl, row 7:", "half a character ('\\ud800')"]),
    "half a character in an id": ("rows.jsonl", lines({"id": "\udfff", "prompt": "x"}),
        ["rows.jsonl, row 1:", "half a character"]),
    "an id for two texts": ("rows.jsonl", lines({"id": 1, "prompt": "x"}, {"id": 2, "prompt": "y"}, {"id": "1", "prompt": "z"}),
        ["rows.jsonl, row 3:", "id '1' was used before", "unique"]),
    "no rows": ("rows.jsonl", "\n\n", ["rows.jsonl: has no rows"]),
    "an empty file": ("rows.csv", "", ["rows.csv: has no rows"]),
    "an empty JSON file": ("rows.json", " ", ["rows.json: has no rows"]),
    "an empty array": ("rows.json", "[ ]", ["rows.json: has no rows"]),
    "only blank prompts": ("rows.jsonl", lines({"prompt": " "}, {"prompt": None}),
        ["rows.jsonl: no row with a prompt is left", "'blank prompt': 2"]),
    "the last line is torn": ("rows.jsonl", lines(*SIX)[:-9], ["rows.jsonl, line 6: not valid JSON", "cut off?"]),
    "an array is torn in a row": ("rows.json", json.dumps(SIX)[:-9], ["rows.json, row 6: not valid JSON", "cut off?"]),
    "an array is torn in a word": ("rows.json", '[{"prompt": "x"}, {"prompt": nul',
        ["rows.json, row 2: not valid JSON", "cut off?"]),
    "an array is torn between rows": ("rows.json", json.dumps(SIX)[:-1], ["rows.json, row 6: not valid JSON", "cut off?"]),
    "an array ends with a comma": ("rows.json", '[{"prompt": "x"},]', ["rows.json, row 2:", "expected an object, not ']'"]),
    "an array lacks a comma": ("rows.json", '[{"prompt": "x"} {"prompt": "y"}]', ["rows.json, row 1:", "expected a comma"]),
    "an array of texts": ("rows.json", '["a", "b"]', ["rows.json, row 1:", "expected an object, not '\"'"]),
    "two arrays": ("rows.json", json.dumps(SIX) * 2, ["rows.json, row 6:", "goes on after the end"]),
    "a text and no array": ("rows.json", '"rows"', ["rows.json, row 1:", "expected an object"]),
    "an object around the rows": ("rows.json", json.dumps({"version": 1, "data": SIX}),
        ["rows.json: no column for 'prompt' (columns: version, data)"]),
    "JSON lines are lists": ("rows.jsonl", "[1]\n", ["rows.jsonl, line 1: expected an object, found list"]),
    "packed lines are torn": ("rows.jsonl.gz", packed(lines(*SIX * 500), -9),
        ["rows.jsonl.gz, after line ", "cannot be read", "ended before"]),
    "a packed array is torn": ("rows.json.gz", packed(json.dumps(SIX * 500), -9),
        ["rows.json.gz, after row ", "cannot be read", "ended before"]),
    "a packed table is torn": ("rows.csv.gz", packed(as_text(SIX * 500, ".csv"), -9),
        ["rows.csv.gz, line ", "cannot be read", "ended before"]),
    "not packed at all": ("rows.jsonl.gz", lines(*SIX), ["rows.jsonl.gz: cannot be read", "gzipped"]),
    "damaged inside": ("rows.jsonl.gz", (lambda b: b[:40] + bytes(20) + b[60:])(packed(lines(*SIX * 500))),
        ["rows.jsonl.gz", "cannot be read"]),
    "a field too many": ("rows.csv", "prompt,response\na,b\nc,d,e\n",
        ["rows.csv, line 3: expected 2 fields (prompt, response)"]),
    "a field too few": ("rows.tsv", "prompt\tresponse\na\n", ["rows.tsv, line 2: expected 2 fields"]),
    "a quote that is never closed": ("rows.csv", 'prompt,response\na,b\n"c,d\n',
        ["rows.csv, line 2: the next row cannot be read", "quote never closed"]),
    "not UTF-8": ("rows.csv", "prompt\nna\u00efve\n".encode("latin-1"), ["rows.csv", "UTF-8"]),
    "written by Windows": ("rows.csv", "prompt\nx\n".encode("utf-16"), ["rows.csv", "UTF-8"]),
    "lines that are not UTF-8": ("rows.jsonl", '{"prompt": "na\u00efve"}'.encode("latin-1"),
        ["rows.jsonl: cannot be read", "utf-8"]),
    "no parquet": ("rows.parquet", "PAR1 it is not", ["rows.parquet: cannot be read as parquet"]),
    "an unknown kind": ("rows.xlsx", "x", ["rows.xlsx: unknown kind of file", ".csv"]),
    "a packed parquet of another kind": ("rows.zip.gz", packed("x"), ["rows.zip.gz: unknown kind of file"]),
    "messages are a text": ("rows.jsonl", lines({"messages": "x"}), ["rows.jsonl, row 1: messages should be a list"]),
    "no messages": ("rows.jsonl", lines({"messages": []}),
        ["rows.jsonl, row 1: messages should be a list with one message at least"]),
    "an unknown role": ("rows.jsonl", lines({"messages": [{"role": "bot", "content": "x"}]}),
        ["rows.jsonl, row 1: each message needs a role (system, user, assistant)", "bot"]),
    "a role that is a list": ("rows.jsonl", lines({"messages": [{"role": [], "content": "x"}]}),
        ["rows.jsonl, row 1: each message needs a role"]),
    "a message without a text": ("rows.jsonl", lines({"messages": [{"from": "human", "value": None}]}),
        ["rows.jsonl, row 1: each message needs"]),
    "a message that is a text": ("rows.jsonl", lines({"messages": ["x"]}), ["rows.jsonl, row 1: each message needs"]),
}


@pytest.mark.parametrize("case", BAD)
def test_rows_that_cannot_be_used_are_named(case, here):
    name, content, said = BAD[case]
    (here/name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    for keep in (None, "kept.sqlite"):
        with pytest.raises(DistillError) as e: open_rows(name, keep=keep)
        for part in said: assert part in str(e.value)
        assert str(e.value).startswith(name) and len(str(e.value)) < 500 and [f.name for f in here.iterdir()] == [name]


WRONG = {"a misspelt name": ("quikstart", ["quikstart: no such file", "did you mean 'quickstart'?"]), "no such file": ("rows.jsonl",
        ["rows.jsonl: no such file"]),
         "no such packed file": ("org/rows.csv.gz", ["org/rows.csv.gz: no such file"]), "a folder": (".",
        [".: is a folder without a train.jsonl"]),
         "a list of words": (["a"], ["rows in memory, row 1: expected a dictionary, found str"]), "an empty list": ([],
        ["rows in memory: has no rows"]),
         "a number": (3, ["data: "]), "an unknown key": ({"path": "quickstart", "sample": 3},
        ["data: sample: unknown key", "did you mean 'samples'?"]),
         "a hub name": ("nobody/nothing",
        ["nobody/nothing: no such file here, and the hub gave no such data set", "misspelt, private, or the hub cannot be reached"]),
         "columns that are not there": ({"path": "quickstart", "columns": {"prompt": "promt"}},
        ["quickstart: columns: prompt: there is no column 'promt', did you mean 'prompt'?"]),
         "a role that is not there": ({"path": "quickstart", "columns": {"promt": "prompt"}},
        ["quickstart: columns: promt: unknown role, did you mean 'prompt'?"]),
         "none left to train on": ({"path": "quickstart", "samples": 8, "test": 6, "validation": 2},
        ["quickstart: test: 6 and validation: 2 leave none to train on (rows: 8, groups: 8)"]),
         "no such group": ({"path": "quickstart", "group": "author"},
        ["quickstart, row 1: row bees-1: group column 'author' is missing", "(the other columns: topic)"])}


@pytest.mark.parametrize("case", WRONG)
def test_data_that_are_not_there_are_named(case, here):
    source, said = WRONG[case]
    with pytest.raises(DistillError) as e: open_rows(source)
    for part in said: assert part in str(e.value)


def test_an_unknown_task_is_named():
    with pytest.raises(DistillError, match="task: clasify: unknown task, did you mean 'classify'"): open_rows("quickstart", "clasify")


def test_an_answer_that_no_early_row_has_is_a_column_all_the_same():
    rows = [{"prompt": f"Q{i}", "said": None if i < 150 else f"A{i}"} for i in range(200)]
    with open_rows({"rows": rows, "columns": {"response": "said"}}) as opened:
        assert sum(r["messages"][-1]["role"] == "assistant" for r in opened.rows()) == 50


# What is opened

def test_rows_know_their_longest_text_their_first_row_and_whether_they_are_answered():
    rows = [{"prompt": "ভাত" * i, "response": "x" * (i % 5), "system": "s"} for i in range(1, 31)]
    with open_rows(rows) as opened:
        for split in SPLITS:
            part = list(opened.rows(split))
            assert opened.longest(split) == max(sum(len(m["content"].encode()) for m in r["messages"]) for r in part)
            assert opened.first(split) == part[0] and len(part) == opened.counts[split]
        assert [*opened.rows()] == [r for s in SPLITS for r in opened.rows(s)] and opened.first() == opened.first("train")
        assert opened.require("train", answered=False) is opened
        with pytest.raises(DistillError, match="rows in memory: row .* of train has no answer: annotate it first, or map a column"): opened.require("train")
    with open_rows({"rows": rows[:4], "test": 0, "validation": 0}) as opened:
        assert opened.require("train") is opened and (opened.longest("test"), opened.first("test")) == (0, None)
        with pytest.raises(DistillError, match="rows in memory: the test split is empty"): opened.require("test")


def test_resized_rows_are_the_same_rows_cut_off_or_repeated():
    with open_rows(CHAT) as rows:
        train = list(rows.rows("train"))
        view = rows.resized({"train": 25, "validation": 1})
        assert list(view.rows("train")) == (train * 3)[:25] and list(view.rows()) == (train * 3)[:25] + [rows.first("validation")]
        assert view.counts == {"train": 25, "validation": 1, "test": 0} and view.first("test") is None and view.longest("train") == rows.longest("train")
        longer = rows.resized({"train": 3}, more=100).resized({"train": 2}, more=7)
        assert longer.longest("train") == rows.longest("train") + 107 and longer.longest("test") == rows.longest("test") + 107
        assert rows.counts["train"] == len(train) and view.resized({"train": 2}).counts["train"] == 2
    with open_rows({"rows": CHAT, "test": 0}) as rows, pytest.raises(DistillError, match="the test split is empty"): rows.resized({"test": 1})


def test_rows_may_be_read_by_several_at_once_and_by_a_thread():
    with open_rows(CHAT) as rows:
        pairs = [(a["id"], b["id"]) for a in rows.rows("train") for b in rows.rows("train")]
        assert len(set(pairs)) == rows.counts["train"] ** 2
        with ThreadPoolExecutor(1) as pool: assert pool.submit(lambda: len(list(rows.rows()))).result() == 12


def test_the_table_of_rows_can_be_joined():
    with open_rows(CHAT) as rows:
        rows.db.execute("create temp table keys as select n, 'key of ' || id as key from rows")
        found = rows.db.execute("select id, key, split, answered, bytes, row from rows join keys using (n) order by n").fetchall()
        assert len(found) == 12
        for id, key, split, answered, size, row in found:
            row = json.loads(row)
            assert row["id"] == id and key == f"key of {id}" and row in rows.rows(split) and answered == 1 and size == sum(len(m["content"].encode()) for m in row["messages"])


# Kept, and known again

def test_kept_rows_are_used_again_while_content_choices_and_task_are_the_same(here, monkeypatch):
    filled = []
    fill = data.fill_database
    monkeypatch.setattr(data, "fill_database", lambda *a: (filled.append(1), fill(*a)))
    def opened(source, task="chat"):
        before = len(filled)
        with open_rows(source, task, keep="kept.sqlite") as rows: assert [*rows.rows()] == [r for p in splits_of(source, task).values() for r in p]
        return len(filled) - before - 1  # `splits_of` fills one of its own
    write_kind(here, "rows.jsonl")
    (here/"b").mkdir()
    write_kind(here/"b", "other.jsonl")
    assert [opened("rows.jsonl"), opened("rows.jsonl"), opened("b/other.jsonl")] == [1, 0, 0]
    assert [opened({"path": "rows.jsonl", "license": "mit"}), opened({"path": "rows.jsonl", "test": 0.1}), opened({"path": "rows.jsonl", "test": 2})] == [0, 0, 1]
    assert [opened({"path": "rows.jsonl", "test": 2}, "classify"), opened({"path": "rows.jsonl", "test": 2}, "classify")] == [1, 0]
    write_kind(here, "rows.jsonl", CHAT[1:])
    assert [opened({"path": "rows.jsonl", "test": 2}, "classify"), opened(CHAT), opened(CHAT), opened(pd.DataFrame(CHAT)), opened(CHAT[:-1])] == [1, 1, 0, 0, 1]
    write_folder(here/"mine", train="ab", test="c")
    assert [opened("mine"), opened("mine")] == [1, 0]
    write_folder(here/"mine", test="d")
    assert opened("mine") == 1


OPTIONS = [{"columns": {"prompt": "prompt"}}, {"group": "topic"}, {"samples": 9}, {"validation": 2}, {"test": 2}, {"seed": 1}, {"repeats": True}]


def test_the_identity_of_data_is_their_content_and_what_is_done_with_it(here):
    write_kind(here, "rows.jsonl")
    write_kind(here, "copy.jsonl")
    same = [data.data_identity(d) for d in ("rows.jsonl", here/"copy.jsonl", {"path": "rows.jsonl", "license": "mit"}, DataSpec(path="copy.jsonl", split="x", subset="y"))]
    assert all(s == same[0] for s in same) and "rows" not in json.dumps(same)
    others = [data.data_identity({"path": "rows.jsonl"} | o) for o in OPTIONS]
    write_kind(here, "copy.jsonl", CHAT[:-1])
    hub = [data.data_identity({"path": "a/b"} | o) for o in ({}, {"revision": "c"}, {"split": "test"}, {"subset": "d"})]
    folders = [data.data_identity(str(write_folder(here/"mine", **parts))) for parts in ({"train": "ab"}, {"test": "c"}, {"train": "ba"})]
    identities = [same[0], *others, data.data_identity("copy.jsonl"), *hub, *folders, data.data_identity(CHAT)]
    assert len({core.digest(i) for i in identities}) == len(identities) and json.loads(json.dumps(identities)) == identities


def test_a_large_file_is_read_once_and_the_newest_few_are_kept(here, monkeypatch):
    "As a plan opens them: the second time, nothing but what is kept is read"
    monkeypatch.setenv("DISTILL_NB_CACHE", str(here/"cache"))
    monkeypatch.setattr(data, "CACHED_FROM", 100)
    for source in ([{"prompt": "x"}], "org/name"): assert data.cached_place(source) is None
    for n in range(7):
        write_kind(here, f"{n}.jsonl", CHAT[n % 5:])
        open_rows(f"{n}.jsonl", keep=data.cached_place(f"{n}.jsonl")).close()
    kept = list((here/"cache"/"rows").iterdir())
    assert len(kept) == data.CACHED_ROWS and data.cached_place("6.jsonl") == data.cached_place("1.jsonl") in kept
    assert data.cached_place("6.jsonl", "classify") not in kept
    monkeypatch.setattr(data, "fill_database", None)
    with open_rows("6.jsonl", keep=data.cached_place("6.jsonl")) as rows: assert sum(rows.counts.values()) == 11
    monkeypatch.setattr(data, "CACHED_FROM", 10_000)
    assert data.cached_place("6.jsonl") is None


def test_a_cache_that_cannot_be_written_is_done_without(here, monkeypatch):
    (here/"file").write_text("")
    monkeypatch.setenv("DISTILL_NB_CACHE", str(here/"file"))
    monkeypatch.setattr(data, "CACHED_FROM", 100)
    write_kind(here, "rows.jsonl")
    assert data.cached_place("rows.jsonl") is None


def test_rows_of_a_hub_are_read_again_unless_their_commit_is_named(here, monkeypatch):
    asked = []
    monkeypatch.setattr(data, "read_hub", lambda spec: (asked.append(spec.path), iter(CHAT))[1])
    for source, times in (("a/b", 2), ({"path": "a/b", "revision": "c0ffee"}, 1)):
        asked.clear()
        for _ in range(2):
            with open_rows(source, keep="kept.sqlite") as rows: assert (sum(rows.counts.values()), rows.name, rows.files) == (12, "a/b", [])
        assert len(asked) == times


@pytest.mark.parametrize("damage", ["cut off", "something else", "a row changed", "a count changed"])
def test_kept_rows_that_are_damaged_are_made_again(damage, here):
    want = splits_of(CHAT)
    open_rows(CHAT, keep="kept.sqlite").close()
    whole = (here/"kept.sqlite").read_bytes()
    if damage == "cut off": (here/"kept.sqlite").write_bytes(whole[:len(whole) // 2])
    elif damage == "something else": (here/"kept.sqlite").write_text("not a database")
    else:
        with closing(sqlite3.connect("kept.sqlite")) as db, db:
            db.execute("update rows set split = 'train'" if damage == "a row changed" else "update facts set value = '{\"x\": 1}' where name = 'dropped'")
    with open_rows(CHAT, keep="kept.sqlite") as rows: assert {s: list(rows.rows(s)) for s in SPLITS} == want and rows.dropped == {}


@settings(quick, max_examples=150)
@given(st.data())
def test_a_byte_that_was_changed_in_kept_rows_never_changes_the_rows(kept, draws):
    file, whole, want = kept
    at = draws.draw(st.integers(0, len(whole) - 1))
    file.write_bytes(draws.draw(st.sampled_from([whole[:at], whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1:], whole[:at] + bytes(64) + whole[at + 64:]])))
    with open_rows(CHAT, keep=file) as rows: assert [*rows.rows()] == want and rows.dropped == {}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    file = tmp_path_factory.mktemp("kept")/"rows.sqlite"
    with open_rows(CHAT, keep=file) as rows: want = list(rows.rows())
    return file, file.read_bytes(), want


def test_what_cannot_be_kept_is_said(here):
    (here/"full").write_text("")
    with pytest.raises(DistillError, match="full.*: cannot be written"): open_rows(CHAT, keep="full/kept.sqlite")


# The hub

@pytest.fixture
def cached(here, monkeypatch):
    "A data set in the cache, as an earlier `load_dataset` leaves it"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(here/"cache"))
    commit, work = here/"cache"/"some-org___our_rows"/"default"/"0.0.0"/"c0ffee", here/"work"
    core.write_jsonl("rows.jsonl", CHAT)
    datasets.load_dataset("json", data_files="rows.jsonl", split="train", cache_dir=str(work))
    made = next(work.rglob("dataset_info.json")).parent
    shutil.copytree(made, commit)
    info = core.read_json(commit/"dataset_info.json")
    core.write_json(commit/"dataset_info.json", info | {"config_name": "default", "dataset_name": "our_rows", "builder_name": "json"})
    (commit/"json-train.arrow").rename(commit/"our_rows-train.arrow")
    return "some-org/our_rows"


@pytest.mark.parametrize("reachable", [False, True])
def test_a_data_set_in_the_cache_is_read_where_the_hub_is_out_of_reach(reachable, cached, monkeypatch):
    "Not reachable by its address: the cache is asked at once. Reachable, and then not: `datasets` falls back on it"
    monkeypatch.setattr(data, "hub_reachable", lambda: reachable)
    assert splits_of(cached) == splits_of(CHAT)


def test_what_is_not_in_the_cache_is_said_without_asking_the_hub(here, monkeypatch):
    monkeypatch.setattr(data, "hub_reachable", lambda: False)
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(DistillError, match="nobody/nothing: no such file here, and the hub gave no such data set"): open_rows("nobody/nothing")


# Memory

MEASURED = """
import re, sys
from distill_nb.data import open_rows
with open_rows(sys.argv[1]) as rows: n = sum(1 for _ in rows.rows())
print(n, re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv.gz"])
def test_many_rows_take_little_more_memory_than_a_few(name, here):
    peak = {}
    for n in (200, 10_000):
        write_kind(here, name, [{"id": i, "prompt": f"Question {i // 2 * 2}, " + "as long as a page " * 200, "topic": i % 100} for i in range(n)])
        done = subprocess.run([sys.executable, "-c", MEASURED, name], capture_output=True, text=True, env=environment(None), check=True)
        count, peak[n] = map(int, done.stdout.split())
        assert count == n
    assert peak[10_000] - peak[200] < 20_000, f"{peak} kilobytes, and the rows alone are 36,000"


# Other rows of the same place

@quick
@given(st.integers(1, 30), st.integers(0, 5), st.booleans())
def test_what_is_skipped_is_what_another_stage_took(took, validation, grouped):
    rows = [{"id": f"r{n}", "prompt": f"question {n // 2 if n < 10 else n}?", "topic": str(n % 7)} for n in range(40)]  # ten ask what another asks
    options = {"rows": rows, "group": "topic" if grouped else None, "validation": 0, "test": 0}
    try: others = data.open_rows(options | {"skip": took, "validation": validation, "test": 2})
    except DistillError as e:
        assert "skip" in str(e) or "leave none to train on" in str(e)
        return
    with others, data.open_rows(options | {"samples": max(took, 3)}) as first:
        asked = [{data.question_key(r["messages"]) for r in found.rows()} for found in (first, others)]
        assert took < 3 or not asked[0] & asked[1], "a question that the first stage took is asked again"
        assert sum(others.counts.values()) + took <= 40


def test_skipping_every_row_is_refused():
    rows = [{"prompt": f"question {n}?"} for n in range(5)]
    with pytest.raises(DistillError, match="skip: 5 leaves no row"): data.open_rows({"rows": rows, "skip": 5})


# Texts and labels

def test_a_text_has_its_own_form_and_asks_nothing(tmp_path):
    rows = [{"id": "a", "text": "One bee."}, {"id": "b", "text": "  "}, {"id": "c", "text": "Two bees.", "topic": "bees"}, {"id": "a", "text": "One bee."}]
    with open_rows({"rows": rows, "validation": 0, "test": 0}, "text") as found:
        assert sorted((r["id"], r["text"], str(r["meta"])) for r in found.rows()) == [("a", "One bee.", "{}"), ("c", "Two bees.", "{'topic': 'bees'}")]
        assert found.dropped == {"blank prompt": 1, "duplicate": 1} and not any("messages" in r for r in found.rows())
        assert found.require("train").longest("train") == len("Two bees.")
    write_jsonl(tmp_path/"train.jsonl", [{"id": "a", "text": "One bee.", "meta": {"topic": "bees"}}])
    with open_rows(str(tmp_path), "text") as found: assert found.first() == {"id": "a", "text": "One bee.", "meta": {"topic": "bees"}}
    with pytest.raises(DistillError, match="no column for 'text' .columns: prompt."): open_rows({"rows": [{"prompt": "x"}]}, "text")
    with pytest.raises(DistillError, match="columns: prompt: unknown role"):
        open_rows({"rows": [{"frage": "x"}], "columns": {"prompt": "frage"}}, "text")


@pytest.mark.parametrize("meta", [{"label": 1}, {"labels": {"tone": "bad"}}, {"probabilities": {"good": 0.5, "bad": 0.5}}])
def test_a_label_is_an_answer_to_who_classifies_and_to_nobody_else(meta):
    data = {"rows": [{"id": "r", "messages": [{"role": "user", "content": "Meh."}], "meta": meta}], "validation": 0, "test": 0}
    with open_rows(data, "classify") as rows: assert rows.require("train").first()["meta"] == meta
    with open_rows(data, "chat") as rows, pytest.raises(DistillError, match="row r of train has no answer"): rows.require("train")
