"""A mistake is found before anything is run, and said in one sentence: file, stage, key. And what rows and files must keep to."""
import contextlib
import errno
import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_nb import cli, core, generate, models, pipeline, stage as stages_
from distill_nb.core import DistillError
from distill_nb.stage import DataSpec

from conftest import command_line, own_recipe, prompts, write_notebook, write_recipe, write_rows

quick = settings(max_examples=150, deadline=None)  # a busy machine has no say in what is right


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stage(recipe, id):
    return next(p for s in recipe["stages"] for kind, p in s.items() if p.get("id", kind) == id)


def put(id, /, **values):
    "A change of a recipe: parameters of one stage"
    return lambda recipe: stage(recipe, id).update(values)


def put_data(**values):
    return lambda recipe: recipe["data"].update(values)


def put_top(**values):
    return lambda recipe: recipe.update(values)


def drop(id, name):
    return lambda recipe: stage(recipe, id).pop(name)


def distill(capsys, monkeypatch, *arguments):
    "The command line in this process: status, out, err"
    monkeypatch.setattr("sys.argv", ["distill-nb", *arguments])
    with pytest.raises(SystemExit) as e: cli.main()
    return e.value.code or 0, *capsys.readouterr()


def refused(capsys, monkeypatch, here, *arguments):
    "What is said when a command is refused: status 2, on stderr alone, no traceback, nothing begun"
    def run_stage(*_): raise AssertionError("a stage was begun")
    monkeypatch.setattr(pipeline, "run_stage", run_stage)  # so that a mistake that is not found costs no minute
    status, out, err = distill(capsys, monkeypatch, *arguments)
    assert (status, out) == (2, ""), (status, out, err)
    assert "Traceback" not in err and "distill_nb.core" not in err
    assert not (here/"runs").exists(), sorted(here.rglob("*"))
    return err.strip().splitlines()


