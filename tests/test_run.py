"""Whole runs through the real command line: what is reused, what is run again, and what a kill leaves."""
import json
import os
import re
import secrets
import shutil
import signal
import sqlite3
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from distill_nb import core, pipeline
from distill_nb.core import DistillError, read_json, read_jsonl
from distill_nb.hardware import TARGETS, plan_hardware
from distill_nb.run import check, plan
from distill_nb.run.recipe import load_recipe
from distill_nb.stage import ModelRef, ModelSpec, StageParams

from conftest import (OWN_STAGE, ROOT, TRAINING, command_line, own_recipe, prompts, snapshot, wait_gone, write_notebook,
                      write_recipe, write_rows)

IDS = ["annotate", "student", "distilled", "evaluate", "report"]
FOLDERS = [f"{n:02d}-{id}" for n, id in enumerate(IDS, 1)]
# What papermill must carry into a notebook unchanged.
SYSTEM = "Say \"yes\" or 'no'.\nC:\\new\t{x} %s ${HOME} '''\"\"\" ঢাকা \u2028 @annotate"
HEAD = re.compile(r"^\[\d/\d\] (\S+) \(\w+\): (run|resume|reused)\b", re.M)


def heads(out):
    "What was said of each stage: id, and run, resume or reused"
    return HEAD.findall(out)


def manifests(run):
    return {f.parent.name: read_json(f) for f in sorted(run.glob("*/manifest.json"))}


def set_annotate(**values):
    return lambda recipe: recipe["stages"][0]["annotate"].update(values)


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


def stages_in(folder, *sets, change=None):
    "The checked stages of the recipe in a folder"
    loaded, file = load_recipe(str(folder/"recipe.yaml"), sets)
    if change: change(loaded)
    stages = check.check_recipe(loaded, file)
    for s in stages: check.make_local(s, file)
    return stages


def states(work, *sets, redo=None, change=None):
    "What a run would do with each stage"
    stages = stages_in(work.folder, *sets, change=change)
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
        folder = finished.run/name
        assert m["end"] >= m["start"] and m["packages"]["torch"] and m["outputs"], name
        assert (folder/"notebook.ipynb").exists() and (folder/"stage.log").exists()
        assert not [p for p in folder.rglob("*") if p.name.endswith((".tmp", "pending.json")) or p.name == "checkpoints"], name
    for name in ("report.html", "report.md", "report.json", "results.txt", "recipe.yaml"):
        assert (finished.run/name).stat().st_size
    assert (finished.run/"results.txt").read_text(encoding="utf-8").strip() in finished.out
    for split, n in (("train", 16), ("validation", 4), ("test", 4)):
        rows = read_jsonl(finished.run/"01-annotate"/f"{split}.jsonl")
        assert len(rows) == n and all([m["role"] for m in r["messages"]] == ["system", "user", "assistant"] for r in rows)
        assert {r["messages"][0]["content"] for r in rows} == {SYSTEM}, "papermill changed a parameter"
    assert "Traceback" not in finished.out + finished.err


def test_a_finished_run_is_shown(finished):
    shown = pipeline.show_run(finished.run)
    assert all(f"{f}: done" in shown for f in FOLDERS) and "report.html" in shown


def test_secrets_are_in_no_file(finished):
    hidden = finished.canary.encode()
    files = [p for p in finished.folder.rglob("*") if p.is_file()]
    assert len(files) > 30 and not [p for p in files if hidden in p.read_bytes()]
    assert finished.canary not in finished.out + finished.err


def test_every_json_of_a_run_is_json_to_any_reader(finished):
    "No NaN, no infinity"
    def refuse(word): raise AssertionError(word)
    files = list(finished.run.rglob("*.json"))
    assert len(files) > 15
    for f in files: json.loads(f.read_text(encoding="utf-8"), parse_constant=refuse)
    for f in finished.run.rglob("*.jsonl"):
        if f.parent.name == "shards": continue  # their lines begin with a checksum
        for line in f.read_text(encoding="utf-8").split("\n"): line and json.loads(line, parse_constant=refuse)


