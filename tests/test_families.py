"""How a conversation becomes tokens, and a hidden state log-probabilities: tiny models, published templates."""
import json
from pathlib import Path

import pytest
import tiny
import torch
import transformers

from distill_nb.core import DistillError
from distill_nb.families import (
    FAMILIES, PLAIN_TEMPLATE, Head, class_of, collate, encode, encode_prompt, end_of_turn, ensure_template, family_of, head_of,
    prompt_and_target, render, set_template, soft_targets, supervised_hidden)

CHAT = ("llama3", "chatml", "gemma", "gemma2", "gemma3", "phi3", "mistral", "gpt2")
CAUSAL, SEQ2SEQ, CLASSIFIER, MASKED = FAMILIES.values()
HAS_BOS = {"llama3", "gemma", "gemma2", "gemma3", "mistral"}


def conversation(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents)]
    if system is not None: messages = [{"role": "system", "content": system}, *messages]
    return {"id": "a row", "messages": messages, "meta": {}}


ROWS = {"one turn": conversation("What is the capital of France?", "Paris."),
        "two turns": conversation("Two and two?", "four", "And the word for it?", "a sum, of course"),
        "a system message": conversation("Good or bad?", "good", system="Answer in one word."),
        "an empty system message": conversation("Good or bad?", "good", system=""),
        "white space around it": conversation("  Good or bad?\n", "\n good \n\n"),
        "another script": conversation("ভাত কী?", "চাল থেকে হয়।")}


@pytest.fixture(scope="module")
def tokenizer():
    kept = {}
    def get(kind):
        if kind not in kept: kept[kind] = ensure_template(tiny.tokenizer_of(kind))
        return kept[kind]
    return get


def learnt(tokenizer, encoded): return tokenizer.decode([t for t in encoded.labels if t != -100])
def given(encoded): return [i for i, label in zip(encoded.input_ids, encoded.labels) if label == -100]


# A conversation in tokens

@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("kind", CHAT)
def test_there_is_one_bos_where_the_model_has_one_and_else_none(tokenizer, kind, row):
    ids = encode(tokenizer(kind), ROWS[row], CAUSAL).input_ids
    bos = tokenizer(kind).bos_token_id
    if kind in HAS_BOS: assert ids[0] == bos and bos not in ids[1:]
    else: assert ids[0] != bos


def test_a_template_without_bos_gets_it_from_the_tokenizer():
    "Such as TinyLlama's: Zephyr's template behind Llama's tokenizer"
    tokenizer = tiny.tokenizer_of("mistral")
    tokenizer.chat_template = PLAIN_TEMPLATE
    ids = encode(tokenizer, ROWS["one turn"], CAUSAL).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


ENDS = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>\n", "gemma": "<end_of_turn>\n", "gemma2": "<end_of_turn>\n",
        "gemma3": "<end_of_turn>\n", "phi3": "<|end|><|endoftext|>", "mistral": "</s>", "gpt2": "<|endoftext|>\n"}


@pytest.mark.parametrize("kind", CHAT)
def test_the_end_of_the_turn_is_learnt(tokenizer, kind):
    encoded = encode(tokenizer(kind), ROWS["one turn"], CAUSAL)
    assert learnt(tokenizer(kind), encoded).strip(" ") == "Paris." + ENDS[kind]
    assert end_of_turn(tokenizer(kind)) in encoded.labels


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("kind", CHAT)
def test_generation_is_fed_the_tokens_that_training_saw(tokenizer, kind, row):
    prompt = encode_prompt(tokenizer(kind), ROWS[row]["messages"][:-1])
    assert given(encode(tokenizer(kind), ROWS[row], CAUSAL)) == prompt