SOME_MODEL = {"teacher": "smollm2-135m-instruct"}
MISTAKES = {  # what is done to the recipe, and what must be said
    "unknown top-level key": (put_top(taks="chat"), ["recipe.yaml: taks:", "did you mean 'task'?"]),
    "unknown key of data": (put_data(sample=3), ["recipe.yaml: data.sample:", "did you mean 'samples'?"]),
    "unknown stage": (lambda r: r["stages"].append({"evalute": {}}),
        ["recipe.yaml: stage 6: evalute: unknown stage", "did you mean 'evaluate'?"]),
    "unknown parameter": (put("student", lora_rank=4),
        ["recipe.yaml: stage 'student': lora_rank:", "did you mean 'lora_r'?"]),
    "unknown key of a model": (put("student", model={"name": "x", "layer": 3}),
        ["recipe.yaml: stage 'student': model.layer:", "did you mean 'layers'?"]),
    "wrong type": (put("student", lora_r="many"), ["recipe.yaml: stage 'student': lora_r:", "integer", "'many'"]),
    "a share where a count is wanted": (put("student", lora_r=4.5),
        ["recipe.yaml: stage 'student': lora_r:", "integer", "4.5"]),
    "not one of the choices": (put("annotate", cut_off="maybe"),
        ["recipe.yaml: stage 'annotate': cut_off:", "'trim', 'keep' or 'drop'", "'maybe'"]),
    "unknown metric": (put("evaluate", metrics=["rouge"]),
        ["recipe.yaml: stage 'evaluate': metrics", "'rougeL'", "'rouge'"]),
    "unknown task": (put_top(task="chatt"), ["recipe.yaml: task:", "'cot', 'seq2seq' or 'text'", "'chatt'"]),
    "dangling @id": (put("student", data="@anotate"),
        ["recipe.yaml: stage 'student': data: @anotate:", "did you mean 'annotate'?"]),
    "dangling @id in a table": (put("evaluate", models={"a": "@destilled"}),
        ["recipe.yaml: stage 'evaluate': models", "@destilled:", "did you mean 'distilled'?"]),
    "@id of a later stage": (put("annotate", teacher="@student"),
        ["recipe.yaml: stage 'annotate': teacher: @student:", "no earlier stage"]),
    "@id of itself": (put("student", data="@student"),
        ["recipe.yaml: stage 'student': data: @student:", "no earlier stage"]),
    "@id that makes the wrong thing": (put("distilled", adapter="@annotate"),
        ["recipe.yaml: stage 'distilled': adapter: @annotate makes data, and adapter or model is wanted"]),
    "@id in a table that makes the wrong thing": (put("evaluate", models={"a": "@annotate"}),
        ["recipe.yaml: stage 'evaluate': models", "@annotate makes data, and model or adapter"]),
    "@id where none can be": (put("annotate", system="@student"),
        ["recipe.yaml: stage 'annotate': system: @student:", "cannot point at a stage"]),
    "no data file": (put_data(path="row.jsonl"), ["recipe.yaml: stage 'annotate': data: row.jsonl: no such file"]),
    "a folder as data": (put_data(path="."), ["recipe.yaml: stage 'annotate': data:", "is a folder"]),
    "no such column": (put_data(columns={"prompt": "promt"}),
        ["recipe.yaml: stage 'annotate': data:", "rows.jsonl: columns: prompt:", "did you mean 'prompt'?"]),
    "no such role": (put_data(columns={"promt": "prompt"}),
        ["recipe.yaml: stage 'annotate': data:", "columns: promt:", "did you mean 'prompt'?"]),
    "no such group": (put_data(group="author"),
        ["recipe.yaml: stage 'annotate': data:", "rows.jsonl, row 1:", "group column 'author' is missing"]),
    "nothing left to train on": (put_data(test=30), ["recipe.yaml: stage 'annotate': data:", "leave none to train on"]),
    "nothing left to evaluate on": (put_data(test=0), ["recipe.yaml: stage 'evaluate': data:", "test"]),
    "rows without answers": (lambda r: r.update(stages=r["stages"][1:2]),
        ["recipe.yaml: stage 'student': data:", "row-", "has no answer", "annotate"]),
    "no data at all": (lambda r: r.pop("data") and r.update(stages=r["stages"][:1]),
        ["recipe.yaml: stage 'annotate': data: missing"]),
    "a model that only the hub could have": (put("student", model="some-org/some-model"),
        ["recipe.yaml: stage 'student': model: some-org/some-model:", "hub"]),
    "a misspelt model": (put("annotate", teacher="smollm2-135m-instuct"),
        ["recipe.yaml: stage 'annotate': teacher:", "did you mean 'smollm2-135m-instruct'?"]),
    "a folder without a model": (put("annotate", teacher="./models"),
        ["recipe.yaml: stage 'annotate': teacher: ./models: no model there"]),
    "a folder without an adapter": (put("distilled", adapter="./adapter"),
        ["recipe.yaml: stage 'distilled': adapter: ./adapter: no model there"]),
    "more layers than there are": (lambda r: stage(r, "student")["model"].update(layers=7),
        ["recipe.yaml: stage 'student': model: layers: 7: the model has 6"]),
    "no layers": (lambda r: stage(r, "student")["model"].update(layers=0),
        ["recipe.yaml: stage 'student': model", "layers", "0"]),
    "layers out of order": (lambda r: stage(r, "student")["model"].update(layers=[3, 1]),
        ["recipe.yaml: stage 'student': model: layers: [3, 1]: should be ascending"]),
    "an id used twice": (put("evaluate", id="annotate"), ["recipe.yaml: stage 'annotate': id: used twice"]),
    "an id that is no folder's name": (put("report", id="../x"),
        ["recipe.yaml: stage '../x': id:", "only letters, digits"]),
    "out set by hand": (put("distilled", out="/somewhere"), ["recipe.yaml: stage 'distilled': out:", "--run-dir"]),
    "no teacher": (drop("annotate", "teacher"), ["recipe.yaml: stage 'annotate': teacher: missing"]),
    "no student": (drop("student", "model"), ["recipe.yaml: stage 'student': model: missing"]),
    "no name": (lambda r: r.pop("name"), ["recipe.yaml: name:", "missing"]),
    "a name that is a path": (put_top(name="../x"), ["recipe.yaml: name:", "'../x'"]),
    "no stages": (put_top(stages=[]), ["recipe.yaml: stages:", "at least 1"]),
    "stages as a mapping": (put_top(stages={"sft": {}}), ["recipe.yaml: stages:", "list"]),
    "a stage with two names": (put_top(stages=[{"annotate": SOME_MODEL, "report": {}}]),
        ["recipe.yaml: stage 1:", "one name", "annotate", "report"]),
    "a stage whose parameters are a word": (put_top(stages=[{"annotate": "quickstart"}]),
        ["recipe.yaml: stage", "annotate", "'quickstart'"]),
    "4-bit weights trained whole": (put("student", method="full", model={"name": "smollm2-135m-instruct", "quantize": "4bit"}),
                                    ["recipe.yaml: stage 'student':", "quantize: 4-bit weights cannot be trained", "method: qlora"]),
    "a missing column of the rows that prove a merge": (put("distilled", proof={"path": "rows.jsonl", "columns": {"prompt": "promt"}}),
                                    ["recipe.yaml: stage 'distilled': proof:", "rows.jsonl: columns: prompt:", "did you mean 'prompt'?"]),
    "a word that YAML takes for yes": (put("annotate", labels=["maybe", True]),
                                       ["recipe.yaml: stage 'annotate': labels.1:", "not True", "write the word in quotes"]),
    "a number that should be text": (put("annotate", labels=["maybe", 3]),
        ["stage 'annotate': labels.1:", "not 3: write it in quotes"]),
    "a table of a stage that there is not": (put("evaluate", models="@evalaute"),
        ["stage 'evaluate': models: @evalaute: no earlier stage"]),
    "a table of a stage that has none": (put("evaluate", models="@student"),
        ["stage 'evaluate': models: @student: a sft stage has no models"]),
    "the recipe's data, where it has none": (lambda r: r.update(stages=[{"evaluate": {"models": {"a": "x"}, "data": "@data"}}]) or r.pop("data"),
                                             ["stage 'evaluate': data: @data: the recipe has no data"]),
    "an id that means the data": (put("student", id="data"), ["stage 'data': id: @data is the recipe's own data"]),
    "rows longer than the model's positions": (put("student", max_length=5000),
        ["stage 'student': model:", "4,096 positions", "5,000"]),
    "no such baseline": (put("evaluate", baseline="bas"),
        ["recipe.yaml: stage 'evaluate': baseline:", "did you mean 'base'?"]),
}


