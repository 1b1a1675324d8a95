"""One training run in a process of its own, for the benchmark notebook to call.

    python train_job.py trl   FOLDER '{"batch_size": 8, ...}'   # TRL's SFTTrainer, as its documentation shows it
    python train_job.py stage FOLDER '{"batch_size": 8, ...}'   # this library's stage
    python train_job.py imports                                  # nothing but the libraries that both import

FOLDER holds `model/` and `rows/train.jsonl`. The last line of output is JSON: when the process began and its first step did, seconds of
training, peak of resident memory in bytes, the first and the last loss.
"""
import json
import resource
import sys
import time
from pathlib import Path

BEGAN = time.time()


def libraries():
    import datasets  # noqa: F401
    import torch  # noqa: F401
    from peft import LoraConfig  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: F401
    from trl import SFTConfig, SFTTrainer  # noqa: F401


def watch(found: dict):
    """Note when the first step begins, how long training takes, and its losses."""
    from transformers import Trainer

    train, step = Trainer.train, Trainer.training_step

    def timed_train(self, *args, **more):
        started = time.perf_counter()
        result = train(self, *args, **more)
        found["seconds"] = time.perf_counter() - started
        losses = [line["loss"] for line in self.state.log_history if "loss" in line]
        found["losses"] = [losses[0], losses[-1]]
        return result

    def timed_step(self, *args, **more):
        found.setdefault("first_step", time.time())
        return step(self, *args, **more)

    Trainer.train, Trainer.training_step = timed_train, timed_step


def trl(folder: Path, settings: dict):
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
    from trl import SFTConfig, SFTTrainer

    class OnCpu(SFTTrainer):  # TRL's own loss is a triton kernel, which does not run without a GPU
        compute_loss = Trainer.compute_loss

    torch.manual_seed(settings["seed"])
    rows = load_dataset("json", data_files=str(folder/"rows"/"train.jsonl"), split="train", cache_dir=str(folder/"cache"))
    rows = rows.map(lambda r: {"prompt": r["messages"][:-1], "completion": r["messages"][-1:]}, remove_columns=rows.column_names)
    OnCpu(
        model=AutoModelForCausalLM.from_pretrained(folder/"model", dtype=torch.float32), train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(folder/"model"),
        peft_config=LoraConfig(r=settings["lora_r"], lora_alpha=settings["lora_alpha"], lora_dropout=settings["lora_dropout"],
                               target_modules="all-linear", task_type="CAUSAL_LM"),
        args=SFTConfig(
            output_dir=str(folder/"trl"), max_length=settings["max_length"], per_device_train_batch_size=settings["micro_batch"],
            gradient_accumulation_steps=settings["batch_size"]//settings["micro_batch"], num_train_epochs=settings["epochs"],
            learning_rate=settings["learning_rate"], lr_scheduler_type="cosine", gradient_checkpointing=False, packing=False,
            bf16=settings.get("bf16", True), use_cpu=True, dataloader_pin_memory=False, logging_steps=1, report_to="none",
            save_strategy="steps", save_steps=settings["save_steps"], disable_tqdm=True, seed=settings["seed"])).train()


def stage(folder: Path, settings: dict):
    from distill_nb.sft import SftParams, open_stage, train_stage

    own = {k: v for k, v in settings.items() if k != "bf16"}
    out = f"stage-{settings.get('packing', False)}-{settings.get('group_by_length', False)}-{time.time():.0f}"
    params = SftParams(out=str(folder/out), model=str(folder/"model"), data=str(folder/"rows"), engine="trl", method="lora",
                       gradient_checkpointing=False, keep_best=False, **own)
    open_stage(params, "sft")
    train_stage(params)


def main():
    found = {"began": BEGAN}
    libraries()
    found["imported"] = time.time()
    if sys.argv[1] != "imports":
        watch(found)
        {"trl": trl, "stage": stage}[sys.argv[1]](Path(sys.argv[2]), json.loads(sys.argv[3]))
    print(json.dumps(found | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


if __name__ == "__main__":
    main()
