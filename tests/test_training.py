"""Training survives kills, deadlines and lack of memory, and notices when nothing is learnt; on tiny models and bare trainers."""
import gc
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import traceback
import weakref

import pytest
import torch
from hypothesis import given, settings, strategies as st

import tiny
from conftest import DEADLINE, environment
from distill_nb.core import DistillError, read_json, read_jsonl, write_json, write_jsonl
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


def test_a_torn_checkpoint_costs_only_the_steps_behind_it(bases, tmp_path):
    whole = Setting(tmp_path/"whole", bases("llama3")).run()
    setting = Setting(tmp_path/"killed", bases("llama3"))
    setting.callbacks = [At("on_step_begin", 16, die)]
    killed(setting.run)
    found = sorted((tmp_path/"killed"/"checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    assert found[-1].name == "checkpoint-16" and len(found) in (2, 3)
    file = found[-1]/"optimizer.pt"
    file.write_bytes(bytes(file.stat().st_size))
    assert_same(Setting(tmp_path/"killed", bases("llama3")).run(), whole)


def test_a_run_that_was_over_is_only_loaded(bases, tmp_path):
    for more in ({"max_steps": 4}, {"early_stopping": 1, "learning_rate": 0.2, "keep_best": True}):
        first = Setting(tmp_path/str(len(more)), bases("llama3"), **more).run()
        again = Setting(tmp_path/str(len(more)), bases("llama3"), **more)
        again.callbacks = [At("on_step_begin", step, lambda **kw: pytest.fail("trained again")) for step in range(20)]
        assert_same(again.run(), first)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_the_micro_batch_changes_nothing(micro, bases, tmp_path):
    more = dict(dropout=0.0, rows=24, validation=0)
    one = Setting(tmp_path/"4", bases("llama3"), micro_batch=4, **more).run()
    other = Setting(tmp_path/f"m{micro}", bases("llama3"), micro_batch=micro, **more).run()
    assert_same(other, one)


def test_the_order_of_rows_follows_from_seed_and_epoch():
    orders = [tuple(training.epoch_order(40, epoch, seed)) for epoch in (0, 1) for seed in (1, 2)]
    assert len(set(orders)) == 4 and all(sorted(o) == list(range(40)) for o in orders)
    assert orders[0] == tuple(training.epoch_order(40, 0, 1))


@settings(deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=300), st.integers(1, 9), st.integers(0, 3))
def test_grouping_keeps_every_row_and_saves_padding(lengths, together, epoch):
    grouped = training.epoch_order(len(lengths), epoch, 7, lengths, together)
    assert sorted(grouped) == list(range(len(lengths)))
    def padded(order): return sum(max(lengths[i] for i in order[n:n + together]) * len(order[n:n + together]) for n in range(0, len(order), together))
    if len(lengths) % together == 0 and len(lengths) <= 50 * together:
        assert padded(grouped) <= padded(training.epoch_order(len(lengths), epoch, 7))
    if epoch == 0 and len(lengths) % together == 0: assert max(lengths) in {lengths[i] for i in grouped[:together]}


# The best weights, and stopping early

def test_the_weights_with_the_lowest_validation_loss_are_kept(bases, tmp_path, capsys):
    "Also where the process dies behind them, and other checkpoints were rotated"
    more = dict(learning_rate=0.1, epochs=6, schedule="constant", save_steps=1, rows=10)
    last = Setting(tmp_path/"last", bases("llama3"), keep_best=False, **more).run()
    setting = Setting(tmp_path/"best", bases("llama3"), **more)
    setting.callbacks = [At("on_step_begin", 17, die)]
    killed(setting.run)
    best = Setting(tmp_path/"best", bases("llama3"), **more).run()
    losses = [p["eval_loss"] for p in best.curve if "eval_loss" in p]
    assert min(losses) < losses[-1] - 2e-3, "this run was to overfit"
    assert best.best == min(losses) and last.best == pytest.approx(losses[-1], abs=1e-3)
    assert best.trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-4)
    assert last.trainer.evaluate()["eval_loss"] == pytest.approx(losses[-1], abs=1e-3)
    step = [p["step"] for p in best.curve if p.get("eval_loss") == min(losses)][0]
    assert f"the weights of step {step} are kept: validation loss {min(losses):.3f}" in capsys.readouterr().out