OF_WEIGHTS = {"a model that only the hub could have"}  # a run misses the weights, a plan the shape


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_sentence_and_nothing_runs(mistake, here, model, capsys, monkeypatch):
    change, expected = MISTAKES[mistake]
    write_recipe(here, model, change)
    lines = refused(capsys, monkeypatch, here, "run", "recipe.yaml")
    for fragment in expected: assert fragment in lines[0]
    assert len(lines) == 1, "one mistake, and more than one is reported:\n" + "\n".join(lines)
    assert len(lines[0]) < 500, "too long to be read"
    planned = refused(capsys, monkeypatch, here, "plan", "recipe.yaml")
    if mistake in OF_WEIGHTS: assert all(fragment in planned[0] for fragment in expected), "plan says something else"
    else: assert lines == planned, "plan says something else"


def test_the_tiny_recipe_itself_has_no_mistake(here, model):
    "Else the tests above could pass for a reason of their own"
    loaded, file = pipeline.load_recipe(str(write_recipe(here, model)))
    stages = pipeline.check_recipe(loaded, file)
    with pipeline.Opened() as opened: pipeline.check_inputs(stages, file, opened)
    assert [s.id for s in stages] == ["annotate", "student", "distilled", "evaluate", "report"]


def lines_of(rows):
    return "".join(json.dumps(r) + "\n" for r in rows)


def with_row(n, **values):
    rows = prompts()
    rows[n - 1] |= values
    return lines_of(rows)


