"""Pipelines that encode a prompt: where its words are is read off the ids that encoders get."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from family_cases import BLOCKS, IMAGE, VIDEO, Model, dits, joint, seeded, tokenizers, unets
from family_oracle import Call, Tokens
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

PROMPTS = ("A Red zebra, on the shirt: ZEBRA!", "the red hat; a shirt, a cat and the zebra")
NEGATIVE = ("a dog", "a very bad dog on a hat, and a cat")
WORDS = ("zebra", "shirt")
T5_TEXT = 48


class TextEncoder(nn.Module):
    """Of each token its embedding and its place's; notes what it was given."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, width: int, pooled: int = 0, *, first: bool = False) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(700, width), nn.Embedding(800, width)
        self.pool = nn.Linear(width, pooled) if pooled else None
        self.first = first
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPooling:
        self.seen.append((input_ids, attention_mask))
        hidden = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        pooled = None if self.pool is None else self.pool(hidden[:, 0])
        states = (hidden,) * 36
        if self.first:  # where the projected embedding comes first
            return BaseModelOutputWithPooling(pooled, hidden_states=states)
        return BaseModelOutputWithPooling(hidden, pooled, states)


def spelled(tokenizer: Any, ids: Sequence[int], words: Sequence[str]) -> dict[str, list[int]]:
    """Which of the ids spell a word, all of its occurrences."""
    text, owners, alone = "", [], []
    for place, piece in enumerate(tokenizer.convert_ids_to_tokens(ids)):
        if piece == "\u2581":  # where a word begins, to which it belongs
            alone = [place]
            continue
        for mark in ("</w>", "\u2581", "\u0120"):
            piece = piece.replace(mark, "")
        text += piece.lower()
        for _ in piece:
            owners.append([*alone, place])
            alone = []
    found = {}
    for word in words:
        starts = [at for at in range(len(text)) if text.startswith(word, at)]
        assert starts
        found[word] = sorted({o for at in starts for i in range(len(word)) for o in owners[at + i]})
    return found


def read(pipe: Any, sample: int, number: str = "", *, dropped: int = 0, valid: bool = False) -> Any:
    """Positions of the words among the tokens that a pipeline keeps, and how many it keeps."""
    ids, mask = getattr(pipe, f"text_encoder{number}").seen[0]
    row = ids[sample].tolist()
    if valid:
        assert mask is not None
        row = [token for token, keep in zip(row, mask[sample].tolist(), strict=True) if keep]
    row = row[dropped:]
    return spelled(getattr(pipe, f"tokenizer{number}"), row, WORDS), len(row)


Found = Mapping[str, Sequence[int]]


def of_prompts(
    pipe: Any,
    run: Callable[[], Tensor],
    layers: str,
    part: str,
    samples: int,
    tokens: Callable[[Call, int], tuple[Tokens, range] | None],
    **options: Any,
) -> Model:
    """``tokens`` gives the words, and where the whole text is, which ``all`` is."""

    def found(call: Call, sample: int) -> Tokens | None:
        given = tokens(call, sample)
        if given is None:
            return None
        of, text = given
        return replace(of, words={**of.words, "all": text})

    return Model(pipe, run, layers, part, found, [*WORDS], samples, **options)


def flux(samples: int = 1) -> Model:
    made = seeded(dits.BUILDERS["flux"], "kontext")
    pipe = made.pipe
    parts = seeded(lambda: (TextEncoder(32, 32), TextEncoder(32)))
    pipe.register_modules(
        text_encoder=parts[0],
        tokenizer=tokenizers.clip_tokenizer(),
        text_encoder_2=parts[1],
        tokenizer_2=tokenizers.t5_tokenizer(),
    )
    inputs = {k: v for k, v in made.inputs.items() if "embeds" not in k}
    inputs |= {
        "prompt": [*PROMPTS[:samples]],
        "negative_prompt": [*NEGATIVE[:samples]],
        "true_cfg_scale": 2.0,
        "max_sequence_length": T5_TEXT,
    }

    def tokens(call: Call, sample: int) -> Any:
        words, length = read(pipe, sample, "_2")
        assert length == T5_TEXT
        of = joint(("text", length), ("generated", IMAGE), (0, (3, 6)), words=words)
        return of(call, sample), range(length)

    return of_prompts(pipe, runs(pipe, inputs), BLOCKS, "first call", samples, tokens)