@pytest.mark.parametrize("kind", CHAT)
def test_earlier_answers_are_part_of_the_prompt(tokenizer, kind):
    encoded = encode(tokenizer(kind), ROWS["two turns"], CAUSAL)
    assert "a sum, of course" in learnt(tokenizer(kind), encoded) and "four" not in learnt(tokenizer(kind), encoded)
    assert encoded.labels == [-100] * len(given(encoded)) + encoded.input_ids[len(given(encoded)):]


@pytest.mark.parametrize("kind", CHAT)
def test_what_the_system_says_is_there_once_whatever_the_template_thinks_of_it(tokenizer, kind):
    text = render(tokenizer(kind), ROWS["a system message"]["messages"][:-1], prompt=True)
    assert text.count("Answer in one word.") == 1 and text.count("Good or bad?") == 1
    if kind in ("gemma", "gemma2", "mistral"): assert "Answer in one word.\n\nGood or bad?" in text


def test_a_template_that_forgets_the_system_message_is_given_it_in_the_question():
    tokenizer = tiny.tokenizer_of("phi3")
    tokenizer.chat_template = tiny.PHI3.replace("{'<|system|>\n' + message['content'] + '<|end|>\n'}", "{''}")
    assert "Answer in one word.\n\nGood or bad?" in render(tokenizer, ROWS["a system message"]["messages"])


@pytest.mark.parametrize("kind", ("gemma", "gemma3", "mistral"))
def test_roles_that_a_template_refuses_are_an_error_that_names_the_row(tokenizer, kind):
    twice = [{"role": role, "content": "a"} for role in ("user", "user", "assistant")]
    refused = "row r7: the model's chat template refuses a conversation of user, user.*must alternate"
    with pytest.raises(DistillError, match=refused): encode(tokenizer(kind), {"id": "r7", "messages": twice}, CAUSAL)


def test_a_row_without_an_answer_is_an_error_that_names_it(tokenizer):
    for family in (CAUSAL, SEQ2SEQ):
        with pytest.raises(DistillError, match="row r8: the row has no answer"):
            encode(tokenizer("chatml"), {"id": "r8", "messages": [{"role": "user", "content": "Hi"}]}, family)


@pytest.mark.parametrize("kind", CHAT)
def test_a_truncated_row_always_has_something_to_learn(tokenizer, kind):
    whole = encode(tokenizer(kind), ROWS["two turns"], CAUSAL)
    prompt = len(given(whole))
    for length in range(1, len(whole.input_ids) + 2):
        cut = encode(tokenizer(kind), ROWS["two turns"], CAUSAL, max_length=length)
        if length <= prompt: assert cut is None
        else:
            assert cut.input_ids == whole.input_ids[:length] and cut.labels == whole.labels[:length]
            assert cut.dropped == max(0, len(whole.input_ids) - length) and cut.labels[-1] != -100


def test_a_tokenizer_without_offsets_works_too():
    tokenizer = transformers.ByT5Tokenizer()
    tokenizer.chat_template = PLAIN_TEMPLATE
    assert not tokenizer.is_fast
    encoded = encode(tokenizer, ROWS["another script"], CAUSAL)
    assert learnt(tokenizer, encoded).strip() == "চাল থেকে হয়।</s>"


# The same as TRL

@pytest.mark.parametrize("kind", CHAT)
def test_the_labels_are_those_that_trl_would_learn(tokenizer, kind, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    rows = [r for name, r in ROWS.items() if "system" not in name]
    data = Dataset.from_list([{"prompt": r["messages"][:-1], "completion": r["messages"][-1:]} for r in rows])
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.make(tmp_path/"model", kind))
    settings = SFTConfig(output_dir=str(tmp_path), max_length=64, report_to="none", use_cpu=True, bf16=False)
    trl = SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer(kind)).train_dataset
    for row, theirs in zip(rows, trl, strict=True):
        ours = encode(tokenizer(kind), row, CAUSAL, max_length=64)
        assert (ours.input_ids, ours.labels) == (theirs["input_ids"], theirs["labels"])


# Templates that do more than they should

