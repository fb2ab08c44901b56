"""Pseudo-labels and k-means: clusters are found, repaired, kept apart, and the same every time."""

import pytest
import torch

from ear_teacher_cli.data.manifest import images_manifest
from ear_teacher_cli.errors import EarTeachError, WeightsError
from ear_teacher_cli.training.kmeans import class_means, directions, kmeans, kmeans_by_side
from ear_teacher_cli.training.pseudo_labels import (
    PseudoClasses,
    agreement_of_rounds,
    class_count,
    class_metrics,
    fingerprint,
    fixed_labels,
    is_round,
    same_photo,
)


def blobs(groups: int, each: int, seed: int = 0, spread: float = 0.05):
    draw = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(groups, 32, generator=draw), dim=1)
    points = centres.repeat_interleave(each, 0) + spread * torch.randn(groups * each, 32, generator=draw)
    return torch.nn.functional.normalize(points, dim=1), torch.arange(groups).repeat_interleave(each)


def same_partition(a, b) -> bool:
    return len(set(zip(a.tolist(), b.tolist(), strict=True))) == len(set(a.tolist())) == len(set(b.tolist()))


def test_kmeans_finds_what_is_there():
    points, truth = blobs(8, 10)
    assert same_partition(kmeans(points, 8, seed=0), truth)


def test_kmeans_is_deterministic_and_seeded():
    points = torch.nn.functional.normalize(torch.randn(300, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    assert torch.equal(kmeans(points, 40, seed=3), kmeans(points, 40, seed=3))
    assert not torch.equal(kmeans(points, 40, seed=3), kmeans(points, 40, seed=4))


def test_a_warm_start_keeps_the_ids():
    points, truth = blobs(8, 10)
    renamed = (truth + 3) % 8
    assert torch.equal(kmeans(points, 8, seed=5, start=renamed), renamed)


def test_no_class_is_empty_even_among_equal_images():
    points = torch.ones(40, 4) / 2
    labels = kmeans(points, 10, seed=0)
    assert labels.bincount(minlength=10).min() >= 1


def test_oversized_clusters_are_split():
    lump = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0, 0, 0]]) + 0.01 * torch.randn(300, 4, generator=torch.Generator().manual_seed(0)), dim=1
    )
    strays = -torch.eye(4).repeat(5, 1) - 0.3
    points = torch.cat([lump, torch.nn.functional.normalize(strays, dim=1)])
    start = torch.cat([torch.zeros(300, dtype=torch.int64), 1 + torch.arange(20) % 19])
    labels = kmeans(points, 20, seed=0, start=start)
    assert labels.bincount(minlength=20).max() <= 8 * len(points) // 20


def test_two_ears_of_one_photo_are_two_classes():
    points, truth = blobs(6, 10)
    labels = kmeans(points, 6, seed=0, apart=[[0, 1], [20, 21, 22]])
    assert labels[0] != labels[1] and len({int(labels[i]) for i in (20, 21, 22)}) == 3


def test_same_photo_groups_rows_by_path():
    assert same_photo(images_manifest(["a.jpg", "b.jpg", "a.jpg"], "x")) == [[0, 2]]


def test_class_means_by_hand():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [5.0, 5.0]])
    means = class_means(features, torch.tensor([0, 0, 1, -1]), 2)
    assert means.flatten().tolist() == pytest.approx([0.5**0.5, 0.5**0.5, 0.0, 1.0])


def test_directions_are_centred_and_of_unit_length():
    points = directions(torch.randn(50, 8) + 10)
    assert points.norm(dim=1).tolist() == pytest.approx([1.0] * 50, abs=1e-5)
    assert points.mean(0).abs().max() < 0.3


@pytest.mark.parametrize(
    "kind, images, most, count",
    [
        ("kmeans", 5400, 512, 512),
        ("kmeans", 336, 512, 84),
        ("kmeans", 5400, 0, 1350),
        ("kmeans", 3, 512, 2),
        ("instance", 336, 512, 336),
        ("fixed", 336, 512, 84),
    ],
)
def test_how_many_classes(kind, images, most, count):
    assert class_count(kind, images_manifest([f"{i}.png" for i in range(images)], "list"), most) == count


def test_rounds_come_at_the_start_then_rarely_and_not_in_the_last_fifth():
    assert [e for e in range(100) if is_round(e, 20, 100)] == [0, 20, 40, 60]


