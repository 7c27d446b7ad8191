"""`--features inception` through torch-fidelity's own class, with random weights of its shapes."""

import json

import numpy as np
import pytest
import torch

from robustdm import evaluate
from robustdm.evaluation.features import load_extractor

pytest.importorskip("torch_fidelity")
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: E402


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file as torch-fidelity's releases have it: a pickled state dict."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        # Its constructor insists on a file: this one is empty, and not looked at.
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.save({}, path)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
    torch.save(network.state_dict(), path)
    return path


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)


def test_features_are_those_of_torch_fidelity(weights):
    shown = images(3, 0)
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], str(weights))
    ours = load_extractor("inception", (3, 32, 32), weights)(shown.float() / 127.5 - 1)
    features, logits = theirs(shown)
    assert features.shape == (3, 2048) and logits.shape == (3, 1008)
    assert len(features.unique(dim=0)) == 3  # random weights must not level all images
    assert torch.allclose(ours.features, features, rtol=1e-5, atol=1e-6)
    assert torch.allclose(ours.logits, logits, rtol=1e-5, atol=1e-6)


def test_evaluate_measures_with_them(weights, tmp_path):
    for name, seed in (("samples", 1), ("reference", 2)):
        shown = images(6, seed).permute(0, 2, 3, 1).numpy()
        np.savez(tmp_path / f"{name}.npz", shown)
    evaluate.main([
        "--samples", str(tmp_path / "samples.npz"), "--reference",
        str(tmp_path / "reference.npz"), "--features", "inception", "--weights", str(weights),
        "--metrics", "kernel", "--out", str(tmp_path / "found"), "--device", "cpu"])
    [record] = (tmp_path / "found").rglob("*.json")
    assert "inception" in json.dumps(json.loads(record.read_text()))
