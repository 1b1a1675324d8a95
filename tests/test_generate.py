"""What a model on this machine answers, and how likely it finds an answer, on tiny models of many kinds."""
import copy
import math

import pytest
import tiny
import torch

from distill_nb import generate as gen
from distill_nb.core import DistillError
from distill_nb.families import FAMILIES, collate, encode, encode_prompt, render_prompt
from distill_nb.models import load_model
from distill_nb.stage import ModelSpec

CAUSAL = ("llama3", "chatml", "gemma", "gemma2", "gemma3", "phi3", "mistral", "gpt2")
ASKED = {"What is the capital of France?": "Paris.", "Two and two?": "four, of course",
         "Say a word or two about the cat that sat on the mat.": "Good cat"}
ROWS = [{"id": q, "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}], "meta": {"label": 1}}
        for q, a in ASKED.items()]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    "Tiny models by kind, each made once; what changes one takes a copy"
    kept = {}
    def load(kind):
        if kind not in kept:
            folder = tiny.make(tmp_path_factory.mktemp(kind), kind)
            kept[kind] = load_model(ModelSpec(name=str(folder)), dtype="float32")
        return kept[kind]
    return load


def textbook(loaded, row):
    "Cross-entropy and likeliest tokens on full logits over the labels of `encode`, one row, without padding"
    batch = collate([encode(loaded.tokenizer, row, loaded.family)], loaded.family, loaded.tokenizer)
    with torch.inference_mode(): out = loaded.model(**batch).logits
    logits, labels = out.reshape(-1, out.shape[-1]), batch["labels"].reshape(-1)
    if loaded.family.name == "causal": logits, labels = logits[:-1], labels[1:]
    nats = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return nats.item(), (labels != -100).sum().item(), (logits.argmax(-1) == labels).sum().item()


@pytest.mark.parametrize("kind", (*CAUSAL, "t5", "bert_cls"))
def test_likelihood_is_the_textbook_cross_entropy_of_what_is_learnt(loaded, kind):
    model = loaded(kind)
    for ours, row in zip(gen.completion_nll(model, ROWS, batch_size=2), ROWS):
        assert ours == pytest.approx(textbook(model, row), rel=1e-5)


def test_a_masked_model_has_no_likelihood_of_an_answer(loaded):
    with pytest.raises(DistillError, match="masked"): gen.completion_nll(loaded("bert_mlm"), ROWS)


@pytest.mark.parametrize("kind", ("gemma", "phi3", "mistral", "chatml"))
def test_a_model_that_learnt_its_rows_by_heart_has_a_perplexity_near_one(loaded, kind):
    "Learnt as the trainer learns: the cross-entropy of all that the template adds for an answer"
    model = copy.deepcopy(loaded(kind))
    batch = collate([encode(model.tokenizer, r, model.family) for r in ROWS], model.family, model.tokenizer)
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=0.01)
    model.model.train()
    for _ in range(100):
        loss = model.model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.model.eval()
    scores = gen.completion_nll(model, ROWS)
    nats, tokens, hits = map(sum, zip(*scores))
    assert math.exp(nats / tokens) < 1.01 and hits == tokens
    answers = gen.generate(model, [r["messages"][:1] for r in ROWS], max_new_tokens=30)
    assert [a["text"] for a in answers] == [r["messages"][-1]["content"] for r in ROWS]
    assert {a["finish_reason"] for a in answers} == {"stop"}


# Labels

def plain_score(loaded, prompt, continuation):
    "One sequence in one forward pass, nothing shared, nothing padded"
    tokenizer = loaded.tokenizer
    given = encode_ids(tokenizer, prompt)
    whole = encode_ids(tokenizer, prompt + continuation)
    with torch.inference_mode(): logp = loaded.model(torch.tensor([whole])).logits[0].log_softmax(-1)
    start = next((i for i, (a, b) in enumerate(zip(given, whole)) if a != b), len(given))
    return sum(logp[i - 1, whole[i]].item() for i in range(start, len(whole)))


