"""Words of a prompt: which tokens of a text span they are, by what the encoders were given."""

import contextlib
import json
import string
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    ChromaPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxPipeline,
    QwenImageEditPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    WanPipeline,
    ZImagePipeline,
)
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import BatchEncoding, CLIPTokenizer, Qwen2Tokenizer, T5Tokenizer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from i2am.adapters.prompts.words import PromptWords
from i2am.layouts.token_layout import CONDITIONAL, UNCONDITIONAL, Encoder, TokenLayout

PROMPT = "A Red zebra, on the shirt: the red ZEBRA!"
CORPUS = ["a red dog on the shirt", "the cat and the shirt", "a cat with a red hat"] * 9
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)


def bpe(**options):
    """Vocabulary and merges of a byte-level BPE."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=options.get("end_of_word_suffix", "")))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Split(Regex(r"\s+"), "removed")
        if "end_of_word_suffix" in options
        else pre_tokenizers.ByteLevel(add_prefix_space=False)
    )
    trainer = trainers.BpeTrainer(vocab_size=420, show_progress=False, **options)
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def clip_tokenizer(length=77):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _, merges = bpe(end_of_word_suffix="</w>")
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *map("".join, merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def t5_tokenizer():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=110,
        special_tokens=specials,
        unk_token="<unk>",
        initial_alphabet=[*string.ascii_letters, *",.!:'"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    vocab = [tuple(piece) for piece in json.loads(tokenizer.to_str())["model"]["vocab"]]
    return T5Tokenizer(vocab=vocab, extra_ids=0)


def qwen_tokenizer(side="right"):
    marks = ["<|im_start|>", "<|im_end|>", "<|image_pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocab, merges = bpe(initial_alphabet=alphabet, special_tokens=["<|endoftext|>", *marks])
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=merges, additional_special_tokens=marks, padding_side=side
    )
    tokenizer.chat_template = CHAT
    return tokenizer


class TextEncoder(nn.Module):
    """Its first channel is the token id, so that embeddings tell which tokens they are of."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, pooled=False):
        super().__init__()
        self.pooled = pooled
        self.config = SimpleNamespace(use_attention_mask=False, projection_dim=4)

    def forward(self, input_ids, attention_mask=None, **options):
        ids = input_ids.float()
        places = torch.arange(ids.shape[1]).expand_as(ids)
        hidden = torch.stack([ids, places, ids * 0, ids * 0], -1)
        output = BaseModelOutputWithPooling(hidden, hidden[:, 0], hidden_states=(hidden,) * 36)
        if self.pooled:
            output = BaseModelOutputWithPooling(hidden[:, 0], hidden_states=(hidden,) * 36)
        return output


class Part(SimpleNamespace):
    """A part of a pipeline that does nothing."""


class Encoded(Exception):
    """A pipeline is past its encoders."""


def stop(*_, **__):
    raise Encoded


def made(kind, **parts):
    """A pipeline of diffusers, of whose parts only the text encoders work."""
    blank = {
        "vae": None,
        "scheduler": Part(set_timesteps=stop, config={}, order=1),
        "text_encoder": TextEncoder(),
    }
    denoiser = SimpleNamespace(
        config=SimpleNamespace(
            in_channels=16,
            time_cond_proj_dim=None,
            sample_size=8,
            joint_attention_dim=4,
            guidance_embeds=False,
            patch_size=(1, 2, 2),
            _diffusers_version="9",
        ),
        in_channels=16,
        dtype=torch.float32,
    )
    name = "unet" if kind.__name__.startswith("StableDiffusion") else "transformer"
    if kind is StableDiffusion3Pipeline:
        name = "transformer"
    if name == "unet":
        blank |= (
            {}
            if kind is StableDiffusionXLPipeline
            else {
                "safety_checker": None,
                "requires_safety_checker": False,
            }
        )
        blank |= {"feature_extractor": None}
    pipe = kind(**{**blank, **parts, name: None})
    object.__setattr__(pipe, name, denoiser)
    pipe.prepare_latents = stop
    pipe._execution_device_ = torch.device("cpu")
    return pipe


def sd(kind=StableDiffusionPipeline, tokenizer=None):
    pipe = made(kind, tokenizer=tokenizer or clip_tokenizer())
    return pipe, (Encoder(),)


def sdxl():
    pipe = made(
        StableDiffusionXLPipeline,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        text_encoder_2=TextEncoder(pooled=True),
    )
    return pipe, (Encoder(), Encoder("text_encoder_2", "tokenizer_2"))


