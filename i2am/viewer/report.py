"""Reports: one page, or a folder with an index page and a file per sample."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from i2am.attribution.maps import AttributionMaps
from i2am.attribution.presets import Preset
from i2am.data.arrays import ImageInput, as_pil, masks
from i2am.files import MANIFEST, canonical, check_place, fresh_folder, make_folder, write
from i2am.viewer.content import References, Sample, Score, references, sample
from i2am.viewer.html import as_json, render, shell
from i2am.viewer.pictures import jpeg, shown

INDEX = "index.html"
THUMBNAIL = 144
"""Longer side of each of the two pictures of a thumbnail, in pixels."""


def page(
    maps: AttributionMaps,
    *,
    generated: ImageInput,
    reference: References = None,
    mask: ImageInput | None = None,
    reference_mask: ImageInput | None = None,
    scores: Mapping[str, Score] | None = None,
    title: str = "i2am",
    ids: Sequence[str] | None = None,
    facts: Mapping[str, str] | None = None,
    preset: str | Preset = "paper",
    compress: bool = True,
) -> str:
    """A page that shows the samples of one recording, each to be compared with the others.

    Args:
        maps: The recording. With pair maps, ``record(pairs=True)``, any patch can be pointed at.
        generated: The generated images, one per sample; see `i2am.data.arrays.pictures`.
        reference: The reference images, likewise; a single one serves every sample. Of several
            ``{name: images}``, see :attr:`AttributionMaps.sources`; None for words alone.
        mask: White where the images were painted, likewise, see `i2am.data.arrays.masks`; for
            outlines. Of the shape of its image to within 1 %.
        reference_mask: White on the object in the reference, likewise; for outlines.
        scores: Scores of a single sample, as ``scores.json`` has them.
        title: Name of the page.
        ids: Names of the samples; by default the title, and numbers for several.
        facts: What made the images, in words.
        preset: How overall maps are read and drawn.
        compress: Whether maps are deflated, for browsers from 2023 on.

    Returns:
        One self-contained HTML document.

    Raises:
        TypeError: Something that is no image.
        ValueError: An image cannot be read, a mask has another shape than its picture or comes with
            several references, there are not as many references as were recorded, or not as many
            images or ids as samples, two ids are equal, scores come with several samples or hold
            NaN, or the maps hold NaN or Inf.

    Example:
        >>> html = page(maps, generated=image, reference=garment)  # doctest: +SKIP
    """
    count = maps.n_samples
    images = {
        "generated": _each("generated", as_pil(generated, "generated"), count, one=count == 1),
        "mask": _each("mask", None if mask is None else masks(mask, "mask"), count),
        "reference_mask": _each(
            "reference_mask",
            None if reference_mask is None else masks(reference_mask, "reference_mask"),
            count,
        ),
    }
    given = {
        name: _each("reference", as_pil(some, "reference"), count)
        for name, some in references(maps, reference).items()
    }
    if scores is not None and count > 1:
        raise ValueError(f"scores must come with a single sample, got {count} samples")
    if ids is None:
        ids = [title] if count == 1 else [f"sample {number}" for number in range(count)]
    if len(ids) != count:
        raise ValueError(f"ids must be as many as samples, {count}, got {len(ids)}")
    samples = [
        sample(
            maps,
            index=index,
            id=ids[index],
            scores=scores,
            facts=facts,
            preset=preset,
            reference={name: some[index] for name, some in given.items()},
            **{name: some[index] for name, some in images.items()},
        )
        for index in range(count)
    ]
    return render(samples, title=title, compress=compress)


def write_report(
    path: str | Path,
    samples: Iterable[Sample],
    *,
    title: str = "i2am",
    overwrite: bool = False,
    compress: bool = True,
) -> list[str]:
    """Writes samples as one page, or as a folder for many.

    Args:
        path: A name that ends in ``.html`` becomes one page, with everything in it; any other
            becomes a folder with ``index.html``, and a script and a thumbnail per sample.
        samples: At least one, with different ids. For a folder they are taken one at a time.
        title: Name of the page.
        overwrite: Whether an earlier folder may be replaced; a page always is.
        compress: Whether maps are deflated, for browsers from 2023 on.

    Returns:
        Names of the files written, relative to the folder they are in.

    Raises:
        ValueError: There is no sample, or two have the same id.
        OutputRefused: The folder holds something else, or cannot be made.
        OSError: The disk failed; what was there before is intact.
    """
    path = Path(path)
    if path.suffix.lower() in (".html", ".htm"):
        check_place(path, kind="file")
        text = render(list(samples), title=title, compress=compress)
        make_folder(path.absolute().parent)
        write(path, _encoded(text))
        return [path.name]
    with fresh_folder(path, overwrite=overwrite) as folder:
        names = _write_folder(folder, samples, title=title, compress=compress)
    return names


def _write_folder(
    folder: Path, samples: Iterable[Sample], *, title: str, compress: bool
) -> list[str]:
    (folder / "data").mkdir()
    entries: list[dict[str, Any]] = []
    names: list[str] = []
    seen: set[str] = set()
    for number, one in enumerate(samples):
        if one.id in seen:
            raise ValueError(f"samples must have different ids, got {one.id!r} twice")
        seen.add(one.id)
        # ids are any text, file names are not
        data, thumbnail = f"data/{number:06d}.js", f"data/{number:06d}.jpg"
        script = f"i2am.sample({as_json(one.document(compress=compress))});\n"
        (folder / data).write_text(script, encoding="ascii")
        (folder / thumbnail).write_bytes(_thumbnail(one))
        scores = {name: dict(score) for name, score in one.scores.items()}
        entries.append({"id": one.id, "data": data, "thumbnail": thumbnail, "scores": scores})
        names += [data, thumbnail]
    if not entries:
        raise ValueError("samples must be at least one, got none")
    text = shell(title, {"samples": entries}, folder=True)
    (folder / INDEX).write_bytes(_encoded(text))
    names = [INDEX, *names]
    # marks the folder as ours, so that the next report may replace it
    (folder / MANIFEST).write_bytes(canonical({"command": "report", "files": names}))
    return names


def _encoded(text: str) -> bytes:
    # file names that are no UTF-8 are shown with their codes
    return text.encode("utf-8", "backslashreplace")


def _thumbnail(sample: Sample) -> bytes:
    """The generated image beside its reference, if there is one."""
    from PIL import Image

    images = [image for image in (sample.generated, sample.sources[0].reference) if image]
    pictures = [shown(image, THUMBNAIL) for image in images]
    width = sum(picture.width for picture in pictures)
    sheet = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, (sheet.height - picture.height) // 2))
        left += picture.width
    return jpeg(sheet, quality=82)


def _each(name: str, given: list[Any] | None, count: int, *, one: bool = True) -> list[Any]:
    """One image, or None, per sample; a single image serves all where `one` allows it."""
    if given is None:
        return [None] * count
    if len(given) == 1 and one:
        given = given * count
    if len(given) != count:
        raise ValueError(f"{name} must be as many images as samples, {count}, got {len(given)}")
    return given
