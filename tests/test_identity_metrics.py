"""Identity scores: by hand, against scikit-learn and torchmetrics, in blocks, and under the bootstrap."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from ear_teacher_cli.errors import EarTeachError
from ear_teacher_cli.model import whitening
from ear_teacher_cli.quality import identity_metrics, pairs
from ear_teacher_cli.quality.identity_metrics import auc, eer, measure, rank1_and_eer, resamples, roc, tar_at
from ear_teacher_cli.quality.pairs import Side, arrange, tally


def people(count: int, photos: int, dim: int, noise: float, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Unit rows float32 around one centre a person, and names."""
    random = np.random.default_rng(seed)
    rows = np.repeat(random.normal(size=(count, dim)), photos, 0) + noise * random.normal(size=(count * photos, dim))
    return unit(rows), [f"p{i // photos}" for i in range(count * photos)]


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def counted(rows, names, block=pairs.BLOCK, coarse=None):
    order = arrange(names)
    side = Side(rows[order.index], order.ear, order.group)
    return tally(side, side, order.groups, coarse, block=block), order


def all_pairs(rows, names) -> tuple[np.ndarray, np.ndarray]:
    """Similarities and whether genuine, of every unordered pair."""
    upper = np.triu_indices(len(rows), 1)
    return (rows @ rows.T)[upper], (np.array(names)[:, None] == np.array(names))[upper]


def test_ranks_and_map_at_r_by_hand():
    # on a circle, at these degrees: each row's order of neighbours can be read off
    degrees, names = [0, 10, 25, 70, 76, 140], ["a", "a", "b", "a", "b", "c"]
    rows = unit(np.array([[np.cos(np.radians(d)), np.sin(np.radians(d))] for d in degrees]))
    found, order = counted(rows, names)
    assert [names[i] for i in order.index] == ["a", "a", "a", "b", "b", "c"]
    # 0: 10a 25b 70a; 10: 0a 25b 70a; 70: 76b 25b 10a 0a; 25: 10a 0a 70a 76b; 76: 70a 25b; 140 has no match
    assert found.first.tolist() == [1, 1, 3, 4, 2]
    assert found.precision.tolist() == [0.5, 0.5, 0, 0, 0]
    assert found.chance.tolist() == [2 / 5] * 3 + [1 / 5] * 2
    assert found.genuine.sum() == 2 * 4 and found.impostor.sum() == 2 * 11


def test_map_at_r_counts_only_the_first_r():
    # R = 2: matches at ranks 1 and 3 -> (1/1)/2; at ranks 2 and 3 -> (1/2)/2; at 1 and 2 -> 1
    for degrees, expected in (([0, 10, 25, 20], 0.5), ([0, 10, 25, 5], 0.25), ([0, 10, 25, 90], 1.0)):
        rows = unit(np.array([[np.cos(np.radians(d)), np.sin(np.radians(d))] for d in degrees]))
        assert counted(rows, ["a", "a", "a", "b"])[0].precision[0] == expected


def test_an_impostor_as_near_as_a_match_comes_first():
    rows = unit(np.array([[1, 0], [0, 1], [0, 1], [0, 1]]))
    assert counted(rows, ["a", "a", "b", "b"])[0].first.tolist() == [3, 3, 2, 2]
    assert rank1_and_eer(np.ones((6, 3)), list("aabbcc")) == (0.0, 0.5)


@pytest.mark.parametrize("noise, offset", [(0.7, 0), (3.0, 0), (0.5, 30)])
def test_auc_eer_and_tar_against_scikit_learn(noise, offset):
    rows, names = people(25, 6, 16, noise)
    rows = unit(rows + offset)  # an offset of 30 puts all cosines above 0.999, as an untrained network does
    similarity, genuine = all_pairs(rows, names)
    curve = roc(*(getattr(counted(rows, names)[0], n) for n in ("genuine", "impostor")))
    assert auc(*curve) == pytest.approx(roc_auc_score(genuine, similarity), abs=2e-4)
    fpr, tpr, _ = roc_curve(genuine, similarity, drop_intermediate=False)
    at = np.argmin(np.abs(fpr + tpr - 1))
    assert eer(*curve) == pytest.approx((fpr[at] + 1 - tpr[at]) / 2, abs=2e-3)
    for far in (0.3, 0.01):
        assert tar_at(*curve, far) == pytest.approx(np.interp(far, fpr, tpr), abs=3e-3)


