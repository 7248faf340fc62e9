"""The projectors against independent ones, and the token plan against what they really make."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from omni.projectors import PROJECTORS, num_tokens

D, T = 12, 20  # widths of the encoder and of the language model
OUTPUTS = ("cls", "grid", "cls+grid")
GRIDS = ((4, 6), (2, 2), (8,), (6,), (7,), (1,))
CASES = [
    (kind, output, factor, grid)
    for kind in PROJECTORS
    for output in OUTPUTS
    for factor in ((1, 2) if kind == "unshuffle_mlp" else (1,))
    for grid in GRIDS
]


def make(kind: str, output: str, factor: int, grid: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    return PROJECTORS[kind](hidden_size=D, text_hidden_size=T, factor=factor, grid_dims=len(grid), output=output)


def tokens(output: str, grid: tuple[int, ...], batch: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    patches = int(torch.tensor(grid).prod())
    made = {"cls": torch.randn(batch, 1, D), "grid": torch.randn(batch, patches, D)}
    return {name: made[name] for name in output.split("+")}


def linear(p: nn.Module, t: dict[str, torch.Tensor], grid: tuple[int, ...], k: int) -> torch.Tensor:
    return torch.cat([x @ p.linear.weight.T + p.linear.bias for x in t.values()], dim=1)


def mlp(p: nn.Module, t: dict[str, torch.Tensor], grid: tuple[int, ...], k: int) -> torch.Tensor:
    return torch.cat([F.linear(F.gelu(F.linear(x, *p.fc1.parameters())), *p.fc2.parameters()) for x in t.values()], 1)


def unshuffle_mlp(p: nn.Module, t: dict[str, torch.Tensor], grid: tuple[int, ...], k: int) -> torch.Tensor:
    made = []
    if "cls" in t:
        made.append(F.linear(t["cls"], *p.cls_fc1.parameters()))
    if "grid" in t:
        if len(grid) == 2:
            pattern = "b (h kh w kw) d -> b (h w) (kh kw d)"
            folded = rearrange(t["grid"], pattern, h=grid[0] // k, kh=k, w=grid[1] // k, kw=k)
        else:
            zeros = t["grid"].new_zeros(len(t["grid"]), -grid[0] % k, D)
            folded = rearrange(torch.cat([t["grid"], zeros], dim=1), "b (n k) d -> b n (k d)", k=k)
        made.append(F.linear(folded, *p.fc1.parameters()))
    return torch.cat([F.linear(F.gelu(x), *p.fc2.parameters()) for x in made], dim=1)


REFERENCES: dict[str, Callable[..., torch.Tensor]] = {"linear": linear, "mlp": mlp, "unshuffle_mlp": unshuffle_mlp}


def test_every_projector_has_a_reference() -> None:
    assert REFERENCES.keys() == PROJECTORS.keys()


@pytest.mark.parametrize(("kind", "output", "factor", "grid"), CASES)
def test_equals_an_independent_implementation(kind: str, output: str, factor: int, grid: tuple[int, ...]) -> None:
    projector, given = make(kind, output, factor, grid), tokens(output, grid)
    torch.testing.assert_close(projector(given, grid), REFERENCES[kind](projector, given, grid, factor))


@pytest.mark.parametrize(("kind", "output", "factor", "grid"), CASES)
def test_the_plan_counts_what_is_made(kind: str, output: str, factor: int, grid: tuple[int, ...]) -> None:
    made = make(kind, output, factor, grid)(tokens(output, grid), grid)
    assert made.shape == (3, num_tokens(output, kind, factor, grid), T)


@pytest.mark.parametrize(("kind", "output", "factor", "grid"), CASES)
def test_an_item_does_not_see_its_neighbours(kind: str, output: str, factor: int, grid: tuple[int, ...]) -> None:
    projector, given = make(kind, output, factor, grid), tokens(output, grid)
    alone = projector({name: value[1:2] for name, value in given.items()}, grid)
    torch.testing.assert_close(projector(given, grid)[1:2], alone)


def test_cls_stands_before_the_grid() -> None:
    for kind in PROJECTORS:
        projector, given = make(kind, "cls+grid", 1, (2, 2)), tokens("cls+grid", (2, 2))
        before = projector(given, (2, 2))
        given["cls"] = given["cls"] + 1
        changed = (projector(given, (2, 2)) - before).abs().amax(dim=(0, 2)) > 0
        assert changed.tolist() == [True, False, False, False, False], kind


def test_neighbours_are_folded_in_reading_order() -> None:
    """One number per patch of a 4 x 4 grid, k = 2: the first token holds the patches 0, 1, 4, 5."""
    from omni.grids import unshuffle

    grid = torch.arange(16.0).reshape(1, 16, 1)
    assert unshuffle(grid, (4, 4), 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert unshuffle(torch.arange(6.0).reshape(1, 6, 1), (6,), 3)[0].tolist() == [[0, 1, 2], [3, 4, 5]]


def parameters(kind: str, output: str, factor: int) -> int:
    made = PROJECTORS[kind](hidden_size=128, text_hidden_size=256, factor=factor, grid_dims=2, output=output)
    return sum(p.numel() for p in made.parameters())


def test_parameters() -> None:
    """From the seed's encoder (128) to the seed's Thinker (256); its `proj_v` has 33,024."""
    for output in OUTPUTS:
        assert parameters("linear", output, 1) == 128 * 256 + 256 == 33_024
        assert parameters("mlp", output, 1) == 33_024 + 256 * 256 + 256
    assert parameters("unshuffle_mlp", "cls", 2) == 33_024 + 65_792
    assert parameters("unshuffle_mlp", "grid", 2) == (4 * 128 * 256 + 256) + 65_792
    assert parameters("unshuffle_mlp", "cls+grid", 2) == 33_024 + (4 * 128 * 256 + 256) + 65_792


@pytest.mark.parametrize("output", OUTPUTS)
def test_no_parameter_is_idle(output: str) -> None:
    for kind in PROJECTORS:
        projector = make(kind, output, 2 if kind == "unshuffle_mlp" else 1, (2, 2))
        projector(tokens(output, (2, 2)), (2, 2)).sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() for p in projector.parameters()), kind


def test_zeros_complete_the_last_neighbourhood_of_a_sound() -> None:
    """Of 5 tokens by threes there are two."""
    from omni.grids import unshuffle

    assert unshuffle(torch.arange(1.0, 6.0).reshape(1, 5, 1), (5,), 3)[0].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert [num_tokens("cls+grid", "unshuffle_mlp", 3, (n,)) for n in range(1, 8)] == [2, 2, 2, 3, 3, 3, 4]


@pytest.mark.parametrize("grid", [(3, 4), (4, 3), (2, 3, 2)])
def test_a_grid_that_does_not_divide(grid: tuple[int, ...]) -> None:
    shape = "x".join(map(str, grid))
    with pytest.raises(ValueError, match=f"neighbourhoods of 2 .* grid of {shape} patches is not divisible by 2"):
        num_tokens("cls+grid", "unshuffle_mlp", 2, grid)
    assert num_tokens("cls", "unshuffle_mlp", 2, grid) == 1  # whose grid is not folded


def test_the_seeds_pictures() -> None:
    """224 px in patches of 16: 196 tokens, 1 + 196 with CLS, 49 or 50 when 2 x 2 become one."""
    plan = [num_tokens(output, "mlp", 1, (14, 14)) for output in OUTPUTS]
    assert plan == [1, 196, 197]
    assert [num_tokens(output, "unshuffle_mlp", 2, (14, 14)) for output in OUTPUTS] == [1, 49, 50]


@pytest.mark.parametrize("kind", PROJECTORS)
@pytest.mark.parametrize("output", ["grid", "cls+grid"])
def test_learned_positions_are_added_to_the_tokens_of_the_grid(kind: str, output: str) -> None:
    factor = 2 if kind == "unshuffle_mlp" else 1
    plain = make(kind, output, factor, (4, 6))
    placed = PROJECTORS[kind](D, T, factor, 2, output, positions=(4 // factor, 6 // factor))
    placed.load_state_dict({**placed.state_dict(), **plain.state_dict()})
    found, without = (projector(tokens(output, (4, 6)), (4, 6)) for projector in (placed, plain))
    first = int("cls" in output)
    assert torch.equal(found[:, :first], without[:, :first])
    torch.testing.assert_close(found[:, first:] - without[:, first:], placed.positions.weight.expand(3, -1, -1))


def test_positions_of_a_grid_of_another_shape_lie_between() -> None:
    projector = PROJECTORS["mlp"](D, T, 1, 2, "grid", positions=(2, 2))
    corners = torch.tensor([[0.0, 0.0], [0.0, 4.0], [8.0, 0.0], [8.0, 4.0]])  # row and column
    with torch.no_grad():
        projector.positions.weight[:, :2] = corners
    larger = projector.positions((4, 4))[:, :2].reshape(4, 4, 2)
    torch.testing.assert_close(larger[:, 0, 0], torch.tensor([0.0, 2.0, 6.0, 8.0]))  # pixel centres at 1/4, 3/4
    torch.testing.assert_close(larger[0, :, 1], torch.tensor([0.0, 1.0, 3.0, 4.0]))


@pytest.mark.parametrize("kind", PROJECTORS)
def test_whitened_tokens_have_one_size_in_all_directions(kind: str) -> None:
    factor = 2 if kind == "unshuffle_mlp" else 1
    torch.manual_seed(0)
    projector = PROJECTORS[kind](D, T, factor, 2, "cls+grid", whitened=True)
    mixing = torch.randn(D, D) * torch.logspace(0, -1, D)  # some directions are ten times as large
    shown = {"cls": torch.randn(900, 1, D) @ mixing + 3, "grid": torch.randn(900, 4, D) @ mixing - 1}
    plain = PROJECTORS[kind](D, T, factor, 2, "cls+grid")
    plain.load_state_dict({name: t for name, t in projector.state_dict().items() if "whitening" not in name})
    torch.testing.assert_close(projector(shown, (2, 2)), plain(shown, (2, 2)))  # nothing before it is set
    read = {"cls": shown["cls"][:, 0], "grid": shown["grid"].reshape(-1, D * factor**2)}
    for part, found in read.items():
        projector.whitening[part].measure(found)
        out = projector.whitening[part](found)
        spread = torch.linalg.eigvalsh(out.T.cov())
        before = torch.linalg.eigvalsh(found.T.cov())
        assert out.mean(0).abs().max() < 1e-4
        torch.testing.assert_close(spread, before / (before + 0.1 * before.mean()), rtol=0.01, atol=0.01)
    assert not any("whitening" in name for name, _ in projector.named_parameters())