def published(name):
    "A template that TRL carries, on a tokenizer of our own"
    import trl
    tokenizer = tiny.tokenizer_of("llama3")
    file = Path(trl.__file__).parent/"chat_templates"/f"{name}.jinja"
    tokenizer.chat_template = file.read_text(encoding="utf-8")
    return tokenizer


THOUGHT = conversation("Two and two?", "<think>\nA sum.\n</think>\n\nfour")


@pytest.mark.parametrize("name", ("cohere2", "deepseek_r1_distill", "deepseekv3", "gemma4", "glm4moe", "gptoss",
                                  "lfm2", "llama3_2", "nemotron_3_nano", "qwen3", "qwen3_8"))
def test_published_templates_teach_what_the_row_says_and_how_to_stop(name):
    tokenizer = published(name)
    for row in (*ROWS.values(), THOUGHT):
        encoded, prompt = encode(tokenizer, row, CAUSAL), encode_prompt(tokenizer, row["messages"][:-1])
        answer = "".join(row["messages"][-1]["content"].split()).removeprefix("<think>")
        taught = "".join(learnt(tokenizer, encoded).split())
        assert given(encoded) == prompt
        assert answer in taught and not taught.endswith(answer)
        assert (tokenizer.decode(prompt) + taught).count("<think>") <= 2  # one may be an earlier turn's


def test_a_chain_of_thought_that_the_template_cuts_out_is_learnt():
    prompt, target = prompt_and_target(published("deepseek_r1_distill"), THOUGHT["messages"])
    assert prompt.endswith("<think>\n") and target.startswith("A sum.\n</think>\n\nfour")


def test_a_template_that_shows_no_text_is_refused():
    with pytest.raises(DistillError, match="leaves out the user message"):
        encode(published("smolvlm"), ROWS["one turn"], CAUSAL)


# The other families

def test_an_encoder_decoder_reads_the_prompt_and_writes_the_answer(tokenizer):
    for kind in ("t5", "bert_mlm"):
        words = tokenizer(kind)
        encoded = encode(words, ROWS["a system message"], SEQ2SEQ)
        read = words.decode(encoded.input_ids, skip_special_tokens=True)
        assert read.lower() == "answer in one word. good or bad?"
        assert words.decode(encoded.labels, skip_special_tokens=True) == "good"
        assert encoded.labels[-1] == encoded.input_ids[-1] in (words.eos_token_id, words.sep_token_id)
        assert encode_prompt(words, ROWS["a system message"]["messages"][:-1], SEQ2SEQ) == encoded.input_ids
        assert encode(words, ROWS["one turn"], SEQ2SEQ, max_length=4) is None
        assert encode(words, conversation("Good?", "the cat sat on the mat"), SEQ2SEQ, max_length=6).dropped > 0


def test_a_class_is_a_number_or_a_name_and_soft_labels_keep_its_order(tokenizer):
    words, text = tokenizer("bert_cls"), [{"role": "user", "content": "the cat"}]
    classes, answer = ["bad", "mixed", "good"], {"role": "assistant", "content": "good"}
    meta = {"label": "good", "probabilities": {"good": 0.7, "bad": 0.1, "mixed": 0.2}}
    assert encode(words, {"messages": text, "meta": {"label": 2}}, CLASSIFIER).labels == [2]
    assert encode(words, {"messages": [*text, answer]}, CLASSIFIER, classes=classes).labels == [2]
    encoded = encode(words, {"messages": text, "meta": meta}, CLASSIFIER, classes=classes)
    assert (encoded.labels, encoded.soft) == ([2], [0.1, 0.2, 0.7])
    cut = encode(words, {"text": "the cat " * 50, "meta": {"label": 0}}, CLASSIFIER, max_length=9)
    assert len(cut.input_ids) == 9 and cut.input_ids[-1] == words.sep_token_id and cut.dropped == 93
    for meta, message in (({"label": 3}, "3 is not"), ({"label": "fine"}, "'fine' is not"), ({}, "None is not")):
        with pytest.raises(DistillError, match=f"row r9: the label {message}"):
            encode(words, {"id": "r9", "messages": text, "meta": meta}, CLASSIFIER, classes=classes)


