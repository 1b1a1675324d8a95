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
    assert short["activations"] == whole["activations"] and short["note"] == "1 step of 8 rows, 8 at a time"
    assert short["trainable"] < short["parameters"]


def test_what_does_not_change_the_result_is_not_part_of_it():
    params = sft.SftParams(model="m", data="sample")
    assert params.result_parameters() == params.model_copy(update={"save_steps": 7}).result_parameters()
    assert sft.SftParams.descends == "model"


# Rows laid end to end

def packed_and_padded(loaded, rows, room):
    "A batch of each, of the same rows"
    rows = [vars(encode(loaded.tokenizer, r, CAUSAL)) for r in rows]
    return [sft.Batches(loaded.tokenizer, CAUSAL, room=r)(rows) for r in (room, None)]


@pytest.mark.parametrize("kind", ["chatml", "llama3", "gemma2", "gemma3", "phi3", "mistral", "gpt2"])
def test_a_packed_row_has_the_logits_that_it_has_alone(kind, tmp_path):
    loaded = load_model(ModelSpec(name=str(tiny.make(tmp_path, kind))), PLAN, "float32")
    sft.check_packing(loaded.model)
    packed, padded = packed_and_padded(loaded, [*ROWS, *OTHERS], 1000)
    assert len(packed["input_ids"]) == 1 and "attention_mask" not in packed
    with torch.no_grad():
        together = loaded.model(input_ids=packed["input_ids"], position_ids=packed["position_ids"], use_cache=False).logits[0]
        alone = loaded.model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
    starts = (packed["position_ids"][0] == 0).nonzero().flatten().tolist()
    lengths = padded["attention_mask"].sum(1).tolist()
    by_length = sorted(range(5), key=lambda i: -lengths[i])
    for start, i in zip(starts, by_length, strict=True):
        assert torch.allclose(together[start:start + lengths[i]], alone[i, :lengths[i]], atol=1e-4), i


@pytest.mark.parametrize("name, config", [("OPTForCausalLM", dict(ffn_dim=64, word_embed_proj_dim=32)), ("BloomForCausalLM", dict(n_layer=2, n_head=4))])
def test_packing_is_refused_where_rows_would_see_each_other(name, config):
    import transformers
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4) | config))
    with pytest.raises(DistillError, match=f"packing: in {name}, packed rows would see each other .* use group_by_length"): sft.check_packing(model)


def test_packing_is_refused_for_a_family_that_cannot_before_the_run(tmp_path):
    params = sft.SftParams(model=str(tiny.make(tmp_path, "t5")), data="sample", packing=True)
    with pytest.raises(DistillError, match="packing: is for causal models, and .* is trained as a seq2seq model"): params.ready()


def test_packing_changes_the_padding_and_not_the_loss(base, tmp_path):
    rows = [conversation(str(n), "yes " * length) for n, length in enumerate([1, 60, 2, 50, 3, 1, 2, 20])]
    curves = {}
    for packing in (False, True):
        more = dict(packing=packing, batch_size=8, max_steps=3, learning_rate=1e-3, lora_dropout=0.0)
        trainer, params, loaded = trainer_for(base, tmp_path/str(packing), rows, OTHERS, **more)
        if packing: assert check_padding(trainer, params) < 0.7
        curves[packing] = train(trainer, params)
    for a, b in zip(curves[False], curves[True], strict=True):
        for key in ("loss", "eval_loss"): assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=2e-3)


def check_padding(trainer, params):
    "How many positions a packed batch has, of those that padding makes"
    rows = [trainer.train_dataset[i] for i in range(8)]
    batches = [sft.Batches(trainer.processing_class, CAUSAL, room)(rows)["input_ids"].numel() for room in (params.max_length, None)]
    return batches[0] / batches[1]


