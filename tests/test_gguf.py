"""A GGUF file is the model it was made from, for every architecture that is written; others are refused in words."""
import shutil

import pytest

import tiny
from distill_nb.core import DistillError
from distill_nb.families import begins_with_bos
from distill_nb.hardware import plan_hardware
from distill_nb.models import load_model, load_tokenizer, model_config
from distill_nb.share import gguf, shards
from distill_nb.share.proof import proof_batches, proof_logits
from distill_nb.stage import ModelSpec

PLAN = plan_hardware("cpu")
TEXTS = ["What is the capital of France? The capital of France is Paris.", "  two  spaces\n\nand 12345 signs: ()[]{}!?", "the mat"]
ROWS = [{"id": t, "messages": [{"role": "user", "content": t}, {"role": "assistant", "content": "The cat sat on the mat."}], "meta": {}}
        for t in TEXTS]
KINDS = ["llama3", "mistral", "chatml", "phi3", "gemma2"]


def make(folder, kind, **config):
    "A tiny model whose attention matters: the usual tiny numbers would let any order of queries pass"
    wide = dict(head_dim=256, query_pre_attn_scalar=256, num_attention_heads=2, num_key_value_heads=1) if kind == "gemma2" else {}
    return tiny.make(folder, kind, **{"initializer_range": 0.2} | wide | config)


def measured(folder):
    loaded = load_model(ModelSpec(name=str(folder)), PLAN, "float32")
    batches = proof_batches(loaded.tokenizer, ROWS, loaded.family)
    return proof_logits(loaded.model, batches, loaded.family), batches


@pytest.mark.parametrize("width", ["f16", "q8_0"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_same_model(kind, width, tmp_path):
    folder = make(tmp_path/"model", kind)
    before, batches = measured(folder)
    proofs = gguf.export_gguf(folder, tmp_path/"gguf", [width], before, batches)
    assert proofs[width]["tensors"] > 10 and proofs[width]["kl"] < gguf.GGUF_KL[width]
    assert sorted(p.name for p in (tmp_path/"gguf").iterdir()) == ["Modelfile", f"model-{width}.gguf"]


@pytest.mark.parametrize("kind", ["llama3", "mistral", "gemma2"])
def test_rows_in_the_wrong_order_or_a_norm_one_too_small_are_noticed(kind, tmp_path, monkeypatch):
    folder = make(tmp_path/"model", kind)
    before, batches = measured(folder)
    monkeypatch.setattr(gguf, "for_llama_cpp", lambda name, weight, config: weight)
    file = gguf.write_gguf(folder, tmp_path/"x.gguf", "f16")
    with pytest.raises(DistillError, match="is another model"): gguf.prove_gguf(file, "f16", before, batches)
    with pytest.raises(DistillError, match="is another model"): gguf.export_gguf(folder, tmp_path/"out", ["f16"], before, batches)
    assert not (tmp_path/"out"/"model-f16.gguf").exists(), "a file that is not faithful does not stay"


def test_a_tensor_that_differs_is_named(tmp_path):
    folder, other = make(tmp_path/"model", "llama3"), make(tmp_path/"other", "llama3", seed=1)
    file = gguf.write_gguf(folder, tmp_path/"x.gguf", "q8_0")
    assert gguf.check_gguf_tensors(file, folder) == len(shards.Checkpoint(folder).names)
    with pytest.raises(DistillError, match="is not lm_head.weight"): gguf.check_gguf_tensors(file, other)


@pytest.mark.parametrize("kind", ["llama3", "mistral"])
def test_its_tokenizer_gives_the_same_tokens(kind, tmp_path):
    from transformers import AutoTokenizer
    folder = make(tmp_path/"model", kind)
    file = gguf.write_gguf(folder, tmp_path/"x.gguf", "f16")
    mine, theirs = load_tokenizer(ModelSpec(name=str(folder))), AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    for text in ("What is the capital of France?", "the cat sat on the mat"):
        assert mine(text, add_special_tokens=False)["input_ids"] == theirs(text, add_special_tokens=False)["input_ids"]
    assert theirs.chat_template == mine.chat_template


def test_pieces_are_merged_in_the_order_of_their_scores():
    scores = gguf.piece_scores({"a": 0, "b": 1, "ab": 2, "abb": 3}, [("a", "b"), ("ab", "b")], 5)
    assert scores[2] > scores[3] > scores[0] == scores[4]


RULES = {"gpt-2": {"type": "ByteLevel", "use_regex": True},
         "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}]},
         "qwen2": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": gguf.WORD_RULES["qwen2"]}},
                                                         {"type": "ByteLevel", "use_regex": False}]},
         None: {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "x"}}, {"type": "ByteLevel"}]}}