def test_a_mask_is_drawn_anew_by_the_rule_of_bert(tokenizer):
    words = tokenizer("bert_mlm")
    text = "the cat sat on the mat and the dog lay in the sun " * 8
    rows = [encode(words, {"text": text}, MASKED)] * 40
    rows += [encode(words, {"text": "cat"}, MASKED)] * 20
    draw = torch.Generator().manual_seed(0)
    first, second = (collate(rows, MASKED, words, generator=draw) for _ in range(2))
    again = collate(rows, MASKED, words, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(first[k], again[k]) for k in first) and not torch.equal(first["labels"], second["labels"])
    before = torch.tensor([r.input_ids for r in rows[:40]])
    after, labels = first["input_ids"][:40], first["labels"][:40]
    chosen = labels != -100
    assert torch.equal(labels[chosen], before[chosen]) and torch.equal(after[~chosen], before[~chosen])
    assert not torch.isin(before[chosen], torch.tensor(words.all_special_ids)).any()
    def share(a, b): return (a.sum() / b.sum()).item()
    assert share(chosen, ~torch.isin(before, torch.tensor(words.all_special_ids))) == pytest.approx(0.15, abs=0.02)
    assert share(after[chosen] == words.mask_token_id, chosen) == pytest.approx(0.8, abs=0.05)
    assert share(after[chosen] == before[chosen], chosen) == pytest.approx(0.1, abs=0.04)
    assert (first["labels"][40:] != -100).sum(1).tolist() == [1] * 20  # one word: it is always hidden
    assert encode(words, {"text": "  "}, MASKED) is None


def test_a_batch_takes_rows_as_a_data_set_keeps_them(tokenizer):
    from dataclasses import asdict
    rows = [encode(tokenizer("chatml"), r, CAUSAL) for r in ROWS.values()]
    ours, theirs = (collate(some, CAUSAL, tokenizer("chatml")) for some in (rows, [asdict(r) for r in rows]))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_family_is_read_from_a_configuration_or_from_its_file(kind, tmp_path):
    wanted = {"t5": "seq2seq", "bert_mlm": "masked", "bert_cls": "classifier"}.get(kind, "causal")
    folder = tiny.make(tmp_path, kind)
    assert family_of(transformers.AutoConfig.from_pretrained(folder)).name == wanted
    assert family_of(json.loads((folder/"config.json").read_text())).name == wanted


@pytest.mark.parametrize("kind, name, wanted", [
    ("bert", "BertModel", "masked"), ("roberta", None, "masked"), ("electra", "ElectraForPreTraining", "masked"),
    ("bert", "BertLMHeadModel", "causal"), ("gpt2", "GPT2LMHeadModel", "causal"),
    ("mistral", "MistralModel", "causal"), ("gemma3", "Gemma3ForConditionalGeneration", "causal"), ("encoder-decoder", "EncoderDecoderModel", "seq2seq"),
    ("bart", "BartForSequenceClassification", "classifier"), ("marian", "MarianMTModel", "seq2seq")])
def test_the_family_of_unusual_models(kind, name, wanted):
    both = {"is_encoder_decoder": kind in ("encoder-decoder", "bart", "marian")}
    assert family_of({"model_type": kind, "architectures": name and [name]} | both).name == wanted


@pytest.mark.parametrize("name", ("BertForQuestionAnswering", "ViTForImageClassification", "T5EncoderModel"))
def test_a_model_of_another_kind_is_refused_by_name(name):
    config = {"model_type": "some", "architectures": [name], "is_encoder_decoder": name[0] == "T"}
    with pytest.raises(DistillError, match=f"mine/model: a {name} is of no family"): family_of(config, "mine/model")


