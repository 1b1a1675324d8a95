"""Tiny random models of many kinds, made in a fraction of a second.

Each has a small tokenizer that works as its kind does, and the chat template of the published model.
"""
import json
import string
from pathlib import Path

CHATML = (  # Qwen2-Instruct
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
ALTERNATE = (  # as Gemma and Mistral refuse what is not user, assistant, user ...
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}")
GEMMA = (  # Gemma and Gemma-2
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}" + ALTERNATE +
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}")
GEMMA3 = (  # without its lines for pictures
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}{%- set loop_messages = messages[1:] -%}"
    "{%- else -%}{%- set first_user_prefix = '' -%}{%- set loop_messages = messages -%}{%- endif -%}"
    "{%- for message in loop_messages -%}" + ALTERNATE +
    "{%- if (message['role'] == 'assistant') -%}{%- set role = 'model' -%}"
    "{%- else -%}{%- set role = message['role'] -%}{%- endif -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}"
    "{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}")
PHI3 = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}")
MISTRAL = (  # Mistral-7B-Instruct-v0.2
    "{{ bos_token }}{% for message in messages %}" + ALTERNATE +
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}")
TEMPLATES = {"llama3": LLAMA3, "chatml": CHATML, "gemma": GEMMA, "gemma2": GEMMA, "gemma3": GEMMA3, "phi3": PHI3,
             "mistral": MISTRAL}

SIGNS = sorted(string.ascii_letters + string.digits + string.punctuation)
SENTENCES = [
    "What is the capital of France? The capital of France is Paris.", "user model system assistant INST",
    "You are a helpful assistant. Answer in one word.", "Good or bad? good bad better yes no",
    "What is two and two? Two and two is four.", "the cat sat on the mat and the dog lay in the sun",
    "a question, an answer and a word or two"]
WORDS = sorted({w for line in SENTENCES for w in line.split()})
CORPUS = 3 * [*SENTENCES, " ".join(SIGNS)]


def byte_level(special, bos=None, **names):
    "As Llama-3, Qwen2 and GPT-2: every byte is a token, merges on top; `bos` is written before each text"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=376 + len(special), special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if bos:
        raw.post_processor = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B",
                                                           special_tokens=[(bos, raw.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, clean_up_tokenization_spaces=False, **names)


def sentence_piece(special):
    "Vocabulary and merges as SentencePiece has them: a space is `▁`, an unknown character is written as bytes"
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    raw.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=220, show_progress=False))
    model = json.loads(raw.to_str())["model"]
    tokens = special + [f"<0x{i:02X}>" for i in range(256)] + ["\n"] + list(model["vocab"])
    return {t: i for i, t in enumerate(dict.fromkeys(tokens))}, [tuple(m) for m in model["merges"]]


def llama_like(**names):
    "As Llama-2, Mistral and Phi-3: a text, and what follows a special token, begins with a space of its own"
    from transformers import LlamaTokenizer
    vocab, merges = sentence_piece(["<unk>", "<s>", "</s>"])
    return LlamaTokenizer(vocab=vocab, merges=merges, legacy=True, **names)


def phi_like():
    "As Phi-3: its marks swallow the white space behind them, and no text begins with BOS"
    from tokenizers import AddedToken
    tokenizer = llama_like(add_bos_token=False, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    marks = [AddedToken(t, rstrip=True, special=True) for t in ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>")]
    tokenizer.add_tokens(["<|endoftext|>", *marks], special_tokens=True)
    return tokenizer


def gemma_like():
    "As Gemma: no space of its own, line breaks are tokens"
    from transformers import GemmaTokenizer
    vocab, merges = sentence_piece(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    tokenizer = GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)
    tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
    return tokenizer


def word_pieces():
    "As BERT: lower case, `##` before what continues a word"
    from transformers import BertTokenizer
    words = [w.lower().strip(".?,") for w in WORDS]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *SIGNS, *(f"##{s}" for s in SIGNS), *words]
    return BertTokenizer(vocab={t: i for i, t in enumerate(dict.fromkeys(tokens))})


def unigram():
    "As T5: pieces with log-probabilities, `</s>` at the end of each text"
    from transformers import T5Tokenizer
    special = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -4.0}
    pieces = special | {s: -9.0 for s in SIGNS} | {f"▁{w}": -6.0 for w in WORDS}
    return T5Tokenizer(vocab=list(pieces.items()), extra_ids=2)


def tokenizer_of(kind):
    "A tokenizer with the chat template of its kind; none for GPT-2, T5 and BERT"
    if kind == "llama3":
        special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        tokenizer = byte_level(special, bos="<|begin_of_text|>", eos_token="<|eot_id|>")
    elif kind == "chatml":
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        tokenizer = byte_level(special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    elif kind == "gpt2":
        tokenizer = byte_level(["<|endoftext|>"], eos_token="<|endoftext|>", unk_token="<|endoftext|>")
        tokenizer.bos_token = "<|endoftext|>"  # it has one, and never writes it
    elif kind == "mistral": tokenizer = llama_like(add_bos_token=True)
    elif kind == "phi3": tokenizer = phi_like()
    elif kind.startswith("gemma"): tokenizer = gemma_like()
    elif kind == "t5": tokenizer = unigram()
    else: tokenizer = word_pieces()
    tokenizer.chat_template = TEMPLATES.get(kind)
    return tokenizer


SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=512)
GROUPED = SMALL | dict(num_key_value_heads=2, head_dim=8)
WINDOW = dict(sliding_window=8, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"])
KINDS = {  # class of the model, and its configuration beside vocabulary and special tokens
    "llama3": ("LlamaForCausalLM", GROUPED),
    "chatml": ("Qwen2ForCausalLM", SMALL | dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "gemma": ("GemmaForCausalLM", GROUPED),
    "gemma2": ("Gemma2ForCausalLM", GROUPED | WINDOW | dict(final_logit_softcapping=30.0)),
    "gemma3": ("Gemma3ForCausalLM", GROUPED | WINDOW),
    "phi3": ("Phi3ForCausalLM", SMALL | dict(num_key_value_heads=2)),
    "mistral": ("MistralForCausalLM", GROUPED | dict(sliding_window=None)),
    "gpt2": ("GPT2LMHeadModel", dict(n_embd=32, n_layer=2, n_head=4, n_positions=512)),
    "t5": ("T5ForConditionalGeneration",
           dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)),
    "bert_mlm": ("BertForMaskedLM", SMALL),
    "bert_cls": ("BertForSequenceClassification", SMALL | dict(num_labels=3)),
}
ENDS_OF_TURN = {"gemma": "<end_of_turn>", "gemma2": "<end_of_turn>", "gemma3": "<end_of_turn>", "phi3": "<|end|>"}


def make(folder, kind, seed=0, **config):
    "Write a tiny random model and its tokenizer into a folder; `config` changes the model's configuration"
    import torch
    import transformers
    from transformers.utils import logging
    tokenizer = tokenizer_of(kind)
    name, settings = KINDS[kind]
    model_class = getattr(transformers, name)
    tokens = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    if kind in ENDS_OF_TURN:
        tokens["eos_token_id"] = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(ENDS_OF_TURN[kind])]
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**dict(vocab_size=len(tokenizer)) | tokens | settings | config))
    logging.disable_progress_bar()
    try: model.save_pretrained(folder)
    finally: logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)
    return Path(folder)