def test_the_resolved_recipe_says_the_same_as_the_recipe(finished):
    "What is written down can be run: every default is filled in, and no stage would be run again"
    assert states(SimpleNamespace(folder=finished.run, run=finished.run)) == dict.fromkeys(IDS, "reuse")


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


def flip(data): return data[:-1] + bytes([data[-1] ^ 1])


REUSED = dict.fromkeys(IDS, "reuse")
ADAPTER = Path("02-student", "adapter", "adapter_model.safetensors")
DECISIONS = {  # what is set, what is done to the run before, and what would be run
    "nothing": ((), None, REUSED),
    "a parameter of report": (("report.title=Mine",), None, from_here_on("report")),
    "a parameter of evaluate": (("evaluate.samples=3",), None, from_here_on("evaluate")),
    "a parameter of student": (("student.epochs=2",), None, from_here_on("student")),
    "a parameter of annotate": (("annotate.max_new_tokens=9",), None, from_here_on("annotate")),
    "the seed of the split": (("data.seed=1",), None, from_here_on("annotate")),
    "a runtime parameter of each": (("student.save_steps=3", "evaluate.batch_size=1", "annotate.max_tokens=99999"), None, REUSED),
    "rows deleted": ((), lambda run: (run/"01-annotate"/"test.jsonl").unlink(), from_here_on("annotate")),
    "an output of the merge deleted": ((), lambda run: (run/"03-distilled"/"model"/"README.md").unlink(), from_here_on("distilled")),
    "an adapter cut off": ((), lambda run: replace(run/ADAPTER, lambda b: b[:-1]), from_here_on("student")),
    "one byte of an adapter": ((), lambda run: replace(run/ADAPTER, flip), from_here_on("student")),
    "the metrics edited": ((), lambda run: replace(run/"04-evaluate"/"metrics.json", lambda b: b.replace(b"bleu", b"BLEU")),
                           from_here_on("evaluate")),
    "touched, content the same": ((), lambda run: replace(run/ADAPTER, lambda b: b), REUSED),
    "a file of somebody else's beside them": ((), lambda run: (run/"notes.txt").write_text("mine"), REUSED),
    "begun, not done": ((), lambda run: (run/"03-distilled"/"manifest.json").unlink(),
                        from_here_on("distilled") | {"distilled": "resume"}),
    "never begun": ((), lambda run: shutil.rmtree(run/"03-distilled"), from_here_on("distilled")),
}


@pytest.mark.parametrize("change", DECISIONS)
def test_what_changed_decides_what_is_run_again(change, work):
    sets, act, expected = DECISIONS[change]
    if act: act(work.run)
    assert states(work, *sets) == expected


def test_a_stage_is_done_again_when_it_is_asked_for_and_so_is_what_follows(work):
    assert states(work, redo="evaluate") == from_here_on("evaluate")
    file = work.run/"02-student"/"manifest.json"  # as another run of it would leave
    file.write_text(json.dumps(read_json(file) | {"run": "another"}))
    assert states(work) == from_here_on("distilled")


def test_a_run_that_was_moved_goes_on(work, tmp_path):
    (work.run/"03-distilled"/"manifest.json").unlink()
    shutil.move(work.folder, tmp_path/"elsewhere")
    moved = SimpleNamespace(folder=tmp_path/"elsewhere", run=tmp_path/"elsewhere"/"runs"/"tiny")
    stages = stages_in(moved.folder)
    assert states(moved) == from_here_on("distilled") | {"distilled": "resume"}
    plan.take_fingerprints(stages, plan_hardware())
    stages[2].state = "resume"
    (moved.run/"03-distilled"/"half").write_text("of the work")
    params = pipeline.stage_parameters(stages[2], stages, moved.run)
    pipeline.prepare_folder(stages[2], params, stages[1:2], moved.run)
    assert (moved.run/"03-distilled"/"half").exists()


def test_a_stage_put_between_others_moves_them_and_runs_alone(work):
    def change(recipe):
        early = {"id": "early", "models": {"base": "smollm2-135m-instruct"}, "samples": 1}
        recipe.stages.insert(1, {"evaluate": early})
    assert states(work, change=change) == REUSED | {"early": "run", "report": "run"}
    assert sorted(p.name for p in work.run.glob("0*")) == ["01-annotate", "03-student", "04-distilled", "05-evaluate", "06-report"]
    assert states(work) == REUSED, "and back again"