# Hidden states, and the head

SMALL = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
             pad_token_id=0)
GROUPED = SMALL | dict(num_key_value_heads=1)
WINDOW = GROUPED | dict(head_dim=8, sliding_window=4)
BART = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=64)
DISTILBERT = dict(dim=16, hidden_dim=32, n_layers=1, n_heads=2, vocab_size=64)
HEADS = {  # class and configuration; each line has another kind of head
    "LlamaForCausalLM": SMALL, "Qwen2ForCausalLM": GROUPED | dict(tie_word_embeddings=True),
    "MistralForCausalLM": GROUPED, "Phi3ForCausalLM": SMALL, "GPTNeoXForCausalLM": SMALL, "OlmoForCausalLM": SMALL,
    "PhiForCausalLM": SMALL, "GPT2LMHeadModel": dict(n_embd=16, n_layer=2, n_head=2, vocab_size=64),
    "OPTForCausalLM": dict(hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
                           word_embed_proj_dim=8),
    "Gemma2ForCausalLM": WINDOW | dict(final_logit_softcapping=5.0), "Gemma3ForCausalLM": WINDOW,
    "CohereForCausalLM": SMALL | dict(logit_scale=0.25), "GraniteForCausalLM": SMALL | dict(logits_scaling=8.0),
    "T5ForConditionalGeneration": dict(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=64,
                                       decoder_start_token_id=0),
    "BartForConditionalGeneration": BART, "MarianMTModel": BART | dict(pad_token_id=0, decoder_start_token_id=0),
    "BertForMaskedLM": SMALL, "DebertaV2ForMaskedLM": SMALL, "RobertaForMaskedLM": SMALL,
    "ModernBertForMaskedLM": SMALL | dict(decoder_bias=True, cls_token_id=1, sep_token_id=2),
    "ElectraForMaskedLM": SMALL | dict(embedding_size=8), "AlbertForMaskedLM": SMALL | dict(embedding_size=8),
    "DistilBertForMaskedLM": DISTILBERT,
    "BertForSequenceClassification": SMALL | dict(num_labels=3),
    "RobertaForSequenceClassification": SMALL | dict(num_labels=3),
    "DistilBertForSequenceClassification": DISTILBERT | dict(num_labels=3),
    "LlamaForSequenceClassification": SMALL | dict(num_labels=3),
    "BartForSequenceClassification": BART | dict(num_labels=3),
}


def random_model(name):
    "Numbers large enough for a scale, a bias or a cap to show"
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**HEADS[name]))
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * 0.2)
        if hasattr(model, "final_logits_bias"): model.final_logits_bias += torch.randn(64)
    return model


def two_bert():
    from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel
    decoder = BertConfig(**SMALL | dict(hidden_size=24), is_decoder=True, add_cross_attention=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**SMALL), decoder)
    config.pad_token_id, config.decoder_start_token_id = 0, 1
    torch.manual_seed(0)
    return EncoderDecoderModel(config)


