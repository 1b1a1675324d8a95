"""What a stage will take, against what it takes: tensors that autograd keeps, peaks of whole processes, and the published systems on a T4."""
import json
import subprocess
import sys

import pytest
from conftest import environment

from distill_nb import memory
from distill_nb.families import FAMILIES
from distill_nb.hardware import TARGETS, GiB, get_hardware, plan_hardware
from distill_nb.memory import (Way, activation_bytes, changes_to_try, fit_micro_batch, inference_memory, kept_sizes, likelihood_memory,
                               shortages, training_memory, weight_bytes, what_to_change)
from distill_nb.models import adapter_settings, describe_model, layer_lists, load_model, profile, shipped_config
from distill_nb.stage import ModelSpec
from tiny import make

TINY = dict(vocab_size=300, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
HEAD = TINY | dict(head_dim=16)
T5 = dict(vocab_size=300, d_model=64, d_kv=16, d_ff=176, num_layers=4, num_heads=4, decoder_start_token_id=0)
MARIAN = dict(vocab_size=300, d_model=64, encoder_layers=4, decoder_layers=4, encoder_attention_heads=4, decoder_attention_heads=4, pad_token_id=0,
              encoder_ffn_dim=176, decoder_ffn_dim=176, decoder_start_token_id=0, eos_token_id=2, activation_function="gelu")
SHAPES = {  # family and configuration
    "llama": ("causal", TINY), "mistral": ("causal", TINY | dict(sliding_window=16)), "qwen2": ("causal", TINY), "gemma": ("causal", HEAD),
    "gemma2": ("causal", HEAD | dict(sliding_window=16)), "gemma3_text": ("causal", HEAD | dict(sliding_window=16)),
    "phi3": ("causal", TINY | dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)), "mixtral": ("causal", TINY | dict(num_local_experts=4)),
    "gpt2": ("causal", dict(vocab_size=300, n_embd=64, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=2)),
    "bert": ("classifier", TINY), "roberta": ("masked", TINY), "t5": ("seq2seq", T5), "marian": ("seq2seq", MARIAN),
    "modernbert": ("masked", dict(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4, pad_token_id=0,
                                  bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)),
}
WAYS = {
    "full, fp32": dict(lora_r=None), "full, bf16 products": dict(lora_r=None, autocast="bf16"), "LoRA, fp32": dict(lora_r=8),
    "LoRA, bf16 products": dict(lora_r=8, autocast="bf16"), "LoRA on bf16 weights": dict(lora_r=8, dtype="bfloat16", autocast="bf16"),
    "LoRA without dropout": dict(lora_r=4, dropout=0.0), "LoRA, eager attention": dict(lora_r=8, attention="eager"),
}


def config_of(kind, settings):
    from transformers import AutoConfig
    return AutoConfig.for_model(kind, **settings)


def shape_of(kind):
    family, settings = SHAPES[kind]
    return describe_model(config_of(kind, settings), family=FAMILIES[family])


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    "A cache that lasts as long as this module's tests do"
    monkeypatch.setenv("DISTILL_NB_CACHE", str(tmp_path_factory.getbasetemp()/"memory"))


# ---- what autograd keeps

def kept_for_real(kind, way, batch_size, length):
    "Bytes that the layers of a real model keep of one pass with padding, and those outside of them"
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model
    family, settings = SHAPES[kind]
    config = config_of(kind, settings)
    if way.attention == "eager": config._attn_implementation = "eager"
    model = getattr(transformers, FAMILIES[family].auto).from_config(config).to(getattr(torch, way.dtype))
    layers = [layer for stack in layer_lists(model) for layer in stack.layers]
    if way.lora_r: model = get_peft_model(model, LoraConfig(r=way.lora_r, lora_dropout=way.dropout, **adapter_settings(model)))
    batch = memory.batch_of(family, batch_size, length)
    batch["attention_mask"][0, -4:] = 0
    mixed = {"bf16": torch.bfloat16}.get(way.autocast)
    with torch.autocast("cpu", mixed, enabled=bool(mixed)): inside, outside, _ = memory.saved_bytes(model.train(), layers, batch)
    return sum(inside), outside


EVERY_WAY = [(kind, way) for kind in ("llama", "gemma2", "gpt2", "t5") for way in WAYS]
SOME_WAYS = [(kind, way) for kind in SHAPES if kind not in ("llama", "gemma2", "gpt2", "t5", "mixtral")
             for way in ("full, bf16 products", "LoRA, fp32")]


