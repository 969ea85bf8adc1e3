from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.format.storage import RemotePath
from simmim.data.datasets.shards import ShardSet
from simmim.recipe import RecipeError, parse
from simmim.tasks.probe.probe import (
    LabelledFeatures,
    compare,
    extract_features,
    knn_votes,
    linear_logits,
    open_probe_shards,
    probe,
    scratch_like,
    standardise,
    table,
)
from simmim.tasks.probe.recipe import ProbeData, ProbeRecipe, ProbeSettings
from swinv2.weights import load_encoder

NORMALISATION = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def draw_clusters(count: int, *, spread: float, seed: int) -> LabelledFeatures:
    """Draw features around one of five directions, a class each."""
    centres = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (count,), generator=generator)
    noise = torch.randn(count, 12, generator=generator)
    return LabelledFeatures(values=centres[labels] + spread * noise, labels=labels)


def accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(dim=1) == labels).float().mean())


def test_neighbours_vote_by_similarity_as_written_out() -> None:
    known, asked = draw_clusters(40, spread=1.0, seed=1), draw_clusters(9, spread=1.0, seed=2)
    votes = knn_votes(known, asked.values, num_classes=5, neighbours=7, temperature=0.1)
    for row, query in enumerate(asked.values):
        similar = F.cosine_similarity(query[None], known.values)
        nearest = sorted(range(40), key=lambda place: -float(similar[place]))[:7]
        expected = torch.zeros(5)
        for place in nearest:
            expected[known.labels[place]] += (similar[place] / 0.1).exp()
        torch.testing.assert_close(votes[row], expected / expected.sum())


def test_votes_do_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    known, asked = draw_clusters(40, spread=1.0, seed=1), draw_clusters(9, spread=1.0, seed=2)
    whole = knn_votes(known, asked.values, num_classes=5, neighbours=7, temperature=0.1)
    monkeypatch.setattr("simmim.tasks.probe.probe.BLOCK_SIMILARITIES", 160)
    parts = knn_votes(known, asked.values, num_classes=5, neighbours=7, temperature=0.1)
    torch.testing.assert_close(parts, whole)


def test_fewer_images_than_neighbours_all_vote() -> None:
    known = draw_clusters(3, spread=0.1, seed=1)
    votes = knn_votes(known, known.values, num_classes=5, neighbours=20, temperature=0.07)
    assert torch.equal(votes.argmax(dim=1), known.labels)


def test_both_classifiers_separate_clusters() -> None:
    known, asked = draw_clusters(400, spread=0.3, seed=1), draw_clusters(200, spread=0.3, seed=2)
    votes = knn_votes(known, asked.values, num_classes=5, neighbours=20, temperature=0.07)
    logits = linear_logits(known, asked.values, num_classes=5, steps=50)
    assert accuracy(votes, asked.labels) > 0.95
    assert accuracy(logits, asked.labels) > 0.95


def test_uninformative_features_give_chance_accuracy() -> None:
    known, asked = draw_clusters(400, spread=1e3, seed=1), draw_clusters(200, spread=1e3, seed=2)
    votes = knn_votes(known, asked.values, num_classes=5, neighbours=20, temperature=0.07)
    logits = linear_logits(known, asked.values, num_classes=5, steps=50)
    assert accuracy(votes, asked.labels) < 0.35
    assert accuracy(logits, asked.labels) < 0.35


def test_standardised_features_have_no_scale() -> None:
    known, asked = draw_clusters(100, spread=1.0, seed=1), draw_clusters(50, spread=1.0, seed=2)
    scale, shift = torch.logspace(-3, 3, 12), torch.linspace(-5, 5, 12)
    moved = [
        LabelledFeatures(values=features.values * scale + shift, labels=features.labels)
        for features in (known, asked)
    ]
    for one, other in zip(standardise(known, asked), standardise(*moved), strict=True):
        torch.testing.assert_close(one.values, other.values, rtol=1e-2, atol=1e-2)
    assert standardise(known, asked)[0].values.mean(dim=0).abs().max() < 1e-5


def test_features_are_average_pooled_in_order(shards: Path, encoder_directory: Path) -> None:
    encoder = load_encoder(encoder_directory).train()
    data = ProbeData(shards=str(shards), batch_size=7, workers=0)
    opened = ShardSet(shards)
    found = extract_features(
        encoder, opened, data=data, device="cpu", label="test", **NORMALISATION
    )
    assert found.values.shape == (96, encoder.num_features)
    assert found.labels.tolist() == [opened.read(s, i).label for s in range(8) for i in range(12)]
    assert encoder.training
    other = ProbeData(shards=str(shards), batch_size=96, workers=0)
    again = extract_features(
        encoder, opened, data=other, device="cpu", label="test", **NORMALISATION
    )
    torch.testing.assert_close(found.values, again.values)