TORN = {
    "the last row is torn": (lines_of(prompts())[:-20], ["rows.jsonl, line 24:", "cut off"]),
    "a row in the middle is torn": (lines_of(prompts()[:5]) + '{"id": "x", "prom\n' + lines_of(prompts()[5:]),
        ["rows.jsonl, line 6:", "not valid JSON"]),
    "a prompt is a number": (with_row(4, prompt=5), ["rows.jsonl, row 4:", "'prompt'", "text, not int"]),
    "a prompt is a list": (with_row(4, prompt=["a"]), ["rows.jsonl, row 4:", "'prompt'", "text, not list"]),
    "a row is a list": ("[1, 2]\n", ["rows.jsonl, line 1:", "expected an object, found list"]),
    "a row has no prompt": (lines_of(r if n != 7 else {"id": "x", "topic": "rain"} for n, r in enumerate(prompts(), 1)),
        ["rows.jsonl, row 7:", "'prompt' is missing"]),
    "no row has a prompt": (lines_of({"id": r["id"], "frage": "x"} for r in prompts()),
        ["rows.jsonl:", "no column for 'prompt'", "id, frage", "columns: {prompt: ...}"]),
    "an id is used for two texts": (with_row(4, id="row-04"), ["rows.jsonl, row 5:", "'row-04'", "used before"]),
    "a row is in no group": (with_row(4, topic=None), ["rows.jsonl, row 4:", "row-03", "'topic' is missing"]),
    "no rows": ("\n\n", ["rows.jsonl:", "has no rows"]),
    "only blank prompts": (lines_of(r | {"prompt": " "} for r in prompts()),
        ["rows.jsonl:", "no row with a prompt is left"]),
    "half a character": (with_row(4, prompt="what is \ud800?"), ["rows.jsonl, row 4:"]),
}


@pytest.mark.parametrize("mistake", TORN)
def test_a_row_that_cannot_be_read_is_named(mistake, here, model, capsys, monkeypatch):
    text, expected = TORN[mistake]
    write_recipe(here, model)
    (here/"rows.jsonl").write_text(text, encoding="utf-8")
    line, = refused(capsys, monkeypatch, here, "run", "recipe.yaml")
    for fragment in ["recipe.yaml: stage 'annotate': data:", *expected]: assert fragment in line


YAMLS = {
    "cut off": ("name: x\nstages:\n  - sft: {a: 1\n", ["recipe.yaml, line 4: not valid YAML"]),
    "a tab": ("name: x\ntask: chat\nstages:\n\t- sft: {}\n", ["recipe.yaml, line 4: not valid YAML"]),
    "a list": ("- annotate\n- sft\n", ["recipe.yaml: a recipe is a mapping", "not list"]),
    "nothing": ("", ["recipe.yaml: a recipe is a mapping"]),
    "code": ("name: !!python/object/apply:os.system ['touch runs']\n", ["recipe.yaml, line 1: not valid YAML"]),
    "a key twice": ("name: x\nstages:\n  - annotate:\n      teacher: smollm2-135m-instruct\n      seed: 1\n      seed: 2\n",
        ["recipe.yaml, line 6", "seed"]),
}


@pytest.mark.parametrize("mistake", YAMLS)
def test_yaml_that_is_not_a_recipe(mistake, here, capsys, monkeypatch):
    text, expected = YAMLS[mistake]
    (here/"recipe.yaml").write_text(text)
    line, = refused(capsys, monkeypatch, here, "run", "recipe.yaml")
    for fragment in expected: assert fragment in line


OPTIONS = {
    "--set without =": (["run", "--set", "student.lora_r"], ["--set student.lora_r: expected KEY=VALUE"]),
    "--set of nothing": (["run", "--set", "=3"], ["--set =3: expected KEY=VALUE"]),
    "--set of an unknown stage": (["run", "--set", "studnet.lora_r=3"],
        ["--set studnet.lora_r: no such key or stage", "did you mean 'student'?"]),
    "--set of an unknown key": (["run", "--set", "nmae=3"],
        ["--set nmae: no such key or stage", "did you mean 'name'?"]),
    "--set of an unknown parameter": (["run", "--set", "student.lora_rank=3"],
        ["stage 'student': lora_rank:", "did you mean 'lora_r'?"]),
    "--set of a whole stage": (["run", "--set", "student=3"], ["--set student", "student.KEY=VALUE"]),
    "--set of a wrong value": (["run", "--set", "student.lora_r=["], ["stage 'student': lora_r:", "'['"]),
    "--until": (["run", "--until", "studnet"], ["--until studnet: no such stage", "did you mean 'student'?"]),
    "--redo": (["run", "--redo", "merge"], ["--redo merge: no such stage", "distilled"]),
    "--target": (["plan", "--target", "t44"], ["--target t44: unknown machine", "did you mean 't4'?"]),
}


@pytest.mark.parametrize("mistake", OPTIONS)
def test_an_option_that_cannot_be(mistake, here, model, capsys, monkeypatch):
    (command, *options), expected = OPTIONS[mistake]
    write_recipe(here, model)
    line, = refused(capsys, monkeypatch, here, command, "recipe.yaml", *options)
    for fragment in expected: assert fragment in line