@pytest.mark.parametrize("kind, way", EVERY_WAY + SOME_WAYS)
def test_what_the_layers_of_a_model_keep_is_known_within_a_tenth(kind, way):
    way = Way(**WAYS[way])
    measured, _ = kept_for_real(kind, way, 3, 72)
    kept = kept_sizes(shape_of(kind), way)
    estimated = sum(n * memory.grown(sizes, 3, 72) for n, sizes in zip(kept["counts"], kept["layers"]))
    assert 0.9 < estimated / measured < 1.1


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "t5", "bert"])
def test_what_is_kept_outside_of_the_layers_is_small_and_known(kind):
    way = Way(lora_r=None)
    inside, outside = kept_for_real(kind, way, 3, 72)
    estimated, _ = activation_bytes(shape_of(kind), way, 3, 72)
    assert 0.9 < estimated / (inside + outside) < 1.1


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2", "t5"])
def test_with_checkpointing_one_hidden_state_a_layer_is_kept_and_one_layer_at_a_time(kind):
    shape, way = shape_of(kind), Way(lora_r=8)
    kept, largest = activation_bytes(shape, way, 3, 72, checkpointing=True)
    whole, _ = activation_bytes(shape, way, 3, 72)
    states = sum(shape.layers) * 3 * 72 * shape.hidden_size * 4
    assert states <= kept < states + whole / sum(shape.layers) and 0.9 * whole / sum(shape.layers) < largest < whole / 2


def test_experts_keep_in_fp32_twice_what_they_keep_in_sixteen_bits():
    shape = shape_of("mixtral")
    wide, short = (activation_bytes(shape, Way(lora_r=8, dtype=dtype), 2, 64)[0] for dtype in ("float32", "bfloat16"))
    assert wide == pytest.approx(2 * short, rel=0.01) and wide != pytest.approx(activation_bytes_guessed(shape), rel=0.01)


def activation_bytes_guessed(shape):
    kept = memory.guess_kept(shape, Way(lora_r=8))
    return sum(n * memory.grown(sizes, 2, 64) for n, sizes in zip(kept["counts"], kept["layers"]))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3", "gpt2", "bert"])
def test_the_guess_for_a_model_that_cannot_be_measured_is_on_the_safe_side_and_not_absurd(kind):
    shape = shape_of(kind)
    measured, _ = activation_bytes(shape, Way(lora_r=8), 2, 64)
    assert 1 < activation_bytes_guessed(shape) / measured < 3


def test_a_model_that_cannot_be_run_on_fake_tensors_is_guessed(monkeypatch):
    monkeypatch.setattr(memory, "measure_kept", lambda *a: (_ for _ in ()).throw(ValueError("data-dependent")))
    shape = shape_of("llama")
    assert memory.find_kept(shape, Way(lora_r=8)) == memory.guess_kept(shape, Way(lora_r=8))


def test_on_a_gpu_a_dropout_mask_has_one_byte_and_attention_keeps_no_table():
    shape = shape_of("gpt2")
    cpu, gpu = (kept_sizes(shape, Way(lora_r=8, gpu=gpu))["layers"][0] for gpu in (False, True))
    assert cpu[2] > 4 * gpu[2] and cpu[1] > gpu[1] + 3 * 64  # bytes a pair of tokens; bytes a token


def test_qlora_keeps_more_than_lora_on_sixteen_bit_weights():
    "Its embeddings and norms are fp32, and so is what comes out of every 4-bit layer"
    shape, t4 = shape_of("llama"), plan_hardware("t4")
    lora, qlora = (training_memory(shape.model_copy(update={"quantize": q}), t4, 2, 64, 8)["activations"] for q in (None, "4bit"))
    assert 1.2 < qlora / lora < 2


def test_a_second_estimate_reads_what_the_first_one_measured(monkeypatch):
    shape, way = shape_of("llama"), Way(lora_r=3)
    first = kept_sizes(shape, way)
    monkeypatch.setattr(memory, "find_kept", lambda *a: pytest.fail("measured again"))
    assert kept_sizes(shape, way) == first


# ---- weights

def test_four_bit_weights_take_what_bitsandbytes_makes_of_them(tmp_path):
    pytest.importorskip("bitsandbytes")
    spec = ModelSpec(name=str(make(tmp_path/"model", "llama3", hidden_size=256, intermediate_size=512, head_dim=64)), quantize="4bit")
    model = load_model(spec, plan_hardware("cpu")).model
    packed = [p for p in model.parameters() if type(p).__name__ == "Params4bit"]
    scales = sum(s.absmax.numel() + s.state2.absmax.numel() * 4 for s in (p.quant_state for p in packed))
    assert weight_bytes(profile(spec), "4bit", 0) == pytest.approx(sum(p.numel() for p in packed) + scales, rel=0.02)