def runs(pipe: Any, inputs: Mapping[str, Any], output: str = "images") -> Callable[[], Tensor]:
    def run() -> Tensor:
        # pipelines write into lists of prompts
        given = {k: [*v] if isinstance(v, list) else v for k, v in inputs.items()}
        return getattr(pipe(**given, generator=torch.Generator().manual_seed(0)), output)

    return run


def sd3(samples: int = 1) -> Model:
    made = seeded(dits.BUILDERS["sd3"])
    pipe = made.pipe
    parts = seeded(
        lambda: (TextEncoder(10, 12, first=True), TextEncoder(14, 12, first=True), TextEncoder(32))
    )
    for number, encoder in zip(("", "_2", "_3"), parts, strict=True):
        make = tokenizers.t5_tokenizer if number == "_3" else tokenizers.clip_tokenizer
        pipe.register_modules(**{f"text_encoder{number}": encoder, f"tokenizer{number}": make()})
    pipe.tokenizer_max_length = 77
    inputs = {k: v for k, v in made.inputs.items() if "embeds" not in k}
    inputs |= {
        "prompt": [*PROMPTS[:samples]],
        "negative_prompt": [*NEGATIVE[:samples]],
        "max_sequence_length": T5_TEXT,
    }

    def tokens(call: Call, sample: int) -> Any:
        clip, t5 = read(pipe, sample)[0], read(pipe, sample, "_3")[0]
        words = {word: [*clip[word], *(77 + i for i in t5[word])] for word in WORDS}
        of = joint(("generated", IMAGE), ("text", 77 + T5_TEXT), words=words)
        return of(call, sample), range(35, 35 + 77 + T5_TEXT)

    layers = r"^transformer_blocks\.\d+\.attn$"
    return of_prompts(pipe, runs(pipe, inputs), layers, "second", samples, tokens)


def qwen(samples: int = 1, side: str = "left") -> Model:
    """Its template is dropped, and texts are padded to the longest, which is masked."""
    made = seeded(dits.BUILDERS["qwen"], "text")
    pipe = made.pipe
    tokenizer = tokenizers.qwen_tokenizer(side)
    pipe.register_modules(text_encoder=seeded(TextEncoder, 24), tokenizer=tokenizer)
    # our vocabulary has no whole words of it
    dropped = len(tokenizer(pipe.prompt_template_encode.split("{}")[0])["input_ids"])
    pipe.prompt_template_encode_start_idx = dropped
    inputs = {k: v for k, v in made.inputs.items() if "embeds" not in k}
    inputs |= {"prompt": [*PROMPTS[:samples]], "negative_prompt": [*NEGATIVE[:samples]]}

    def tokens(call: Call, sample: int) -> Any:
        longest = max(read(pipe, row, dropped=dropped, valid=True)[1] for row in range(samples))
        words, length = read(pipe, sample, dropped=dropped, valid=True)
        of = joint(("text", longest), ("generated", IMAGE), words=words)
        return of(call, sample), range(length)

    layers = r"^transformer_blocks\.\d+\.attn$"
    return of_prompts(pipe, runs(pipe, inputs), layers, "first call", samples, tokens)


