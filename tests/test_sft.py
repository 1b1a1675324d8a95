"""What fine-tuning learns from, that it notices when it diverges, and that it survives a kill; on tiny models."""
import json
import math
import os
import subprocess
import sys

import pytest
import torch

import tiny
from conftest import DEADLINE, ROOT, environment
from distill_nb import sft
from distill_nb.core import DistillError, read_json, read_jsonl, write_json, write_jsonl
from distill_nb.data import open_rows
from distill_nb.families import FAMILIES, collate, encode
from distill_nb.hardware import plan_hardware
from distill_nb.models import check_model, load_model
from distill_nb.stage import ModelSpec, check, clear_scratch, finish_stage, open_stage

PLAN = plan_hardware("cpu")
CAUSAL = FAMILIES["causal"]


def conversation(name, answer, question="Say it."):
    return {"id": name, "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], "meta": {}}


ROWS = [conversation(str(n), answer) for n, answer in enumerate(["Yes.", "A longer answer, with commas.", "ভাত"])]
OTHERS = [conversation(f"v{n}", answer, f"Say that, {n}.") for n, answer in enumerate(["No.", "Never again."])]


@pytest.fixture(scope="module")
def base(tmp_path_factory): return tiny.make(tmp_path_factory.mktemp("base"), "chatml")


def reader(loaded, params):
    classes = sft.class_names(loaded.model) if loaded.family.name == "classifier" else None
    return sft.Reader(loaded.tokenizer, loaded.family, params.max_length, params.loss_on, classes)


def trainer_for(base, folder, train=ROWS, validation=(), **more):
    "A trainer on rows in memory"
    values = dict(out=str(folder), model=ModelSpec(name=str(base)), data="sample", engine="trl", batch_size=3, max_length=256,
                  max_steps=1, learning_rate=1e-9, lora_r=2) | more
    params = sft.SftParams(**values)
    write_jsonl(folder/"rows"/"train.jsonl", train)
    if validation: write_jsonl(folder/"rows"/"validation.jsonl", validation)
    loaded = sft.load_student(params, PLAN, "trl")
    with open_rows(str(folder/"rows")) as rows: sets = sft.training_sets(rows, reader(loaded, params), folder/"checkpoints")
    return sft.make_trainer(params, PLAN, loaded, *sets, micro=params.batch_size), params, loaded


def train(trainer, params):
    "Train what is already built"
    return sft.run_training(lambda micro: trainer, params, PLAN).curve


def learnt(batch): return sorted(tuple(labels[labels != -100].tolist()) for labels in batch["labels"])


@pytest.mark.parametrize("kind", ["chatml", "llama3", "gemma2", "phi3", "mistral", "gpt2"])
def test_the_trainers_tokens_are_those_of_the_one_encoding(kind, tmp_path):
    "Tokens, mask and labels; and one BOS where the model has one"
    trainer, _, loaded = trainer_for(tiny.make(tmp_path/"base", kind), tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    wanted = collate([encode(loaded.tokenizer, r, CAUSAL) for r in ROWS], CAUSAL, loaded.tokenizer)
    order = [sorted(range(3), key=lambda i: b["labels"][i].tolist()) for b in (batch, wanted)]
    for key in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(batch[key][order[0]], wanted[key][order[1]]), key
    bos = loaded.tokenizer.bos_token_id
    if kind in ("llama3", "gemma2", "mistral"): assert (batch["input_ids"] == bos).sum(1).tolist() == [1, 1, 1]


def test_only_the_answers_tokens_are_learnt(base, tmp_path):
    trainer, _, loaded = trainer_for(base, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    assert {loaded.tokenizer.decode(t) for t in learnt(batch)} == {r["messages"][-1]["content"] + "<|im_end|>\n" for r in ROWS}


def textbook_loss(base, batch):
    "Cross-entropy of the labels, from full logits of a model that no trainer has touched"
    plain = load_model(ModelSpec(name=str(base)), PLAN, "float32").model
    with torch.inference_mode():
        logits = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100).item()


def test_the_loss_is_the_cross_entropy_of_those_tokens(base, tmp_path):
    trainer, params, _ = trainer_for(base, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    curve = train(trainer, params)
    assert curve[0]["loss"] == pytest.approx(textbook_loss(base, batch), abs=1e-4)


UNSLOTH = """
import json, sys
from pathlib import Path
from distill_nb import sft
base, out, data = sys.argv[1:]
engine, _ = sft.choose_engine("unsloth", Path(out)/"compiled")
from distill_nb.data import open_rows
from distill_nb.hardware import plan_hardware
params = sft.SftParams(out=out, model=base, data=data, engine="unsloth", batch_size=3, max_length=256, max_steps=1, learning_rate=1e-9, lora_r=2)
loaded = sft.load_student(params, plan_hardware("cpu"), "unsloth")
with open_rows(data) as rows: train, validation = sft.training_sets(rows, sft.Reader(loaded.tokenizer, loaded.family, 256), Path(out)/"checkpoints")
trainer = sft.make_trainer(params, plan_hardware("cpu"), loaded, train, validation, 3)
batch = {k: v.tolist() for k, v in next(iter(trainer.get_train_dataloader())).items()}
curve = sft.run_training(lambda micro: trainer, params, plan_hardware("cpu")).curve
final = sft.save_student(params, loaded)
targets = json.loads((final/"adapter_config.json").read_text())["target_modules"]
print("RESULT" + json.dumps({"batch": batch, "curve": curve, "module": type(trainer).__module__, "targets": sorted(targets)}))
"""


def test_unsloth_learns_exactly_the_same(base, tmp_path):
    "The real Unsloth, in a process of its own: it patches transformers as it is imported"
    write_jsonl(tmp_path/"rows"/"train.jsonl", ROWS)
    done = subprocess.run([sys.executable, "-c", UNSLOTH, str(base), str(tmp_path/"out"), str(tmp_path/"rows")], text=True,
                          capture_output=True, cwd=tmp_path, env=environment(None), timeout=DEADLINE)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.split("RESULT")[1])
    batch = {k: torch.tensor(v) for k, v in result["batch"].items()}
    tokenizer = load_model(ModelSpec(name=str(base)), PLAN, "float32").tokenizer
    encoded = [encode(tokenizer, r, CAUSAL) for r in ROWS]
    assert learnt(batch) == sorted(tuple(t for t in e.labels if t != -100) for e in encoded)
    assert result["curve"][0]["loss"] == pytest.approx(textbook_loss(base, batch), abs=1e-4)
    assert result["targets"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_rows_that_do_not_fit_are_counted_in_training_and_in_validation(base, tmp_path, capsys):
    tokenizer = load_model(ModelSpec(name=str(base)), PLAN, "float32").tokenizer
    limit = max(len(encode(tokenizer, r, CAUSAL).input_ids) for r in ROWS)
    def too_long(split): return [conversation(f"{split} long", "Yes.", f"{split} " * 500), conversation(f"{split} cut", "yes " * 500, split)]
    unanswered = {"id": "none", "messages": OTHERS[1]["messages"][:1], "meta": {}}
    trainer, *_ = trainer_for(base, tmp_path, ROWS + too_long("a"), [OTHERS[0], unanswered, *too_long("b")], max_length=limit)
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (4, 2)
    assert all(any(t != -100 for t in r["labels"]) and len(r["input_ids"]) <= limit for r in trainer.train_dataset)
    out = capsys.readouterr().out
    assert "train: 4 rows, the longest of" in out and "validation: 2 rows, the longest of" in out
    for split in ("train", "validation"):
        assert f"{split}: 1 row longer than max_length={limit}: the end is cut off" in out
        assert f"{split}: 1 row left out: the prompt alone fills max_length={limit}" in out
    assert "validation: 1 row left out: there is no answer" in out


def test_nothing_that_fits_is_said_with_what_to_change(base, tmp_path, capsys):
    with pytest.raises(DistillError, match="max_length: 8: every prompt alone is longer; raise it"):
        trainer_for(base, tmp_path, max_length=8)
    trainer, *_ = trainer_for(base, tmp_path, validation=[conversation("long", "Yes.", "x " * 500)])
    assert trainer.eval_dataset is None and "validation: 1 row left out" in capsys.readouterr().out


def test_a_row_without_an_answer_is_named(base, tmp_path):
    with pytest.raises(DistillError, match="row none of train has no answer"):
        trainer_for(base, tmp_path, [*ROWS, {"id": "none", "messages": ROWS[0]["messages"][:1], "meta": {}}])


# A run that diverges

@pytest.mark.parametrize("steps, validation", [(1, ()), (4, ()), (1, OTHERS)])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_that_diverges_stops_and_is_not_saved(method, steps, validation, base, tmp_path):
    "Even where the last step is the one that spoils it, whose loss nobody logs"
    trainer, params, loaded = trainer_for(base, tmp_path, validation=validation, method=method, max_steps=steps, learning_rate=1e30,
                                          warmup_ratio=0)
    with pytest.raises(DistillError, match=r"training diverged: at step [12], .* is no longer a number: lower learning_rate"):
        train(trainer, params)
    assert not (tmp_path/"train_log.jsonl").exists()
    assert not [p for p in tmp_path.glob("checkpoints/checkpoint-*/complete") if sft.damage(p.parent)]


def test_weights_that_are_no_numbers_are_never_saved(base, tmp_path):
    _, params, loaded = trainer_for(base, tmp_path)
    next(p for p in loaded.model.parameters() if p.requires_grad).data.fill_(math.nan)
    with pytest.raises(DistillError, match="training diverged: .* the weight .*lora_A"): sft.save_student(params, loaded)
    assert not (tmp_path/"adapter").exists() and not (tmp_path/".adapter").exists()


def test_a_checkpoint_with_nan_is_never_marked(base, tmp_path):
    trainer, params, loaded = trainer_for(base, tmp_path, max_steps=4, save_steps=2)
    spoilt = next(p for p in loaded.model.parameters() if p.requires_grad)
    from transformers import TrainerCallback
    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == 2: spoilt.data.fill_(math.nan)
    trainer.callback_handler.callbacks.insert(0, Spoil())
    with pytest.raises(DistillError, match="at step 2"): train(trainer, params)
    assert sft.last_checkpoint(tmp_path/"checkpoints") is None


@pytest.mark.parametrize("logs, what", [
    ({"loss": math.nan}, "the loss"), ({"loss": "inf"}, "the loss"), ({"eval_loss": math.inf}, "the loss on validation rows"),
    ({"loss": 1.0, "grad_norm": math.nan}, "the gradient")])
def test_every_number_of_the_log_is_looked_at(logs, what):
    with pytest.raises(DistillError, match=f"at step 7, {what} is no longer a number"): sft.check_log(logs, 7)


def test_a_gradient_may_overflow_while_the_fp16_scaler_looks_for_its_scale():
    overflows = 0
    for _ in range(sft.SKIPPED): overflows = sft.check_log({"loss": 1.0, "grad_norm": math.inf}, 7, overflows, scaled=True)
    assert sft.check_log({"loss": 1.0, "grad_norm": 0.5}, 7, overflows, scaled=True) == 0
    with pytest.raises(DistillError, match="the gradient"): sft.check_log({"loss": 1.0, "grad_norm": math.inf}, 7, overflows, scaled=True)


# Surviving a kill

def some_checkpoints(folder, *steps):
    for step in steps:
        (folder/f"checkpoint-{step}").mkdir(parents=True)
        (folder/f"checkpoint-{step}"/"model.safetensors").write_bytes(bytes([step]) * 100)
        (folder/f"checkpoint-{step}"/"trainer_state.json").write_text(f'{{"global_step": {step}}}')
        sft.mark_checkpoint(folder/f"checkpoint-{step}")
    return folder


def zeroed(file): file.write_bytes(bytes(file.stat().st_size))


def test_a_kill_before_the_manifest_trains_no_step_again(base, tmp_path):
    "Everything is done and saved, and the process dies: the next start goes on from the last checkpoint, to the same result"
    more = dict(validation=OTHERS, max_steps=3, save_steps=2, learning_rate=1e-3)
    trainer, params, loaded = trainer_for(base, tmp_path, **more)
    open_stage(params, "sft")
    curve = train(trainer, params)
    first = (sft.save_student(params, loaded)/"adapter_model.safetensors").read_bytes()
    assert sft.last_checkpoint(tmp_path/"checkpoints").name == "checkpoint-3"

    trainer, params, loaded = trainer_for(base, tmp_path, **more)
    open_stage(params, "sft")
    steps = []
    trainer.training_step = lambda *a, **k: steps.append(1)
    again = train(trainer, params)
    assert not steps and [list(p) for p in again] == [list(p) for p in curve]
    assert [list(p.values()) for p in again] == [pytest.approx(list(p.values())) for p in curve]
    assert (sft.save_student(params, loaded)/"adapter_model.safetensors").read_bytes() == first
    finish_stage(params)
    assert (tmp_path/"manifest.json").exists() and not (tmp_path/"checkpoints").exists()
    assert not [n for n in read_json(tmp_path/"manifest.json")["outputs"] if n.startswith("checkpoints")]


def test_checkpoints_stay_until_the_manifest_is_in_place(tmp_path):
    "Under the pipeline it is there only when the pipeline has taken it over"
    some_checkpoints(tmp_path/"checkpoints", 5)
    write_json(tmp_path/"stage.json", {"stage": "sft", "fingerprint": "abc", "started": 0})
    finish_stage(sft.SftParams(out=str(tmp_path), model="m", data="sample"))
    assert (tmp_path/"manifest.pending.json").exists() and sft.last_checkpoint(tmp_path/"checkpoints")
    clear_scratch(tmp_path)
    assert sft.last_checkpoint(tmp_path/"checkpoints")
    os.replace(tmp_path/"manifest.pending.json", tmp_path/"manifest.json")
    clear_scratch(tmp_path)
    assert not (tmp_path/"checkpoints").exists()


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(base, tmp_path):
    more = dict(max_steps=4, save_steps=1, learning_rate=1e-2)
    whole, params, loaded = trainer_for(base, tmp_path/"whole", **more)
    curve = train(whole, params)
    wanted = {n: p.clone() for n, p in loaded.model.named_parameters() if p.requires_grad}

    half, params, _ = trainer_for(base, tmp_path/"half", **more)
    from transformers import TrainerCallback
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == 3: raise KeyboardInterrupt
    half.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt): train(half, params)
    zeroed(tmp_path/"half"/"checkpoints"/"checkpoint-2"/"optimizer.pt")

    rest, params, loaded = trainer_for(base, tmp_path/"half", **more)
    assert [p["step"] for p in train(rest, params)] == [1, 2, 3, 4]
    for name, weight in loaded.model.named_parameters():
        if weight.requires_grad: assert torch.allclose(weight, wanted[name], atol=1e-6), name
    assert read_jsonl(tmp_path/"half"/"train_log.jsonl")[-1]["loss"] == pytest.approx(curve[-1]["loss"], abs=1e-5)


# What is refused before anything is paid

@pytest.mark.parametrize("kind, task, why", [
    ("bert_mlm", "chat", "is a masked model, which learns from rows of task text or classify; rows of task chat are for"),
    ("bert_cls", "text", "is a classifier model"), ("t5", "text", "is a seq2seq model"), ("chatml", "text", "for masked models")])
def test_a_model_whose_family_has_no_use_for_the_rows_is_refused(kind, task, why, tmp_path):
    folder = tiny.make(tmp_path/kind, kind)
    with pytest.raises(DistillError, match=why): sft.SftParams(model=str(folder), data="sample", task=task).ready()


def test_an_adapter_is_refused_before_the_run(base, tmp_path):
    (tmp_path/"adapter").mkdir()
    write_json(tmp_path/"adapter"/"adapter_config.json", {"base_model_name_or_path": str(base)})
    for layers in (None, 1):
        params = sft.SftParams(model=ModelSpec(name=str(tmp_path), layers=layers), data="sample")
        for refuse in (params.ready, lambda: sft.student_folder(params, tmp_path/"base")):
            with pytest.raises(DistillError, match="is an adapter; merge it first"): refuse()


def test_an_engine_that_is_demanded_and_missing_is_said_before_the_run(monkeypatch):
    import importlib.util
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "unsloth" else real(name, *a))
    params = sft.SftParams(model="m", data="sample", engine="unsloth")
    with pytest.raises(DistillError, match="engine: unsloth: is not installed"): params.ready()
    params.ready(keys=False)  # a plan for another machine


def test_four_bit_weights_cannot_be_trained_whole():
    with pytest.raises(DistillError, match="4-bit weights cannot be trained"):
        check(sft.SftParams, {"model": {"name": "m", "quantize": "4bit"}, "data": "sample", "method": "full"}, "here")


def test_a_four_bit_base_is_trained_under_its_adapter(base, tmp_path):
    base = tiny.make(tmp_path/"base", "chatml", hidden_size=64, intermediate_size=128)  # NF4 comes in blocks of 64
    trainer, params, loaded = trainer_for(base, tmp_path, model=ModelSpec(name=str(base), quantize="4bit"), learning_rate=1e-3)
    curve = train(trainer, params)
    final = sft.save_student(params, loaded)
    assert loaded.quantize == "4bit" and math.isfinite(curve[0]["loss"])
    assert read_json(final/"base.json")["quantize"] == "4bit"


def test_memory_is_planned_for_the_rows_that_there_are(base, tmp_path):
    "Rows of a few tokens do not need what 8,192 would"
    write_jsonl(tmp_path/"train.jsonl", ROWS)
    params = sft.SftParams(model=ModelSpec(name=str(base)), data=str(tmp_path), max_length=8192)
    with open_rows(str(tmp_path)) as rows:
        short = params.estimate(PLAN, rows, lambda spec: spec)
        longest = rows.longest("train")
        whole = params.model_copy(update={"max_length": longest // 2}).estimate(PLAN, rows, lambda spec: spec)
    assert short["activations"] == whole["activations"] and short["note"] == "1 step of 8 rows"
    assert short["trainable"] < short["parameters"]


def test_what_does_not_change_the_result_is_not_part_of_it():
    params = sft.SftParams(model="m", data="sample")
    assert params.result_parameters() == params.model_copy(update={"save_steps": 7}).result_parameters()
    assert sft.SftParams.descends == "model"