def test_a_stage_that_is_no_longer_there_is_put_aside_not_deleted(work):
    before = snapshot(work.run/"02-student")
    states(work, "student.id=pupil", "distilled.adapter=@pupil")
    kept, = (work.run/"aside").iterdir()
    assert snapshot(kept) == before


def test_a_difference_between_versions_of_libraries_is_said_and_not_acted_on(work):
    file = work.run/"02-student"/"manifest.json"
    m = read_json(file)
    file.write_text(json.dumps(m | {"packages": m["packages"] | {"trl": "0.1", "distill_nb": "0.0"}}))
    stages = stages_in(work.folder)
    plan.take_fingerprints(stages, plan_hardware())
    for n, s in enumerate(stages): plan.decide(s, plan.depends_on(s, stages[:n]), work.run)
    assert {s.state for s in stages} == {"reuse"}
    assert ["trl was 0.1, is" in s.why for s in stages] == [False, True, False, False, False]
    assert not any("distill_nb" in s.why for s in stages), "its code is compared as code"


def test_what_changed_is_said(work):
    stages = stages_in(work.folder, "student.epochs=2", "distilled.proof_rows=1")
    plan.take_fingerprints(stages, plan_hardware())
    for n, s in enumerate(stages): plan.decide(s, plan.depends_on(s, stages[:n]), work.run)
    assert [s.why for s in stages[1:3]] == ["parameters changed", "student is newer"]


def test_evaluate_and_the_report_alone_are_run_again_in_another_copy_of_the_package(work, tmp_path):
    "The command line and the kernel are made to import a copy, whose report was edited"
    package = tmp_path/"package"
    for part in ("distill_nb", "nbs"):
        shutil.copytree(ROOT/part, package/part, ignore=shutil.ignore_patterns("runs", "__pycache__", ".ipynb_checkpoints"))
    edit(package, "report", "print('edited', finish_stage.__code__.co_filename)")
    before = {f: snapshot(work.run/f) for f in FOLDERS[:3]}
    done = again(work, "--set", "evaluate.samples=3", env={"PYTHONPATH": str(package)})
    assert done.status == 0, done.err
    assert heads(done.out) == [(i, "reused") for i in IDS[:3]] + [("evaluate", "run"), ("report", "run")]
    assert {f: snapshot(work.run/f) for f in FOLDERS[:3]} == before
    assert f"edited {package/'distill_nb'}" in (work.run/"05-report"/"stage.log").read_text(encoding="utf-8")
    assert all((work.run/name).read_bytes() == (work.run/"05-report"/name).read_bytes() for name in pipeline.REPORTS)
    assert '"n": 3' in (work.run/"report.json").read_text()


# What a fingerprint sees

@pytest.fixture
def place(tmp_path, model):
    "A folder with a recipe, its rows and its model"
    folder = tmp_path/"place"
    folder.mkdir()
    shutil.copytree(model, folder/"model")
    write_recipe(folder, "model")
    return folder


def fingerprints(folder, *sets, change=None, dtype="float32"):
    stages = stages_in(folder, *sets, change=change)
    plan.take_fingerprints(stages, plan_hardware("cpu").model_copy(update={"dtype": dtype}))
    return {s.id: s.fingerprint for s in stages}


def differ(before, after): return [i for i in before if before[i] != after[i]]


def edit(package, kind, code="", prose=""):
    "Change a stage's notebook in a copy of the package"
    file, = (package/"nbs").glob(f"*_{kind}.ipynb")
    nb = read_json(file)
    nb["cells"][-1]["source"] = [*nb["cells"][-1]["source"], f"\n{code}"]
    nb["cells"][0]["source"] = [*nb["cells"][0]["source"], prose]
    file.write_text(json.dumps(nb), encoding="utf-8")