def test_ranks_and_eer_against_torchmetrics():
    torch = pytest.importorskip("torch")
    from torchmetrics.functional.classification import binary_auroc
    from torchmetrics.functional.retrieval import retrieval_hit_rate

    rows, names = people(12, 4, 8, 1.0)
    found, order = counted(rows, names)
    similarity = rows[order.index] @ rows[order.index].T
    for k in (1, 5):
        hits = []
        for i, values in enumerate(similarity):
            others = np.arange(len(rows)) != i
            target = (order.ear == order.ear[i])[others]
            hits.append(float(retrieval_hit_rate(torch.tensor(values[others]), torch.tensor(target), top_k=k)))
        assert np.mean(found.first <= k) == np.mean(hits)
    scores, genuine = all_pairs(rows, names)
    expected = float(binary_auroc((torch.tensor(scores) + 1) / 2, torch.tensor(genuine).int()))
    assert float(auc(*roc(found.genuine, found.impostor))) == pytest.approx(expected, abs=2e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(1, 5), st.integers(1, 300), st.integers(0, 99))
def test_blocks_do_not_matter(count, photos, block, seed):
    rows, names = people(count, photos, 4, 1.0, seed)
    names[-1] = "p0"  # groups of uneven size
    # exact in float32, whatever the order of a product's sums
    rows = (np.round(rows * 64) / 64).astype(np.float32)
    order = arrange(names)
    side = Side(rows[order.index], order.ear, order.group)
    coarse = pairs.coarse_bins(side)
    whole, parts = (tally(side, side, order.groups, coarse, block=b) for b in (pairs.BLOCK, block))
    for name in ("first", "precision", "genuine", "impostor", "genuine_of", "impostor_of", "group", "chance"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name)), name
    assert whole.nearest == parts.nearest and whole.farthest == parts.farthest
    assert np.array_equal(whole.impostor_of.sum((0, 1)).sum(), whole.impostor.sum())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.floats(0.01, 100))
def test_neither_order_nor_length_nor_names_matter(seed, length):
    rows, names = people(6, 4, 5, 0.8, seed)
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    renamed = ["x" + names[i][::-1] for i in shuffled]
    assert rank1_and_eer(rows * length, names) == pytest.approx(rank1_and_eer(rows[shuffled], renamed), abs=0.02)


def test_shuffled_labels_give_chance_and_true_ones_do_not():
    rows, names = people(40, 6, 32, 0.8)
    shuffled = np.random.default_rng(0).permutation(names).tolist()
    rank1, even = rank1_and_eer(rows, shuffled)
    assert rank1 == pytest.approx(5 / 239, abs=0.03) and even == pytest.approx(0.5, abs=0.04)
    rank1, even = rank1_and_eer(rows, names)
    assert rank1 > 0.9 and even < 0.1


@pytest.mark.parametrize(
    "rows, names, words",
    [
        (np.eye(3), ["a", "a", "a"], "one identity"),
        (np.eye(3), ["a", "b", "c"], "no identity has two"),
        (np.array([[1, 0], [np.nan, 1], [0, 1]]), ["a", "a", "b"], "row 1"),
    ],
)
def test_what_cannot_be_scored_says_why(rows, names, words):
    with pytest.raises(EarTeachError, match=words):
        rank1_and_eer(rows, names)


def test_sides_are_identities_and_told_apart():
    # left ears along x, right along y: within a side people are told apart perfectly, across not at all
    random = np.random.default_rng(0)
    person, right = np.repeat(np.arange(10), 8), np.tile([0, 0, 0, 0, 1, 1, 1, 1], 10)
    left_code, right_code = random.normal(size=(2, 10, 16))
    rows = np.concatenate([left_code[person] * (1 - right)[:, None], right_code[person] * right[:, None]], 1)
    rows = unit(rows + 0.05 * random.normal(size=rows.shape))
    order = arrange(person.astype(str), np.where(right, "right", "left"))
    assert order.lefts == 40 and order.people == 10 and len(np.unique(order.ear)) == 20
    found = measure(rows[order.index], order, [], None)
    assert found.figure("rank-1").value == found.figure("same side rank-1").value == 1
    assert found.figure("same side AUC").value > 0.999
    assert found.figure("cross side rank-1").value < 0.3
    assert abs(found.figure("cross side AUC").value - 0.5) < 0.1
    # a mirrored copy of each ear: now the other ear is found, too
    rows = unit(left_code[person] + 0.05 * random.normal(size=(80, 16)))
    found = measure(rows[order.index], order, [], None)
    assert found.figure("cross side rank-1").value == 1 and found.figure("cross side AUC").value > 0.999
    assert found.figure("rank-1").value < 1  # the other ear is an impostor among ears