def test_fixed_classes_are_balanced_constant_and_seeded():
    labels = fixed_labels(100, 25, seed=1)
    assert set(labels.bincount().tolist()) == {4}
    assert torch.equal(labels, fixed_labels(100, 25, seed=1)) and not torch.equal(labels, fixed_labels(100, 25, seed=2))


def test_labels_of_another_manifest_are_refused():
    first, second = images_manifest(["a.jpg", "b.jpg"], "x"), images_manifest(["a.jpg", "c.jpg"], "x")
    state = PseudoClasses(torch.tensor([0, 1]), 2, 0, fingerprint(first)).as_dict()
    assert torch.equal(PseudoClasses.from_dict(state, fingerprint(first)).labels, torch.tensor([0, 1]))
    with pytest.raises(WeightsError, match="manifest has changed"):
        PseudoClasses.from_dict(state, fingerprint(second))


def test_agreement_of_rounds_is_the_normalised_mutual_information():
    draw = torch.Generator().manual_seed(0)
    before, after = (torch.randint(0, 7, (300,), generator=draw) for _ in range(2))
    metrics = pytest.importorskip("sklearn.metrics", reason="compared with scikit-learn where it is installed")
    expected = metrics.normalized_mutual_info_score(before.numpy(), after.numpy())
    assert agreement_of_rounds(before, after) == pytest.approx(expected, abs=1e-9)
    assert agreement_of_rounds(before, (before + 3) % 7) == pytest.approx(1)  # other ids, the same groups
    with_unread = before.clone()
    with_unread[:5] = -1
    assert agreement_of_rounds(with_unread, before) == pytest.approx(1)


def test_class_metrics_by_hand():
    found = class_metrics(torch.tensor([0, 0, 1, 1, -1]), 4)
    assert found["in_use"] == 0.5 and found["largest"] == 0.5 and found["entropy"] == pytest.approx(0.5)


def test_kmeans_by_side_keeps_sides_and_ids_apart():
    points, truth = blobs(8, 6)
    sides = ["left" if group < 3 else "right" for group in truth.tolist()]
    labels = kmeans_by_side(points, sides, 8, seed=0)
    left = {x for x, side in zip(labels.tolist(), sides, strict=True) if side == "left"}
    right = {x for x, side in zip(labels.tolist(), sides, strict=True) if side == "right"}
    assert (len(left), len(right)) == (3, 5) and left | right == set(range(8))
    assert torch.equal(kmeans_by_side(points, sides, 8, seed=0, start=labels), labels)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_rank_embeds_its_share_and_rank_0_has_all(monkeypatch, world):
    """20 images in batches of 4; row 7 cannot be read."""
    from types import SimpleNamespace

    from ear_teacher_cli.training import passes

    sent: dict[int, list] = {}
    embedded: dict[int, list[int]] = {}

    def of_rank(rank):
        def clean_dataloader(rows):
            for first in range(rows.start, rows.stop, 4):
                good = [row for row in range(first, min(first + 4, rows.stop)) if row != 7]
                embedded.setdefault(rank, []).extend(good)
                yield {"index": torch.tensor(good), "pixels": torch.tensor(good).float()[:, None], "bad": []}

        class Module(torch.nn.Module):
            train_set, console, device = range(20), passes.Console(quiet=True), torch.device("cpu")
            config = SimpleNamespace(batch_size=4)
            unreadable = SimpleNamespace(record=lambda *_, **__: None)
            trainer = SimpleNamespace(
                world_size=world, global_rank=rank, datamodule=SimpleNamespace(clean_dataloader=clean_dataloader)
            )

            def forward(self, pixels):
                return pixels * 2

        return Module()

    def gather_object(mine, parts):
        if parts is None:
            sent[len(sent) + 1] = mine
        else:
            parts[0] = mine
            for rank, theirs in sent.items():
                parts[rank] = theirs

    monkeypatch.setattr(torch.distributed, "gather_object", gather_object)
    for rank in range(1, world):
        assert passes.embed_train_set_together(of_rank(rank)) is None
    embeddings, rows = passes.embed_train_set_together(of_rank(0))
    assert rows.tolist() == [row for row in range(20) if row != 7]
    assert embeddings[:, 0].tolist() == [2.0 * row for row in rows.tolist()]
    assert len(embedded) == world and max(map(len, embedded.values())) <= {1: 20, 2: 12, 3: 8}[world]
    if world > 1:
        sent[1] = [EarTeachError("too many are unreadable")]
        with pytest.raises(EarTeachError, match="too many"):
            passes.embed_train_set_together(of_rank(0))
