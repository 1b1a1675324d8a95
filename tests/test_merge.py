"""A merge is proved: what the adapter does is in the merged model, for every way in which layers and heads are built."""
import shutil

import pytest
import torch

import tiny
from distill_nb import merge
from distill_nb.core import DistillError, read_json, write_json
from distill_nb.hardware import plan_hardware
from distill_nb.models import load_model, lora_targets
from distill_nb.stage import ModelSpec, check

QUESTIONS = ["What is the capital of France?", "What is two and two?", "Good or bad?"]
ROWS = [{"id": q, "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "The cat sat on the mat."}],
         "meta": {}} for q in QUESTIONS]
PLAN = plan_hardware("cpu")


def adapt(folder, base, std=0.05, targets=None, seed=1, quantize=None, **config):
    "An adapter in `folder/adapter` for the model in `base`: random, as if it had been trained"
    from peft import LoraConfig, get_peft_model
    model = load_model(ModelSpec(name=str(base), quantize=quantize), PLAN, "float32").model
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets or lora_targets(model),
                                             task_type="CAUSAL_LM", **config))
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(weight, std=std)
    model.save_pretrained(folder/"adapter")
    write_json(folder/"adapter"/"base.json", ModelSpec(name=str(base), quantize=quantize).model_dump())
    return folder/"adapter"


@pytest.fixture
def base(tmp_path): return tiny.make(tmp_path/"base", "chatml", tie_word_embeddings=False)


def measured(adapter, dtype="float32"):
    "Base and adapter, their logits, and the logits of the base alone"
    loaded = merge.load_unmerged(ModelSpec(name=str(adapter)), PLAN, dtype)
    return loaded, merge.proof_logits(loaded, ROWS), merge.logits_alone(loaded, ROWS)


def merged(adapter, folder, dtype="float32", spoil=None, tolerance=1e-3):
    "Merge, save and prove; `spoil` gets the merged model before it is saved"
    loaded, before, alone = measured(adapter, dtype)
    model = merge.merge_adapter(loaded.model)
    if spoil:
        with torch.no_grad(): spoil(model)
    merge.save_model(model, loaded.tokenizer, folder)
    return merge.prove(before, alone, folder, PLAN, dtype, ROWS, tolerance)


KINDS = {"fused projections": ("phi3", {}), "layers stored the other way round": ("gpt2", {}), "a head of its own": ("llama3", {}),
         "a tied head": ("chatml", {}), "a soft cap and windows": ("gemma2", {}), "norms of queries": ("gemma3", {})}


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_adapter_does_is_in_the_merged_model(kind, tmp_path):
    name, config = KINDS[kind]
    adapter = adapt(tmp_path, tiny.make(tmp_path/"base", name, **config))
    proof = merged(adapter, tmp_path/"merged")
    assert proof["adapter_effect"] > 1e-2, "the adapter does nothing, and so the test shows nothing"
    assert proof["max_abs_logit_difference"] <= proof["tolerance"] <= 0.01 * proof["adapter_effect"]
    assert proof["same_top_token"] == 1
    whole = load_model(ModelSpec(name=str(tmp_path/"merged")), PLAN, "float32")
    assert not hasattr(whole.model, "peft_config") and not (tmp_path/"merged"/"adapter_config.json").exists()


@pytest.mark.parametrize("dtype, std", [("float32", 0.05), ("float32", 1e-4), ("float32", 1e-5), ("float16", 1e-3), ("bfloat16", 1e-3),
                                        ("bfloat16", 0.05)])
def test_a_forgotten_adapter_is_noticed_however_little_it_does(dtype, std, base, tmp_path):
    "The base alone stands in for the merged model: below a tolerance of 1e-3, and as small as it may be"
    _, before, alone = measured(adapt(tmp_path, base, std), dtype)
    assert 0 < (before - alone).abs().max() < 20 * std
    with pytest.raises(DistillError, match="as if the adapter had been forgotten"):
        merge.prove(before, alone, base, PLAN, dtype, ROWS, tolerance=1e-3)