def test_a_best_checkpoint_that_is_lost_is_said_and_the_last_weights_stay(bases, tmp_path, capsys):
    setting = Setting(tmp_path, bases("llama3"), learning_rate=0.1, epochs=6, schedule="constant", save_steps=1, rows=10)
    def lose(state, **kw):
        for checkpoint in (tmp_path/"checkpoints").glob(f"checkpoint-{state.best_global_step}"): (checkpoint/"adapter_model.safetensors").unlink()
    setting.callbacks = [At("on_train_end", 18, lose)]
    outcome = setting.run()
    assert "are lost (adapter_model.safetensors is missing): the last ones are kept" in capsys.readouterr().out
    assert outcome.best == [p["eval_loss"] for p in outcome.curve if "eval_loss" in p][-1]


def test_training_stops_early_when_validation_finds_nothing_lower(bases, tmp_path, capsys):
    outcome = Setting(tmp_path, bases("llama3"), learning_rate=0.2, epochs=20, schedule="constant", rows=10, early_stopping=2).run()
    losses = [p["eval_loss"] for p in outcome.curve if "eval_loss" in p]
    assert len(losses) < 20 and losses.index(min(losses)) == len(losses) - 3
    assert "stopped early at step" in capsys.readouterr().out and outcome.state == "done"


def test_without_validation_rows_the_last_weights_are_kept(bases, tmp_path):
    outcome = Setting(tmp_path, bases("llama3"), validation=0, epochs=1).run()
    assert outcome.best is None and not [p for p in outcome.curve if "eval_loss" in p]


# Learning

def freeze_half(model):
    "An adapter that nobody calls"
    layer = model.base_model.model.model.layers[1].self_attn
    plain = layer.q_proj.base_layer
    layer.spare, layer.q_proj = layer.q_proj, plain


def test_a_weight_that_learns_nothing_stops_training_at_the_third_step(bases, tmp_path):
    setting = Setting(tmp_path, bases("llama3"), spoil=freeze_half)
    with pytest.raises(DistillError, match=r"after 3 steps, 2 of 8 trained weights never had a gradient: .*spare\.lora_A.*spare\.lora_B"):
        setting.run()


def test_something_frozen_with_a_gradient_stops_training(bases, tmp_path):
    setting = Setting(tmp_path, bases("llama3"))
    def thaw(model=None, **kw): model.get_input_embeddings().weight.requires_grad_(True)
    setting.callbacks = [At("on_step_begin", 1, thaw)]
    with pytest.raises(DistillError, match="step 2: the weight .*embed_tokens.* was frozen when training began"): setting.run()


@pytest.mark.parametrize("kind, config", [
    ("gpt2", {"n_positions": 512}), ("gemma2", {}), ("phi3", {}), ("bert_mlm", {}), ("t5", {}),
    ("llama3", {"tie_word_embeddings": True})], ids=lambda v: str(v))
def test_a_healthy_run_of_every_weight_is_not_stopped(kind, config, bases, tmp_path):
    "Tied weights, positions and tokens that no row has, a warm-up that begins with 0"
    setting = Setting(tmp_path, bases(kind, **config), method="full", learning_rate=1e-3, epochs=1, warmup_ratio=0.5)
    import transformers
    auto = {"bert_mlm": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}.get(kind, "AutoModelForCausalLM")
    setting.model = lambda: getattr(transformers, auto).from_pretrained(bases(kind, **config))
    assert setting.run().state == "done"


def test_experts_may_wait_for_a_token_and_a_pooler_for_ever(tmp_path):
    seen = {"l.0.experts.1.w1.weight", "l.0.experts.1.w2.weight", "l.1.q_proj.weight"}
    assert training.never_learnt(["l.0.experts.7.w1.weight", "l.0.experts.0.w2.weight", "bert.pooler.dense.bias", "vision_tower.x"], seen) == []
    assert training.never_learnt(["l.1.experts.0.w1.weight", "l.1.k_proj.weight"], seen) == ["l.1.experts.0.w1.weight", "l.1.k_proj.weight"]


def test_a_mixture_of_experts_learns_though_no_token_went_to_some(tmp_path):
    import transformers
    config = transformers.MixtralConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                                        num_key_value_heads=1, num_local_experts=16, num_experts_per_tok=1)
    setting = Setting(tmp_path, tmp_path, rows=3, validation=0, epochs=3, batch_size=1, micro_batch=1, method="full", learning_rate=1e-3)
    setting.model = lambda: transformers.MixtralForCausalLM(config)
    assert setting.run().state == "done"


