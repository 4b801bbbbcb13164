"""Random numbers depend on seed, purpose and place, and on nothing else."""

import torch

from i2am.training.draws import Order, generator


def test_the_same_place_has_the_same_numbers() -> None:
    first = torch.rand(4, generator=generator(0, "noise", 3, 0))
    torch.manual_seed(5)
    assert torch.equal(first, torch.rand(4, generator=generator(0, "noise", 3, 0)))


def test_other_places_have_other_numbers() -> None:
    places = [(0, "noise", 3, 0), (1, "noise", 3, 0), (0, "order", 3, 0), (0, "noise", 30)]
    places += [(0, "noise", 4, 0), (0, "noise", 3, 1)]
    draws = {tuple(torch.rand(4, generator=generator(*place)).tolist()) for place in places}
    assert len(draws) == len(places)


def test_another_process_has_the_same_numbers(fork) -> None:
    # Python salts its own hash per process
    code = (
        "import torch; from i2am.training.draws import generator;"
        "print(torch.rand(2, generator=generator(7, 'noise', 1)).tolist())"
    )
    out, _ = fork(code).communicate()
    assert out.strip() == str(torch.rand(2, generator=generator(7, "noise", 1)).tolist())


def test_every_epoch_is_a_permutation() -> None:
    order = Order(7, seed=0, purpose="denoiser")
    epochs = [order(7 * epoch, 7) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_order_does_not_depend_on_what_was_asked_before() -> None:
    order = Order(7, seed=0, purpose="denoiser")
    whole = order(0, 40)
    # steps of two processes, taken apart and in any order
    for start in (30, 5, 20, 6, 0):
        assert order(start, 5) == whole[start : start + 5]
    assert Order(7, seed=1, purpose="denoiser")(0, 40) != whole
    assert Order(7, seed=0, purpose="autoencoder")(0, 40) != whole
