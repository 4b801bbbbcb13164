"""Several sources of one call: references, words, frames, rows whose tokens lie elsewhere."""

import math
from dataclasses import replace

import pytest
import torch

from i2am.attribution import AttributionMaps
from i2am.attribution.accumulator import Accumulator
from i2am.attribution.buffers import Words
from i2am.testing import make_qkv, make_site

# text of 7 tokens, 12 generated, references of 6 and 8
TEXT, GENERATED, FIRST, SECOND = slice(0, 7), slice(7, 19), slice(19, 25), slice(25, 33)
SITE = replace(make_site("joint", (4, 3), None), measure="share")
ONE = replace(SITE, source="reference 1", reference_grid=(2, 3), reference_tokens=6)
TWO = replace(SITE, source="reference 2", reference_grid=(4, 2), reference_tokens=8)
NAMES = ("red", "shirt")
SAID = replace(SITE, source="red", role="text", reference_tokens=2)
# of each prompt, the tokens of each word
TOKENS = torch.zeros(2, 2, 7)
TOKENS[0, 0, 1] = TOKENS[0, 1, 2:4] = TOKENS[1, 0, 5] = TOKENS[1, 1, 0] = 1


def calls(batch, *, layers=("joint",), steps=3, heads=SITE.heads):
    for step in range(steps):
        for number, layer in enumerate(layers):
            query, key, _ = make_qkv(batch, heads, 33, 33, 8, seed=10 * step + number)
            yield layer, query[:, :, GENERATED], key


def add(accumulator, layer, query, key, words=None, **options):
    lse = None
    for site, span in ((ONE, FIRST), (TWO, SECOND)):
        site = replace(site, layer=layer)
        lse = accumulator.add(site, query, key, group=0, reference=span, query_lse=lse, **options)
    if words is not None:
        said = replace(SAID, layer=layer)
        accumulator.add(
            said, query, key, group=0, reference=TEXT, words=words, query_lse=lse, **options
        )


def read(accumulator):
    return AttributionMaps(
        accumulator.layers(), votes=accumulator.votes, rows=accumulator.rows, provenance={}
    )


def recorded(batch=2, *, layers=("joint",), words=True, **options):
    accumulator = Accumulator(time_groups=1, **options)
    for layer, query, key in calls(batch, layers=layers):
        add(accumulator, layer, query, key, Words(NAMES, TOKENS) if words else None)
    return read(accumulator)


def softmaxes(batch=2):
    """Sums over the calls of P and C, fp64, mean over heads: ``[batch, generated, keys]``."""
    p = c = 0
    for _, query, key in calls(batch):
        scores = 8**-0.5 * query.double() @ key.double().mT
        p, c = p + scores.softmax(-1).mean(1), c + scores.softmax(-2).mean(1)
    return p, c


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5 * expected.max().item())


def test_every_source_is_read_by_its_name():
    maps = recorded()
    p, c = softmaxes()
    assert maps.sources == ("reference 1", "reference 2", "red", "shirt")
    for source, span, grid in (("reference 1", FIRST, (2, 3)), ("reference 2", SECOND, (4, 2))):
        share = maps.reference_to_generated(source=source)
        close(share, p[..., span].sum(-1).unflatten(1, (4, 3)) / 3)
        spread = maps.reference_to_generated(source=source, measure="spread")
        close(spread, c[..., span].mean(-1).unflatten(1, (4, 3)))
        received = maps.generated_to_reference(source=source)
        close(received, p[..., span].mean(1).unflatten(1, grid))


def test_words_are_the_sum_of_their_tokens_in_the_prompt_of_each_sample():
    maps = recorded()
    p, c = softmaxes()
    for word, name in enumerate(NAMES):
        tokens = TOKENS[:, word, None].double()
        share = (p[..., TEXT] * tokens).sum(-1).unflatten(1, (4, 3)) / 3
        close(maps.words[name], share)
        close(maps.reference_to_generated(source=name), share)
        spread = (c[..., TEXT] * tokens).sum(-1) / tokens.sum(-1)
        close(
            maps.reference_to_generated(source=name, measure="spread"),
            spread.unflatten(1, (4, 3)),
        )


def test_by_default_all_references_are_read_together():
    maps = recorded()
    p, c = softmaxes()
    both = slice(FIRST.start, SECOND.stop)
    close(maps.reference_to_generated(), p[..., both].sum(-1).unflatten(1, (4, 3)) / 3)
    spread = maps.reference_to_generated(measure="spread")
    close(spread, c[..., both].mean(-1).unflatten(1, (4, 3)))
    assert maps.share_of == "uniform"


