"""A small classifier of real images, to judge whether generated ones show their class."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gigatok_ds.errors import InputError

MAX_SIDE = 16
PENALTY = 10.0  # the C of a support vector machine


class ImageClassifier:
    """A support vector machine (RBF kernel) on gray images of at most 16 x 16 pixels; deterministic."""

    def __init__(self, model):
        self._model = model

    @classmethod
    def fit(cls, images: Tensor | np.ndarray, labels: Tensor | np.ndarray,
            num_classes: int) -> ImageClassifier:
        """Train on images (N, 3, S, S), floats in [-1, 1], with labels (N,) in 0 .. num_classes - 1.

        Raises InputError when a label is outside that range or lengths differ.
        """
        from sklearn.dummy import DummyClassifier
        from sklearn.svm import SVC

        labels = np.asarray(labels)
        if len(labels) != len(images) or not len(labels):
            raise InputError(f"got {len(labels)} labels for {len(images)} images; "
                             "a classifier needs one label for each image, and at least one image")
        if labels.min() < 0 or labels.max() >= num_classes:
            raise InputError(f"labels go from {labels.min()} to {labels.max()}; "
                             f"{num_classes} classes allow 0 to {num_classes - 1}")
        one_class = len(np.unique(labels)) == 1
        model = DummyClassifier() if one_class else SVC(C=PENALTY, kernel="rbf", gamma="scale")
        return cls(model.fit(_features(images), labels))

    def predict(self, images: Tensor | np.ndarray) -> np.ndarray:
        """The class (N,) of each of images (N, 3, S, S), of the size it was trained on."""
        return self._model.predict(_features(images))

    def accuracy(self, images: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> float:
        """Fraction of images whose predicted class is their label."""
        return float(np.mean(self.predict(images) == np.asarray(labels)))


def _features(images: Tensor | np.ndarray) -> np.ndarray:
    """Gray values (N, side * side): luma of BT.601, averaged over areas down to at most 16 x 16."""
    images = torch.as_tensor(images).float().cpu()
    gray = torch.einsum("nchw,c->nhw", images, torch.tensor([0.299, 0.587, 0.114]))[:, None]
    side = min(gray.shape[-1], MAX_SIDE)
    return F.interpolate(gray, size=(side, side), mode="area").flatten(1).numpy()