def test_a_model_of_two_berts_learns_without_its_pooler(bases, tmp_path):
    import transformers
    folder = bases("bert_mlm")
    def two():
        model = transformers.EncoderDecoderModel.from_encoder_decoder_pretrained(folder, folder)
        model.config.decoder_start_token_id = model.config.pad_token_id = 0
        return model
    setting = Setting(tmp_path, folder, validation=0, epochs=1, method="full", learning_rate=1e-3)
    setting.model = two
    assert any("pooler" in n for n, _ in two().named_parameters())
    assert setting.run().state == "done"


class SkippingOptimizer:
    "An fp16 scaler, as far as the watch can see it: the first steps overflow, and are skipped"
    def __init__(self, skips): self.optimizer_step_was_skipped, self.skips = False, skips


def watched(weights, frozen=(), dtype=torch.float32):
    "The watch over gradients, on a model that is only a list of weights"
    model = torch.nn.ParameterDict(weights)
    for name in frozen: model[name].requires_grad_(False)
    watch = training.Gradients(dtype)
    watch.trainer = type("Trainer", (), {"accelerator": SkippingOptimizer(0)})()
    watch.on_train_begin(None, None, None, model=model)
    def step(skipped=False, **gradients):
        state = type("State", (), {"global_step": 0})()
        for name in model: model[name].grad = torch.tensor([float(gradients[name])]) if name in gradients else None
        watch.on_pre_optimizer_step(None, state, None)
        watch.trainer.accelerator.optimizer_step_was_skipped = skipped
        watch.on_optimizer_step(None, state, None)
    return model, step


def weight(value=1.0): return torch.nn.Parameter(torch.tensor([value]))


def test_steps_that_an_fp16_scaler_skips_do_not_count():
    "Gradients overflow while it looks for its scale; three steps count from where they do not"
    _, step = watched({"a": weight(), "b": weight()})
    for _ in range(5): step(skipped=True, a=math.inf, b=math.nan)
    step(a=1, b=0)
    step(a=1, b=0)
    with pytest.raises(DistillError, match="after 3 steps, 1 of 2 trained weights never had a gradient: b:"): step(a=1, b=0)


def test_a_gradient_that_overflowed_is_none():
    _, step = watched({"a": weight(), "b": weight()})
    for _ in range(2): step(a=1, b=math.inf)
    with pytest.raises(DistillError, match="gradient: b:"): step(a=1, b=math.nan)


def test_half_an_adapter_waits_for_the_other_while_that_is_zero():
    "In fp16 a rate of 1e-9 moves B to what is still 0, and so A has no gradient"
    model, step = watched({"q_lora_A": weight(), "q_lora_B": weight(0.0)}, dtype=torch.float16)
    for n in range(6):
        model["q_lora_B"].data.fill_(1e-9 * n)
        step(q_lora_A=0, q_lora_B=1)
    model["q_lora_B"].data.fill_(1e-3)
    with pytest.raises(DistillError, match="gradient: q_lora_A"): step(q_lora_A=0, q_lora_B=1)


# Losses that explode

def noisy(draw, count, fall, noise):
    return [max(0.0, 4 * math.exp(-fall * n / count) * draw.lognormvariate(0, noise)) for n in range(count)]


@pytest.mark.parametrize("seed", range(200))
def test_ordinary_noise_is_no_explosion(seed):
    "A loss that falls, flat or steep, with rows three times as hard as others"
    draw = random.Random(seed)
    losses = noisy(draw, 60, draw.uniform(0, 6), draw.uniform(0, 0.7))
    assert not [n for n in range(1, 61) if training.has_exploded(losses[:n])]


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(1.0, 3.0), st.floats(9, 20), st.integers(6, 40))
def test_an_explosion_is_seen_within_five_lines(seed, start, end, at):
    draw = random.Random(seed)
    before = [start * draw.uniform(0.7, 1.3) for _ in range(at)]
    after = [end * draw.uniform(1.0, 1.2) for _ in range(training.LINES)]
    assert not training.has_exploded(before) and training.has_exploded(before + after)