def test_no_row_predicts_the_first_token_of_the_next():
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    batch = sft.collate_packed(rows, Padding(), room=6)
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    apart = sft.collate_packed(rows + rows[:1], Padding(), room=5)  # nine positions, where two rows of five would be ten
    assert apart["input_ids"].tolist() == [[5, 6, 7], [5, 6, 7], [8, 9, 0]]
    assert apart["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2], [0, 1, 0]]


class Padding: pad_token_id, eos_token_id = 0, 0


# Every family

def run_stage(folder, base, task, train, validation=(), **more):
    "The whole stage, on rows in memory"
    write_jsonl(folder/"rows"/"train.jsonl", train)
    if validation: write_jsonl(folder/"rows"/"validation.jsonl", validation)
    values = dict(out=str(folder), model=str(base), data=str(folder/"rows"), task=task, engine="trl", batch_size=4, max_length=64,
                  max_steps=6, learning_rate=1e-2, lora_r=4, method="full")
    params = sft.SftParams(**values | more)
    params.ready()
    with open_rows(params.data, task) as rows: params.check_data(rows.require("train"))
    return sft.train_stage(params), params


LABELLED = [{"id": str(n), "text": "good good dog" if n % 2 else "bad bad cat", "label": "good" if n % 2 else "bad"} for n in range(12)]
UNSEEN = [{"id": f"v{n}", "text": f"good {n}" if n % 2 else f"bad {n}", "label": "good" if n % 2 else "bad"} for n in range(4)]
TEXTS = [{"id": str(n), "text": f"the cat sat on the mat and the dog lay in the sun {n}"} for n in range(8)]


@pytest.mark.parametrize("kind, task, train, validation, method, measures", [
    ("chatml", "chat", ROWS, OTHERS, "lora", {"perplexity", "token_accuracy"}),
    ("chatml", "classify", LABELLED, UNSEEN, "lora", {"perplexity", "token_accuracy"}),
    ("t5", "seq2seq", ROWS, OTHERS, "full", {"perplexity", "token_accuracy", "rougeL"}),
    ("t5", "chat", ROWS, OTHERS, "lora", {"perplexity", "token_accuracy", "rougeL"}),
    ("bert_mlm", "classify", LABELLED, UNSEEN, "full", {"accuracy", "macro_f1"}),
    ("bert_cls", "classify", LABELLED, UNSEEN, "lora", {"accuracy", "macro_f1"}),
    ("bert_mlm", "text", TEXTS, [dict(TEXTS[0], id="v", text="the dog")], "full", {"perplexity", "token_accuracy"}),
    ("bert_mlm", "text", TEXTS, [dict(TEXTS[0], id="v", text="the dog")], "lora", {"perplexity", "token_accuracy"})])
def test_every_family_learns_is_validated_and_can_be_loaded(kind, task, train, validation, method, measures, tmp_path):
    result, params = run_stage(tmp_path, tiny.make(tmp_path/"base", kind), task, train, validation, method=method)
    checks = [p for p in result["curve"] if "eval_loss" in p]
    assert {f"eval_{m}" for m in measures} | {"eval_loss", "step", "epoch"} == set(checks[-1])
    losses = [p["loss"] for p in result["curve"] if "loss" in p]
    assert len(losses) == 6 and min(losses[1:]) < losses[0]
    again = load_model(ModelSpec(name=str(tmp_path)), PLAN, "float32")
    assert again.family.name == result["family"]
    assert hasattr(again.model, "peft_config") == (method == "lora")


def test_two_encoders_become_one_that_writes(tmp_path):
    "As the smoke runs do, where no encoder-decoder weights can be had"
    from transformers import AutoTokenizer, EncoderDecoderModel
    from transformers.utils import logging
    bert = tiny.make(tmp_path/"bert", "bert_mlm")
    logging.disable_progress_bar()
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(str(bert), str(bert))
    tokenizer = AutoTokenizer.from_pretrained(bert)
    model.config.decoder_start_token_id, model.config.pad_token_id = tokenizer.cls_token_id, tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.sep_token_id
    model.save_pretrained(tmp_path/"base")
    tokenizer.save_pretrained(tmp_path/"base")
    result, _ = run_stage(tmp_path, tmp_path/"base", "seq2seq", ROWS, OTHERS, max_steps=8)
    losses = [p["loss"] for p in result["curve"] if "loss" in p]
    assert losses[-1] < losses[0] and "eval_rougeL" in result["curve"][-1]


@pytest.mark.parametrize("kind, task, train", [("chatml", "chat", [*ROWS, OTHERS[0]]), ("t5", "chat", [*ROWS, OTHERS[0]]), ("bert_cls", "classify", LABELLED[:4]),
    ("bert_mlm", "text", TEXTS[:4])])
def test_forward_passes_add_up_to_the_step_that_one_would_be(kind, task, train, tmp_path):
    "Means of means would not: the rows are not equally long"
    base = tiny.make(tmp_path/"base", kind, **{} if kind == "chatml" else dict(dropout_rate=0.0) if kind == "t5" else
                     dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    curves = [run_stage(tmp_path/str(micro), base, task, train, micro_batch=micro, max_steps=3, learning_rate=1e-3)[0]["curve"]
              for micro in (4, 1)]
    for a, b in zip(*curves, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=5e-2)


def test_the_validation_loss_is_a_mean_over_tokens_whatever_shares_a_batch(base, tmp_path):
    losses = []
    for micro in (1, 3):
        trainer, params, loaded = trainer_for(base, tmp_path/str(micro), validation=[*OTHERS, ROWS[1] | {"id": "v9", "messages": [
            {"role": "user", "content": "Now?"}, ROWS[1]["messages"][1]]}], micro_batch=micro)
        losses.append(trainer.evaluate())
    plain = load_model(ModelSpec(name=str(base)), PLAN, "float32").model
    batch = collate([trainer.eval_dataset[i] for i in range(3)], CAUSAL, trainer.processing_class)
    with torch.no_grad(): logits = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100).item()
    right = (logits.argmax(-1) == targets)[targets != -100].float().mean().item()
    for found in losses:
        assert found["eval_loss"] == pytest.approx(wanted, rel=2e-3) and found["eval_token_accuracy"] == pytest.approx(right)
        assert found["eval_perplexity"] == pytest.approx(math.exp(found["eval_loss"]), rel=1e-6)


def test_everything_is_learnt_where_the_recipe_says_so(base, tmp_path):
    trainer, *_ = trainer_for(base, tmp_path, loss_on="all")
    for row in trainer.train_dataset: assert row["labels"] == [-100, *row["input_ids"][1:]]


def test_a_mask_is_drawn_anew_each_epoch_and_again_the_same_after_a_kill(tmp_path):
    words = load_model(ModelSpec(name=str(tiny.make(tmp_path, "bert_mlm"))), PLAN, "float32").tokenizer
    masked = FAMILIES["masked"]
    rows = [vars(sft.Reader(words, masked, 64).encode(t, "train")) for t in TEXTS]
    batches = [sft.Batches(words, masked, seed=seed, epoch=epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0), (1, 0))]
    torch.manual_seed(0)
    first, later, other, again = (b(rows)["labels"] for b in batches)
    assert torch.equal(first, again) and not torch.equal(first, later) and not torch.equal(first, other)
    fixed = [sft.Reader(words, masked, 64).encode(TEXTS[0], "validation", validation=True) for _ in range(2)]
    assert fixed[0] == fixed[1] and any(l != -100 for l in fixed[0].labels)
    held = [sft.Batches(words, masked, epoch=e, fixed=True)([vars(fixed[0])]) for e in (0, 1)]
    assert torch.equal(held[0]["input_ids"], held[1]["input_ids"]) and held[0]["labels"][0].tolist() == fixed[0].labels