@pytest.mark.parametrize("std", [1e-3, 1e-5])
def test_a_faithful_merge_passes_however_little_the_adapter_does(std, base, tmp_path):
    proof = merged(adapt(tmp_path, base, std), tmp_path/"merged")
    assert proof["max_abs_logit_difference"] < proof["adapter_effect"] / 10


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_are_allowed_their_rounding_and_no_more(dtype, base, tmp_path):
    proof = merged(adapt(tmp_path, base), tmp_path/"merged", dtype)
    assert 1e-6 < proof["max_abs_logit_difference"] <= proof["tolerance"] <= proof["adapter_effect"] / 2


def test_an_adapter_too_small_for_the_format_is_not_lost_without_a_word(base, tmp_path):
    "bfloat16 rounds it away: the merged weights are the base's"
    with pytest.raises(DistillError, match="bfloat16 rounds .* dtype: float32"):
        merged(adapt(tmp_path, base, std=1e-5), tmp_path/"merged", "bfloat16")


def test_half_an_adapter_is_noticed(base, tmp_path):
    "All that it does to one of the layers is missing"
    def spoil(model): model.model.layers[1].load_state_dict(whole.model.model.layers[1].state_dict())
    whole = load_model(ModelSpec(name=str(base)), PLAN, "float32")
    with pytest.raises(DistillError, match="not faithful"): merged(adapt(tmp_path, base), tmp_path/"merged", spoil=spoil)


def test_a_merge_into_another_base_is_noticed(base, tmp_path):
    other = tiny.make(tmp_path/"other", "chatml", seed=1, tie_word_embeddings=False)
    adapter = adapt(tmp_path, base)
    _, before, alone = measured(adapter)
    write_json(adapter/"base.json", {"name": str(other)})
    wrong = merge.load_unmerged(ModelSpec(name=str(adapter)), PLAN, "float32")
    merge.save_model(merge.merge_adapter(wrong.model), wrong.tokenizer, tmp_path/"merged")
    with pytest.raises(DistillError, match="not faithful"):
        merge.prove(before, alone, tmp_path/"merged", PLAN, "float32", ROWS, 1e-3)


def test_an_adapter_without_any_effect_is_said(base, tmp_path, capsys):
    "A fresh LoRA is zero: there is nothing to lose, and nothing was learnt"
    proof = merged(adapt(tmp_path, base, std=0), tmp_path/"merged")
    assert proof["adapter_effect"] == 0 and proof["max_abs_logit_difference"] == 0
    assert "the adapter has no effect" in capsys.readouterr().out
    assert "has no effect" in merge.model_card(ModelSpec(name="base"), proof, 1, "float32")


def test_the_card_says_what_was_proved(base, tmp_path):
    proof = merged(adapt(tmp_path, base), tmp_path/"merged")
    card = merge.model_card(ModelSpec(name="base"), proof, 12345, "float32")
    assert f"{proof['adapter_effect']:.2g}" in card and f"{proof['max_abs_logit_difference']:.2g}" in card and "12,345" in card


def test_an_adapter_on_a_tied_head_does_not_spoil_the_embedding_unseen(tmp_path):
    "Merging writes into the one matrix that both share: either that is right, or the proof stops it"
    adapter = adapt(tmp_path, tiny.make(tmp_path/"base", "chatml"), targets=["q_proj", "lm_head"])
    try: proof = merged(adapter, tmp_path/"merged")
    except DistillError as e: assert "not faithful" in str(e)
    else: assert proof["max_abs_logit_difference"] <= proof["tolerance"] < proof["adapter_effect"] / 2


def test_an_adapter_that_was_trained_on_four_bits_is_merged_into_the_whole_weights(base, tmp_path):
    adapter = adapt(tmp_path, base, quantize="4bit")
    proof = merged(adapter, tmp_path/"merged")
    assert proof["max_abs_logit_difference"] <= proof["tolerance"]
    assert "quantization_config" not in read_json(tmp_path/"merged"/"config.json")
    weights = load_model(ModelSpec(name=str(tmp_path/"merged")), PLAN, "float32").model.state_dict()
    assert {w.dtype for w in weights.values()} == {torch.float32}


