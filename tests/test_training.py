"""Training survives kills, deadlines and lack of memory, and notices when nothing is learnt; on tiny models and bare trainers."""
import gc
import json
import math
import os
import random
import signal
import traceback
import weakref

import pytest
import torch
from hypothesis import given, settings, strategies as st

import tiny
from distill_nb.core import DistillError, read_json, read_jsonl, write_json
from distill_nb.hardware import plan_hardware
from distill_nb.learn import training
from distill_nb.learn.training import TrainParams, run_training, training_arguments
from distill_nb.stage import ModelSpec, check

PLAN = plan_hardware("cpu")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    "Folders of tiny models, each made once"
    made = {}
    def base(kind, **config):
        key = kind + json.dumps(config)
        if key not in made: made[key] = tiny.make(tmp_path_factory.mktemp("base"), kind, **config)
        return made[key]
    return base


def token_rows(count, seed=0, most=20, vocabulary=60):
    "Rows of tokens with some order in them, of different lengths"
    draw = random.Random(seed)
    def row():
        start, length = draw.randrange(4, vocabulary), draw.randint(4, most)
        ids = [4 + (start + 3 * i) % (vocabulary - 4) for i in range(length)]
        return {"input_ids": ids, "labels": ids}
    return [row() for _ in range(count)]


def pad(rows):
    longest = max(len(r["input_ids"]) for r in rows)
    def filled(key, value): return torch.tensor([r[key] + [value] * (longest - len(r[key])) for r in rows])
    real = torch.tensor([[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows])
    return {"input_ids": filled("input_ids", 0), "labels": filled("labels", -100), "attention_mask": real}


class Setting:
    "Everything that a stage brings: parameters, rows, and how a trainer is built"
    def __init__(self, out, base, rows=22, validation=5, dropout=0.1, spoil=None, **more):
        values = dict(out=str(out), model=ModelSpec(name=str(base)), data="sample", batch_size=4, micro_batch=2, epochs=3, learning_rate=1e-2,
                      lora_r=2, lora_alpha=4, max_length=64, save_steps=2, gradient_checkpointing=False, lora_dropout=dropout)
        self.params = check(TrainParams, values | more, "test")
        self.rows, self.validation = token_rows(rows), token_rows(validation, seed=1)
        self.spoil, self.built, self.callbacks = spoil, [], []

    def model(self):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM
        torch.manual_seed(self.params.seed)
        model = AutoModelForCausalLM.from_pretrained(self.params.model.name)
        if self.params.method == "full": return model
        return get_peft_model(model, LoraConfig(r=self.params.lora_r, lora_alpha=self.params.lora_alpha, lora_dropout=self.params.lora_dropout,
                                                target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))

    def arguments(self, micro, **more):
        return training_arguments(self.params, PLAN, len(self.rows), bool(self.validation), micro, **more)

    def build(self, micro):
        from datasets import Dataset
        from transformers import Trainer, TrainingArguments
        self.built.append(micro)
        model = self.model()
        if self.spoil: self.spoil(model)
        trainer = Trainer(model, TrainingArguments(**self.arguments(micro)), data_collator=pad, train_dataset=Dataset.from_list(self.rows),
                          eval_dataset=Dataset.from_list(self.validation) if self.validation else None)
        for callback in self.callbacks: trainer.add_callback(callback)
        return trainer

    def run(self, deadline=None): return run_training(self.build, self.params, PLAN, deadline)


def weights_of(outcome): return {n: p.detach().clone() for n, p in outcome.trainer.model.named_parameters() if p.requires_grad}


class At(training.Watch):
    "Does something at one event of one step"
    def __init__(self, event, step, do): self.event, self.step, self.do = event, step, do

    def __getattr__(self, name):
        def happens(args, state, control, **kw):
            if name == self.event and state.global_step == self.step: self.do(state=state, control=control, **kw)
        return happens


def die(**kw): os.kill(os.getpid(), signal.SIGKILL)


def killed(work):
    "Do it in a process of its own, which must be killed on the way"
    pid = os.fork()
    if not pid:
        try: work()
        except BaseException: traceback.print_exc()
        os._exit(3)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"it ended by itself: {status}"


# Resuming

def comparable(curve): return [{k: v for k, v in p.items() if k != "memory"} for p in curve]


def assert_same(one, other, tolerance=1e-3):
    assert [list(p) for p in one.curve] == [list(p) for p in other.curve]
    for a, b in zip(comparable(one.curve), comparable(other.curve)): assert a == pytest.approx(b, abs=tolerance)
    a, b = weights_of(one), weights_of(other)
    assert max((a[n] - b[n]).abs().max().item() for n in a) < tolerance


# The event at which the process dies, and its step: 22 rows in steps of 4 are 6 steps an epoch, 18 in all.
KILLS = {
    "in a step": ("on_pre_optimizer_step", 4), "before a checkpoint is marked": ("on_save", 8),
    "at the end of an epoch, before its validation": ("on_step_end", 6), "while the end of an epoch is validated": ("on_prediction_step", 12),
    "after the validation, before its checkpoint": ("on_evaluate", 12), "at the beginning of the next epoch": ("on_epoch_begin", 12),
    "before the first checkpoint": ("on_step_end", 1), "after the last step": ("on_step_end", 18), "when all was done": ("on_train_end", 18),
}


@pytest.mark.parametrize("when", KILLS)
def test_a_kill_changes_nothing(when, bases, tmp_path):
    "With dropout, accumulation, and validation: the same rows, the same losses, the same weights"
    event, step = KILLS[when]
    whole = Setting(tmp_path/"whole", bases("llama3")).run()
    assert [p["step"] for p in whole.curve if "eval_loss" in p] == [6, 12, 18]
    setting = Setting(tmp_path/"killed", bases("llama3"))
    setting.callbacks = [At(event, step, die)]
    killed(setting.run)
    again = Setting(tmp_path/"killed", bases("llama3")).run()
    assert_same(again, whole)


@pytest.mark.parametrize("more", [
    {"group_by_length": True}, {"micro_batch": 1, "max_grad_norm": 0.1, "schedule": "constant"}, {"eval_steps": 4, "save_steps": 3}, {"method": "full"},
    {"max_steps": 7, "save_steps": 1}, {"keep_best": False}], ids=str)
def test_killed_twice_at_random_steps_it_goes_on_as_if_nothing_had_happened(more, bases, tmp_path):
    draw = random.Random(str(more))
    whole = Setting(tmp_path/"whole", bases("chatml"), **more).run()
    last = whole.trainer.state.max_steps
    for step in sorted(draw.sample(range(1, last + 1), 2)):
        setting = Setting(tmp_path/"killed", bases("chatml"), **more)
        setting.callbacks = [At(draw.choice(["on_step_end", "on_pre_optimizer_step"]), step - 1 if step == last else step, die)]
        killed(setting.run)
    assert_same(Setting(tmp_path/"killed", bases("chatml"), **more).run(), whole)