def test_an_exploding_loss_stops_training_and_the_last_good_checkpoint_stays(bases, tmp_path):
    setting = Setting(tmp_path, bases("llama3"), validation=0, epochs=10, save_steps=1, max_grad_norm=0, schedule="constant", warmup_ratio=0)
    def explode(model=None, **kw):
        for name, weight in model.named_parameters():
            if "lora_B" in name: weight.data.normal_(0, 1000, generator=torch.manual_seed(0))
        model.get_input_embeddings().weight.data.mul_(0).add_(torch.randn_like(model.get_input_embeddings().weight))
        model.get_output_embeddings().weight.data.mul_(1000)
    setting.callbacks = [At("on_step_begin", 10, explode)]
    with pytest.raises(DistillError, match=r"training diverged: at step 1\d, the loss has risen from .* to .*: lower learning_rate"): setting.run()
    assert training.last_checkpoint(tmp_path/"checkpoints").name == "checkpoint-10"


def test_tiny_models_with_one_row_a_step_do_not_explode(bases, tmp_path):
    for seed in (1, 2):
        setting = Setting(tmp_path/str(seed), bases("llama3"), validation=0, batch_size=1, micro_batch=1, learning_rate=3e-2, epochs=4, seed=seed)
        assert setting.run().state == "done"


# Time

class Hours:
    "A clock that moves only when it is told to"
    def __init__(self): self.now = 1000.0
    def monotonic(self): return self.now
    def time(self): return self.now
    def passes(self, seconds): return lambda **kw: setattr(self, "now", self.now + seconds)


@pytest.fixture
def hours(monkeypatch):
    clock = Hours()
    monkeypatch.setattr(training, "time", clock)
    return clock


def slow(hours, setting, step=60.0, save=0.0):
    "Each step takes a minute, each checkpoint as long as it is told"
    class Slow(training.Watch):
        def on_step_begin(self, *a, **kw): pass
        def on_pre_optimizer_step(self, *a, **kw): hours.now += step
        def on_substep_end(self, *a, **kw): pass
    setting.callbacks.append(Slow())
    original = setting.build
    def build(micro):
        trainer = original(micro)
        write = trainer._save_checkpoint
        def saved(*a, **kw):
            hours.now += save
            return write(*a, **kw)
        trainer._save_checkpoint = saved
        return trainer
    setting.build = build
    return setting


def test_a_run_pauses_in_time_and_goes_on_to_the_same_result(hours, bases, tmp_path):
    whole = slow(hours, Setting(tmp_path/"whole", bases("llama3"), save_steps=50, validation=0)).run()
    states, steps = [], []
    while not states or states[-1] == "paused":
        deadline = hours.now + 360
        outcome = slow(hours, Setting(tmp_path/"paused", bases("llama3"), save_steps=50, validation=0), save=40).run(deadline)
        states.append(outcome.state), steps.append(outcome.trainer.state.global_step)
        if outcome.state == "paused":
            assert hours.now <= deadline and "steps are done" in outcome.why
            assert training.last_checkpoint(tmp_path/"paused"/"checkpoints").name == f"checkpoint-{steps[-1]}"
    assert len(states) >= 4 and steps == sorted(set(steps)) and steps[-1] == 18
    a, b = weights_of(whole), weights_of(outcome)
    assert max((a[n] - b[n]).abs().max().item() for n in a) < 1e-5
    assert not outcome.why and outcome.best is None


def test_a_validation_that_is_due_is_counted_in(hours, bases, tmp_path):
    "The sixth step is validated, which takes ten minutes: with eight left, the fifth is the last"
    setting = slow(hours, Setting(tmp_path, bases("llama3"), rows=24, validation=40))
    outcome = setting.run(hours.now + 60 * 5 + 480)
    assert outcome.trainer.state.global_step == 5 and not [p for p in outcome.curve if "eval_loss" in p]


def test_hours_count_from_the_start_of_the_process(monkeypatch):
    assert training.deadline_of(None) is None
    real = training.time.monotonic()
    monkeypatch.setenv("DISTILL_NB_STARTED", str(training.time.time() - 1800))
    assert training.deadline_of(1.0) - real == pytest.approx(1800, abs=5)


def test_a_deadline_that_loading_used_up_is_said_before_the_first_step(hours, bases, tmp_path):
    setting = Setting(tmp_path, bases("llama3"), max_hours=0.5)
    outcome = setting.run(hours.now - 1)
    assert (outcome.state, outcome.why) == ("paused", "max_hours: 0.5: they were over before the first step; raise it")


# Memory

