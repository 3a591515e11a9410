"""CTranslate2, a batch of responses per turn: python ct2.py MODEL PROMPTS TOKENS OUTPUT

The weights are converted without rounding; tokens are drawn from the whole distribution, as by the others.
"""

import sys
from pathlib import Path

import ctranslate2
from ctranslate2.converters import TransformersConverter
from transformers import AutoTokenizer
from turns import THREADS, turns

model_folder, prompts_file, tokens, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_folder)
TransformersConverter(model_folder).convert(output, quantization="float32", force=True)
generator = ctranslate2.Generator(output, device="cpu", compute_type="float32", intra_threads=THREADS, inter_threads=1)
prompts = [tokenizer.tokenize(prompt) for prompt in Path(prompts_file).read_text().splitlines()]
settings = {"sampling_topk": 0, "sampling_temperature": 1.0, "include_prompt_in_result": False, "beam_size": 1}
for _ in turns():
    results = generator.generate_batch(prompts, max_length=int(tokens), min_length=int(tokens), **settings)
    assert all(len(result.sequences_ids[0]) == int(tokens) for result in results)
