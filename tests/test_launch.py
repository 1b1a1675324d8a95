"""Several processes that train together: how they start, speak, fail, pause and end, and that they learn the same. Two of them, on the CPU."""
import contextlib
import io
import json
import os
import signal
import subprocess
import sys

import psutil
import pytest
import yaml
from pydantic import Field

import tiny
from conftest import environment, until, wait_gone
from distill_nb.core import DistillError, read_json
from distill_nb.learn.launch import accelerate_config, count_devices, launch, launch_command, read_outcome, write_outcome
from distill_nb.learn.training import TrainParams
from distill_nb.stage import StageParams, StagePaused

STAGE = """
import os, signal, sys, time
from pathlib import Path
from distill_nb.core import *
from distill_nb.learn.training import TrainParams
from distill_nb.stage import *
from distill_nb.learn.training import process_rank, wait_for_all

class Params(StageParams):
    end: str = ""
    words: list[str] = []

def work(params):
    rank, count = process_rank()
    here = Path(params.out)
    write_text(here/f"pid-{rank}", str(os.getpid()))
    print(f"process {rank} of {count}: {' '.join(params.words)}")
    if params.end == "wait" or rank == 0 and params.end in ("mistake", "bug", "killed", "exit"):
        log("waiting")
        while not (here/"go").exists(): time.sleep(0.01)
    if params.end == "pause":
        if rank == 0: write_text(here/"saved", "by the first, while the other has paused already")
        pause_stage(params, "the time is up")
    if params.end == "mistake": raise DistillError("rows.jsonl, line 7: has no answer")
    if params.end == "bug": raise ZeroDivisionError("by nothing")
    if params.end == "killed": os.kill(os.getpid(), signal.SIGKILL)
    if params.end == "exit": os._exit(9)
    if params.end == "late":
        import atexit
        atexit.register(lambda: os._exit(9))
    wait_for_all()
    return {"count": count, "words": params.words}
"""


