"""--augment-on gpu: the images of the loading processes, made on the device of the training step."""

import pytest
import torch
from conftest import small_config
from test_resume import assert_same_weights

from ear_teacher_cli.console import Console
from ear_teacher_cli.data.augment import POLICIES, Augment, Views
from ear_teacher_cli.data.datamodule import EarDataModule
from ear_teacher_cli.data.preprocessing import preprocessing_for
from ear_teacher_cli.training import launch
from ear_teacher_cli.training.run import resume, train

QUIET = Console(quiet=True)


def batches(config) -> list[dict]:
    data = EarDataModule(config)
    data.setup("fit")
    loader = data.train_dataloader()
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_images_are_those_of_the_loading_processes(manifests, policy, workers):
    options = dict(augment=True, augmentation=policy, views=2, contrastive_weight=1.0, denoise=True, hflip=0.5)
    config = small_config(manifests, num_workers=workers, **options)
    first, second = batches(config), batches(small_config(manifests, augment_on="gpu", num_workers=workers, **options))
    assert len(first) == len(second) == 3
    for a, b in zip(first, second, strict=True):
        assert set(a) == set(b) == {"index", "bad", "pixels", "view", "clean"}
        assert all(torch.equal(a[name], b[name]) for name in ("index", "pixels", "view", "clean"))
        assert not torch.equal(a["pixels"], a["view"])


@pytest.mark.parametrize("policy", POLICIES)
def test_every_random_number_is_drawn_on_the_cpu(manifests, policy, monkeypatch):
    """A GPU's generator would give other images: nothing asks for numbers on the image's device, or like the image."""
    pixels = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    views = Views(*2 * [Augment(preprocessing_for(small_config(manifests)), policy, 0.5)], clean=True)
    expected = [views(pixels, seed) for seed in range(40)]

    def refused(*_, **__):
        raise AssertionError("drawn on the device of the image")

    for name in ("randn_like", "rand_like", "randint_like"):
        monkeypatch.setattr(torch, name, refused)
    found = [views(pixels, seed) for seed in range(40)]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(found, expected, strict=True) for name in a)


@pytest.mark.slow
def test_a_run_is_the_same_and_resumes_exactly(manifests, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "uses_cuda", lambda config: config.augment_on == "gpu")  # keeps the option as it is
    options = dict(max_epochs=6, augment=True, views=2, contrastive_weight=1.0, precision="32-true")
    cpu = train(small_config(manifests, output_dir=str(tmp_path), experiment_name="cpu", **options), QUIET)
    gpu = train(
        small_config(manifests, output_dir=str(tmp_path), experiment_name="gpu", augment_on="gpu", **options), QUIET
    )
    assert (cpu.config.augment_on, gpu.config.augment_on) == ("cpu", "gpu")
    assert_same_weights(cpu.experiment, gpu.experiment)
    for path in (gpu.experiment / "checkpoints").iterdir():
        if path.name != "epoch_0005.ckpt":
            path.unlink()
    assert resume(gpu.experiment, QUIET).epochs == 6
    assert_same_weights(cpu.experiment, gpu.experiment)


@pytest.mark.parametrize(
    ("asked", "cuda", "cores", "where"),
    [
        ("cpu", True, 2, "cpu"),
        ("gpu", True, 64, "gpu"),
        ("gpu", False, 2, "cpu"),
        ("auto", False, 2, "cpu"),
        ("auto", True, 7, "gpu"),
        ("auto", True, 8, "cpu"),
    ],
)
def test_where_images_are_augmented(manifests, monkeypatch, capsys, asked, cuda, cores, where):
    monkeypatch.setattr(launch, "uses_cuda", lambda config: cuda)
    monkeypatch.setattr(launch, "usable_cores", lambda: cores)
    config, data = launch.prepare(small_config(manifests, augment_on=asked, accelerator="cpu"), Console())
    assert config.augment_on == where and data.train_set.later == (where == "gpu")
    assert ("augmenting on the CPU" in capsys.readouterr().err) == (asked == "gpu" and not cuda)
