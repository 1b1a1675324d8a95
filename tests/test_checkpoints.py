"""Checkpoints that are torn, copied, brought back; a second place that is dead, full, or killed in the middle."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

import tiny
from conftest import environment
from distill_nb import core
from distill_nb.core import DistillError, Place, read_json, write_json
from distill_nb.learn import training
from distill_nb.run.check import local_fields
from distill_nb.learn.training import damage, last_checkpoint, mark_checkpoint, read_mark, sync_checkpoint


def checkpoint(folder, step, best=None, content=None):
    "A marked checkpoint, as a trainer and the mark leave it"
    made = folder/f"checkpoint-{step}"
    (made/"deeper").mkdir(parents=True)
    (made/"adapter_model.safetensors").write_bytes(content or bytes([step % 256]) * 100)
    (made/"deeper"/"rng_state.pth").write_bytes(b"random")
    state = {"global_step": step} | ({"best_model_checkpoint": f"somewhere/checkpoint-{best}"} if best else {})
    (made/"trainer_state.json").write_text(json.dumps(state))
    mark_checkpoint(made)
    return made


@pytest.fixture
def stage(tmp_path):
    "A stage's folder, and its checkpoints'"
    write_json(tmp_path/"stage"/"stage.json", {"fingerprint": "f" * 64, "parameters": "p" * 64})
    (tmp_path/"stage"/"checkpoints").mkdir()
    return tmp_path/"stage"/"checkpoints"


@pytest.fixture
def there(tmp_path): return str(tmp_path/"there")


def new_disk(stage):
    "What a fresh session has"
    for p in stage.glob("*"): shutil.rmtree(p) if p.is_dir() else p.unlink()


def copies(there): return {p.parent.name: p.parent for p in Path(there).rglob("complete")}


# Torn

def short(file): file.write_bytes(file.read_bytes()[:-10])
def empty(file): file.write_bytes(b"")
def zeroed(file): file.write_bytes(bytes(file.stat().st_size))
def gone(file): file.unlink()


@pytest.mark.parametrize("tear", [short, empty, zeroed, gone])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "deeper/rng_state.pth", "trainer_state.json", "complete"])
def test_a_torn_checkpoint_is_passed_over_and_removed(tear, name, tmp_path, capsys):
    "Also one that is torn behind its mark, as a power cut leaves it"
    for step in (5, 10, 15): checkpoint(tmp_path, step)
    tear(tmp_path/"checkpoint-15"/name)
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    assert "checkpoint-15 is passed over" in capsys.readouterr().out
    assert not (tmp_path/"checkpoint-15").exists(), "the trainer would keep it in the place of a whole one"
    assert last_checkpoint(tmp_path).name == "checkpoint-10"


def test_a_checkpoint_is_torn_wherever_a_byte_of_it_changes_or_an_end_is_missing(tmp_path):
    made = checkpoint(tmp_path, 5)
    for file in [p for p in made.rglob("*") if p.is_file()]:
        whole = file.read_bytes()
        for at in range(0, len(whole), 7):
            torn = bytearray(whole)
            torn[at] ^= 1
            for content in (bytes(torn), whole[:at]):
                file.write_bytes(content)
                same = file.name == "complete" and read_mark(content) == read_mark(whole)  # white space of the mark
                assert bool(damage(made)) != same, (file.name, at, content)
        file.write_bytes(whole)
    assert damage(made) == ""


@pytest.mark.parametrize("mark", ["", "{}", "[]", "null", "5", '{"a": 1}', '{"a": [1]}', '{"a": ["1", "x"]}', '{"a": [1, "x"', "\udcff",
                                  '{"../a": [1, "x"]}', '{"/etc/passwd": [1, "x"]}'])
def test_a_mark_that_is_none_belongs_to_no_checkpoint(mark, tmp_path):
    made = checkpoint(tmp_path, 5)
    (made/"complete").write_bytes(mark.encode("utf-8", "surrogateescape"))
    assert read_mark((made/"complete").read_bytes()) == {} and damage(made) == "its mark cannot be read"


def test_without_a_whole_checkpoint_training_starts_from_the_beginning(tmp_path):
    assert last_checkpoint(tmp_path/"nowhere") is None
    (tmp_path/"checkpoint-5").mkdir()
    (tmp_path/"checkpoint-old").mkdir()
    assert last_checkpoint(tmp_path) is None
    assert (tmp_path/"checkpoint-old").exists(), "it is not ours"


def test_a_checkpoint_is_hashed_once_when_it_is_written_and_copied(stage, there, monkeypatch):
    hashed = []
    monkeypatch.setattr(training, "sha256_file", lambda f: hashed.append(f.name) or core.sha256_file(f))
    sync_checkpoint(checkpoint(stage, 5), there)
    assert sorted(hashed) == ["adapter_model.safetensors", "rng_state.pth", "trainer_state.json"]


# Another place

@pytest.mark.parametrize("place", ["folder", "memory"])
def test_a_checkpoint_comes_back_on_a_fresh_disk(place, stage, tmp_path):
    url = str(tmp_path/"there") if place == "folder" else f"memory://{tmp_path.name}"
    for step in (5, 10): assert sync_checkpoint(checkpoint(stage, step), url)
    files = {p.relative_to(stage): p.read_bytes() for p in (stage/"checkpoint-10").rglob("*") if p.is_file()}
    new_disk(stage)
    found = last_checkpoint(stage, url)
    assert found == stage/"checkpoint-10" and damage(found) == ""
    assert {p.relative_to(stage): p.read_bytes() for p in stage.rglob("*") if p.is_file()} == files
    assert [p.name for p in stage.iterdir()] == ["checkpoint-10"], "one is enough"


def test_the_newest_two_and_the_best_are_kept(stage, there):
    for step, best, kept in [(5, 5, [5]), (10, 5, [5, 10]), (15, 5, [5, 10, 15]), (20, 5, [5, 15, 20]), (25, 25, [20, 25]), (30, 25, [25, 30]),
                             (35, 25, [25, 30, 35])]:
        sync_checkpoint(checkpoint(stage, step, best), there)
        assert sorted(copies(there)) == sorted(p.name for p in Path(there).glob("*/*")) == sorted(f"checkpoint-{n}" for n in kept), step
        assert not [damage(c) for c in copies(there).values() if damage(c)]


def test_a_best_one_that_did_not_arrive_is_sent_with_the_next(stage, there):
    checkpoint(stage, 5)
    checkpoint(stage, 10, best=5)
    sync_checkpoint(stage/"checkpoint-10", there)
    assert sorted(copies(there)) == ["checkpoint-10", "checkpoint-5"]


def test_the_newer_one_is_taken_whether_it_is_here_or_there(stage, there):
    for step in (5, 10): sync_checkpoint(checkpoint(stage, step), there)
    checkpoint(stage, 15)
    assert last_checkpoint(stage, there).name == "checkpoint-15"
    for step in (10, 15): shutil.rmtree(stage/f"checkpoint-{step}")
    assert last_checkpoint(stage, there).name == "checkpoint-10"


@pytest.mark.parametrize("tear", [short, zeroed, gone])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "complete"])
def test_a_torn_copy_is_passed_over_and_replaced_later(tear, name, stage, there, capsys):
    for step in (5, 10): sync_checkpoint(checkpoint(stage, step), there)
    tear(copies(there)["checkpoint-10"]/name)
    new_disk(stage)
    assert last_checkpoint(stage, there).name == "checkpoint-5"
    assert [p.name for p in stage.iterdir()] == ["checkpoint-5"]
    sync_checkpoint(checkpoint(stage, 7), there)
    assert sorted(copies(there)) == ["checkpoint-5", "checkpoint-7"], "10 is of a future that did not come"
    sync_checkpoint(checkpoint(stage, 10), there)
    new_disk(stage)
    assert last_checkpoint(stage, there).name == "checkpoint-10"


def test_a_checkpoint_that_is_torn_here_comes_back_from_there(stage, there):
    for step in (5, 10): sync_checkpoint(checkpoint(stage, step), there)
    zeroed(stage/"checkpoint-10"/"adapter_model.safetensors")
    assert last_checkpoint(stage, there).name == "checkpoint-10" and damage(stage/"checkpoint-10") == ""


def other_parameters(stage): write_json(stage.parent/"stage.json", {"fingerprint": None, "parameters": "q" * 64})
def other_fingerprint(stage): write_json(stage.parent/"stage.json", {"fingerprint": "g" * 64, "parameters": "p" * 64})
def other_rows(stage): (stage/"train.arrow").write_bytes(b"other token ids")
def asked_for(stage): write_json(stage.parent/"stage.json", read_json(stage.parent/"stage.json") | {"why": "asked for"})


@pytest.mark.parametrize("change", [other_parameters, other_fingerprint, other_rows, asked_for])
def test_a_copy_of_other_work_is_never_brought_back(change, stage, there):
    sync_checkpoint(checkpoint(stage, 5), there)
    new_disk(stage)
    change(stage)
    assert last_checkpoint(stage, there) is None


@pytest.mark.parametrize("written, meant", [("there", "HERE/there"), ("hf://me/student", "hf://me/student")])
def test_a_relative_second_place_is_beside_the_run_and_not_inside_of_the_stage(written, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = training.TrainParams(model="m", data="sample", sync_to=written)
    local_fields(params, tmp_path/"recipe.yaml")
    assert params.sync_to == meant.replace("HERE", str(tmp_path))


def test_what_somebody_else_keeps_at_the_place_stays(stage, there):
    Path(there).mkdir()
    (Path(there)/"notes.txt").write_text("mine")
    sync_checkpoint(checkpoint(stage, 5), there)
    (next(Path(there).glob("checkpoints-*"))/"checkpoint-old").write_text("mine")
    for step in (10, 15): sync_checkpoint(checkpoint(stage, step), there)
    assert sorted(p.name for p in Path(there).rglob("*") if p.is_file() and p.read_bytes() == b"mine") == ["checkpoint-old", "notes.txt"]


# A place that is dead, full, or slow to die

class Faulty(MemoryFileSystem):
    "A place in memory that fails, or ends this process, at the nth file that is sent"
    protocol, cachable, store, pseudo_dirs = "faulty", False, {}, [""]
    fail_at, sent, error = None, 0, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def put_file(self, lpath, rpath, **kw):
        type(self).sent += 1
        if Faulty.sent != Faulty.fail_at: return super().put_file(lpath, rpath, **kw)
        with self.open(rpath, "wb") as f: f.write(Path(lpath).read_bytes()[:3])
        raise Faulty.error


fsspec.register_implementation("faulty", Faulty, clobber=True)


@pytest.fixture
def faulty():
    Faulty.store.clear()
    Faulty.sent, Faulty.fail_at = 0, None
    yield Faulty
    Faulty.fail_at = None


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_copy_that_breaks_off_is_said_and_made_good_with_the_next(at, stage, faulty, capsys):
    "The fourth file is the mark"
    assert sync_checkpoint(checkpoint(stage, 5), "faulty://there")
    faulty.fail_at = faulty.sent + at
    assert not sync_checkpoint(checkpoint(stage, 10), "faulty://there")
    said = capsys.readouterr().out
    assert "checkpoint-10 is not at the second place: sync_to: faulty://there: cannot be used: " in said
    assert "No space left on device; the next checkpoint tries again" in said and len(said.splitlines()) == 1
    shutil.copytree(stage, stage.parent/"kept")
    new_disk(stage)
    assert last_checkpoint(stage, "faulty://there").name == "checkpoint-5", "the half of a copy counts for nothing"
    assert sync_checkpoint(checkpoint(stage, 15), "faulty://there")
    new_disk(stage)
    assert last_checkpoint(stage, "faulty://there").name == "checkpoint-15"
    assert not [name for name in faulty.store if "checkpoint-10" in name]


KILLED = """
import os, signal, sys
from pathlib import Path
from fsspec.implementations.local import LocalFileSystem
from distill_nb.learn.training import sync_checkpoint
checkpoint, there, at = sys.argv[1:]
sent, put = [], LocalFileSystem.put_file
def put_some(self, lpath, rpath, **kw):
    sent.append(lpath)
    if len(sent) < int(at): return put(self, lpath, rpath, **kw)
    Path(rpath).write_bytes(Path(lpath).read_bytes()[:5])
    os.kill(os.getpid(), signal.SIGKILL)
