"""What a machine decides: number format, method, optimiser, attention, GPUs; and which models overflow."""
import json
import subprocess
import sys

import pytest
from conftest import environment

from distill_nb import hardware
from distill_nb.core import DistillError
from distill_nb.hardware import TARGETS, Hardware, describe_plan, gpu_build, one_gpu, plan_for_model, plan_hardware


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


GIB = 2**30


def described(device="cuda", capability=None, bf16=None, gpus=1, packages=("bitsandbytes",)):
    "A machine as a table describes it"
    fast = capability >= (8, 0) if capability else bool(bf16)
    return Hardware(name=device, device=device, memory=16*GIB, capability=capability, fast_bf16=fast, gpus=gpus, packages=list(packages))


BITS, FLASH, NONE = ("bitsandbytes",), ("bitsandbytes", "flash_attn"), ()
MACHINES = {  # facts; what is read, what stands under an adapter, mixed precision, method, optimiser, attention
    "T4": (dict(capability=(7, 5)), "float16", "float16", "fp16", "qlora", "paged_adamw_8bit", "sdpa"),
    "two T4s": (dict(capability=(7, 5), gpus=2), "float16", "float16", "fp16", "qlora", "paged_adamw_8bit", "sdpa"),
    "T4 with flash-attn": (dict(capability=(7, 5), packages=FLASH), "float16", "float16", "fp16", "qlora", "paged_adamw_8bit", "sdpa"),
    "T4 without bitsandbytes": (dict(capability=(7, 5), packages=NONE), "float16", "float16", "fp16", "lora", "adamw_torch", "sdpa"),
    "P100": (dict(capability=(6, 0)), "float16", "float16", "fp16", "qlora", "paged_adamw_8bit", "sdpa"),
    "V100": (dict(capability=(7, 0)), "float16", "float16", "fp16", "qlora", "paged_adamw_8bit", "sdpa"),
    "L4": (dict(capability=(8, 9)), "bfloat16", "bfloat16", "bf16", "qlora", "paged_adamw_8bit", "sdpa"),
    "A100": (dict(capability=(8, 0), packages=FLASH), "bfloat16", "bfloat16", "bf16", "qlora", "paged_adamw_8bit", "flash_attention_2"),
    "H100": (dict(capability=(9, 0)), "bfloat16", "bfloat16", "bf16", "qlora", "paged_adamw_8bit", "sdpa"),
    "Intel XPU": (dict(device="xpu", bf16=True, packages=FLASH), "bfloat16", "bfloat16", "bf16", "lora", "adamw_torch", "sdpa"),
    "Apple": (dict(device="mps"), "float32", "float32", None, "lora", "adamw_torch", "sdpa"),
    "CPU with AMX": (dict(device="cpu", bf16=True, gpus=0), "bfloat16", "float32", "bf16", "lora", "adamw_torch", "sdpa"),
    "CPU": (dict(device="cpu", gpus=0), "float32", "float32", None, "lora", "adamw_torch", "sdpa"),
}


@pytest.fixture
def plan_of(monkeypatch):
    "The plan for a machine that is described"
    monkeypatch.delenv("DISTILL_NB_DTYPE", raising=False)
    def made(**facts):
        monkeypatch.setitem(TARGETS, "described", described(**facts))
        return plan_hardware("described")
    return made


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_decides_what_a_stage_does(plan_of, name):
    facts, *expected = MACHINES[name]
    plan = plan_of(**facts)
    assert [plan.dtype, plan.train_dtype, plan.autocast, plan.method, plan.optim, plan.attention] == expected
    assert plan.four_bit is (plan.method == "qlora")


@pytest.mark.parametrize("name", MACHINES)
def test_each_decision_has_a_reason_of_its_own_and_all_are_printed(plan_of, name):
    plan = plan_of(**MACHINES[name][0])
    assert set(plan.reasons) == {"device", "dtype", "autocast", "method", "optim", "attention"}
    assert len(set(plan.reasons.values())) == 6 and all(3 < len(r) < 90 for r in plan.reasons.values())
    lines = describe_plan(plan).splitlines()
    assert len(lines) == 7 and all(r in line for r, line in zip(plan.reasons.values(), lines[1:]))


def test_of_two_gpus_the_plan_says_that_one_is_used(plan_of):
    assert plan_of(capability=(7, 5), gpus=2).reasons["device"].startswith("2 GPUs; one is used")


