"""Figure 6, left: how near samples come to single training images, with what smoothing alone does.

Source: Briglia et al. 2026, section 3.2.
"""

from dataclasses import replace

import torch

from robustdm.evaluation.features import cache_directory, load_extractor
from robustdm.evaluation.measure import features_of
from robustdm.method.baselines import DEFAULT_STRENGTH, blur
from robustdm.metrics import nearest, nearness
from robustdm.reporting import plots
from robustdm.studies.claims import EFFECT, Ratio, judge, untested
from robustdm.studies.runner import load_samples
from robustdm.studies.scales import METHODS, Scale, corrupted
from robustdm.studies.study import Study

GROUP, DDPM, ADV = "clean data", "DDPM", "robust_adv"
DRASTIC = 0.5
"""A shift by half the histogram's standard deviation."""
HELD_OUT = "held-out images"
BLURRED_TRAINING, BLURRED_SAMPLES = "training images, blurred", "DDPM's samples, blurred"
SHIFTS = (  # from, to, at least, the paper's number
    ("similarity, DDPM - robust_adv in standard deviations ('drastically shifted to the left')",
     DDPM, ADV, DRASTIC, "histogram only"),
    ("not in the paper: similarity, DDPM - held-out images in standard deviations (DDPM has "
     "memorised more than images of this kind share anyway)", DDPM, HELD_OUT, EFFECT, ""),
    ("not in the paper: similarity, DDPM's samples blurred - robust_adv in standard deviations "
     "(robust training forgets more than smoothing its samples does)", BLURRED_SAMPLES, ADV,
     EFFECT, ""))
REPLICAS = Ratio("share >= 0.9: {} / {} ('reduces near-replicas')", GROUP, ADV, DDPM,
                 "share >= 0.9", "histogram only", at_most=0.75)


class Figure6Left(Study):
    """Nearest training image of every sample of DDPM and robust_adv, and of three controls."""

    title = "Figure 6, left: memorisation"
    notes = (
        "Similarity alone says little: images that were never trained on are near training images "
        "too, and blurring moves the histogram without anything having been forgotten.",)
    grid = [(GROUP, {name: METHODS[name] | corrupted(0.0) for name in (DDPM, ADV)})]

    def __init__(self, scale: Scale):
        super().__init__(digits(scale) if scale.name == "tiny" else scale)
        self.columns = [*nearness(torch.zeros(2)), "frechet", "recall", "coverage",
                        *(["pixel_std"] if scale.name == "tiny" else [])]
        self.similarities: dict[str, torch.Tensor] = {}

    def records(self):
        records = super().records()
        of = {(record["name"], record["seed"]): record for record in records}
        for arm in self.arms():
            for name, similarity in self._similarities(arm):
                seed = arm.config.seed
                record = of.get((name, seed))
                if record is None:
                    record = dict(group=GROUP, name=name, seed=seed, measures={})
                    records.append(record)
                record["measures"] |= nearness(similarity)
                if seed == 0:
                    self.similarities[name] = similarity
        return records

    def _similarities(self, arm):
        """Of an arm's samples; beside DDPM's, of the controls."""
        data, sd = arm.make_data(arm.config), DEFAULT_STRENGTH["blur"]
        extractor = load_extractor(arm.features, data.shape, arm.weights,
                                   "cuda" if torch.cuda.is_available() else "cpu")
        train, samples = data.clean(torch.arange(len(data))), load_samples(arm, self.scale.out)
        reference = features_of(extractor, train, cache_directory()).features
        compared = {arm.name: samples}
        if arm.name == DDPM:
            compared |= {HELD_OUT: data.heldout.clean(torch.arange(len(data.heldout))),
                         BLURRED_TRAINING: blur(train[: self.scale.samples], sd),
                         BLURRED_SAMPLES: blur(samples, sd)}
        for name, images in compared.items():
            yield name, nearest(features_of(extractor, images).features, reference)[0]

    def compare(self, of):
        shifts = [judge(text, [(b - a) / sd for a, b, sd in zip(
            of(GROUP, to, "mean"), of(GROUP, start, "mean"), of(GROUP, DDPM, "sd"), strict=True)],
            at_least=limit, paper=paper) for text, start, to, limit, paper in SHIFTS]
        replicas = REPLICAS.claim(of)
        if min(of(GROUP, HELD_OUT, REPLICAS.measure)) > 0.99:
            # Where unseen images pass the threshold too, it tells nothing apart.
            replicas = untested(replicas.text, replicas.paper)
        return [*shifts, replicas]

    def tables(self, of):
        return {"Nearest training image": of.rows(GROUP, self.columns)}

    def figures(self, of):
        return {"figure-6-left": (plots.similarities(self.similarities, ""), "Seed 0.")}


def digits(scale: Scale) -> Scale:
    """The handwritten digits: what memorises must be images."""
    made = scale.on("digits", 300, 1200, dict(holdout=0.2), sampling_steps=250, noise="noise_rms",
                    features="digits")
    return replace(made, differs=(
        "Data: 1,438 handwritten digits of 8x8 pixels; 359 others are held out.",
        f"A UNet of 0.43 million parameters, {made.base['steps']:,} steps of 64; 300 samples by "
        "250 respaced steps.",
        "Features of a small classifier of digits in place of DINOv2: the thresholds of 0.9 and "
        "0.95 do not mean the same, and tell nothing where held-out images pass them."))