# Classes

def test_a_plain_load_finds_the_names_of_the_classes(tmp_path):
    from transformers import AutoModelForSequenceClassification
    rows = [dict(r, label=int(r["label"] == "bad"), label_text=r["label"]) for r in LABELLED]  # the order is that of the numbers
    _, params = run_stage(tmp_path, tiny.make(tmp_path/"base", "bert_mlm"), "classify", rows, max_steps=1)
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path/"model").config
    assert config.id2label == {0: "good", 1: "bad"} and config.label2id == {"good": 0, "bad": 1}


def test_an_adapter_brings_its_head_and_its_classes(tmp_path):
    result, params = run_stage(tmp_path, tiny.make(tmp_path/"base", "bert_mlm"), "classify", LABELLED, UNSEEN, method="lora", max_steps=12)
    again = load_model(ModelSpec(name=str(tmp_path)), PLAN, "float32")
    assert sft.class_names(again.model) == ["bad", "good"]
    ids = again.tokenizer(["good good dog", "bad bad cat"], return_tensors="pt", padding=True)
    with torch.no_grad(): assert again.model(**ids).logits.argmax(1).tolist() == [1, 0]


@pytest.mark.parametrize("names, new", [(["bad", "good"], False), (["good", "bad"], True), (["a", "b"], True)])
def test_a_head_is_kept_only_for_the_same_classes_in_the_same_order(names, new, tmp_path, capsys):
    base = tiny.make(tmp_path/"base", "bert_cls", num_labels=2, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
    params = sft.SftParams(out=str(tmp_path), model=str(base), data="sample", task="classify", method="full")
    student = sft.load_student(params, PLAN, "trl", {"": ["bad", "good"]})
    before = load_model(ModelSpec(name=str(base)), PLAN, "float32").model.classifier.weight
    assert torch.equal(before, student.model.classifier.weight) != new
    assert ("it gets a new one" in capsys.readouterr().out) == new


def test_soft_labels_are_learnt_as_they_are_and_hard_ones_beside_them():
    logits = torch.tensor([[1.0, -1.0, 0.5], [0.3, 0.2, 0.1]], requires_grad=True)
    soft = torch.tensor([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0]])
    total, count = sft.class_loss(logits, torch.tensor([1, 1]), soft)
    assert count == 2
    assert total.item() / 2 == pytest.approx(torch.nn.functional.cross_entropy(logits, soft).item(), abs=1e-6)
    total.backward()
    assert torch.allclose(logits.grad, (logits.softmax(1) - soft).detach(), atol=1e-6)
    rows = [{"input_ids": [1], "labels": [1], "soft": [0.2, 0.5, 0.3]}, {"input_ids": [2], "labels": [1], "soft": None}]
    assert torch.allclose(collate(rows, FAMILIES["classifier"], Padding())["soft"], soft)


