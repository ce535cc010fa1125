"""ADM's metrics against their formulas written out in NumPy, scikit-learn and SciPy, on fixed random features."""

import numpy as np
import pytest
import scipy.linalg
import torch
from feature_vectors import features
from golden_weights import image
from sklearn.neighbors import NearestNeighbors

from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.adm import gaussian_of, inception_score, precision_recall, squared_distances
from gigatok_ds.evaluation.distribution import frechet_distance
from gigatok_ds.evaluation.image_metrics import to_uint8
from gigatok_ds.evaluation.inception import SPATIAL_FEATURES, load_inception


def written_out_score(logits, split):
    """As the evaluator's NumPy lines do it, in float64."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    predictions = exponentials / exponentials.sum(axis=1, keepdims=True)
    scores = []
    for start in range(0, len(predictions), split):
        part = predictions[start : start + split]
        divergence = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
        scores.append(np.exp(divergence.sum(axis=1).mean()))
    return np.mean(scores)


@pytest.mark.parametrize("count, split", [(100, 30), (100, 100), (7, 5000), (1, 10)])
def test_inception_score_is_the_evaluators(count, split):
    logits = 3 * np.random.default_rng(0).normal(size=(count, 50))
    assert inception_score(torch.as_tensor(logits), split) == pytest.approx(written_out_score(logits, split), rel=1e-9)


def test_inception_score_of_certain_and_of_equal_images():
    certain = torch.full((20, 10), -1e4).scatter(1, (torch.arange(20) % 10)[:, None], 0.0)
    assert inception_score(certain) == pytest.approx(10, rel=1e-9), "ten classes, each certain"
    assert inception_score(torch.randn(1, 10).expand(20, 10)) == pytest.approx(1, rel=1e-9)
    with pytest.raises(InputError, match="at least one image"):
        inception_score(torch.empty(0, 10))


@pytest.mark.parametrize("counts", [(200, 150), (60, 300), (4, 5)])
def test_precision_and_recall_are_those_of_nearest_neighbours(counts):
    """scikit-learn's neighbours are in float64."""
    rng = np.random.default_rng(1)
    reference, samples = rng.normal(size=(counts[0], 8)), rng.normal(size=(counts[1], 8)) * 0.7 + 0.5

    def inside(points, manifold):
        radii = NearestNeighbors(n_neighbors=4).fit(manifold).kneighbors(manifold)[0][:, 3]  # the point itself is one
        distances = np.linalg.norm(points[:, None] - manifold[None], axis=2)
        return (distances <= radii).any(axis=1).mean()

    found = precision_recall(*(torch.as_tensor(side).float() for side in (reference, samples)), half=False)
    assert found.precision == pytest.approx(inside(samples, reference), abs=1e-6)
    assert found.recall == pytest.approx(inside(reference, samples), abs=1e-6)
    assert 0 < found.precision <= 1 and 0 < found.recall <= 1


def half_precision_distances(rows, columns):
    """Every operation in NumPy's float16, but the sums and products, which accumulate in float32 as on a GPU."""
    rows, columns = rows.astype(np.float16), columns.astype(np.float16)
    products = (rows.astype(np.float32) @ columns.astype(np.float32).T).astype(np.float16)
    norms = [(part * part).astype(np.float32).sum(axis=1).astype(np.float16) for part in (rows, columns)]
    return np.maximum(norms[0][:, None] - np.float16(2) * products + norms[1], np.float16(0)).astype(np.float32)


def test_distances_are_rounded_as_the_evaluator_rounds_them():
    rng = np.random.default_rng(2)
    rows, columns = (rng.normal(size=(count, 300)).astype(np.float32) for count in (50, 60))
    ours = squared_distances(torch.as_tensor(rows), torch.as_tensor(columns)).numpy()
    expected = half_precision_distances(rows, columns)
    exact = ((rows[:, None].astype(np.float64) - columns[None]) ** 2).sum(axis=2)
    assert (ours == expected).mean() > 0.99, "but for ties of a sum in another order"
    np.testing.assert_allclose(ours, expected, atol=0.51)
    assert np.abs(ours - exact).max() > 0.2, "which is what float16 costs"
    np.testing.assert_allclose(squared_distances(torch.as_tensor(rows), torch.as_tensor(columns), False), exact,
                               rtol=1e-5)


def test_distances_beyond_float16_are_taken_in_float32():
    rows = torch.full((2, 4), 200.0) * torch.tensor([[1.0], [2.0]])  # squares sum up to 160,000 and 640,000
    assert squared_distances(rows, rows).tolist() == [[0, 160_000], [160_000, 0]]


def test_blocks_do_not_matter(monkeypatch):
    rng = torch.Generator().manual_seed(3)
    reference, samples = (torch.randn(count, 5, generator=rng) for count in (23, 31))
    full = precision_recall(reference, samples)
    monkeypatch.setattr("gigatok_ds.evaluation.adm.BLOCK", 3)
    assert precision_recall(reference, samples) == full


def test_equal_sets_and_too_few():
    vectors = torch.randn(30, 6, generator=torch.Generator().manual_seed(4))
    assert precision_recall(vectors, vectors) == (1.0, 1.0)
    with pytest.raises(InputError, match="more than 3 images, but the samples has 3"):
        precision_recall(vectors, vectors[:3])


@pytest.mark.parametrize("count, width, rank", [(500, 20, None), (15, 40, None), (300, 30, 12)])
def test_frechet_distance_of_features_is_scipys(count, width, rank):
    """Including fewer vectors than dimensions and vectors in a subspace: singular covariances."""
    sides = [features(seed, count, width, rank=rank) for seed in (0, 1)]
    moments = [(side.numpy().mean(axis=0), np.cov(side.numpy(), rowvar=False)) for side in sides]
    root = scipy.linalg.sqrtm(moments[0][1] @ moments[1][1]).real
    expected = (((moments[0][0] - moments[1][0]) ** 2).sum()
                + np.trace(moments[0][1]) + np.trace(moments[1][1]) - 2 * np.trace(root))
    ours = [gaussian_of(side) for side in sides]
    assert frechet_distance(*ours) == pytest.approx(expected, rel=1e-4)
    for found, (mean, covariance) in zip(ours, moments, strict=True):
        np.testing.assert_allclose(found.mean, mean, rtol=1e-9)
        np.testing.assert_allclose(found.covariance, covariance, rtol=1e-6, atol=1e-9 * np.abs(covariance).max())
    assert frechet_distance(ours[0], ours[0]) < 1e-9 * np.trace(moments[0][1])
    with pytest.raises(InputError, match="at least 2 feature vectors"):
        gaussian_of(sides[0][:1])


def test_the_spatial_layout_is_rows_columns_channels():
    """The first 7 channels of the first branch of the block that TensorFlow's graph calls mixed_6, NHWC."""
    inception, maps = load_inception("random", "here"), []
    hook = inception.network.Mixed_6d.branch1x1.register_forward_hook(lambda _m, _i, output: maps.append(output))
    pixels = to_uint8(torch.as_tensor(image("test_adm", (2, 3, 40, 40))))
    inception(pixels)
    hook.remove()
    output = inception.outputs(pixels)
    assert maps[0].shape == (2, 192, 17, 17) and output.spatial.shape == (2, SPATIAL_FEATURES)
    expected = maps[0].numpy().transpose(0, 2, 3, 1)[..., :7].reshape(2, -1)
    assert np.array_equal(output.spatial, expected) and expected.std() > 0
    assert torch.equal(output.pooled, inception(pixels))
    classifier = inception.network.fc.weight
    torch.testing.assert_close(output.logits, output.pooled @ classifier.T)