def test_a_resample_counts_pairs_as_often_as_their_people_were_drawn():
    rows, names = people(8, 4, 6, 1.0)
    found = counted(rows, names)[1]
    rows, codes = rows[found.index], found.ear
    side = Side(rows, codes, found.group)
    part = tally(side, side, found.groups, pairs.coarse_bins(side))
    weights = resamples(8, 20, seed=3)
    drawn = auc(*roc(*identity_metrics._weighted_histograms(part, weights)))
    similarity, genuine = all_pairs(rows, codes)
    one, other = (codes[i] for i in np.triu_indices(len(rows), 1))
    for row, value in zip(weights, drawn, strict=True):
        weight = np.where(genuine, row[one], row[one] * row[other])
        assert value == pytest.approx(roc_auc_score(genuine, similarity, sample_weight=weight), abs=2e-3)
    rank1 = identity_metrics._weighted_mean(part, part.first == 1, weights)
    assert rank1[0] == pytest.approx(np.average(part.first == 1, weights=weights[0][codes]))


def test_the_coarse_bins_agree_with_the_fine_ones():
    rows, names = people(300, 4, 16, 0.9)  # more people than groups
    order = arrange(names)
    assert order.groups == pairs.MAX_GROUPS and set(order.group) == set(range(pairs.MAX_GROUPS))
    found = measure(rows[order.index], order, [1e-2, 1e-3], np.ones((1, order.groups), np.int64))
    for figure in found.figures:
        assert found.draws[figure.name][0] == pytest.approx(figure.value, abs=2e-3), figure.name


@pytest.mark.slow
def test_intervals_hold_the_truth_about_as_often_as_they_say():
    def auc_of(seed, people_count, count):
        rows, names = people(people_count, 3, 6, 0.9, seed)
        order = arrange(names)
        return measure(rows[order.index], order, [], resamples(order.groups, count, 0)).figure("AUC")

    truth = auc_of(0, 600, 0).value
    found = [auc_of(seed, 30, 200) for seed in range(1, 41)]
    held = sum(figure.low <= truth <= figure.high for figure in found)
    assert 34 <= held  # 95 % of 40 is 38
    wide = np.mean([figure.high - figure.low for figure in found])
    assert wide < 6 * np.std([figure.value for figure in found])  # and not by being wide


def test_the_same_seed_gives_the_same_interval_and_0_resamples_none():
    rows, names = people(10, 3, 8, 1.0)
    order = arrange(names)
    one, again, other = (measure(rows[order.index], order, [], resamples(10, 50, seed)) for seed in (1, 1, 2))
    assert one.figures == again.figures and one.figures != other.figures
    assert all(np.isnan(figure.low) for figure in measure(rows[order.index], order, [], None).figures)
    assert np.isnan(identity_metrics.interval(np.array([np.nan, np.nan]))).all()


@pytest.mark.slow
def test_20_000_rows_need_no_matrix_of_all_pairs():
    rows, names = people(4000, 5, 16, 0.5)
    order = arrange(names)
    side = Side(rows[order.index], order.ear, order.group)
    tracemalloc.start()
    found = tally(side, side, order.groups, None, block=2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6  # all pairs in float32 are 1.6 GB
    assert found.impostor.sum() + found.genuine.sum() == 20_000 * 19_999


def test_hardest_pairs_are_one_for_each_pair_of_labels():
    found = [(0.9, 0, 2), (0.8, 1, 2), (0.7, 0, 4), (-3.0, 1, 5)]
    label = np.array([0, 0, 1, 1, 2, 2])
    assert pairs.hardest(found, label, 9, high=True) == [(0.9, 0, 2), (0.7, 0, 4)]
    assert pairs.hardest(found, label, 1, high=True) == [(0.9, 0, 2)]


def test_whitening_makes_the_training_rows_white():
    random = np.random.default_rng(0)
    rows = random.normal(size=(4000, 5)) * [5, 3, 1, 1, 0.2] + 2
    fitted = whitening.fit(rows, shrink=0)
    plain = (whitening.unit(rows) - fitted.mean) @ fitted.matrix
    assert np.allclose(np.cov(plain.T, bias=True), np.eye(plain.shape[1]), atol=1e-6)
    assert np.allclose(np.linalg.norm(fitted.apply(rows), axis=1), 1, atol=1e-6)
    assert whitening.fit(rows, 2).apply(rows).shape == (4000, 2)
    assert np.abs(whitening.centre(rows).apply(rows).mean(0)).max() < np.abs(whitening.unit(rows).mean(0)).max()
    isotropic = whitening.fit(rows, shrink=1.0).matrix
    assert np.allclose(isotropic.T @ isotropic, isotropic[:, 0] @ isotropic[:, 0] * np.eye(5))
    with pytest.raises(EarTeachError, match="vary in 2 directions"):
        whitening.fit(np.eye(3), 3, shrink=0)
