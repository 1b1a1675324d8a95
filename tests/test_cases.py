"""The shipped recipes: what they are made of can be made again, and each runs smaller still, through the command line."""
import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from distill_nb import pipeline
from distill_nb.core import read_json, read_jsonl
from distill_nb.data import open_rows
from distill_nb.metrics import conclusion
from distill_nb.run.plan import plan_recipe, render_plan
from distill_nb.run.recipe import load_recipe, shipped_recipes
from distill_nb.teacher.journal import read_shard

from conftest import ROOT, command_line

RECIPES, PROMPTS = ROOT/"nbs"/"recipes", ROOT/"nbs"/"prompts"


def program(name):
    "A script beside the recipes, as a module"
    spec = importlib.util.spec_from_file_location(name, RECIPES/f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What ships with them

@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_is_sound_small_and_full_and_has_a_sentence_for_the_list(name):
    for smoke in (False, True):
        recipe, file = load_recipe(name, smoke=smoke)
        assert recipe.name == name and pipeline.check_recipe(recipe, file)
    assert recipe.about and len(recipe.about) < 160
    assert name == "quickstart" or (RECIPES/f"{name}.md").is_file()


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_is_planned_for_a_t4_without_a_network_and_fits(name, tmp_path):
    recipe, file = load_recipe(name)
    text = render_plan(*plan_recipe(recipe, file, tmp_path/"run", "t4"))
    assert "T4" in text and "DOES NOT FIT" not in text, text
    if name == "bangla-tinyllama": assert "25,231,360 trained" in text


@pytest.fixture(scope="module")
def bangla():
    return program("bangla_rows")


@pytest.fixture(scope="module")
def solved():
    return program("solved_problems")


def test_the_bangla_rows_can_be_written_again(bangla):
    assert bangla.rows() == read_jsonl(PROMPTS/"bangla.jsonl")


ARITHMETIC = {  # what the numbers of a question come to
    "sum-of-two": lambda a, b: a + b, "difference": lambda a, b: a - b, "product": lambda a, b: a * b, "have-now": lambda a, b: a + b,
    "price": lambda a, b: a * b, "larger": max, "following": lambda a: a + 1, "clock": lambda a, b: a + b}


def test_the_bangla_answers_are_right():
    rows = read_jsonl(PROMPTS/"bangla.jsonl")
    assert len(rows) > 600 and len({r["question"] for r in rows}) == len(rows)
    checked = [r for r in rows if r["kind"] in ARITHMETIC]
    assert {r["kind"] for r in checked} == set(ARITHMETIC)
    for r in checked:
        numbers = [int(n) for n in re.findall(r"\d+", r["question"].replace("এক বাক্সে", ""))]
        assert int(re.findall(r"\d+", r["answer"])[-1]) == ARITHMETIC[r["kind"]](*numbers), r
    for r in rows:
        assert r["answer"].endswith("।") and not re.search("[a-zA-Z0-9]", r["question"] + r["answer"]), r


def test_the_recording_can_be_made_again(solved):
    made = solved.problems()
    entries, problem = read_shard(RECIPES/"phi3-cot.jsonl")
    assert not problem and entries == solved.recorded(made), "12_teacher.prompts has changed, or the program: run solved_problems.py"
    assert [(s["question"], s["answer"]) for s in read_jsonl(PROMPTS/"cot-seeds.jsonl")] == [family[0] for family in made.values()]


def test_the_recorded_solutions_are_right(solved):
    "Every equation holds, and the answer is what the last one comes to"
    for id, family in solved.problems().items():
        for question, solution in family:
            equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", solution)
            assert equations or id.startswith("ordering"), solution
            for a, sign, b, result in equations: assert eval(f"{a} {sign} {b}") == int(result), solution
            if not id.startswith(("ordering", "arrival")): assert conclusion(solution) == equations[-1][-1], solution
            if id.startswith("arrival"):
                (hour, minute), lasts = re.search(r"(\d+):(\d+)", question).groups(), int(re.search(r"lasts (\d+)", question)[1])
                end = int(hour) * 60 + int(minute) + lasts
                assert conclusion(solution) == f"{end // 60} {end % 60:02d}", (question, solution)
            if id.startswith("ordering"):
                first, last = next((a, c) for a, b in pairs(question) for c in [dict(pairs(question)).get(b)] if c)
                least = re.search(r"the (\w+)\?", question)[1] in ("shortest", "youngest", "slowest")
                assert conclusion(solution) == (last if least else first).casefold(), (question, solution)


def pairs(question):
    "Who is more than whom"
    return re.findall(r"(\w+) is \w+ than (\w+)\.", question)


def test_no_problem_is_another_with_other_names(solved):
    "Else one that is tested on could have been learnt by heart"
    questions = [(id.partition("-")[0], q) for id, family in solved.problems().items() for q, _ in family]
    assert len({q for _, q in questions}) == len(questions) > 700
    numbers = [(kind, *re.findall(r"\d+|twice|three", q)) for kind, q in questions if kind != "ordering"]
    assert len(set(numbers)) == len(numbers)


# Smaller still

def run_case(folder, recipe, *sets):
    "A smoke run with a few changes, through the command line"
    done = command_line("run", recipe, "--smoke", *[word for s in sets for word in ("--set", s)], cwd=folder, timeout=600)
    assert done.status == 0, done.out + done.err
    run = folder/"runs"/f"{recipe}-smoke"
    report = read_json(run/"report.json")
    return SimpleNamespace(run=run, out=done.out, report=report, metrics=report["evaluations"][0]["metrics"])


SMALL = ["lora_r=2", "lora_alpha=4", "max_steps=2", "engine=trl", "batch_size=4", "max_length=512"]
QUESTIONS = "{path: '@data', skip: 24, samples: 20, validation: 4, test: 4}"


@pytest.fixture(scope="module")
def bangla_run(model, tmp_path_factory):
    base = f"{{name: {model}, layers: 3}}"
    sets = ["data.samples=24", "data.validation=4", f"teacher.model={model}", f"student.model={base}",
            *[f"{stage}.{s}" for stage in ("teacher", "student") for s in SMALL],
            "teacher-merged.proof_rows=2", "distilled.proof_rows=2", f"annotate.data={QUESTIONS}", f"evaluate.data={QUESTIONS}",
            "annotate.max_new_tokens=8", "annotate.cut_off=keep", "evaluate.max_new_tokens=8", "evaluate.resamples=100",
            f"evaluate.models.base={base}"]
    return run_case(tmp_path_factory.mktemp("bangla"), "bangla-tinyllama", *sets)


def test_a_bangla_teacher_is_tuned_merged_and_asked_before_the_student_learns(bangla_run):
    ids = [s["id"] for s in bangla_run.report["stages"]]
    assert ids == ["01-teacher", "02-teacher-merged", "03-annotate", "04-student", "05-distilled", "06-evaluate"]
    assert set(bangla_run.metrics["models"]) == {"base", "distilled", "teacher"}
    for of in bangla_run.metrics["models"].values():
        assert set(of["metrics"]) == {"bleu", "rougeL", "chrf", "perplexity"} and {m["n"] for m in of["metrics"].values()} == {4}


def test_the_bangla_teacher_is_its_base_with_the_adapter_added(bangla_run, model):
    from safetensors.torch import load_file
    def weights(folder): return {k: v.float() for f in Path(folder).glob("*.safetensors") for k, v in load_file(f).items()}
    adapter, = bangla_run.run.glob("01-teacher/**/adapter_model.safetensors")
    merged, = {f.parent for f in bangla_run.run.glob("02-teacher-merged/**/*.safetensors")}
    base, low, now = weights(model), weights(adapter.parent), weights(merged)
    changed = [k for k in base if (base[k] - now[k]).abs().max() > 0]
    names = {k.split(".lora_")[0].removeprefix("base_model.model.") + ".weight" for k in low}
    assert changed and set(changed) <= names, "something else than what was trained has changed"
    for name in changed:
        a, b = (low[f"base_model.model.{name.removesuffix('.weight')}.lora_{m}.weight"] for m in "AB")
        assert (now[name] - base[name] - 2 * b @ a).abs().max() < 1e-3 * max(1, base[name].abs().max()), name
    said = read_json(bangla_run.run/"03-annotate"/"manifest.json")["parameters"]["teacher"]["name"]
    assert Path(said).is_relative_to(bangla_run.run/"02-teacher-merged") or "02-teacher-merged" in said


def test_the_bangla_teacher_answers_other_questions_than_it_was_tuned_on(bangla_run):
    learnt = {r["id"] for r in open_rows({"path": "bangla", "samples": 24, "validation": 4, "test": 0}).rows()}
    splits = {s: read_jsonl(bangla_run.run/"03-annotate"/f"{s}.jsonl") for s in ("train", "validation", "test")}
    asked = {r["id"] for rows in splits.values() for r in rows}
    assert len(learnt) == 24 and len(asked) == 20 and not learnt & asked


def test_the_bangla_references_are_the_sets_own_answers(bangla_run):
    own = {r["id"]: r["answer"] for r in read_jsonl(PROMPTS/"bangla.jsonl")}
    rows = read_jsonl(bangla_run.run/"06-evaluate"/"predictions.jsonl")
    trained = {r["id"] for r in read_jsonl(bangla_run.run/"03-annotate"/"train.jsonl")}
    assert len(rows) == 4 and not trained & {r["id"] for r in rows}
    for r in rows: assert r["references"] == [own[r["id"]]]


@pytest.fixture(scope="module")
def chain_run(model, tmp_path_factory):
    base = f"{{name: {model}, layers: 3, template: qa}}"
    sets = ["annotate.count=50", f"student.model={base}", *[f"student.{s}" for s in SMALL], "distilled.proof_rows=2",
            f"evaluate.models.base={base}", "evaluate.max_new_tokens=8", "evaluate.resamples=100"]
    return run_case(tmp_path_factory.mktemp("chains"), "phi3-cot", *sets)


def test_the_recording_answers_every_call_of_the_small_recipe(tmp_path):
    "As many as the smoke run asks for, without a model"
    from distill_nb.annotate import AnnotateParams, annotate
    recipe, file = load_recipe("phi3-cot", smoke=True)
    stage = pipeline.check_recipe(recipe, file)[0]
    pipeline.make_local(stage, file)
    made = annotate(AnnotateParams(**stage.params.model_dump() | {"out": str(tmp_path)}))
    assert made["rows"] == {"train": 240, "validation": 12, "test": 48} and not made["dropped"]
    assert not read_jsonl(tmp_path/"failures.jsonl")
    seeds = {split: {r["meta"]["seed"] for r in read_jsonl(tmp_path/f"{split}.jsonl")} for split in ("train", "test")}
    assert not seeds["train"] & seeds["test"]


def test_a_chain_of_thought_is_learnt_and_its_final_answers_are_counted(chain_run):
    assert [s["id"] for s in chain_run.report["stages"]] == ["01-annotate", "02-student", "03-distilled", "04-evaluate"]
    assert not read_jsonl(chain_run.run/"01-annotate"/"failures.jsonl")
    dataset = json.loads((chain_run.run/"01-annotate"/"dataset.json").read_text())
    assert len(dataset) == 50 and set(dataset[0]) == {"original_question", "original_solution", "new_question", "new_solution"}
    for of in chain_run.metrics["models"].values():
        assert set(of["metrics"]) == {"loss", "perplexity", "token_accuracy", "final_answer"}
        for m in of["metrics"].values(): assert m["low"] <= m["value"] <= m["high"] and m["n"] == 8
    assert "final_answer" in chain_run.out and "token_accuracy" in chain_run.out


def test_the_student_is_asked_in_the_recipes_form(chain_run):
    text = read_jsonl(chain_run.run/"01-annotate"/"train_text.jsonl")[0]["text"]
    assert re.fullmatch(r"Q: .+\nA: .+\nAnswer: .+", text, re.S)
    template, = chain_run.run.glob("03-distilled/**/chat_template.jinja")
    assert "Q: " in template.read_text()


def test_rows_with_solutions_of_their_own_need_no_teacher(model, tmp_path):
    rows = [{"question": f"What is {n} + 1?", "answer": f"One more than {n} is {n + 1}.\n#### {n + 1}"} for n in range(20)]
    (tmp_path/"solved.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    base = f"{{name: {model}, layers: 3, template: qa}}"
    case = run_case(tmp_path, "phi3-cot", "annotate=null", "data={path: solved.jsonl, validation: 2, test: 4}", f"student.model={base}",
                    *[f"student.{s}" for s in SMALL], "distilled.proof_rows=2", f"evaluate.models.base={base}",
                    "evaluate.max_new_tokens=4", "evaluate.resamples=100")
    assert [s["id"] for s in case.report["stages"]] == ["01-student", "02-distilled", "03-evaluate"]
    assert case.metrics["models"]["distilled"]["metrics"]["final_answer"]["n"] == 4
