"""Models: found, told apart, cut, loaded whole or not at all, measured, and refused before anything is paid."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from conftest import environment
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from distill_nb import models
from distill_nb.core import DistillError, read_json, write_json
from distill_nb.hardware import plan_hardware
from distill_nb.memory import training_memory
from distill_nb.models import (
    check_model, count_parameters, identity, layer_lists, load_model, lora_parameters, lora_targets, meta_model, profile, shrink)
from distill_nb.stage import ModelSpec

DECODERS = ("llama3", "chatml", "gemma", "gemma2", "gemma3", "phi3", "mistral", "gpt2")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    "Profiles of tiny models do not belong into a person's cache"
    before = os.environ.get("DISTILL_NB_CACHE")
    os.environ["DISTILL_NB_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield Path(os.environ["DISTILL_NB_CACHE"])
    os.environ.pop("DISTILL_NB_CACHE") if before is None else os.environ.update(DISTILL_NB_CACHE=before)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    "A folder with a tiny model of a kind, made once; tests do not change it"
    folders = {}
    def folder(kind):
        if kind not in folders: folders[kind] = tiny.make(tmp_path_factory.mktemp("models")/kind, kind)
        return folders[kind]
    return folder


@pytest.fixture
def copied(made, tmp_path):
    "A copy of such a folder, to spoil"
    return lambda kind: Path(shutil.copytree(made(kind), tmp_path/kind))


def spec(folder, **more): return ModelSpec(name=str(folder), **more)
def load(folder, **more): return load_model(spec(folder), dtype="float32", **more)


def change_weights(folder, change):
    "Rewrite the one file of weights"
    file = folder/"model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file({k: v.contiguous() for k, v in weights.items()}, file, metadata={"format": "pt"})


def change_json(file, **values): write_json(file, read_json(file) | values)


# ---- loading: every weight, or none

@pytest.mark.parametrize("kind, family", [*((k, "causal") for k in DECODERS), ("t5", "seq2seq"), ("bert_mlm", "masked"), ("bert_cls", "classifier")])
def test_a_model_is_loaded_by_its_family_with_the_weights_of_its_file(made, kind, family):
    loaded = load(made(kind))
    assert loaded.family.name == family and loaded.quantize is None and not loaded.model.training
    stored = load_file(made(kind)/"model.safetensors")
    assert stored.keys() <= loaded.model.state_dict().keys()
    for name, weight in stored.items(): assert torch.equal(loaded.model.state_dict()[name], weight), name


@pytest.mark.parametrize("change, said", [
    (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "1 weights are not in its files: model.layers.1.mlp.up_proj.weight"),
    (lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(64, 32)}), "1 weights have no place in it: model.layers.2"),
    (lambda w: w.update({"lm_head.weight": torch.zeros(3, 32)}), "lm_head.weight"),
], ids=["missing", "unexpected", "of another shape"])
def test_a_weight_that_is_missing_or_has_no_place_is_an_error_that_names_it(copied, change, said):
    folder = copied("llama3")
    change_weights(folder, change)
    with pytest.raises(DistillError, match=said): load(folder)


def test_a_masked_model_is_not_made_a_language_model_by_its_configuration(copied):
    folder = copied("bert_mlm")
    change_json(folder/"config.json", architectures=["BertForSequenceClassification"])
    with pytest.raises(DistillError, match="as a BertForSequenceClassification, .* weights are not in its files: .*classifier.bias"): load(folder)


@pytest.mark.parametrize("kind, name, value", [
    ("bert_mlm", "bert.embeddings.position_ids", torch.arange(512)[None]),
    ("bert_mlm", "cls.seq_relationship.weight", torch.zeros(2, 32)),
    ("bert_mlm", "bert.pooler.dense.weight", torch.zeros(32, 32)),
    ("llama3", "model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(4)),
    ("gpt2", "transformer.h.0.attn.bias", torch.ones(1, 1, 512, 512)),
])
def test_what_old_files_carry_along_is_no_error(copied, kind, name, value):
    folder = copied(kind)
    change_weights(folder, lambda w: w.update({name: value}))
    load(folder)


def test_a_head_that_is_tied_to_the_embedding_need_not_be_in_the_file(made):
    assert "lm_head.weight" not in load_file(made("chatml")/"model.safetensors")
    model = load(made("chatml")).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("kind", ["bert_mlm", "bert_cls", "llama3"])
def test_a_new_head_is_random_and_the_body_is_the_files(made, kind):
    loaded = load(made(kind), labels=5)
    assert loaded.family.name == "classifier" and loaded.model.config.num_labels == 5 and loaded.model.config.pad_token_id is not None
    stored, now = load_file(made(kind)/"model.safetensors"), loaded.model.state_dict()
    body = [k for k in stored if k.startswith(loaded.model.base_model_prefix + ".")]
    assert body and all(torch.equal(now[k], stored[k]) for k in body)


def test_a_new_head_excuses_nothing_in_the_body(copied):
    folder = copied("bert_mlm")
    change_weights(folder, lambda w: w.pop("bert.encoder.layer.1.output.dense.weight"))
    with pytest.raises(DistillError, match="bert.encoder.layer.1.output.dense.weight"): load(folder, labels=3)


def test_the_pooler_of_a_classifier_is_no_leftover(copied):
    folder = copied("bert_cls")
    change_weights(folder, lambda w: w.pop("bert.pooler.dense.weight"))
    with pytest.raises(DistillError, match="1 weights are not in its files: bert.pooler.dense.weight"): load(folder)


def test_a_model_in_several_files_is_loaded_like_one(made, tmp_path):
    load(made("llama3")).model.save_pretrained(tmp_path, max_shard_size="20KB")
    shutil.copy(made("llama3")/"tokenizer.json", tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    check_model(spec(tmp_path))
    a, b = load(tmp_path).model.state_dict(), load(made("llama3")).model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_a_model_in_4_bits_has_as_many_parameters_as_in_32(made):
    packed = load_model(spec(made("llama3"), quantize="4bit"))
    assert packed.model.is_quantized and packed.quantize == "4bit"
    assert count_parameters(packed.model) == count_parameters(load(made("llama3")).model) == profile(spec(made("llama3"), quantize="4bit")).parameters


# ---- adapters

@pytest.fixture
def adapter(made, tmp_path):
    "An adapter that changes what the tiny Llama says"
    from peft import LoraConfig, get_peft_model
    base = load(made("llama3"))
    torch.manual_seed(1)
    model = get_peft_model(base.model, LoraConfig(r=2, target_modules=lora_targets(base.model), init_lora_weights=False))
    model.save_pretrained(tmp_path/"adapter")
    write_json(tmp_path/"adapter"/"base.json", {"name": str(made("llama3"))})
    return tmp_path/"adapter"


def test_an_adapter_is_loaded_on_its_base(made, adapter):
    loaded, ids = load(adapter), torch.tensor([[5, 6, 7]])
    assert loaded.family.name == "causal"
    with torch.inference_mode(), loaded.model.disable_adapter(): without = loaded.model(ids).logits
    with torch.inference_mode(): plain, adapted = load(made("llama3")).model(ids).logits, loaded.model(ids).logits
    assert torch.allclose(without, plain) and not torch.allclose(adapted, plain)


@pytest.mark.parametrize("use", [load_model, profile, check_model], ids=lambda f: f.__name__)
def test_layers_of_an_adapter_are_refused(adapter, use):
    with pytest.raises(DistillError, match="layers: an adapter belongs to all layers of its model; merge it first"): use(spec(adapter, layers=1))


# ---- GGUF, code of its own, a template of the recipe's

def write_gguf(folder, file, packed=None):
    "A tiny Qwen as llama.cpp would write it; `packed` is the format of its matrices"
    import gguf
    import numpy as np
    model, tokenizer = load(folder).model, transformers.AutoTokenizer.from_pretrained(folder)
    config, raw = model.config, json.loads(tokenizer.backend_tokenizer.to_str())
    writer = gguf.GGUFWriter(file, "qwen2")
    for name, value in dict(
            context_length=config.max_position_embeddings, embedding_length=config.hidden_size, block_count=config.num_hidden_layers,
            feed_forward_length=config.intermediate_size, head_count=config.num_attention_heads, head_count_kv=config.num_key_value_heads,
            rope_freq_base=config.rope_parameters["rope_theta"], layer_norm_rms_eps=config.rms_norm_eps, vocab_size=config.vocab_size,
            name="tiny", tokenizer_model="gpt2", tokenizer_pre="qwen2", eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, chat_template=tokenizer.chat_template).items(): getattr(writer, f"add_{name}")(value)
    special = {t["content"] for t in raw["added_tokens"]}
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in special else 1 for t in tokens])
    writer.add_token_merges([" ".join(m) for m in raw["model"]["merges"]])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight": continue  # tied
        kind = packed if packed and weight.dim() == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), gguf.quantize(weight.numpy().astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def gguf_model(made, tmp_path): return write_gguf(made("chatml"), tmp_path/"tiny.gguf")


def test_a_gguf_file_is_the_model_that_it_was_made_of(gguf_model, made):
    found, whole = load(gguf_model), load(made("chatml"))
    assert all(torch.equal(found.model.state_dict()[k], w) for k, w in whole.model.state_dict().items())
    assert found.tokenizer.chat_template == whole.tokenizer.chat_template
    assert found.tokenizer.special_tokens_map == whole.tokenizer.special_tokens_map
    text = "What is <|im_end|> ভাত\n  good?"
    assert found.tokenizer(text)["input_ids"] == whole.tokenizer(text)["input_ids"]


def test_a_gguf_file_is_planned_without_being_converted(gguf_model, made, monkeypatch):
    monkeypatch.setattr(models, "convert_gguf", lambda *_: pytest.fail("converted a model to plan it"))
    known, whole = check_model(spec(gguf_model)), profile(spec(made("chatml")))
    assert known.model_dump(exclude={"config"}) == whole.model_dump(exclude={"config"}) and identity(spec(gguf_model))["weights"].keys() == {"gguf"}


def test_a_gguf_file_is_converted_once_whatever_its_name(gguf_model, monkeypatch, tmp_path):
    first = models.locate_model(spec(gguf_model))
    monkeypatch.setattr(models, "convert_gguf", lambda *_: pytest.fail("converted again"))
    (tmp_path/"folder").mkdir()
    copy = shutil.copy(gguf_model, tmp_path/"folder"/"other.gguf")
    assert models.locate_model(spec(copy)) == models.locate_model(spec(tmp_path/"folder", file="other.gguf")) == first


def test_packed_gguf_weights_are_kept_in_16_bits(made, tmp_path):
    import gguf
    packed = gguf.GGMLQuantizationType.Q8_0
    file = write_gguf(made("chatml"), tmp_path/"packed.gguf", packed)
    kept, whole = load_file(Path(models.locate_model(spec(file))[1])/"model.safetensors"), load(made("chatml")).model.state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    exact = torch.tensor(gguf.dequantize(gguf.quantize(whole[name].numpy(), packed), packed))
    assert kept[name].dtype == torch.float16 and torch.equal(kept[name], exact.half())


def test_a_gguf_file_that_is_cut_off_is_refused_by_the_check(gguf_model):
    os.truncate(gguf_model, gguf_model.stat().st_size - 2000)
    with pytest.raises(DistillError, match="tiny.gguf: is cut off, damaged or no GGUF file"): check_model(spec(gguf_model))


@pytest.mark.parametrize("disk, memory, said", [(1000, 10**9, "GiB of disk at .*DISTILL_NB_CACHE"), (10**9, 1000, "GiB of main memory")])
def test_a_conversion_that_would_not_fit_is_refused_before_it_begins(gguf_model, monkeypatch, disk, memory, said):
    import psutil
    from types import SimpleNamespace
    monkeypatch.setenv("DISTILL_NB_CACHE", str(gguf_model.parent/"empty"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=disk))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=memory))
    with pytest.raises(DistillError, match=said): check_model(spec(gguf_model))


def test_a_conversion_that_fails_leaves_nothing_behind(gguf_model, monkeypatch):
    monkeypatch.setenv("DISTILL_NB_CACHE", str(gguf_model.parent/"cache"))
    monkeypatch.setattr(models, "save_model", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DistillError, match="tiny.gguf: could not be converted in .*No space left"): models.locate_model(spec(gguf_model))
    assert [f.suffix for f in (gguf_model.parent/"cache"/"models").iterdir()] == [".lock"]


@pytest.mark.parametrize("more, said", [({}, "a folder without a model.*is it `file: tiny.gguf`"), ({"file": "tini.gguf"}, "did you mean 'tiny.gguf'")])
def test_a_folder_with_gguf_files_says_what_to_write(gguf_model, more, said):
    with pytest.raises(DistillError, match=said): check_model(spec(gguf_model.parent, **more))


CODE = """
import builtins
from transformers import LlamaConfig, LlamaForCausalLM