def batch_for(family, width=7):
    "Two rows, one of them padded, some positions with a label"
    ids = torch.randint(5, 60, (2, width), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 2  # the end: BART's classifier reads it
    real = torch.ones_like(ids)
    if family.name == "classifier": return {"input_ids": ids, "attention_mask": real, "labels": torch.tensor([2, 0])}
    real[1, -2:], ids[1, -2:] = 0, 0
    labels = torch.where(torch.arange(width) > 2, ids, -100).masked_fill(real == 0, -100)
    return {"input_ids": ids, "attention_mask": real, "labels": labels}


def own_nll(model, batch, family):
    "The textbook formula on the model's own logits"
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    labels = batch["labels"]
    if family.name == "seq2seq": inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    logits = model(**inputs).logits
    if family.name == "causal": logits, labels = logits[:, :-1], labels[:, 1:]
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    return torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none")


@pytest.mark.parametrize("name", (*HEADS, "EncoderDecoderModel"))
def test_the_likelihood_by_hidden_states_and_head_is_the_models_own(name):
    model = (two_bert() if name == "EncoderDecoderModel" else random_model(name)).eval()
    family = family_of(model.config.to_dict() | {"architectures": [name]})
    batch = batch_for(family)
    hidden, targets = supervised_hidden(model, batch, family)
    head = head_of(model, family)
    wanted = own_nll(model, batch, family)
    for chunk in (None, 2):
        torch.testing.assert_close(head.nll(hidden, targets, chunk), wanted, rtol=1e-4, atol=1e-4)


def test_a_head_keeps_the_models_tensors_and_a_chunk_its_size(monkeypatch):
    model = random_model("Gemma2ForCausalLM").eval()
    head, sizes = head_of(model, CAUSAL), []
    assert head.weight is model.lm_head.weight and head.cap == 5.0
    logits = Head.logits
    monkeypatch.setattr(Head, "logits", lambda self, hidden: sizes.append(len(hidden)) or logits(self, hidden))
    hidden, targets = supervised_hidden(model, batch_for(CAUSAL), CAUSAL)
    head.nll(hidden, targets, chunk=3)
    assert sizes == [3, 3] and len(head.nll(hidden[:0], targets[:0])) == 0


@pytest.mark.parametrize("name", ("Gemma2ForCausalLM", "T5ForConditionalGeneration", "BertForMaskedLM",
                                  "BertForSequenceClassification"))
def test_gradients_are_those_of_the_models_own_loss(name):
    model = random_model(name).eval()  # without dropout
    family = family_of({"architectures": [name], "is_encoder_decoder": name[0] == "T"})
    batch = batch_for(family)
    def gradients(loss):
        model.zero_grad()
        loss().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]
    wanted = gradients(lambda: own_nll(model, batch, family))
    found = gradients(lambda: head_of(model, family).nll(*supervised_hidden(model, batch, family)))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_finding_a_head_leaves_the_model_as_it_was():
    model = random_model("LlamaForCausalLM").train()
    model.model.layers[0].eval()
    before, state = [m.training for m in model.modules()], torch.get_rng_state()
    head_of(model, CAUSAL)
    assert [m.training for m in model.modules()] == before and torch.equal(torch.get_rng_state(), state)


def test_a_head_that_is_not_understood_is_an_error_that_names_the_architecture():
    class OwnForCausalLM(transformers.LlamaForCausalLM):
        def forward(self, *args, **more):
            out = super().forward(*args, **more)
            out.logits = out.logits + out.logits.roll(1, -1)
            return out
    model = OwnForCausalLM(transformers.LlamaConfig(**SMALL))
    with pytest.raises(DistillError, match="OwnForCausalLM: its logits do not follow"): head_of(model, CAUSAL)


# Adapters and 4-bit weights

@pytest.mark.parametrize("name, options", [
    ("LlamaForCausalLM", dict(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])),
    ("LlamaForCausalLM", dict(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])),
    ("LlamaForCausalLM", dict(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])),
    ("T5ForConditionalGeneration", dict(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])),
    ("BertForMaskedLM", dict(target_modules=["query", "value"])),
    ("BertForSequenceClassification", dict(task_type="SEQ_CLS", target_modules=["query"])),
    ("LlamaForSequenceClassification", dict(task_type="SEQ_CLS", target_modules=["q_proj"]))])
def test_adapters_count(name, options):
    from peft import LoraConfig, get_peft_model
    family = family_of({"architectures": [name], "is_encoder_decoder": name[0] == "T"})
    plain = own_nll(random_model(name).eval(), batch_for(family), family)
    model = get_peft_model(random_model(name), LoraConfig(r=4, **options)).eval()
    assert options.get("task_type") in (family.peft_task, None)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n or "modules_to_save" in n: p.add_(torch.randn_like(p))
    batch = batch_for(family)
    ours, wanted = head_of(model, family).nll(*supervised_hidden(model, batch, family)), own_nll(model, batch, family)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wanted, plain, atol=1e-2)