def test_a_recipe_that_is_not_there(here, capsys, monkeypatch):
    line, = refused(capsys, monkeypatch, here, "run", "quikstart")
    assert "quikstart: no such recipe, did you mean 'quickstart'?" in line
    line, = refused(capsys, monkeypatch, here, "show", "nothing")
    assert "nothing: no run there" in line


def test_several_mistakes_are_reported_together_and_only_they(here, model, capsys, monkeypatch):
    def change(r):
        stage(r, "annotate").update(cut_of="keep")
        stage(r, "student").update(lora_r="many", epoch=2)
        stage(r, "evaluate")["models"]["other"] = "@nobody"
    write_recipe(here, model, change)
    said = refused(capsys, monkeypatch, here, "run", "recipe.yaml")
    for start in ("stage 'annotate': cut_of:", "stage 'student': lora_r:", "stage 'student': epoch:", "stage 'evaluate': models"):
        assert sum(start in line for line in said) == 1, said
    assert len(said) == 4, said


def test_a_mistake_that_follows_from_another_is_not_said(here, model, capsys, monkeypatch):
    def change(r):
        stage(r, "evaluate").update(sample=3)
        r["stages"].append({"evaluate": {"id": "again", "models": "@evaluate"}})
    write_recipe(here, model, change)
    line, = refused(capsys, monkeypatch, here, "run", "recipe.yaml")
    assert "stage 'evaluate': sample:" in line


def test_several_missing_inputs_are_reported_together(here, model, capsys, monkeypatch):
    def change(r):
        r["data"]["path"] = "row.jsonl"
        stage(r, "annotate")["teacher"] = "./models"
        stage(r, "student")["model"]["layers"] = 70
    write_recipe(here, model, change)
    said = refused(capsys, monkeypatch, here, "run", "recipe.yaml")
    assert len(said) == 3, said


def test_a_mistake_in_what_smoke_changes_is_found_without_smoke(here, model, capsys, monkeypatch):
    write_recipe(here, model, put_top(smoke={"stages": {"studnet": {"max_steps": 1}}}))
    for options in ((), ("--smoke",)):
        line, = refused(capsys, monkeypatch, here, "run", "recipe.yaml", *options)
        assert "recipe.yaml: smoke: stages: studnet: no such stage, did you mean 'student'?" in line


@pytest.mark.parametrize("key, value, found", [
    ("student.lora_r", "3", lambda s: s["student"].lora_r == 3),
    ("stages.student.lora_r", "3", lambda s: s["student"].lora_r == 3),
    ("student.learning_rate", "1e-3", lambda s: s["student"].learning_rate == 1e-3),
    ("evaluate.samples", "null", lambda s: s["evaluate"].samples is None),
    ("evaluate.metrics", "[bleu, chrf]", lambda s: s["evaluate"].metrics == ["bleu", "chrf"]),
    ("evaluate.models.base.layers", "2", lambda s: s["evaluate"].models["base"].layers == 2),
    ("annotate.teacher.layers", "2", lambda s: (s["annotate"].teacher.layers, Path(s["annotate"].teacher.name).name) == (2, "six")),
    ("annotate.system", "'Say: yes = no, please.'", lambda s: s["annotate"].system == "Say: yes = no, please."),
    ("data.samples", "12", lambda s: s["annotate"].data.samples == 12),
    ("data.path", "quickstart", lambda s: s["annotate"].data.path == "quickstart"),
])
def test_set_changes_what_it_names(key, value, found, here, model):
    loaded, file = pipeline.load_recipe(str(write_recipe(here, model)), [f"{key}={value}"])
    assert found({s.id: s.params for s in pipeline.check_recipe(loaded, file)})


def test_a_table_is_taken_over_from_an_earlier_stage_and_data_from_the_recipe(here, model):
    def change(r): r["stages"].append({"evaluate": {"id": "again", "models": "@evaluate", "data": "@data"}})
    loaded, file = pipeline.load_recipe(str(write_recipe(here, model, change)))
    *_, evaluate, _, again = pipeline.check_recipe(loaded, file)
    assert again.params.models == evaluate.params.models and len(again.params.models) == 2
    assert again.params.data == loaded.data and evaluate.params.data == "@annotate"


