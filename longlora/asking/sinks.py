"""Dialogues that outgrow the context: the first tokens and the last ones are kept, everything between is forgotten.

StreamingLLM (Xiao et al. 2024, arXiv 2309.17453): a model rests attention that it has no use for on its first tokens, the sinks;
while they stay, a window can slide for ever, in bounded memory. Positions are those inside the cache, not in the text. Rotary
attention knows only their differences, so nothing moves but the sinks: their keys are turned, from as they were first
written, until they stand directly before the window. Held in float64 to dense attention with an explicit mask and re-assigned
positions, tests/test_sinks.py. What is forgotten is forgotten: this makes a dialogue endless, not a context longer.

Letters: B batch, H key/value heads, S keys, D head size, F rotary frequencies (2F of a head's D dimensions turn).
"""

import re
from collections.abc import Callable, Iterator

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from longlora.asking.asking import CallbackStreamer, ends, without_end
from longlora.data.prompt import WORD, Frame, Prompt, continuation, frame, rendered
from longlora.data.tokenise import as_words
from longlora.model.cache import shareable
from longlora.model.position import frequencies, rotary

SINKS = 4
"""First tokens that are kept; the paper finds that four do, and that fewer do not."""


class SinkLayer(DynamicLayer):
    """One layer's cache: at most `size` keys, the first `sinks` of them for ever. An update has at most size - sinks tokens."""

    is_croppable = False

    def __init__(self, *, sinks: int, size: int, freq_F: torch.Tensor) -> None:
        super().__init__()
        self.sinks, self.size, self.freq_F = sinks, size, freq_F
        self.seen = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that the new tokens see, themselves included; shapes (B, H, S, D)."""
        new = key_states.shape[-2]
        assert new <= self.size - self.sinks
        if self.keys is not None and self.values is not None:
            surplus = max(0, self.keys.shape[-2] + new - self.size)
            self.keys, self.values = self.without(self.keys, surplus), self.without(self.values, surplus)
        keys_BHSD, values_BHSD = super().update(key_states, value_states)
        self.seen += new
        gone = self.seen - keys_BHSD.shape[-2]
        if not gone:
            return keys_BHSD, values_BHSD
        moved_BHSD = turned(keys_BHSD[:, :, : self.sinks], by=gone, freq_F=self.freq_F)
        return torch.cat([moved_BHSD, keys_BHSD[:, :, self.sinks :]], dim=-2), values_BHSD

    def without(self, states_BHSD: torch.Tensor, surplus: int) -> torch.Tensor:
        """Without the oldest `surplus` tokens behind the sinks."""
        return torch.cat([states_BHSD[:, :, : self.sinks], states_BHSD[:, :, self.sinks + surplus :]], dim=-2)

    def get_seq_length(self) -> int:
        """Tokens seen, not tokens kept: from it transformers counts on the positions of new tokens."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that an update of `query_length` tokens will see, and the position of the first: they stand in a row."""
        kept = min(self.seen + query_length, self.size)
        return kept, self.seen + query_length - kept


def turned(keys_BHSD: torch.Tensor, *, by: int, freq_F: torch.Tensor) -> torch.Tensor:
    """Rotary keys as they were `by` positions further on."""
    angle_F = by * freq_F.double()
    cos_F, sin_F = (f(angle_F).to(keys_BHSD) for f in (torch.cos, torch.sin))
    half = len(freq_F)
    one, two, rest = keys_BHSD[..., :half], keys_BHSD[..., half : 2 * half], keys_BHSD[..., 2 * half :]
    return torch.cat([one * cos_F - two * sin_F, two * cos_F + one * sin_F, rest], dim=-1)


def sink_cache(model: PreTrainedModel, *, size: int, sinks: int = SINKS) -> Cache:
    """An empty cache for `model` that never holds more than `size` tokens.

    Raises:
        ValueError: the window is beyond what the model reads, or too small for the sinks; positions are not rotary, depend on
            the length, or turn in another way than Llama's.
    """
    config = model.config.get_text_config()
    if not 2 * sinks < size <= config.max_position_embeddings:
        raise ValueError(
            f"a window of {size} tokens: above {2 * sinks} (twice the {sinks} first tokens that are kept), and at most the "
            f"{config.max_position_embeddings} that the model reads"
        )
    if not shareable(model):
        raise ValueError(
            f"a {config.model_type} model whose layers keep no whole cache, or whose positions know the length"
        )
    freq_F, _ = frequencies(config, rotary(config))
    if not turns_as_llama(model, freq_F):
        raise ValueError(f"the keys of a {config.model_type} model do not turn as Llama's do, so they cannot be moved")
    return Cache(layers=[SinkLayer(sinks=sinks, size=size, freq_F=freq_F) for _ in range(config.num_hidden_layers)])