LocalFileSystem.put_file = put_some
sync_checkpoint(Path(checkpoint), there)
"""


@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_kill_in_the_middle_of_a_copy_leaves_the_one_before(at, stage, there):
    sync_checkpoint(checkpoint(stage, 5), there)
    made = checkpoint(stage, 10)
    done = subprocess.run([sys.executable, "-c", KILLED, str(made), there, str(at)], env=environment(None))
    assert done.returncode == -signal.SIGKILL
    new_disk(stage)
    assert last_checkpoint(stage, there).name == "checkpoint-5"
    sync_checkpoint(checkpoint(stage, 10), there)
    new_disk(stage)
    assert last_checkpoint(stage, there).name == "checkpoint-10"


def test_a_dead_place_is_a_mistake_at_the_beginning_and_a_remark_later(stage, tmp_path, capsys):
    (tmp_path/"file").write_text("in the way")
    dead = str(tmp_path/"file"/"there")
    with pytest.raises(DistillError, match="sync_to: .*file/there: cannot be used: NotADirectoryError"): last_checkpoint(stage, dead)
    made = checkpoint(stage, 5)
    assert not sync_checkpoint(made, dead)
    assert last_checkpoint(stage, dead) == made
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[0].endswith("the next checkpoint tries again") and said[1].endswith("training goes on from checkpoint-5")


def test_a_disk_that_is_full_here_is_said_and_leaves_nothing_half(stage, there, tmp_path):
    sync_checkpoint(checkpoint(stage, 5, content=bytes(200_000)), there)
    new_disk(stage)
    code = ("import resource, signal, sys\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "from distill_nb.learn.training import last_checkpoint\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))\n"
            "last_checkpoint(*sys.argv[1:])")
    done = subprocess.run([sys.executable, "-c", code, str(stage), there], capture_output=True, text=True, env=environment(None))
    last = done.stderr.strip().splitlines()[-1]
    assert "DistillError" in last and "adapter_model.safetensors: cannot be written: File too large" in last
    assert not list(stage.iterdir()) and last_checkpoint(stage, there).name == "checkpoint-5"


def test_a_disk_that_is_full_leaves_no_mark(stage):
    made = checkpoint(stage, 5)
    (made/"complete").unlink()
    code = ("import resource, signal, sys\nfrom pathlib import Path\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "from distill_nb.learn.training import mark_checkpoint\nresource.setrlimit(resource.RLIMIT_FSIZE, (20, -1))\n"
            "mark_checkpoint(Path(sys.argv[1]))")
    done = subprocess.run([sys.executable, "-c", code, str(made)], capture_output=True, text=True, env=environment(None))
    assert "complete: cannot be written: File too large" in done.stderr
    assert not (made/"complete").exists() and last_checkpoint(stage) is None


# The hub

class Hub(MemoryFileSystem):
    "A hub in memory, through the two doors that we use"
    protocol, cachable, store, pseudo_dirs = "hf", False, {}, [""]
    made, commits, tokens = [], [], set()

    def __init__(self, token=None, **kw):
        super().__init__(**kw)
        Hub.tokens.add(token)

    @classmethod
    def _strip_protocol(cls, path): return "/" + path.removeprefix("hf://").strip("/")

    def makedirs(self, path, exist_ok=False): pass

    def put_file(self, *_, **__): raise AssertionError("a commit for each file")


class Api:
    def __init__(self, token=None): Hub.tokens.add(token)
    def create_repo(self, name, repo_type, private, exist_ok): Hub.made.append((name, repo_type, private))

    def create_commit(self, name, operations, commit_message, repo_type):
        Hub.commits.append(name)
        root = "/" + ("" if repo_type == "model" else f"{repo_type}s/") + name
        for o in operations:
            path = f"{root}/{o.path_in_repo}"
            if type(o).__name__ == "CommitOperationDelete": Hub.store.pop(path)
            else: Hub().pipe_file(path, Path(o.path_or_fileobj).read_bytes())


@pytest.mark.parametrize("url, repository", [
    ("hf://me/student", ("me/student", "model", True)), ("hf://models/me/student/run", ("me/student", "model", True)),
    ("hf://datasets/me/copies/run/", ("me/copies", "dataset", True))])
def test_checkpoints_go_to_a_private_repository_in_one_commit_each(url, repository, stage, monkeypatch, capsys):
    monkeypatch.setitem(_registry, "hf", Hub)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setenv("HF_TOKEN", "hf_not_to_be_seen")
    Hub.store.clear(), Hub.made.clear(), Hub.commits.clear(), Hub.tokens.clear()
    for step in (5, 10, 15): assert sync_checkpoint(checkpoint(stage, step), url)
    assert {*Hub.made} == {repository} and len(Hub.commits) == 3 and Hub.tokens >= {"hf_not_to_be_seen"}
    assert {name.split("/")[-2] for name in Hub.store if name.endswith("complete")} == {"checkpoint-10", "checkpoint-15"}
    new_disk(stage)
    assert last_checkpoint(stage, url).name == "checkpoint-15" and damage(stage/"checkpoint-15") == ""
    assert "hf_not_to_be_seen" not in capsys.readouterr().out


def test_a_password_in_an_address_is_not_repeated(stage, capsys):
    url = "ftp://me:secret@127.0.0.1:1/there"
    with pytest.raises(DistillError) as e: Place(url)
    sync_checkpoint(checkpoint(stage, 5), url)
    said = str(e.value) + capsys.readouterr().out
    assert "secret" not in said and said.count("ftp://***@127.0.0.1:1/there: cannot be used") == 2


# Several processes

@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_alone_marks_copies_and_fetches(rank, stage, there, monkeypatch):
    sync_checkpoint(checkpoint(stage, 5), there)
    waits = []
    monkeypatch.setenv("RANK", str(rank)), monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(training, "wait_for_all", lambda: waits.append(sorted(p.name for p in stage.iterdir())))
    made = checkpoint(stage, 10)
    sync_checkpoint(made, there)
    assert (made/"complete").exists() == (rank == 0) and ("checkpoint-10" in copies(there)) == (rank == 0)
    waits.clear()
    last_checkpoint(stage, there)
    assert len(waits) == 1, "as often as the others"


# A disk that fills up in the middle of training

TRAINING = """
import resource, sys
from distill_nb.hardware import plan_hardware
from distill_nb.learn.training import TrainParams, run_training, training_arguments
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
base, out, full = sys.argv[1:]
params, plan = TrainParams(model=base, out=out, data="sample", method="full", batch_size=4, micro_batch=4, max_steps=4, save_steps=2), plan_hardware("cpu")