@pytest.mark.parametrize("kind, more", [("llama3", dict(head_dim=32)), ("phi3", {})])
def test_the_layer_that_plays_a_four_bit_one_keeps_what_a_real_one_does(tmp_path, kind, more):
    pytest.importorskip("bitsandbytes")
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    spec = ModelSpec(name=str(make(tmp_path/"model", kind, hidden_size=128, intermediate_size=256, **more)), quantize="4bit")
    plan = plan_hardware("cpu").model_copy(update={"dtype": "bfloat16", "autocast": "bf16"})
    model = load_model(spec, plan).model
    layers = [layer for stack in layer_lists(model) for layer in stack.layers]
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(r=8, lora_dropout=0.05, **adapter_settings(model)))
    with torch.autocast("cpu", torch.bfloat16): inside, _, _ = memory.saved_bytes(model.train(), layers, memory.batch_of("causal", 3, 72))
    shape = profile(spec)
    kept = kept_sizes(shape, memory.way_to_train(shape, plan, 8))
    assert memory.grown(kept["layers"][0], 3, 72) == pytest.approx(inside[1], rel=0.1)  # the first one keeps less: nothing is trained before it


def test_qlora_counts_fp32_copies_of_embeddings_norms_and_head():
    shape, t4 = shape_of("llama").model_copy(update={"quantize": "4bit"}), plan_hardware("t4")
    rest = shape.parameters - shape.linear
    assert training_memory(shape, t4, 1, 64, 8)["weights"] - inference_memory(shape, t4, 1, 64)["weights"] == pytest.approx(rest * 2, abs=2)


# ---- peaks of processes

MEASURE = """
import json, os, resource, sys
import torch, transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig
from distill_nb.families import FAMILIES, head_of, supervised_hidden
from distill_nb.models import adapter_settings
torch.set_num_threads(1)

def resident(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def train(model, batch, r=None, checkpointing=False, mixed=False, accumulating=True):
    if r: model = get_peft_model(model, LoraConfig(r=r, lora_dropout=0.05, **adapter_settings(model)))
    if checkpointing: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if checkpointing and r: model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], foreach=False)
    short = {k: v[:1, :8] if torch.is_tensor(v) and v.dim() == 2 else v[:1] if torch.is_tensor(v) else v for k, v in batch.items()}
    def backward(rows):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed): loss = model(**rows).loss
        loss.backward()
    backward(short)  # the moments come with the first step, which may be short
    optimizer.step()
    optimizer.zero_grad()
    if accumulating: backward(short)
    backward(batch)
    optimizer.step()

def generate(model, batch):
    model.eval().generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=8, min_new_tokens=8, do_sample=False)

def likelihood(model, batch):
    with torch.inference_mode(): head_of(model.eval(), FAMILIES["causal"]).nll(*supervised_hidden(model, batch, FAMILIES["causal"]))

def measure(kind, settings, family, use, batch_size, length, options):
    "Bytes that a process of its own, with everything imported, needs at its peak beyond what it has at its start, and in all"
    read, write = os.pipe()
    if child := os.fork():
        os.close(write)
        told = os.fdopen(read).read()
        os.waitpid(child, 0)
        return json.loads(told)
    before = resident()
    model = getattr(transformers, FAMILIES[family].auto).from_config(AutoConfig.for_model(kind, **settings))
    ids = torch.randint(3, 100, (batch_size, length - (8 if use == "generate" else 0)))
    labels = torch.zeros(batch_size, dtype=torch.long) if family == "classifier" else ids
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    batch["attention_mask"][0, -4 if use == "train" else 0:] = int(use != "train")
    if use == "train" and FAMILIES[family].generates: batch["use_cache"] = False
    {"train": train, "generate": generate, "likelihood": likelihood}[use](model, batch, **options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    os.write(write, json.dumps([peak - before, peak]).encode())
    os._exit(0)

print(json.dumps([measure(*case) for case in json.loads(sys.argv[1])]))
"""