@pytest.mark.parametrize("code, said", [
    ("#| export\n1 / 0", "own.ipynb: its exported cells fail: ZeroDivisionError: division by zero"),
    ("class Params: pass", "own.ipynb: no cell that begins with `#| export` defines a class Params"),
    ("#| export\nclass Params: pass", "own.ipynb: no cell that begins with `#| export` defines a class Params"),
])
def test_a_stage_of_ones_own_that_is_none(code, said, here, capsys, monkeypatch):
    own_recipe(here, "own")
    write_notebook(here/"own.ipynb", "out: str = ''  # folder", code)
    line, = refused(capsys, monkeypatch, here, "run", "recipe.yaml")
    assert said in line


def test_a_notebook_beside_the_recipe_is_no_stage_without_parameters(here, capsys, monkeypatch):
    file = own_recipe(here, "own")
    file.with_name("own.ipynb").write_text(json.dumps({"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    line, = refused(capsys, monkeypatch, here, "run", "recipe.yaml")
    assert "stage 1: own: unknown stage" in line


def test_a_tilde_is_the_home_folder(here, model, monkeypatch):
    home = here/"home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    write_rows(home/"rows.jsonl", prompts())
    shutil.copytree(model, home/"model")
    write_recipe(here, "~/model", put("annotate", sync_to="~/answers"), "~/rows.jsonl")
    loaded, file = pipeline.load_recipe("recipe.yaml")
    stages = pipeline.check_recipe(loaded, file)
    for s in stages: pipeline.make_local(s, file)
    with pipeline.Opened() as opened: pipeline.check_inputs(stages, file, opened)
    annotate, student, _, evaluate, _ = [s.params for s in stages]
    assert annotate.data.path == str(home/"rows.jsonl") and annotate.sync_to == str(home/"answers")
    assert {annotate.teacher.name, student.model.name, evaluate.models["base"].name} == {str(home/"model")}


@pytest.mark.parametrize("run_dir", ["taken", "taken/below"])
def test_nowhere_to_write_is_one_sentence(run_dir, here, model, capsys, monkeypatch):
    write_recipe(here, model)
    (here/"taken").write_text("a file")
    line, = refused(capsys, monkeypatch, here, "run", "recipe.yaml", "--run-dir", run_dir)
    assert "taken" in line and "cannot be written" in line


def test_a_full_disk_is_one_sentence(here, model, capsys, monkeypatch):
    def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write_recipe(here, model)
    monkeypatch.setattr(os, "fsync", full)
    status, _, err = distill(capsys, monkeypatch, "run", "recipe.yaml")
    assert status == 2 and err.strip().endswith("recipe.yaml: cannot be written: No space left on device") and err.count("\n") == 1


def test_what_was_pasted_is_not_repeated(here):
    with pytest.raises(ValueError) as e: DataSpec(path="rows.jsonl", token="sk-canary")
    assert "token" in str(e.value) and "canary" not in str(e.value)
    with pytest.raises(DistillError) as e: stages_.check(DataSpec, {"path": "x", "seed": {"key": "sk-canary"}}, "here")
    assert "here: seed:" in str(e.value) and "canary" not in str(e.value)


@pytest.mark.parametrize("value, key", [({"a": [1.0, {"b": float("nan")}]}, "a.1.b"), ([float("inf")], "0"), (float("-inf"), "the value")])
def test_a_number_that_is_none_is_named_and_never_written(value, key, here):
    with pytest.raises(DistillError, match=f"loss.json: {key}: is not a finite number"): core.write_json(here/"loss.json", value)
    with pytest.raises(DistillError, match="log.jsonl, line 2: x"): core.write_jsonl(here/"log.jsonl", [{"x": 1}, {"x": value}])
    assert not list(here.iterdir())


def test_a_digest_is_computed_once_and_never_wrong(here, monkeypatch):
    counted, sha256_file = [], core.sha256_file
    monkeypatch.setattr(core, "sha256_file", lambda path: counted.append(path) or sha256_file(path))
    monkeypatch.setattr(core, "_DIGESTS", {})
    monkeypatch.setattr(core, "KEPT_FROM", 4)
    monkeypatch.setenv("DISTILL_NB_CACHE", str(here/"cache"))
    def fresh():
        core._DIGESTS.clear()
        counted.clear()
        return core.file_digest(file), len(counted)
    file, kept = here/"weights", here/"cache"/"digests.sqlite"
    now = time.time()
    def write(data):
        file.write_bytes(data)
        os.utime(file, (now, now))
        return core.file_digest(file)
    assert write(b"many bytes") != write(b"more bytes"), "changed at once: of the same size, and by the disk's clock at the same time"
    os.utime(file, (1, 1))
    assert fresh() == (sha256_file(file), 1)
    assert core.file_digest(file) and len(counted) == 1, "remembered in the process"
    assert fresh() == (sha256_file(file), 0), "kept for the next"
    for damage in (b"no database", kept.read_bytes()[:2000]):
        kept.write_bytes(damage)
        assert fresh() == (sha256_file(file), 1) and fresh() == (sha256_file(file), 0), "made anew"
    file.write_bytes(b"MORE BYTES")
    os.utime(file, (2, 2))
    assert fresh() == (sha256_file(file), 1)
    monkeypatch.setenv("DISTILL_NB_CACHE", str(file/"below"))
    assert fresh() == (sha256_file(file), 1), "nowhere to keep it"


def test_the_real_command_line_says_the_same(tmp_path, model):
    write_recipe(tmp_path, model, put("student", data="@anotate"))
    done = command_line("run", "recipe.yaml", cwd=tmp_path)
    assert (done.status, done.out) == (2, "") and "Traceback" not in done.err
    assert done.err.startswith("recipe.yaml: stage 'student': data: @anotate: no earlier stage has this id, did you mean 'annotate'?")
    assert not (tmp_path/"runs").exists()


@pytest.mark.parametrize("recipe", sorted(pipeline.shipped_recipes()))
@pytest.mark.parametrize("smoke", [False, True])
def test_shipped_recipes_have_no_mistake(recipe, smoke, here):
    loaded, file = pipeline.load_recipe(recipe, smoke=smoke)
    stages = pipeline.check_recipe(loaded, file)
    assert loaded.name == recipe == file.stem and stages


# Properties

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(["\u2028", "a\u2029b\u0085c", "\r\n", "\x0b\x0c\x1c", "\ufeffx", "ঢাকা ।", "🙂\u200d", '"\\n'])
values = st.recursive(st.none() | st.booleans() | st.integers(-2**60, 2**60) | st.floats(allow_nan=False, allow_infinity=False) | text,
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=6)
table = st.lists(st.dictionaries(text, values, max_size=4), max_size=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@quick
@given(rows=table)
def test_rows_come_back_as_they_were_written(folder, rows):
    file = core.write_jsonl(folder/"rows.jsonl", rows)
    assert core.read_jsonl(file) == rows
    assert file.read_bytes().count(b"\n") == len(rows) and b"\r\n" not in file.read_bytes()


@quick
@given(rows=table, cut=st.integers(1, 400))
def test_a_torn_file_is_refused_or_holds_whole_rows_only(folder, rows, cut):
    whole = core.write_jsonl(folder/"rows.jsonl", rows).read_bytes()
    (folder/"torn.jsonl").write_bytes(whole[:-cut])
    with contextlib.suppress(DistillError):
        found = core.read_jsonl(folder/"torn.jsonl")
        assert found == rows[:len(found)]


class Unwritable:
    def __str__(self): raise RuntimeError("no text")


@quick
@given(old=text, rows=table)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(folder, old, rows):
    file = core.write_text(folder/"sub"/"kept.txt", old)
    before = file.read_bytes()
    for fails in (lambda: core.write_jsonl(file, [*rows, {"half a character": "\ud800"}]), lambda: core.write_json(file, [*rows, {"what": Unwritable()}])):
        with pytest.raises(Exception): fails()
        assert file.read_bytes() == before
    with pytest.raises(RuntimeError):
        with core.atomic_path(file) as temporary:
            temporary.write_text("half of it")
            raise RuntimeError("killed")
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == ["kept.txt"]


def test_a_write_never_shows_half_a_file(folder, monkeypatch):
    "What stands under the name is the old file until the new one is whole and on the disk"
    file = core.write_text(folder/"whole.txt", "old")
    seen, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(("flushed", file.read_text())), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append((Path(a).read_text(), file.read_text())), replace(a, b)))
    core.write_text(file, "new")
    assert seen == [("flushed", "old"), ("new", "old")] and file.read_text() == "new"


def test_a_write_that_cannot_be_done_names_the_file(folder):
    (folder/"taken").mkdir(exist_ok=True)
    with pytest.raises(DistillError, match="taken.*cannot be written"): core.write_text(folder/"taken", "x")
    assert not [p for p in folder.iterdir() if p.name.endswith(".tmp")]


answers = st.lists(st.sampled_from(["Bees", " store", "it", ". ", ".", "!", "? ", " ", "\n", "1. ", "12. ", "3.5", "।", "。", "’", '"', ")", "e.g. ", "ঢাকা", "...", "\u2028"]) | text,
                   max_size=12).map("".join)


@quick
@given(answers)
def test_a_trimmed_answer_is_a_prefix_that_ends_a_sentence(answer):
    trimmed = generate.trim_answer(answer)
    assert answer.startswith(trimmed)
    assert trimmed == "" or trimmed.rstrip("\"'”’)]")[-1:] in set(".!?।。！？"), trimmed
    assert generate.trim_answer(trimmed) == trimmed
    if re.fullmatch(r"[A-Za-z ]+[.!?]", answer): assert trimmed == answer


@quick
@given(st.integers(1, 200), st.data())
def test_layers_that_stay_are_even_and_hold_both_ends(total, drawn):
    keep = drawn.draw(st.integers(1, total))
    kept = models.even_layers(total, keep)
    assert len(kept) == keep and kept == sorted(set(kept)) and kept[0] == 0
    if keep > 1:
        gaps = [b - a for a, b in zip(kept, kept[1:])]
        assert kept[-1] == total - 1 and max(gaps) - min(gaps) <= 1
    assert models.even_layers(total, kept) == kept


@quick
@given(st.integers(1, 20), st.lists(st.integers(-3, 25), max_size=6) | st.integers(-3, 25))
def test_layers_are_refused_or_those_of_the_model(total, keep):
    try: kept = models.even_layers(total, keep)
    except DistillError as e: assert "layers" in str(e)
    else: assert kept and set(kept) <= set(range(total)) and kept == sorted(set(kept))


def test_a_bare_stage_name_can_be_set(tmp_path):
    "`- report` is `- report: {}`, for --set and smoke too, which look for stages before the recipe is checked"
    (tmp_path/"bare.yaml").write_text("name: bare\nstages:\n  - merge\n  - report\nsmoke: {stages: {merge: {proof_rows: 2}}}\n")
    recipe, _ = pipeline.load_recipe(str(tmp_path/"bare.yaml"), ["report.answers=3"], smoke=True)
    assert recipe.stages == [{"merge": {"proof_rows": 2}}, {"report": {"answers": 3}}]
    assert pipeline.load_recipe(str(tmp_path/"bare.yaml"))[0].stages == [{"merge": None}, {"report": None}]


def test_a_plan_stands_in_for_rows_that_only_the_hub_has_and_a_run_does_not(here, model, capsys, monkeypatch):
    write_recipe(here, model, lambda r: r.update(data={"path": "owner/rows", "skip": 10, "samples": 30, "validation": 4, "test": 4}))
    status, out, err = distill(capsys, monkeypatch, "plan", "recipe.yaml")
    assert status == 0 and "owner/rows: the hub cannot be reached; planned with 40 rows" in out and "4 steps of 4 rows" in out, out + err
    line = refused(capsys, monkeypatch, here, "run", "recipe.yaml")[0]
    assert "owner/rows: no such file here, and the hub gave no such data set" in line


def test_a_stage_is_left_out_and_its_rows_are_the_recipes(here, model):
    write_recipe(here, model, lambda r: r["stages"][1]["sft"].update(data={"path": "@data", "samples": 12}))
    recipe, file = pipeline.load_recipe("recipe.yaml", ["annotate=null"])
    stages = pipeline.check_recipe(recipe, file)
    assert [s.id for s in stages] == ["student", "distilled", "evaluate", "report"]
    assert stages[0].params.data.samples == 12 and stages[0].params.data.group == "topic"
    assert stages[2].params.data.samples is None and stages[2].params.data.path == "rows.jsonl"
