"""Real images: handwritten digits of which 90 % carry Gaussian noise of standard deviation 0.2.

1,200 steps of 64 images with the network of the `digits` preset; 128 unclipped samples by 1000-step
DDPM. Noise is what samples carry on the pixels that are constant in clean digits; the spread of the
samples stands beside it, since a model that shrinks everything also removes noise.
"""

from robustdm.studies.claims import EFFECT, Ratio
from robustdm.studies.runner import EQUAL_WORK, SHRUNK_SWEEP, Arm
from robustdm.studies.scales import BLURRED, OBJECTIVES, Scale
from robustdm.studies.study import Study
from robustdm.studies.tradeoff import EqualSignal, figure

GROUP, ADV = "digits", "robust_adv (ray)"
METHODS = {name: fields for name, fields in OBJECTIVES.items() if name != "invariance"} | {
    # Which knob trades smoothing for noise?
    f"{ADV}, lam 0.1": OBJECTIVES[ADV] | dict(lam=0.1),
    f"{ADV}, gamma 4/255": OBJECTIVES[ADV] | dict(gamma=4 / 255),
}
NOISE, SIGNAL, WORDS = "noise_rms", "pixel_std", "noise on constant pixels"


def arms(scale: Scale, methods: dict[str, dict], shrunk=None) -> list[Arm]:
    """Every method with every seed."""
    return scale.on("digits", 128, 1200).arms(GROUP, methods, shrunk)


class Digits(Study):
    """All objectives but invariance, with DDPM, with the baselines and at equal signal."""

    title = "Handwritten digits"
    differs = ()
    references = True
    columns = [NOISE, "residual", SIGNAL, "sliced_wasserstein", "train_cpu_s"]
    # At full contrast the noise of dark pixels would be clipped away.
    contrast = 0.5
    comparisons = [
        *(Ratio(f"{{}} / {{}}, {WORDS}", GROUP, name, "DDPM", NOISE, at_most=0.6)
          for name in ("robust_ran", ADV, "robust_adv (x)")),
        *(Ratio(f"{{}} / {{}}, {words}", GROUP, ADV, name, measure, at_least=limit)
          for name in (BLURRED, EQUAL_WORK)
          for words, measure, limit in ((WORDS, NOISE, None), ("spread", SIGNAL, 1 + EFFECT))),
        *(EqualSignal(GROUP, name, NOISE, SIGNAL) for name in METHODS if name != "DDPM"),
    ]

    def arms(self):
        return arms(self.scale, METHODS, SHRUNK_SWEEP)

    def figures(self, of):
        rows = of.rows(GROUP, self.columns)
        clean = next(row[SIGNAL].mean for name, row in rows.items() if name.startswith("clean"))
        shown = {name: row for name, row in rows.items() if "data" not in name}
        made = figure(shown, NOISE, SIGNAL, clean)
        return {"tradeoff": (made, "Noise against signal.")} | super().figures(of)
