"""Whole runs through the real command line: what is reused, what is run again, and what a kill leaves."""
import json
import os
import re
import secrets
import shutil
import signal
import sqlite3
from types import SimpleNamespace

import pytest

from distill_nb import pipeline
from distill_nb.hardware import plan_hardware
from distill_nb.run import plan
from distill_nb.core import read_json, read_jsonl

from conftest import ROOT, command_line, snapshot, wait_gone, write_recipe

IDS = ["annotate", "student", "distilled", "evaluate", "report"]
FOLDERS = [f"{n:02d}-{id}" for n, id in enumerate(IDS, 1)]
# What papermill must carry into a notebook unchanged.
SYSTEM = "Say \"yes\" or 'no'.\nC:\\new\t{x} %s ${HOME} '''\"\"\" ঢাকা \u2028 @annotate"
HEAD = re.compile(r"^\[\d/5\] (\S+) \(\w+\): (run|resume|reused)\b", re.M)


def heads(out):
    "What was said of each stage: id, and run, resume or reused"
    return HEAD.findall(out)


def manifests(run):
    return {f.parent.name: read_json(f) for f in sorted(run.glob("*/manifest.json"))}


def set_annotate(**values):
    return lambda recipe: recipe["stages"][0]["annotate"].update(values)


def slowly(recipe):
    "So many small batches that a kill falls between two"
    set_annotate(batch_size=1, max_new_tokens=64)(recipe)


@pytest.fixture(scope="module")
def finished(model, rows, tmp_path_factory):
    "One finished run of the tiny recipe; no test changes it"
    folder = tmp_path_factory.mktemp("finished")
    write_recipe(folder, model, set_annotate(system=SYSTEM), rows)
    canary = "canary" + secrets.token_hex(16)
    done = command_line("run", "recipe.yaml", cwd=folder, env={"OPENAI_API_KEY": canary, "HF_TOKEN": canary})
    assert done.status == 0, done.out + done.err
    return SimpleNamespace(folder=folder, run=folder/"runs"/"tiny", out=done.out, err=done.err, canary=canary)


@pytest.fixture
def work(finished, tmp_path):
    "A copy of the finished run, times included, to be changed"
    shutil.copytree(finished.folder, tmp_path/"work", copy_function=shutil.copy2)
    return SimpleNamespace(folder=tmp_path/"work", run=tmp_path/"work"/"runs"/"tiny")


def again(work, *options, **more):
    return command_line("run", "recipe.yaml", *options, cwd=work.folder, **more)


def states(work, *sets, redo=None, change=None):
    "What a run would do with each stage"
    loaded, file = pipeline.load_recipe(str(work.folder/"recipe.yaml"), sets)
    if change: change(loaded)
    stages = pipeline.check_recipe(loaded, file)
    for s in stages: pipeline.make_local(s, file)
    pipeline.arrange_folders(stages, work.run)
    plan.take_fingerprints(stages, plan_hardware())
    for n, s in enumerate(stages): plan.decide(s, plan.depends_on(s, stages[:n]), work.run, s.id == redo)
    return {s.id: s.state for s in stages}


def from_here_on(id):
    "Everything before a stage is reused; it, and all that follows, is run"
    return {i: "reuse" if IDS.index(i) < IDS.index(id) else "run" for i in IDS}


# What a finished run is

def test_a_run_leaves_what_the_design_promises(finished):
    assert heads(finished.out) == [(i, "run") for i in IDS]
    found = manifests(finished.run)
    assert list(found) == FOLDERS and [m["stage"] for m in found.values()] == ["annotate", "sft", "merge", "evaluate", "report"]
    for name, m in found.items():
        assert m["end"] >= m["start"] and m["packages"]["torch"] and m["outputs"], name
        assert (finished.run/name/"notebook.ipynb").exists() and (finished.run/name/"stage.log").exists()
        assert not [p for p in (finished.run/name).rglob("*") if p.name.endswith((".tmp", "pending.json")) or p.name == "checkpoints"], name
    for name in ("report.html", "report.md", "report.json", "results.txt", "recipe.yaml"): assert (finished.run/name).stat().st_size
    assert (finished.run/"results.txt").read_text(encoding="utf-8").strip() in finished.out
    for split, n in (("train", 16), ("validation", 4), ("test", 4)):
        rows = read_jsonl(finished.run/"01-annotate"/f"{split}.jsonl")
        assert len(rows) == n and all([m["role"] for m in r["messages"]] == ["system", "user", "assistant"] for r in rows)
        assert {r["messages"][0]["content"] for r in rows} == {SYSTEM}, "papermill changed a parameter"
    assert "Traceback" not in finished.out + finished.err