@pytest.mark.parametrize("name", RULES)
def test_the_rule_that_cuts_words_has_its_name(name): assert gguf.word_rule(RULES[name]) == name


def test_a_tokenizer_of_a_rule_without_a_name_is_refused():
    raw = {"model": {"type": "BPE"}, "pre_tokenizer": RULES[None]}
    with pytest.raises(DistillError, match="no name of llama.cpp is known"): gguf.tokenizer_kind(raw)
    with pytest.raises(DistillError, match="Unigram cannot be written"): gguf.tokenizer_kind({"model": {"type": "Unigram"}})


@pytest.mark.parametrize("kind, config, why", [
    ("gpt2", {}, "a gpt2 cannot be written yet"), ("t5", {}, "a t5 cannot be written yet"), ("gemma", {}, "a gemma cannot be written yet"),
    ("llama3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "positions that are scaled"),
    ("llama3", {"attention_bias": True}, "attention_bias"), ("gemma2", {"query_pre_attn_scalar": 4}, "query_pre_attn_scalar")])
def test_what_cannot_be_written_is_refused_before_anything_is_computed(kind, config, why, tmp_path):
    spec = ModelSpec(name=str(tiny.make(tmp_path/"model", kind, **config)))
    with pytest.raises(DistillError, match=why): gguf.check_gguf_able(model_config(spec), load_tokenizer(spec))


def test_a_number_too_large_for_fp16_is_said(tmp_path):
    from safetensors.torch import load_file, save_file
    folder = make(tmp_path/"model", "llama3")
    tensors = load_file(folder/"model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, folder/"model.safetensors", {"format": "pt"})
    with pytest.raises(DistillError, match="up_proj.weight holds a number that fp16 cannot hold"):
        gguf.write_gguf(folder, tmp_path/"x.gguf", "f16")
    assert not (tmp_path/"x.gguf").exists()


def test_a_full_disk_is_said_before_the_work(tmp_path, monkeypatch):
    folder = make(tmp_path/"model", "llama3")
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(DistillError, match="are to be written, and the disk has"): gguf.write_gguf(folder, tmp_path/"x.gguf", "f16")


def test_the_estimate_of_its_size_is_near(tmp_path):
    folder = make(tmp_path/"model", "llama3", hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
    for kind in ("f16", "q8_0"):
        size = gguf.write_gguf(folder, tmp_path/f"{kind}.gguf", kind).stat().st_size
        assert 0 <= gguf.gguf_bytes(folder, kind) - size < 17 * 2**20


@pytest.mark.parametrize("kind", KINDS)
def test_ollamas_template_writes_a_turn_as_the_models_own_does(kind, tmp_path):
    tokenizer = tiny.tokenizer_of(kind)
    template = gguf.ollama_template(tokenizer)
    assert "here-stands" not in template
    filled = template.split("{{ else }}")[1].replace("{{ end }}", "", 1).replace("{{ .Prompt }}", "Q").replace("{{ .Response }}", "A")
    own = tokenizer.apply_chat_template([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], tokenize=False)
    assert filled == (own.removeprefix(tokenizer.bos_token) if begins_with_bos(tokenizer) else own)


def test_more_tokens_than_rows_are_refused_and_spare_rows_are_filled(tmp_path):
    tokenizer = tiny.tokenizer_of("llama3")
    with pytest.raises(DistillError, match="more tokens than"): gguf.token_table(tokenizer, 10)
    tokens, types, _ = gguf.token_table(tokenizer, len(tokenizer) + 5)
    assert tokens[-1] == f"[PAD{len(tokenizer) + 4}]" and types[-1] == 5