def encode_ids(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer("a")["input_ids"][0]
    return [bos, *ids] if bos == tokenizer.bos_token_id and ids[0] != bos else ids


LONG = ["Good or bad? " + "the cat sat on the mat and " * n + "it was fine" for n in (1, 6, 3, 9)]


@pytest.mark.parametrize("kind", CAUSAL)
def test_label_scores_are_those_of_a_plain_forward_pass(loaded, kind):
    "Gemma-2 and Gemma-3 look back over 8 tokens only: far less than the prompts, and than the padding between them"
    model = loaded(kind)
    prompts = [render_prompt(model.tokenizer, [{"role": "user", "content": t}]) for t in LONG]
    labels = ["good", "bad", "goodness", "yes and no"]
    for prompt, scores in zip(prompts, gen.score_continuations(model, prompts, labels, batch_size=3)):
        assert scores == pytest.approx([plain_score(model, prompt, l) for l in labels], abs=2e-4)


def test_labels_are_tokenized_behind_their_prompt(loaded):
    "Alone, SentencePiece puts a space before a label; behind `[/INST]` there is none"
    tokenizer = loaded("mistral").tokenizer
    prompt = render_prompt(tokenizer, [{"role": "user", "content": "Good or bad?"}])
    (whole, start), = gen.continuation_ids(tokenizer, prompt, ["good"])
    assert tokenizer.convert_ids_to_tokens(whole[start:])[0][0] != "▁"
    assert tokenizer.convert_ids_to_tokens(tokenizer("good", add_special_tokens=False)["input_ids"])[0][0] == "▁"


# Answers

@pytest.mark.parametrize("kind", (*CAUSAL, "t5"))
def test_an_answer_in_a_batch_is_the_answer_alone(loaded, kind):
    model = loaded(kind)
    asked = [r["messages"][:1] for r in ROWS]
    together = gen.generate(model, asked, max_new_tokens=6, batch_size=3)
    assert together == [gen.generate(model, [a], max_new_tokens=6)[0] for a in asked]
    fed = [len(encode_prompt(model.tokenizer, a, model.family)) for a in asked]
    assert [a["prompt_tokens"] for a in together] == fed


@pytest.mark.parametrize("kind, block", [("llama3", 16), ("t5", 1)])
def test_prompts_are_padded_to_whole_blocks_so_that_rounding_does_not_depend_on_the_neighbours(loaded, kind, block, monkeypatch):
    model, widths = loaded(kind), []
    longest = max(len(encode_prompt(model.tokenizer, r["messages"][:1], model.family)) for r in ROWS)
    assert longest % 16, "the test would see nothing"
    answer = model.model.generate
    monkeypatch.setattr(model.model, "generate", lambda **inputs: (widths.append(inputs["input_ids"].shape[1]), answer(**inputs))[1])
    gen.generate(model, [r["messages"][:1] for r in ROWS], max_new_tokens=1)
    assert widths == [math.ceil(longest / block) * block]


@pytest.mark.parametrize("kind", ("llama3", "chatml", "gemma", "phi3", "mistral", "gpt2"))
def test_a_model_stops_at_the_end_of_turn_of_its_template(loaded, kind):
    "Whatever its generation configuration says"
    model = copy.deepcopy(loaded(kind))
    model.model.generation_config.eos_token_id = None
    ends = {"gemma": "<end_of_turn>", "phi3": "<|end|>"}
    end = model.tokenizer.convert_tokens_to_ids(ends.get(kind, model.tokenizer.eos_token))
    assert end in gen.stop_ids(model)
    assert gen.read_answer(model.tokenizer, [100, 101, end, 102], gen.stop_ids(model))["tokens"] == 3


# Memory

def failing_above(rows, call):
    "A forward pass that has memory for so many rows"
    def run(*args, **more):
        ids = more["input_ids"] if "input_ids" in more else args[0]
        if len(ids) > rows: raise torch.OutOfMemoryError("CUDA out of memory")
        return call(*args, **more)
    return run


@pytest.mark.parametrize("kind", ("chatml", "gemma3", "t5"))
def test_when_memory_runs_out_batches_are_halved_and_nothing_is_lost(loaded, kind, monkeypatch, capsys):
    model = loaded(kind)
    prompts = [f"Good or bad? {t}" for t in LONG]
    asked = [r["messages"][:1] for r in ROWS]
    asks = [lambda: gen.completion_nll(model, ROWS), lambda: gen.generate(model, asked, max_new_tokens=3)]
    if kind != "t5": asks.append(lambda: gen.score_continuations(model, prompts, ["good", "bad"]))
    wanted = [ask() for ask in asks]
    first = model.model.get_encoder() if kind == "t5" else model.model.base_model
    monkeypatch.setattr(first, "forward", failing_above(1, first.forward))
    capsys.readouterr()
    for ask, want in zip(asks, wanted):
        got = ask()
        assert "batches of 1" in capsys.readouterr().out
        if isinstance(want[0], dict): assert got == want
        else: assert torch.tensor(got).tolist() == [pytest.approx(w, abs=1e-4) for w in torch.tensor(want).tolist()]


def test_one_row_that_does_not_fit_is_an_error(loaded, monkeypatch):
    model = loaded("chatml")
    monkeypatch.setattr(model.model.base_model, "forward", failing_above(0, None))
    with pytest.raises(torch.OutOfMemoryError): gen.generate(model, [ROWS[0]["messages"][:1]])


def test_another_error_halves_nothing():
    def work(batch): raise RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match="shapes"): list(gen.in_batches(range(4), 4, work))


def test_a_likelihood_never_holds_the_logits_of_a_batch(loaded, monkeypatch):
    "Neither the model's head, beyond the probe of a few tokens, nor ours beyond a chunk"
    model, ours, own = loaded("chatml"), [], []
    logits = gen.Head.logits
    monkeypatch.setattr(gen.Head, "logits", lambda self, hidden: ours.append(len(hidden)) or logits(self, hidden))
    last = model.model.get_output_embeddings()
    hook = last.register_forward_hook(lambda layer, given, out: own.append(out.shape[:-1].numel()))
    many = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y" * 300}]}] * 4
    tokens = sum(n for _, n, _ in gen.completion_nll(model, many, batch_size=4))
    hook.remove()
    assert sum(ours) >= tokens > 1000 and max(own) < 10
