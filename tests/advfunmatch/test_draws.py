"""Random numbers that belong to an image: how they are distributed, and what they do not depend on."""

from __future__ import annotations

import pytest
import torch
from advfunmatch.attacks.draws import APGD_CE, APGD_DLR, SQUARE, Draws, image_keys

IMAGES = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def of_images(x: torch.Tensor = IMAGES, seed: int = 0) -> Draws:
    return Draws(seed, image_keys(x))


def methods() -> dict[str, tuple]:
    return {
        "integers": ((3, 5), 7),
        "uniform": ((3, 5), torch.float32),
        "normal": ((3, 5), torch.float32),
        "signs": ((3, 5), torch.float32),
    }


def test_splitmix_is_the_published_generator() -> None:
    """The first outputs for seed 1234567 in the reference implementation (Vigna)."""
    from advfunmatch.attacks.draws import _mixed_int

    golden = 0x9E3779B97F4A7C15
    found = [_mixed_int(1234567 + step * golden) for step in (1, 2, 3)]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("method", methods())
def test_an_image_has_its_numbers_in_any_batch_and_order(method: str) -> None:
    order = torch.randperm(len(IMAGES), generator=torch.Generator().manual_seed(1))
    whole = getattr(of_images(), method)(SQUARE, 3, *methods()[method])
    there = getattr(of_images(IMAGES[order]), method)(SQUARE, 3, *methods()[method])
    assert torch.equal(whole[order], there)
    alone = torch.cat(
        [getattr(of_images(image[None]), method)(SQUARE, 3, *methods()[method]) for image in IMAGES[:5]]
    )
    assert torch.equal(whole[:5], alone)
    kept = whole.flatten(1)[:, 0] > 0
    assert torch.equal(whole[kept], getattr(of_images().rows(kept), method)(SQUARE, 3, *methods()[method]))


def test_distributions() -> None:
    draws = of_images()
    uniform = draws.uniform(APGD_CE, 0, (4096,), torch.float64).flatten()
    count = len(uniform)
    assert 0 <= uniform.min() < 1e-4
    assert 1 - 1e-4 < uniform.max() < 1
    histogram = torch.histc(uniform, 64, 0, 1)
    # Chi-squared with 63 degrees of freedom: mean 63, standard deviation 11.2.
    assert 20 < float(((histogram - count / 64) ** 2 / (count / 64)).sum()) < 120
    normal = draws.normal(APGD_CE, 0, (4096,), torch.float64).flatten()
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((normal**power).mean()) - moment) < 5 * (spread / count) ** 0.5
    integers = draws.integers(APGD_CE, 0, (4096,), 10).flatten()
    counts = integers.bincount()
    assert len(counts) == 10
    assert float(((counts - count / 10) ** 2 / (count / 10)).sum()) < 40  # 9 degrees of freedom
    signs = draws.signs(APGD_CE, 0, (4096,), torch.float64).flatten()
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 5 * count**-0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_uniform_numbers_stay_below_one_in_every_dtype(dtype: torch.dtype) -> None:
    drawn = of_images().uniform(APGD_CE, 0, (4096,), dtype)
    assert drawn.dtype == dtype
    assert float(drawn.max()) < 1
    exact = of_images().uniform(APGD_CE, 0, (4096,), torch.float64)
    assert float((exact - drawn.double()).abs().max()) <= torch.finfo(dtype).eps


def test_what_is_drawn_differs_with_seed_image_stream_and_draw() -> None:
    def normal(seed: int = 0, images: torch.Tensor = IMAGES, stream: int = APGD_CE, draw: int = 0):
        return of_images(images, seed).normal(stream, draw, (1024,), torch.float64).flatten()

    first = normal()
    changed = IMAGES.clone()
    changed[:, 0, 0, 0] = torch.nextafter(changed[:, 0, 0, 0], torch.tensor(2.0))
    others = [normal(seed=1), normal(images=changed), normal(stream=APGD_DLR), normal(stream=APGD_CE + 1)]
    others += [normal(draw=1), first.roll(1), first.roll(1024)]
    for other in others:
        assert abs(float((first * other).mean())) < 5 * len(first) ** -0.5
    assert abs(float((others[-4] * others[-3]).mean())) < 5 * len(first) ** -0.5


def test_equal_images_in_other_dtypes_and_layouts_have_the_same_keys() -> None:
    x = torch.rand(4, 3, 5, 5)
    assert torch.equal(image_keys(x), image_keys(x.double()))
    assert torch.equal(image_keys(x), image_keys(x.contiguous(memory_format=torch.channels_last)))
    assert len(image_keys(torch.cat([x, x.flip(3), x.flip(2)])).unique()) == 12


def test_integers_refuse_a_range_that_they_cannot_fill() -> None:
    with pytest.raises(ValueError, match="high must be from 1"):
        of_images().integers(APGD_CE, 0, (1,), 0)
