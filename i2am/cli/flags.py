"""Flags that commands share: one name, one meaning, one help text."""

import click

dry_run = click.option(
    "--dry-run", is_flag=True, help="Check everything, print an estimate, write nothing."
)
overwrite = click.option(
    "--overwrite", is_flag=True, help="Replace an earlier result in the folder."
)
quiet = click.option("--quiet", is_flag=True, help="No progress bars.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
verbose = click.option("-v", "--verbose", is_flag=True, help="More messages; tracebacks of errors.")