def test_groups_that_cover_all_keys_add_up_to_1():
    accumulator = Accumulator(time_groups=1)
    every = replace(SITE, source="<rest>", role="text", reference_tokens=19)
    names, weights = ("<text>", "<rest>"), torch.zeros(1, 2, 19)
    weights[0, 0, TEXT] = weights[0, 1, GENERATED] = 1
    for layer, query, key in calls(2):
        add(accumulator, layer, query, key)
        rest = slice(0, 19)
        accumulator.add(every, query, key, group=0, reference=rest, words=Words(names, weights))
    maps = read(accumulator)
    total = sum(maps.reference_to_generated(source=source) for source in maps.sources)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda m: m.generated_to_reference(),
            "source must name one reference .* reference 1, ref",
        ),
        (lambda m: m.generated_to_reference(source="red"), "words have no place .* source='red'"),
        (lambda m: m.reference_to_generated(source="hat"), "recorded one, got 'hat'; recorded: re"),
        (lambda m: m.select(source="red").reference_to_generated(), "must name what was recorded"),
        (lambda m: m.select(source="hat"), "source must be a recorded one, got 'hat'"),
    ],
)
def test_refused_readings(ask, message):
    with pytest.raises(ValueError, match=message):
        ask(recorded())


def test_a_mask_belongs_to_no_word():
    maps = recorded(words=True, reference_mask=torch.ones(2, 2))
    with pytest.raises(ValueError, match="votes='mask' is of a reference, got source='red'"):
        maps.reference_to_generated(source="red", votes="mask")


def test_one_source_selected_is_read_without_its_name():
    maps = recorded()
    one = maps.select(source="reference 2")
    assert one.sources == ("reference 2",)
    torch.testing.assert_close(
        one.generated_to_reference(), maps.generated_to_reference(source="reference 2")
    )


@pytest.mark.parametrize("prompts", [1, 2])
def test_rows_that_are_not_known_yet_keep_the_words_of_every_prompt(prompts):
    """A batch of two guidance halves, whose second half are the samples."""
    words = Words(NAMES, TOKENS[:prompts])
    unresolved = Accumulator(time_groups=1, unresolved=True)
    direct = Accumulator(time_groups=1)
    for layer, query, key in calls(8):
        add(unresolved, layer, query, key, words)
        add(direct, layer, query[4:], key[4:], words)
    resolved = unresolved.resolve(slice(4, 8))
    for one, other in zip(resolved.layers(), direct.layers(), strict=True):
        assert one.site == other.site
        torch.testing.assert_close(one.attention_share, other.attention_share)
        torch.testing.assert_close(one.reference_to_generated, other.reference_to_generated)
    # what comes later is added to it
    for layer, query, key in calls(4):
        for each in (resolved, direct):
            add(each, layer, query, key, words)
    torch.testing.assert_close(read(resolved).words, read(direct).words)


def test_rows_of_a_ragged_batch_have_their_tokens_elsewhere():
    """The second sample's sequence begins with three tokens more."""
    whole, ragged = Accumulator(time_groups=1), Accumulator(time_groups=1)
    for layer, query, key in calls(2):
        add(whole, layer, query, key, Words(NAMES, TOKENS))
        shifted = torch.cat([key[1:, :, 30:], key[1:, :, :30]], dim=2)
        for rows, keys, offset in ((slice(0, 1), key[:1], 0), (slice(1, 2), shifted, 3)):
            for site, span in ((ONE, FIRST), (TWO, SECOND)):
                moved = torch.arange(span.start, span.stop).add(offset) % 33
                ragged.add(
                    replace(site, layer=layer),
                    query[rows],
                    keys,
                    group=0,
                    reference=moved,
                    rows=rows,
                    samples=2,
                )
            # texts differ in length
            length = 7 + offset
            text = torch.arange(length)
            weights = torch.zeros(2, 2, length)
            weights[..., offset:] = TOKENS
            ragged.add(
                replace(SAID, layer=layer),
                query[rows],
                keys,
                group=0,
                reference=text,
                words=Words(NAMES, weights),
                rows=rows,
                samples=2,
            )
    first, second = read(whole), read(ragged)
    for source in first.sources:
        torch.testing.assert_close(
            second.reference_to_generated(source=source),
            first.reference_to_generated(source=source),
        )
    torch.testing.assert_close(
        second.generated_to_reference(source="reference 2"),
        first.generated_to_reference(source="reference 2"),
    )