LLAMA = dict(vocab_size=8000, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)
GPT2 = dict(vocab_size=8000, n_embd=384, n_layer=6, n_head=6, bos_token_id=1, eos_token_id=2)
BERT = dict(vocab_size=8000, hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6)
LARGE_T5 = dict(vocab_size=8000, d_model=384, d_kv=64, d_ff=1024, num_layers=4, num_heads=6, decoder_start_token_id=0)
MEASURED = {  # kind, configuration, family, use, rows, tokens a row, options
    "llama, full": ("llama", LLAMA, "causal", "train", 4, 256, {"accumulating": False}),
    "llama, full, accumulating": ("llama", LLAMA, "causal", "train", 4, 256, {}),
    "llama, LoRA": ("llama", LLAMA, "causal", "train", 4, 256, {"r": 8}),
    "llama, LoRA, bf16": ("llama", LLAMA, "causal", "train", 4, 256, {"r": 8, "mixed": True}),
    "llama, LoRA, checkpointing": ("llama", LLAMA, "causal", "train", 12, 256, {"r": 8, "checkpointing": True}),
    "llama, full, checkpointing": ("llama", LLAMA, "causal", "train", 8, 256, {"checkpointing": True}),
    "llama, large vocabulary": ("llama", LLAMA | dict(vocab_size=32000, num_hidden_layers=3), "causal", "train", 4, 256, {"r": 8}),
    "gemma2, LoRA": ("gemma2", LLAMA | dict(head_dim=64), "causal", "train", 4, 256, {"r": 16}),
    "gpt2, LoRA": ("gpt2", GPT2, "causal", "train", 4, 256, {"r": 8}),
    "bert, full": ("bert", BERT, "classifier", "train", 16, 128, {}),
    "roberta, full, bf16": ("roberta", BERT, "classifier", "train", 16, 128, {"mixed": True}),
    "bert, checkpointing": ("bert", BERT, "classifier", "train", 32, 128, {"checkpointing": True}),
    "t5, full": ("t5", LARGE_T5, "seq2seq", "train", 8, 128, {}),
    "generating": ("llama", LLAMA, "causal", "generate", 64, 256, {}),
    "likelihoods": ("llama", LLAMA, "causal", "likelihood", 24, 256, {}),
}


@pytest.fixture(scope="module")
def measured():
    "Case: bytes beyond the start, and bytes in all. Freed memory goes back at once, so that the numbers are not those of an allocator's gaps"
    done = subprocess.run([sys.executable, "-c", MEASURE, json.dumps(list(MEASURED.values()))], text=True, capture_output=True, timeout=300,
                          env=environment({"MALLOC_MMAP_THRESHOLD_": "65536"}))
    assert done.returncode == 0, done.stderr
    return dict(zip(MEASURED, json.loads(done.stdout.splitlines()[-1])))


def estimated(case, monkeypatch):
    "The estimate of a case, on a CPU"
    kind, settings, family, use, batch_size, length, options = MEASURED[case]
    monkeypatch.setenv("DISTILL_NB_DTYPE", "bfloat16" if options.get("mixed") else "float32")
    shape, plan = describe_model(config_of(kind, settings), family=FAMILIES[family]), plan_hardware("cpu")
    if use != "train": return {"generate": inference_memory, "likelihood": likelihood_memory}[use](shape, plan, batch_size, length)
    again, accumulating = options.get("checkpointing", False), options.get("accumulating", True)
    return training_memory(shape, plan, batch_size, length, options.get("r"), again, accumulating=accumulating)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a forked process is read from /proc")
@pytest.mark.parametrize("case", MEASURED)
def test_the_estimated_peak_is_within_a_fifth_of_what_a_process_takes(measured, case, monkeypatch):
    "The runtime's constant hides nothing: it is taken out on both sides, and what the first steps load (40 to 50 MiB) is measured with them"
    beyond, whole = measured[case]
    need = estimated(case, monkeypatch)["peak"]
    assert 0.8 < (need - memory.RUNTIME_BYTES["cpu"]) / beyond < 1.2
    assert 0.8 < need / whole < 1.25  # a stage imports more than this process did


# ---- the published systems on a T4

def published(name, quantize=None):
    from transformers import AutoConfig
    family = FAMILIES["classifier"] if "roberta" in name else None
    shape = describe_model(AutoConfig.for_model(**shipped_config(name)["config"]), family=family)
    return shape.model_copy(update={"quantize": quantize})


