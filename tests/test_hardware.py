"""What a machine decides: number format, optimiser, GPUs; and whether the estimates of memory hold against what is measured."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment

from distill_nb import hardware
from distill_nb.core import DistillError
from distill_nb.hardware import TARGETS, choose_dtype, gpu_build, one_gpu, plan_hardware


def alone(code, env=None):
    "What a program prints in a process of its own; the last line is JSON"
    done = subprocess.run([sys.executable, "-c", code], env=environment(env), text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def build(tmp_path, monkeypatch):
    "Pretend that a torch of another build is installed; it cannot be imported"
    def write(text, version_file=True):
        (tmp_path/"torch").mkdir()
        (tmp_path/"torch"/"__init__.py").write_text("raise ImportError('imported')")
        if version_file: (tmp_path/"torch"/"version.py").write_text(text)
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        monkeypatch.syspath_prepend(tmp_path)
    return write


CPU_BUILD = "__version__ = '2.13.0+cpu'\ndebug = False\ncuda: Optional[str] = None\nhip: Optional[str] = None\nxpu: Optional[str] = None\n"


@pytest.mark.parametrize("line, found", [
    ("", False),
    ("cuda: Optional[str] = '12.8'", True),
    ("cuda = '11.8'", True),
    ("hip: Optional[str] = '6.2'", True),
    ("xpu: Optional[str] = '20250101'", True),
])
def test_a_build_of_torch_with_kernels_for_a_gpu_is_known_without_importing_it(build, monkeypatch, line, found):
    monkeypatch.setattr(hardware.platform, "system", lambda: "Linux")
    build(CPU_BUILD + line + "\n")
    assert gpu_build() is found


def test_a_build_that_says_nothing_of_itself_has_to_be_asked(build):
    build("", version_file=False)
    assert gpu_build() is True


def test_a_mac_has_to_be_asked(build, monkeypatch):
    monkeypatch.setattr(hardware.platform, "system", lambda: "Darwin")
    build(CPU_BUILD)
    assert gpu_build() is True


def test_a_plan_for_a_machine_without_a_gpu_build_imports_no_torch():
    code = ("import json, sys; from distill_nb import hardware; hardware.gpu_build = lambda: False; plan = hardware.plan_hardware();"
            "print(json.dumps([plan.hardware.device, 'torch' in sys.modules]))")
    assert alone(code) == ["cpu", False]


@pytest.mark.parametrize("name, dtype", [("cpu", "float32"), ("t4", "float16"), ("p100", "float16"), ("l4", "bfloat16"), ("h100", "bfloat16")])
def test_the_compute_capability_decides_the_number_format(monkeypatch, name, dtype):
    monkeypatch.delenv("DISTILL_NB_DTYPE", raising=False)
    assert choose_dtype(TARGETS[name])[0] == dtype


def test_a_person_may_force_a_number_format_and_the_plan_says_so(monkeypatch):
    monkeypatch.setenv("DISTILL_NB_DTYPE", "float32")
    plan = plan_hardware("l4")
    assert (plan.dtype, plan.train_dtype, plan.autocast) == ("float32", "float32", None) and "DISTILL_NB_DTYPE" in plan.reason
    monkeypatch.setenv("DISTILL_NB_DTYPE", "flaot32")
    with pytest.raises(DistillError, match="DISTILL_NB_DTYPE=flaot32: not a number format, did you mean 'float32'"): plan_hardware("l4")


def test_a_cpu_that_is_told_to_use_fp16_trains_in_fp32(monkeypatch):
    "There is no gradient scaler on a CPU"
    monkeypatch.setenv("DISTILL_NB_DTYPE", "float16")
    plan = plan_hardware("cpu")
    assert (plan.dtype, plan.train_dtype, plan.autocast) == ("float16", "float32", None)


@pytest.fixture
def gpus(monkeypatch):
    "Pretend that torch sees GPUs, as many as are visible of so many"
    import os
    import torch
    def set(count, visible=None, started=False, **launched):
        for name in ("CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "LOCAL_RANK"): monkeypatch.delenv(name, raising=False)
        if visible is not None: monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        for name, value in launched.items(): monkeypatch.setenv(name, value)
        def seen(): return len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")) if "CUDA_VISIBLE_DEVICES" in os.environ else count
        monkeypatch.setattr(hardware, "gpu_build", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", seen)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
        return lambda: os.environ.get("CUDA_VISIBLE_DEVICES")
    return set


@pytest.mark.parametrize("count, visible, left", [(2, None, "0"), (4, "2,3", "2"), (2, "GPU-a1,GPU-b2", "GPU-a1")])
def test_of_several_gpus_a_run_sees_the_first(gpus, count, visible, left):
    now = gpus(count, visible)
    assert "2 GPUs" in one_gpu().replace("4 GPUs", "2 GPUs") and now() == left


@pytest.mark.parametrize("count, visible, launched", [(1, None, {}), (0, None, {}), (2, "1", {}), (2, None, {"WORLD_SIZE": "2", "LOCAL_RANK": "1"})])
def test_one_gpu_and_a_run_that_was_launched_for_several_stay_as_they_are(gpus, count, visible, launched):
    now = gpus(count, visible, **launched)
    assert one_gpu() is None and now() == visible


def test_once_torch_has_started_the_gpus_it_is_too_late_to_hide_one(gpus):
    gpus(2, started=True)
    with pytest.raises(RuntimeError, match="before"): one_gpu()


# ---- estimated and measured

MEASURE = """
import json, os, resource, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from distill_nb.families import FAMILIES, head_of, supervised_hidden
from distill_nb.models import lora_targets
import peft
torch.set_num_threads(1)