def test_adapters_that_change_the_prompt_are_refused():
    from peft import PromptTuningConfig, get_peft_model
    adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(random_model("LlamaForCausalLM"), adapter)
    with pytest.raises(DistillError, match="PROMPT_TUNING: .* use LoRA"): head_of(model, CAUSAL)


def test_four_bit_weights_count(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    tiny.make(tmp_path, "llama3", hidden_size=64, intermediate_size=128, head_dim=16)
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=four, dtype=torch.float32).eval()
    batch = batch_for(CAUSAL)
    ours = head_of(model, CAUSAL).nll(*supervised_hidden(model, batch, CAUSAL))
    assert model.is_loaded_in_4bit
    torch.testing.assert_close(ours, own_nll(model, batch, CAUSAL), rtol=1e-4, atol=1e-4)


# Padding

@pytest.mark.parametrize("kind", tiny.KINDS)
def test_padding_changes_no_logit(tokenizer, kind, tmp_path):
    folder, words = tiny.make(tmp_path, kind), tokenizer(kind)
    family = family_of(json.loads((folder/"config.json").read_text()))
    model = getattr(transformers, family.auto).from_pretrained(folder).eval()
    rows = [encode(words, r | {"meta": {"label": 1}}, family) for r in ROWS.values()]
    together = collate(rows, family, words)
    if family is MASKED: together["input_ids"] = collate(rows, CAUSAL, words)["input_ids"]  # nothing is hidden
    with torch.no_grad():
        for i, row in enumerate(rows):
            alone = collate([row], family, words)
            if family is MASKED: alone["input_ids"] = torch.tensor([row.input_ids])
            wide, narrow = model(**together).logits[i], model(**alone).logits[0]
            torch.testing.assert_close(wide[:len(narrow)], narrow, rtol=1e-4, atol=1e-5)

# A template of the recipe's own

def with_template(kind, template): return set_template(tiny.tokenizer_of(kind), template)


@pytest.mark.parametrize("kind", [*CHAT, "t5"])
def test_questions_and_answers_are_written_as_text_and_the_answer_is_learnt_with_its_end(kind):
    tokenizer, family = with_template(kind, "qa"), FAMILIES["seq2seq" if kind == "t5" else "causal"]
    row = conversation(" Two and two? ", "four", "And good?", "\nyes\n", system="Be brief.")
    text = render(tokenizer, row["messages"])
    end = tokenizer.eos_token
    assert text == ((tokenizer.bos_token if kind in HAS_BOS else "")
                    + f"Be brief.\n\nQ: Two and two?\nA: four{end}\nQ: And good?\nA: yes{end}")
    encoded = encode(tokenizer, row, family)
    assert learnt(tokenizer, encoded).strip() == f"yes{end}" and encoded.labels[-1] == tokenizer.eos_token_id
    if kind == "t5": assert encoded.input_ids == encode_prompt(tokenizer, row["messages"][:-1], family)
    else: assert given(encoded) == encode_prompt(tokenizer, row["messages"][:-1])
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id


def test_an_empty_system_message_leaves_no_trace_in_questions_and_answers():
    assert render(with_template("chatml", "qa"), conversation("a?", "b", system=" ")["messages"]).startswith("Q: a?")


def test_padding_with_the_end_hides_no_end_that_is_learnt():
    tokenizer = set_template(tiny.tokenizer_of("gpt2"), "qa")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = [encode(tokenizer, conversation(q, a), CAUSAL) for q, a in (("Good or bad?", "good"), ("a?", "a word or two, and more"))]
    labels = collate(rows, CAUSAL, tokenizer)["labels"]
    assert (labels == tokenizer.eos_token_id).sum(1).tolist() == [1, 1]


