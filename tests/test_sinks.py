"""Attention over sinks and a window is dense attention with a mask and re-assigned positions; memory stays that of the window."""

import os
import subprocess
import sys

import pytest
import torch
from dummy import ENV
from test_asking import TINY
from test_pairs import CHATML
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from flows.cli.chat import chat
from longlora.asking.sinks import Dialogue, sink_cache
from longlora.data.dialogue import tokenised
from longlora.data.instructions import Turn
from longlora.model.load import open_model, open_tokenizer

torch.set_num_threads(1)
SHAPE = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6}
WINDOW = 64
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 2.0, "original_max_position_embeddings": 32},
}


def llama(rope="default", dtype=torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(**SHAPE, num_key_value_heads=2, max_position_embeddings=WINDOW, rope_parameters=ROPES[rope])
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def rotated(x_HLD, position_L, inverse_F, scale):
    """Llama's rotary embedding, each pair of dimensions as one complex number."""
    half = x_HLD.shape[-1] // 2
    pairs = torch.complex(x_HLD[..., :half], x_HLD[..., half:])
    spun = scale * pairs * torch.polar(torch.ones(()).double(), position_L[:, None].double() * inverse_F)
    return torch.cat([spun.real, spun.imag], dim=-1)


def dense(model, tokens, chunks, *, sinks, size):
    """Logits (L, V), layer by layer over the whole text: queries of one chunk see the sinks, and the last tokens that fit
    beside it, at the positions that these have when they stand in a row."""
    rotary = model.model.rotary_emb
    inverse, scale = rotary.inv_freq.double(), rotary.attention_scaling
    h_LE = model.model.embed_tokens(torch.tensor(tokens))
    heads, groups, d = 6, 2, 8
    for layer in model.model.layers:
        x, attention = layer.input_layernorm(h_LE), layer.self_attn
        q, k, v = (
            proj(x).view(len(tokens), n, d).transpose(0, 1)
            for proj, n in ((attention.q_proj, heads), (attention.k_proj, groups), (attention.v_proj, groups))
        )
        k, v = (t.repeat_interleave(heads // groups, dim=0) for t in (k, v))
        outputs, start = [], 0
        for new in chunks:
            end = start + new
            seen = list(range(end)) if end <= size else [*range(sinks), *range(end - (size - sinks), end)]
            row = torch.arange(len(seen))
            q_pos = torch.tensor([seen.index(i) for i in range(start, end)])
            scores = (
                rotated(q[:, start:end], q_pos, inverse, scale) @ rotated(k[:, seen], row, inverse, scale).mT / d**0.5
            )
            scores = scores.masked_fill(row[None, :] > q_pos[:, None], -torch.inf)
            outputs.append((scores.softmax(-1) @ v[:, seen]).transpose(0, 1).flatten(1))
            start = end
        h_LE = h_LE + attention.o_proj(torch.cat(outputs))
        h_LE = h_LE + layer.mlp(layer.post_attention_layernorm(h_LE))
    return model.lm_head(model.model.norm(h_LE))


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(("sinks", "size"), [(4, 13), (1, 9), (0, 12)])
def test_it_is_dense_attention_with_a_mask_and_reassigned_positions(rope, sinks, size):
    model = llama(rope)
    chunks = [5, 1, 8, 1, 1, 3, *[1] * 20, 7, *[1] * 10]
    tokens = torch.randint(97, (sum(chunks),), generator=torch.Generator().manual_seed(3)).tolist()
    cache = sink_cache(model, size=size, sinks=sinks)
    found = [
        model(input_ids=piece[None], past_key_values=cache, use_cache=True).logits[0]
        for piece in torch.tensor(tokens).split(chunks)
    ]
    wanted = dense(model, tokens, chunks, sinks=sinks, size=size)
    torch.testing.assert_close(torch.cat(found), wanted, rtol=0, atol=2e-6)
    assert len(tokens) > 4 * size
    for layer in cache.layers:
        assert layer.keys.shape[-2] == layer.values.shape[-2] == size


def test_until_the_window_is_full_nothing_is_different():
    model = llama()
    tokens = torch.arange(40)[None]
    cache = sink_cache(model, size=41)
    found = torch.cat(
        [model(input_ids=t, past_key_values=cache).logits for t in tokens.split([19, 1, 20], dim=1)], dim=1
    )
    torch.testing.assert_close(found, model(input_ids=tokens).logits, rtol=0, atol=2e-6)


def test_generate_takes_the_cache_and_outgrows_the_context_fourfold():
    model = llama()
    start, new = torch.arange(9)[None], 4 * WINDOW
    cache = sink_cache(model, size=WINDOW)
    out = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
    )
    assert out.shape[1] == 9 + new
    assert all(layer.keys.shape[-2] == WINDOW for layer in cache.layers)
    wanted = dense(model, out[0, :-1].tolist(), [9, *[1] * (new - 1)], sinks=4, size=WINDOW)
    assert wanted[8:].argmax(-1).tolist() == out[0, 9:].tolist()


def test_what_does_not_go_is_refused():
    model = llama()
    with pytest.raises(ValueError, match="a window of 65 tokens: .* at most the 64 that the model reads"):
        sink_cache(model, size=65)
    with pytest.raises(ValueError, match=r"above 8 \(twice the 4 first tokens"):
        sink_cache(model, size=8)
    part = StableLmForCausalLM(StableLmConfig(**SHAPE, num_key_value_heads=2, max_position_embeddings=WINDOW)).eval()
    assert len(sink_cache(part, size=32).layers[0].freq_F) == 1  # a quarter of 8 dimensions turns
    other = CohereForCausalLM(
        CohereConfig(**SHAPE, num_key_value_heads=2, max_position_embeddings=WINDOW, eos_token_id=1)
    ).eval()
    with pytest.raises(ValueError, match="the keys of a cohere model do not turn as Llama's do"):
        sink_cache(other, size=32)


WORDS = ["Who read the report?", "When did the committee meet?", "Was it long?"]


@pytest.mark.parametrize("prompt", ["authors", "chat"])
def test_while_it_fits_a_dialogue_has_the_tokens_of_training_and_greedy_answers(prompt):
    model, words = open_model(TINY), open_tokenizer(TINY)
    words.chat_template = CHATML if prompt == "chat" else None
    read: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: read.extend(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    dialogue = Dialogue(model, tokenizer=words, size=512, max_new_tokens=12)
    assert dialogue.prompt == prompt
    turns: list[Turn] = []
    for text in WORDS:
        told: list[str] = []
        del read[: 8 if not turns else 0]  # the trial of the keys
        answer = dialogue.say(text, tell=told.append)
        assert "".join(told).strip() == answer
        raw = words.decode([*read, *dialogue.unread][-12:])
        turns += [Turn("user", text), Turn("assistant", raw)]
        asked = tokenised(turns, tokenizer=words, prompt=prompt).tokens.tolist()
        assert read == asked[: len(read)] and dialogue.cache.get_seq_length() == len(read)
        ids = torch.tensor([read[:-11]])
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        del read[len(ids[0]) + 11 :]
        assert plain[0, ids.shape[1] :].tolist() == [*read[-11:], *dialogue.unread]
    assert dialogue.forgotten == 0


def test_a_dialogue_goes_on_far_beyond_the_context():
    dialogue = Dialogue(open_model(TINY), tokenizer=open_tokenizer(TINY), size=96, max_new_tokens=24)
    while dialogue.cache.get_seq_length() < 4 * 96:
        assert dialogue.say("And what did the members of the House say to the report of the committee? " * 2)
        assert max(layer.keys.shape[-2] for layer in dialogue.cache.layers) <= 96
    assert dialogue.forgotten >= 3 * 96
    with pytest.raises(ValueError, match="nothing was said"):
        dialogue.say(" ")


def test_the_command_says_once_when_the_beginning_is_forgotten(tmp_path):
    command = [sys.executable, "-m", "flows.cli.main", "chat", "--model", str(TINY)]
    done = subprocess.run(
        [*command, "--window", "64", "--max-new-tokens", "8"],
        cwd=tmp_path,
        env=os.environ | ENV,
        input="\n".join(WORDS) + "\n",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 3
    assert done.stderr.count("note: the dialogue has outgrown 64 tokens") == 1


def test_a_window_of_no_tokens_is_refused_as_any_other_that_is_too_small():
    with pytest.raises(ValueError, match="a window of 0 tokens: above 8"):
        chat(str(TINY), window=0, prompt=None, max_new_tokens=8)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{{ raise_exception('Only the Pope talks.') }}",
            r"refuses turns of user, assistant, user \(Only the Pope",
        ),
        ("{{ messages[0].content }}", "does not say two turns of a user"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "does not say two turns of a user"),
        ("{% if %}", "refuses turns of"),
    ],
)
def test_a_template_that_takes_no_second_turn_is_named(template, said):
    words = open_tokenizer(TINY)
    words.chat_template = template
    with pytest.raises(ValueError, match=said):
        Dialogue(open_model(TINY), tokenizer=words, size=64, max_new_tokens=8)
