"""Each set of parameters is exactly what its recipe names, and only those learn."""

import pytest
import torch
from torch import nn

from i2am.models import POCKET
from i2am.training.trainable import SETS, select_parameters


def _names(pipeline) -> set[str]:
    return {
        f"{component}.{name}"
        for component, module in pipeline.components.items()
        if isinstance(module, nn.Module)
        for name, _ in module.named_parameters()
    }


def _expected(names: set[str], which: str) -> set[str]:
    """The sets in other words than the module's: by what is frozen, as the recipe lists it."""
    projection = {name for name in names if name.startswith("image_proj.")}
    unet = {name for name in names if name.startswith("unet.")}
    encoder = {name for name in names if name.startswith("image_encoder.")}
    if which == "all":
        return projection | unet | (encoder - {"image_encoder.embeddings.mask_token"})
    if which == "paper":
        frozen = ("unet.mid_block.", "unet.time_embedding.")
        unet = {name for name in unet if not name.startswith(frozen)}
        return projection | {
            name for name in unet if not name.startswith("unet.down_blocks.") or ".attn2." in name
        }
    cross = {name for name in unet if ".attn2." in name}
    return projection | cross | {"unet.conv_in.weight", "unet.conv_in.bias"}


@pytest.mark.parametrize("which", ["all", "paper", "lite"])
def test_the_set_is_trainable_and_nothing_else(which) -> None:
    pipeline = POCKET.build()
    chosen = select_parameters(pipeline, which)
    names = [name for name, _ in chosen]
    assert len(set(names)) == len(names)
    assert set(names) == _expected(_names(pipeline), which)
    assert "image_proj.uncond_vector" in names
    trainable = {
        f"{component}.{name}"
        for component, module in pipeline.components.items()
        if isinstance(module, nn.Module)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    assert trainable == set(names)
    for name, parameter in chosen:
        component, _, rest = name.partition(".")
        assert parameter is pipeline.components[component].get_parameter(rest)


def test_a_set_can_follow_another() -> None:
    pipeline = POCKET.build()
    for which in ("lite", "all", "lite"):
        chosen = {id(parameter) for _, parameter in select_parameters(pipeline, which)}
        for module in pipeline.components.values():
            for parameter in module.parameters() if isinstance(module, nn.Module) else ():
                assert parameter.requires_grad == (id(parameter) in chosen)


@pytest.mark.parametrize("which", ["all", "paper", "lite"])
def test_a_step_changes_all_of_the_set_and_nothing_else(which) -> None:
    pipeline = POCKET.build()
    chosen = select_parameters(pipeline, which)
    before = {
        component: {name: values.clone() for name, values in module.state_dict().items()}
        for component, module in pipeline.components.items()
        if isinstance(module, nn.Module)
    }
    optimizer = torch.optim.SGD([parameter for _, parameter in chosen], lr=1.0)
    generator = torch.Generator().manual_seed(0)
    tokens = pipeline.image_encoder(torch.rand(2, 3, 128, 96, generator=generator))
    context, unconditional = pipeline.image_proj(tokens.last_hidden_state)
    # one sample of each kind, so that the unconditional context gets a gradient too
    context = torch.stack([context[0], unconditional[1]])
    sample = torch.randn(2, 12, 32, 24, generator=generator)
    predicted = pipeline.unet(sample, torch.tensor([10, 900]), encoder_hidden_states=context).sample
    (predicted - torch.randn(predicted.shape, generator=generator)).square().sum().backward()
    optimizer.step()
    changed = {
        f"{component}.{name}"
        for component, state in before.items()
        for name, values in pipeline.components[component].state_dict().items()
        if not torch.equal(values, state[name])
    }
    assert changed == {name for name, _ in chosen}


def test_an_unknown_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"which must be one of all, paper, lite, got 'most'"):
        select_parameters(POCKET.build(), "most")
    assert list(SETS) == ["all", "paper", "lite"]
