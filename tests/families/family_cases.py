"""Complete tiny pipelines of every family, and what this page knows of their tokens.

Positions are counted from lengths and sizes that are chosen here and in the builders; no layout of
i2am is asked where tokens are.
"""

import importlib.util
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers
import torch
from family_oracle import Call, Keys, Tokens
from torch import Tensor, nn
from transformers import BatchFeature

from i2am.layouts import first_frame, reference_frames


def _builders(path: str) -> ModuleType:
    """What a test module or a conftest builds."""
    name = "builders_of_" + path.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent.parent / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


dits = _builders("layouts/families/conftest.py")
unets = _builders("layouts/families_unet/conftest.py")
models = _builders("models/conftest.py")
tokenizers = _builders("adapters/test_words.py")
normal = dits.normal


@dataclass
class Model:
    """A pipeline, how it is run, and what its tokens are.

    Attributes:
        pipe: The pipeline.
        run: Makes its image.
        layers: Regular expression of the layers that are to be recorded.
        part: Which rows are the conditional samples: ``"all"``, the ``"first"``, ``"second"`` or
            ``"first third"`` of the equal parts of a batch, or those of the ``"first call"`` or
            the ``"second call"``.
        tokens: What the tokens of a sample are in a call of a layer, None if it is nobody's.
        words: As for ``record``.
        samples: How many images are made.
        steps: How many steps.
        layout: Where it has to be given.
        denoisers: The pipeline's attributes.
    """

    pipe: Any
    run: Callable[[], Tensor]
    layers: str
    part: str
    tokens: Callable[[Call, int], Tokens | None]
    words: Any = None
    samples: int = 1
    steps: int = 2
    layout: Any = None
    denoisers: Sequence[str] = ("transformer",)

    @property
    def networks(self) -> list[nn.Module]:
        return [getattr(self.pipe, name) for name in self.denoisers]

    @property
    def scheduler(self) -> Any:
        return getattr(self.pipe, "scheduler", None) or self.pipe.noise_scheduler

    @property
    def options(self) -> dict[str, Any]:
        """For ``record``."""
        given = {} if self.layout is None else {"layout": self.layout}
        return {"time_groups": 2, "words": self.words, **given}

    @property
    def groups(self) -> list[int]:
        """Time group of every evaluation, of two."""
        return [step * 2 // self.steps for step in range(self.steps)]

    def of(self, call: Call) -> list[tuple[int, Tokens]] | None:
        """The row of every sample in a call, and what its tokens are."""
        if not re.search(self.layers, call.layer):
            return None
        if "call" in self.part and call.denoiser_call != ("first", "second").index(self.part[:-5]):
            return None
        parts = {"first": 2, "second": 2, "first third": 3}.get(self.part, 1)
        assert call.rows == parts * self.samples
        start = self.samples if self.part == "second" else 0
        found = []
        for sample in range(self.samples):
            tokens = self.tokens(call, sample)
            if tokens is not None:
                found.append((start + sample, tokens))
        return found or None


def seeded(make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The same weights each time, and attention as uneven as a trained model's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = make(*args, **options)
    pipe = getattr(made, "pipe", made)
    for name in ("transformer", "transformer_2", "unet", "unet_vton"):
        net = getattr(pipe, name, None)
        for module in [] if net is None else net.modules():
            if not hasattr(module, "get_processor"):
                continue
            norm = getattr(module.norm_q, "weight", None) if hasattr(module, "norm_q") else None
            weight = module.to_q.weight if norm is None else norm
            weight.data *= 4
    return made


def widened(inputs: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """Embeddings of several samples, each of its own."""

    def wide(name: str, value: Any) -> Any:
        if isinstance(value, list) and "embeds" in name:
            return [wide(f"{name} {number}", each) for number, each in enumerate(value)]
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            return value.repeat(samples, 1)
        if name.startswith(("ip_adapter", "negative_ip_adapter")):
            return value  # pipelines repeat it
        return normal(samples * len(value), *value.shape[1:], seed=zlib.crc32(name.encode()) % 999)

    return {name: wide(name, value) for name, value in inputs.items()}


def run_of(made: Any, samples: int, **changes: Any) -> Callable[[], Tensor]:
    """Runs a joint transformer's pipeline, always from the same noise."""
    inputs = {**made.inputs, **changes}
    inputs = widened(inputs, samples) if samples > 1 else inputs

    def run() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return made.pipe(**inputs, generator=generator).images

    return run


# Joint transformers: parts of one sequence

IMAGE = (5, 7)
Part = tuple[Any, Any]


def counted(*parts: Part) -> dict[Any, range]:
    """Positions of the parts of a sequence, by what they are; each has a length or a grid."""
    found, start = {}, 0
    for name, size in parts:
        length = size if isinstance(size, int) else size[0] * size[1]
        found[name] = range(start, start + length)
        start += length
    return found


def joint(*parts: Part, words: Mapping[str, Sequence[int]], call: int = 0) -> Any:
    """Of one sequence that is queries and keys; parts that have a number are references, words
    lie in "text"."""
    at = counted(*parts)

    def tokens(one: Call, sample: int) -> Tokens | None:
        if one.index != call:
            return None
        assert one.seqlen_q == one.seqlen_k == sum(map(len, at.values()))
        return Tokens(
            at["generated"],
            dict(parts)["generated"],
            {name: Keys(at[name], size) for name, size in parts if isinstance(name, int)},
            {word: [at["text"][i] for i in positions] for word, positions in words.items()},
        )

    return tokens


BLOCKS = r"^(single_)?transformer_blocks\.\d+\.attn$"
T = dits.FLUX_TEXT
SHIRT = {"shirt": [1, 2], "rest": [0, 3, 4, 5]}


def flux(kind: str, *references: tuple[int, int], samples: int = 1, **changes: Any) -> Model:
    made = seeded(dits.BUILDERS["flux"], kind)
    parts = [("text", T), ("generated", IMAGE), *enumerate(references)]
    apart = "true_cfg_scale" in changes
    if apart:
        changes |= {
            "negative_prompt_embeds": normal(1, T, 32, seed=7),
            "negative_pooled_prompt_embeds": normal(1, 32, seed=8),
        }
    return Model(
        made.pipe,
        run_of(made, samples, **changes),
        BLOCKS,
        "first call" if apart else "all",
        joint(*parts, words=SHIRT),
        SHIRT,
        samples,
    )


ADAPTERS = {1: (4, 0.7), 2: (3, 0.5)}  # tokens and scale, by attention call


def flux_adapters(kind: str, *references: tuple[int, int], samples: int = 1) -> Model:
    model = flux(kind, *references, samples=samples)
    of_joint = model.tokens

    def tokens(call: Call, sample: int) -> Tokens | None:
        if call.index == 0:
            return of_joint(call, sample)
        count, scale = ADAPTERS[call.index]
        assert call.seqlen_k == count
        # the queries are all pictures, without the text
        number = len(references) + call.index - 1
        return Tokens(range(35), IMAGE, {number: Keys(range(count), weight=scale)})

    model.tokens = tokens
    return model


def flux2(kind: str, *references: tuple[int, int], samples: int = 1, **options: Any) -> Model:
    made = seeded(dits.BUILDERS["flux2"], kind, **options)
    words = {"shirt": [1, 2], "rest": [0, 3, 4]}
    text = ("text", dits.FLUX2_TEXT)
    of_joint = joint(text, ("generated", IMAGE), *enumerate(references), words=words)

    def cached(call: Call, sample: int) -> Tokens | None:
        if call.index:  # the references among themselves
            return None
        at = counted(text, *enumerate(references), ("generated", IMAGE))
        own = counted(text, ("generated", IMAGE))
        assert (call.seqlen_q, call.seqlen_k) == (own["generated"].stop, at["generated"].stop)
        keys = {number: Keys(at[number], size) for number, size in enumerate(references)}
        return Tokens(own["generated"], IMAGE, keys, words)

    steps = 3 if kind == "klein kv" else 2  # later ones have the references in a cache
    return Model(
        made.pipe,
        run_of(made, samples, num_inference_steps=steps),
        BLOCKS,
        "first call" if kind in ("klein", "klein inpaint") else "all",
        cached if kind == "klein kv" else of_joint,
        words,
        samples,
        steps,
    )


def qwen(kind: str, *references: tuple[int, int], samples: int = 1, padded: bool = False) -> Model:
    made = seeded(dits.BUILDERS["qwen"], kind, padded=padded)
    words = {"shirt": [1, 2], "rest": [0, 3, 4, 5, 6]}
    inputs = dict(made.inputs)
    if kind == "text" and samples > 1:  # of one prompt more than of the next
        mask = torch.ones(samples, dits.QWEN_TEXT, dtype=torch.long)
        for row in range(samples):
            mask[row, dits.QWEN_TEXT - row :] = 0
        inputs = widened(inputs, samples) | {"prompt_embeds_mask": mask}
    else:
        inputs["num_images_per_prompt"] = samples

    def run() -> Tensor:
        return made.pipe(**inputs, generator=torch.Generator().manual_seed(0)).images

    parts = [("text", dits.QWEN_TEXT), ("generated", IMAGE), *enumerate(references)]
    return Model(
        made.pipe,
        run,
        r"^transformer_blocks\.\d+\.attn$",
        "first call",
        joint(*parts, words=words),
        words,
        samples,
    )


def qwen_edit_inpaint() -> Model:
    model = qwen("edit", (16, 8))
    pipe = diffusers.QwenImageEditInpaintPipeline(**model.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    inputs = dits.BUILDERS["qwen"]("edit").inputs
    inputs |= {"mask_image": dits.picture(64, 32, seed=1).convert("L"), "strength": 1.0}

    def run() -> Tensor:
        return pipe(**inputs, generator=torch.Generator().manual_seed(0)).images

    # the picture that is painted on is the reference too
    parts = ("text", dits.QWEN_TEXT), ("generated", (16, 8)), (0, (16, 8))
    return replace(model, pipe=pipe, run=run, tokens=joint(*parts, words=model.words))


def sd3(samples: int = 1, adapter: bool = False) -> Model:
    made = seeded(dits.BUILDERS["sd3"], adapter=adapter)
    clip = dits.CLIP_TOKENS
    # a word has tokens of both encoders
    given = {
        "shirt": {"text": [1, 2], "text 2": [0]},
        "rest": {"text": [0, *range(3, clip)], "text 2": [1, 2, 3]},
    }
    words = {
        word: [*spans["text"], *(clip + i for i in spans["text 2"])]
        for word, spans in given.items()
    }
    of_joint = joint(("generated", IMAGE), ("text", dits.SD3_TEXT), words=words)

    def tokens(call: Call, sample: int) -> Tokens | None:
        if call.index == 0:
            return of_joint(call, sample)
        assert (call.seqlen_q, call.seqlen_k) == (35, 35 + dits.SD3_ADAPTER_TOKENS)
        scale = made.pipe.transformer.transformer_blocks[0].attn.processor.scale
        return Tokens(range(35), IMAGE, {0: Keys(range(35, call.seqlen_k), weight=scale)})

    return Model(
        made.pipe,
        run_of(made, samples),
        r"^transformer_blocks\.\d+\.attn$",
        "second",
        tokens,
        given,
        samples,
    )


def zimage(samples: int = 1, texts: Sequence[int] = (40, 7, 12), negative: int = 9) -> Model:
    """Image and text are padded to multiples of 32; samples come before their negative prompts."""
    made = seeded(dits.BUILDERS["zimage"])
    inputs = {
        **made.inputs,
        "prompt_embeds": [normal(length, 24, seed=length) for length in texts[:samples]],
        "negative_prompt_embeds": [normal(negative, 24, seed=i) for i in range(samples)],
    }
    words = {"shirt": [1, 2], "hat": [5]}
    if samples == 1:
        words["hat"] = [5, texts[0] - 1]  # beyond the negative prompt

    def tokens(call: Call, sample: int) -> Tokens:
        return Tokens(
            range(35), IMAGE, words={word: [64 + i for i in at] for word, at in words.items()}
        )

    def run() -> Tensor:
        return made.pipe(**inputs, generator=torch.Generator().manual_seed(0)).images

    return Model(made.pipe, run, r"^layers\.\d+\.attention$", "first", tokens, words, samples)


class Siglip(torch.nn.Module):
    """What its processor makes of a picture."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, pixel_values: Tensor, spatial_shapes: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=pixel_values)


class SiglipProcessor:
    def __call__(self, images: Sequence[Any], return_tensors: str) -> BatchFeature:
        width, height = images[0].size
        shape = (height // 8, width // 8)
        pixels = normal(1, shape[0] * shape[1] + 2, 20, seed=height)  # two of padding
        return BatchFeature({"pixel_values": pixels, "spatial_shapes": torch.tensor([shape])})


def zimage_omni(samples: int = 1) -> Model:
    """``[texts | references and image | SigLIP]``, each part padded to a multiple of 32."""
    made = seeded(dits.BUILDERS["zimage"], siglip_feat_dim=20)
    parts = {**made.pipe.components, "siglip": Siglip(), "siglip_processor": SiglipProcessor()}
    pipe = diffusers.ZImageOmniPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    # it gives the encoder bf16
    encode = pipe.vae.encode
    pipe.vae.encode = lambda pixels: encode(pixels.float())
    pipe.image_processor.check_image_input = lambda *args, **kwargs: None
    lengths = [(7, 3, 40 + 3 * row, 2) for row in range(samples)]

    def texts(extra: int) -> list[list[Tensor]]:
        return [[normal(n + extra, 24, seed=n) for n in row] for row in lengths]

    inputs = {**made.inputs, "prompt_embeds": texts(0), "negative_prompt_embeds": texts(26)}
    inputs["image"] = [dits.picture(*dits.WIDE), dits.picture(32, 16, seed=1)]
    words = {"shirt": [1, 2], "hat": [5, 39]}

    def tokens(call: Call, sample: int) -> Tokens:
        sizes = [*lengths[sample], 3 * 6, 8 * 4, 5 * 7, 3, 8]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + (size + 31) // 32 * 32)
        grids = {0: (3, 6), 1: (8, 4)}
        keys = {
            n: Keys(range(starts[4 + n], starts[4 + n] + h * w), (h, w))
            for n, (h, w) in grids.items()
        }
        keys |= {2 + n: Keys(range(starts[7 + n], starts[7 + n] + sizes[7 + n])) for n in range(2)}
        text = {word: [starts[2] + i for i in at] for word, at in words.items()}
        return Tokens(range(starts[6], starts[6] + 35), IMAGE, keys, text)

    def run() -> Tensor:
        return pipe(**inputs, generator=torch.Generator().manual_seed(0)).images

    return Model(pipe, run, r"^layers\.\d+\.attention$", "first", tokens, words, samples)


def chroma(samples: int = 1) -> Model:
    """Its padding is masked."""
    made = seeded(dits.BUILDERS["chroma"])
    words = {"shirt": [1, 2], "rest": [0, 3, 4, 5]}
    return Model(
        made.pipe,
        run_of(made, samples),
        BLOCKS,
        "first call",
        joint(("text", T), ("generated", IMAGE), words=words),
        words,
        samples,
    )


# UNets: the level of a layer has its grid


def level(layer: str) -> int:
    if layer.startswith("mid"):
        return 2
    number = int(layer.split(".")[1])
    return number if layer.startswith("down") else 2 - number


def halved(size: tuple[int, int], times: int) -> tuple[int, int]:
    """Sides of 5 become 3."""
    height, width = size
    for _ in range(times):
        height, width = (height + 1) // 2, (width + 1) // 2
    return height, width


def spelled(prompt: str, start: int = 1, length: int = 77, last: int = 1) -> dict[str, list[int]]:
    """Positions of every word where each letter is a token, and of what surrounds them."""
    found: dict[str, list[int]] = {}
    at = start
    for word in re.findall(r"\w+|[^\w\s]", prompt):
        name = word if word[0].isalnum() else "<punctuation>"
        found.setdefault(name, []).extend(range(at, at + len(word)))
        at += len(word)
    found.setdefault("<punctuation>", [])
    found["<special>"] = [*range(start), *range(at, at + last)]
    found["<padding>"] = [*range(at + last, length)]
    return found


PROMPTS = (unets.PROMPT, "the zebra, a hat", "shirt on a shirt")
CROSS = r"^(down|mid|up)_block.*transformer_blocks\.\d+\.attn2$"


def sd(
    cls: str = "StableDiffusionPipeline",
    *adapters: str,
    samples: int = 1,
    images: int = 1,
    words: Any = True,
    **changes: Any,
) -> Model:
    """Of UNets with text encoders, and with IP-Adapters."""
    kind = getattr(diffusers, cls)
    xl = "XL" in cls
    made = unets.make_image_encoder() if adapters and xl else {}
    pipe = seeded(unets.sdxl, kind, **made) if xl else seeded(unets.stable_diffusion, kind)
    if adapters:
        unets.add_ip_adapters(pipe, *adapters)
        pipe.set_ip_adapter_scale([0.6, 0.3][: len(adapters)])
    height, width = 40, 56
    if xl:
        inputs = {"prompt": unets.PROMPT, "num_inference_steps": 2, "output_type": "latent"}
        inputs |= {"height": height, "width": width}
    else:
        inputs = unets.stable_diffusion_arguments(kind, height, width)
    prompts = list(PROMPTS[:samples])
    inputs |= {"prompt": prompts[0] if samples == 1 else prompts, **changes}
    if "Pix2Pix" not in cls:
        inputs["negative_prompt"] = "bad" if samples == 1 else ["bad"] * samples
    if adapters:
        pictures = [unets.picture(seed=5 + number) for number in range(images)]
        inputs["ip_adapter_image"] = [pictures if images > 1 else pictures[0]] * len(adapters)
    if samples > 1 and "image" in inputs:
        inputs["image"] = [inputs["image"]] * samples
        if "mask_image" in inputs:
            inputs["mask_image"] = [inputs["mask_image"]] * samples
    names: dict[str, None] = {}
    for prompt in prompts:
        names |= dict.fromkeys(name for name in spelled(prompt) if name[0] != "<")
    every = [*names, "<punctuation>", "<special>", "<padding>"]
    wanted = every if words is True else list(words)
    numbers = {"base": 4, "full": 17}

    def tokens(call: Call, sample: int) -> Tokens:
        grid = halved((20, 28), level(call.layer))
        assert call.seqlen_q == grid[0] * grid[1]
        queries = range(call.seqlen_q)
        if call.index == 0:
            at = spelled(prompts[sample])
            at["red zebra"] = at.get("red", []) + at.get("zebra", [])
            return Tokens(queries, grid, words={word: at.get(word, []) for word in wanted})
        adapter = adapters[call.index - 1]
        count = numbers[adapter]
        assert call.seqlen_k == count * images
        first = (call.index - 1) * images
        keys, scale = {}, (0.6, 0.3)[call.index - 1]
        for number in range(images):
            start = number * count
            keys[first + number] = (
                Keys(range(start + 1, start + 17), (4, 4), scale)
                if adapter == "full"
                else Keys(range(start, start + count), weight=scale)
            )
        return Tokens(queries, grid, keys)

    def run() -> Tensor:
        return pipe(**inputs, generator=torch.Generator().manual_seed(0)).images

    part = "first third" if "Pix2Pix" in cls else "second"
    return Model(pipe, run, CROSS, part, tokens, words, samples, denoisers=("unet",))


SELF = r"^(down|mid|up)_block.*transformer_blocks\.\d+\.attn1$"


def catvton(name: str, samples: int = 1) -> Model:
    """Two pictures on one canvas; garments come last."""
    pipe = seeded(getattr(unets, name))
    axis, size = pipe.axis, [16, 13] if pipe.axis == -2 else [13, 16]

    def tokens(call: Call, sample: int) -> Tokens:
        canvas = list(size)
        canvas[axis] *= 2
        grid = halved((canvas[0], canvas[1]), level(call.layer))
        assert call.seqlen_q == call.seqlen_k == grid[0] * grid[1]
        person, garment = torch.arange(call.seqlen_k).view(grid).chunk(2, axis)
        keys = Keys(garment.flatten().tolist(), tuple(garment.shape))
        return Tokens(person.flatten().tolist(), tuple(person.shape), {0: keys})

    def run() -> Tensor:
        return pipe(size[0], size[1], samples=samples)

    return Model(pipe, run, SELF, "second", tokens, None, samples, denoisers=("unet",))


def painting(samples: int, *size: int, seed: int = 0) -> Tensor:
    """Values from 0 to 1."""
    return normal(samples, 3, *size, seed=seed).sigmoid()


def hole(samples: int, height: int, width: int) -> Tensor:
    mask = torch.zeros(samples, 1, height, width)
    mask[..., 8 : height - 8, 4 : width - 8] = 1
    return mask


def paint_by_example(samples: int = 1) -> Model:
    """Of diffusers: the reference is one token."""
    pipe = seeded(unets.paint_by_example)
    size = (40, 56)
    inputs = {
        "image": painting(samples, *size),
        "mask_image": hole(samples, *size),
        "example_image": painting(samples, 16, 16, seed=1),
    }

    def tokens(call: Call, sample: int) -> Tokens:
        grid = halved((20, 28), level(call.layer))
        assert (call.seqlen_q, call.seqlen_k) == (grid[0] * grid[1], 1)
        return Tokens(range(call.seqlen_q), grid, {0: Keys([0])})

    def run() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "output_type": "latent"}
        return pipe(**inputs, **options, generator=generator).images

    return Model(pipe, run, CROSS, "second", tokens, None, samples, denoisers=("unet",))


def _own_paint_by_example() -> models.PaintByExamplePipeline:
    with tempfile.TemporaryDirectory() as folder:
        models.diffusers_pipeline().save_pretrained(folder)
        return models.PaintByExamplePipeline.from_pretrained(folder)


def _stableviton() -> models.StableVITONPipeline:
    unet = models.StableVITONUNet(**models.TINY_STABLEVITON).eval()
    for parameter in unet.parameters():
        if not parameter.any():  # where training begins with zeros
            nn.init.normal_(parameter, std=0.1)
    return models.StableVITONPipeline(**_own_paint_by_example().components | {"unet": unet})


OWN: dict[str, Callable[[], Any]] = {
    "custom": partial(models.TINY_CUSTOM.build, seed=0),
    "paint_by_example": _own_paint_by_example,
    "dci_vton": lambda: models.DCIVTONPipeline(**_own_paint_by_example().components),
    "stableviton": _stableviton,
}


def own(name: str, samples: int = 1) -> Model:
    """The pipelines of i2am."""
    pipe = seeded(OWN[name])
    pipe.set_progress_bar_config(disable=True)
    size = (36, 28)
    inputs = {
        "image": painting(samples, *size),
        "mask_image": hole(samples, *size),
        "reference_image": painting(samples, 20, 16, seed=1),
    }
    if name == "stableviton":
        inputs["pose_image"] = painting(samples, *size, seed=2)
    if name == "dci_vton":
        inputs["warped_image"] = painting(samples, *size, seed=2)
        inputs["warped_mask_image"] = hole(samples, *size)

    def tokens(call: Call, sample: int) -> Tokens:
        warp = re.match(r"warp_blocks\.(\d)", call.layer)
        # three warp blocks of each level; of the other UNets one level alone attends
        grid = halved((18, 14), 1 if warp is None or int(warp[1]) < 3 else 0)
        assert call.seqlen_q == grid[0] * grid[1]
        keys = {
            "custom": Keys(range(1, 13), (4, 3)),
            "stableviton": Keys(range(call.seqlen_q), grid),
        }
        reference = keys.get(name, Keys([0]))
        assert call.seqlen_k == reference.positions[-1] + 1
        return Tokens(range(call.seqlen_q), grid, {0: reference})

    def run() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 3.0}
        options |= {"height": size[0], "width": size[1]}
        return pipe(**inputs, **options, generator=generator).images

    warps = name == "stableviton"
    return Model(
        pipe,
        run,
        r"^warp_blocks.*attn2$" if warps else CROSS,
        {"custom": "first", "stableviton": "first call"}.get(name, "second"),
        tokens,
        None,
        samples,
        denoisers=("unet",),
    )


def second_unet(name: str, samples: int = 1) -> Model:
    """The garment's features lie behind the person's tokens."""
    pipe = seeded(getattr(unets, name))
    size = (15, 10)
    idm = name == "idm_vton"
    person = normal(samples, 9 if idm else 4, *size)
    garment = normal(samples, 4, *size, seed=1)

    def tokens(call: Call, sample: int) -> Tokens:
        grid = halved(size, level(call.layer))
        n = grid[0] * grid[1]
        assert call.seqlen_q == call.seqlen_k == 2 * n
        return Tokens(range(n), grid, {0: Keys(range(n, 2 * n), grid)})

    return Model(
        pipe,
        lambda: pipe(person, garment),
        SELF,
        "second" if idm else "first",
        tokens,
        None,
        samples,
        denoisers=("unet" if idm else "unet_vton",),
    )


# Videos

VIDEO = (3, 2, 3)


def wan(kind: str, samples: int = 1, layout: Any = None) -> Model:
    pipe = seeded(unets.wan, kind)
    inputs = unets.wan_arguments(kind)
    inputs = widened(inputs, samples) if samples > 1 else inputs
    words = {"shirt": [1, 2, 3], "rest": [0, *range(4, 512)]}

    def run() -> Tensor:
        return pipe(**inputs, generator=torch.Generator().manual_seed(0)).frames

    def words_of(call: Call, sample: int) -> Tokens:
        assert call.seqlen_q == 18
        if kind == "i2v" and call.index == 0:  # a class token and 4x4 patches
            assert call.seqlen_k == 17
            return Tokens(range(18), VIDEO, {0: Keys(range(1, 17), (4, 4))})
        assert call.seqlen_k == 512
        return Tokens(range(18), VIDEO, words=words)

    def frames(call: Call, sample: int) -> Tokens:
        first = 2 if kind == "vace" else 1
        assert call.seqlen_q == call.seqlen_k == 6 * (3 + (first if kind == "vace" else 0))
        frames = call.seqlen_q // 6
        # of two pictures the second lies in front
        keys = {number: Keys(range(6 * number, 6 * number + 6), (2, 3)) for number in range(first)}
        return Tokens(range(6 * first, call.seqlen_q), (frames - first, 2, 3), keys)

    two = kind in ("t2v_22", "i2v_22")
    return Model(
        pipe,
        run,
        r"^blocks\.\d+\.attn2$" if layout is None else r"^blocks\.\d+\.attn1$",
        "first call",
        words_of if layout is None else frames,
        words if layout is None else None,
        samples,
        steps=4,
        layout=layout,
        denoisers=("transformer", "transformer_2") if two else ("transformer",),
    )


FAMILIES: dict[str, Callable[..., Model]] = {
    "flux kontext": partial(flux, "kontext", (3, 6)),
    "flux kontext, true guidance": partial(flux, "kontext", (3, 6), true_cfg_scale=2.0),
    "flux kontext inpaint": partial(flux, "kontext inpaint", (3, 6)),
    "flux dev": partial(flux, "dev"),
    "flux fill": partial(flux, "fill"),
    "flux control": partial(flux, "control"),
    "flux img2img": partial(flux, "img2img"),
    "flux inpaint": partial(flux, "inpaint"),
    "flux adapters": partial(flux_adapters, "adapter"),
    "flux kontext adapters": partial(flux_adapters, "kontext adapter", (3, 6)),
    "flux2 dev": partial(flux2, "dev", (3, 6), (7, 2)),
    "flux2 dev, one reference": partial(flux2, "dev", (3, 6), references=(dits.WIDE,)),
    "flux2 klein": partial(flux2, "klein", (3, 6), (7, 2)),
    # its references get the size of the first
    "flux2 klein inpaint": partial(flux2, "klein inpaint", IMAGE, (3, 6), (3, 6)),
    "flux2 klein kv": partial(flux2, "klein kv", (3, 6), (7, 2)),
    "qwen": partial(qwen, "text"),
    "qwen edit": partial(qwen, "edit", (16, 8)),
    "qwen edit, padded": partial(qwen, "edit", (16, 8), padded=True),
    "qwen edit inpaint": qwen_edit_inpaint,
    "qwen edit plus": partial(qwen, "edit plus", (8, 16), (16, 8)),
    "sd3": sd3,
    "sd3 adapter": partial(sd3, adapter=True),
    "zimage": zimage,
    "zimage omni": zimage_omni,
    "chroma": chroma,
    "paint by example": paint_by_example,
    "own custom": partial(own, "custom"),
    "own paint by example": partial(own, "paint_by_example"),
    "own dci-vton": partial(own, "dci_vton"),
    "own stableviton": partial(own, "stableviton"),
    "sd": sd,
    "sd, some words": partial(sd, words=["zebra", "red zebra"]),
    "sd img2img": partial(sd, "StableDiffusionImg2ImgPipeline"),
    "sd inpaint": partial(sd, "StableDiffusionInpaintPipeline"),
    "sd controlnet": partial(sd, "StableDiffusionControlNetPipeline"),
    "sd adapters": partial(sd, "StableDiffusionPipeline", "base", "full"),
    "sd adapter of two images": partial(sd, "StableDiffusionPipeline", "full", images=2),
    "sdxl": partial(sd, "StableDiffusionXLPipeline"),
    "sdxl adapter": partial(sd, "StableDiffusionXLPipeline", "base"),
    "instruct pix2pix": partial(sd, "StableDiffusionInstructPix2PixPipeline"),
    "catvton": partial(catvton, "CatVTONPipeline"),
    "catvton pix2pix": partial(catvton, "CatVTONPix2PixPipeline"),
    "idm-vton": partial(second_unet, "idm_vton"),
    "ootdiffusion": partial(second_unet, "ootdiffusion"),
    "wan t2v": partial(wan, "t2v"),
    "wan 2.2 t2v": partial(wan, "t2v_22"),
    "wan i2v": partial(wan, "i2v"),
    "wan 2.2 i2v": partial(wan, "i2v_22"),
    "wan ti2v": partial(wan, "ti2v_22"),
    "wan ti2v, first frame": partial(wan, "ti2v_22", layout=first_frame()),
    "wan vace": partial(wan, "vace", layout=reference_frames(2)),
}

# three samples, each with other texts or pictures where its pipeline takes them
BATCHES: dict[str, Callable[..., Model]] = {
    "flux kontext": partial(flux, "kontext", (3, 6), samples=3),
    "flux adapters": partial(flux_adapters, "adapter", samples=3),
    "flux2 dev": partial(flux2, "dev", (3, 6), (7, 2), samples=3),
    "flux2 klein": partial(flux2, "klein", (3, 6), (7, 2), samples=3),
    "flux2 klein kv": partial(flux2, "klein kv", (3, 6), (7, 2), samples=3),
    "qwen": partial(qwen, "text", samples=3),
    "qwen edit": partial(qwen, "edit", (16, 8), samples=3),
    "qwen edit plus": partial(qwen, "edit plus", (8, 16), (16, 8), samples=3),
    "sd3": partial(sd3, samples=3),
    "sd3 adapter": partial(sd3, samples=3, adapter=True),
    "zimage": partial(zimage, samples=3),
    "zimage omni": partial(zimage_omni, samples=3),
    "chroma": partial(chroma, samples=3),
    "sd": partial(sd, samples=3),
    "sd, some words": partial(sd, words=["zebra"], samples=2),
    "sd inpaint": partial(sd, "StableDiffusionInpaintPipeline", samples=3),
    "sd adapters": partial(sd, "StableDiffusionPipeline", "base", "full", samples=3),
    "sdxl": partial(sd, "StableDiffusionXLPipeline", samples=3),
    "instruct pix2pix": partial(sd, "StableDiffusionInstructPix2PixPipeline", samples=3),
    "paint by example": partial(paint_by_example, samples=3),
    "own custom": partial(own, "custom", samples=3),
    "own paint by example": partial(own, "paint_by_example", samples=3),
    "own stableviton": partial(own, "stableviton", samples=3),
    "catvton": partial(catvton, "CatVTONPipeline", samples=3),
    "idm-vton": partial(second_unet, "idm_vton", samples=3),
    "ootdiffusion": partial(second_unet, "ootdiffusion", samples=3),
    "wan t2v": partial(wan, "t2v", samples=3),
    "wan 2.2 t2v": partial(wan, "t2v_22", samples=3),
    "wan i2v": partial(wan, "i2v", samples=3),
}
