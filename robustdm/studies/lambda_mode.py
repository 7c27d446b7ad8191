"""Which reading of lambda_t should be the default: noise removed against signal kept.

All four readings with robust_adv, beside DDPM, on the subspace of rank 5 in R^32, the three
Gaussians with outliers, the digits, and (where an .npz is given) the leading 25 principal
coordinates of 64x64 butterflies with 40 dimensions of noise alone, scaled so that the largest
standard deviation is 2 as in the first set. (Unscaled it is 29, which the small network does not
learn in minutes: even plain DDPM's first component came out several times too wide.)
"""

from pathlib import Path

from robustdm.data import Corruption, SubspaceData, load_data
from robustdm.runs.config import TrainConfig
from robustdm.studies import digits, points, subspace
from robustdm.studies.claims import Spread
from robustdm.studies.scales import OBJECTIVES, Scale
from robustdm.studies.study import Study

READINGS = {f"robust_adv ({mode})": dict(objective="robust_adv", lambda_mode=mode)
            for mode in ("ray", "x", "std", "literal")}
METHODS = {"DDPM": OBJECTIVES["DDPM"]} | READINGS
SIGNAL, NOISE = 25, 40
COLUMNS = {  # noise first
    subspace.GROUP: ["off_subspace_sd", "component_ratio_1", "component_ratio_5",
                     "sliced_wasserstein"],
    points.GAUSSIANS: ["distance", "far_share", "sliced_wasserstein"],
    digits.GROUP: ["noise_rms", "residual", "pixel_std", "sliced_wasserstein"],
    "butterflies": ["off_subspace_sd", "component_ratio_1", f"component_ratio_{SIGNAL}",
                    "sliced_wasserstein"],
}


def butterfly_data(config: TrainConfig) -> SubspaceData:
    """The leading principal coordinates of the images, scaled to a largest deviation of 2."""
    sds = load_data(config).sds
    corruption = Corruption(config.corrupt_fraction, config.corrupt_sigma, config.seed)
    return SubspaceData.from_sds(
        sds * (2 / sds[0]), NOISE, config.num_points, corruption, config.holdout, config.seed)


class LambdaMode(Study):
    """Every reading on every set; shares its arms with the other studies."""

    title = "Readings of lambda_t"
    differs = ()

    def __init__(self, scale: Scale, butterflies: Path | None = None):
        super().__init__(scale)
        self.butterflies = butterflies

    def arms(self):
        made = subspace.arms(self.scale, METHODS)
        made += [arm for arm in points.point_arms(self.scale, METHODS) if arm.group in COLUMNS]
        if self.butterflies is not None:
            fields = dict(data_dir=self.butterflies, resolution=64, subspace_rank=SIGNAL,
                          subspace_noise_dims=NOISE)
            made += self.scale.on("subspace", 500, fields=fields, make_data=butterfly_data).arms(
                "butterflies", METHODS)
        return made + digits.arms(self.scale, METHODS)

    def tables(self, of):
        found, shares = {}, {name: {} for name in READINGS}
        for group, columns in COLUMNS.items():
            if rows := of.rows(group, columns):
                found[group], base = rows, rows["DDPM"][columns[0]].mean
                for name, row in shares.items():
                    left = rows[name][columns[0]]
                    row[f"{group}: noise / DDPM"] = Spread(left.mean / base, left.sd / base)
        return found | {"Noise left, as a share of DDPM's": shares}
