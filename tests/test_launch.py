"""Several processes that train together: how they start, speak, fail, pause and end. Two of them, on the CPU."""
import contextlib
import io
import os
import signal
import subprocess
import sys

import psutil
import pytest
import yaml
from pydantic import Field

from conftest import environment, until, wait_gone
from distill_nb.core import DistillError, read_json
from distill_nb.learn.launch import accelerate_config, count_devices, killed_process, launch, launch_command, read_outcome, write_outcome
from distill_nb.stage import StageParams, StagePaused

STAGE = """
import os, signal, sys, time
from distill_nb.core import *
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
    if params.end == "wait" or params.end and rank == 0 and params.end != "pause":
        log("waiting")
        while not (here/"go").exists(): time.sleep(0.01)
    if params.end == "pause":
        if rank == 0: write_text(here/"saved", "by the first, while the other has paused already")
        pause_stage(params, "the time is up")
    if params.end == "mistake": raise DistillError("rows.jsonl, line 7: has no answer")
    if params.end == "bug": raise ZeroDivisionError("by nothing")
    if params.end == "killed": os.kill(os.getpid(), signal.SIGKILL)
    if params.end == "exit": os._exit(9)
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
    ("mistake", DistillError, "^rows.jsonl, line 7: has no answer$"), ("bug", DistillError, "^ZeroDivisionError: by nothing .in .*launch.$"),
    ("killed", DistillError, r"process 1 was killed \(signal 9\), perhaps for lack of memory \(log: .*launcher.log\)"),
    ("exit", DistillError, r"process 1 ended with status 9 \(log: "), ("pause", StagePaused, "^the time is up$")])
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


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
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
    with pytest.raises(DistillError, match=r"training on several devices stopped: .*distributed_type.* \(log: .*launcher.log\)"):
        launch(Params(out=str(here)), "own_stage:work", 2)


def test_the_mistake_of_one_counts_more_than_the_surprise_of_another(tmp_path, monkeypatch):
    "A process that lost another fails as well, and may be quicker to write it down"
    for rank, kind, why in ((0, "RuntimeError", "Connection closed by peer"), (1, "DistillError", "training diverged")):
        monkeypatch.setenv("RANK", str(rank))
        write_outcome(tmp_path, "failed", kind=kind, why=why)
    with pytest.raises(DistillError, match="^training diverged$"): read_outcome(tmp_path)


def test_an_older_launch_leaves_no_result_behind(here):
    assert launch(Params(out=str(here)), "own_stage:work", 2)
    with pytest.raises(DistillError): launch(Params(out=str(here), end="exit"), "own_stage:work", 2)


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