def sd3(third=True):
    pipe = made(
        StableDiffusion3Pipeline,
        text_encoder=TextEncoder(pooled=True),
        text_encoder_2=TextEncoder(pooled=True),
        text_encoder_3=TextEncoder() if third else None,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
    )
    encoders = Encoder(), Encoder("text_encoder_2", "tokenizer_2")
    return pipe, (*encoders, Encoder("text_encoder_3", "tokenizer_3", "text 2"))


def flux():
    pipe = made(
        FluxPipeline,
        tokenizer=clip_tokenizer(),
        text_encoder_2=TextEncoder(),
        tokenizer_2=t5_tokenizer(),
    )
    return pipe, (Encoder("text_encoder_2", "tokenizer_2"),)


def t5_alone(kind):
    return made(kind, tokenizer=t5_tokenizer()), (Encoder(),)


def chat(kind, side="right"):
    return made(kind, tokenizer=qwen_tokenizer(side)), (Encoder(),)


def qwen(side="left", kind=QwenImagePipeline, **parts):
    pipe = made(kind, tokenizer=qwen_tokenizer(side), **parts)
    # of our vocabulary the template has more tokens
    front = pipe.prompt_template_encode.split("{}")[0].split("<|vision_start|>")[0]
    dropped = len(pipe.tokenizer(front)["input_ids"])
    pipe.prompt_template_encode_start_idx = dropped
    return pipe, (Encoder(dropped=dropped),)