@pytest.mark.parametrize("built, capability, works", [
    (["sm_70", "sm_75", "sm_90"], (6, 0), False),  # a P100 with a build for CUDA 12.8
    (["sm_50", "sm_60", "sm_75"], (6, 1), True),
    (["sm_75", "sm_80"], (7, 5), True),
    (["sm_80"], (8, 9), True),
    (["sm_80"], (9, 0), False),
    (["sm_80", "compute_80"], (9, 0), True),
    (["sm_90a", "sm_120"], (9, 0), True),
])
def test_a_gpu_is_of_use_where_torch_has_kernels_for_it(built, capability, works):
    assert hardware.has_kernels(capability, built) is works


@pytest.fixture
def gpu(monkeypatch):
    "Pretend that torch sees one GPU"
    import torch
    from types import SimpleNamespace
    def seen(capability, built):
        facts = SimpleNamespace(name="a GPU", total_memory=16*GIB, major=capability[0], minor=capability[1])
        monkeypatch.setattr(hardware, "gpu_build", lambda: True)
        for name, value in {"is_available": True, "device_count": 1, "get_device_properties": facts, "get_arch_list": built}.items():
            monkeypatch.setattr(torch.cuda, name, lambda *a, value=value: value)
    return seen


def test_a_gpu_that_torch_cannot_use_is_refused_with_the_way_out(gpu):
    gpu((6, 0), ["sm_70", "sm_75"])
    with pytest.raises(DistillError, match="a GPU: has compute capability 6.0, and the installed torch has kernels for sm_70, sm_75 only"):
        plan_hardware()


def test_this_machine_knows_its_main_memory_its_disk_and_its_packages(gpu):
    gpu((7, 5), ["sm_75"])
    found = hardware.detect_hardware()
    assert (found.device, found.capability, found.memory) == ("cuda", (7, 5), 16*GIB)
    assert found.main_memory == hardware.main_memory() and found.disk > 0 and "bitsandbytes" in found.packages


def test_a_person_may_force_a_number_format_and_the_plan_says_so(monkeypatch):
    monkeypatch.setenv("DISTILL_NB_DTYPE", "float32")
    plan = plan_hardware("l4")
    assert (plan.dtype, plan.train_dtype, plan.autocast) == ("float32", "float32", None) and "DISTILL_NB_DTYPE" in plan.reasons["dtype"]
    monkeypatch.setenv("DISTILL_NB_DTYPE", "flaot32")
    with pytest.raises(DistillError, match="DISTILL_NB_DTYPE=flaot32: not a number format, did you mean 'float32'"): plan_hardware("l4")


def test_a_cpu_that_is_told_to_use_fp16_trains_in_fp32(monkeypatch):
    "There is no gradient scaler on a CPU"
    monkeypatch.setenv("DISTILL_NB_DTYPE", "float16")
    plan = plan_hardware("cpu")
    assert (plan.dtype, plan.train_dtype, plan.autocast) == ("float16", "float32", None)


@pytest.mark.parametrize("kind, read, trained, mixed, held", [
    ("llama", "float16", "float16", "fp16", False),
    ("t5", "float32", "float32", None, False),
    ("mt5", "float32", "float32", None, False),
    ("gemma", "float32", "float16", "fp16", True),
    ("gemma3_text", "float32", "float16", "fp16", True),
])
def test_a_model_that_overflows_in_fp16_has_a_plan_of_its_own_on_a_t4(plan_of, kind, read, trained, mixed, held):
    plan = hardware.plan_for_model(plan_of(capability=(7, 5)), kind)
    assert (plan.dtype, plan.train_dtype, plan.autocast, plan.hold_fp32) == (read, trained, mixed, held)
    assert held == ("Gemma" in plan.reasons["dtype"])


@pytest.mark.parametrize("facts", [dict(capability=(8, 0)), dict(device="cpu", gpus=0), dict(device="mps")])
def test_where_fp16_is_not_planned_no_model_is_special(plan_of, facts):
    plan = plan_of(**facts)
    assert hardware.plan_for_model(plan, "gemma2") == plan_for_model(plan, "t5") == plan


@pytest.mark.parametrize("method, cpu, t4, a100", [("lora", "float32", "float16", "bfloat16"), ("qlora", "float32", "float16", "bfloat16"),
                                                   ("full", "float32", "float32", "float32")])
def test_weights_that_are_themselves_trained_are_fp32(monkeypatch, method, cpu, t4, a100):
    monkeypatch.delenv("DISTILL_NB_DTYPE", raising=False)
    assert [hardware.training_dtype(method, plan_hardware(t)) for t in ("cpu", "t4", "a100")] == [cpu, t4, a100]


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