@pytest.fixture
def package(tmp_path, monkeypatch):
    "A copy of the package, which fingerprints are taken of"
    folder = tmp_path/"package"
    for part, files in (("distill_nb", "**/*.py"), ("nbs", "*.ipynb")):
        for f in (ROOT/part).glob(files):
            (folder/f.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(f, folder/f.relative_to(ROOT))
    monkeypatch.setattr(check, "shipped_dir", lambda: folder/"nbs")
    monkeypatch.setattr(plan, "package_dir", lambda: folder/"distill_nb")
    return folder


def touch(place):
    for f in (place/"model").iterdir(): os.utime(f, (1, 1))


def describe_model(place):
    (place/"model"/"README.md").write_text("# Ours")


def rename(place):
    (place/"model").rename(place/"other")
    (place/"rows.jsonl").rename(place/"same.jsonl")
    file = place/"recipe.yaml"
    file.write_text(file.read_text().replace("name: model", "name: other").replace("teacher: model", "teacher: other")
                    .replace("rows.jsonl", "same.jsonl"))


def other_weights(place):
    replace(place/"model"/"model.safetensors", flip)


def other_row(place):
    write_rows(place/"rows.jsonl", [r | {"prompt": r["prompt"] + "!"} for r in prompts()])


SIGHTS = {  # what is set, what is done to rows and model, and the stages that see it
    "weights that were touched": ((), touch, []),
    "a README beside the weights": ((), describe_model, []),
    "the same files under other names": ((), rename, []),
    "the license of the rows": (("data.license=mit",), None, []),
    "a default that is written out": (("data.split=train", "student.epochs=1"), None, []),
    "parameters that change no result": (("student.save_steps=3", "evaluate.batch_size=1", "annotate.sync_to=there"), None, []),
    "one byte of the weights": ((), other_weights, IDS),
    "one row": ((), other_row, IDS),
    "how rows are chosen": (("data.samples=20",), None, IDS),
    "how weights are loaded": (("student.model.quantize=4bit",), None, IDS[1:]),
    "a parameter": (("distilled.proof_rows=1",), None, IDS[2:]),
    "a model of one's own in a table": (("evaluate.models.more=model",), None, IDS[3:]),
    "another stage that is pointed at": (("evaluate.models.distilled=@student",), None, IDS[3:]),
}


@pytest.mark.parametrize("sight", SIGHTS)
def test_a_fingerprint_sees_what_matters_and_nothing_else(sight, place):
    sets, act, seen = SIGHTS[sight]
    before = fingerprints(place)
    if act: act(place)
    assert differ(before, fingerprints(place, *sets)) == seen


def test_a_fingerprint_does_not_see_where_everything_lies(place, tmp_path):
    before = fingerprints(place)
    shutil.move(place, tmp_path/"elsewhere")
    assert fingerprints(tmp_path/"elsewhere") == before


def append(text):
    return lambda file: file.write_text(file.read_text() + text)


OTHERS = ["student", "distilled", "evaluate"]
EDITS = {  # what is done to the package, the stages that must see it, and those that must not
    "prose of a notebook": (lambda p: edit(p, "report", prose="More."), [], IDS),
    "a comment in a notebook": (lambda p: edit(p, "report", code="# more"), [], IDS),
    "code of a notebook": (lambda p: edit(p, "report", code="1 + 1"), ["report"], ["annotate", *OTHERS]),
    "a comment and a docstring of a module": (lambda p: append('# more\n"more"\n')(p/"distill_nb"/"models.py"), [], IDS),
    "beam search in a module": (lambda p: append("BEAMS = 4\n")(p/"distill_nb"/"generate.py"), ["annotate", "evaluate"], []),
    "a module that all import": (lambda p: append("X = 1\n")(p/"distill_nb"/"core.py"), IDS, []),
    "a module behind a module": (lambda p: append("X = 1\n")(p/"distill_nb"/"teacher"/"local.py"), ["annotate"], OTHERS),
    "a module of a wing": (lambda p: append("X = 1\n")(p/"distill_nb"/"teacher"/"prompts.py"), ["annotate"], [*OTHERS, "report"]),
    "the command line": (lambda p: append("X = 1\n")(p/"distill_nb"/"cli.py"), [], IDS),
}


@pytest.mark.parametrize("change", EDITS)
def test_a_fingerprint_sees_code_and_no_prose(change, place, package):
    act, sees, passes_over = EDITS[change]
    def code(): return {s.id: plan.code_behind(s.notebook) for s in stages_in(place)}
    before = code()
    act(package)
    changed = differ(before, code())
    assert set(changed) >= set(sees) and not set(changed) & set(passes_over), changed


def test_a_gpu_is_asked_about_by_another_process(monkeypatch):
    "torch would keep memory in the process of the run, through every stage"
    monkeypatch.setattr(pipeline, "gpu_build", lambda: True)
    here = plan_hardware()
    monkeypatch.setattr(pipeline, "plan_hardware", lambda: pytest.fail("asked in this process"))
    assert pipeline.this_machine() == here
    monkeypatch.setenv("DISTILL_NB_DTYPE", "flaot16")
    with pytest.raises(DistillError, match="^DISTILL_NB_DTYPE=flaot16: not a number format"): pipeline.this_machine()


def test_the_number_format_matters_where_a_model_is_loaded(place):
    def api(recipe): recipe.stages[0]["annotate"]["teacher"] = {"api": "some-model"}
    assert differ(fingerprints(place), fingerprints(place, dtype="bfloat16")) == IDS
    assert differ(fingerprints(place, change=api), fingerprints(place, change=api, dtype="bfloat16")) == IDS[1:]


def test_two_files_of_one_name_are_two(tmp_path, model):
    "Examples of the same file name hid the rows"
    labelled = [{"id": f"r{n}", "text": f"text {n}", "label": "good" if n % 2 else "bad"} for n in range(24)]
    for name in ("a", "b"):
        (tmp_path/name).mkdir()
        write_rows(tmp_path/name/"rows.jsonl", labelled)
    teacher = {"teacher": str(model), "labels": ["good", "bad"], "examples": "b/rows.jsonl", "shots": 2}
    recipe = {"name": "labels", "task": "classify", "data": {"path": "a/rows.jsonl"}, "stages": [{"annotate": teacher}]}
    (tmp_path/"recipe.yaml").write_text(yaml.safe_dump(recipe))
    before = fingerprints(tmp_path)
    write_rows(tmp_path/"a"/"rows.jsonl", [r | {"text": r["text"] + "!"} for r in labelled])
    changed = fingerprints(tmp_path)
    assert changed != before
    write_rows(tmp_path/"b"/"rows.jsonl", labelled[::-1])
    assert fingerprints(tmp_path) not in (before, changed)


def test_models_in_a_list_are_checked_seen_and_pointed_at(place):
    own_recipe(place, {"own": {"id": "first"}}, {"own": {"models": ["model", {"name": "model", "layers": 2}]}})
    before = fingerprints(place)
    other_weights(place)
    assert differ(before, fingerprints(place)) == ["own"]
    with pytest.raises(DistillError, match="own': models: @nobody: no earlier stage"): stages_in(place, "own.models=['@nobody']")
    with pytest.raises(DistillError, match="own': models: @first makes metrics"): stages_in(place, "own.models=['@first']")
    with pytest.raises(DistillError, match="own': models: .*nowhere: no model there"), check.Opened() as opened:
        check.check_inputs(stages_in(place, "own.models=[./nowhere]"), "recipe.yaml", opened)


def test_everything_is_looked_at_once_a_run(work, monkeypatch):
    "Fingerprints are taken once a stage, a file is hashed once, a notebook parsed to find the stages and once for its code"
    counts, parts, hash_file, read = Counter(), plan.fingerprint_parts, core.sha256_file, check.read_json
    def fingerprint_parts(stage, *args):
        counts["fingerprint", stage.id] += 1
        return parts(stage, *args)
    def sha256_file(path):
        counts["hash", Path(path).resolve()] += 1
        return hash_file(path)
    def read_json(path):
        if Path(path).suffix == ".ipynb": counts["parse", Path(path)] += 1
        return read(path)
    monkeypatch.setattr(plan, "fingerprint_parts", fingerprint_parts)
    monkeypatch.setattr(core, "sha256_file", sha256_file)
    monkeypatch.setattr(check, "read_json", read_json)
    monkeypatch.setattr(plan, "read_json", read_json)
    monkeypatch.setattr(core, "_DIGESTS", {})
    pipeline.run_recipe(*load_recipe(str(work.folder/"recipe.yaml")), work.run)
    assert {i: counts["fingerprint", i] for i in IDS} == dict.fromkeys(IDS, 1)
    hashed = {path: n for (what, path), n in counts.items() if what == "hash"}
    assert "model.safetensors" in {p.name for p in hashed} and set(hashed.values()) == {1}, hashed
    parsed = [n for (what, _), n in counts.items() if what == "parse"]
    assert max(parsed) <= 2 and parsed.count(2) <= len(IDS)


def test_rows_are_opened_once_for_check_and_plan(place, monkeypatch):
    opened, open_rows = [], check.open_rows
    def counted(data, *args):
        opened.append(data)
        return open_rows(data, *args)
    monkeypatch.setattr(check, "open_rows", counted)
    before = snapshot(place)
    _, rows = plan.plan_recipe(*load_recipe(str(place/"recipe.yaml")), place/"runs")
    assert len(rows) == 5 and all("peak" in r for r in rows[:4])
    assert len(opened) == 2, "the recipe's rows, and those that prove the merge"
    assert snapshot(place) == before, "a plan makes no file"


# What an output descends from

class TwoModels(StageParams):
    descends = "model"
    teacher: ModelRef
    model: ModelRef

    def makes(self): return ("model",)


def chain(*specs, adapter=False):
    "Stages of which each is cut out of the one before, as a spec says"
    cls = type("Adapter", (TwoModels,), {"makes": lambda self: ("adapter",)}) if adapter else TwoModels
    stages = [check.Stage(n, f"s{n}", "x", Path(), cls(teacher="a-teacher", model=s)) for n, s in enumerate(specs)]
    return stages


ORIGINS = {
    "the student, not the teacher before it": (chain("org/small"), ModelSpec(name="@s0"), "org/small"),
    "layers of layers": (chain({"name": "org/small", "layers": 12}), ModelSpec(name="@s0", layers=[0, 5]), "org/small (2 layers)"),
    "two stages": (chain({"name": "org/small", "layers": 12}, "@s0"), ModelSpec(name="@s1"), "org/small (12 layers)"),
    "a whole model is no longer in 4 bits": (chain({"name": "org/small", "quantize": "4bit"}), ModelSpec(name="@s0"), "org/small"),
    "an adapter's base is": (chain({"name": "org/small", "quantize": "4bit"}, adapter=True), ModelSpec(name="@s0"), "org/small (4-bit)"),
    "as the spec says": (chain("org/small"), ModelSpec(name="@s0", quantize="4bit"), "org/small (4-bit)"),
}


@pytest.mark.parametrize("case", ORIGINS)
def test_an_output_descends_from_what_the_stage_says(case):
    stages, spec, expected = ORIGINS[case]
    assert str(plan.origin(spec, stages)) == expected


def test_a_stage_that_does_not_say_what_its_model_descends_from_is_told_so():
    stages = chain("org/small")
    stages[0].params.__class__ = type("Silent", (TwoModels,), {"descends": ""})
    with pytest.raises(DistillError, match="^@s0: its class of parameters does not say"): plan.origin(ModelSpec(name="@s0"), stages)


def test_a_plan_counts_rows_as_long_as_they_are(place):
    "Not at max_length: 401 GiB were planned for rows of 45 tokens"
    def peak(*sets): return plan.plan_recipe(*load_recipe(str(place/"recipe.yaml"), sets), place/"runs", "t4")[1][1]["peak"]
    assert peak("student.max_length=4000") == peak("student.max_length=400") < TARGETS["t4"].memory
    assert peak("annotate.max_new_tokens=2000", "student.max_length=4000") > peak("student.max_length=4000"), "answers to come count"


# Ends

def test_a_stage_of_ones_own_waits_fails_dies_and_is_done(tmp_path, distill):
    "Beside the recipe, with no module of its own"
    own_recipe(tmp_path, {"own": {"id": "first"}}, {"own": {"id": "later", "wait_for": str(tmp_path/"batch")}})
    run = tmp_path/"runs"/"mine"
    paused = distill("run", "recipe.yaml")
    assert paused.status == 75 and heads(paused.out) == [("first", "run"), ("later", "run")]
    assert paused.err == "stage 'later' is paused: the batch is not done yet\nthe same command continues from here\n"
    assert "02-later: paused (the batch is not done yet)" in pipeline.show_run(run)
    hardware, rows = plan.plan_recipe(*load_recipe(str(tmp_path/"recipe.yaml")), run)
    assert "2. later (own): paused (the batch is not done yet)" in plan.render_plan(hardware, rows)
    assert distill("run", "recipe.yaml").status == 75, "it goes on waiting"

    begun, first = (run/"02-later"/"begun").read_text(), snapshot(run/"01-first")
    (tmp_path/"batch").write_text("done")
    done = distill("run", "recipe.yaml")
    assert done.status == 0 and heads(done.out) == [("first", "reused"), ("later", "resume")]
    assert "resume (was paused: the batch is not done yet)" in done.out and "done in" in done.out and "answer 42" in done.out
    assert (run/"02-later"/"begun").read_text() == begun, "the work was taken up"

    failed = distill("run", "recipe.yaml", "--set", "later.end=fail")
    assert failed.status == 1 and heads(failed.out) == [("first", "reused"), ("later", "run")]
    said = failed.err.strip().splitlines()
    assert said[0] == "stage 'later' stopped: it was told to" and said[-1] == "the same command continues from here"
    assert len(said) == 3 and "Traceback" not in failed.out + failed.err and "[31m" not in failed.out + failed.err
    assert snapshot(run/"01-first") == first
    dead = distill("run", "recipe.yaml", "--set", "later.end=die")
    assert dead.status == 1 and dead.err.startswith("stage 'later' stopped: its process died")
    assert "02-later: unfinished" in pipeline.show_run(run)


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


def test_annotation_goes_on_after_every_kind_of_kill_and_after_a_failure(tmp_path, model, rows, started, distill):
    "So many small batches that a kill falls between two; in the end no answer ends with a sentence, and none is dropped without need"
    write_recipe(tmp_path, model, set_annotate(cut_off="drop", batch_size=1, max_new_tokens=64), rows)
    command, journal = ("run", "recipe.yaml", "--until", "annotate"), tmp_path/"runs"/"tiny"/"01-annotate"/"journal.sqlite"
    paid, known = {}, 0
    for way in ("everything killed", "only distill-nb killed", "ctrl-c"):
        run = started(*command)
        if not paid:  # while it runs: nobody else may
            run.wait_for(lambda: "[1/5]" in run.out, "the first stage began")
            second = distill("run", "recipe.yaml")
            assert second.status == 2 and second.out == "", second.out
            assert "another process" in second.err and len(second.err.splitlines()) == 1, second.err
        run.wait_for(lambda: re.search(r"teacher: \d+ of \d+ answers, ", run.out), "the first answer")
        for p in end(run, way): wait_gone(p)
        if paid:
            assert heads(run.out) == [("annotate", "resume")]
            said = int(re.search(r"(\d+) of 24 answers are in the journal already", run.out)[1])
            assert known <= said <= known + 1, "an answer may be written, and not yet seen by who only reads, when the kill comes"
        now = answers_in(journal)
        assert known < len(now) < 24, f"{len(now)} answers: the kill came too early or too late to show anything"
        assert {k: now[k] for k in paid} == paid
        paid, known = now, len(now)

    failed = distill(*command)
    assert failed.status == 1 and heads(failed.out) == [("annotate", "resume")]
    said = failed.err.strip().splitlines()
    assert said[0].startswith("stage 'annotate' stopped: no usable answer is left for train:") and "cut_off: keep" in said[0]
    assert not (tmp_path/"runs"/"tiny"/"01-annotate"/"manifest.json").exists()
    after = answers_in(journal)
    assert len(after) == 24 and {k: after[k] for k in paid} == paid
    done = distill(*command, "--set", "annotate.cut_off=keep")
    assert done.status == 0, done.err
    assert "teacher: 24 of 24 answers are in the journal already" in done.out and answers_in(journal) == after
    assert sorted(len(read_jsonl(journal.parent/f"{s}.jsonl")) for s in ("train", "validation", "test")) == [4, 4, 16]


def test_training_on_own_labels_goes_on_after_a_kill(tmp_path, model, started, distill):
    "The check and the stage take a person's own label for the answer"
    rows = [{"id": f"r{n}", "text": f"text {n}", "label_text": "good" if n % 2 else "bad"} for n in range(24)]
    write_rows(tmp_path/"rows.jsonl", rows)
    recipe = {"name": "labels", "task": "classify", "data": {"path": "rows.jsonl", "validation": 4, "test": 4},
              "stages": [{"sft": {"id": "student", "model": str(model), **TRAINING, "max_steps": 30}}]}
    (tmp_path/"recipe.yaml").write_text(yaml.safe_dump(recipe))
    student = tmp_path/"runs"/"labels"/"01-student"
    def steps(): return {int(p.parent.name.split("-")[1]) for p in student.glob("checkpoints/checkpoint-*/complete")}
    run = started("run", "recipe.yaml")
    run.wait_for(steps, "a whole checkpoint")
    run.kill_all()
    at = max(steps())
    assert at < 29, "the kill came too late to show anything"
    assert not (student/"manifest.json").exists() and not (student/"adapter").exists()
    torn = student/"checkpoints"/"checkpoint-29"  # as a kill in the middle of a checkpoint leaves it
    torn.mkdir(exist_ok=True)
    (torn/"trainer_state.json").write_text("{")
    (torn/"complete").unlink(missing_ok=True)

    done = distill("run", "recipe.yaml")
    assert done.status == 0, done.out + done.err
    assert heads(done.out) == [("student", "resume")]
    assert at <= int(re.search(r"goes on from checkpoint-(\d+)", done.out)[1]) < 29
    assert [r["step"] for r in read_jsonl(student/"train_log.jsonl") if "loss" in r] == list(range(1, 31))


# The real thing

def test_the_quickstart_with_real_models_and_unsloth(tmp_path):
    canary = "canary" + secrets.token_hex(16)
    sets = ["data.samples=24", "data.validation=3", "data.test=4", "annotate.cut_off=keep", "annotate.max_new_tokens=16",
            "student.model.layers=6", "student.max_length=64", "evaluate.models.base.layers=6", "evaluate.max_new_tokens=8",
            "evaluate.resamples=100", "distilled.proof_rows=2"]
    env = {"OPENAI_API_KEY": canary, "HF_TOKEN": canary, "OMP_NUM_THREADS": str(os.cpu_count())}
    options = [x for s in sets for x in ("--set", s)]
    done = command_line("run", "quickstart", "--smoke", *options, cwd=tmp_path, timeout=900, env=env)
    assert done.status == 0, done.out + done.err
    run = tmp_path/"runs"/"quickstart-smoke"
    found = manifests(run)
    assert list(found) == FOLDERS
    assert found["02-student"]["hardware"]["engine"] == "unsloth" and found["02-student"]["packages"]["unsloth"]
    for name in ("results.txt", "report.md", "report.json", "report.html"): assert (run/name).stat().st_size
    metrics = read_json(run/"04-evaluate"/"metrics.json")
    assert metrics["version"] == 2 and set(metrics["models"]) == {"base", "distilled", "teacher"}
    measured = {name: of["metrics"] for name, of in metrics["models"].items()}
    for of in measured.values():
        assert set(of) >= {"bleu", "rougeL", "perplexity"}
        for m in of.values():
            assert set(m) == {"value", "low", "high", "n", "backend"} and m["low"] <= m["value"] <= m["high"]
            assert m["n"] >= 4 and m["backend"]
    proof = read_json(run/"03-distilled"/"merge.json")
    assert 0 <= proof["max_abs_logit_difference"] <= proof["tolerance"] and proof["max_abs_logit"] > 1
    losses = [r["loss"] for r in read_jsonl(run/"02-student"/"train_log.jsonl") if "loss" in r]
    assert len(losses) == 2
    config = read_json(run/"03-distilled"/"model"/"config.json")
    assert config["num_hidden_layers"] == 6 and "quantization_config" not in config
    # The teacher is a real model: it must find its own answers far likelier than a model with most of its layers cut out does.
    assert measured["teacher"]["perplexity"]["value"] < measured["base"]["perplexity"]["value"] / 2
    hidden = [p for p in tmp_path.rglob("*") if p.is_file() and canary.encode() in p.read_bytes()]
    assert not hidden and canary not in done.out + done.err
