"""Table 2: distances with and without noise in the data, by DDPM and DDIM."""

from robustdm.studies.claims import EFFECT, Ratio, ratio_claim, untested
from robustdm.studies.denoising import SIGMAS, Denoising
from robustdm.studies.runner import SHRUNK_LAM, SHRUNK_SWEEP
from robustdm.studies.scales import METHODS, noise_name

COLUMNS = ("DDPM", "robust_adv", "DDPM, DDIM", "robust_adv, DDIM")
FID = {
    ("CIFAR-10", 0.0): (7.2, 28.68, 11.62, 31.20), ("CIFAR-10", 0.1): (58.05, 24.70, 59.28, 25.48),
    ("CIFAR-10", 0.2): (102.68, 24.81, 105.43, 24.93),
    ("CelebA", 0.0): (3.49, 19.83, 6.19, 17.59), ("CelebA", 0.1): (54.90, 14.54, 41.29, 17.98),
    ("CelebA", 0.2): (96.03, 16.53, 89.28, 20.24),
    ("LSUN Bedroom", 0.0): (9.90, 57.13, 27.00, 48.80),
    ("LSUN Bedroom", 0.1): (53.81, 44.07, 50.53, 48.90),
    ("LSUN Bedroom", 0.2): (95.85, 44.27, 82.20, 61.98),
}


class Table2(Denoising):
    """DDPM and robust_adv at every strength of the noise."""

    title = "Table 2: noise in the data"
    paper = {"the paper, FID": {
        f"{name}, sigma {sigma:g}": dict(zip(COLUMNS, map(str, numbers), strict=True))
        for (name, sigma), numbers in FID.items()}}
    grid = [part for sigma in (0.0, *SIGMAS) for part in (
        (sigma, {"DDPM": METHODS["DDPM"]}),
        (sigma, {"DDPM, DDIM": METHODS["DDPM"]}, None, dict(sampler="ddim")),
        (sigma, {"robust_adv": METHODS["robust_adv"]}),
        (sigma, {"robust_adv, DDIM": METHODS["robust_adv"]}, None, dict(sampler="ddim")),
        (sigma, {}, SHRUNK_SWEEP if sigma else SHRUNK_LAM))]

    def compare(self, of):
        claims = []
        for sigma in (0.0, *SIGMAS):
            group, limit = noise_name(sigma), dict(at_least=1 + EFFECT) if not sigma else {}
            claims += [Ratio(f"{group}: distance, robust_adv / {COLUMNS[i]}", group,
                             COLUMNS[i + 1], COLUMNS[i], "frechet",
                             "{1} / {0}".format(*FID["CIFAR-10", sigma][i:]), **limit).claim(of)
                       for i in (0, 2)]
            claims += self.against_baselines(of, group) if sigma else []
        strong, weak = (of(noise_name(s), "robust_adv", "frechet") for s in (0.2, 0.1))
        claims.append(ratio_claim(
            "robust_adv: distance, sigma 0.2 / sigma 0.1 ('keeps it in a reasonable range')",
            strong, weak, at_least=0.8, at_most=1.25, paper="24.81 / 24.70"))
        others = {key: f"{n[1]} / {n[0]}" for key, n in FID.items() if key[0] != "CIFAR-10"}
        others |= {("ImageNet-64", 0.1): "83.8 / 97.6", ("ImageNet-64", 0.2): "80.3 / 129.4"}
        return claims + [untested(f"{name}, sigma {sigma:g}: FID, robust_adv / DDPM", numbers)
                         for (name, sigma), numbers in others.items()]
