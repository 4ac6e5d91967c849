"""Partial sums of any partition of the elements add up to the whole: scores, Gram matrices, gradients."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adalora_dist.methods.adalora.orthogonality import gradient_factor
from adalora_dist.methods.adalora.sums import TripletSums
from adalora_dist.sharding.layout import FlatBuffer, SpanLayout
from adalora_dist.sharding.spans import Factor, Span

FORMS = ["norm", "squared"]


@st.composite
def partitioned(draw):
    """A few adapted matrices, and every parameter cut into one contiguous span per rank, anywhere."""
    world_size = draw(st.integers(1, 5))
    factors, first = [], 0
    for _ in range(draw(st.integers(1, 4))):
        r = draw(st.integers(0, 5))
        d_out, d_in = draw(st.sampled_from([(7, 5), (5, 5), (4, 9), (1, 3)]))
        factors += [Factor("P", d_out, r, first), Factor("Qt", d_in, r, first)]
        first += r
    factors.append(Factor("lam", 1, first, 0))
    spans = [[] for _ in range(world_size)]
    for factor in factors:
        cuts = sorted(draw(st.lists(st.integers(0, factor.numel), min_size=world_size - 1, max_size=world_size - 1)))
        for rank, (start, stop) in enumerate(zip([0, *cuts], [*cuts, factor.numel], strict=True)):
            spans[rank].append(Span(start, stop))
    return factors, spans, draw(st.integers(0, 2**16)), draw(st.sampled_from(FORMS))


def flatten(layout, spans, tensors):
    local = [t.flatten()[a:b] for t, (a, b) in zip(tensors, spans, strict=True)]
    return layout.collect(local, FlatBuffer(layout, dtype=tensors[0].dtype))


@settings(max_examples=200, deadline=None)
@given(case=partitioned())
def test_partials_of_any_partition_add_up(case):
    factors, spans, seed, form = case
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(f.rows, f.rank, generator=generator, dtype=torch.float64) for f in factors]
    layouts = [SpanLayout(factors, own) for own in spans]
    all_sums = [TripletSums(layout, spans, dtype=torch.float64) for layout in layouts]
    assert sum(layout.num_elements for layout in layouts) == sum(f.numel for f in factors)

    # Scores, eq. 7, written out.
    expected = torch.zeros(layouts[0].num_triplets, dtype=torch.float64)
    for factor, tensor in zip(factors, tensors, strict=True):
        expected[factor.first_triplet : factor.first_triplet + factor.rank] += tensor.mean(0)
    flats = [flatten(layout, own, tensors) for layout, own in zip(layouts, spans, strict=True)]
    scores = sum(sums.score_partials(flat) for sums, flat in zip(all_sums, flats, strict=True))
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-12)

    # Orthogonality gradients: every rank's elements from the one reduced vector.
    reduced = sum(sums.gram_partials(flat) for sums, flat in zip(all_sums, flats, strict=True))
    assert reduced.numel() == all_sums[0].num_gram_elements + all_sums[0].num_split_row_elements + 1
    num_matrices = sum(f.orthogonal and f.rank > 0 for f in factors)
    wanted = [
        x @ gradient_factor(x.T @ x, form, 0.2, num_matrices) if f.orthogonal and f.rank else torch.zeros_like(x)
        for f, x in zip(factors, tensors, strict=True)
    ]
    grams = [x.T @ x for f, x in zip(factors, tensors, strict=True) if f.orthogonal and f.rank]
    away = [g - torch.diag(g.diagonal()) if form == "directions" else g - torch.eye(len(g)) for g in grams]
    for layout, sums, own, flat in zip(layouts, all_sums, spans, flats, strict=True):
        sums.partials.copy_(reduced)
        assert not grams or abs(sums.mean_defect(form) - sum(m.norm().item() for m in away) / len(grams)) < 1e-10
        scratch = FlatBuffer(layout, dtype=torch.float64)
        scratch.data.fill_(torch.nan)
        gradient = sums.orthogonality_gradient(flat, form, 0.2, out=scratch)
        of_lam = [torch.full_like(t, f.kind == "lam") for f, t in zip(factors, tensors, strict=True)]
        is_lam = flatten(layout, own, of_lam).data == 1
        assert gradient.data[is_lam].isnan().all()  # left alone
        gradient.data[is_lam] = 0
        torch.testing.assert_close(gradient.data, flatten(layout, own, wanted).data, rtol=0, atol=1e-10)

    # The same of a part of the triplets: that of matrices with these columns alone, and 0 for the others.
    keep = torch.rand(layouts[0].num_triplets, generator=generator) < 0.5
    for f, x, gradient in zip(factors, tensors, wanted, strict=True):
        kept = keep[f.first_triplet : f.first_triplet + f.rank]
        if f.orthogonal and f.rank:
            gradient[:, ~kept] = 0
            gradient[:, kept] = x[:, kept] @ gradient_factor(x[:, kept].T @ x[:, kept], form, 0.2, num_matrices)
    for layout, sums, own, flat in zip(layouts, all_sums, spans, flats, strict=True):
        gradient = sums.orthogonality_gradient(flat, form, 0.2, FlatBuffer(layout, dtype=torch.float64), keep)
        torch.testing.assert_close(gradient.data, flatten(layout, own, wanted).data, rtol=0, atol=1e-10)


def test_bodies_of_equal_shape_are_one_group():
    factors = [f for k in range(10) for f in (Factor("P", 8, 2, 2 * k), Factor("Qt", 5, 2, 2 * k))]
    layout = SpanLayout(factors, [Span(0, f.numel) for f in factors])
    assert len(layout.groups) == 2 and not layout.fragments
