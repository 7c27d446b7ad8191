"""What adversarial training for less than its price removes, and what it costs in robustness.

The exact method takes 8 units of work a step where plain DDPM takes 3. Every option that saves some
of them is trained with the exact method's number of steps, and again with its amount of work, on
the subspace of rank 5 in R^32 (all options) and on the digits (the most promising ones). The
measures of `robustness` stand beside noise and signal.
"""

from dataclasses import replace

import torch

from robustdm.metrics import frechet_distance
from robustdm.studies.claims import Ratio, ratio_claim
from robustdm.studies.robustness import PROBED, robustness, units
from robustdm.studies.runner import load_model, load_samples
from robustdm.studies.scales import OBJECTIVES, make_data
from robustdm.studies.study import Line, Study, line_figure

EXACT, EQUAL_WORK = "exact (robust_adv)", " (equal work)"
_ADV = OBJECTIVES["robust_adv (ray)"]
METHODS = {
    EXACT: _ADV,
    **{name: OBJECTIVES[name] for name in ("DDPM", "robust_ran", "outward_ran")},
    **{f"{key} {value}": _ADV | {key: value} for key, value in (
        ("reg_fraction", 0.5), ("reg_fraction", 0.25), ("reg_every", 4), ("attack_fraction", 0.5),
        ("at_last", 0.5), ("at_last", 0.25))}}
NOT_ON_DIGITS = ("reg_fraction 0.5", "at_last 0.5")
MEASURES = {"subspace": ["off_subspace_sd", "component_ratio_1", "component_ratio_5"],
            "digits": ["noise_rms", "pixel_std"]}  # noise first, then signal


class Approximations(Study):
    """Every option at the exact method's steps and at its work."""

    title = "Cheaper than exact"
    differs = ()

    def arms(self):
        on_digits = {name: METHODS[name] for name in METHODS if name not in NOT_ON_DIGITS}
        plain = self.scale.on("subspace", 500, make_data=make_data).arms("subspace", METHODS)
        made = []
        for arm in plain + self.scale.on("digits", 128).arms("digits", on_digits):
            made.append(arm)
            if arm.name == EXACT:  # the first of its seed
                work = units(arm.config)
            else:
                steps = round(arm.config.steps * work / units(arm.config))
                made.append(replace(arm, name=arm.name + EQUAL_WORK,
                                    config=replace(arm.config, steps=steps)))
        return made

    def probe(self, arm):
        data, samples = arm.make_data(arm.config), load_samples(arm, self.scale.out)
        everything = torch.arange(len(data))
        return dict(
            robustness(load_model(arm, self.scale.out), arm.config, data.batch(everything[:256]),
                       arm.config.seed),
            frechet=frechet_distance(samples, data.clean(everything)), units=units(arm.config),
            steps=arm.config.steps)

    def tables(self, of):
        found = {}
        for group, measures in MEASURES.items():
            rows = of.rows(group, ["steps", "units", *measures, "sliced_wasserstein", "frechet",
                                   "train_cpu_s", *PROBED])
            for title, wanted in (("equal steps", False), ("equal work", True)):
                found[f"{group}, {title}"] = {
                    name.removesuffix(EQUAL_WORK): row for name, row in rows.items()
                    if name.endswith(EQUAL_WORK) == wanted or name == EXACT}
        return found

    def compare(self, of):
        claims = []
        for group, (noise, *_) in MEASURES.items():
            options = [n for n in of.rows(group, ()) if n != EXACT and not n.startswith("DDPM")]
            claims += [Ratio(f"{group}, {{}}: noise / exact's", group, name, EXACT, noise,
                             at_most=1.25).claim(of) for name in options]
            # The controls never saw the attack: nothing in them can have overfitted to it.
            claims += [ratio_claim(
                f"{group}, {name}: residual_pgd10 / residual_fgsm (no catastrophic overfitting)",
                *(of(group, name, f"residual_{attack}") for attack in ("pgd10", "fgsm")), at_most=3)
                for name in (EXACT, *options) if "_ran" not in name]
        return claims

    def figures(self, of):
        made = {}
        for group, (noise, *_) in MEASURES.items():
            rows, lines = of.rows(group, ["units", "steps"]), []
            for name in (n for n in rows if not n.endswith(EQUAL_WORK)):
                both = [n for n in (name, name + EQUAL_WORK) if n in rows]
                work = [rows[n]["units"].mean * rows[n]["steps"].mean / 1000 for n in both]
                lines.append(Line(name, work, [(group, n) for n in both]))
            drawn = line_figure(of, [noise], lines, "thousand forward passes of a batch")
            drawn.axes[0].set_yscale("log")
            made[group] = (drawn, f"{group}: noise against the work of the run.")
        return made
