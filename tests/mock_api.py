"""A loopback OpenAI-compatible API that counts the calls it bills and misbehaves when told to.

    with MockApi(latency=0.2, p={"429": 0.05}) as api:        # a process of its own
        client = AsyncOpenAI(base_url=api.url, api_key="x", max_retries=0)
        ...
        assert api.stats()["billed"] == 100

Misbehaviour comes by probability (`p`), or by a marker in any message: `[[429x2]]` fails the first two requests with those messages,
`[[500xinf]]` all of them, `[[429x1]] [[dropx1]]` one after the other. Rows with a marker are exempt from `p`. The kinds are in KINDS, the config in DEFAULTS.
"""
import argparse
import asyncio
import contextlib
import hashlib
import http.client
import json
import math
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from itertools import pairwise

DEFAULTS = {
    "latency": 0.0, "jitter": 0.0,  # seconds before an answer, plus up to `jitter` more; what is refused (4xx) is refused at once
    "p": {},                        # kind -> probability
    "seed": 0,                      # of the draws for `p`
    "hang": 30.0,                   # seconds that `timeout` sleeps
    "retry_after": 0.2,             # what `429ra` says
    "rate_limit": None, "burst": None, "rate_retry_after": None,  # requests a second, bucket size (default: one second's worth), header of those 429s
    "max_concurrent": None,         # more at once get 429
    "require_key": None,            # any other key gets 401
    "known_models": None,           # any other model gets 404
    "canned": [],                   # [{"contains": str, "content": str}]: the first found in the last user message is the answer
    "label_rule": {},               # substring of the last user message -> the enum value to choose
    "echo_sample": False,           # let the answer depend on the request's `seed`
    "count_contents": True,         # keep `by_content`, which grows with every new request
    "token_chars": None,            # longest word in a logprobs token; None: whole words
}

ERRORS = {  # kind -> status, message, type, code
    "429": (429, "Rate limit reached", "requests", "rate_limit_exceeded"),
    "429ra": (429, "Rate limit reached", "requests", "rate_limit_exceeded"),
    "quota": (429, "You exceeded your current quota, please check your plan and billing details.", "insufficient_quota", "insufficient_quota"),
    "401": (401, "Incorrect API key provided: {key}.", "invalid_request_error", "invalid_api_key"),
    "402": (402, "Insufficient Balance", "invalid_request_error", "insufficient_balance"),
    "404": (404, "The model `{model}` does not exist or you do not have access to it.", "invalid_request_error", "model_not_found"),
    "400": (400, "Invalid value in the request.", "invalid_request_error", None),
    "context": (400, "This model's maximum context length is 4096 tokens.", "invalid_request_error", "context_length_exceeded"),
    "filter": (400, "The prompt triggered the content management policy.", "invalid_request_error", "content_filter"),
    "500": (500, "The server had an error while processing your request.", "server_error", None),
    "502": (502, "Bad gateway.", "server_error", None),
    "503": (503, "The engine is currently overloaded, please try again later.", "server_error", None),
    "504": (504, "Gateway timeout.", "server_error", None),
}
UNBILLED = {"drop_early", "html"}
BILLED = {"timeout", "drop", "malformed", "empty", "null", "nochoices", "length", "refusal", "content_filter", "bad_label", "prose", "noreply_usage"}
KINDS = {*ERRORS, *UNBILLED, *BILLED}
ALIASES = {"429_retry_after": "429ra"}

MARKER = re.compile(r"\[\[(\w+)x(\d+|inf)\]\]")
LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.I)
BEARER = re.compile(rb"\r\nauthorization:[ \t]*([^\r\n]*)", re.I)
CLOSES = re.compile(rb"\r\nconnection:\s*close", re.I)


# --- what a test may want to work out for itself ---

def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def content_key(body: dict) -> str:
    """The key of a request body in stats()["by_content"]."""
    return sha(json.dumps({k: body.get(k) for k in ("messages", "response_format", "seed")}, sort_keys=True, separators=(",", ":"), ensure_ascii=False))


def auth_hash(key: str) -> str:
    """How a key shows in stats()["auth"]."""
    return sha(f"Bearer {key}")