class Processor:
    """Pictures become as many tokens as they have patches, in the text that is tokenised."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, images, **options):
        return self.tokenizer(
            [one.replace("<|image_pad|>", "<|image_pad|>" * 6) for one in text], **options
        )


class Chat(Processor):
    """Fills a template with messages of several parts."""

    def apply_chat_template(self, batch, tokenize, return_dict, **options):
        for messages in batch:
            for message in messages:
                message["content"] = "".join(part["text"] for part in message["content"])
        texts = self.tokenizer.apply_chat_template(batch, tokenize=False)
        options.pop("add_generation_prompt")
        return self.tokenizer(texts, **options)


def flux2():
    tokenizer = qwen_tokenizer()
    return made(Flux2Pipeline, tokenizer=Chat(tokenizer)), (Encoder(),)


def qwen_edit():
    tokenizer = qwen_tokenizer("left")
    pipe, (encoder,) = qwen(kind=QwenImageEditPipeline, processor=Processor(tokenizer))
    return pipe, (encoder,)


ALL = {
    "sd": sd,
    "pix2pix": lambda: sd(StableDiffusionInstructPix2PixPipeline),
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "chroma": lambda: t5_alone(ChromaPipeline),
    "wan": lambda: t5_alone(WanPipeline),
    "flux2": flux2,
    "klein": lambda: chat(Flux2KleinPipeline),
    "klein, left": lambda: chat(Flux2KleinPipeline, "left"),
    "zimage": lambda: chat(ZImagePipeline),
    "zimage, left": lambda: chat(ZImagePipeline, "left"),
    "qwen": qwen,
    "qwen, right": lambda: qwen("right"),
    "qwen edit": qwen_edit,
}


@contextlib.contextmanager
def watched(pipe, encoders, wanted, branches=(CONDITIONAL,)):
    layout = TokenLayout("some", lambda call, frame: None, encoders=encoders)
    words = PromptWords(pipe, layout, wanted, branches)
    restore = words.attach()
    try:
        yield words
    finally:
        restore()


def run(pipe, *, watch="encode_prompt", **options):
    """Call a pipeline until it has encoded its prompts; what it made of them, call by call."""
    if isinstance(pipe, StableDiffusionInstructPix2PixPipeline | QwenImageEditPipeline):
        options["image"] = Image.new("RGB", (64, 64))
    if not isinstance(pipe, StableDiffusionInstructPix2PixPipeline):
        options |= {"height": 64, "width": 64}
    else:
        watch = "_encode_prompt"
    encode, results = getattr(pipe, watch), []
    setattr(pipe, watch, lambda *args, **more: results.append(encode(*args, **more)) or results[-1])
    with contextlib.suppress(Encoded):
        pipe(**options)
        raise AssertionError("the pipeline ran on")
    setattr(pipe, watch, encode)
    return results


def embeddings(pipe, results, branch=CONDITIONAL):
    """Those of a branch, ``[rows, seqlen, channels]`` or a list for each row."""
    first = results[0]
    if branch == CONDITIONAL or isinstance(pipe, StableDiffusionInstructPix2PixPipeline):
        return first[0] if isinstance(first, tuple) else first
    if isinstance(pipe, FluxPipeline | Flux2KleinPipeline | QwenImagePipeline):
        return results[1][0]
    return first[3] if isinstance(pipe, ChromaPipeline) else first[1]


def read(tokenizer, embedding, weights):
    """What the tokens of a word spell, one after the other, lower-case."""
    ids = embedding[weights.bool(), 0].long().tolist()
    pieces = "".join(tokenizer.convert_ids_to_tokens(ids))
    for mark in ("</w>", "\u2581", "\u0120"):
        pieces = pieces.replace(mark, "")
    return pieces.lower()


def parts(pipe, encoders, embedding):
    """``(span, tokenizer, embedding)`` of the text spans of a row."""
    if isinstance(pipe, StableDiffusion3Pipeline):
        return [
            ("text", pipe.tokenizer, embedding[:77]),
            ("text 2", pipe.tokenizer_3, embedding[77:]),
        ]
    tokenizer = getattr(pipe, encoders[0].tokenizer)
    return [("text", getattr(tokenizer, "tokenizer", tokenizer), embedding)]


@pytest.fixture(params=ALL)
def family(request):
    return ALL[request.param]()


def test_tokens_of_wanted_words_spell_them(family):
    pipe, encoders = family
    wanted = ["zebra", "RED zebra", "the shirt"]
    with watched(pipe, encoders, wanted) as words:
        results = run(pipe, prompt=PROMPT)
        words.begin_run()
    assert words.names == tuple(wanted)
    for span, tokenizer, embedding in parts(pipe, encoders, embeddings(pipe, results)[0]):
        weights = words.weights(span, len(embedding), 1)
        assert weights.dtype == torch.float32
        assert weights.shape == (1, 3, len(embedding))
        assert [read(tokenizer, embedding, row) for row in weights[0]] == [
            "zebrazebra",
            "redzebraredzebra",
            "theshirt",
        ]
        # characters that are no merged pair are tokens of their own
        assert weights[0, 0].sum() > 2


def test_every_token_has_one_name(family):
    pipe, encoders = family
    with watched(pipe, encoders, True) as words:
        results = run(pipe, prompt=PROMPT)
        words.begin_run()
    assert words.names == (
        *("A", "Red", "zebra", "on", "the", "shirt"),
        *("<punctuation>", "<special>", "<padding>"),
    )
    for span, tokenizer, embedding in parts(pipe, encoders, embeddings(pipe, results)[0]):
        weights = words.weights(span, len(embedding), 1)[0]
        assert torch.equal(weights.sum(0), torch.ones(len(embedding)))
        assert {*weights.unique().tolist()} == {0.0, 1.0}
        assert [read(tokenizer, embedding, row) for row in weights[:7]] == [
            *("a", "redred", "zebrazebra", "on", "thethe", "shirt"),
            ",:!",
        ]
        special = read(tokenizer, embedding, weights[7])
        assert special.startswith(("<|startoftext|>", "<|im_", "</s>", "<|vision_start|>"))
        assert all(mark not in special for mark in ("zebra", "shirt", "<pad>"))
        template = "assistant" in special
        assert template == isinstance(
            pipe,
            Flux2Pipeline
            | Flux2KleinPipeline
            | ZImagePipeline
            | QwenImagePipeline
            | QwenImageEditPipeline,
        )
        # the picture of Qwen-Image-Edit is no padding
        assert special.count("<|image_pad|>") == 6 * isinstance(pipe, QwenImageEditPipeline)


BATCH = ["a shirt", "the zebra, the red zebra and the cat on the SHIRT", "one shirt and a red dog"]


# Qwen-Image-Edit takes one prompt
@pytest.mark.parametrize("name", [name for name in ALL if name != "qwen edit"])
def test_batches_branches_and_several_images(name):
    pipe, encoders = ALL[name]()
    branches = (CONDITIONAL, UNCONDITIONAL)
    more = {"num_images_per_prompt": 2}
    if isinstance(pipe, WanPipeline):
        more = {"num_videos_per_prompt": 2}
    negative = ["ugly shirt", "red", "the bad bad cat"]
    if isinstance(pipe, FluxPipeline | QwenImagePipeline):
        more["true_cfg_scale"] = 3.0
    alone = isinstance(pipe, Flux2Pipeline | Flux2KleinPipeline)
    if not alone:
        more["negative_prompt"] = [*negative]
    with watched(pipe, encoders, ["shirt"], branches) as words:
        results = run(pipe, prompt=[*BATCH], **more)
        words.begin_run()
    for branch, shirts in ((CONDITIONAL, [1, 1, 1]), (UNCONDITIONAL, [not alone, 0, 0])):
        if branch == UNCONDITIONAL and isinstance(pipe, Flux2Pipeline):
            assert not words.weights("text", 512, 6, branch).any()
            continue
        rows = embeddings(pipe, results, branch)
        if isinstance(pipe, StableDiffusionInstructPix2PixPipeline):
            rows = rows[6:12] if branch == UNCONDITIONAL else rows[:6]
        if isinstance(pipe, ZImagePipeline):
            rows = [row for row in rows for _ in range(2)]
        assert len(rows) == 6
        for number, embedding in enumerate(rows):
            for span, tokenizer, part in parts(pipe, encoders, embedding):
                if isinstance(pipe, ZImagePipeline):
                    found = words.weights(span, len(part), 6, branch, row=number)[0]
                else:
                    found = words.weights(span, len(part), 6, branch)[number]
                assert read(tokenizer, part, found[0]) == "shirt" * shirts[number // 2]


def test_names_of_every_word_are_those_of_all_prompts_and_branches():
    pipe, encoders = sd()
    with watched(pipe, encoders, True) as words:
        run(pipe, prompt=["a cat", "the CAT"], negative_prompt=["dog", "bad"])
        words.begin_run()
        assert words.names[:-3] == ("a", "cat", "the")
    with watched(pipe, encoders, True, (CONDITIONAL, UNCONDITIONAL)) as words:
        run(pipe, prompt=["a cat", "the CAT"], negative_prompt=["dog", "bad cat"])
        words.begin_run()
        assert words.names[:-3] == ("a", "cat", "the", "dog", "bad")
        found = words.weights("text", 77, 2, UNCONDITIONAL)
        assert torch.equal(found.sum(1), torch.ones(2, 77))


@pytest.mark.parametrize(
    ("prompt", "wanted", "count"),
    [
        ("a t-shirt, don't", "t-shirt", 1),
        ("a t-shirt", "shirt", 0),
        ("shirts", "shirt", 0),
        ("red, (shirt)", "red shirt", 1),
        ("a red red red cat", "red red", 1),
        ("the dog's hat", "dog\u2019s", 1),
        ("version 3.5 on", "3.5", 1),
        ("a ca\u0301t", "c\u00e1t", 1),
        ("STRASSE", "straße", 1),
    ],
)
def test_what_a_word_is(prompt, wanted, count):
    pipe, encoders = chat(Flux2KleinPipeline)
    with watched(pipe, encoders, wanted) as words:
        run(pipe, prompt=prompt)
        if not count:
            with pytest.raises(ValueError, match="must occur in the prompt of every sample"):
                words.begin_run()
            return
        words.begin_run()
        assert words.weights("text", 512, 1).sum() > 0


def test_scripts_without_spaces():
    pipe, encoders = qwen()
    with watched(pipe, encoders, ["斑马", "红色的斑马"]) as words:
        results = run(pipe, prompt="一只红色的斑马\uff0c斑马")
        words.begin_run()
    embedding = embeddings(pipe, results)[0]
    weights = words.weights("text", len(embedding), 1)[0]
    texts = [pipe.tokenizer.decode(embedding[row.bool(), 0].long().tolist()) for row in weights]
    assert texts == ["斑马斑马", "红色的斑马"]


def test_words_that_share_a_token_are_one():
    vocab, merges = bpe(initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    pieces = "".join(
        pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("斑马")[0][0]
    )
    for size in range(2, len(pieces) + 1):
        merges.append((pieces[: size - 1], pieces[size - 1]))
        vocab.setdefault(pieces[:size], len(vocab))
    vocab["<|endoftext|>"] = len(vocab)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    pipe = made(ChromaPipeline, tokenizer=tokenizer)
    with watched(pipe, (Encoder(),), True) as words:
        run(pipe, prompt="斑马 cat")
        words.begin_run()
    assert words.names[:2] == ("斑马", "cat")
    assert words.weights("text", 512, 1)[0, 0].nonzero().tolist() == [[0]]


def test_words_that_were_cut_off():
    pipe, encoders = sd(tokenizer=clip_tokenizer(12))
    prompt = "a red dog " * 4 + "shirt"
    with watched(pipe, encoders, ["dog", "shirt"]) as words:
        run(pipe, prompt=prompt)
        with pytest.raises(ValueError, match="'shirt' was cut off"):
            words.begin_run()
    with watched(pipe, encoders, True) as words:
        run(pipe, prompt="cat on the " * 3 + "zebra zebra")
        words.begin_run()
        # of the last word the encoder saw a letter
        assert words.names[:-3] == ("cat", "on", "the", "z")
    pipe, encoders = flux()
    with watched(pipe, encoders, "zebra") as words:
        run(pipe, prompt="a cat on the zebra", max_sequence_length=7)
        with pytest.raises(ValueError, match="'zebra' was cut off"):
            words.begin_run()


def test_words_that_a_shorter_span_cuts_off():
    pipe, encoders = qwen()
    with watched(pipe, encoders, "shirt") as words:
        results = run(pipe, prompt=BATCH[1], max_sequence_length=9)
        words.begin_run()
        length = embeddings(pipe, results).shape[1]
        assert length == 9
        with pytest.raises(ValueError, match="within the 9 tokens of 'text', but 'shirt' was cut"):
            words.weights("text", length, 1)
    with watched(pipe, encoders, True) as words:
        run(pipe, prompt=BATCH[1], max_sequence_length=9)
        words.begin_run()
        assert torch.equal(words.weights("text", 9, 1).sum(1), torch.ones(1, 9))


def test_words_must_occur_in_every_prompt():
    pipe, encoders = sd()
    with watched(pipe, encoders, ["shirt", "red"]) as words:
        run(pipe, prompt=["a red shirt", "a blue shirt"])
        with pytest.raises(ValueError, match="every sample, got 'red' for 'a blue shirt'"):
            words.begin_run()


def test_embeddings_from_elsewhere_are_refused(family):
    pipe, encoders = family
    if isinstance(pipe, StableDiffusion3Pipeline | FluxPipeline | StableDiffusionXLPipeline):
        both = isinstance(pipe, StableDiffusion3Pipeline)
        more = {"pooled_prompt_embeds": torch.zeros(1, 8 if both else 4)}
    else:
        more = {}
    embedding = torch.rand(1, 333, 4)
    if isinstance(pipe, ZImagePipeline):
        embedding = [embedding[0]]
        more["negative_prompt_embeds"] = embedding
    if isinstance(pipe, ChromaPipeline):
        more["prompt_attention_mask"] = torch.ones(1, 333)
    if isinstance(pipe, QwenImagePipeline | QwenImageEditPipeline):
        more["prompt_embeds_mask"] = torch.ones(1, 333)
    # alone it would be taken for the prompt
    if not isinstance(
        pipe,
        Flux2Pipeline
        | Flux2KleinPipeline
        | ZImagePipeline
        | StableDiffusionInstructPix2PixPipeline
        | StableDiffusionXLPipeline,
    ):
        more["negative_prompt"] = "a shirt"
    if isinstance(pipe, FluxPipeline | QwenImagePipeline | QwenImageEditPipeline):
        more["true_cfg_scale"] = 3.0
    with watched(pipe, encoders, "shirt") as words:
        run(pipe, prompt_embeds=embedding, **more)
        with pytest.raises(ValueError, match=r"inside the block.*words=\{'shirt': \[3, 4\]\}"):
            words.begin_run()


def test_embeddings_of_the_block_are_known():
    pipe, encoders = sd()
    with watched(pipe, encoders, "shirt", (CONDITIONAL, UNCONDITIONAL)) as words:
        embedding, negative = pipe.encode_prompt("a shirt", "cpu", 1, True, "red shirt")
        pipe.encode_prompt("something else", "cpu", 1, True)
        for _ in range(2):
            run(pipe, prompt_embeds=embedding.double(), negative_prompt_embeds=negative.clone())
            words.begin_run()
            assert words.weights("text", 77, 1).sum() == 1
            (first,), (second,) = (
                words.weights("text", 77, 1, branch)[0, 0].nonzero().tolist()
                for branch in (CONDITIONAL, UNCONDITIONAL)
            )
            assert (first, second) == ([2], [2])
            run(pipe, prompt="a red dog and a shirt")
            words.begin_run()
            assert words.weights("text", 77, 1)[0, 0].nonzero().min() > 2
        run(pipe, prompt_embeds=embedding + 1, negative_prompt="a shirt")
        with pytest.raises(ValueError, match="inside the block"):
            words.begin_run()


def test_embeddings_of_the_block_where_each_prompt_is_encoded_by_itself():
    pipe, encoders = flux()
    with watched(pipe, encoders, "shirt", (CONDITIONAL, UNCONDITIONAL)) as words:
        # the negative prompt first
        negative, zeros, _ = pipe.encode_prompt("red shirt", None)
        embedding, pooled, _ = pipe.encode_prompt("shirt", None)
        run(
            pipe,
            prompt_embeds=embedding,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=negative,
            negative_pooled_prompt_embeds=zeros,
            true_cfg_scale=2.0,
        )
        words.begin_run()
        for branch, made_of in ((CONDITIONAL, embedding), (UNCONDITIONAL, negative)):
            found = words.weights("text", 512, 1, branch)[0, 0]
            assert read(pipe.tokenizer_2, made_of[0], found) == "shirt"
        assert not torch.equal(
            words.weights("text", 512, 1), words.weights("text", 512, 1, UNCONDITIONAL)
        )


def test_a_loop_of_ones_own_encodes_in_the_block():
    pipe, encoders = chat(ZImagePipeline)
    # the negative prompt that it adds by itself is empty
    with watched(pipe, encoders, "shirt", (CONDITIONAL, UNCONDITIONAL)) as words:
        embedding, _ = pipe.encode_prompt("a shirt", "cpu")
        words.begin_run()
        found = words.weights("text", len(embedding[0]), 1)[0, 0]
        assert read(pipe.tokenizer, embedding[0], found) == "shirt"
        assert not words.weights("text", 32, 1, UNCONDITIONAL).any()
        with pytest.raises(ValueError, match="inside the block"):
            words.begin_run()


class Other:
    """A pipeline without ``encode_prompt``, or one that encodes both prompts in one batch."""

    def __init__(self, tokenizer=None):
        self.tokenizer, self.text_encoder = tokenizer or clip_tokenizer(), TextEncoder()

    def encode(self, texts):
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return self.text_encoder(**self.tokenizer(texts, **options))[0]


class Together(Other):
    def encode_prompt(self, prompt, negative_prompt):
        return self.encode([*negative_prompt, *prompt]).chunk(2)[::-1]


class Chunks(Other):
    def encode_prompt(self, prompt):
        return torch.cat([self.encode([one]) for one in prompt.split("|")], 1)


def test_other_ways_to_encode():
    pipe, branches = Together(), (CONDITIONAL, UNCONDITIONAL)
    with watched(pipe, (Encoder(),), "shirt", branches) as words:
        pipe.encode_prompt(["a shirt", "a red shirt"], ["bad shirt", "no"])
        words.begin_run()
        found = [words.weights("text", 77, 2, branch)[:, 0] for branch in branches]
        assert found[0].argmax(1).tolist() == [2, 3]
        assert found[1].sum(1).tolist() == [1, 0]
    pipe = Other()
    with watched(pipe, (Encoder(),), "shirt", branches) as words:
        for text in (["shirt"], ["a shirt"]):
            pipe.encode(text)
        words.begin_run()
        places = [words.weights("text", 77, 1, branch)[0, 0].argmax() for branch in branches]
        assert places == [1, 2]
    pipe = Chunks()
    with watched(pipe, (Encoder(),), "shirt") as words:
        pipe.encode_prompt("a shirt|a dog")
        with pytest.raises(ValueError, match="in one piece"):
            words.begin_run()


def test_characters_that_a_tokenizer_does_not_know():
    pipe, encoders = flux()
    with watched(pipe, encoders, ["斑马", "cat"]) as words:
        results = run(pipe, prompt="a 斑马 cat")
        words.begin_run()
    weights = words.weights("text", 512, 1)[0]
    read_back = [read(pipe.tokenizer_2, embeddings(pipe, results)[0], row) for row in weights]
    assert read_back == ["<unk>", "cat"]


def test_encoders_of_one_span_must_be_given_the_same_words():
    pipe, encoders = sdxl()
    with watched(pipe, encoders, True) as words:
        run(pipe, prompt="a shirt", prompt_2="A SHIRT")
        words.begin_run()
        run(pipe, prompt="a shirt", prompt_2="a red shirt")
        with pytest.raises(ValueError, match=r"text_encoder_2 were given different prompts"):
            words.begin_run()


def test_an_encoder_that_is_missing_and_a_negative_prompt_of_zeros():
    pipe, encoders = sd3(third=False)
    with watched(pipe, encoders, True) as words:
        run(pipe, prompt="a shirt")
        words.begin_run()
        assert words.weights("text 2", 256, 2)[0].argmax(0).unique().tolist() == [4]
        assert words.names[4] == "<padding>"
        run(pipe, prompt=["a shirt", "a dog", "cat"])
        words.begin_run()
        for rows, count in ((None, 3), (6, 6)):
            spans = [words.weights(*span, rows) for span in (("text", 77), ("text 2", 256))]
            assert [len(found) for found in spans] == [count, count]
            assert torch.equal(torch.cat(spans, -1).sum(1), torch.ones(count, 333))
    pipe, encoders = sdxl()
    pipe.register_to_config(force_zeros_for_empty_prompt=True)
    with watched(pipe, encoders, ["shirt"], (CONDITIONAL, UNCONDITIONAL)) as words:
        run(pipe, prompt="a shirt")
        words.begin_run()
        assert words.weights("text", 77, 1).sum() == 1
        assert words.weights("text", 77, 1, UNCONDITIONAL).sum() == 0


@pytest.mark.parametrize("build", [flux, sd3])
def test_positions(build):
    pipe, encoders = build()
    spans = {"text": [3, 5]} if build is flux else {"text": [3], "text 2": [0, 255]}
    more = {"num": torch.tensor(2)}
    wanted = {"shirt": spans, "dog": {"text": [more["num"]]}}
    with watched(pipe, encoders, wanted) as words:
        words.begin_run()
        assert words.names == ("shirt", "dog")
        for branch in (CONDITIONAL, UNCONDITIONAL):
            found = words.weights("text", 77, 4, branch)
            assert found.shape == (1, 2, 77)
            assert [row.nonzero().flatten().tolist() for row in found[0]] == [spans["text"], [2]]
        if build is sd3:
            found = words.weights("text 2", 256, 4)
            assert found.sum(-1).tolist() == [[2.0, 0.0]]
            with pytest.raises(ValueError, match=r"positions below 200 in 'text 2', got 255"):
                words.weights("text 2", 200, 4)
        with pytest.raises(ValueError, match=r"words\['shirt'\] must be positions below 3 "):
            words.weights("text", 3, 4)


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        ([], ValueError, "at least one word"),
        ({}, ValueError, "at least one word"),
        (["..."], ValueError, "letters or digits, got '...'"),
        (["Shirt", "shirt"], ValueError, "differ by more than case"),
        (3, TypeError, "words must be True, words or phrases"),
        ([3], TypeError, "words must be True, words or phrases"),
        ({"shirt": [-1]}, ValueError, "at least 0"),
        ({"shirt": []}, ValueError, "at least 0"),
        ({"shirt": [0.5]}, TypeError, "token positions, got"),
        ({"shirt": {"prompt": [1]}}, ValueError, "must name spans of \\['text'\\], got 'prompt'"),
    ],
)
def test_what_cannot_be_wanted(wanted, error, message):
    pipe, encoders = sd()
    with pytest.raises(error, match=message), watched(pipe, encoders, wanted):
        pass


def test_positions_of_several_spans_need_their_names():
    pipe, encoders = sd3()
    with pytest.raises(ValueError, match="by span"), watched(pipe, encoders, {"shirt": [3]}):
        pass


def test_a_denoiser_alone_has_no_words_but_positions():
    denoiser = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="a text encoder that layout 'some' names"):
        PromptWords(denoiser, TokenLayout("some", lambda call, frame: None), True)
    with watched(denoiser, (), {"shirt": [3]}) as words:
        words.begin_run()
        assert words.weights("text", 5, 2).nonzero().tolist() == [[0, 0, 3]]


class Slow:
    """A tokenizer that tells no offsets."""

    added_tokens_decoder, added_tokens_encoder, model_max_length = {}, {}, 8

    def tokenize(self, text):
        return text.split()

    def batch_decode(self, ids):
        return [""]

    def __call__(self, text, return_tensors=None, **options):
        return BatchEncoding({"input_ids": [[1, 2, 3]]}, tensor_type=return_tensors)


def test_slow_tokenizers_are_refused():
    pipe, encoders = sd(tokenizer=Slow())
    with watched(pipe, encoders, True) as words:
        run(pipe, prompt="a shirt")
        with pytest.raises(ValueError, match=r"fast tokenizer.*words=\{'shirt'"):
            words.begin_run()


def test_a_prompt_that_its_template_repeats_is_refused():
    pipe, encoders = chat(Flux2KleinPipeline)
    with watched(pipe, encoders, True) as words:
        # it goes on with a special token at one place alone
        run(pipe, prompt="user")
        words.begin_run()
        assert words.names[0] == "user"
        assert words.weights("text", 512, 1)[0, 0].nonzero().min() > 5
        pipe.tokenizer.chat_template = CHAT.replace("assistant", "user<|im_end|>")
        run(pipe, prompt="user")
        with pytest.raises(ValueError, match=r"'user'\] occurs 2 times"):
            words.begin_run()


def test_spans_must_fit_what_was_encoded():
    pipe, encoders = sd()
    with watched(pipe, encoders, True) as words:
        run(pipe, prompt=["a shirt", "a dog", "cat"])
        words.begin_run()
        with pytest.raises(ValueError, match="at most 77, got 154"):
            words.weights("text", 154, 3)
        with pytest.raises(ValueError, match="multiple of the 3 prompts"):
            words.weights("text", 77, 4)
        assert words.weights("text", 77).argmax(-1)[:, 1].tolist() == [2, 0, 0]
        with pytest.raises(ValueError, match=r"span must be one of \['text'\], got 'text 2'"):
            words.weights("text 2", 77)
        with pytest.raises(ValueError, match="branch must be recorded"):
            words.weights("text", 77, 3, UNCONDITIONAL)


def state(pipe):
    tokenizers = [one for name, one in pipe.components.items() if name.startswith("tokenizer")]
    encoders = [one for name, one in pipe.components.items() if name.startswith("text_encoder")]
    return (
        {name: value for name, value in vars(pipe).items() if callable(value)},
        [type(one) for one in tokenizers],
        [{**vars(one)}.keys() for one in tokenizers],
        [(len(one._forward_pre_hooks), len(one._forward_hooks)) for one in encoders],
    )


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_it_was(fails):
    pipe, encoders = sdxl()
    before = state(pipe)
    ids = pipe.tokenizer("a shirt")
    with contextlib.suppress(TypeError), watched(pipe, encoders, True) as words:
        assert state(pipe) != before
        assert type(pipe.tokenizer).__name__ == "CLIPTokenizer"
        assert isinstance(pipe.tokenizer, CLIPTokenizer)
        assert pipe.tokenizer("a shirt") == ids
        run(pipe, prompt="a shirt")
        words.begin_run()
        if fails:
            pipe.encode_prompt(prompt=3, unknown=True)
    assert state(pipe) == before
    # what was found stays
    assert words.weights("text", 77, 1).shape == (1, 5, 77)


def test_two_recordings_share_a_tokenizer():
    tokenizer = clip_tokenizer()
    (one, encoders), (other, _) = sd(tokenizer=tokenizer), sd(tokenizer=tokenizer)
    layout = TokenLayout("some", lambda call, frame: None, encoders=encoders)
    first = PromptWords(one, layout, True)
    restore = first.attach()
    with watched(other, encoders, True) as second:
        run(one, prompt="a shirt")
        run(other, prompt="a dog")
        first.begin_run()
        restore()
        second.begin_run()
        run(other, prompt="a cat")
        second.begin_run()
    assert first.names[:-3] == ("a", "shirt")
    assert second.names[:-3] == ("a", "cat")
    assert type(tokenizer) is CLIPTokenizer


def test_a_failed_encoding_leaves_no_trace():
    pipe, encoders = sd()
    with watched(pipe, encoders, "shirt") as words:
        with pytest.raises(ValueError, match="prompt"):
            pipe(prompt=["a shirt"], negative_prompt=["a", "b"], height=64, width=64)
        run(pipe, prompt="a red shirt")
        words.begin_run()
        assert words.weights("text", 77, 1)[0, 0].argmax() == 3


def test_a_compiled_encoder():
    pipe, encoders = sd()
    pipe.text_encoder.compile(backend="eager")
    with watched(pipe, encoders, "shirt") as words:
        run(pipe, prompt="a shirt")
        words.begin_run()
        assert words.weights("text", 77, 1)[0, 0].argmax() == 2