PUBLISHED = {  # model, quantised, rows a step, tokens a row, rank, teacher
    "Mistral-7B, QLoRA": ("mistralai/Mistral-7B-Instruct-v0.2", "4bit", 8, 1024, 16, None),
    "TinyLlama, LoRA": ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", None, 8, 1024, 32, None),
    "Phi-3-mini, 4-bit LoRA": ("unsloth/Phi-3-mini-4k-instruct-bnb-4bit", "4bit", 4, 1024, 8, None),
    "Gemma-2B under a resident Gemma-7B": ("google/gemma-2b", None, 4, 512, 8, "google/gemma-7b"),
    "RoBERTa-base, full": ("FacebookAI/roberta-base", None, 32, 256, None, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_system_is_planned_to_fit_a_t4(name):
    model, quantize, rows, length, rank, teacher = PUBLISHED[name]
    more = {"teacher": published(teacher, "4bit"), "logits_chunk": 256} if teacher else {}
    t4 = plan_hardware("t4")
    micro, need = fit_micro_batch(published(model, quantize), t4, rows, length, rank, "auto", **more)
    assert rows % micro == 0 and need["peak"] < t4.hardware.memory
    assert shortages(need["phases"], get_hardware("2xt4")) == []


def test_a_7b_model_in_sixteen_bits_is_planned_not_to_fit_a_t4():
    micro, need = fit_micro_batch(published("mistralai/Mistral-7B-Instruct-v0.2"), plan_hardware("t4"), 8, 1024, 16, "auto")
    assert micro == 1 and need["checkpointing"] and need["peak"] > TARGETS["t4"].memory


def test_a_resident_teacher_adds_its_weights_and_its_logits():
    student, teacher, t4 = shape_of("llama"), shape_of("gemma"), plan_hardware("t4")
    alone, beside = (training_memory(student, t4, 2, 64, 8, teacher=t) for t in (None, teacher))
    assert beside["teacher"] == weight_bytes(teacher, "float16")
    assert beside["peak"] - alone["peak"] == beside["teacher"] + 2 * 64 * teacher.vocab_size * 8


def test_logits_in_chunks_take_less():
    shape, t4 = shape_of("llama"), plan_hardware("t4")
    whole, pieces = (training_memory(shape, t4, 4, 128, 8, logits_chunk=chunk)["logits"] for chunk in (None, 64))
    assert whole == 8 * pieces == 4 * 128 * 300 * 12


def test_full_training_on_a_gpu_has_fp32_weights_and_eight_bit_moments():
    shape = shape_of("roberta")
    need = training_memory(shape, plan_hardware("t4"), 1, 64)
    assert need["weights"] == need["gradients"] == 4 * shape.parameters and need["optimizer"] == pytest.approx(2 * shape.parameters, rel=0.02)


def test_devices_that_train_together_keep_a_second_copy_of_the_gradients():
    shape, t4 = shape_of("llama"), plan_hardware("2xt4")
    alone, both = (training_memory(shape, t4, 2, 64, devices=n) for n in (1, 2))
    assert both["gradients"] == 2 * alone["gradients"] and both["peak"] > alone["peak"]


def test_chosen_targets_make_the_adapter_smaller():
    shape, t4 = shape_of("llama"), plan_hardware("t4")
    every, some = (training_memory(shape, t4, 2, 64, 8, targets=t) for t in (None, ["q_proj", "v_proj"]))
    assert some["trainable"] == 4 * 8 * (64 + 64 + 64 + 32) < every["trainable"] and some["activations"] < every["activations"]


# ---- what fits, and what to change

@pytest.fixture
def machine(monkeypatch):
    "The plan for a T4 with so many bytes"
    def made(memory, **facts):
        monkeypatch.setitem(TARGETS, "small", TARGETS["t4"].model_copy(update={"memory": int(memory)} | facts))
        return plan_hardware("small")
    return made


@pytest.mark.parametrize("rows, devices, micro", [(8, 1, 8), (12, 1, 12), (8, 2, 4), (1, 2, 1)])
def test_where_memory_is_plenty_a_pass_takes_all_rows_of_a_device(machine, rows, devices, micro):
    assert fit_micro_batch(shape_of("llama"), machine(64*GiB), rows, 64, 8, devices=devices)[0] == micro


def test_a_pass_may_be_kept_small():
    shape = shape_of("llama")
    assert [fit_micro_batch(shape, plan_hardware("t4"), 12, 64, 8, "auto", most=n)[0] for n in (None, 5, 1, 0)] == [12, 4, 1, 1]


def test_the_micro_batch_divides_the_rows_of_a_step_and_is_the_largest_that_fits(machine):
    shape = shape_of("llama")
    def peak(rows): return training_memory(shape, plan_hardware("t4"), rows, 256, 8)["peak"]
    micro, need = fit_micro_batch(shape, machine(peak(5) / memory.ROOM), 12, 256, 8)
    assert micro == 4 and need["peak"] == peak(4)


def test_checkpointing_is_chosen_where_fewer_than_four_rows_fit_without(machine):
    shape = shape_of("llama")
    def chosen(rows):
        without = training_memory(shape, plan_hardware("t4"), rows, 256, 8)["peak"]
        return fit_micro_batch(shape, machine(without / memory.ROOM + 1), 8, 256, 8, "auto")[1]["checkpointing"]
    assert [chosen(8), chosen(4), chosen(2)] == [False, False, True]


def test_changes_are_tried_from_the_cheapest_to_the_dearest():
    names = [name for name, _ in changes_to_try(shape_of("llama"), 4, 512, 8, False)]
    assert names == ["micro_batch: 2", "micro_batch: 1", "gradient_checkpointing: true", "max_length: 256", "max_length: 128",
                     "model.quantize: 4bit"]


def test_what_fits_needs_no_change(machine):
    assert what_to_change(shape_of("llama"), machine(64*GiB), 8, 256, 8) == []


def test_changes_are_named_until_it_fits_and_each_says_what_it_would_then_need(machine):
    shape = published("TinyLlama/TinyLlama-1.1B-Chat-v1.0")
    peaks = {again: training_memory(shape, plan_hardware("t4"), 1, 1024, 32, again)["peak"] for again in (False, True)}
    said = what_to_change(shape, machine((peaks[False] + peaks[True]) / 2), 4, 1024, 32)
    assert [s.split(" (")[0] for s in said] == ["micro_batch: 1", "gradient_checkpointing: true"]
    assert said[-1].endswith(f"(then about {peaks[True]/GiB:.1f} GiB)")


def test_a_7b_model_that_is_trained_whole_is_told_of_four_bits(machine):
    said = what_to_change(published("mistralai/Mistral-7B-Instruct-v0.2"), plan_hardware("t4"), 4, 1024, None)
    assert said[-1].startswith("model.quantize: 4bit, with method: lora (then about")


def test_where_nothing_helps_that_is_said(machine):
    said = what_to_change(published("mistralai/Mistral-7B-Instruct-v0.2"), machine(4*GiB), 1, 128, 8)
    assert said[-1] == "nothing of that is enough: take a smaller model, or a larger machine"


def test_phases_name_the_main_memory_and_the_disk_that_run_out(machine):
    need = training_memory(published("mistralai/Mistral-7B-Instruct-v0.2", "4bit"), plan_hardware("t4"), 1, 1024, 16, True)
    assert set(need["phases"]) == {"load", "train", "save"} and need["phases"]["train"]["gpu"] == need["peak"]
    small = machine(14*GiB, main_memory=2*GiB, disk=10*GiB).hardware
    assert [s.split(":")[0] for s in shortages(need["phases"], small)] == ["main memory", "disk"]
    assert shortages(need["phases"], machine(14*GiB, main_memory=None, disk=None).hardware) == []


def test_on_a_cpu_the_model_is_in_the_main_memory(monkeypatch):
    need = training_memory(shape_of("llama"), plan_hardware("cpu"), 2, 64)
    assert need["phases"]["train"] == {"gpu": 0, "main": need["peak"], "disk": need["phases"]["train"]["disk"]}


def test_a_plan_says_what_is_short_and_what_to_change_first():
    from distill_nb.run.plan import memory_lines
    machine = TARGETS["t4"].model_copy(update={"disk": 10*GiB})
    row = {"peak": 20*GiB, "phases": {"save": {"gpu": 0, "main": 13*GiB, "disk": 11*GiB}}, "change": ["micro_batch: 1 (then about 9.0 GiB)", "more"]}
    assert [line.strip() for line in memory_lines(row, machine)] == [
        "memory: about 20.0 of 14.7 GiB: DOES NOT FIT", "main memory: about 13.0 of 12.7 GiB to save: DOES NOT FIT",
        "disk: about 11.0 of 10.0 GiB to save: DOES NOT FIT", "change first micro_batch: 1 (then about 9.0 GiB)", "then more"]
    assert [line.strip() for line in memory_lines({"peak": GiB}, machine)] == ["memory: about 1.0 of 14.7 GiB"]