def number(*parts) -> int:
    """A large number that depends on the parts alone."""
    return int(sha("\0".join(map(str, parts)))[:12], 16)


# --- the answer: a function of the request ---

def text_of(message: dict) -> str:
    """A message's text, also where it comes in parts."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def fill(schema: dict, choose, text: str, root: dict, name="", enums=None):
    """A value that fits a JSON schema; the enums met on the way are added to `enums` as (property, values)."""
    if "$ref" in schema:
        schema = root.get("$defs", root.get("definitions", {}))[schema["$ref"].rsplit("/", 1)[-1]]
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            schema = next((s for s in schema[several] if s.get("type") != "null"), {"type": "null"})
            return fill(schema, choose, text, root, name, enums)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        enums.append((name, schema["enum"]))
        return choose(schema["enum"])
    kind = schema.get("type")
    if kind == "object":
        return {key: fill(value, choose, text, root, key, enums) for key, value in schema.get("properties", {}).items()}
    if kind == "array":
        return [fill(schema.get("items", {}), choose, text, root, name, enums) for _ in range(schema.get("minItems", 1))]
    if kind in ("integer", "number"):
        low, high = schema.get("minimum", 0), schema.get("maximum", 10)
        return low + number(text, name) % int(high - low + 1)
    return {"boolean": number(text, name) % 2 == 0, "null": None}.get(kind, text)


def bare(value) -> str:
    """A value as it stands in JSON, without the quotes of a string."""
    return json.dumps(value, ensure_ascii=False)[1:-1] if isinstance(value, str) else json.dumps(value)


class Stats:
    """What is counted; a new one is what reset() means."""

    def __init__(self, in_flight=0):
        self.requests = self.billed = self.billed_tokens_in = self.billed_tokens_out = 0
        self.in_flight = self.max_in_flight = in_flight
        self.by_content, self.by_status, self.by_kind = Counter(), Counter(), Counter()
        self.auth, self.started, self.last_bodies = [], None, deque(maxlen=20)


class Server:
    """One mock API: routes, counts, misbehaviour."""

    def __init__(self, config: dict):
        self.config, self.stats = {}, Stats()
        self.configure({**DEFAULTS, **config})
        self.reset()

    def configure(self, config: dict):
        """Change some of the config; what it does not know is refused, as a misspelt fault would make a test pass."""
        config = dict(config)
        if "p" in config:
            config["p"] = {ALIASES.get(kind, kind): p for kind, p in config["p"].items()}
        if unknown := {*config} - {*DEFAULTS} | {*config.get("p", {})} - KINDS:
            raise ValueError(f"unknown config: {sorted(unknown)}")
        self.config.update(config)
        if {"rate_limit", "burst"} & {*config} and (rate := self.config["rate_limit"]):
            self.burst = self.config["burst"] or max(rate, 1)
            self.bucket, self.filled = self.burst, time.monotonic()
        self.token = re.compile(rf"\s*\w{{1,{self.config['token_chars'] or ''}}}|\s+|[^\w\s]")

    def reset(self):
        """Zero the counters and start over with the markers and the draws; what is in flight stays so."""
        self.stats, self.attempts = Stats(self.stats.in_flight), Counter()

    # --- which fault ---

    def over_rate(self) -> bool:
        """Whether the token bucket is empty; takes a token otherwise."""
        now, rate = time.monotonic(), self.config["rate_limit"]
        self.bucket, self.filled = min(self.burst, self.bucket + (now - self.filled) * rate), now
        if self.bucket < 1:
            return True
        self.bucket -= 1
        return False

    def fault(self, texts: list[str]) -> str:
        """What goes wrong at this attempt at these messages, "" for nothing: what markers ask for or, without any, chance."""
        plan = [found for text in texts if "[[" in text for found in MARKER.findall(text)]
        if unknown := {kind for kind, _ in plan} - KINDS:
            raise ValueError(f"unknown marker: {sorted(unknown)}")
        if not plan and not self.config["p"]:
            return ""
        key = sha("\0".join(texts))
        seen = self.attempts[key]
        self.attempts[key] += 1
        return self.marked(plan, seen) if plan else self.drawn(key, seen)

    def marked(self, plan: list, seen: int) -> str:
        for kind, times in plan:
            if seen < float(times):
                return kind
            seen -= int(times)
        return ""

    def drawn(self, key: str, seen: int) -> str:
        # By hash, not from a stream of random numbers: the same rows fail in every run, in whatever order a concurrent client sends them.
        draw = number(self.config["seed"], key, seen) / 16**12
        for kind, p in self.config["p"].items():
            if draw < p:
                return kind
            draw -= p
        return ""

    # --- the answer ---

    def content(self, body: dict, user: str, kind: str) -> tuple[str, list]:
        """The answer and the enums it had to keep to."""
        form, enums = body.get("response_format") or {}, []
        seed = body.get("seed") if self.config["echo_sample"] else None

        def choose(values):
            if kind == "bad_label":
                return "none_of_these"
            ruled = (label for part, label in self.config["label_rule"].items() if part in user and label in values)
            return next(ruled, values[number(user, *([] if seed is None else [seed])) % len(values)])

        text = f"answer to: {user[:200]}."
        if form.get("type") == "json_schema":
            schema = form["json_schema"].get("schema", {})
            text = json.dumps(fill(schema, choose, text, schema, enums=enums), ensure_ascii=False)
        elif form.get("type") == "json_object":
            text = json.dumps({"answer": text}, ensure_ascii=False)
        elif kind == "bad_label":
            text = json.dumps({"label": choose([])})
        if kind == "prose":
            text = "Well, that is hard to say: it depends."
        elif kind != "bad_label":
            text = next((c["content"] for c in self.config["canned"] if c["contains"] in user), text)
        if seed is not None and form.get("type", "text") == "text":  # JSON would not survive it; there the seed is part of the choice
            text += f" (sample {seed})"
        return text, enums

    def spread(self, user: str, values: list, content: str, at: int) -> list[tuple[str, float]]:
        """First tokens of the values, likeliest first, with log-probabilities of probabilities that sum to 1; the one that stands in the content leads."""
        texts = [*map(bare, values)]
        chosen = max((t for t in texts if content.startswith(t, at)), key=len, default=None)
        weights = {t: 1 + number(user, t) % 9 for t in texts if t != chosen}
        lead = 0.6 + number(user, "lead") % 39 / 100 if weights else 1.0
        share = Counter({self.token.match(content, at).group(): lead})
        for text, weight in weights.items():  # values that begin alike share a token, and so its probability
            share[self.token.match(text or '"').group()] += (1 - lead) * weight / sum(weights.values())
        return [(token, math.log(p)) for token, p in share.most_common()]

    def logprobs(self, body: dict, user: str, content: str, enums: list) -> dict:
        """Tokens that make up the content; one starts wherever an enum value does. OpenAI's rule: no more alternatives than `top_logprobs`, none without it."""
        top, starts = body.get("top_logprobs") or 0, {}
        for name, values in enums:
            if (found := re.search(rf'"{re.escape(name)}"\s*:\s*\[?\s*"?', content)) and found.end() < len(content):
                starts[found.end()] = values
        tokens = []
        for start, end in pairwise(sorted({0, *starts, len(content)})):
            for token in self.token.findall(content[start:end]):
                spread = self.spread(user, starts.pop(start), content, start) if start in starts else [(token, -0.001)]
                one, *_ = alternatives = [{"token": t, "logprob": p, "bytes": [*t.encode()]} for t, p in spread]
                tokens.append({**one, "top_logprobs": alternatives[:top]})
        return {"content": tokens, "refusal": None}

    def completion(self, body: dict, texts: list[str], user: str, kind: str) -> dict:
        """A chat completion object, with the fault in it where it has one; bills it."""
        content, enums = self.content(body, user, kind)
        finish, refusal = "stop", None
        if kind == "length":
            content, finish = content[:len(content) // 2], "length"
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or math.inf
        if len(content) // 4 + 1 > limit:
            content, finish = content[:4 * limit - 1], "length"
        if kind in ("empty", "content_filter"):
            content = ""
        if kind == "content_filter":
            finish = "content_filter"
        used = len(content) // 4 + 1
        choice = {"index": 0, "finish_reason": finish, "logprobs": self.logprobs(body, user, content, enums) if body.get("logprobs") else None}
        if kind == "refusal":
            refusal = "I'm sorry, I can't help with that."
        choice["message"] = {"role": "assistant", "content": None if kind in ("null", "refusal") else content, "refusal": refusal}
        count = body.get("n") or 1
        tokens_in, tokens_out = sum(len(t.encode()) for t in texts) // 4 + 1, used * count
        self.bill(body, tokens_in, tokens_out)
        answer = {"id": f"chatcmpl-{self.stats.billed}", "object": "chat.completion", "created": int(time.time()), "model": body.get("model"),
                  "choices": [] if kind == "nochoices" else [{**choice, "index": i} for i in range(count)]}
        if kind != "noreply_usage":
            answer["usage"] = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out}
        return answer

    def bill(self, body: dict, tokens_in: int, tokens_out: int):
        self.stats.billed += 1
        self.stats.billed_tokens_in += tokens_in
        self.stats.billed_tokens_out += tokens_out
        if self.config["count_contents"]:
            self.stats.by_content[content_key(body)] += 1

    # --- HTTP ---

    def respond(self, status: int, payload, header="", kind="application/json") -> bytes:
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        return f"HTTP/1.1 {status} {http.client.responses.get(status, '')}\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n{header}\r\n".encode() + data

    def error(self, kind: str, key="", model="", retry_after=None) -> bytes:
        status, message, type_, code = ERRORS[kind]
        self.stats.by_status[status] += 1
        body = {"error": {"message": message.replace("{key}", key).replace("{model}", str(model)), "type": type_, "param": None, "code": code}}
        return self.respond(status, body, "" if retry_after is None else f"Retry-After: {retry_after}\r\n")

    async def chat(self, key: str, raw: bytes, reader) -> tuple[bytes, bool]:
        """The response to one request, and whether the connection is to be closed after it."""
        stats, config = self.stats, self.config
        stats.requests += 1
        stats.started = stats.started or time.time()
        body = json.loads(raw)
        stats.last_bodies.append(body)
        model = body.get("model")
        if body.get("stream"):
            raise ValueError("this mock does not stream")
        if config["require_key"] is not None and key != config["require_key"]:
            return self.error("401", key), False
        if config["known_models"] is not None and model not in config["known_models"]:
            return self.error("404", model=model), False
        if config["max_concurrent"] and stats.in_flight > config["max_concurrent"] or config["rate_limit"] and self.over_rate():
            return self.error("429", retry_after=config["rate_retry_after"]), False
        texts = [*map(text_of, body["messages"])]
        user = next((t for t, m in zip(reversed(texts), reversed(body["messages"])) if m.get("role") == "user"), "")
        kind = self.fault(texts)
        if kind:
            stats.by_kind[kind] += 1
        if kind == "drop_early":
            return b"", True
        if kind in ERRORS and ERRORS[kind][0] < 500:
            return self.error(kind, key, model, config["retry_after"] if kind == "429ra" else None), False
        if kind == "timeout":
            return await self.hang(body, texts, user, reader)
        if config["latency"] or config["jitter"]:
            await asyncio.sleep(config["latency"] + config["jitter"] * random.random())
        if kind in ERRORS:
            return self.error(kind), False
        self.stats.by_status[200] += 1
        if kind == "html":
            return self.respond(200, b"<html><body>Please sign in to the network.</body></html>", kind="text/html"), False
        data = json.dumps(self.completion(body, texts, user, kind)).encode()
        if kind == "malformed":
            data = data[:len(data) // 2]
        response = self.respond(200, data)
        return (response[:-len(data) // 2], True) if kind == "drop" else (response, False)

    async def hang(self, body, texts, user, reader):
        """Bill first, as the client will not wait for the answer; leave early when it has gone (it sends nothing else meanwhile)."""
        answer = self.completion(body, texts, user, "timeout")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reader.read(1), self.config["hang"])
            return b"", True
        self.stats.by_status[200] += 1
        return self.respond(200, answer), False

    def admin(self, method: str, path: str, raw: bytes) -> bytes:
        """Everything but chat."""
        if path == "/stats":
            cpu = time.process_time()  # of this process since it started: what the mock costs
            return self.respond(200, {**vars(self.stats), "last_bodies": [*self.stats.last_bodies], "cpu": cpu})
        if path == "/configure":
            self.configure(json.loads(raw))
            return self.respond(200, self.config)
        if path == "/reset":
            self.reset()
            return self.respond(200, {})
        if path == "/v1/models":
            return self.respond(200, {"object": "list", "data": [{"id": m, "object": "model", "created": 0, "owned_by": "mock"} for m in self.config["known_models"] or ["mock"]]})
        return self.respond(404, {"error": {"message": f"no route {method} {path}", "type": "invalid_request_error", "param": None, "code": None}})

    async def answer(self, head: bytes, raw: bytes, reader) -> tuple[bytes, bool]:
        method, path, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
        path = path.partition("?")[0]
        if path != "/v1/chat/completions":
            return self.admin(method, path, raw), False
        found = BEARER.search(head)
        auth = found[1].decode("latin-1") if found else ""
        if len(self.stats.auth) < 20 and sha(auth) not in self.stats.auth:  # hashed: a stats dump in a failing test's log must not hold a key
            self.stats.auth.append(sha(auth))
        self.stats.in_flight += 1
        self.stats.max_in_flight = max(self.stats.max_in_flight, self.stats.in_flight)
        try:
            return await self.chat(auth.removeprefix("Bearer "), raw, reader)
        finally:  # before the response is written: the client may send its next request on another connection as soon as it has it
            self.stats.in_flight -= 1

    async def serve(self, reader, writer):
        """One connection; a client that dies in mid-request is no event."""
        try:
            closing = False
            while not closing:
                head = await reader.readuntil(b"\r\n\r\n")
                size = LENGTH.search(head)
                raw = await reader.readexactly(int(size[1])) if size else b""
                try:
                    response, closing = await self.answer(head, raw, reader)
                except (ValueError, KeyError, TypeError, AttributeError) as wrong:  # a request that makes no sense, or a bug in here: either way say which
                    self.stats.by_status[400] += 1
                    response = self.respond(400, {"error": {"message": f"mock: {wrong!r}", "type": "invalid_request_error", "param": None, "code": "mock_error"}})
                writer.write(response)
                await writer.drain()
                closing = closing or bool(CLOSES.search(head))
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()


async def main(config: dict, port: int, with_parent: bool):
    server = await asyncio.start_server(Server(config).serve, "127.0.0.1", port, backlog=4096)
    print("PORT", server.sockets[0].getsockname()[1], flush=True)
    if with_parent:  # stdin ends when the parent does, however it ends
        await asyncio.to_thread(sys.stdin.read)
        os._exit(0)  # not waiting for those who hang
    await server.serve_forever()


class MockApi:
    """The mock in a process of its own, for as long as the `with` block (or this process) lasts."""

    def __init__(self, latency=0.0, **config):
        self.config = {"latency": latency, **config}

    def __enter__(self):
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(self.config, file)
            file.flush()
            # -I and -S: it needs the standard library alone, and starts faster without the environment's .pth files.
            # A session of its own: an interrupt meant for a test or a notebook kernel must not end it.
            self.process = subprocess.Popen([sys.executable, "-IS", __file__, "--config", file.name, "--with-parent"],
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
            line = self.process.stdout.readline()
        if not line.startswith("PORT "):
            self.__exit__()
            raise RuntimeError("the mock API did not start: see its stderr")
        self.port = int(line.split()[1])
        self.url = f"http://127.0.0.1:{self.port}/v1"
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def _ask(self, method: str, path: str, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, None if body is None else json.dumps(body), {"Connection": "close"})
            response = connection.getresponse()
            answer = json.loads(response.read())
        if response.status != 200:
            raise ValueError(answer["error"]["message"])
        return answer

    def stats(self) -> dict:
        return self._ask("GET", "/stats")

    def configure(self, **config) -> dict:
        return self._ask("POST", "/configure", config)

    def reset(self):
        self._ask("POST", "/reset", {})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", help="a JSON file with some of DEFAULTS")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--with-parent", action="store_true", help="end when stdin does")
    args = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a connection is a file
    settings = {}
    if args.config:
        with open(args.config, encoding="utf-8") as file:
            settings = json.load(file)
    try:
        asyncio.run(main(settings, args.port, args.with_parent))
    except KeyboardInterrupt:
        pass
