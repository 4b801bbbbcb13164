"""Random numbers as functions of (seed, purpose, step, rank): resuming needs no random state."""

import hashlib

import torch


def generator(seed: int, purpose: str, *place: int) -> torch.Generator:
    """A CPU generator of its own for one purpose at one place of the training.

    Args:
        seed: Seed of the training.
        purpose: For example "noise"; another purpose has independent numbers.
        place: Step, micro step, rank and whatever else tells draws apart.
    """
    words = ":".join(map(str, (seed, purpose, *place)))
    digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
    # torch takes 64 bits, Python's own hash is salted per process
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


class Order:
    """Which scenes a step sees: every epoch is a permutation of its own.

    Args:
        count: Number of scenes.
        seed: Seed of the training.
        purpose: Tells the stages apart.
    """

    def __init__(self, count: int, seed: int, purpose: str) -> None:
        self.count, self.seed, self.purpose = count, seed, purpose
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long)

    def __call__(self, start: int, length: int) -> list[int]:
        """Scenes of the places `start` to `start + length` of the endless sequence."""
        return [self._at(place) for place in range(start, start + length)]

    def _at(self, place: int) -> int:
        epoch, offset = divmod(place, self.count)
        if epoch != self._epoch:
            draws = generator(self.seed, f"{self.purpose} order", epoch)
            self._permutation = torch.randperm(self.count, generator=draws)
            self._epoch = epoch
        return int(self._permutation[offset])