def too_small(setting, most, step=0, error=torch.OutOfMemoryError, said="CUDA out of memory. Tried to allocate 2 GiB"):
    "Memory for so many rows in a forward pass, and no more, from a step on"
    original, models = setting.build, []
    def build(micro):
        assert not [m for m in models if m() is not None], "the model that did not fit is still held"
        trainer = original(micro)
        models.append(weakref.ref(trainer.model))
        compute = trainer.compute_loss
        def full(model, inputs, *a, **kw):
            if len(inputs["input_ids"]) > most and trainer.state.global_step >= step and model.training: raise error(said)
            return compute(model, inputs, *a, **kw)
        trainer.compute_loss = full
        return trainer
    setting.build = build
    return setting


@pytest.mark.parametrize("step", [0, 3])
def test_out_of_memory_halves_the_micro_batch_and_changes_no_result(step, bases, tmp_path, capsys):
    more = dict(batch_size=8, rows=40, dropout=0.0, validation=0)
    whole = Setting(tmp_path/"whole", bases("llama3"), micro_batch=8, **more).run()
    setting = too_small(Setting(tmp_path/"full", bases("llama3"), micro_batch=8, **more), 2, step)
    gc.collect()
    outcome = setting.run()
    assert setting.built == [8, 4, 2] and outcome.micro == 2
    assert outcome.changes == ["out of memory: micro_batch 8 -> 4", "out of memory: micro_batch 4 -> 2"]
    losses = [{k: p["loss"] for k in ["loss"]} for p in outcome.curve if "loss" in p]
    wanted = [{"loss": p["loss"]} for p in whole.curve if "loss" in p]
    assert [l["loss"] for l in losses] == pytest.approx([l["loss"] for l in wanted], abs=1e-3)
    log = read_jsonl(tmp_path/"full"/"train_log.jsonl")
    assert [p["change"] for p in log if "change" in p] == outcome.changes and log == outcome.curve
    assert "a step still learns from 8 rows" in capsys.readouterr().out
    again = too_small(Setting(tmp_path/"full", bases("llama3"), micro_batch=8, **more), 2)
    again.run()
    assert again.built == [2], "the next start knows"
    other = Setting(tmp_path/"full", bases("llama3"), **more | {"micro_batch": 4})
    other.run()
    assert other.built == [4], "what is asked for now goes before it"


def test_a_step_that_cannot_be_halved_takes_the_next_smaller_part(bases, tmp_path):
    setting = too_small(Setting(tmp_path, bases("llama3"), batch_size=6, micro_batch=6, epochs=1, validation=0), 1)
    assert setting.run().micro == 1 and setting.built == [6, 3, 1]


@pytest.mark.parametrize("said", ["[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
                                  "MPS backend out of memory (MPS allocated: 9 GB)", "CUDA error: out of memory", "XPU out of memory. Tried to allocate 2 GiB",
                                  "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"])
def test_every_device_says_it_in_its_own_way(said, bases, tmp_path):
    setting = too_small(Setting(tmp_path, bases("llama3"), micro_batch=4, max_steps=1, validation=0), 2, error=RuntimeError, said=said)
    assert setting.run().micro == 2


def test_where_a_single_row_does_not_fit_it_is_said_what_to_change(bases, tmp_path):
    setting = too_small(Setting(tmp_path, bases("llama3"), micro_batch=2), 0)
    with pytest.raises(DistillError, match="out of memory with a single row.*gradient_checkpointing: true.*max_length"): setting.run()
    assert setting.built == [2, 1]


def test_another_error_is_not_taken_for_it(bases, tmp_path):
    setting = too_small(Setting(tmp_path, bases("llama3")), 0, error=RuntimeError, said="shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"): setting.run()
    assert setting.built == [2]


# What is said and written

def test_the_log_has_gradients_rates_and_memory_beside_the_losses(bases, tmp_path, capsys):
    outcome = Setting(tmp_path, bases("llama3"), epochs=1).run()
    losses = [p for p in outcome.curve if "loss" in p]
    assert [set(p) for p in losses] == [{"step", "epoch", "loss", "grad_norm", "learning_rate", "memory"}] * len(losses)
    assert all(p["memory"] > 2**26 and p["grad_norm"] > 0 for p in losses)
    assert [set(p) for p in outcome.curve if "eval_loss" in p] == [{"step", "epoch", "eval_loss"}]
    assert read_jsonl(tmp_path/"train_log.jsonl") == outcome.curve
    out = capsys.readouterr().out
    assert "step 6 of 6, loss" in out and "GiB, 0 s left" in out