def test_four_bits_are_never_merged_into(base, tmp_path):
    "Were the base loaded in NF4, PEFT would round the merged weights to NF4 again"
    with pytest.raises(DistillError, match="quantize: .* 16 or 32 bits"):
        check(merge.MergeParams, {"adapter": {"name": str(base), "quantize": "4bit"}}, "here")
    narrow = load_model(ModelSpec(name=str(adapt(tmp_path, base)), quantize="4bit"), PLAN, "float32")
    with pytest.raises(DistillError, match="4 bits"): merge.merge_adapter(narrow.model)


def test_an_adapter_with_nan_is_not_merged(base, tmp_path):
    loaded = merge.load_unmerged(ModelSpec(name=str(adapt(tmp_path, base))), PLAN, "float32")
    next(p for n, p in loaded.model.named_parameters() if "lora_B" in n).data.fill_(float("nan"))
    with pytest.raises(DistillError, match="NaN"): merge.merge_adapter(loaded.model)


def test_a_whole_model_equals_itself(base, tmp_path):
    "A full fine-tune has no adapter that could be forgotten"
    loaded = merge.load_unmerged(ModelSpec(name=str(base)), PLAN, "float32")
    before, alone = merge.proof_logits(loaded, ROWS), merge.logits_alone(loaded, ROWS)
    assert alone is None
    merge.save_model(merge.merge_adapter(loaded.model), loaded.tokenizer, tmp_path/"merged")
    proof = merge.prove(before, alone, tmp_path/"merged", PLAN, "float32", ROWS, 1e-3)
    assert proof["max_abs_logit_difference"] == 0 and proof["adapter_effect"] is None
    other = tiny.make(tmp_path/"other", "chatml", seed=1, tie_word_embeddings=False)
    with pytest.raises(DistillError, match="not faithful"): merge.prove(before, None, other, PLAN, "float32", ROWS, 1e-3)


def test_logits_are_kept_at_a_bounded_number_of_positions(base):
    long = [{"id": "long", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a b " * 100}], "meta": {}}]
    loaded = load_model(ModelSpec(name=str(base)), PLAN, "float32")
    assert merge.proof_logits(loaded, long).shape[0] == merge.POSITIONS
    assert merge.proof_logits(loaded, ROWS[:1]).shape[0] <= merge.POSITIONS


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_sixteen_bits_compute_in_fp32_and_stay_what_they_are(dtype, base):
    loaded = load_model(ModelSpec(name=str(base)), PLAN, dtype)
    was = {n: p.clone() for n, p in loaded.model.named_parameters()}
    narrow = merge.proof_logits(loaded, ROWS)
    assert narrow.dtype == torch.float32
    assert all(p.dtype == was[n].dtype and torch.equal(p, was[n]) for n, p in loaded.model.named_parameters())
    loaded.model.float()
    assert torch.allclose(narrow, merge.proof_logits(loaded, ROWS), atol=1e-6)


def test_an_adapter_loses_no_layers(base, tmp_path):
    adapter = adapt(tmp_path, base)
    cut = ModelSpec(name=str(adapter), layers=1)
    with pytest.raises(DistillError, match="layers"): merge.MergeParams(adapter=cut).estimate(PLAN, None, lambda spec: spec)
    with pytest.raises(DistillError, match="layers"): merge.load_unmerged(cut, PLAN, "float32")


def test_what_is_no_adapter_is_said(tmp_path):
    with pytest.raises(DistillError, match="no adapter_config.json or config.json"): merge.find_adapter(str(tmp_path))
    shutil.rmtree(tmp_path)
    with pytest.raises(DistillError, match="no adapter_config.json or config.json"): merge.find_adapter(str(tmp_path))
