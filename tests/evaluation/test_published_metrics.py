"""Opt-in: the evaluator on OpenAI's own ADM samples gives what OpenAI published for them.

Runs when GIGATOK_ADM_SAMPLES, GIGATOK_ADM_REFERENCE and GIGATOK_INCEPTION are the paths of
admnet_guided_upsampled_imagenet256.npz, VIRTUAL_imagenet256_labeled.npz and weights-inception-2015-12-05-6726825d.pth
(about 15 minutes on one GPU with GIGATOK_DEVICE=cuda, hours on a CPU); docs/evaluation.md says where they are
published.
"""

import os
from pathlib import Path

import pytest
from command_runs import figures, on_ranks

FILES = {"GIGATOK_ADM_SAMPLES": "admnet_guided_upsampled_imagenet256.npz",
         "GIGATOK_ADM_REFERENCE": "VIRTUAL_imagenet256_labeled.npz",
         "GIGATOK_INCEPTION": "weights-inception-2015-12-05-6726825d.pth"}
PUBLISHED = {"gfid_adm50k": (3.943, 0.01), "sfid_adm50k": (6.140, 0.02), "inception_score_50k": (215.8, 0.5),
             "precision_adm50k": (0.8265, 0.003), "recall_adm50k": (0.531, 0.003)}


def test_adm_samples_have_the_published_figures(tmp_path):
    missing = [f"{name} ({file})" for name, file in FILES.items() if not Path(os.environ.get(name, "")).is_file()]
    if missing:
        pytest.skip(f"the published figures were NOT checked: set {', '.join(missing)} to the paths of these files")
    samples, reference, inception = (os.environ[name] for name in FILES)
    assert on_ranks(["evaluate", "generation", samples, "--reference", reference, "--inception", inception, "--device",
                     os.environ.get("GIGATOK_DEVICE", "cpu"), "--out", tmp_path]) == 0
    found = figures(tmp_path)
    assert found == {name: pytest.approx(value, abs=tolerance) for name, (value, tolerance) in PUBLISHED.items()}
