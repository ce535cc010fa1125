"""gFID, sFID, inception score, precision and recall of generated images."""

from __future__ import annotations

from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.adm import gaussian_of, inception_score, precision_recall
from gigatok_ds.evaluation.distribution import frechet_distance
from gigatok_ds.evaluation.extraction import extract_features
from gigatok_ds.evaluation.image_sets import ImageSet
from gigatok_ds.evaluation.inception import InceptionFeatures
from gigatok_ds.evaluation.reference_batch import Reference
from gigatok_ds.parallel.topology import Topology

SAMPLES = 50_000
ALLOWANCES = ("count", "size", "dtype", "reference")


def check_comparable(samples: ImageSet, reference_name: str, reference_size: tuple[int, int], allow: set[str]) -> None:
    """InputError when figures of these images would not compare with published ones, unless allowed.

    allow: of ALLOWANCES; the type of the pixels is checked where the images are opened.
    """
    if len(samples) != SAMPLES and "count" not in allow:
        raise InputError(
            f"{samples.path} holds {len(samples)} images, but published figures are of {SAMPLES:,}, and FID "
            "grows as they get fewer; draw more, or say --allow count"
        )
    if tuple(samples.size) != tuple(reference_size) and "size" not in allow:
        raise InputError(f"{samples.path} holds images of {tuple(samples.size)} pixels, the reference of "
                         f"{tuple(reference_size)}; resizing changes FID; say --allow size if it is meant")
    if reference_name != "adm" and "reference" not in allow:
        raise InputError(
            "the reference is not ADM's batch (VIRTUAL_imagenet256_labeled.npz: 10,000 images of 256 pixels "
            "with mu, sigma, mu_s and sigma_s), which published figures compare with; give that, or say "
            "--allow reference"
        )


def evaluate_generation(samples: ImageSet, reference: Reference, inception: InceptionFeatures, topology: Topology, *,
                        suffix: str = "", batch_size: int = 64) -> dict[str, float]:
    """The figures by names that say what they are of: `gfid_adm50k`, `inception_score_50k`; collective.

    suffix: appended to every name, for networks whose figures compare with nothing.
    """
    features = extract_features(samples, inception, topology, batch_size=batch_size, title="samples")
    figures = None
    if topology.is_first:
        manifolds = precision_recall(reference.features, features.pooled)
        count = short_count(len(samples))
        against = f"{reference.name}{count}{suffix}"
        figures = {
            f"gfid_{against}": frechet_distance(gaussian_of(features.pooled), reference.pooled),
            f"sfid_{against}": frechet_distance(gaussian_of(features.spatial), reference.spatial),
            f"inception_score_{count}{suffix}": inception_score(features.logits),
            f"precision_{against}": manifolds.precision,
            f"recall_{against}": manifolds.recall,
        }
    return topology.from_first(figures)


def short_count(images: int) -> str:
    """`50k`, `1234`."""
    return f"{images // 1000}k" if images % 1000 == 0 else str(images)