def test_a_trace_of_some_steps_lies_in_the_stages_folder(bases, tmp_path):
    for steps, folder in ((2, "some"), (99, "more than there are")):
        Setting(tmp_path/folder, bases("llama3"), max_steps=4, validation=0, profile_steps=steps).run()
        events = read_json(tmp_path/folder/"profile"/"trace.json")["traceEvents"]
        assert any("aten::mm" in e.get("name", "") for e in events)
        assert "Self CPU" in (tmp_path/folder/"profile"/"operators.txt").read_text()


def test_where_the_log_goes_is_looked_at_before_a_run(monkeypatch):
    def ready(**more): TrainParams(model="m", data="sample", **more).ready()
    with pytest.raises(DistillError, match="report_to: tensorbord: is unknown, did you mean 'tensorboard'"): ready(report_to="tensorbord")
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DistillError, match="report_to: trackio: is not installed here: pip install trackio"): ready(report_to=["trackio"])
    with pytest.raises(DistillError, match="optim: adamw_8bit: needs bitsandbytes"): ready(optim="adamw_8bit")
    with pytest.raises(DistillError, match="optim: adam: transformers has no such optimiser"): ready(optim="adam")
    with pytest.raises(DistillError, match="attention: flash_attention_2: flash_attn is not installed"): ready(attention="flash_attention_2")
    for name in ("none", "all", []): ready(report_to=name)
    TrainParams(model="m", data="sample", report_to="trackio", attention="flash_attention_2").ready(keys=False)


# Parameters

@pytest.mark.parametrize("values, said", [
    ({"batch_size": 8, "micro_batch": 3}, "micro_batch: 3 does not divide batch_size 8"),
    ({"batch_size": 8, "micro_batch": 2, "devices": 3}, "micro_batch: 2 on 3 devices does not divide batch_size 8"),
    ({"model": {"name": "m", "quantize": "4bit"}, "method": "full"}, "4-bit weights cannot be trained")])
def test_what_cannot_be_is_refused_at_once(values, said):
    with pytest.raises(DistillError, match=said): check(TrainParams, {"model": "m", "data": "sample"} | values, "here")


def test_a_step_is_divided_among_devices_and_passes(monkeypatch):
    params = TrainParams(model="m", data="sample", batch_size=16)
    def divided(micro, world):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        a = training_arguments(params, PLAN, 100, False, micro)
        return a["per_device_train_batch_size"] * a["gradient_accumulation_steps"] * world
    assert {divided(micro, world) for micro in (1, 2, 4) for world in (1, 2, 4)} == {16}


def test_the_plan_decides_what_nobody_asked_for():
    def arguments(target, **more):
        return training_arguments(TrainParams(model="m", data="sample", **more), plan_hardware(target), 100, True, 2)
    assert (arguments("t4")["fp16"], arguments("a100")["bf16"], arguments("cpu")["optim"]) == (True, True, "adamw_torch")
    assert arguments("t4", optim="sgd")["optim"] == "sgd"
    assert training.method_of(TrainParams(model="m", data="sample"), plan_hardware("t4")) == "qlora"
    assert training.method_of(TrainParams(model="m", data="sample"), plan_hardware("cpu")) == "lora"
    assert training.method_of(TrainParams(model={"name": "m", "quantize": "4bit"}, data="sample"), plan_hardware("cpu")) == "qlora"
    assert training.method_of(TrainParams(model="m", data="sample", method="full"), plan_hardware("t4")) == "full"


def test_what_changes_no_result_makes_no_stage_stale():
    params = TrainParams(model="m", data="sample")
    changed = params.model_copy(update=dict(save_steps=7, micro_batch=1, max_hours=2.0, sync_to="there", report_to="all", devices=2, profile_steps=3))
    assert params.result_parameters() == changed.result_parameters()
    assert params.result_parameters() != params.model_copy(update={"keep_best": False}).result_parameters()


# The real trainers, through the stage

STAGE = """
import json, os, signal, sys
from distill_nb import sft
from distill_nb.learn import training
from distill_nb.stage import open_stage
class Die(training.Watch):
    def on_pre_optimizer_step(self, args, state, control, **kw):
        if state.global_step == int(os.environ["DIE"]): os.kill(os.getpid(), signal.SIGKILL)
watches = training.watches
training.watches = lambda *a: [*watches(*a), Die()]
params = sft.SftParams(**json.loads(sys.argv[1]))
open_stage(params, "sft")
result = sft.train_stage(params)
print("RESULT" + json.dumps([result["engine"], result["curve"], result["best"]]))
"""