def test_resized_sums_keep_sources_apart():
    names = ("a", "b", "c")
    native = recorded(layers=names)
    resized = recorded(layers=names, sums="resized")
    for source in native.sources:
        for measure in ("share", "spread"):
            read = {"source": source, "measure": measure}
            torch.testing.assert_close(
                resized.reference_to_generated(**read), native.reference_to_generated(**read)
            )
    per_head = resized.reference_to_generated(per="head")
    torch.testing.assert_close(per_head, native.reference_to_generated(per="head"))


class TestFrames:
    SITE = replace(make_site("video", (2, 2), None), frames=3, source="first frame")

    def maps(self, **options):
        site = replace(self.SITE, reference_grid=(2, 3), reference_tokens=6)
        accumulator = Accumulator(time_groups=1, **options)
        for layer, query, key in calls(2):
            accumulator.add(replace(site, layer=layer), query, key, group=0, reference=FIRST)
        return read(accumulator)

    @pytest.mark.parametrize("sums", ["native", "resized"])
    def test_frames_are_an_axis(self, sums):
        maps = self.maps(sums=sums)
        p, c = softmaxes()
        share = p[..., FIRST].sum(-1).unflatten(1, (3, 2, 2)) / 3
        spread = c[..., FIRST].mean(-1).unflatten(1, (3, 2, 2))
        for measure, expected in (("share", share), ("spread", spread)):
            apart = maps.reference_to_generated(per="frame", measure=measure)
            close(apart, expected)
            close(maps.reference_to_generated(measure=measure), expected.mean(1))
            both = maps.reference_to_generated(per=("frame", "head"), measure=measure)
            assert both.shape == (2, self.SITE.heads, 3, 2, 2)
        assert maps.frames == 3

    def test_regions_and_masks_are_of_every_frame(self):
        mask = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        maps = self.maps(mask=mask)
        p, _ = softmaxes()
        corner = p.unflatten(1, (3, 2, 2))[:, :, 0, 0, FIRST].sum(1).unflatten(1, (2, 3)) / 12
        close(maps.generated_to_reference(weights="mask"), corner)

    def test_pictures_have_one(self):
        maps = recorded()
        assert maps.frames == 1
        assert maps.reference_to_generated(per="frame").shape == (2, 1, 4, 3)


class TestFlow:
    def test_it_is_the_mean_place_of_what_is_looked_at(self):
        maps = recorded(flow=True)
        p, _ = softmaxes()
        grid = [((row + 0.5) / 4, (column + 0.5) / 2) for row in range(4) for column in range(2)]
        places = torch.tensor(grid, dtype=torch.float64)
        looked = p[..., SECOND]
        share = looked.sum(-1, keepdim=True)
        mean = looked @ places / share
        variance = looked @ places.square().sum(-1, keepdim=True) / share
        spread = (variance[..., 0] - mean.square().sum(-1)).sqrt()
        flow = maps.flow(source="reference 2")
        close(flow.place, mean.mT.unflatten(-1, (4, 3)))
        close(flow.spread, spread.unflatten(-1, (4, 3)))
        close(flow.share, share[..., 0].unflatten(-1, (4, 3)) / 3)

    def test_it_keeps_axes(self):
        flow = recorded(flow=True).flow(per=("time", "head"), source="reference 1", size=(8, 6))
        leading = (2, 1, SITE.heads)
        assert flow.place.shape == (*leading, 2, 8, 6)
        assert flow.spread.shape == flow.share.shape == (*leading, 8, 6)
        assert bool((flow.spread < math.sqrt(0.5)).all())

    def test_it_has_to_be_recorded(self):
        with pytest.raises(ValueError, match=r"flow\(\) needs the places .* record\(flow=True\)"):
            recorded().flow(source="reference 1")


def test_sources_frames_and_places_come_back_from_a_file(tmp_path):
    maps = recorded(flow=True)
    maps.save(tmp_path / "maps.safetensors")
    loaded = AttributionMaps.load(tmp_path / "maps.safetensors")
    assert [layer.site for layer in loaded.layer_sums] == [layer.site for layer in maps.layer_sums]
    assert loaded.sources == maps.sources
    for name in maps.words:
        assert torch.equal(loaded.words[name], maps.words[name])
    assert torch.equal(
        loaded.flow(source="reference 1").place, maps.flow(source="reference 1").place
    )


def test_results_with_other_sources_are_not_merged():
    with pytest.raises(ValueError, match="results must agree in sources: result 0 has reference 1"):
        AttributionMaps.merge([recorded(), recorded(words=False)])
