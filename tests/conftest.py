"""A tiny model, recipes that use it, and the command line as a person meets it."""
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
# One thread: two that wait for each other on a busy machine are many times slower.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
os.environ |= OFFLINE  # before anything imports huggingface_hub, which reads it once
# Whoever starts these tests in the background ignores it, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
DEADLINE = 300  # seconds after which a run of the tiny recipe counts as hung


def prompts(n=24):
    "Prompts of our own, in six groups"
    things = ["bread", "rain", "bees", "clocks", "rivers", "songs"]
    return [{"id": f"row-{i:02d}", "prompt": f"Question {i}: what is {things[i % 6]}?", "topic": things[i % 6]} for i in range(n)]


def write_rows(file, rows):
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return file


TRAINING = {"engine": "trl", "lora_r": 2, "lora_alpha": 4, "batch_size": 4, "max_steps": 4, "save_steps": 1, "max_length": 256}


def tiny_recipe(model, data):
    "Five stages in which everything is as small as it can be; a random model never stops, so cut-off answers are kept"
    def base(): return {"name": str(model), "layers": 3}
    return {"name": "tiny", "task": "chat", "data": {"path": str(data), "group": "topic", "validation": 4, "test": 4},
            "stages": [{"annotate": {"teacher": str(model), "max_new_tokens": 8, "cut_off": "keep", "batch_size": 4}},
                       {"sft": {"id": "student", "model": base()} | TRAINING},
                       {"merge": {"id": "distilled", "proof_rows": 2}},
                       {"evaluate": {"models": {"base": base(), "distilled": "@distilled"}, "metrics": ["bleu", "rougeL"],
                                     "samples": 4, "max_new_tokens": 8, "resamples": 100}},
                       {"report": {}}]}