class Fill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kw):
        if state.global_step == 3 and int(full): resource.setrlimit(resource.RLIMIT_FSIZE, (int(full), -1))

def build(micro):
    rows = Dataset.from_list([{"input_ids": [7 + n] * 8, "labels": [7 + n] * 8} for n in range(16)])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return Trainer(model, TrainingArguments(**training_arguments(params, plan, 16, False, micro)), None, rows, callbacks=[Fill()])

print("steps:", [p["step"] for p in run_training(build, params, plan).curve])
"""


def test_a_disk_that_fills_up_while_training_is_said_and_training_goes_on_later(tmp_path):
    "Each library has its own words for it: safetensors, torch, Python"
    base = tiny.make(tmp_path/"base", "chatml")
    def train(full):
        return subprocess.run([sys.executable, "-c", TRAINING, str(base), str(tmp_path/"out"), str(full)], capture_output=True, text=True,
                              env=environment(None), cwd=tmp_path)
    room = {p.name: p.stat().st_size for p in base.iterdir()}["model.safetensors"]
    for full in (room // 2, room + 2000):  # in the weights, in the optimiser
        done = train(full)
        last = done.stderr.strip().splitlines()[-1]
        assert "DistillError" in last and "checkpoint-4: cannot be written: no room is left on the disk" in last, (full, done.stderr)
        assert not (tmp_path/"out"/"checkpoints"/"checkpoint-4"/"complete").exists()
    done = train(0)
    assert "goes on from checkpoint-2" in done.stdout and "steps: [1, 2, 3, 4]" in done.stdout, done.stderr