def test_a_probe_changes_no_weight_and_repeats(shards: Path, encoder_directory: Path) -> None:
    encoder = load_encoder(encoder_directory)
    before = {name: part.clone() for name, part in encoder.state_dict().items()}
    data = ProbeData(shards=str(shards), validation_shards=2, workers=0)
    training, validation = open_probe_shards(data)
    results = [
        probe(encoder, training, validation, data=data, settings=ProbeSettings(), **NORMALISATION)
        for _ in range(2)
    ]
    assert results[0] == results[1]
    assert (results[0].train_samples, results[0].validation_samples) == (72, 24)
    assert results[0].linear_top5 is None  # of three classes
    shown = table({"pretrained": results[0]})
    assert "top-1" in shown
    assert "top-5" not in shown
    assert "top-5" in table({"pretrained": replace(results[0], linear_top5=90.0)})
    assert all(torch.equal(before[name], part) for name, part in encoder.state_dict().items())


def test_scratch_is_the_same_architecture_with_weights_of_the_seed(encoder_directory: Path) -> None:
    encoder = load_encoder(encoder_directory)
    one, two, other = (scratch_like(encoder, seed) for seed in (0, 0, 1))
    assert one.config == encoder.config
    weights = [start.patch_embed.projection.weight for start in (one, two, other, encoder)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])


def test_compare_probes_both_starts_on_the_same_images(
    shards: Path, encoder_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {
        "encoder": str(encoder_directory.parent),  # a run: its encoder is in `encoder`
        "data": {"shards": str(shards), "workers": 0, "fraction": 0.5, "image_size": 24},
    }
    results = compare(parse(ProbeRecipe, values, "test"))
    said = capsys.readouterr().err
    assert "mean [0.4, 0.5, 0.6]" in said
    assert "at 24x24 pixels with windows of 4x4; data.image_size" in said
    assert list(results) == ["pretrained", "scratch"]
    assert results["pretrained"].train_samples == results["scratch"].train_samples
    assert 36 <= results["scratch"].train_samples <= 48
    lines = table(results).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["pretrained", "scratch"]
    assert "12 validation images" in lines[-1]
    alone = compare(parse(ProbeRecipe, values | {"init": "scratch"}, "test"))
    assert alone == {"scratch": results["scratch"]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"validation_shards": 0}, "needs validation images"),
        ({"fraction": 2.0}, "fraction is 2.0"),
        ({"batch_size": 0}, "must be 1 or more"),
    ],
)
def test_impossible_settings_are_refused(data: dict[str, object], message: str) -> None:
    values = {"encoder": "e", "data": {"shards": "s"} | data}
    with pytest.raises(RecipeError, match=message):
        parse(ProbeRecipe, values, "test")


def test_a_seed_beyond_64_bits_is_refused() -> None:
    values = {"encoder": "e", "seed": 2**63, "data": {"shards": "s"}}
    with pytest.raises(RecipeError, match="seed: 9223372036854775808"):
        parse(ProbeRecipe, values, "test")


def test_a_folder_without_an_encoder_is_refused(shards: Path, tmp_path: Path) -> None:
    values = {"encoder": str(tmp_path), "data": {"shards": str(shards)}}
    with pytest.raises(ValueError, match=r"config\.json"):
        compare(parse(ProbeRecipe, values, "test"))


def test_remote_labelled_shards_use_the_given_cache(shards: Path, tmp_path: Path) -> None:
    url, cache = "memory://probe/set", tmp_path / "cache"
    for path in shards.iterdir():
        (RemotePath(url) / path.name).upload(path)
    try:
        near, _ = open_probe_shards(ProbeData(shards=str(shards)))
        for remote, fetched in (("ranges", 0), ("shards", 1)):
            data = ProbeData(shards=url, cache_dir=str(cache), remote=remote, attempts=2)
            far, _ = open_probe_shards(data)
            assert far.read(0, 0) == near.read(0, 0)
            assert len(list(cache.glob("*.tar"))) == fetched
    finally:
        fsspec.filesystem("memory").store.clear()
    with pytest.raises(ValueError, match="cache_bytes"):
        ProbeData(shards=url, cache_bytes=0)