def klein(samples: int = 1) -> Model:
    made = seeded(dits.BUILDERS["flux2"], "klein")
    pipe = made.pipe
    # three layers of the encoder make one token
    encoder = seeded(TextEncoder, 8)
    pipe.register_modules(text_encoder=encoder, tokenizer=tokenizers.qwen_tokenizer())
    inputs = {k: v for k, v in made.inputs.items() if "embeds" not in k}
    inputs |= {"prompt": [*PROMPTS[:samples]], "max_sequence_length": 96}

    def tokens(call: Call, sample: int) -> Any:
        words, length = read(pipe, sample)
        assert length == 96
        parts = [("text", length), ("generated", IMAGE), (0, (3, 6)), (1, (7, 2))]
        return joint(*parts, words=words)(call, sample), range(length)

    return of_prompts(pipe, runs(pipe, inputs), BLOCKS, "first call", samples, tokens)


def zimage(samples: int = 1) -> Model:
    """Texts are as long as they are, then padded to multiples of 32."""
    made = seeded(dits.BUILDERS["zimage"])
    pipe = made.pipe
    encoder = seeded(TextEncoder, 24)
    pipe.register_modules(text_encoder=encoder, tokenizer=tokenizers.qwen_tokenizer())
    inputs = {k: v for k, v in made.inputs.items() if "embeds" not in k}
    inputs |= {"prompt": [*PROMPTS[:samples]], "negative_prompt": [*NEGATIVE[:samples]]}

    def tokens(call: Call, sample: int) -> Any:
        words, length = read(pipe, sample, valid=True)
        words = {word: [64 + i for i in at] for word, at in words.items()}
        return Tokens(range(35), IMAGE, words=words), range(64, 64 + length)

    layers = r"^layers\.\d+\.attention$"
    return of_prompts(pipe, runs(pipe, inputs), layers, "first", samples, tokens)


def chroma(samples: int = 1) -> Model:
    made = seeded(dits.BUILDERS["chroma"])
    pipe = made.pipe
    encoder = seeded(TextEncoder, 32)
    pipe.register_modules(text_encoder=encoder, tokenizer=tokenizers.t5_tokenizer())
    inputs = {k: v for k, v in made.inputs.items() if "prompt" not in k}
    inputs |= {"prompt": [*PROMPTS[:samples]], "negative_prompt": [*NEGATIVE[:samples]]}
    inputs["max_sequence_length"] = T5_TEXT

    def tokens(call: Call, sample: int) -> Any:
        words, length = read(pipe, sample)
        of = joint(("text", length), ("generated", IMAGE), words=words)
        return of(call, sample), range(length)

    return of_prompts(pipe, runs(pipe, inputs), BLOCKS, "first call", samples, tokens)


def wan(samples: int = 1) -> Model:
    pipe = seeded(unets.wan, "t2v_22")
    encoder = seeded(TextEncoder, 12)
    pipe.register_modules(text_encoder=encoder, tokenizer=tokenizers.t5_tokenizer())
    inputs = {k: v for k, v in unets.wan_arguments("t2v").items() if "embeds" not in k}
    inputs |= {"prompt": [*PROMPTS[:samples]], "negative_prompt": [*NEGATIVE[:samples]]}

    def tokens(call: Call, sample: int) -> Any:
        words, _ = read(pipe, sample, valid=True)
        return Tokens(range(18), VIDEO, words=words), range(512)

    return of_prompts(
        pipe,
        runs(pipe, inputs, "frames"),
        r"^blocks\.\d+\.attn2$",
        "first call",
        samples,
        tokens,
        steps=4,
        denoisers=("transformer", "transformer_2"),
    )


PROMPTED: dict[str, Callable[..., Model]] = {
    "flux kontext": flux,
    "sd3": sd3,
    "qwen": qwen,
    "qwen, padded on the right": partial(qwen, side="right"),
    "flux2 klein": klein,
    "zimage": zimage,
    "chroma": chroma,
    "wan 2.2": wan,
}

# two samples, whose prompts differ in length, as do their negative ones
PROMPTED |= {f"{name}, two": partial(make, samples=2) for name, make in [*PROMPTED.items()]}
