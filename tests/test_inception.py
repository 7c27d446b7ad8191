"""`--features inception` through torch-fidelity's own class, with random weights of its shapes."""

import json

import numpy as np
import pytest
import torch

from robustdm import evaluate
from robustdm.evaluation import measure as measuring
from robustdm.evaluation.features import load_extractor
from robustdm.metrics import frechet_distance
from tests.conftest import relative_error

torch_fidelity = pytest.importorskip("torch_fidelity")
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
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):  # torch's own weights level all images to nothing
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)


class Shown(torch.utils.data.Dataset):
    """Images as torch-fidelity asks for them."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


def test_features_are_those_of_torch_fidelity(weights):
    shown = images(3, 0)
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], str(weights))
    ours = load_extractor("inception", (3, 32, 32), weights)(shown.float() / 127.5 - 1)
    features, logits = theirs(shown)
    assert features.shape == (3, 2048) and logits.shape == (3, 1008)
    # Against what tells images apart, which is far less than what they share.
    for mine, wanted in ((ours.features, features), (ours.logits, logits)):
        assert relative_error(mine - wanted.mean(0), wanted - wanted.mean(0)) < 1e-5


def test_evaluate_measures_what_torch_fidelity_does(weights, tmp_path, monkeypatch):
    """FID, KID, precision and recall of the same images, each by its own code."""
    monkeypatch.setenv("ROBUSTDM_CACHE", str(tmp_path / "cache"))
    shown = {"samples": images(8, 1), "reference": images(8, 2)}
    shown["reference"][4:] //= 2  # darker: neither law holds the other
    for name, values in shown.items():
        np.savez(tmp_path / f"{name}.npz", values.permute(0, 2, 3, 1).numpy())
    seen, measure = [], measuring.measure
    monkeypatch.setattr(measuring, "measure", lambda features, reference, metrics: (
        seen.extend((features.features, reference)), measure(features, reference, metrics))[1])
    evaluate.main([
        "--samples", str(tmp_path / "samples.npz"), "--reference",
        str(tmp_path / "reference.npz"), "--features", "inception", "--weights", str(weights),
        "--metrics", "kernel", "manifold", "--out", str(tmp_path / "found"), "--device", "cpu"])
    [record] = (tmp_path / "found").rglob("*.json")
    record = json.loads(record.read_text())
    assert record["features"]["name"] == "inception"
    ours = {name: found["value"] for name, found in record["results"].items()}
    # KID of one subset, which is all images: theirs are drawn without replacement.
    theirs = torch_fidelity.calculate_metrics(
        input1=Shown(shown["samples"]), input2=Shown(shown["reference"]), fid=True, kid=True,
        prc=True, kid_subsets=1, kid_subset_size=8, feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights), cuda=False, cache=False, save_cpu_ram=True,
        verbose=False)
    # Shares of eight images are the same number or another one.
    assert (ours["precision"], ours["recall"]) == (theirs["precision"], theirs["recall"])
    assert 0 < theirs["recall"] != theirs["precision"] < 1
    # Theirs is the difference of kernels of about 1 in float32, in which it has rounded.
    kid = theirs["kernel_inception_distance_mean"]
    assert kid > 1e-3 and ours["kernel"] == pytest.approx(kid, abs=1e-6)
    # So few images leave 2,041 eigenvalues that are 0 but for rounding, of which both take roots.
    fid = theirs["frechet_inception_distance"]
    assert fid > 1 and frechet_distance(*seen) == pytest.approx(fid, rel=1e-5)
