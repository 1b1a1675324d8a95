"""A merge is proved: what the adapter does is in the merged model, for every way in which layers and heads are built."""
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import tiny
from distill_nb import merge
from distill_nb.core import DistillError, read_json, write_json
from distill_nb.hardware import GiB, plan_hardware
from distill_nb.models import load_model, lora_targets, model_config, save_model
from distill_nb.share import proof, shards
from distill_nb.stage import ModelSpec, check

QUESTIONS = ["What is the capital of France?", "What is two and two?", "Good or bad?"]
ROWS = [{"id": q, "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "The cat sat on the mat."}],
         "meta": {}} for q in QUESTIONS]
PLAN = plan_hardware("cpu")


def adapt(folder, base, std=0.05, targets=None, seed=1, quantize=None, labels=None, parameters=None, task="CAUSAL_LM", **config):
    "An adapter in `folder/adapter` for the model in `base`: random, as if it had been trained"
    from peft import LoraConfig, get_peft_model
    model = load_model(ModelSpec(name=str(base), quantize=quantize), PLAN, "float32", labels=labels).model
    chosen = {"target_parameters": parameters, "target_modules": targets or []} if parameters else {
        "target_modules": targets or lora_targets(model)}
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **chosen, task_type=task, **config))
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name: torch.nn.init.normal_(weight, std=std)
        if "modules_to_save" in name: weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder/"adapter")
    write_json(folder/"adapter"/"base.json", ModelSpec(name=str(base), quantize=quantize).model_dump())
    return folder/"adapter"


@pytest.fixture
def base(tmp_path): return tiny.make(tmp_path/"base", "chatml", tie_word_embeddings=False)


class Trial:
    "A merge, step by step"
    def __init__(self, adapter, dtype="float32"):
        self.source = merge.open_source(ModelSpec(name=str(adapter)), adapter.parent/"cut")
        self.dtype, self.batches = dtype, proof.proof_batches(self.source.tokenizer, ROWS, self.source.family)
        self.trained = self.logits(self.source.four_bit)

    def logits(self, four_bit):
        return merge.unmerged_logits(self.source, PLAN, self.dtype, four_bit, 1000, self.batches)

    def write(self, folder, into="16bit", shard=10**9):
        return merge.write_merged(self.source, folder, PLAN, self.dtype, into, shard)

    def prove(self, folder, into="16bit", tolerance=1e-3):
        after = merge.merged_logits(folder, self.source, PLAN, self.dtype, 1000, self.batches)
        other = self.logits(False) if self.source.four_bit and into == "16bit" else None
        return merge.prove(after, self.trained, other, self.dtype, tolerance) | {"rows": len(ROWS), "into": into}


def merged(adapter, folder, dtype="float32", into="16bit", spoil=None, tolerance=1e-3, shard=10**9):
    "Merge, save and prove; `spoil` gets the merged model's folder before it is read"
    trial = Trial(adapter, dtype)
    found = trial.write(folder, into, shard)
    if spoil: spoil(folder)
    return found | trial.prove(folder, into, tolerance)


KINDS = {"fused projections": ("phi3", {}), "layers stored the other way round": ("gpt2", {}), "a head of its own": ("llama3", {}),
         "a tied head": ("chatml", {}), "Gemma": ("gemma", {}), "a soft cap and windows": ("gemma2", {}),
         "norms of queries": ("gemma3", {}), "Mistral": ("mistral", {}), "an encoder-decoder": ("t5", {"task": "SEQ_2_SEQ_LM"}),
         "a classifier, its head trained whole": ("bert_cls", {"task": "SEQ_CLS"}), "a masked model": ("bert_mlm", {"task": None}),
         "rank-stabilised": ("llama3", {"use_rslora": True}), "DoRA": ("llama3", {"use_dora": True}),
         "DoRA, the other way round": ("gpt2", {"use_dora": True}), "an embedding too": (
             "llama3", {"targets": ["q_proj", "embed_tokens"], "std": 0.5}),
         "ranks that differ": ("llama3", {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"k_proj": 3}})}


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_adapter_does_is_in_the_merged_model(kind, tmp_path):
    name, config = KINDS[kind]
    adapter = adapt(tmp_path, tiny.make(tmp_path/"base", name), **config)
    found = merged(adapter, tmp_path/"merged")
    assert found["way"] == "tensor by tensor"
    assert found["adapter_effect"] > 1e-2, "the adapter does nothing, and so the test shows nothing"
    assert found["max_abs_logit_difference"] <= found["tolerance"] <= 0.01 * found["adapter_effect"]
    assert found["same_top_token"] == 1
    whole = load_model(ModelSpec(name=str(tmp_path/"merged")), PLAN, "float32")
    assert not hasattr(whole.model, "peft_config") and not (tmp_path/"merged"/"adapter_config.json").exists()


@pytest.mark.parametrize("kind", ["phi3", "gpt2", "llama3", "chatml", "gemma2"])
def test_a_model_trained_in_four_bits_is_met_exactly_by_its_dequantised_merge(kind, tmp_path):
    adapter = adapt(tmp_path, tiny.make(tmp_path/"base", kind), quantize="4bit")
    found = merged(adapter, tmp_path/"merged", into="dequantized")
    assert found["max_abs_logit_difference"] < 1e-4 * found["adapter_effect"]
    assert "quantization_config" not in read_json(tmp_path/"merged"/"config.json")


