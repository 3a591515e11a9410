"""A small server with vLLM's API on 127.0.0.1 or a Unix socket, which samples from a tiny model and can misbehave.

It computes with plain `transformers` and PEFT, one token after the other without a cache. `server.fault_name` is one
of FAULTS, and `server.fault_from` the number of requests for tokens before it. As a script, it takes the place of the
Python of an environment with vLLM: `python -m vllm.entrypoints.openai.api_server --uds ...`.
"""

import contextlib
import copy
import json
import os
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

KEY = "l00pbackvllmkey5d1"
FAULTS = {
    "late": "did not answer within 2 s",
    "dies": "broke off before its answer",
    "breaks off": "broke off before its answer",
    "broken": "status 500: the engine has died",
    "bad request": "status 400: this model's maximum context length is 16 tokens",
    "not json": "is not what vLLM answers",
    "no choice": "is not what vLLM answers",
    "no ids": "comes without token_ids",
    "other prompt": "answers another prompt",
    "too long": "has 99 tokens; max_new_tokens=8",
    "empty": "has 0 tokens",
    "beyond": "holds the token 259; the model has 259",
    "no log-probs": "without a log-prob for each",
    "too few log-probs": "without a log-prob for each",
    "log-probs not finite": "without a log-prob for each",
    "goes on": "goes on after token",
    "cut": "ended after 3 of 8 tokens, for the reason 'length'",
    "other model": "was sampled by 'another', and 'konic-",
    "no adapter": "from the model before training, and not from the current weights",
    "stale adapter": "from the adapter of iteration 2, which is out of date",
    "other weights": "differ from the trainer's by",
    "raw log-probs": "processed_logprobs",
    "will not load": "status 400: no room.*--enable-lora and --max-lora-rank=8",
    "not listed": "does not list it as konic-",
}
"""What goes wrong -> what the error says."""