def write_recipe(folder, model, change=None, data=None):
    "A folder with a recipe in it, and with rows if they are nowhere else; `change` gets the recipe before it is written"
    if data is None: write_rows(folder/"rows.jsonl", prompts())
    recipe = tiny_recipe(model, data or "rows.jsonl")
    if change: change(recipe)
    (folder/"recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return folder/"recipe.yaml"


# A stage of one's own, which costs a second: it waits for a file, fails or dies where it is told to, and says which work it took up.
OWN_STAGE = ["""
out: str = "runs/adhoc/own"  # folder that the stage writes into
data: str | dict | None = None  # rows
task: str = "chat"  # what the rows are for
models: list = []  # models
wait_for: str = ""  # the file without which it pauses
end: str = ""  # fail, die, or neither
""", """
#| export
from pathlib import Path
from typing import Literal
from pydantic import Field
from distill_nb.core import *
from distill_nb.stage import *

class Params(StageParams):
    out: str = Field("runs/adhoc/own", description="folder that the stage writes into")
    data: DataRef|None = Field(None, description="rows")
    task: Task = Field("chat", description="what the rows are for")
    models: list[ModelRef] = Field([], description="models")
    wait_for: str = Field("", description="the file without which it pauses")
    end: Literal["", "fail", "die"] = Field("", description="fail, die, or neither")
    needs_answers = False

    def makes(self): return ("metrics",)
""", """
import os, time
params = Params.from_cell(globals())
out = open_stage(params, "own")
if not (out/"begun").exists(): write_text(out/"begun", str(time.time_ns()))
if params.wait_for and not Path(params.wait_for).exists(): pause_stage(params, "the batch is not done yet")
if params.end == "fail": raise DistillError("it was told to")
if params.end == "die": os._exit(9)
finish_stage(params, summary={"answer": 42})
"""]


def write_notebook(file, *codes):
    "A notebook of code cells, the first tagged as parameters"
    cells = [{"cell_type": "code", "id": f"c{n}", "metadata": {}, "execution_count": None, "outputs": [], "source": code.strip()}
             for n, code in enumerate(codes)]
    cells[0]["metadata"]["tags"] = ["parameters"]
    file.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return file


def own_recipe(folder, *stages, **top):
    "A folder with the stage of one's own and a recipe that uses it"
    write_notebook(folder/"own.ipynb", *OWN_STAGE)
    (folder/"recipe.yaml").write_text(yaml.safe_dump({"name": "mine", "stages": list(stages)} | top))
    return folder/"recipe.yaml"


def environment(env):
    "Of a subprocess: offline, and with the package that these tests lie beside"
    return {k: v for k, v in os.environ.items() if k != "IN_TEST"} | OFFLINE | {"PYTHONPATH": str(ROOT)} | (env or {})


def command_line(*arguments, cwd, env=None, timeout=DEADLINE):
    "Run `distill-nb ...`: status, out, err"
    done = subprocess.run([sys.executable, "-m", "distill_nb", *map(str, arguments)], cwd=cwd, env=environment(env), text=True,
                          capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout)
    return SimpleNamespace(status=done.returncode, out=done.stdout, err=done.stderr)


class Started:
    "`distill-nb ...` while it runs, in a process group of its own"
    def __init__(self, *arguments, cwd, env=None):
        command = [sys.executable, "-m", "distill_nb", *map(str, arguments)]
        self.process = subprocess.Popen(command, cwd=cwd, env=environment(env), text=True, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        self.lines = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(iter(self.process.stdout.readline, "")), daemon=True)
        self.reader.start()

    @property
    def out(self): return "".join(self.lines)

    def family(self):
        "The process and all that it started"
        import psutil
        try: return [p := psutil.Process(self.process.pid), *p.children(recursive=True)]
        except psutil.NoSuchProcess: return []

    def wait_for(self, happened, what):
        until(lambda: happened() or self.process.poll() is not None, what, lambda: self.out)
        assert happened(), f"the run ended with status {self.process.poll()} before {what}:\n{self.out}"

    def kill_all(self):
        "kill -9 of the run, its kernel, and all that they started: a kernel has a session of its own"
        family = self.family()
        for p in family: p.send_signal(signal.SIGKILL)
        self.process.wait(DEADLINE)
        for p in family[1:]: wait_gone(p)

    def kill_parent(self):
        "kill -9 of the `distill-nb` process alone; gives the processes that it leaves"
        left = self.family()[1:]
        self.process.kill()
        self.process.wait(DEADLINE)
        return left


def until(happened, what, said=lambda: "", seconds=DEADLINE):
    "Wait for something that another process does"
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}:\n{said()}"
        time.sleep(0.005)  # another process's output and files can only be polled


def wait_gone(process):
    import psutil
    def gone():
        try: return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess: return True
    until(gone, f"process {process.pid} to end", seconds=120)


def snapshot(folder, times=True):
    "Every file below a folder: content, and time of the last change"
    return {str(p.relative_to(folder)): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns if times else 0)
            for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    "A folder with a random model of six layers, made in a process of its own: this one stays without torch"
    folder = tmp_path_factory.mktemp("model")/"six"
    make = f"from distill_nb.models import tiny_model; tiny_model({str(folder)!r}, layers=6)"
    subprocess.run([sys.executable, "-c", make], check=True, env=environment(None), cwd=folder.parent, capture_output=True, timeout=DEADLINE)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    "A file of prompts that no test changes"
    return write_rows(tmp_path_factory.mktemp("rows")/"rows.jsonl", prompts())


@pytest.fixture
def distill(tmp_path):
    "Run the command line in the test's own folder"
    return lambda *arguments, cwd=tmp_path, **more: command_line(*arguments, cwd=cwd, **more)


@pytest.fixture
def started(tmp_path):
    "Start the command line in the test's own folder; what is left of it at the end is killed"
    all = []
    def start(*arguments, cwd=tmp_path, **more):
        all.append(Started(*arguments, cwd=cwd, **more))
        return all[-1]
    yield start
    for one in all:
        if one.process.poll() is None: one.kill_all()