def test_into_sixteen_bits_it_differs_by_what_quantisation_does_and_says_so(base, tmp_path):
    found = merged(adapt(tmp_path, base, quantize="4bit"), tmp_path/"merged")
    assert found["difference_to_16bit_base"] <= found["tolerance"]
    assert 0.1 * found["quantisation_effect"] < found["max_abs_logit_difference"] < 10 * found["quantisation_effect"]
    assert 0 < found["kl"] <= found["tolerance_kl"]


@pytest.mark.parametrize("family", ["T5", "BERT", "GPT-2"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_family_computes_in_fp32_while_its_weights_have_sixteen_bits(family, dtype, tmp_path):
    kind, task = {"T5": ("t5", "SEQ_2_SEQ_LM"), "BERT": ("bert_cls", "SEQ_CLS"), "GPT-2": ("gpt2", "CAUSAL_LM")}[family]
    adapter = adapt(tmp_path, tiny.make(tmp_path/"base", kind), task=task)
    found = merged(adapter, tmp_path/"merged", dtype)
    assert found["max_abs_logit_difference"] <= found["tolerance"] <= found["adapter_effect"] / 2


def test_a_classifier_whose_base_had_no_head_keeps_its_classes(tmp_path):
    "The head comes with the adapter, and the names of its classes beside it"
    tiny.make(tmp_path/"whole", "bert_cls")
    whole = load_model(ModelSpec(name=str(tmp_path/"whole")), PLAN, "float32")
    save_model(whole.model.bert, whole.tokenizer, tmp_path/"base")
    adapter = adapt(tmp_path, tmp_path/"base", labels=4, task="SEQ_CLS")
    write_json(adapter/"classes.json", {"names": ["red", "green", "blue", "none"], "tasks": {"": 4}})
    found = merged(adapter, tmp_path/"merged")
    assert found["max_abs_logit_difference"] <= found["tolerance"]
    config = read_json(tmp_path/"merged"/"config.json")
    assert config["id2label"]["2"] == "blue" and config["architectures"] == ["BertForSequenceClassification"]
    assert load_model(ModelSpec(name=str(tmp_path/"merged")), PLAN, "float32").model.classifier.weight.shape[0] == 4


OTHERS = {  # class, a tokenizer that will do, PEFT's task, and the configuration
    "Marian": ("MarianMTModel", "t5", "SEQ_2_SEQ_LM", dict(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, bos_token_id=None)),
    "RoBERTa": ("RobertaForSequenceClassification", "bert_cls", "SEQ_CLS", tiny.SMALL | dict(num_labels=3, pad_token_id=0)),
    "Qwen3": ("Qwen3ForCausalLM", "chatml", "CAUSAL_LM", tiny.GROUPED)}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_are_merged_tensor_by_tensor(name, tmp_path):
    import transformers
    made, kind, task, config = OTHERS[name]
    tokenizer, model_class = tiny.tokenizer_of(kind), getattr(transformers, made)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(vocab_size=len(tokenizer), **config))
    if name == "Marian": model.final_logits_bias.normal_()  # no parameter, and part of the model all the same
    save_model(model, tokenizer, tmp_path/"base")
    found = merged(adapt(tmp_path, tmp_path/"base", task=task), tmp_path/"merged")
    assert found["way"] == "tensor by tensor" and found["adapter_effect"] > 1e-3
    assert found["max_abs_logit_difference"] <= found["tolerance"] <= 0.01 * found["adapter_effect"]


MIXTRAL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
               num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=512)


def mixtral(folder):
    "A tiny mixture of experts, saved as the hub has it: a tensor an expert"
    from transformers import MixtralConfig, MixtralForCausalLM
    tokenizer = tiny.tokenizer_of("chatml")
    torch.manual_seed(0)
    save_model(MixtralForCausalLM(MixtralConfig(vocab_size=len(tokenizer), **MIXTRAL)), tokenizer, folder)
    return folder


def test_experts_that_are_one_block_in_the_model_and_many_tensors_in_the_file_are_merged_in_memory(tmp_path, capsys):
    adapter = adapt(tmp_path, mixtral(tmp_path/"base"), parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
                    targets=["q_proj"])
    found = merged(adapter, tmp_path/"merged")
    assert found["way"] == "in memory" and "is not one tensor" in capsys.readouterr().out
    assert found["adapter_effect"] > 1e-2 and found["max_abs_logit_difference"] <= found["tolerance"]


def test_attention_beside_experts_is_merged_tensor_by_tensor(tmp_path):
    adapter = adapt(tmp_path, mixtral(tmp_path/"base"), targets=["q_proj", "v_proj"])
    found = merged(adapter, tmp_path/"merged")
    assert found["way"] == "tensor by tensor" and found["max_abs_logit_difference"] <= found["tolerance"]
    assert set(shards.tensor_files(tmp_path/"merged")) == set(shards.tensor_files(tmp_path/"base")), "names as the hub has them"