builtins.code_of_a_model_ran = True

class MyConfig(LlamaConfig): model_type = "mine"
class MyForCausalLM(LlamaForCausalLM): config_class = MyConfig
"""


@pytest.fixture
def with_code(copied):
    "A model that transformers does not know, with the code that it needs"
    import builtins
    folder = copied("llama3")
    (folder/"my.py").write_text(CODE)
    change_json(folder/"config.json", model_type="mine", architectures=["MyForCausalLM"],
                auto_map={"AutoConfig": "my.MyConfig", "AutoModelForCausalLM": "my.MyForCausalLM"})
    builtins.__dict__.pop("code_of_a_model_ran", None)
    yield folder
    builtins.__dict__.pop("code_of_a_model_ran", None)


@pytest.mark.parametrize("use", [check_model, profile, load_model], ids=lambda f: f.__name__)
def test_code_of_a_model_is_not_run_unasked(with_code, use):
    import builtins
    with pytest.raises(DistillError, match="works only with the Python code that comes with it.*`trust_remote_code: true`"): use(spec(with_code))
    assert not hasattr(builtins, "code_of_a_model_ran")


def test_code_of_a_model_runs_where_the_recipe_says_so_and_the_log_says_so_too(with_code, capsys):
    trusted = spec(with_code, trust_remote_code=True, layers=1)
    assert check_model(trusted).parameters == count_parameters(load_model(trusted, dtype="float32").model)
    assert "Python code that comes with it may run" in capsys.readouterr().out


def test_an_adapter_cannot_ask_for_code_of_its_base(adapter, with_code):
    write_json(adapter/"base.json", {"name": str(with_code), "trust_remote_code": True})
    with pytest.raises(DistillError, match="works only with the Python code"): load(adapter)


def test_code_and_template_are_part_of_what_a_model_is_where_they_are_set(with_code):
    plain = identity(spec(with_code))
    asked = identity(spec(with_code, trust_remote_code=True, template="qa"))
    assert plain.keys() == {"weights", "layers", "base", "quantize"} and asked["trust_remote_code"] and "Q: " in asked["template"]
    (with_code/"my.py").write_text(CODE + "# another")
    assert identity(spec(with_code)) == plain and identity(spec(with_code, trust_remote_code=True, template="qa")) != asked


def test_the_recipes_template_is_seen_by_everybody_and_goes_with_the_adapter(made, adapter):
    qa = spec(made("mistral"), template="qa")
    assert "system" not in profile(spec(made("mistral"))).roles and "system" in profile(qa).roles
    tokenizer = load_model(qa, dtype="float32").tokenizer
    assert tokenizer.chat_template == models.load_tokenizer(qa).chat_template != models.load_tokenizer(spec(made("mistral"))).chat_template
    assert models.load_tokenizer(spec(adapter, template="qa")).chat_template.endswith(models.QA_TEMPLATE)
    load_model(spec(made("llama3"), template="qa")).tokenizer.save_pretrained(adapter)
    assert models.load_tokenizer(spec(adapter)).chat_template.endswith(models.QA_TEMPLATE)


@pytest.mark.parametrize("use", [check_model, profile, load_model], ids=lambda f: f.__name__)
def test_a_wrong_template_is_refused_by_the_check(made, use):
    with pytest.raises(DistillError, match="template: line 1"): use(spec(made("llama3"), template="{% for %}"))


def test_weights_that_lie_in_4_bits_are_loaded_as_they_lie(made, tmp_path):
    packed = load_model(spec(made("mistral"), quantize="4bit"))
    models.save_model(packed.model, packed.tokenizer, tmp_path/"packed")
    again, ids = load_model(spec(tmp_path/"packed")), torch.arange(5, 25)[None]
    assert again.quantize == check_model(spec(tmp_path/"packed")).quantize == "4bit"
    assert torch.equal(again.model(ids).logits, packed.model(ids).logits)


def test_weights_that_lie_in_4_bits_are_multiplied_in_the_machines_format(made, tmp_path):
    from distill_nb.hardware import plan_hardware
    plan = plan_hardware()
    packed = load_model(spec(made("mistral"), quantize="4bit"))
    models.save_model(packed.model, packed.tokenizer, tmp_path/"packed")
    change_json(tmp_path/"packed"/"config.json", quantization_config=read_json(tmp_path/"packed"/"config.json")["quantization_config"]
                | {"bnb_4bit_compute_dtype": "float16"})
    layer = load_model(spec(tmp_path/"packed")).model.model.layers[0].mlp.up_proj
    assert layer.compute_dtype == getattr(torch, plan.dtype) != torch.float16


# ---- tokenizers that lack something

def test_a_model_without_a_chat_template_and_a_padding_token_gets_both(made):
    assert not transformers.AutoTokenizer.from_pretrained(made("gpt2")).chat_template
    tokenizer = load(made("gpt2")).tokenizer
    assert tokenizer.pad_token == tokenizer.eos_token and "<|assistant|>" in tokenizer.chat_template
    assert profile(spec(made("gpt2"))).roles == profile(spec(made("bert_mlm"))).roles == ["user", "assistant", "system"]


# ---- what tells one model from another

@pytest.mark.parametrize("given, known", [
    (dict(name="smollm2-135m-instruct"), {"weights": "smollm2-135m-instruct 0.1.2", "layers": None, "base": [], "quantize": None}),
    (dict(name="smollm2-135m-instruct", layers=22, quantize="4bit"),
     {"weights": "smollm2-135m-instruct 0.1.2", "layers": 22, "base": [], "quantize": "4bit"}),
    (dict(name="Qwen/Qwen2-0.5B"), {"weights": "Qwen/Qwen2-0.5B@None", "layers": None, "base": [], "quantize": None}),
    (dict(name="Qwen/Qwen2-0.5B", revision="abc", layers=[0, 3]), {"weights": "Qwen/Qwen2-0.5B@abc", "layers": [0, 3], "base": [], "quantize": None}),
])
def test_shipped_and_hub_models_are_known_by_the_names_that_old_journals_hold(monkeypatch, given, known):
    monkeypatch.setattr(models, "packaged_model", lambda name: pytest.fail("converted a model to name it"))
    assert identity(ModelSpec(**given)) == known


def rename(folder): return folder.rename(folder.with_name("elsewhere"))
def add_readme(folder): (folder/"README.md").write_text("# A model")
def touch(folder): [os.utime(f, (1, 1)) for f in folder.iterdir()]
def say_where_from(folder): change_json(folder/"config.json", _name_or_path="somewhere", transformers_version="9.9")


@pytest.mark.parametrize("change", [rename, add_readme, touch, say_where_from], ids=lambda f: f.__name__)
def test_a_folder_is_the_same_model_whatever_lies_around_its_content(copied, change):
    folder = copied("llama3")
    before = identity(spec(folder))
    assert identity(spec(change(folder) or folder)) == before


def new_weight(folder): change_weights(folder, lambda w: w["lm_head.weight"].add_(1e-3))
def new_window(folder): change_json(folder/"config.json", rms_norm_eps=1e-3)
def new_template(folder): (folder/"chat_template.jinja").write_text("{{ messages }}")
def new_stop(folder): change_json(folder/"generation_config.json", eos_token_id=0)
def new_tokenizer(folder): change_json(folder/"tokenizer_config.json", padding_side="right", model_max_length=7)


@pytest.mark.parametrize("change", [new_weight, new_window, new_template, new_stop, new_tokenizer], ids=lambda f: f.__name__)
def test_a_folder_is_another_model_when_its_answers_may_differ(copied, change):
    folder = copied("llama3")
    before = identity(spec(folder))
    change(folder)
    assert identity(spec(folder)) != before


def test_an_adapter_is_known_with_its_base_and_without_any_path(adapter, made, tmp_path):
    before = identity(spec(adapter))
    assert before["base"] == [identity(spec(made("llama3")))] and str(tmp_path) not in json.dumps(before)
    moved = shutil.copytree(made("llama3"), tmp_path/"moved")
    write_json(adapter/"base.json", {"name": str(moved)})
    assert identity(spec(adapter)) == before
    new_weight(moved)
    assert identity(spec(adapter)) != before


# ---- cutting layers

SMALL = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_attention_heads=4)
WINDOWED = SMALL | dict(num_key_value_heads=2, sliding_window=4, head_dim=8)
QWEN = SMALL | dict(num_key_value_heads=2, sliding_window=4, use_sliding_window=True)
KINDS_OF_LAYER = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
T5 = dict(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_heads=4, decoder_start_token_id=0)
BART = dict(vocab_size=60, d_model=32, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
            pad_token_id=0, decoder_start_token_id=0, forced_eos_token_id=None)


def six(name=None, **lists): return dict(num_hidden_layers=6) | lists


# class, configuration of six layers, the layers kept, the configuration that a person would write for those, stacks of layers
CUTS = {
    "llama": ("LlamaForCausalLM", SMALL | six(), [0, 2, 5], SMALL | dict(num_hidden_layers=3), ["model.layers"]),
    "gpt2": ("GPT2LMHeadModel", dict(vocab_size=60, n_embd=32, n_head=4, n_layer=6), [1, 4], dict(vocab_size=60, n_embd=32, n_head=4, n_layer=2),
             ["transformer.h"]),
    "gemma2": ("Gemma2ForCausalLM", WINDOWED | six(layer_types=KINDS_OF_LAYER), [0, 2, 4],
               WINDOWED | dict(num_hidden_layers=3, layer_types=["sliding_attention", "sliding_attention", "full_attention"]), ["model.layers"]),
    "gemma3": ("Gemma3ForCausalLM", WINDOWED | six(layer_types=KINDS_OF_LAYER), [1, 2, 5],
               WINDOWED | dict(num_hidden_layers=3, layer_types=["full_attention", "sliding_attention", "sliding_attention"]), ["model.layers"]),
    "qwen2": ("Qwen2ForCausalLM", QWEN | six(layer_types=KINDS_OF_LAYER), [0, 2, 3, 5],
              QWEN | dict(num_hidden_layers=4, layer_types=["sliding_attention"] * 4), ["model.layers"]),
    "smollm3": ("SmolLM3ForCausalLM", SMALL | six(num_key_value_heads=2, no_rope_layers=[1, 1, 0, 1, 0, 1], pad_token_id=0), [1, 2, 4],
                SMALL | dict(num_hidden_layers=3, num_key_value_heads=2, no_rope_layers=[1, 0, 0], pad_token_id=0), ["model.layers"]),
    "qwen2_moe": ("Qwen2MoeForCausalLM", SMALL | six(num_key_value_heads=2, num_experts=4, moe_intermediate_size=16,
                                                     shared_expert_intermediate_size=16, mlp_only_layers=[0, 2, 3]), [0, 1, 3],
                  SMALL | dict(num_hidden_layers=3, num_key_value_heads=2, num_experts=4, moe_intermediate_size=16,
                               shared_expert_intermediate_size=16, mlp_only_layers=[0, 2]), ["model.layers"]),
    "bert": ("BertForMaskedLM", SMALL | six(), [0, 3], SMALL | dict(num_hidden_layers=2), ["bert.encoder.layer"]),
    "t5": ("T5ForConditionalGeneration", T5 | dict(num_layers=6, num_decoder_layers=5), [0, 2, 4], T5 | dict(num_layers=3, num_decoder_layers=3),
           ["encoder.block", "decoder.block"]),
    "bart": ("BartForConditionalGeneration", BART | dict(encoder_layers=6, decoder_layers=4), [1, 3], BART | dict(encoder_layers=2, decoder_layers=2),
             ["model.encoder.layers", "model.decoder.layers"]),
    "marian": ("MarianMTModel", BART | dict(encoder_layers=6, decoder_layers=4), [1, 3], BART | dict(encoder_layers=2, decoder_layers=2),
               ["model.encoder.layers", "model.decoder.layers"]),
}


def build(name, settings, seed=0):
    cls = getattr(transformers, name)
    torch.manual_seed(seed)
    model = cls(cls.config_class(**settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(torch.randn_like(p) * 0.2)  # so that each layer has much to say
    return model


def by_hand(model, name, settings, kept, stacks):
    "A smaller model with the weights of the layers that were kept, named anew"
    small, weights = build(name, settings, seed=1), {}
    for key, value in model.state_dict().items():
        stack = next((s for s in stacks if key.startswith(s + ".")), None)
        if stack is None: weights[key] = value
        else:
            number, _, rest = key.removeprefix(stack + ".").partition(".")
            if int(number) in kept: weights[f"{stack}.{kept.index(int(number))}.{rest}"] = value
    small.load_state_dict(weights)
    return small


def says(model):
    "Logits for a text longer than the windows, and what the model writes with a cache"
    ids = torch.arange(24).reshape(2, 12) * 7 % 59 + 1
    kind = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        logits = model(input_ids=ids, **kind).logits
        if not model.can_generate() or "Masked" in type(model).__name__: return logits, None
        return logits, model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False)


@pytest.mark.parametrize("kind", CUTS)
def test_a_shrunk_model_is_the_smaller_one_built_by_hand(kind, tmp_path):
    name, whole, kept, part, stacks = CUTS[kind]
    model = build(name, whole)
    assert [s.path for s in layer_lists(model)] == stacks
    expected = by_hand(model, name, part, kept, stacks)
    before, wanted = says(model)[0], says(expected)
    shrink(model, kept)
    for found in (model, type(model).from_pretrained(model.save_pretrained(tmp_path) or tmp_path)):
        logits, written = says(found)
        assert torch.allclose(logits, wanted[0], atol=1e-5)
        assert written is None or torch.equal(written, wanted[1])
    assert not torch.allclose(before, wanted[0], atol=1e-3)


@pytest.mark.parametrize("kind, layers, said", [
    ("t5", [1, 2], "layer 0 of encoder.block .*relative_attention_bias"),
    ("modernbert", [1, 2], "layer 0 of model.layers .*attn_norm"),
    ("qwen2_moe", [1, 2], "decoder_sparse_step|mlp"),
    ("llama", 9, "layers: 9: the model has 6"),
    ("llama", [2, 1], "ascending"),
    ("t5", 6, "layers: 6: the model has 5"),
])
def test_a_cut_that_would_make_another_model_is_refused(kind, layers, said):
    settings = {"t5": T5 | dict(num_layers=6, num_decoder_layers=5), "modernbert": SMALL | six(pad_token_id=0),
                "qwen2_moe": SMALL | six(num_experts=4, moe_intermediate_size=16, decoder_sparse_step=2), "llama": SMALL | six()}[kind]
    with pytest.raises(DistillError, match=said): shrink(meta_model(AutoConfig.for_model(kind, **settings)), layers)


# ---- cutting units

def without_units(model, kept):
    "Let a whole model answer as if it had only some of its units"
    def silence(units):
        mask = torch.zeros(48).index_fill(0, units, 1.0)
        return lambda _, given: (given[0] * mask,)
    for name, part in models.feed_forwards(model).items(): part.out.register_forward_pre_hook(silence(kept[name]))
    return model


THIN = {k: CUTS[k] for k in ("llama", "gemma2", "bert", "t5", "bart", "marian")} | {
    "gpt2": ("GPT2LMHeadModel", dict(vocab_size=60, n_embd=32, n_head=4, n_layer=2, n_inner=48)),
    "phi3": ("Phi3ForCausalLM", SMALL | dict(num_hidden_layers=2, num_key_value_heads=2, pad_token_id=0)),
    "gated t5": ("T5ForConditionalGeneration", T5 | dict(num_layers=2, feed_forward_proj="gated-gelu")),
    "modernbert": ("ModernBertForMaskedLM", SMALL | dict(num_hidden_layers=2, pad_token_id=0)),
    "distilbert": ("DistilBertForMaskedLM", dict(vocab_size=60, dim=32, hidden_dim=48, n_layers=2, n_heads=4))}


@pytest.mark.parametrize("kind", THIN)
def test_a_thinner_model_is_the_whole_one_with_the_other_units_silent(kind, tmp_path):
    name, whole = THIN[kind][:2]
    model, torn_off = build(name, whole), build(name, whole)
    torch.manual_seed(1)
    scores = {path: torch.rand(part.width) for path, part in models.feed_forwards(model).items()}
    kept = {path: s.topk(20).indices.sort().values for path, s in scores.items()}
    before, wanted = says(model)[0], says(without_units(torn_off, kept))
    shrink(model, feed_forward=20, scores=scores)
    for found in (model, type(model).from_pretrained(model.save_pretrained(tmp_path) or tmp_path)):
        logits, written = says(found)
        assert torch.allclose(logits, wanted[0], atol=1e-4)
        assert written is None or torch.equal(written, wanted[1])
    assert not torch.allclose(before, wanted[0], atol=1e-3)
    assert {part.width for part in models.feed_forwards(model).values()} == {20}


@pytest.mark.parametrize("kind", ["llama3", "gpt2", "t5", "bert_mlm"])
def test_units_are_scored_by_how_active_they_are_on_rows_that_ship(made, kind):
    loaded = load(made(kind))
    parts = models.feed_forwards(loaded.model)
    loud, silent = next(iter(parts)), 7
    for layer in parts[loud].into:
        with torch.no_grad(): layer.weight.data.index_fill_(1 if models.is_transposed(layer) else 0, torch.tensor([silent]), 0.0)
        if layer.bias is not None: layer.bias.data[silent] = 0
    scores = models.unit_scores(loaded.model, loaded.tokenizer, loaded.family)
    assert scores.keys() == parts.keys() and all(s.shape == (parts[n].width,) for n, s in scores.items())
    assert scores[loud].argmin() == silent and scores[loud][silent] == 0 and not loaded.model.training


def test_a_specs_thin_model_is_planned_loaded_and_told_apart(made):
    thin = spec(made("llama3"), layers=1, feed_forward=16)
    model = load_model(thin, dtype="float32").model
    assert profile(thin).parameters == count_parameters(model) and model.config.intermediate_size == 16
    assert identity(thin) == identity(spec(made("llama3"), layers=1)) | {"feed_forward": 16}
    assert str(thin).endswith("(1 layers, feed-forward of 16)")


@pytest.mark.parametrize("kind, width, said", [
    ("llama", 49, "feed_forward: 49: the model has 48"),
    ("mixtral", 20, "feed_forward: MixtralForCausalLM: has no feed-forward parts that are known here"),
    ("mamba", 20, "MambaForCausalLM: has no feed-forward parts"),
])
def test_units_that_cannot_be_dropped_are_refused(kind, width, said):
    settings = {"llama": SMALL | six(), "mixtral": SMALL | six(num_key_value_heads=2, num_local_experts=4),
                "mamba": dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, state_size=4)}[kind]
    with pytest.raises(DistillError, match=said): shrink(meta_model(AutoConfig.for_model(kind, **settings)), feed_forward=width)


def test_units_of_an_adapter_are_refused(adapter):
    with pytest.raises(DistillError, match="feed_forward: an adapter belongs to all units of its model"): profile(spec(adapter, feed_forward=8))


def test_packed_weights_are_not_cut_by_units(made):
    with pytest.raises(DistillError, match="feed_forward: cut the model before it is quantised"):
        load_model(spec(made("llama3"), feed_forward=8, quantize="4bit"))


# ---- a smaller vocabulary

ASKED = ["What is the capital of France?", "the cat sat on the mat", "Two and two is four.\nyes"]
OTHERS = ["আমার সোনার বাংলা", "🙂 👩‍🚀", "Zebras quiz: a dog lay in the sun!\n\n\tπ ≈ 3.14"]
WHOLE_KINDS = ("llama3", "chatml", "gpt2", "mistral", "phi3", "gemma", "gemma3")


def tokens_of(tokenizer, text): return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)


def logits_of(model, tokenizer, text):
    with torch.no_grad(): return model(**{"input_ids": tokenizer(text, return_tensors="pt").input_ids}).logits[0]


@pytest.mark.parametrize("kind", [*WHOLE_KINDS, "bert_mlm"])
def test_a_smaller_vocabulary_reads_and_says_the_same_about_the_texts_it_was_made_for(made, kind, tmp_path):
    loaded = load(made(kind))
    head = loaded.model.get_output_embeddings()
    if head.bias is not None: head.bias.data.uniform_(-1, 1)
    whole, rows = loaded.tokenizer, head.weight.shape[0]
    tied = head.weight is loaded.model.get_input_embeddings().weight
    wanted = [(tokens_of(whole, text), logits_of(loaded.model, whole, text)) for text in ASKED]
    smaller = models.shrink_vocabulary(loaded, ASKED)
    models.save_model(smaller.model, smaller.tokenizer, tmp_path/"small")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path/"small")
    model = getattr(transformers, loaded.family.auto).from_pretrained(tmp_path/"small").eval()
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().weight.shape[0] < rows
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    kept = whole.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    for now in (smaller, models.Loaded(model, tokenizer, loaded.family)):
        for text, (tokens, logits) in zip(ASKED, wanted, strict=True):
            assert tokens_of(now.tokenizer, text) == tokens
            assert torch.allclose(logits_of(now.model, now.tokenizer, text), logits[:, kept], atol=1e-5)
    load(tmp_path/"small"), check_model(spec(tmp_path/"small"), families=(loaded.family.name,))


@pytest.mark.parametrize("kind", WHOLE_KINDS)
def test_any_other_text_can_still_be_written_in_a_smaller_vocabulary(made, kind):
    loaded = load(made(kind))
    whole, before = loaded.tokenizer, len(loaded.tokenizer)
    smaller = models.shrink_vocabulary(loaded, ["the cat"]).tokenizer
    assert len(smaller) < before
    for text in OTHERS:
        read_back = [t.decode(t.encode(text, add_special_tokens=False)) for t in (whole, smaller)]
        assert read_back == [text, text]


@pytest.mark.parametrize("kind", ["llama3", "phi3", "gemma3", "gpt2", "bert_mlm"])
def test_special_tokens_keep_their_meaning_under_their_new_numbers(copied, kind, tmp_path):
    folder = copied(kind)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    last = tokenizer.add_tokens(["<|late|>"], special_tokens=True) and tokenizer.convert_tokens_to_ids("<|late|>")
    loaded = load(folder)
    loaded.tokenizer.add_tokens(["<|late|>"], special_tokens=True)
    loaded.model.resize_token_embeddings(last + 5)  # some rows more than tokens, as Qwen2 has
    loaded.model.config.pad_token_id = last
    if loaded.family.generates: loaded.model.generation_config.eos_token_id = [last, 9999]
    named = {n: i for n, i in loaded.model.config.to_dict().items() if n.endswith("_token_id") and i is not None}
    def names(tokenizer, ids): return [tokenizer.convert_ids_to_tokens(i) for i in ids]
    before, special = names(loaded.tokenizer, named.values()), loaded.tokenizer.special_tokens_map
    smaller = models.shrink_vocabulary(loaded, ASKED)
    models.save_model(smaller.model, smaller.tokenizer, tmp_path/"small")
    config = AutoConfig.from_pretrained(tmp_path/"small").to_dict()
    again = transformers.AutoTokenizer.from_pretrained(tmp_path/"small")
    assert names(again, [config[n] for n in named]) == before and again.special_tokens_map == special
    assert config["pad_token_id"] == again.convert_tokens_to_ids("<|late|>") == config["vocab_size"] - 1
    if loaded.family.generates: assert smaller.model.generation_config.eos_token_id == [config["pad_token_id"]]


def test_a_token_stays_with_every_merge_on_its_way():
    ranks = {("b", "c"): 0, ("a", "b"): 1, ("a", "bc"): 2, ("ab", "c"): 3}
    assert models.merged_on_the_way("abc", ranks) == {"a", "b", "c", "bc", "abc"}
    assert models.merged_on_the_way("abd", ranks) == {"a", "b", "d", "ab"}
    assert models.merged_on_the_way("a", {}) == {"a"}


def test_the_marks_of_a_template_are_renumbered_in_every_form_of_them():
    marks = {"processors": [{"special_tokens": {"<s>": {"ids": [7]}}}, {"sep": ["</s>", 9], "cls": ["<s>", 7]}]}
    models.renumber_marks(marks, {7: 0, 9: 1})
    assert marks == {"processors": [{"special_tokens": {"<s>": {"ids": [0]}}}, {"sep": ["</s>", 1], "cls": ["<s>", 0]}]}
    models.renumber_marks(None, {})


def test_a_vocabulary_that_cannot_be_cut_is_refused_before_anything_changes(made, adapter):
    def refused(said, loaded, texts=ASKED):
        before = loaded.model.get_input_embeddings().weight.shape
        with pytest.raises(DistillError, match=said): models.shrink_vocabulary(loaded, texts)
        assert loaded.model.get_input_embeddings().weight.shape == before
    for nothing in ([], [""]): refused("there are no texts", load(made("llama3")), nothing)
    refused("T5Tokenizer is of the kind Unigram; only BPE and WordPiece", load(made("t5")))
    refused("before it is quantised, or after a merge", load(adapter))
    packed = load(made("llama3"))
    packed.quantize = "4bit"
    refused("before it is quantised", packed)
    slow = load(made("llama3"))
    slow.tokenizer = type("SlowTokenizer", (), {})()
    refused("SlowTokenizer is no fast tokenizer", slow)
    longer = load(made("llama3"))
    longer.tokenizer.add_tokens(["more"])
    refused("the tokenizer has 382 tokens, the embedding 381", longer)


def test_a_model_with_a_third_table_of_its_tokens_is_named(made):
    loaded = load(made("llama3"))
    loaded.model.model.register_buffer("seen", torch.zeros(381))
    with pytest.raises(DistillError, match="LlamaForCausalLM has more than an embedding and a head: model.seen"):
        models.shrink_vocabulary(loaded, ASKED)


# ---- what LoRA adapts

def linear_size(config, kind):
    "in + out of every linear layer but the head, from the architecture's description"
    h, i = config.hidden_size, getattr(config, "intermediate_size", 0)
    if kind == "gpt2": return config.n_layer * ((h + 3 * h) + (h + h) + (h + 4 * h) + (4 * h + h))
    if kind == "t5":
        d, ff = config.num_heads * config.d_kv, config.d_ff
        attention, feed = 4 * (h + d), 2 * (h + ff)
        return config.num_layers * (attention + feed) + config.num_decoder_layers * (2 * attention + feed)
    kv = config.num_key_value_heads * h // config.num_attention_heads
    if kind == "phi3": return config.num_hidden_layers * ((h + h + 2 * kv) + (h + h) + (h + 2 * i) + (i + h))
    return config.num_hidden_layers * (2 * (h + h) + 2 * (h + kv) + 3 * (h + i))


SEVEN = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
PHI3 = ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
BERT = ["intermediate.dense", "key", "output.dense", "query", "value"]
GROUPED = SMALL | dict(num_hidden_layers=2, num_key_value_heads=2, head_dim=8, pad_token_id=0)
BIDIRECTIONAL = SMALL | dict(num_hidden_layers=2, pad_token_id=0, max_position_embeddings=66)
PICTURES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14)
EXPERTS = {"target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}


def of_text(*names): return [f"language_model.layers.{i}.self_attn.{n}" for i in (0, 1) for n in names]


# model type, its configuration, whether it is a classifier, what LoRA adapts
ADAPTED = {
    "llama": ("llama", GROUPED, 0, dict(target_modules=SEVEN)),
    "mistral": ("mistral", GROUPED, 0, dict(target_modules=SEVEN)),
    "gemma": ("gemma", GROUPED, 0, dict(target_modules=SEVEN)),
    "gemma2": ("gemma2", GROUPED, 0, dict(target_modules=SEVEN)),
    "gemma3": ("gemma3_text", GROUPED, 0, dict(target_modules=SEVEN)),
    "gemma3 with pictures": ("gemma3", dict(text_config=GROUPED, vision_config=PICTURES, mm_tokens_per_image=4), 0,
                             dict(target_modules=sorted([*of_text("k_proj", "q_proj", "v_proj"), "down_proj", "gate_proj", "o_proj", "up_proj"]))),
    "phi3": ("phi3", SMALL | dict(num_hidden_layers=2, num_key_value_heads=2, pad_token_id=0), 0, dict(target_modules=PHI3)),
    "qwen2": ("qwen2", SMALL | dict(num_hidden_layers=2, num_key_value_heads=2), 0, dict(target_modules=SEVEN)),
    "qwen3": ("qwen3", GROUPED, 0, dict(target_modules=SEVEN)),
    "gpt2": ("gpt2", dict(vocab_size=60, n_embd=32, n_layer=2, n_head=4), 0, dict(target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True)),
    "mixtral": ("mixtral", GROUPED | dict(num_local_experts=4), 0,
                dict(target_modules=["k_proj", "o_proj", "q_proj", "v_proj", "w1", "w2", "w3"])),
    "qwen3_moe": ("qwen3_moe", GROUPED | dict(num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2), 0, dict(target_modules=SEVEN)),
    "gpt_oss": ("gpt_oss", GROUPED | dict(num_local_experts=4, num_experts_per_tok=2), 0,
                dict(target_modules=["k_proj", "o_proj", "q_proj", "v_proj"]) | EXPERTS),
    "t5": ("t5", T5 | dict(num_layers=2, pad_token_id=0), 0, dict(target_modules=["k", "o", "q", "v", "wi", "wo"])),
    "marian": ("marian", BART | dict(encoder_layers=2, decoder_layers=2), 0,
               dict(target_modules=["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"])),
    "bert": ("bert", BIDIRECTIONAL, 0, dict(target_modules=BERT)),
    "roberta": ("roberta", BIDIRECTIONAL, 0, dict(target_modules=BERT)),
    "modernbert": ("modernbert", BIDIRECTIONAL, 0, dict(target_modules=["Wi", "Wo", "Wqkv"])),
    "bert, classes": ("bert", BIDIRECTIONAL, 3, dict(target_modules=BERT, modules_to_save=["bert.pooler", "classifier"])),
    "roberta, classes": ("roberta", BIDIRECTIONAL, 3, dict(target_modules=BERT, modules_to_save=["classifier"])),
    "modernbert, classes": ("modernbert", BIDIRECTIONAL, 3, dict(target_modules=["Wi", "Wo", "Wqkv"], modules_to_save=["classifier", "head"])),
    "llama, classes": ("llama", GROUPED, 3, dict(target_modules=SEVEN, modules_to_save=["score"])),
}


def adaptable(kind):
    "A configuration, its family and what LoRA adapts"
    name, settings, classes, expected = ADAPTED[kind]
    config = AutoConfig.for_model(name, **settings)
    config.bos_token_id = config.eos_token_id = 1
    if classes: config.num_labels = classes
    return config, models.FAMILIES["classifier"] if classes else models.family_of(config), expected


def adapted(model, family, r=4, wanted=None):
    from peft import LoraConfig, get_peft_model
    return get_peft_model(model, LoraConfig(r=r, task_type=family.peft_task, **models.adapter_settings(model, wanted)))


@pytest.mark.parametrize("kind", ADAPTED)
def test_lora_adapts_every_layer_that_reads_text_and_no_head(kind):
    config, family, expected = adaptable(kind)
    assert models.adapter_settings(meta_model(config, family)) == expected


@pytest.mark.parametrize("kind", ADAPTED)
def test_the_parameters_that_are_counted_are_those_that_peft_trains_and_each_of_them_learns(kind):
    config, family, _ = adaptable(kind)
    planned, known = lora_parameters(meta_model(config, family), 4), models.describe_model(config, family=family)
    torch.manual_seed(0)
    model = adapted(type(meta_model(config, family))(config), family).eval()  # dropout would hide that the loss falls
    assert planned == model.get_nb_trainable_parameters()[0] == 4 * known.lora + known.head
    ids = torch.arange(12).reshape(2, 6) + 2
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 2]) if family.name == "classifier" else ids}
    if kind == "gemma3 with pictures": batch["token_type_ids"] = torch.zeros_like(ids)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer, losses = torch.optim.AdamW(trained.values(), lr=1e-2), []
    for _ in range(3):
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        silent = [n for n, p in trained.items() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] and silent == []
    assert not any("lm_head" in n or "vision" in n for n in trained)


def test_tinyllama_has_the_trainable_parameters_that_were_published():
    known = profile(ModelSpec(name="TinyLlama/TinyLlama-1.1B-Chat-v1.0"), wanted=SEVEN)
    trained = 32 * known.lora
    assert trained == 25_231_360 and round(100 * trained / (known.parameters + trained), 2) == 2.24


def test_a_recipe_may_adapt_fewer_layers():
    config, family, _ = adaptable("llama")
    model = meta_model(config, family)
    assert lora_targets(model, ["q_proj", "v_proj"]) == ["q_proj", "v_proj"]
    assert lora_targets(model, ["mlp.up_proj"]) == ["up_proj"]
    assert lora_parameters(model, 4, ["q_proj", "v_proj"]) == 2 * 4 * (32 + 32 + 32 + 16)
    assert models.describe_model(config, wanted=["q_proj"]).lora == 2 * (32 + 32)


def test_a_recipe_that_wants_one_layers_weights_gets_no_other():
    config, family, _ = adaptable("llama")
    assert lora_targets(meta_model(config, family), ["1.self_attn.q_proj"]) == ["1.self_attn.q_proj"]


@pytest.mark.parametrize("kind, wanted, said", [
    ("phi3", ["q_proj", "qkv_proj"], "lora_targets: q_proj: Phi3ForCausalLM has no such layers, did you mean 'o_proj'|'qkv_proj'"),
    ("llama", ["c_attn"], "lora_targets: c_attn: LlamaForCausalLM has no such layers"),
    ("llama", ["lm_head"], "lora_targets: lm_head"),
    ("bert, classes", ["pooler.dense"], "lora_targets: pooler.dense"),
    ("gemma3 with pictures", ["fc1"], "lora_targets: fc1"),
])
def test_a_layer_that_a_model_does_not_have_is_an_error_that_names_it(kind, wanted, said):
    config, family, _ = adaptable(kind)
    with pytest.raises(DistillError, match=said): lora_targets(meta_model(config, family), wanted)


@pytest.mark.parametrize("kind", ["llama3", "gpt2", "phi3", "t5"])
def test_the_size_of_an_adapter_follows_from_the_architecture(made, kind):
    known = profile(spec(made(kind)))
    assert known.lora == linear_size(load(made(kind)).model.config, kind)


def test_the_head_of_a_new_classifier_is_planned(made):
    known = profile(spec(made("bert_mlm")), labels=5)
    assert known.family == "classifier" and known.vocab_size == 5 and known.head == (32 * 32 + 32) + (32 * 5 + 5)


# ---- configurations that ship

PUBLISHED = {  # parameters, as their authors and the hub's pages count them
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096, "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552, "unsloth/Phi-3-mini-4k-instruct-bnb-4bit": 3_821_079_552,
    "google/gemma-7b": 8_537_680_896, "google/gemma-7b-it": 8_537_680_896, "google/gemma-2b": 2_506_172_416,
    "google/gemma-2b-it": 2_506_172_416, "FacebookAI/roberta-base": 124_697_433, "google-t5/t5-small": 60_506_624,
    "google/flan-t5-base": 247_577_856, "Helsinki-NLP/opus-mt-en-de": 74_410_496, "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248, "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304, "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shipped_configuration_has_the_parameters_that_were_published(name):
    known = check_model(ModelSpec(name=name), families=("causal", "seq2seq", "masked"), weights=False)
    assert known.parameters == PUBLISHED[name] and known.roles[:2] == ["user", "assistant"] and known.tokens <= known.embeddings
    assert known.quantize == ("4bit" if "4bit" in name else None)


def test_every_shipped_configuration_is_in_the_table():
    from distill_nb.core import shipped_dir
    assert {read_json(f)["source"].removeprefix("https://huggingface.co/") for f in (shipped_dir()/"configs").glob("*--*.json")} == PUBLISHED.keys()


def test_phi3_in_4_bits_has_the_trainable_parameters_that_its_notebooks_print():
    "Rank 16 on the seven projections: `Number of trainable parameters = 29,884,416`"
    assert 16 * profile(ModelSpec(name="unsloth/Phi-3-mini-4k-instruct-bnb-4bit")).lora == 29_884_416


def test_a_shipped_configuration_is_enough_for_a_plan_and_not_for_a_run(capsys):
    gemma = ModelSpec(name="google/gemma-7b-it")
    models.log_once.cache_clear()
    check_model(gemma, weights=False)
    check_model(gemma, weights=False)
    assert capsys.readouterr().out.count("google/gemma-7b-it: cannot be had from the hub now, so its shape is taken from this package") == 1
    with pytest.raises(DistillError, match="google/gemma-7b-it: its weights are not in the hub's cache"): check_model(gemma)


def test_a_recipes_template_decides_the_roles_where_only_the_shape_is_known():
    assert profile(ModelSpec(name="google/gemma-7b-it")).roles == ["user", "assistant"]
    assert profile(ModelSpec(name="google/gemma-7b-it", template="qa")).roles == ["user", "assistant", "system"]


@pytest.mark.parametrize("changed, said", [({}, ""), ({"num_hidden_layers": 27}, "num_hidden_layers is 27 and not 28; the hub's counts")])
def test_the_hubs_configuration_is_preferred_and_a_difference_is_said(monkeypatch, capsys, changed, said):
    config = AutoConfig.for_model(**models.shipped_config("google/gemma-7b")["config"] | changed)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: config)
    models.log_once.cache_clear()
    assert models.model_config(ModelSpec(name="google/gemma-7b")) is config
    out = capsys.readouterr().out
    assert said in out if said else out == ""


# ---- profiles

def test_a_second_plan_imports_neither_transformers_nor_torch(made, adapter, cache, monkeypatch):
    monkeypatch.setattr(models, "_PROFILES", {})  # what a test before this one measured may lie in another cache
    specs = [spec(made("gemma2"), layers=1), spec(made("t5")), spec(adapter), ModelSpec(name="smollm2-135m-instruct", layers=22)]
    first = [check_model(s, families=("causal", "seq2seq")) for s in specs]
    for p in first: training_memory(p, plan_hardware("t4"), 2, 64, 8)
    code = ("import json, sys; from distill_nb.models import *; from distill_nb.memory import *; from distill_nb.stage import ModelSpec;"
            "from distill_nb.hardware import plan_hardware;"
            "specs = [ModelSpec(**s) for s in json.loads(sys.argv[1])]; plan = plan_hardware('t4');"
            "found = [check_model(s, max_length=64, families=('causal', 'seq2seq')) for s in specs];"
            "need = [(training_memory(p, plan, 2, 64, 8), inference_memory(p, plan, 2, 64), likelihood_memory(p, plan, 2, 64))"
            " for p in found];"
            "print(json.dumps([[p.model_dump() for p in found], [m for m in ('torch', 'transformers', 'peft') if m in sys.modules]]))")
    done = subprocess.run([sys.executable, "-c", code, json.dumps([s.model_dump() for s in specs])], text=True, capture_output=True, timeout=120,
                          env=environment({"DISTILL_NB_CACHE": str(cache)}))
    assert done.returncode == 0, done.stderr
    found, imported = json.loads(done.stdout)
    assert imported == [] and found == [p.model_dump() for p in first]


@pytest.mark.parametrize("kind", [*DECODERS, "t5", "bert_mlm", "bert_cls"])
def test_a_profile_says_what_loading_would_show(made, kind):
    loaded, known = load(made(kind)), profile(spec(made(kind)))
    embedding, head = loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()
    assert known.family == loaded.family.name and known.parameters == count_parameters(loaded.model)
    assert known.embeddings == embedding.num_embeddings and known.tokens <= known.embeddings
    assert known.vocab_size == (3 if kind == "bert_cls" else head.weight.shape[0])
    assert known.positions == (None if kind == "t5" else 512)
    assert known.layers == ([2, 2] if kind == "t5" else [2])
    assert ("system" in known.roles) == (kind not in ("gemma", "gemma2", "mistral")) and known.roles[:2] == ["user", "assistant"]


def test_a_profile_counts_the_layers_that_stay(made):
    cut = profile(spec(made("gemma2"), layers=1))
    assert cut.layers == [1] and cut.parameters == count_parameters(load_model(spec(made("gemma2"), layers=1)).model)


@pytest.mark.parametrize("kind", [k for k in (*DECODERS, "t5")])
def test_a_profile_knows_how_large_the_cache_gets(made, kind):
    "Against a cache that a model has filled"
    model, length, known = load(made(kind)).model, 7, profile(spec(made(kind)))
    ids = torch.ones(2, length, dtype=torch.long)
    with torch.inference_mode(): out = model(input_ids=ids, use_cache=True, **({"decoder_input_ids": ids} if kind == "t5" else {}))
    layers = getattr(out.past_key_values, "self_attention_cache", out.past_key_values).layers
    filled = sum(layer.keys.numel() + layer.values.numel() for layer in layers)
    assert filled == 2 * length * (known.cache + known.windowed)


def test_a_profile_is_made_again_when_its_files_change(copied):
    folder = copied("llama3")
    before = profile(spec(folder))
    change_json(folder/"config.json", num_hidden_layers=1)
    (folder/"chat_template.jinja").write_text("{{ raise_exception('no') }}")
    after = profile(spec(folder))
    assert after.parameters < before.parameters and after.roles == []


def tear(file): file.write_text("{torn")
def remove(file): file.unlink()
def make_unreadable(file): file.unlink() or file.mkdir()


@pytest.mark.parametrize("spoil", [tear, remove, make_unreadable], ids=lambda f: f.__name__)
def test_a_spoilt_cache_costs_time_only(made, cache, monkeypatch, spoil):
    monkeypatch.setattr(models, "_PROFILES", {})
    before = profile(spec(made("phi3")))
    for file in (cache/"profiles").iterdir(): spoil(file)
    models._PROFILES.clear()
    assert profile(spec(made("phi3"))) == before
    shutil.rmtree(cache/"profiles")


def test_roberta_counts_its_positions_after_the_padding_token():
    config = AutoConfig.for_model("roberta", **SMALL, num_hidden_layers=1, max_position_embeddings=514)
    assert models.describe_model(config).positions == 512


@pytest.mark.parametrize("kind, settings, known", [
    ("albert", SMALL | dict(num_hidden_layers=3, embedding_size=16), dict(family="masked", layers=[3], positions=512)),
    ("mamba", dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, state_size=4), dict(family="causal", layers=[2], cache=0, lora=0)),
    ("mpnet", SMALL | dict(num_hidden_layers=2, max_position_embeddings=512), dict(family="masked", layers=[2], positions=510)),
    ("mixtral", SMALL | dict(num_hidden_layers=2, num_key_value_heads=2, num_local_experts=4), dict(family="causal", layers=[2])),
])
def test_architectures_of_their_own_are_measured_as_well(kind, settings, known):
    found = models.describe_model(AutoConfig.for_model(kind, **settings)).model_dump()
    assert {k: found[k] for k in known} == known and found["parameters"] > found["linear"] > 0


def test_a_model_that_transformers_cannot_build_is_a_sentence():
    config = AutoConfig.for_model("vit", architectures=["ViTForCausalLM"])
    with pytest.raises(DistillError, match="a vit cannot be built as AutoModelForCausalLM: Unrecognized"): models.describe_model(config)


# ---- refused before the teacher is paid

def cut_off(folder): os.truncate(folder/"model.safetensors", (folder/"model.safetensors").stat().st_size - 64)
def header_only(folder): os.truncate(folder/"model.safetensors", 20)
def empty(folder): os.truncate(folder/"model.safetensors", 0)
def no_weights(folder): (folder/"model.safetensors").unlink()
def only_pickled(folder): no_weights(folder) or (folder/"pytorch_model.bin").write_bytes(b"code")
def no_tokenizer(folder): [f.unlink() for f in folder.glob("token*")]
def broken_tokenizer(folder): (folder/"tokenizer.json").write_text("{}")
def broken_template(folder): (folder/"chat_template.jinja").write_text("{{ raise_exception('only tools') }}")
def broken_config(folder): (folder/"config.json").write_text("{")
def no_config(folder): (folder/"config.json").unlink()


def larger_tokenizer(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)


def in_shards(folder):
    load(folder).model.save_pretrained(folder, max_shard_size="20KB")
    no_weights(folder) if (folder/"model.safetensors").exists() else None


def shard_lost(folder): in_shards(folder) or sorted(folder.glob("model-*"))[1].unlink()
def shard_torn(folder): in_shards(folder) or os.truncate(sorted(folder.glob("model-*"))[1], 900)


def shard_swapped(folder):
    in_shards(folder)
    first, second = sorted(folder.glob("model-*"))[:2]
    shutil.copy(first, second)


@pytest.mark.parametrize("spoil, said", [
    (cut_off, "model.safetensors: is cut off or damaged"), (header_only, "model.safetensors: is cut off"), (empty, "model.safetensors: is cut off"),
    (no_weights, "has no weights: there is no model.safetensors"), (only_pickled, "pytorch_model.bin is not loaded, since it may hold code"),
    (shard_lost, "model-00002-of-.*missing"), (shard_torn, "model-00002-of-.*cut off"), (shard_swapped, "model-00002-of-.*does not hold"),
    (no_tokenizer, "has no tokenizer"), (broken_tokenizer, "has no tokenizer that can be read"), (larger_tokenizer, "they do not belong together"),
    (broken_template, "its chat template fails on a question and an answer"), (broken_config, "config.json"), (no_config, "a folder without a model"),
], ids=lambda v: getattr(v, "__name__", ""))
def test_a_model_that_could_not_be_used_is_refused_by_the_check(copied, spoil, said):
    folder = copied("llama3")
    check_model(spec(folder), max_length=512)
    spoil(folder)
    with pytest.raises(DistillError, match=said): check_model(spec(folder))


@pytest.mark.parametrize("kind, more, options, said", [
    ("llama3", {}, {"max_length": 513}, "has 512 positions, and rows may have max_length 513"),
    ("llama3", {"layers": 3}, {}, "layers: 3: the model has 2"),
    ("llama3", {"layers": [1, 4]}, {}, "between 0 and 1"),
    ("bert_mlm", {}, {}, r"is a masked model \(bert\), and this stage takes causal"),
    ("t5", {}, {"families": ("causal", "masked")}, r"is a seq2seq model \(t5\), and this stage takes causal or masked"),
])
def test_a_model_that_does_not_suit_the_stage_is_refused_by_the_check(made, kind, more, options, said):
    with pytest.raises(DistillError, match=said): check_model(spec(made(kind), **more), **options)


@pytest.mark.parametrize("kind, options", [*((k, {"max_length": 512}) for k in DECODERS), ("t5", {"max_length": 4096})])
def test_a_good_model_passes(made, kind, options):
    check_model(spec(made(kind)), families=("causal", "seq2seq"), **options)


@pytest.mark.parametrize("name, said", [
    ("gpt2", "on the hub it is openai-community/gpt2"), ("bert-base-uncased", "google-bert/bert-base-uncased"), ("t5-small", "google-t5/t5-small"),
    ("mistral-7b", "of a hub model, write its owner/name"), ("smollm2-135m-instrukt", "did you mean 'smollm2-135m-instruct'"),
    ("./gone", "./gone: no model there"),
])
def test_a_name_that_finds_nothing_comes_with_what_to_write(name, said):
    with pytest.raises(DistillError, match=said): check_model(ModelSpec(name=name))


def test_an_adapter_is_checked_with_its_base(adapter, made, copied):
    assert check_model(spec(adapter)).parameters == profile(spec(made("llama3"))).parameters
    base = copied("llama3")
    write_json(adapter/"base.json", {"name": str(base)})
    cut_off(base)
    with pytest.raises(DistillError, match="llama3/model.safetensors: is cut off"): check_model(spec(adapter))
    os.truncate(adapter/"adapter_model.safetensors", 100)
    with pytest.raises(DistillError, match="adapter_model.safetensors: is cut off"): check_model(spec(adapter))


# ---- the hub

class Hub:
    "A hub with one model, as its client shows it; what is asked of it is counted"
    def __init__(self, folder, refuses=None, files=("config.json", "model.safetensors")):
        self.folder, self.refuses, self.files, self.asked = folder, refuses, files, 0

    def auth_check(self, name, token=None, **more):
        self.asked += 1
        if self.refuses: raise self.refuses

    def model_info(self, name, revision=None):
        from types import SimpleNamespace
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=f) for f in self.files])


@pytest.fixture
def hub(monkeypatch, made):
    import huggingface_hub
    def start(refuses=None, reachable=True, **more):
        served = Hub(made("llama3"), refuses, **more)
        monkeypatch.setattr(models, "hub_reachable", lambda: reachable)
        monkeypatch.setattr(huggingface_hub, "auth_check", served.auth_check)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: served)
        return served
    return start


def refusal(name):
    import httpx
    from huggingface_hub import errors
    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co/owner/name"))
    return getattr(errors, name)("no", response=response)


@pytest.mark.parametrize("refuses, said", [("GatedRepoError", "owner/name: is gated: accept its licence .* HF_TOKEN"),
                                           ("RepositoryNotFoundError", "owner/name: no such model here, .* private")])
def test_a_hub_model_that_is_not_given_is_refused_before_anything_is_fetched(hub, monkeypatch, refuses, said):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hub(refusal(refuses))
    with pytest.raises(DistillError, match=said): check_model(ModelSpec(name="owner/name"))


def test_a_hub_model_without_safetensors_is_refused(hub):
    hub(files=("config.json", "pytorch_model.bin"))
    with pytest.raises(DistillError, match="has no weights as safetensors on the hub"): check_model(ModelSpec(name="owner/name"))


def test_a_hub_model_that_was_never_fetched_is_refused_where_there_is_no_hub(hub):
    hub(reachable=False)
    with pytest.raises(DistillError, match="not in the hub's cache"): check_model(ModelSpec(name="owner/name"))


def test_a_hub_model_that_was_fetched_is_looked_at_without_the_hub(hub, made, tmp_path, monkeypatch):
    from huggingface_hub import constants
    served = hub(reachable=False)
    commit = tmp_path/"models--owner--name"/"snapshots"/("a" * 40)
    shutil.copytree(made("llama3"), commit)
    (tmp_path/"models--owner--name"/"refs").mkdir()
    (tmp_path/"models--owner--name"/"refs"/"main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for module in ("huggingface_hub.file_download", "transformers.utils.hub"):
        for name in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE"): monkeypatch.setattr(sys.modules[module], name, str(tmp_path), raising=False)
    assert check_model(ModelSpec(name="owner/name")).parameters == profile(spec(made("llama3"))).parameters
    assert served.asked == 0
    cut_off(commit)
    with pytest.raises(DistillError, match="model.safetensors: is cut off"): check_model(ModelSpec(name="owner/name"))
