"""`transformers` generate, a batch of responses per turn: python generate.py MODEL PROMPTS TOKENS DTYPE"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from turns import ON_GPU, THREADS, turns

model_folder, prompts_file, tokens, dtype = sys.argv[1:]
torch.set_num_threads(THREADS)
device = torch.device("cuda" if ON_GPU else "cpu")
tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype)).to(device).eval()
batch = tokenizer(Path(prompts_file).read_text().splitlines(), return_tensors="pt", padding=True).to(device)
settings = {"do_sample": True, "top_k": 0, "top_p": 1.0, "pad_token_id": tokenizer.pad_token_id}
for _ in turns():
    out = model.generate(**batch, max_new_tokens=int(tokens), min_new_tokens=int(tokens), **settings)
    assert out.shape[1] == batch.input_ids.shape[1] + int(tokens)