@pytest.mark.parametrize("dtype, std", [("float32", 0.05), ("float32", 1e-4), ("float32", 1e-5), ("float16", 1e-3), ("bfloat16", 1e-3),
                                        ("bfloat16", 0.05)])
def test_a_forgotten_adapter_is_noticed_however_little_it_does(dtype, std, base, tmp_path):
    "The base alone stands in for the merged model: below a tolerance of 1e-3, and as small as it may be"
    trial = Trial(adapt(tmp_path, base, std), dtype)
    before, alone = trial.trained
    assert 0 < (before - alone).abs().max() < 20 * std
    with pytest.raises(DistillError, match="as if the adapter had been forgotten"): trial.prove(base)


@pytest.mark.parametrize("std", [1e-3, 1e-5])
def test_a_faithful_merge_passes_however_little_the_adapter_does(std, base, tmp_path):
    found = merged(adapt(tmp_path, base, std), tmp_path/"merged")
    assert found["max_abs_logit_difference"] < found["adapter_effect"] / 10


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_are_allowed_their_rounding_and_no_more(dtype, base, tmp_path):
    found = merged(adapt(tmp_path, base), tmp_path/"merged", dtype)
    assert 1e-6 < found["max_abs_logit_difference"] <= found["tolerance"] <= found["adapter_effect"] / 2


def test_an_adapter_too_small_for_the_format_is_not_lost_without_a_word(tmp_path, base):
    "bfloat16 rounds it away: the merged weights are the base's"
    with pytest.raises(DistillError, match="bfloat16 rounds .* dtype: float32"):
        merged(adapt(tmp_path, base, std=1e-5), tmp_path/"merged", "bfloat16")


def rewrite(folder, change):
    "Change the tensors of a merged model"
    from safetensors.torch import load_file, save_file
    tensors = load_file(folder/"model.safetensors")
    save_file(change(tensors), folder/"model.safetensors", {"format": "pt"})


def wrong_sum(factor=1.0, turned=None):
    "A mistake in the merge itself: every delta times a factor, or one matrix with its delta turned"
    def delta(layer, weight):
        added = shards.plain_lora(layer)
        if turned and added.shape[0] == added.shape[1] and not turned.get("done"):
            turned["done"], added = True, added.T
        return weight + factor * added
    return delta