def test_a_template_is_saved_with_its_tokenizer(tmp_path):
    from transformers import AutoTokenizer
    tokenizer = with_template("llama3", "qa")
    tokenizer.save_pretrained(tmp_path)
    again = ensure_template(AutoTokenizer.from_pretrained(tmp_path))
    assert encode(again, ROWS["two turns"], CAUSAL) == encode(tokenizer, ROWS["two turns"], CAUSAL)


def test_a_template_of_the_recipes_own_takes_the_place_of_the_models():
    tokenizer = with_template("llama3", "{% for m in messages %}{{ m['role'][0] }}>{{ m['content'] }};{% endfor %}")
    assert render(tokenizer, conversation("Good?", "yes")["messages"]) == "u>Good?;a>yes;"


@pytest.mark.parametrize("template, said", [
    ("q&a", "template: q&a: neither Jinja nor a known name, did you mean 'qa'?"),
    ("{% for m in messages %}", "template: line 1: Unexpected end of template"),
    ("{{ messages[0]['text'] }}", "template: cannot write a question and an answer: .* leaves out the user message"),
    ("{{ 1/0 }}", "template: cannot write a question and an answer: division by zero"),
    ("{{ sentence(messages) }}", "template: cannot write .*'sentence' is undefined"),
])
def test_a_template_that_cannot_be_filled_in_is_an_error_that_says_why(template, said):
    with pytest.raises(DistillError, match=said): with_template("chatml", template)


# Classes

NAMES = ["bad", "good"]


@pytest.mark.parametrize("row, place", [
    ({"meta": {"label": "good"}}, 1), ({"meta": {"label": 1}}, 1), ({"meta": {"probabilities": {"bad": 0.2, "good": 0.8}}}, 1),
    ({"messages": [{"role": "assistant", "content": " bad "}], "meta": {"label": 1}}, 0),  # what is said counts before a number
    ({"messages": [{"role": "assistant", "content": "because ..."}], "meta": {"label": 1}}, 1)])
def test_a_class_is_found_wherever_a_row_says_it(row, place):
    assert class_of(row, NAMES) == place


def test_a_row_of_several_tasks_has_a_class_of_each(tokenizer):
    names = ["tone: bad", "tone: good", "topic: food", "topic: rooms"]
    row = {"text": "the cat", "meta": {"labels": {"topic": "rooms", "tone": "bad"}}}
    assert sorted(encode(tokenizer("bert_cls"), row, CLASSIFIER, classes=names).labels) == [0, 3]
    soft = {"tone": {"bad": 0.1, "good": 0.9}, "topic": {"food": 1.0}}
    encoded = encode(tokenizer("bert_cls"), {"text": "the cat", "meta": {"probabilities": soft}}, CLASSIFIER, classes=names)
    assert encoded.soft == [0.1, 0.9, 1.0, 0.0] and sorted(encoded.labels) == [1, 2]
    batch = collate([encode(tokenizer("bert_cls"), r, CLASSIFIER, classes=names) for r in
                     (row, {"text": "the dog", "meta": {"labels": {"tone": "good"}}})], CLASSIFIER, tokenizer("bert_cls"))
    assert batch["labels"].tolist() == [[3, 0], [1, -100]]


@pytest.mark.parametrize("soft, why", [
    ({"bad": 0.5, "fine": 0.5}, "'fine' is not one of the classes"), ({"bad": 0.5, "good": 0.4}, "add up to 0.9, not to 1"),
    ({"bad": 1.5, "good": -0.5}, "add up to 1, not to 1|add up"), ([0.5, 0.3, 0.2], "3 of 2 classes")])
def test_probabilities_that_are_none_are_refused(soft, why):
    with pytest.raises(DistillError, match=why): soft_targets(soft, NAMES)