@pytest.mark.parametrize("engine, more", [("trl", {"packing": True}), ("unsloth", {"group_by_length": True})], ids=["trl", "unsloth"])
def test_a_kill_changes_nothing_for_a_real_trainer(engine, more, bases, tmp_path):
    "TRL's, and Unsloth's with all that it patches: dropout, accumulation, validation, packed or grouped rows"
    draw = random.Random(0)
    def row(n): return {"id": f"{n}", "prompt": f"Say {n} words.", "answer": "yes " * draw.randint(1, 9)}
    def conversation(r):
        return {"id": r["id"], "meta": {}, "messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["answer"]}]}
    write_jsonl(tmp_path/"rows"/"train.jsonl", [conversation(row(n)) for n in range(24)])
    write_jsonl(tmp_path/"rows"/"validation.jsonl", [conversation(row(n)) for n in range(24, 30)])
    def run(out, die=-1):
        values = dict(out=str(tmp_path/out), model=str(bases("chatml")), data=str(tmp_path/"rows"), engine=engine, batch_size=8, micro_batch=4,
                      epochs=3, max_length=128, save_steps=2, lora_r=2, learning_rate=1e-2, lora_dropout=0.1) | more
        done = subprocess.run([sys.executable, "-c", STAGE, json.dumps(values)], text=True, capture_output=True, cwd=tmp_path, timeout=DEADLINE,
                              env=environment({"DIE": str(die)}))
        if die >= 0: assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
        else:
            assert done.returncode == 0, done.stderr[-3000:]
            return json.loads(done.stdout.split("RESULT")[1])
    name, curve, best = run("whole")
    run("killed", die=draw.randint(3, 7))
    again, other, found = run("killed")
    assert name == again == engine and [list(p) for p in curve] == [list(p) for p in other]
    assert [p["step"] for p in curve if "eval_loss" in p] == [3, 6, 9]
    for a, b in zip(comparable(curve), comparable(other)): assert b == pytest.approx(a, abs=1e-3)
    assert found == pytest.approx(best, abs=1e-3)


def test_the_best_weights_come_back_from_the_second_place(bases, tmp_path):
    "The disk was lent: what is left of it are the copies"
    more = dict(learning_rate=0.1, epochs=6, schedule="constant", save_steps=1, rows=10, sync_to=str(tmp_path/"copies"))
    whole = Setting(tmp_path/"whole", bases("llama3"), **more).run()
    setting = Setting(tmp_path/"lent", bases("llama3"), **more)
    setting.callbacks = [At("on_step_begin", 17, die)]
    for folder in ("whole", "lent"): write_json(tmp_path/folder/"stage.json", {"parameters": folder})
    killed(setting.run)
    shutil.rmtree(tmp_path/"lent"/"checkpoints")
    again = Setting(tmp_path/"lent", bases("llama3"), **more).run()
    assert again.trainer.state.best_global_step < 17 and again.best == pytest.approx(whole.best, abs=1e-3)
    assert_same(again, whole)


def test_tensorboard_writes_into_the_stages_folder(bases, tmp_path):
    pytest.importorskip("tensorboard", reason="an extra")
    Setting(tmp_path, bases("llama3"), max_steps=2, report_to="tensorboard").run()
    assert list((tmp_path/"tensorboard").rglob("events*")) and not list((tmp_path/"checkpoints").rglob("events*"))


def test_a_model_that_does_not_fit_at_all_is_said(bases, tmp_path):
    setting = Setting(tmp_path, bases("llama3"))
    def spoil(model): raise torch.OutOfMemoryError("CUDA out of memory")
    setting.spoil = spoil
    with pytest.raises(DistillError, match="out of memory while the model is loaded.*model.quantize: 4bit"): setting.run()
    assert setting.built == [2]


def test_gradient_checkpointing_changes_nothing(bases, tmp_path):
    "And no adapter is cut off from the loss by it"
    one, other = (Setting(tmp_path/str(again), bases("llama3"), gradient_checkpointing=again, epochs=1, validation=0).run() for again in (False, True))
    assert_same(other, one)