@pytest.mark.parametrize("into, quantize", [("16bit", None), ("16bit", "4bit"), ("dequantized", "4bit")])
@pytest.mark.parametrize("mistake", ["forgotten", "added twice", "one matrix turned"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_sum_is_found_in_the_matrices(dtype, mistake, into, quantize, base, tmp_path, monkeypatch):
    adapter = adapt(tmp_path, base, quantize=quantize)
    wrong = {"forgotten": wrong_sum(0.0), "added twice": wrong_sum(2.0), "one matrix turned": wrong_sum(turned={"done": False})}
    monkeypatch.setattr(shards, "merged_weight", wrong[mistake])
    with pytest.raises(DistillError, match="is not the sum of its base and its adapter"):
        Trial(adapter, dtype).write(tmp_path/"merged", into)


@pytest.mark.parametrize("into, quantize", [("16bit", None), ("16bit", "4bit"), ("dequantized", "4bit")])
@pytest.mark.parametrize("mistake", ["forgotten", "added twice", "one matrix turned"])
def test_a_wrong_sum_is_found_in_the_logits_too(mistake, into, quantize, base, tmp_path, monkeypatch):
    "Were the look at the matrices as wrong as the merge"
    adapter = adapt(tmp_path, base, quantize=quantize)
    wrong = {"forgotten": wrong_sum(0.0), "added twice": wrong_sum(2.0), "one matrix turned": wrong_sum(turned={"done": False})}
    monkeypatch.setattr(shards, "merged_weight", wrong[mistake])
    monkeypatch.setattr(merge, "check_merged", lambda *a: {})
    with pytest.raises(DistillError, match="not faithful"): merged(adapter, tmp_path/"merged", into=into)


def test_half_an_adapter_is_noticed(base, tmp_path):
    "All that it does to one of the layers is missing"
    from safetensors.torch import load_file
    def spoil(folder):
        whole = {n: t for n, t in load_file(base/"model.safetensors").items() if ".layers.1." in n}
        rewrite(folder, lambda tensors: tensors | whole)
    with pytest.raises(DistillError, match="not faithful"): merged(adapt(tmp_path, base), tmp_path/"merged", spoil=spoil)


def test_a_merge_into_another_base_is_noticed(base, tmp_path):
    other = tiny.make(tmp_path/"other", "chatml", seed=1, tie_word_embeddings=False)
    adapter = adapt(tmp_path, base)
    trial = Trial(adapter)
    write_json(adapter/"base.json", {"name": str(other)})
    Trial(adapter).write(tmp_path/"merged")
    with pytest.raises(DistillError, match="not faithful"): trial.prove(tmp_path/"merged")


def test_a_merge_whose_sums_are_right_may_still_be_too_far_from_what_was_trained():
    "Quantisation does little to the base, the adapter does little, and the merged model is another one"
    torch.manual_seed(0)
    base4, there = torch.randn(8, 50), torch.randn(8, 50)
    trained, base16, merged16 = base4 + 0.05 * torch.randn(8, 50), base4 + 0.05 * torch.randn(8, 50), there
    with pytest.raises(DistillError, match="too far .* into: dequantized"):
        merge.prove(merged16, (trained, base4), (merged16, base16), "float32", 1e-3)


def test_the_better_of_both_merges_is_kept_and_named(base, tmp_path, capsys):
    wrote = []
    def attempt(into):
        wrote.append(into)
        return {"kl": {"16bit": nearness[0], "dequantized": nearness[1]}[into]}
    nearness = 0.2, 0.1
    assert merge.try_merges(["16bit", "dequantized"], attempt)[0] == "dequantized" and wrote == ["16bit", "dequantized"]
    nearness = 0.1, 0.2
    assert merge.try_merges(["16bit", "dequantized"], attempt)[0] == "16bit"
    assert wrote[2:] == ["16bit", "dequantized", "16bit"], "the one that is kept is the one that is on the disk"
    assert "into: 16bit is nearer" in capsys.readouterr().out


def test_a_merge_that_fails_leaves_the_other_and_is_told(base, tmp_path):
    def attempt(into):
        if into == "16bit": raise DistillError("too far")
        return {"kl": 0.0}
    best, _, known = merge.try_merges(["16bit", "dequantized"], attempt)
    assert best == "dequantized" and known["16bit"] == {"failed": "too far"}
    with pytest.raises(DistillError, match="too far"): merge.try_merges(["16bit"], attempt)


@pytest.mark.parametrize("quantize, into, expected", [
    (None, "auto", ["16bit"]), (None, "16bit", ["16bit"]), (None, "dequantized", "was not trained on a base in 4 bits"),
    ("4bit", "auto", ["16bit", "dequantized"]), ("4bit", "16bit", ["16bit"]), ("4bit", "dequantized", ["dequantized"])])
def test_what_an_adapter_may_be_added_to(quantize, into, expected, base, tmp_path):
    source = merge.open_source(ModelSpec(name=str(adapt(tmp_path, base, quantize=quantize))), tmp_path/"cut")
    if isinstance(expected, list): assert merge.choices(source, into) == expected
    else:
        with pytest.raises(DistillError, match=expected): merge.choices(source, into)


def test_a_base_that_is_stored_in_four_bits_is_unpacked_tensor_by_tensor(base, tmp_path):
    "As the hub has them: a packed weight and how to unpack it"
    packed = load_model(ModelSpec(name=str(base), quantize="4bit"), PLAN, "float32")
    save_model(packed.model, packed.tokenizer, tmp_path/"packed")
    assert any(n.endswith("quant_state.bitsandbytes__nf4") for n in shards.tensor_files(tmp_path/"packed"))
    adapter = adapt(tmp_path, base, quantize="4bit")
    write_json(adapter/"base.json", {"name": str(tmp_path/"packed")})
    source = merge.open_source(ModelSpec(name=str(adapter)), tmp_path/"cut")
    assert merge.choices(source, "auto") == ["dequantized"]
    with pytest.raises(DistillError, match="hold 4-bit weights only"): merge.choices(source, "16bit")
    found = merged(adapter, tmp_path/"merged", into="dequantized")
    assert found["max_abs_logit_difference"] < 1e-4 * found["adapter_effect"]


def test_a_student_that_was_cut_out_of_a_model_is_merged(base, tmp_path):
    from distill_nb.models import shrink
    small = load_model(ModelSpec(name=str(base)), PLAN, "float32")
    save_model(shrink(small.model, [1]), small.tokenizer, tmp_path/"small")
    adapter = adapt(tmp_path, tmp_path/"small")
    write_json(adapter/"base.json", {"name": str(base), "layers": [1]})
    found = merged(adapter, tmp_path/"merged")
    assert found["max_abs_logit_difference"] <= found["tolerance"]
    assert read_json(tmp_path/"merged"/"config.json")["num_hidden_layers"] == 1


def test_a_student_that_was_made_thinner_is_merged(base, tmp_path):
    from distill_nb.models import write_cut
    thin = ModelSpec(name=str(base), feed_forward=16)
    adapter = adapt(tmp_path, write_cut(thin, tmp_path/"thin"))
    write_json(adapter/"base.json", thin.model_dump())
    merged(adapter, tmp_path/"merged")
    assert read_json(tmp_path/"merged"/"config.json")["intermediate_size"] == 16


def test_an_adapter_without_any_effect_is_said(base, tmp_path, capsys):
    "A fresh LoRA is zero: there is nothing to lose, and nothing was learnt"
    found = merged(adapt(tmp_path, base, std=0), tmp_path/"merged")
    assert found["adapter_effect"] == 0 and found["max_abs_logit_difference"] == 0
    assert "the adapter has no effect" in capsys.readouterr().out
    assert "has no effect" in merge.model_card(ModelSpec(name="base"), found, 1, "float32")


@pytest.mark.parametrize("target, kept", [("lm_head", "embed_tokens"), ("embed_tokens", "lm_head")])
def test_an_adapter_on_a_tied_head_or_embedding_changes_that_one_only(target, kept, tmp_path):
    "They were one matrix, and are two afterwards"
    tiny.make(tmp_path/"base", "chatml")
    assert read_json(tmp_path/"base"/"config.json")["tie_word_embeddings"]
    found = merged(adapt(tmp_path, tmp_path/"base", targets=["q_proj", target]), tmp_path/"merged")
    assert found["max_abs_logit_difference"] <= found["tolerance"] < found["adapter_effect"] / 2
    assert not read_json(tmp_path/"merged"/"config.json")["tie_word_embeddings"]
    before, after = (load_model(ModelSpec(name=str(tmp_path/n)), PLAN, "float32").model.state_dict() for n in ("base", "merged"))
    assert [torch.equal(before[n], after[n]) for n in before if n.endswith(f"{kept}.weight")] == [True]


def test_four_bits_are_never_merged_into(base, tmp_path):
    with pytest.raises(DistillError, match="quantize: .* 16 or 32 bits"):
        check(merge.MergeParams, {"adapter": {"name": str(base), "quantize": "4bit"}}, "here")


def change_adapter(adapter, change):
    "Change the tensors of an adapter"
    from safetensors.torch import load_file, save_file
    tensors = load_file(adapter/"adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter/"adapter_model.safetensors")


def test_an_adapter_with_nan_is_not_merged(base, tmp_path):
    adapter = adapt(tmp_path, base)
    change_adapter(adapter, lambda t: next(w for n, w in t.items() if "lora_B" in n).fill_(float("nan")))
    with pytest.raises(DistillError, match="lora_B.* holds NaN"): merge.open_source(ModelSpec(name=str(adapter)), tmp_path/"cut")


@pytest.mark.parametrize("config, why", [(dict(hidden_size=64), "does not fit this model"), (dict(num_hidden_layers=1), "no place for")])
def test_an_adapter_of_another_model_is_refused_before_anything_is_computed(config, why, base, tmp_path):
    adapter = adapt(tmp_path, base)
    tiny.make(tmp_path/"other", "chatml", tie_word_embeddings=False, **config)
    write_json(adapter/"base.json", {"name": str(tmp_path/"other")})
    source = merge.open_source(ModelSpec(name=str(adapter)), tmp_path/"cut")
    with pytest.raises(DistillError, match=why): merge.hollow_source(source, PLAN, "float32", "16bit")


def test_a_base_that_is_cut_off_is_named(base, tmp_path):
    adapter = adapt(tmp_path, base)
    whole = (base/"model.safetensors").read_bytes()
    (base/"model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(DistillError, match="model.safetensors: is cut off"):
        merge.hollow_source(merge.open_source(ModelSpec(name=str(adapter)), tmp_path/"cut"), PLAN, "float32", "16bit")


def test_a_base_with_nan_is_named(base, tmp_path):
    adapter = adapt(tmp_path, base)
    rewrite(base, lambda t: t | {"model.norm.weight": t["model.norm.weight"] * float("nan")})
    with pytest.raises(DistillError, match="model.norm.weight: holds NaN"):
        merge.write_merged(merge.open_source(ModelSpec(name=str(adapter)), tmp_path/"cut"), tmp_path/"m", PLAN, "float32", "16bit", 10**9)


def test_a_number_that_sixteen_bits_cannot_hold_is_no_infinity_in_the_file(base, tmp_path):
    adapter = adapt(tmp_path, base)
    rewrite(base, lambda t: t | {"model.norm.weight": t["model.norm.weight"] + 70000})
    source = merge.open_source(ModelSpec(name=str(adapter)), tmp_path/"cut")
    with pytest.raises(DistillError, match="model.norm.weight: .* float16 cannot hold: choose dtype: bfloat16"):
        merge.write_merged(source, tmp_path/"m", PLAN, "float16", "16bit", 10**9)


def test_a_full_disk_is_said_before_the_work_and_leaves_no_half_file(tmp_path, monkeypatch):
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(DistillError, match="are to be written, and the disk has"): shards.check_room(tmp_path/"new"/"model", 10**6)
    def full(): raise OSError(28, "No space left on device")
    with pytest.raises(DistillError, match="No space left"):
        shards.write_tensor_file(tmp_path/"x.safetensors", [shards.Planned("w", (2,), "F32", full)])
    assert list(tmp_path.iterdir()) == []


def test_a_whole_model_equals_itself(base, tmp_path):
    "A full fine-tune has no adapter that could be forgotten"
    trial = Trial(base)
    assert trial.trained[1] is None
    trial.write(tmp_path/"merged")
    found = trial.prove(tmp_path/"merged")
    assert found["max_abs_logit_difference"] == 0 and found["adapter_effect"] is None
    other = tiny.make(tmp_path/"other", "chatml", seed=1, tie_word_embeddings=False)
    with pytest.raises(DistillError, match="not faithful"): trial.prove(other)


@pytest.mark.parametrize("quantize, into", [(None, "16bit"), ("4bit", "dequantized")])
@pytest.mark.parametrize("kind", ["llama3", "chatml", "gpt2", "gemma2", "gemma3", "phi3"])
def test_a_model_that_does_not_fit_is_read_layer_by_layer_with_the_same_logits(kind, quantize, into, tmp_path, monkeypatch):
    adapter = adapt(tmp_path, tiny.make(tmp_path/"base", kind), quantize=quantize)
    trial = Trial(adapter)
    trial.write(tmp_path/"merged", into)
    whole = merge.merged_logits(tmp_path/"merged", trial.source, PLAN, "float32", 1000, trial.batches)
    monkeypatch.setattr(merge, "fits", lambda *a: False)
    monkeypatch.setattr(merge, "load_model", None)
    before, alone = trial.logits(bool(quantize))
    assert (before - trial.trained[0]).abs().max() < 1e-5 and (alone - trial.trained[1]).abs().max() < 1e-5
    after = merge.merged_logits(tmp_path/"merged", trial.source, PLAN, "float32", 1000, trial.batches)
    assert (after - whole).abs().max() < 1e-5


def test_each_weight_is_put_back_even_where_a_pass_fails(base):
    loaded = load_model(ModelSpec(name=str(base)), PLAN, "bfloat16")
    def fail(*args): raise RuntimeError("stop")
    loaded.model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"), proof.in_fp32(loaded.model): loaded.model(torch.tensor([[1, 2]]))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


def test_logits_are_kept_at_a_bounded_number_of_positions(base):
    long = [{"id": "long", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a b " * 100}], "meta": {}}]
    loaded = load_model(ModelSpec(name=str(base)), PLAN, "float32")
    def positions(rows): return proof.proof_logits(loaded.model, proof.proof_batches(loaded.tokenizer, rows, loaded.family), loaded.family).shape[0]
    assert positions(long) == proof.POSITIONS and positions(ROWS[:1]) <= proof.POSITIONS
    assert positions(long + ROWS[:1]) == positions(long) + positions(ROWS[:1])


def test_rows_that_are_too_long_to_compare_are_said(base):
    loaded = load_model(ModelSpec(name=str(base)), PLAN, "float32")
    long = [{"id": "1", "messages": [{"role": "user", "content": "x " * 9999}, {"role": "assistant", "content": "y"}], "meta": {}}]
    with pytest.raises(DistillError, match="proof: no row has an answer within 512 tokens"):
        proof.proof_batches(loaded.tokenizer, long, loaded.family)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_sixteen_bits_compute_in_fp32_and_stay_what_they_are(dtype, base):
    loaded = load_model(ModelSpec(name=str(base)), PLAN, dtype)
    batches = proof.proof_batches(loaded.tokenizer, ROWS, loaded.family)
    was = {n: p.clone() for n, p in loaded.model.named_parameters()}
    narrow = proof.proof_logits(loaded.model, batches, loaded.family)
    assert narrow.dtype == torch.float32
    assert all(p.dtype == was[n].dtype and torch.equal(p, was[n]) for n, p in loaded.model.named_parameters())
    loaded.model.float()
    assert torch.allclose(narrow, proof.proof_logits(loaded.model, batches, loaded.family), atol=1e-6)


def test_many_files_load_like_one(base, tmp_path):
    adapter = adapt(tmp_path, base)
    one, many = merged(adapter, tmp_path/"one"), merged(adapter, tmp_path/"many", shard=20_000)
    assert one["max_abs_logit_difference"] == many["max_abs_logit_difference"]
    files = sorted((tmp_path/"many").glob("*.safetensors"))
    assert len(files) > 3
    a, b = (load_model(ModelSpec(name=str(tmp_path/n)), PLAN, "float32").model.state_dict() for n in ("one", "many"))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_what_was_written_can_be_checked_and_a_changed_byte_is_found(base, tmp_path):
    merged(adapt(tmp_path, base), tmp_path/"merged")
    shards.write_sums(tmp_path/"merged")
    shards.check_sums(tmp_path/"merged")
    assert subprocess.run(["sha256sum", "-c", "--quiet", shards.SUMS], cwd=tmp_path/"merged").returncode == 0
    file = tmp_path/"merged"/"model.safetensors"
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    with pytest.raises(DistillError, match="model.safetensors is not as it was written"): shards.check_sums(tmp_path/"merged")


BIG = dict(vocab_size=8000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=16,
           num_key_value_heads=4, tie_word_embeddings=False)
LIMITED = """
    import resource, sys, torch, transformers, peft, bitsandbytes
    from pathlib import Path
    from distill_nb.share.proof import *
    from distill_nb.share.shards import *
    from distill_nb.families import FAMILIES
    from distill_nb.models import ModelSpec, model_config
    from distill_nb import merge
    def size(name): return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1])
    resource.setrlimit(resource.RLIMIT_AS, (size("VmSize") + ROOM,) * 2)
    config, family = model_config(ModelSpec(name=f"{sys.argv[1]}/base")), FAMILIES["causal"]
    def hollow(folder):
        model = hollow_model(config, family)
        return model, open_base(folder, model)
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long),
             "labels": torch.tensor([[-100, -100, 7, 8]])}
    model, base = hollow(f"{sys.argv[1]}/base")
    adapted = put_adapter(model, f"{sys.argv[1]}/adapter")
    planned, apart = plan_merge(base, adapted, "bfloat16")
    write_shards(Path(sys.argv[1])/"merged", planned, size_of("100MB"))
    kept = check_merged(base, adapted, f"{sys.argv[1]}/merged", "bfloat16")["kept"]
    before = proof_logits(adapted, [batch], family, **merge.from_disk(adapted, base, "cpu"))
    model, base = hollow(f"{sys.argv[1]}/merged")
    after = proof_logits(model, [batch], family, **merge.from_disk(model, base, "cpu"))
    print(kept, (before - after).abs().max().item(), before.abs().max().item())
    try: torch.zeros(ROOM)
    except RuntimeError: print("the limit holds")
"""


def test_a_model_is_merged_and_proved_in_a_fraction_of_its_size(tmp_path):
    "520 MB of weights in five files, merged and compared by a process that may take 150 MB more than its libraries"
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM
    from peft import LoraConfig, get_peft_model
    config = LlamaConfig(**BIG)
    with torch.device("meta"): shape = LlamaForCausalLM(config)
    (tmp_path/"base").mkdir()
    config.save_pretrained(tmp_path/"base")
    generator, drawn = torch.Generator().manual_seed(0), {}
    def draw(shape):
        if shape not in drawn: drawn[shape] = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
        return drawn[shape].clone()
    parts = {n: f"model-{1 + i % 5:05d}-of-00005.safetensors" for i, n in enumerate(shape.state_dict())}
    for file in sorted(set(parts.values())):
        tensors = {n: draw(shape.state_dict()[n].shape) for n in parts if parts[n] == file}
        save_file(tensors, tmp_path/"base"/file, {"format": "pt"})
    write_json(tmp_path/"base"/"model.safetensors.index.json", {"metadata": {}, "weight_map": parts})
    total = sum(f.stat().st_size for f in (tmp_path/"base").glob("*.safetensors"))
    assert total > 500 * 10**6
    with torch.device("meta"): adapted = get_peft_model(shape, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    made = {n.replace(".default", ""): torch.randn(p.shape, generator=generator) * 0.02 for n, p in adapted.named_parameters() if "lora_" in n}
    adapted.peft_config["default"].save_pretrained(tmp_path/"adapter")
    save_file(made, tmp_path/"adapter"/"adapter_model.safetensors")
    code = textwrap.dedent(LIMITED).replace("ROOM", str(150 * 10**6))
    # glibc keeps blocks below 32 MB for itself when they are freed: a large model's matrices are larger, these are not.
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True,
                          env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    kept, error, top = map(float, done.stdout.split("\n")[-3].split())
    assert 0.98 < kept < 1.02 and error < 0.02 * top
    assert "the limit holds" in done.stdout
    assert len(list((tmp_path/"merged").glob("*.safetensors"))) >= 5


class FakeHub:
    "A hub that remembers what it was asked"
    def __init__(self, name="me", orgs=(), repos=None, broken=None):
        self.name, self.orgs, self.repos, self.broken, self.sent = name, orgs, repos or {}, broken, []

    def whoami(self):
        if self.broken == "token": raise OSError("401 for the token hf_secret")
        return {"name": self.name, "orgs": [{"name": o} for o in self.orgs]}

    def repo_info(self, repository):
        from huggingface_hub.errors import RepositoryNotFoundError
        if repository not in self.repos:
            raise RepositoryNotFoundError("none", response=type("R", (), {"headers": {}, "request": None, "status_code": 404})())
        return type("Info", (), {"private": self.repos[repository]})()

    def create_repo(self, repository, private, exist_ok): self.sent.append(("create", repository, private))

    def upload_folder(self, repo_id, folder_path, path_in_repo, commit_message):
        if self.broken == "upload": raise OSError("hf_secret was not good enough")
        self.sent.append(("upload", repo_id, path_in_repo, sorted(p.name for p in Path(folder_path).iterdir())))


@pytest.fixture
def token(monkeypatch): monkeypatch.setenv("HF_TOKEN", "hf_secret")


@pytest.mark.parametrize("hub, private, why", [
    (FakeHub(), True, None), (FakeHub(name="you", orgs=["me"]), True, None), (FakeHub(repos={"me/model": True}), True, None),
    (FakeHub(repos={"me/model": False}), False, None), (FakeHub(name="you"), True, "the token of you may write to you"),
    (FakeHub(repos={"me/model": False}), True, "is public already: say private: false"),
    (FakeHub(broken="token"), True, "the hub does not take the token: OSError")])
def test_access_to_the_hub_is_looked_at_and_nothing_is_changed(hub, private, why, token):
    if why is None: merge.check_push("me/model", private, hub)
    else:
        with pytest.raises(DistillError, match=why) as e: merge.check_push("me/model", private, hub)
        assert "hf_secret" not in str(e.value)
    assert hub.sent == []


def test_without_a_token_nothing_is_begun(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(DistillError, match="needs a token that may write, in HF_TOKEN"): merge.check_push("me/model", True, FakeHub())
    params = merge.MergeParams(adapter="x", push_to="me/model")
    with pytest.raises(DistillError, match="push_to: .* HF_TOKEN"): params.ready()
    params.ready(keys=False)
    with pytest.raises(DistillError, match="push_to"): check(merge.MergeParams, {"adapter": "x", "push_to": "no owner"}, "here")


def test_model_and_gguf_are_sent_privately_and_a_refusal_hides_the_token(tmp_path, token):
    for file in ("model/config.json", "gguf/model-f16.gguf"):
        (tmp_path/file).parent.mkdir()
        (tmp_path/file).write_text("{}")
    hub = FakeHub()
    assert merge.push_model(tmp_path, "me/model", True, hub) == "https://huggingface.co/me/model"
    assert hub.sent == [("create", "me/model", True), ("upload", "me/model", None, ["config.json"]),
                        ("upload", "me/model", "gguf", ["model-f16.gguf"])]
    with pytest.raises(DistillError, match="the hub did not take it") as e: merge.push_model(tmp_path, "me/model", True, FakeHub(broken="upload"))
    assert "hf_secret" not in str(e.value)


def test_the_card_says_what_was_proved_and_what_the_run_knows(base, tmp_path):
    adapter = adapt(tmp_path, base)
    (tmp_path/"annotate").mkdir()
    write_json(tmp_path/"annotate"/"manifest.json", {"parameters": {"data": {"path": "questions", "license": "cc-by-4.0"}}})
    write_json(tmp_path/"annotate"/"annotate.json", {"teacher": "gpt-x", "prompt_tokens": 1200, "tokens": 3400, "cost": 0.5})
    write_json(tmp_path/"manifest.json", {"parameters": {"data": str(tmp_path/"annotate"), "epochs": 2, "lora_r": 8},
                                          "summary": {"validation loss": 1.25}})
    found = merged(adapter, tmp_path/"merged")
    source = merge.open_source(ModelSpec(name=str(adapter)), tmp_path/"cut")
    merge.finish_model(source, tmp_path/"merged", tmp_path/"model", found, 12345, "float32")
    card = (tmp_path/"model"/"README.md").read_text()
    for said in (f"{found['adapter_effect']:.2g}", f"{found['max_abs_logit_difference']:.2g}", "12,345", "gpt-x", "`questions`", "cc-by-4.0",
                 "1,200 tokens in, 3,400 out, $0.5000", "| epochs | 2 |", "| validation loss | 1.25 |", "## Limits"):
        assert said in card, said
    assert str(tmp_path) not in card
    shards.check_sums(tmp_path/"model")


@pytest.mark.parametrize("quantize, says", [("16bit", "the base's own"), ("dequantized", "what the 4-bit ones stand for")])
def test_the_card_says_into_which_weights(quantize, says, base, tmp_path):
    found = merged(adapt(tmp_path, base, quantize="4bit"), tmp_path/"merged", into=quantize)
    assert says in merge.model_card(ModelSpec(name="base", quantize="4bit"), found, 1, "float32")


def test_generation_ends_where_an_answer_ends(tmp_path):
    "Gemma's answers end with a token of their own, which no plain text ends with"
    adapter = adapt(tmp_path, tiny.make(tmp_path/"base", "gemma"))
    merged(adapter, tmp_path/"merged")
    tokenizer = tiny.tokenizer_of("gemma")
    ends = read_json(tmp_path/"merged"/"generation_config.json")["eos_token_id"]
    assert set(ends) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")}
    assert (tmp_path/"merged"/"chat_template.jinja").exists()


@pytest.mark.parametrize("name, quantize", [("mistralai/Mistral-7B-Instruct-v0.2", "4bit"), ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", None),
                                            ("google/gemma-7b", "4bit")])
def test_the_published_models_are_merged_on_a_t4_with_the_memory_that_comes_with_it(name, quantize):
    need = merge.MergeParams(adapter="x/y").estimate(plan_hardware("t4"), None, lambda spec: ModelSpec(name=name, quantize=quantize))
    assert need["peak"] < 14.7 * GiB and need["phases"]["load"]["main"] < 12.7 * GiB
    assert need["phases"]["save"]["disk"] >= 2 * need["parameters"]


def test_an_adapter_loses_no_layers(base, tmp_path):
    adapter = adapt(tmp_path, base)
    cut = ModelSpec(name=str(adapter), layers=1)
    with pytest.raises(DistillError, match="layers"): merge.MergeParams(adapter=cut).estimate(PLAN, None, lambda spec: spec)
    with pytest.raises(DistillError, match="layers"): merge.open_source(cut, tmp_path/"cut")


def test_what_is_no_adapter_is_said(tmp_path):
    with pytest.raises(DistillError, match="no adapter_config.json or config.json"): merge.find_adapter(str(tmp_path))
    shutil.rmtree(tmp_path)
    with pytest.raises(DistillError, match="no adapter_config.json or config.json"): merge.find_adapter(str(tmp_path))
