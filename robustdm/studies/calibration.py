"""How far the corrupted training set itself is from the clean one: no training needed.

A well-fitted DDPM reproduces the law of its training data, so its distance to the clean set should
come out near that of the corrupted set. The paper's DDPM reaches FID 58.05 and 102.68 on CIFAR-10
with 90 % of the images corrupted by noise of standard deviation 0.1 and 0.2. Three readings of the
corruption are compared: float images, images saved as 8-bit files (clipped), and a standard
deviation meant for the range [0, 1], which is twice as strong in [-1, 1].
"""

from pathlib import Path

import torch

from robustdm.data import Corruption
from robustdm.data.digits import load_digits
from robustdm.data.read import read_images
from robustdm.errors import UsageError
from robustdm.evaluation.features import load_extractor
from robustdm.evaluation.measure import features_of
from robustdm.metrics import FeatureStatistics, frechet_distance
from robustdm.studies.claims import judge, ratio_claim, untested
from robustdm.studies.study import Study

GROUP = "calibration"
FRACTION = 0.9
PAPER = {0.1: 58.05, 0.2: 102.68}
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
    paper = {"the paper, CIFAR-10": {f"DDPM, sigma {s}": {"FID": str(v)} for s, v in PAPER.items()}}

    def __init__(self, scale, data_dir: Path | None = None, features: str = "auto",
                 weights: Path | None = None, count: int = 10_000):
        super().__init__(scale)
        images = load_digits() if data_dir is None else read_images(data_dir, "data_dir")
        self.images = images[:count]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.extractors = {
            quantise: load_extractor(features, tuple(images.shape[1:]), weights, device, quantise)
            for quantise in (False, True)}
        self.identity = self.extractors[True].identity
        dims = self.extractors[False](self.images[:2]).features.shape[1]
        if len(self.images) <= dims:
            raise UsageError(f"{len(self.images)} images are too few for a Frechet distance of "
                             f"{dims} features: take more images, or other --features")

    def records(self):
        clean = {q: FeatureStatistics.of(features_of(e, self.images).features)
                 for q, e in self.extractors.items()}
        items, records = torch.arange(len(self.images)), []
        total = self.scale.seeds * len(PAPER) * len(READINGS)
        for sigma in PAPER:
            for name, (factor, quantise) in READINGS.items():
                for seed in range(self.scale.seeds):
                    noisy = Corruption(FRACTION, factor * sigma, seed)(self.images, items)
                    made = features_of(self.extractors[quantise], noisy).features
                    distance = frechet_distance(made, clean[quantise])
                    records.append({"group": GROUP, "name": f"sigma {sigma}, {name}",
                                    "seed": seed, "measures": {"frechet": distance}})
                    print(f"[{len(records)}/{total}] sigma {sigma}, {name}, seed {seed}: "
                          f"{distance:.4g}", flush=True)
        return records

    def tables(self, of):
        return {"Distance of the corrupted to the clean set": of.rows(GROUP, ["frechet"])}

    def compare(self, of):
        claims = []
        for name in READINGS:
            found = {s: of(GROUP, f"sigma {s}, {name}", "frechet") for s in PAPER}
            claims.append(ratio_claim(
                f"{name}: distance at sigma 0.2 / at 0.1", found[0.2], found[0.1], at_least=1.27,
                at_most=2.27, paper="102.68 / 58.05 = 1.77"))
            claims += [judge(f"{name}, sigma {s}: FID", found[s], at_least=0.75 * fid,
                             at_most=1.25 * fid, paper=f"{fid}") for s, fid in PAPER.items()]
        if self.identity["name"] != "inception":
            claims = [untested(c.text, c.paper) for c in claims]
        return claims

    def read(self, of):
        note = (f"{len(self.images)} images; features {self.identity['name']} "
                f"({self.identity['digest'][:12]}), {self.scale.seeds} realisations of the "
                "corruption.")
        if self.identity["name"] != "inception":
            note += (" The paper's numbers are Inception FIDs: in another feature space only the "
                     "order and the ratio can be looked at.")
        return [note, "A well-fitted DDPM reproduces the law of its training data, so its distance "
                      "should come out near these."]