class Params(StageParams):
    "As the stage's own"
    end: str = Field("", description="how the second process ends")
    words: list[str] = Field([], description="what it says")


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path/"own_stage.py").write_text(STAGE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pids(here): return [int(f.read_text()) for f in here.glob("pid-*")]


def all_gone(here):
    for pid in pids(here):
        with contextlib.suppress(psutil.NoSuchProcess): wait_gone(psutil.Process(pid))
    return len(pids(here)) == 2


def test_two_processes_get_the_parameters_and_the_first_gives_the_result(here, capsys, monkeypatch):
    "In any script, and without a secret or a parameter in a command"
    monkeypatch.setenv("HF_TOKEN", "hf_not_to_be_seen")
    command = launch_command("own_stage:work", here, 2)
    result = launch(Params(out=str(here), words=["two words", "ভাত", "--flag"]), "own_stage:work", 2)
    assert result == {"count": 2, "words": ["two words", "ভাত", "--flag"]}
    said = capsys.readouterr().out
    assert "process 0 of 2: two words ভাত --flag\n" in said and "process 1" not in said, "the others speak into files"
    folder = here/"checkpoints"/"launch"
    assert "process 1 of 2: two words ভাত --flag\n" in (folder/"process-1.log").read_text()
    kept = "".join(f.read_text() for f in folder.iterdir()) + " ".join(command)
    assert "hf_not_to_be_seen" not in kept and "two words" not in " ".join(command)
    with pytest.raises(DistillError, match=r"process 1 ended with status 9 \(logs: "):  # and not the result of the launch before
        launch(Params(out=str(here), end="exit"), "own_stage:work", 2)
    assert all_gone(here)


class Live(io.StringIO):
    "A screen that makes a file when it sees a word"
    def __init__(self, word, file): super().__init__(); self.word, self.file = word, file
    def write(self, text):
        if self.word in text: self.file.touch()
        return super().write(text)


def test_what_the_first_process_says_is_seen_while_it_runs(here, monkeypatch):
    "It goes on only when its word was seen"
    screen = Live("waiting", here/"go")
    monkeypatch.setattr(sys, "stdout", screen)
    assert launch(Params(out=str(here), end="wait"), "own_stage:work", 2)["count"] == 2
    assert "· waiting\n" in screen.getvalue()


@pytest.mark.parametrize("end, error, said", [
    ("mistake", DistillError, "^rows.jsonl, line 7: has no answer$"), ("bug", DistillError, "stopped: ZeroDivisionError: by nothing .logs: .*launch.$"),
    ("late", DistillError, r"process [01] ended with status 9 \(logs: "), ("pause", StagePaused, "^the time is up$")])
def test_the_end_of_one_is_the_end_of_all_and_says_why(end, error, said, here):
    "The first process waits for ever where the second ends badly"
    with pytest.raises(error, match=said): launch(Params(out=str(here), end=end), "own_stage:work", 2)
    assert all_gone(here) and (here/"saved").exists() == (end == "pause")


PARENT = """
import sys
from distill_nb.learn.launch import launch
from own_stage import Params
launch(Params(out=".", end="wait"), "own_stage:work", 2)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_nothing_goes_on_when_whoever_launched_it_is_gone(how, here):
    env = environment(None)
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=here, env=env | {"PYTHONPATH": f"{env['PYTHONPATH']}{os.pathsep}{here}"},
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: len(pids(here)) == 2 or parent.poll() is not None, "two processes")
    family = psutil.Process(parent.pid).children(recursive=True)
    assert {p.pid for p in family} >= {*pids(here)}
    parent.send_signal(how)
    parent.wait(60)
    for p in family: wait_gone(p)


def test_a_launcher_that_cannot_start_says_its_last_line(here, monkeypatch):
    "Such as a configuration that is none"
    (here/"mine.yaml").write_text("compute_environment: NOWHERE\n")
    monkeypatch.setenv("DISTILL_NB_ACCELERATE", str(here/"mine.yaml"))
    with pytest.raises(DistillError, match=r"training on several devices stopped: .*distributed_type.* \(logs: .*launch\)"):
        launch(Params(out=str(here)), "own_stage:work", 2)


def test_the_mistake_of_one_counts_more_than_the_surprise_of_another(tmp_path, monkeypatch):
    "A process that lost another fails as well, and may be quicker to write it down"
    for rank, kind, why in ((0, "RuntimeError", "Connection closed by peer"), (1, "DistillError", "training diverged")):
        monkeypatch.setenv("RANK", str(rank))
        write_outcome(tmp_path, "failed", kind=kind, why=why, mistake=kind == "DistillError")
    (tmp_path/"launcher.log").write_text("")
    with pytest.raises(DistillError, match="^training diverged$"): read_outcome(tmp_path, 1)


@pytest.mark.parametrize("gpus, devices, count", [(0, "auto", 1), (0, 2, 2), (1, "auto", 1), (2, "auto", 2), (2, 1, 1)])
def test_auto_is_every_gpu(gpus, devices, count): assert count_devices(devices, gpus) == count


def test_more_devices_than_there_are_is_said():
    with pytest.raises(DistillError, match="^devices: 2: this machine has 1 GPU; use devices: auto$"): count_devices(2, 1)


@pytest.mark.parametrize("name, kind", [("ddp", "MULTI_GPU"), ("fsdp", "FSDP")])
def test_the_shipped_configurations_are_read_by_accelerate(name, kind, monkeypatch):
    from accelerate.commands.config.config_args import load_config_from_file
    monkeypatch.setenv("DISTILL_NB_ACCELERATE", name)
    assert load_config_from_file(str(accelerate_config())).distributed_type == kind


def test_every_key_of_the_fsdp_configuration_is_an_option_of_accelerate(monkeypatch):
    "What is spelt wrong there is passed over in silence"
    from accelerate.commands.launch import launch_command_parser
    monkeypatch.setenv("DISTILL_NB_ACCELERATE", "fsdp")
    options = {a.dest for a in launch_command_parser()._actions}
    assert {*yaml.safe_load(accelerate_config().read_text())["fsdp_config"]} <= options


def test_an_unknown_configuration_is_said(monkeypatch):
    monkeypatch.setenv("DISTILL_NB_ACCELERATE", "fdsp")
    with pytest.raises(DistillError, match="^DISTILL_NB_ACCELERATE=fdsp: neither ddp, fsdp nor a file"): accelerate_config()


# Training

TRAINING = """
import os, signal
from pathlib import Path
from distill_nb.core import *
from distill_nb.hardware import *
from distill_nb.stage import *
from distill_nb.learn.training import *

class Params(TrainParams): pass

def train(params):
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
    plan, kill_at = plan_hardware("cpu"), os.environ.get("KILL_AT", "")

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kw):
            if f"{process_rank()[0]} {state.global_step}" == kill_at: os.kill(os.getpid(), signal.SIGKILL)
            small = args.per_device_train_batch_size == 1
            if process_rank()[0] == 1 and os.environ.get("TOO_LARGE") == str(state.global_step) and not small:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    def pad(rows):
        width = max(len(r["input_ids"]) for r in rows)
        ids = [r["input_ids"] + [0] * (width - len(r["input_ids"])) for r in rows]
        labels = [r["input_ids"] + [-100] * (width - len(r["input_ids"])) for r in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor([[int(l != -100) for l in row] for row in labels]),
                "labels": torch.tensor(labels)}

    def build(micro):
        torch.manual_seed(params.seed)
        model = AutoModelForCausalLM.from_pretrained(params.model.name, dtype=torch.float32)
        rows = Dataset.from_list([{"input_ids": [7 + (n * i) % 50 for i in range(3 + 5 * n % 17)]} for n in range(40)])
        train, validation = rows.select(range(32)), rows.select(range(32, 40))
        arguments = training_arguments(params, plan, len(train), True, micro, remove_unused_columns=False)
        return Trainer(model, TrainingArguments(**arguments), pad, train, validation, callbacks=[Kill()])

    outcome = run_training(build, params, plan)
    if outcome.state == "paused": pause_stage(params, outcome.why)
    return {"curve": outcome.curve, "micro": outcome.micro}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory): return tiny.make(tmp_path_factory.mktemp("base"), "chatml")