def test_a_finished_run_is_shown(finished):
    done = command_line("show", "tiny", cwd=finished.folder)
    assert done.status == 0 and all(f"{f}: done" in done.out for f in FOLDERS) and "report.html" in done.out


def test_secrets_are_in_no_file(finished):
    hidden = finished.canary.encode()
    files = [p for p in finished.folder.rglob("*") if p.is_file()]
    assert len(files) > 30 and not [p for p in files if hidden in p.read_bytes()]
    assert finished.canary not in finished.out + finished.err


def test_the_resolved_recipe_says_the_same_as_the_recipe(finished):
    "What is written down can be run: every default is filled in, and no stage would be run again"
    resolved = SimpleNamespace(folder=finished.run, run=finished.run)
    assert states(resolved) == dict.fromkeys(IDS, "reuse")


# What is reused

def test_a_second_run_reuses_everything_and_touches_nothing(work):
    before = snapshot(work.run)
    (work.run/"report.html").unlink()  # the page is put back from the report's own folder
    done = again(work)
    assert done.status == 0, done.err
    assert heads(done.out) == [(i, "reused") for i in IDS]
    after = snapshot(work.run)
    assert before.pop("recipe.yaml")[0] == after.pop("recipe.yaml")[0]
    assert after.pop("report.html")[0] == before.pop("report.html")[0]
    assert after == before


def replace(file, change):
    file.write_bytes(change(file.read_bytes()))
    os.utime(file, (1, 1))


