"""``i2am convert``: a published checkpoint becomes a folder that every other command takes."""

import json
import logging
import sys
from pathlib import Path

import click

from i2am.cli import flags
from i2am.cli.output import echo
from i2am.cli.types import FILE

log = logging.getLogger("i2am")


# known without importing torch
SYSTEMS = ("paint-by-example", "dci-vton", "stableviton", "custom")


@click.command(short_help="Turn a published checkpoint into a model folder.")
@click.argument("checkpoint", type=FILE)
@click.option("--system", type=click.Choice(SYSTEMS), required=True, help="Whose checkpoint it is.")
@click.option("-o", "--out", type=FILE, required=True, help="Folder to write.")
@click.option(
    "--vae",
    type=FILE,
    help="File of an autoencoder alone to take in place of the checkpoint's own, "
    "such as VITONHD_VAE_finetuning.ckpt.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of the weights; by default each tensor keeps its own.",
)
@click.option(
    "--drop",
    metavar="PREFIX",
    multiple=True,
    help="Leave out tensors whose names begin so, beside those known to be no weights; may be "
    "repeated.",
)
@flags.overwrite
@flags.quiet
@flags.as_json
@flags.verbose
def convert(
    checkpoint: Path,
    system: str,
    out: Path,
    vae: Path | None,
    dtype: str | None,
    drop: tuple[str, ...],
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """Turn a published checkpoint into a folder in diffusers layout.

    CHECKPOINT is a .ckpt or .safetensors file in its authors' naming. Nothing in it is executed:
    only its tensors are read. All names and shapes are checked before anything is written. The
    folder appears complete or not at all; its run.json has the hashes of all files.

    Exit codes: 0 done, 1 unexpected, 2 usage, 4 input rejected, 5 output folder in use, 74 disk
    fault, 130 interrupted, 143 terminated.
    """
    if verbose:
        log.setLevel(logging.DEBUG)
    # the imports below take seconds
    log.info("converting %s as %s", checkpoint, system)
    import torch

    from i2am.cli.errors import InputRejected
    from i2am.models.conversion import convert as run

    try:
        result = run(
            checkpoint,
            out,
            system=system,
            vae=vae,
            dtype=None if dtype is None else getattr(torch, dtype),
            drop=drop,
            overwrite=overwrite,
            progress=not quiet and sys.stderr.isatty(),
        )
    except (ValueError, FileNotFoundError) as error:
        raise InputRejected(str(error)) from error
    summary = {
        "folder": str(result.folder),
        "pipeline": result.pipeline,
        "sources": result.sources,
        "dropped": result.dropped,
        "files": result.files,
    }
    if as_json:
        echo(json.dumps(summary))
        return
    size = sum(entry["bytes"] for entry in result.files.values())
    echo(f"{out}: {result.pipeline}, {size / 1e9:.2f} GB in {len(result.files)} files")
    echo(f"  from {checkpoint.name}, sha256 {result.sources['checkpoint']['sha256']}")
    if result.dropped:
        some = ", ".join(result.dropped[:4]) + (", ..." if len(result.dropped) > 4 else "")
        echo(f"  {len(result.dropped)} tensors that are no weights of it left out: {some}")