def test_each_task_has_a_softmax_of_its_own_and_a_row_may_lack_one():
    logits = torch.tensor([[1.0, -1.0, 0.5, 2.0, 0.1], [0.3, 0.2, 0.1, 0.0, 5.0]])
    tasks, labels = {"tone": range(0, 2), "topic": range(2, 5)}, torch.tensor([[1, 4], [0, -100]])
    total, count = sft.class_loss(logits, labels, None, tasks)
    ce = torch.nn.functional.cross_entropy
    wanted = ce(logits[:, :2], torch.tensor([1, 0]), reduction="sum") + ce(logits[:1, 2:], torch.tensor([2]))
    assert count == 3 and total.item() == pytest.approx(wanted.item(), abs=1e-6)


def test_one_model_learns_several_tasks(tmp_path):
    rows = [{"id": str(n), "text": ("good" if n % 2 else "bad") + (" cat" if n % 3 else " dog"),
             "labels": {"tone": "good" if n % 2 else "bad", "animal": "cat" if n % 3 else "dog"}} for n in range(12)]
    rows[5]["labels"].pop("animal")
    validation = [dict(r, id="v" + r["id"], text=r["text"] + " yes " + r["id"]) for r in rows[:4]]
    result, params = run_stage(tmp_path, tiny.make(tmp_path/"base", "bert_cls"), "classify", rows, validation, max_steps=9)
    last = result["curve"][-1]
    assert {"eval_accuracy_tone", "eval_accuracy_animal", "eval_macro_f1_tone", "eval_accuracy"} <= set(last)
    model = load_model(ModelSpec(name=str(tmp_path)), PLAN, "float32").model
    assert sft.class_names(model) == ["animal: cat", "animal: dog", "tone: bad", "tone: good"]
    assert sft.tasks_of(model) == {"animal": range(0, 2), "tone": range(2, 4)}


# Rows that cannot be learnt from are named before training

def labelled(**change): return [*LABELLED[:-1], LABELLED[-1] | change]