@torch.inference_mode()
def turns_as_llama(model: PreTrainedModel, freq_F: torch.Tensor) -> bool:
    """Whether keys one position further on are what `turned` makes of them: tried, in the first layer."""
    keys = []
    for first in (0, 1):
        cache = DynamicCache(config=model.config)
        # several tokens: the key of a padding token is nothing, however turned
        tokens_1L = torch.arange(4, device=model.device)[None]
        model(input_ids=tokens_1L, position_ids=tokens_1L + first, past_key_values=cache, use_cache=True)
        keys.append(cache.layers[0].keys)
    close = 0.05 if keys[0].dtype in (torch.bfloat16, torch.float16) else 1e-4
    return torch.allclose(
        turned(keys[0], by=1, freq_F=freq_F), keys[1], rtol=0, atol=close * float(keys[0].abs().max())
    )


class Dialogue:
    """Turn after turn, without end, in the memory of one window. Answers are greedy.

    Raises (when made):
        ValueError: as `sink_cache`; the prompt is chat, and the tokenizer has no chat template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase,
        size: int,
        max_new_tokens: int,
        sinks: int = SINKS,
        prompt: Prompt | None = None,
    ) -> None:
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.cache = sink_cache(model, size=size, sinks=sinks)
        self.size = size
        self.chunk = max(1, (size - sinks) // 2)  # at least half of the window is seen beside new words
        self.prompt: Prompt = prompt or ("chat" if tokenizer.chat_template else "authors")
        self.frame, self.between = turns(tokenizer, self.prompt)
        self.ends = ends(model, tokenizer=tokenizer, prompt=self.prompt)
        self.unread: list[int] = []  # the last token of an answer: chosen, not yet read

    @property
    def forgotten(self) -> int:
        """Tokens that the model does not see any more."""
        return max(0, self.cache.get_seq_length() - self.size)

    def turn(self, words: str) -> list[int]:
        """What has to be read of a user's words: the end of the turn before, and the frame around them, as in training."""
        words = as_words(words, tokenizer=self.tokenizer)
        if not self.unread:
            return self.frame.open(words + self.frame.after)
        text, ended = self.between + words + self.frame.after, self.unread[0] in self.ends
        if self.prompt != "chat":
            end = self.tokenizer.eos_token_id
            closing = [end] if isinstance(end, int) and self.prompt == "authors" and not ended else []
            return self.unread + closing + continuation(self.tokenizer, text, after=WORD)
        mark = str(self.tokenizer.decode(self.unread)) if ended else ""
        if not text.startswith(mark):  # it ended otherwise than the template would have it
            mark = ""
        return self.unread + continuation(self.tokenizer, text.removeprefix(mark), after=WORD + mark)

    @torch.inference_mode()
    def say(self, words: str, *, tell: Callable[[str], None] | None = None) -> str:
        """The answer to a user's words, told to `tell` as it comes.

        Raises:
            ValueError: there are no words.
        """
        if not words.strip():
            raise ValueError("nothing was said")
        streamer = CallbackStreamer(self.tokenizer, tell or (lambda text: None), ends=self.ends)
        tokens = self.turn(words)
        streamer.put(torch.tensor(tokens))  # the first is passed over: it is the prompt
        answer: list[int] = []
        for token in self.greedy(tokens):
            answer.append(token)
            streamer.put(torch.tensor([token]))
        streamer.end()
        self.unread = answer[-1:]
        return str(self.tokenizer.decode(without_end(answer, ends=self.ends), skip_special_tokens=True)).strip()

    def greedy(self, tokens: list[int]) -> Iterator[int]:
        """Tokens of the answer, its end mark included; transformers' `generate` would want all earlier ones again."""
        for _ in range(self.max_new_tokens):
            last = 0
            for start in range(0, len(tokens), self.chunk):
                piece_1L = torch.tensor([tokens[start : start + self.chunk]], device=self.model.device)
                out = self.model(input_ids=piece_1L, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
                last = int(out.logits[0, -1].argmax())
            tokens = [last]
            yield last
            if tokens[0] in self.ends:
                return


def turns(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[Frame, str]:
    """What stands around a user's words in a dialogue, and between an answer (in a template its end mark, too) and the next words.

    Raises:
        ValueError: the prompt is chat, and there is no chat template, or one that does not take a second turn.
    """
    if prompt != "chat":
        around = frame(tokenizer, prompt, plain="\n")
        return around, "\n" if prompt == "plain" else around.before
    if not tokenizer.chat_template:
        raise ValueError(
            "--prompt chat needs a tokenizer with a chat template, and this one has none: authors or plain"
        )
    said = ["THE-FIRST-WORDS", "THE-ANSWER-TO-THEM", "THE-SECOND-WORDS"]
    three = [{"role": role, "content": words} for role, words in zip(("user", "assistant", "user"), said, strict=True)]
    text = rendered(tokenizer, three, open_turn=True)
    parts = re.split("|".join(said), text)
    if re.findall("|".join(said), text) != said:
        raise ValueError(
            "the chat template does not say two turns of a user and the answer between them, each once and as they are: "
            "--prompt authors or plain"
        )
    first, between, after = parts[0], parts[2], parts[3]
    return Frame(tokenizer, first, after, marked=True), between
