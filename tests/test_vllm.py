"""vLLM reads a model under each scaling as transformers does, to the end of the context.

vLLM pins another transformers, so it has an environment of its own, whose Python LONGLORA_VLLM names (docs/longqa.md). On a
machine without CUDA its builds for CPUs serve.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from longlora.model.position import extend

TINY = Path("tiny/model").resolve()
WINDOW, CONTEXT = 512, 2048

pytestmark = pytest.mark.skipif("LONGLORA_VLLM" not in os.environ, reason="LONGLORA_VLLM: a Python that has vLLM")

READ = """
import json, sys
from vllm import LLM, SamplingParams

tokens, most, folder = json.load(open(sys.argv[1])), int(sys.argv[2]), sys.argv[3]
model = LLM(model=folder, dtype="float32", max_model_len=most, enforce_eager=True, max_num_seqs=1)
read = model.generate([{"prompt_token_ids": tokens}], SamplingParams(max_tokens=1, prompt_logprobs=0))
found = read[0].prompt_logprobs[1:]
json.dump([at[token].logprob for at, token in zip(found, tokens[1:])], open(sys.argv[4], "w"))
"""


@pytest.mark.parametrize(
    ("first", "method", "length", "most"),
    [
        ("none", "linear", CONTEXT - 1, CONTEXT),
        ("none", "ntk", CONTEXT - 1, CONTEXT),
        ("none", "yarn", CONTEXT - 1, CONTEXT),
        ("none", "llama3", CONTEXT - 1, CONTEXT),
        ("yarn", "yarn", CONTEXT - 1, CONTEXT),
        ("llama3", "yarn", CONTEXT - 1, CONTEXT),
        ("none", "longrope", CONTEXT - 1, CONTEXT),
        (
            "none",
            "longrope",
            WINDOW - 1,
            WINDOW,
        ),  # its short texts are the base's only where vLLM is told that there are no others
    ],
)
def test_log_probabilities_are_those_of_transformers(first, method, length, most, tmp_path):
    config = AutoConfig.from_pretrained(TINY)
    if first != "none":
        config = extend(config, method=first, context=2 * WINDOW)
    config = extend(config, method=method, context=CONTEXT)
    AutoModelForCausalLM.from_pretrained(TINY, config=config, dtype=torch.float32).save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.save_pretrained(tmp_path / "model")
    tokens = tokenizer(Path("README.md").read_text()).input_ids[:length]
    (tmp_path / "tokens.json").write_text(json.dumps(tokens))

    files = [tmp_path / name for name in ("tokens.json", "model", "found.json")]
    order = [os.environ["LONGLORA_VLLM"], "-c", READ, files[0], str(most), files[1], files[2]]
    told = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    subprocess.run(order, check=True, env=os.environ | told, cwd=tmp_path)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        logits_LV = model(torch.tensor([tokens])).logits[0]
    expected = logits_LV[:-1].log_softmax(-1).gather(1, torch.tensor(tokens)[1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(json.loads(files[2].read_text())), expected, rtol=0, atol=1e-3)