DECISIONS = {
    "nothing": (lambda w: states(w), dict.fromkeys(IDS, "reuse")),
    "a parameter of report": (lambda w: states(w, "report.title=Mine"), from_here_on("report")),
    "a parameter of evaluate": (lambda w: states(w, "evaluate.samples=3"), from_here_on("evaluate")),
    "a parameter of student": (lambda w: states(w, "student.epochs=2"), from_here_on("student")),
    "a parameter of annotate": (lambda w: states(w, "annotate.max_new_tokens=9"), from_here_on("annotate")),
    "the seed of the split": (lambda w: states(w, "data.seed=1"), from_here_on("annotate")),
    "asked for": (lambda w: states(w, redo="evaluate"), from_here_on("evaluate")),
    "rows deleted": (lambda w: (w.run/"01-annotate"/"test.jsonl").unlink() or states(w), from_here_on("annotate")),
    "an adapter cut off": (lambda w: replace(w.run/"02-student"/"adapter"/"adapter_model.safetensors", lambda b: b[:-1]) or states(w), from_here_on("student")),
    "one byte of an adapter": (lambda w: replace(w.run/"02-student"/"adapter"/"adapter_model.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1])) or states(w), from_here_on("student")),
    "the metrics edited": (lambda w: replace(w.run/"04-evaluate"/"metrics.json", lambda b: b.replace(b"bleu", b"BLEU")) or states(w), from_here_on("evaluate")),
    "touched, content the same": (lambda w: replace(w.run/"02-student"/"adapter"/"adapter_model.safetensors", lambda b: b) or states(w), dict.fromkeys(IDS, "reuse")),
    "a file of somebody else's beside them": (lambda w: (w.run/"notes.txt").write_text("mine") and states(w), dict.fromkeys(IDS, "reuse")),
    "begun, not done": (lambda w: (w.run/"03-distilled"/"manifest.json").unlink() or states(w), from_here_on("distilled") | {"distilled": "resume"}),
    "never begun": (lambda w: shutil.rmtree(w.run/"03-distilled") or states(w), from_here_on("distilled")),
}


@pytest.mark.parametrize("change", DECISIONS)
def test_what_changed_decides_what_is_run_again(change, work):
    act, expected = DECISIONS[change]
    assert act(work) == expected


def test_a_stage_put_between_others_moves_them_and_runs_alone(work):
    def change(recipe): recipe.stages.insert(1, {"evaluate": {"id": "early", "models": {"base": "smollm2-135m-instruct"}, "samples": 1}})
    assert states(work, change=change) == dict.fromkeys(IDS, "reuse") | {"early": "run", "report": "run"}
    assert sorted(p.name for p in work.run.glob("0*")) == ["01-annotate", "03-student", "04-distilled", "05-evaluate", "06-report"]
    assert states(work) == dict.fromkeys(IDS, "reuse"), "and back again"


def test_a_stage_that_is_no_longer_there_is_put_aside_not_deleted(work):
    before = snapshot(work.run/"02-student")
    states(work, "student.id=pupil", "distilled.adapter=@pupil")
    kept, = (work.run/"aside").iterdir()
    assert snapshot(kept) == before


def test_a_change_of_evaluate_runs_evaluate_and_report(work):
    before = {f: snapshot(work.run/f) for f in FOLDERS[:3]}
    done = again(work, "--set", "evaluate.samples=3")
    assert done.status == 0, done.err
    assert heads(done.out) == [("annotate", "reused"), ("student", "reused"), ("distilled", "reused"), ("evaluate", "run"), ("report", "run")]
    assert {f: snapshot(work.run/f) for f in FOLDERS[:3]} == before
    metrics = read_json(work.run/"04-evaluate"/"metrics.json")
    assert metrics["base"]["bleu"]["n"] == 3 and read_json(work.run/"report.json")["evaluations"][0]["metrics"]["base"]["bleu"]["n"] == 3


def test_a_change_of_student_stops_at_until_and_the_rest_is_then_stale(work):
    sets = ("--set", "student.max_steps=2")
    done = again(work, *sets, "--until", "student")
    assert done.status == 0, done.err
    assert heads(done.out) == [("annotate", "reused"), ("student", "run")]
    assert [r["step"] for r in read_jsonl(work.run/"02-student"/"train_log.jsonl") if "loss" in r] == [1, 2]
    assert states(work, "student.max_steps=2") == from_here_on("distilled")
    plan = command_line("plan", "recipe.yaml", *sets, cwd=work.folder)
    assert plan.status == 0 and re.findall(r"^\d\. (\S+) \(\w+\): (\w+)", plan.out, re.M) == list(from_here_on("distilled").items()), plan.out


def test_redo_and_a_deleted_output(work):
    was = manifests(work.run)
    (work.run/"03-distilled"/"model"/"README.md").unlink()
    done = again(work, "--until", "distilled")
    assert done.status == 0, done.err
    assert heads(done.out) == [("annotate", "reused"), ("student", "reused"), ("distilled", "run")]
    assert (work.run/"03-distilled"/"model"/"README.md").exists() and states(work) == from_here_on("evaluate")

    done = again(work, "--redo", "report")
    assert done.status == 0, done.err
    assert heads(done.out) == [("annotate", "reused"), ("student", "reused"), ("distilled", "reused"), ("evaluate", "run"), ("report", "run")]
    now = manifests(work.run)
    assert [f for f in FOLDERS if now[f]["run"] != was[f]["run"]] == FOLDERS[2:]


def test_an_edited_notebook_is_a_change(work, tmp_path):
    "In a copy of the package, which the command line and the kernel are made to import"
    for part in ("distill_nb", "nbs"):
        shutil.copytree(ROOT/part, tmp_path/"package"/part, ignore=shutil.ignore_patterns("runs", "__pycache__", ".ipynb_checkpoints"))
    notebook, = (tmp_path/"package"/"nbs").glob("*_report.ipynb")
    cells = json.loads(notebook.read_text(encoding="utf-8"))
    cells["cells"][-1]["source"] = [*cells["cells"][-1]["source"], "\nprint('edited', finish_stage.__code__.co_filename)"]
    notebook.write_text(json.dumps(cells), encoding="utf-8")
    done = again(work, env={"PYTHONPATH": str(tmp_path/"package")})
    assert done.status == 0, done.err
    assert heads(done.out) == [(i, "reused") for i in IDS[:4]] + [("report", "run")]
    assert f"edited {tmp_path/'package'/'distill_nb'}" in (work.run/"05-report"/"stage.log").read_text(encoding="utf-8")


# Kills

def answers_in(journal):
    "key: time at which it was given"
    db = sqlite3.connect(f"file:{journal}?mode=ro", uri=True)
    found = dict(db.execute("select id, at from entries where kind = 'answer'"))
    db.close()
    return found


def end(run, way):
    "End a run in one of three ways; gives what may still be alive"
    if way == "everything killed": return run.kill_all() or []
    if way == "only distill-nb killed": return run.kill_parent()
    left = run.family()[1:]
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(60) == 130
    run.reader.join(60)
    for p in left: wait_gone(p)
    assert "interrupted; the same command continues from here" in run.out and "Traceback" not in run.out, run.out
    return []


@pytest.mark.parametrize("way", ["everything killed", "only distill-nb killed", "ctrl-c"])
def test_annotation_goes_on_after(way, tmp_path, model, rows, started, distill):
    write_recipe(tmp_path, model, slowly, rows)
    run_dir = tmp_path/"runs"/"tiny"
    assert distill("show", "tiny").status == 2, "there is no run yet"

    run = started("run", "recipe.yaml", "--until", "annotate")
    if way == "everything killed":  # while it runs: nobody else may
        run.wait_for(lambda: "[1/5]" in run.out, "the first stage began")
        second = distill("run", "recipe.yaml")
        assert second.status == 2 and second.out == "" and "another process" in second.err and len(second.err.splitlines()) == 1, second.err
    run.wait_for(lambda: "teacher: 1 of 24 answers" in run.out, "the first answer")
    left = end(run, way)
    if not left:
        paid = answers_in(run_dir/"01-annotate"/"journal.sqlite")
        assert 1 <= len(paid) < 24, f"{len(paid)} answers: the kill came too late to show anything"
        shown = distill("show", "tiny")
        assert shown.status == 0 and "01-annotate: unfinished" in shown.out and "02-student: not started" in shown.out

    done = distill("run", "recipe.yaml", "--until", "annotate")
    assert done.status == 0, done.err
    assert heads(done.out) == [("annotate", "resume")]
    known = int(re.search(r"teacher: (\d+) of 24 answers are in the journal already", done.out)[1])
    assert 1 <= known and f"teacher: 1 of {24 - known} answers" in done.out
    after = answers_in(run_dir/"01-annotate"/"journal.sqlite")
    assert len(after) == 24
    if not left: assert known == len(paid) and {k: after[k] for k in paid} == paid
    assert sorted(len(read_jsonl(run_dir/"01-annotate"/f"{s}.jsonl")) for s in ("train", "validation", "test")) == [4, 4, 16]
    for p in left: wait_gone(p)


@pytest.mark.parametrize("way", ["everything killed", "only distill-nb killed"])
def test_training_goes_on_after(way, work, started):
    options = ("--set", "student.max_steps=30") + (() if way == "everything killed" else ("--until", "student"))
    student = work.run/"02-student"
    run = started("run", "recipe.yaml", *options, cwd=work.folder)
    run.wait_for(lambda: list(student.glob("checkpoints/checkpoint-*/complete")), "the first whole checkpoint")
    left = end(run, way)
    assert not (student/"manifest.json").exists() and not (student/"adapter").exists()
    if not left:
        (student/"checkpoints"/"checkpoint-29").mkdir(exist_ok=True)  # as a kill in the middle of a checkpoint leaves it
        (student/"checkpoints"/"checkpoint-29"/"trainer_state.json").write_text("{")
        (student/"checkpoints"/"checkpoint-29"/"complete").unlink(missing_ok=True)

    done = again(work, *options)
    assert done.status == 0, done.out + done.err
    assert heads(done.out)[:2] == [("annotate", "reused"), ("student", "resume")]
    at = int(re.search(r"goes on from checkpoint-(\d+)", done.out)[1])
    assert 1 <= at < 29
    assert [r["step"] for r in read_jsonl(student/"train_log.jsonl") if "loss" in r] == list(range(1, 31))
    if way == "everything killed":
        assert heads(done.out)[2:] == [("distilled", "run"), ("evaluate", "run"), ("report", "run")]
        assert list(manifests(work.run)) == FOLDERS
    for p in left: wait_gone(p)


# Failures

def test_a_stage_that_fails_says_one_sentence_and_keeps_what_was_paid_for(tmp_path, model, rows, distill):
    write_recipe(tmp_path, model, set_annotate(cut_off="drop"), rows)
    failed = distill("run", "recipe.yaml", "--until", "annotate")
    assert failed.status == 1
    said = failed.err.strip().splitlines()
    assert said[0].startswith("stage 'annotate' stopped: no usable answer is left for train:") and "cut_off: keep" in said[0]
    assert said[-1] == "the same command continues from here" and len(said) <= 3
    assert "Traceback" not in failed.out + failed.err and "[31m" not in failed.out + failed.err
    assert not (tmp_path/"runs"/"tiny"/"01-annotate"/"manifest.json").exists()

    done = distill("run", "recipe.yaml", "--until", "annotate", "--set", "annotate.cut_off=keep")
    assert done.status == 0, done.err
    assert "teacher: 24 of 24 answers are in the journal already" in done.out


def test_a_late_failure_leaves_the_earlier_stages(work):
    before = {f: snapshot(work.run/f) for f in FOLDERS[:2]}
    failed = again(work, "--set", "distilled.tolerance=1e-30")
    assert failed.status == 1 and "stage 'distilled' stopped: the merged model is not faithful" in failed.err and "Traceback" not in failed.out + failed.err
    assert {f: snapshot(work.run/f) for f in FOLDERS[:2]} == before
    assert states(work) == from_here_on("distilled")
    shown = command_line("show", "tiny", cwd=work.folder).out
    assert "02-student: done" in shown and "03-distilled: unfinished" in shown


# The real thing

def test_the_quickstart_with_real_models_and_unsloth(tmp_path):
    canary = "canary" + secrets.token_hex(16)
    sets = ["data.samples=24", "data.validation=3", "data.test=4", "annotate.cut_off=keep", "annotate.max_new_tokens=16", "student.model.layers=6",
            "student.max_length=64", "evaluate.models.base.layers=6", "evaluate.max_new_tokens=8", "evaluate.resamples=100", "distilled.proof_rows=2"]
    done = command_line("run", "quickstart", "--smoke", *[x for s in sets for x in ("--set", s)], cwd=tmp_path, timeout=900,
                        env={"OPENAI_API_KEY": canary, "HF_TOKEN": canary, "OMP_NUM_THREADS": str(os.cpu_count())})
    assert done.status == 0, done.out + done.err
    run = tmp_path/"runs"/"quickstart-smoke"
    found = manifests(run)
    assert list(found) == FOLDERS
    assert found["02-student"]["hardware"]["engine"] == "unsloth" and found["02-student"]["packages"]["unsloth"]
    for name in ("results.txt", "report.md", "report.json", "report.html"): assert (run/name).stat().st_size
    metrics = read_json(run/"04-evaluate"/"metrics.json")
    assert set(metrics) == {"base", "distilled", "teacher", "paired"}
    for model in ("base", "distilled", "teacher"):
        assert set(metrics[model]) >= {"bleu", "rougeL", "perplexity"}
        for m in metrics[model].values():
            assert set(m) == {"value", "low", "high", "n", "backend"} and m["low"] <= m["value"] <= m["high"] and m["n"] >= 4 and m["backend"]
    proof = read_json(run/"03-distilled"/"merge.json")
    assert 0 <= proof["max_abs_logit_difference"] <= proof["tolerance"] <= 1e-3 and proof["max_abs_logit"] > 1
    losses = [r["loss"] for r in read_jsonl(run/"02-student"/"train_log.jsonl") if "loss" in r]
    assert len(losses) == 2
    config = read_json(run/"03-distilled"/"model"/"config.json")
    assert config["num_hidden_layers"] == 6 and "quantization_config" not in config
    # The teacher is a real model: it must find its own answers far likelier than a model with most of its layers cut out does.
    assert metrics["teacher"]["perplexity"]["value"] < metrics["base"]["perplexity"]["value"] / 2
    hidden = [p for p in tmp_path.rglob("*") if p.is_file() and canary.encode() in p.read_bytes()]
    assert not hidden and canary not in done.out + done.err