@pytest.fixture
def training(here, base):
    "Parameters for a folder"
    (here/"own_training.py").write_text(TRAINING)
    def params(name, **more):
        values = dict(model=str(base), data="sample", method="full", batch_size=8, micro_batch=2, max_steps=8, save_steps=2, learning_rate=1e-2)
        return TrainParams(out=str(here/name), **values | more)
    return params


@pytest.fixture
def one(training, cache={}):
    "What one process learns"
    if not cache: cache["losses"] = losses(alone(training("one")))
    return cache["losses"]


def alone(params):
    code = ("import json, sys; from own_training import *\nparams = Params.model_validate(json.load(sys.stdin))\n"
            "print(json.dumps(train(params)))")
    env = environment(None)
    done = subprocess.run([sys.executable, "-c", code], input=params.model_dump_json(), capture_output=True, text=True,
                          env=env | {"PYTHONPATH": f"{env['PYTHONPATH']}{os.pathsep}."})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def losses(result): return [(p["step"], k, p[k]) for p in result["curve"] for k in ("loss", "eval_loss") if k in p]


def nearly(wanted, rel): return [(step, kind, pytest.approx(value, rel=rel)) for step, kind, value in wanted]


def test_two_devices_learn_what_one_does_and_go_on_after_a_kill(training, one, monkeypatch):
    "Each takes half of a batch, of rows that differ in length; and both are gone with the one that is killed"
    two = losses(launch(training("two"), "own_training:train", 2))
    assert one[0][2] > 1.02 * one[-2][2], "nothing was learnt"
    assert two == nearly(one, 0.01)
    assert [p for p in two if p[1] == "loss"] == nearly([p for p in one if p[1] == "loss"], 1e-4)  # validation weighs rows by their batches
    monkeypatch.setenv("KILL_AT", "1 5")
    with pytest.raises(DistillError, match="process 1 was killed"): launch(training("killed"), "own_training:train", 2)
    monkeypatch.delenv("KILL_AT")
    out = io.StringIO()
    with contextlib.redirect_stdout(out): again = losses(launch(training("killed"), "own_training:train", 2))
    assert "goes on from checkpoint-4" in out.getvalue() and again == nearly(two, 1e-4)


def test_a_device_that_runs_out_of_memory_makes_all_begin_again_with_less(training, one, monkeypatch):
    monkeypatch.setenv("TOO_LARGE", "3")
    out = io.StringIO()
    with contextlib.redirect_stdout(out): result = launch(training("two"), "own_training:train", 2)
    assert "out of memory: micro_batch 2 -> 1" in (said := out.getvalue()) + str(result["curve"])
    assert "all begin again with micro_batch 1" in said and "goes on from checkpoint-2" in said
    assert result["micro"] == 1 and losses(result) == nearly(one, 0.01)


def test_a_pause_on_several_devices_is_one_pause(training):
    with pytest.raises(StagePaused, match="max_hours"): launch(training("two", max_hours=1e-9), "own_training:train", 2)
