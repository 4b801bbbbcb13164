"""The sentence about a package that a metric needs and that is not there."""

from importlib.metadata import version


def missing(what: str, package: str, error: Exception) -> str:
    """One sentence about a metric's package that could not be imported, and how to get it.

    torchvision and torch-fidelity, which needs it, are in no extra: pip would replace a CPU build
    of torch to fit the torchvision of PyPI.

    Args:
        what: What needs it.
        package: scipy, torchmetrics, torchvision or torch-fidelity.
        error: What the import raised.
    """
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if "torchvision" in package + reason:
        remedy = f"install the torchvision that was built for torch {version('torch')}"
    elif package == "torch-fidelity":
        remedy = (
            f"install the torchvision that was built for torch {version('torch')}, "
            "then: pip install torch-fidelity"
        )
    else:
        remedy = 'install it with: pip install "i2am[metrics]"'
    return f"{what} needs {package}, which could not be imported ({reason}); {remedy}"