class LoopbackVllm:
    """The server; `address` is where it listens, `requests` what it was asked for tokens."""

    def __init__(self, folder, key=KEY, uds=None, max_model_len=56):
        self.base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.folder, self.key, self.max_model_len = str(folder), key, max_model_len
        self.adapters, self.earlier, self.requests, self.log = {}, [], [], []
        self.fault_name, self.fault_from = None, 0
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"vllm": self})
        kind = _UnixServer if uds else _TCPServer
        self.server = kind(uds or ("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.address = f"unix:{uds}" if uds else f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    @property
    def fault(self):
        return self.fault_name if len(self.requests) >= self.fault_from else None

    def load(self, name, path):
        model = PeftModel.from_pretrained(copy.deepcopy(self.base), path).eval()
        with self.lock:
            self.adapters[name] = (path, model)
            self.earlier.append(model)

    def model(self, name):
        if self.fault == "no adapter" or name not in self.adapters:
            return self.base
        return self.earlier[-2] if self.fault == "stale adapter" else self.adapters[name][1]

    @torch.no_grad()
    def sample(self, model, body):
        """The tokens of a response, their log-probs, and why it ended."""
        generator = torch.Generator().manual_seed(body["seed"])
        ids, log_probs = list(body["prompt"]), []
        start = len(ids)
        while True:
            logits = model(torch.tensor([ids])).logits[0, -1].float()
            scaled = (logits / body["temperature"]).log_softmax(-1)
            token = int(torch.multinomial(scaled.exp(), 1, generator=generator))
            ids.append(token)
            shown = logits.log_softmax(-1) if self.fault == "raw log-probs" else scaled
            log_probs.append(shown[token].item())
            text = self.tokenizer.decode(ids[start:], skip_special_tokens=body["skip_special_tokens"])
            stop = () if self.fault == "ignores stop" else body["stop"]
            found = next((string for string in stop if string in text), None)
            if token in body["stop_token_ids"] or found:
                return ids[start:], log_probs, "stop", found or token
            if len(ids) - start == body["max_tokens"]:
                return ids[start:], log_probs, "length", None


class _TCPServer(ThreadingHTTPServer):
    request_queue_size = 256


class _UnixServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def address_string(self):
        return "unix"

    def answer(self, content, status=200):
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) + (9 if self.vllm.fault == "breaks off" else 0)))
        self.end_headers()
        self.wfile.write(data)

    def error(self, message, status):
        self.answer({"error": {"message": message, "type": "BadRequestError"}}, status)

    def is_allowed(self):
        if self.path.startswith("/v1") and self.headers["Authorization"] != f"Bearer {self.vllm.key}":
            self.error("Unauthorized", 401)
            return False
        return True

    def do_GET(self):
        vllm = self.vllm
        vllm.log.append(self.path)
        if self.path == "/health":
            self.answer("")
        elif self.is_allowed():
            base = {"id": "base", "root": vllm.folder, "parent": None, "max_model_len": vllm.max_model_len}
            adapters = [{"id": name, "root": path, "parent": "base"} for name, (path, _) in vllm.adapters.items()]
            self.answer({"data": [base] if vllm.fault == "not listed" else [base, *adapters]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.vllm.log.append(self.path)
        if self.is_allowed():
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                getattr(self, self.path.removeprefix("/v1").strip("/"))(body)

    def load_lora_adapter(self, body):
        if self.vllm.fault == "will not load":
            self.error("no room", 400)
        else:
            self.vllm.load(body["lora_name"], body["lora_path"])
            self.answer("Success: it was added.")

    def unload_lora_adapter(self, body):
        if self.vllm.adapters.pop(body["lora_name"], None) is None:
            self.error("cannot be found", 404)
        else:
            self.answer("Success: it was removed.")

    def collective_rpc(self, body):
        assert body["method"] == "reload_weights"
        model = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"], dtype=torch.float32)
        self.vllm.base = model.eval()
        self.answer({"results": [None]})

    def reset_prefix_cache(self, body):
        self.answer({"success": True})

    def completions(self, body):
        vllm = self.vllm
        with vllm.lock:
            vllm.requests.append(body)
            fault = vllm.fault
            if fault == "other weights":
                model = copy.deepcopy(vllm.base)
                torch.manual_seed(7)
                for weight in model.parameters():
                    weight.data += 0.05 * torch.randn_like(weight)
            else:
                model = vllm.model(body["model"])
            ids, log_probs, reason, stopped = vllm.sample(model, body)
        if fault == "late":
            time.sleep(5)
        if fault == "dies":
            self.connection.shutdown(2)
            return
        if fault == "broken":
            self.error("the engine has died", 500)
            return
        if fault == "bad request":
            self.error("this model's maximum context length is 16 tokens", 400)
            return
        if fault == "too long":
            ids, log_probs = [5] * 99, [-1.0] * 99
        if fault == "empty":
            ids, log_probs = [], []
        if fault == "cut":
            ids, log_probs, reason, stopped = [5] * 3, [-1.0] * 3, "length", None
        if fault == "goes on":
            ids, log_probs = [5, *body["stop_token_ids"][:1], 6], [-1.0] * 3
        choice = {
            "index": 0, "text": "", "finish_reason": reason, "stop_reason": stopped, "token_ids": ids,
            "prompt_token_ids": body["prompt"], "logprobs": {"token_logprobs": log_probs},
        }  # fmt: skip
        if fault == "beyond":
            choice["token_ids"] = [*ids[:-1], 259]
        if fault == "no ids":
            del choice["token_ids"]
        if fault == "other prompt":
            choice["prompt_token_ids"] = body["prompt"][1:]
        if fault == "no log-probs":
            choice["logprobs"] = None
        if fault == "too few log-probs":
            log_probs.pop()
        if fault == "log-probs not finite":
            log_probs[0] = float("nan")
        if fault == "not json":
            self.answer("<html>")
            return
        name = "another" if fault == "other model" else body["model"]
        self.answer({"model": name, "choices": [] if fault == "no choice" else [choice]})


def _main():
    arguments = sys.argv[1:]
    folder, socket = (arguments[arguments.index(name) + 1] for name in ("--model", "--uds"))
    assert (os.environ["VLLM_NO_USAGE_STATS"], os.environ["DO_NOT_TRACK"]) == ("1", "1")
    Path(os.environ["LOOPBACK_PID"]).write_text(f"{os.getpid()} {' '.join(arguments)}")
    vllm = LoopbackVllm(folder, os.environ["VLLM_API_KEY"], socket)
    vllm.thread.start()
    if "--die" in arguments:
        while not vllm.requests:
            time.sleep(0.02)
        os._exit(3)
    vllm.thread.join()


if __name__ == "__main__":
    _main()