@pytest.mark.parametrize("train, validation, more, why", [
    (LABELLED, [dict(UNSEEN[0], label="awful")], {}, "validation: row v0: the label 'awful' is not one of the classes"),
    (labelled(label="awful"), (), {"classes": ["bad", "good"]}, "train: row 11: the label 'awful' is not one of the classes"),
    (labelled(label=None), (), {}, "row 11 of train has no answer"),
    (LABELLED[::2], (), {}, "there is one class only .bad.: nothing to tell apart"),
    (labelled(probabilities={"good": 0.5, "awful": 0.5}), (), {"classes": ["bad", "good"]}, "row 11: probabilities: 'awful' is not one"),
    (labelled(probabilities={"good": 0.5, "bad": 0.2}), (), {}, "row 11: probabilities: they add up to 0.7, not to 1"),
    (LABELLED, (), {"early_stopping": 2}, "early_stopping: .* has no validation rows")])
def test_what_a_classifier_cannot_learn_from_is_named(train, validation, more, why, tmp_path):
    base = tiny.make(tmp_path/"base", "bert_mlm")
    with pytest.raises(DistillError, match=why): run_stage(tmp_path, base, "classify", train, validation, **more)
    assert not (tmp_path/"model").exists()


def test_an_empty_data_set_is_said(base, tmp_path):
    write_jsonl(tmp_path/"rows"/"train.jsonl", [])
    with pytest.raises(DistillError, match="rows: has no rows"):
        sft.train_stage(sft.SftParams(out=str(tmp_path), model=str(base), data=str(tmp_path/"rows"), engine="trl"))


def test_an_adapter_needs_a_head_to_begin_with(tmp_path):
    bare = tiny.make(tmp_path/"base", "bert_mlm")
    config = read_json(bare/"config.json") | {"architectures": ["BertModel"]}
    write_json(bare/"config.json", config)
    with pytest.raises(DistillError, match="comes without the head that fills masks, .* use method: full"):
        run_stage(tmp_path, bare, "text", TEXTS, method="lora")


# What is saved, and what a notebook must not hide

def test_a_saved_student_stops_where_its_template_ends_a_turn(tmp_path):
    base = tiny.make(tmp_path/"base", "gemma2")
    end = load_model(ModelSpec(name=str(base)), PLAN, "float32").tokenizer.convert_tokens_to_ids("<end_of_turn>")
    config = read_json(base/"generation_config.json")
    write_json(base/"generation_config.json", config | {"eos_token_id": 1})
    run_stage(tmp_path, base, "chat", ROWS, max_steps=1)
    assert read_json(tmp_path/"model"/"generation_config.json")["eos_token_id"] == sorted([1, end])


def test_both_engines_draw_the_same_adapter_whatever_was_drawn_before(base, tmp_path):
    drawn = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        _, _, loaded = trainer_for(base, tmp_path/str(seed), seed=5)
        drawn.append({n: p.detach().clone() for n, p in loaded.model.named_parameters() if "lora_A" in n})
    assert drawn[0] and all(torch.equal(drawn[0][n], drawn[1][n]) for n in drawn[0])
    _, _, other = trainer_for(base, tmp_path/"other", seed=6)
    assert not any(torch.equal(p, drawn[0][n]) for n, p in other.model.named_parameters() if n in drawn[0])


def test_no_import_of_the_notebook_hides_a_parameter():
    cells = read_json(ROOT/"nbs"/"25_sft.ipynb")["cells"]
    places = {("parameters" if "parameters" in c["metadata"].get("tags", []) else "import"): i for i, c in enumerate(cells)
              if "parameters" in c["metadata"].get("tags", []) or "from distill_nb.models import *" in "".join(c["source"])}
    assert places["import"] < places["parameters"], "06_models has a function `lora_targets`"


def test_four_bit_weights_still_pass_gradients_after_a_validation(tmp_path):
    "bitsandbytes packs them for inference on some CPUs as soon as the model is in evaluation mode"
    base = tiny.make(tmp_path/"base", "chatml", hidden_size=64, intermediate_size=128)
    trainer, params, loaded = trainer_for(base, tmp_path, validation=OTHERS, model=ModelSpec(name=str(base), quantize="4bit"),
                                          learning_rate=1e-3, max_steps=3, eval_steps=1)
    curve = train(trainer, params)
    assert [("loss" in p, "eval_loss" in p) for p in curve] == [(True, False), (False, True)] * 3
