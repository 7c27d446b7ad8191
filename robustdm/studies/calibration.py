"""How far the corrupted training set itself is from the clean one: no training needed.

A well-fitted DDPM reproduces the law of its training data, so its distance to the clean set should
come out near that of the corrupted set. The paper's DDPM reaches FID 58.05 and 102.68 on CIFAR-10
with 90 % of the images corrupted by noise of standard deviation 0.1 and 0.2. Three readings of the
corruption are compared: float images, images saved as 8-bit files (clipped), and a standard
deviation meant for the range [0, 1], which is twice as strong in [-1, 1].
"""

from itertools import product
from pathlib import Path

import torch

from robustdm.data import Corruption
from robustdm.data.digits import load_digits
from robustdm.data.read import read_images
from robustdm.errors import UsageError
from robustdm.evaluation.features import load_extractor
from robustdm.evaluation.measure import features_of
from robustdm.metrics import FeatureStatistics, frechet_distance
from robustdm.studies.claims import Ratio, judge, untested
from robustdm.studies.study import Study

GROUP = "calibration"
FRACTION = 0.9
FID = {0.1: 58.05, 0.2: 102.68}
READINGS = {"float": (1, False), "8-bit files": (1, True), "8-bit, sigma for [0, 1]": (2, True)}


class Calibration(Study):
    """The corrupted set, read in three ways.

    Args:
        data_dir: images (CIFAR-10, folder, zip, array); scikit-learn's digits if None.
        features, weights: see ``load_extractor``.
        count: images used, the first ones.

    Raises:
        UsageError: if images or weights are missing or do not fit.
    """

    title = "Calibration: the corrupted set against the clean one"
    differs = ()
    paper = {"the paper, CIFAR-10": {f"DDPM, sigma {s}": {"FID": str(v)} for s, v in FID.items()}}

    def __init__(self, scale, data_dir: Path | None = None, features: str = "auto",
                 weights: Path | None = None, count: int = 10_000):
        super().__init__(scale)
        images = load_digits() if data_dir is None else read_images(data_dir, "data_dir")
        self.images = images[:count]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.extractors = {
            quantise: load_extractor(features, tuple(images.shape[1:]), weights, device, quantise)
            for quantise in (False, True)}
        self.features = self.extractors[True].identity
        dims = self.extractors[False](self.images[:2]).features.shape[1]
        if len(self.images) <= dims:
            raise UsageError(f"{len(self.images)} images are too few for a Frechet distance of "
                             f"{dims} features: take more images, or other --features")
        self.notes = [
            f"{len(self.images)} images; features {self.features['name']} "
            f"({self.features['digest'][:12]}), {scale.seeds} realisations of the corruption.",
            "A well-fitted DDPM reproduces the law of its training data, so its distance should "
            "come out near these."]
        if self.features["name"] != "inception":
            self.notes[0] += (" The paper's numbers are Inception FIDs: in another feature space "
                              "only the order and the ratio can be looked at.")

    def records(self):
        clean = {q: FeatureStatistics.of(features_of(e, self.images).features)
                 for q, e in self.extractors.items()}
        wanted = list(product(FID, READINGS.items(), range(self.scale.seeds)))
        items, records = torch.arange(len(self.images)), []
        for sigma, (name, (factor, quantise)), seed in wanted:
            noisy = Corruption(FRACTION, factor * sigma, seed)(self.images, items)
            made = features_of(self.extractors[quantise], noisy).features
            distance = frechet_distance(made, clean[quantise])
            records.append({"group": GROUP, "name": f"sigma {sigma}, {name}", "seed": seed,
                            "measures": {"frechet": distance}})
            print(f"[{len(records)}/{len(wanted)}] sigma {sigma}, {name}, seed {seed}: "
                  f"{distance:.4g}", flush=True)
        return records

    def tables(self, of):
        return {"Distance of the corrupted to the clean set": of.rows(GROUP, ["frechet"])}

    def compare(self, of):
        claims = []
        for name in READINGS:
            claims.append(Ratio(
                f"{name}: distance at sigma 0.2 / at 0.1", GROUP, f"sigma 0.2, {name}",
                f"sigma 0.1, {name}", "frechet", "102.68 / 58.05 = 1.77", 2.27, 1.27).claim(of))
            claims += [judge(f"{name}, sigma {s}: FID", of(GROUP, f"sigma {s}, {name}", "frechet"),
                             1.25 * fid, 0.75 * fid, f"{fid}") for s, fid in FID.items()]
        if self.features["name"] != "inception":
            claims = [untested(c.text, c.paper) for c in claims]
        return claims
