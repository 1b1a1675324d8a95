"""What fine-tuning learns from: the labels, and the loss that they give, on a tiny model."""
import pytest
import torch

from distill_nb import sft
from distill_nb.families import FAMILIES, encode, prompt_completion
from distill_nb.hardware import plan_hardware
from distill_nb.models import load_model
from distill_nb.core import DistillError, write_jsonl
from distill_nb.stage import ModelSpec

ROWS = [{"id": str(n), "messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": answer}], "meta": {}}
        for n, answer in enumerate(["Yes.", "A longer answer, with commas.", "ভাত"])]


@pytest.fixture
def trainer(model, tmp_path):
    from datasets import Dataset
    params = sft.SftParams(out=str(tmp_path), model=ModelSpec(name=str(model)), data="sample", engine="trl", batch_size=3, max_length=256, max_steps=1, learning_rate=1e-9)
    student, tokenizer = sft.load_with_peft(params, plan_hardware("cpu"), str(model))
    return sft.make_trainer(params, plan_hardware("cpu"), student, tokenizer, Dataset.from_list(prompt_completion(ROWS)), None)


def test_only_the_answers_tokens_are_learnt(trainer):
    batch, tokenizer = next(iter(trainer.get_train_dataloader())), trainer.processing_class
    learnt = {tokenizer.decode(ids[labels != -100]) for ids, labels in zip(batch["input_ids"], batch["labels"])}
    assert learnt == {r["messages"][-1]["content"] + "<|im_end|>\n" for r in ROWS}


def test_the_loss_is_the_cross_entropy_of_those_tokens(trainer, model):
    "Against the textbook formula on full logits, from a model that no trainer has touched"
    batch = next(iter(trainer.get_train_dataloader()))
    plain = load_model(ModelSpec(name=str(model)), dtype="float32").model
    with torch.inference_mode():
        logits = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        wanted = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch["labels"][:, 1:].reshape(-1), ignore_index=-100)
    trainer.train()
    logged = next(h["loss"] for h in trainer.state.log_history if "loss" in h)
    assert float(logged) == pytest.approx(wanted.item(), abs=1e-3)


def test_rows_that_do_not_fit_are_left_out_and_counted(model, tmp_path, capsys):
    tokenizer = load_model(ModelSpec(name=str(model)), dtype="float32").tokenizer
    long = [{"id": "long", "messages": [{"role": "user", "content": "x" * 500}, {"role": "assistant", "content": "Yes."}], "meta": {}}]
    write_jsonl(tmp_path/"train.jsonl", ROWS + long)
    limit = max(len(encode(tokenizer, r, FAMILIES["causal"]).input_ids) for r in ROWS)
    train, validation = sft.training_rows(str(tmp_path), tokenizer, limit)
    assert len(train) == 3 and validation is None and "1 rows are left out" in capsys.readouterr().out
    with pytest.raises(DistillError, match="max_length: 8: every prompt alone is longer"): sft.training_rows(str(tmp_path), tokenizer, 8)


def test_a_checkpoint_counts_when_it_was_written_to_its_end(tmp_path):
    for step, whole in ((5, True), (10, True), (15, False)):
        (tmp_path/f"checkpoint-{step}").mkdir()
        if whole: (tmp_path/f"checkpoint-{step}"/"complete").touch()
    assert sft.last_checkpoint(tmp_path).name == "checkpoint-10"
    assert sft.last_checkpoint(tmp_path/"nowhere") is None
