"""Stage notebooks and their modules say the same, run without the pipeline, and cost nothing to import."""
import ast
import json
import subprocess
import sys
import tokenize
import typing
from io import StringIO

import pytest

from distill_nb import core, pipeline, stage
from distill_nb.data import SPLITS
from distill_nb.families import FAMILIES
from distill_nb.run.check import ref_fields

from conftest import DEADLINE, ROOT, environment

STAGES = pipeline.stage_notebooks()
FILES = [p.relative_to(ROOT/"distill_nb").with_suffix("") for p in (ROOT/"distill_nb").rglob("*.py")]
MODULES = sorted(".".join(p.parts) for p in FILES if p.name not in ("__init__", "__main__"))
HEAVY = ("torch", "transformers", "trl", "unsloth", "peft", "datasets", "accelerate", "bitsandbytes", "matplotlib")


def comments_in(source):
    "line: what its comment says"
    tokens = tokenize.generate_tokens(StringIO(source).readline)
    return {t.start[0]: t.string.removeprefix("#").strip() for t in tokens if t.type == tokenize.COMMENT}


def parameters_cell(notebook):
    cell, = [c for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if "parameters" in c["metadata"].get("tags", [])]
    return "".join(cell["source"])


def test_the_stages_are_found_beside_these_tests():
    assert {"annotate", "sft", "merge", "evaluate", "report"} <= set(STAGES)
    assert all(n.parent == ROOT/"nbs" for n in STAGES.values())


@pytest.mark.parametrize("kind", STAGES)
def test_the_parameters_cell_is_the_model(kind):
    "Same names in the same order, and a small run that the model takes: what papermill shows is what the pipeline checks"
    cls, source = pipeline.params_class(kind), parameters_cell(STAGES[kind])
    names = {}
    exec(source, names)
    names = {n: v for n, v in names.items() if not n.startswith("__")}
    assert list(names) == list(cls.model_fields)
    params = cls.from_cell(names)
    assert params == cls.from_cell(names | {"other": 1, "_": None}), "another name of the notebook changes the parameters"
    assert cls.model_validate(json.loads(json.dumps(params.model_dump(mode="json")))) == params, "what papermill would inject is something else"


@pytest.mark.parametrize("kind", STAGES)
def test_each_parameter_is_typed_and_explained_on_its_line(kind):
    source = parameters_cell(STAGES[kind])
    body, lines = ast.parse(source).body, source.splitlines()
    plain = [isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and n.value is not None for n in body]
    assert all(plain), "not `name: type = default`"
    assert [n.lineno for n in body] == [n.end_lineno for n in body] == list(range(1, len(lines) + 1)), "not one a line"
    for n in body: ast.literal_eval(n.value)  # papermill reads the cell without running it


@pytest.mark.parametrize("kind", STAGES)
def test_what_a_stage_says_of_itself_holds(kind):
    "Each class variable names parameters of its own; what makes a model says which one it descends from; who opens rows is told the task"
    cls = pipeline.params_class(kind)
    refs, fields = ref_fields(cls), set(cls.model_fields)
    assert {*cls.runtime, *cls.path_fields} <= fields and set(cls.families) <= set(FAMILIES) and set(cls.needs_splits) <= set(SPLITS)
    assert all(set(ref.kinds) <= set(stage.KINDS) for ref in refs.values())
    models = [name for name, ref in refs.items() if {"model", "adapter"} & set(ref.kinds)]
    if kind in ("sft", "merge"): assert cls.descends in models
    if any("data" in ref.kinds for ref in refs.values()): assert cls.model_fields["task"].annotation == stage.Task
    assert not set(cls.runtime) & set(refs), "what is read always matters"


@pytest.mark.parametrize("kind", STAGES)
def test_the_help_of_a_parameter_is_written_once(kind):
    "What the cell says of a parameter is what its field says"
    cls, source = pipeline.params_class(kind), parameters_cell(STAGES[kind])
    said = {n.target.id: comments_in(source).get(n.lineno) for n in ast.parse(source).body}
    assert said == {name: field.description for name, field in cls.model_fields.items()}
    assert all(len(text.split()) >= 2 for text in said.values())


@pytest.mark.parametrize("kind", STAGES)
def test_the_annotation_fits_what_the_model_takes(kind):
    "`int | None` in the cell and an int field in the model would let papermill inject what is then refused"
    cls = pipeline.params_class(kind)
    for n in ast.parse(parameters_cell(STAGES[kind])).body:
        annotation = cls.model_fields[n.target.id].annotation
        nothing = "None" in ast.unparse(n.annotation).replace(" ", "").split("|")
        assert nothing == (type(None) in typing.get_args(annotation)), f"{n.target.id}: {ast.unparse(n.annotation)} against {annotation}"


@pytest.mark.parametrize("kind", STAGES)
def test_a_stage_refuses_what_it_does_not_know(kind):
    cls = pipeline.params_class(kind)
    with pytest.raises(core.DistillError, match="unknown key"): stage.check(cls, {"no_such_parameter": 1}, "here")
    assert "out" in cls.model_fields and cls.model_fields["out"].default.startswith("runs/")


def test_a_light_stage_runs_by_papermill_alone(tmp_path):
    "No pipeline, no recipe: its own demonstration"
    command = ["papermill", STAGES["merge"], tmp_path/"out.ipynb", "-p", "out", tmp_path/"merge", "-k", "python3", "--no-progress-bar"]
    done = subprocess.run([sys.executable, "-m", *map(str, command)], cwd=tmp_path, env=environment(None), text=True,
                          capture_output=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    manifest = core.read_json(tmp_path/"merge"/"manifest.json")
    assert manifest["stage"] == "merge" and manifest["fingerprint"] is None
    for name, was in manifest["outputs"].items():
        assert core.sha256_file(tmp_path/"merge"/name) == was["sha256"]
    assert {"merge.json", "model/model.safetensors", "model/config.json", "model/README.md"} <= set(manifest["outputs"])
    proof = core.read_json(tmp_path/"merge"/"merge.json")
    assert 0 <= proof["max_abs_logit_difference"] <= proof["tolerance"] and proof["positions"] > 0
    assert not list(tmp_path.glob("runs")), "the notebook wrote elsewhere"


def python(code, *arguments):
    command = [sys.executable, *arguments, *(["-c", code] if code else [])]
    done = subprocess.run(command, env=environment(None), cwd=ROOT.parent, text=True, capture_output=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    return done


SAY = f"import sys; print(sorted(m for m in {HEAVY} if m in sys.modules))"


def test_importing_the_package_and_every_module_is_light():
    "One process for all of them; which module it was is asked only when something was found"
    light = "import distill_nb, " + ", ".join(f"distill_nb.{m}" for m in MODULES)
    if python(f"{light}\n{SAY}").stdout.strip() == "[]": return
    guilty = {m: found for m in MODULES if (found := python(f"import distill_nb.{m}\n{SAY}").stdout.strip()) != "[]"}
    pytest.fail(f"imported at the top: {guilty}")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["recipes"]])
def test_asking_for_help_is_light(arguments):
    "What was imported is read off the interpreter's own report"
    done = python(None, "-X", "importtime", "-m", "distill_nb", *arguments)
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "distill_nb" in imported or "typer" in imported, "nothing was reported"
    assert not imported & set(HEAVY), imported & set(HEAVY)
    assert done.stdout.strip()
