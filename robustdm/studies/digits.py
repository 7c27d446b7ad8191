"""Real images: handwritten digits of which 90 % carry Gaussian noise of standard deviation 0.2.

1,200 steps of 64 images with the network of the `digits` preset; 128 unclipped samples by 1000-step
DDPM. Noise is what samples carry on the pixels that are constant in clean digits; the spread of the
samples stands beside it, since a model that shrinks everything also removes noise.
"""

import torch

from robustdm.data import load_data
from robustdm.studies import tradeoff
from robustdm.studies.claims import EFFECT
from robustdm.studies.runner import SHRUNK_SWEEP, Arm
from robustdm.studies.scales import OBJECTIVES, Scale
from robustdm.studies.study import Study

SAMPLES = 128
GROUP, ADV = "digits", "robust_adv (ray)"
METHODS = {name: fields for name, fields in OBJECTIVES.items() if name != "invariance"} | {
    # Which knob trades smoothing for noise?
    f"{ADV}, lam 0.1": OBJECTIVES[ADV] | dict(lam=0.1),
    f"{ADV}, gamma 4/255": OBJECTIVES[ADV] | dict(gamma=4 / 255),
}
NOISE, SIGNAL = "noise_rms", "pixel_std"
CLEAN = "clean data, held out"


def arms(scale: Scale, methods: dict[str, dict], shrunk=None) -> list[Arm]:
    """Every method with every seed."""
    return scale.on("digits", SAMPLES, 1200).arms(GROUP, methods, shrunk)


class Digits(Study):
    """All objectives but invariance."""

    title = "Handwritten digits"
    differs = ()
    columns = [NOISE, "residual", SIGNAL, "sliced_wasserstein", "train_cpu_s"]
    # At full contrast the noise of dark pixels would be clipped away.
    contrast = 0.5

    def arms(self):
        return arms(self.scale, METHODS, SHRUNK_SWEEP)

    def records(self):
        records = super().records()
        for arm in {arm.config.seed: arm for arm in self.arms()}.values():
            data = load_data(arm.config)
            held = data.heldout
            for name, points in (("training data", data.batch(torch.arange(SAMPLES))),
                                 (CLEAN, held.clean(torch.arange(len(held))))):
                records.append({"group": GROUP, "name": name, "seed": arm.config.seed,
                                "samples": len(points), "measures": data.measure(points)})
        return records

    def compare(self, of):
        baselines = [name for name in of.rows(GROUP, ()) if name.startswith("DDPM, ")
                     and "shrunk" not in name]
        words = "noise on constant pixels"
        return [
            *(of.ratio(f"{{}} / {{}}, {words}", GROUP, name, "DDPM", NOISE, at_most=0.6)
              for name in METHODS if "robust" in name and "," not in name),
            *(of.ratio(f"{{}} / {{}}, {what}", GROUP, ADV, name, measure, **limit)
              for name in baselines for what, measure, limit in (
                  (words, NOISE, {}), ("spread", SIGNAL, dict(at_least=1 + EFFECT)))),
            *(tradeoff.equal_signal_claim(of, GROUP, name, NOISE, SIGNAL)
              for name in METHODS if name != "DDPM"),
        ]

    def figures(self, of):
        rows = of.rows(GROUP, self.columns)
        shown = {name: row for name, row in rows.items() if "data" not in name}
        made = tradeoff.figure(shown, NOISE, SIGNAL, rows[CLEAN][SIGNAL].mean)
        return {"tradeoff": (made, "Noise against signal.")} | super().figures(of)