def resident(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def train(model, ids, r=None, checkpointing=False):
    if r: model = peft.get_peft_model(model, peft.LoraConfig(r=r, target_modules=lora_targets(model)))
    if checkpointing: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], foreach=False)
    for _ in range(2):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

def generate(model, ids):
    model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False)

def likelihood(model, ids):
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with torch.inference_mode(): head_of(model.eval(), FAMILIES["causal"]).nll(*supervised_hidden(model, batch, FAMILIES["causal"]))

def measure(kind, settings, use, batch_size, length, options):
    "Bytes that a process of its own, with everything imported, needs at its peak beyond what it has at its start"
    read, write = os.pipe()
    if os.fork():
        os.close(write)
        return json.loads(os.fdopen(read).read())
    before = resident()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    ids = torch.randint(3, 100, (batch_size, length - (8 if use == "generate" else 0)))
    {"train": train, "generate": generate, "likelihood": likelihood}[use](model, ids, **options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    os.write(write, json.dumps([peak - before, peak]).encode())
    os._exit(0)

print(json.dumps([measure(*case) for case in json.loads(sys.argv[1])]))
"""

LLAMA = dict(vocab_size=8000, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2)
GPT2 = dict(vocab_size=8000, n_embd=256, n_layer=6, n_head=4, bos_token_id=1, eos_token_id=2)
MEASURED = {  # kind, configuration, use, rows, tokens a row, options
    "full": ("llama", LLAMA, "train", 4, 128, {}),
    "lora": ("llama", LLAMA, "train", 4, 128, {"r": 8}),
    "checkpointing": ("llama", LLAMA, "train", 4, 256, {"checkpointing": True}),
    "large vocabulary": ("llama", LLAMA | dict(vocab_size=32000, num_hidden_layers=2), "train", 4, 128, {}),
    "gemma2": ("gemma2", LLAMA | dict(head_dim=64), "train", 4, 128, {}),
    "gpt2, with dropout in its attention": ("gpt2", GPT2, "train", 4, 256, {}),
    "generating": ("llama", LLAMA, "generate", 32, 128, {}),
    "likelihoods": ("llama", LLAMA, "likelihood", 16, 128, {}),
}


@pytest.fixture(scope="module")
def measured():
    "Case: bytes beyond the start, and bytes in all. Freed memory goes back at once, so that the numbers are not those of an allocator's gaps"
    done = subprocess.run([sys.executable, "-c", MEASURE, json.dumps(list(MEASURED.values()))], text=True, capture_output=True, timeout=300,
                          env=environment({"MALLOC_MMAP_THRESHOLD_": "65536"}))
    assert done.returncode == 0, done.stderr
    return dict(zip(MEASURED, json.loads(done.stdout.splitlines()[-1])))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a forked process is read from /proc")
@pytest.mark.parametrize("case", MEASURED)
def test_the_estimate_holds_what_a_step_really_takes_and_not_much_more(measured, case, monkeypatch):
    from transformers import AutoConfig
    from distill_nb.memory import RUNTIME_BYTES, inference_memory, likelihood_memory, training_memory
    from distill_nb.models import describe_model
    monkeypatch.setenv("DISTILL_NB_DTYPE", "float32")
    kind, settings, use, batch_size, length, options = MEASURED[case]
    shape, plan = describe_model(AutoConfig.for_model(kind, **settings)), plan_hardware("cpu")
    if use == "train": need = training_memory(shape, plan, batch_size, length, options.get("r"), options.get("checkpointing", False))
    else: need = {"generate": inference_memory, "likelihood": likelihood_memory}[use](shape, plan, batch_size, length)
    beyond, whole = measured[case]
    assert 0.85 < (need["peak"] - RUNTIME_BYTES["cpu"]) / beyond < 1.6
    assert need["peak"] > whole
