"""What the studies of denoising share: every table has the baselines that cost no training beside
the paper's models, and the spread beside the distance, since distances alone reward shrinkage.

Source: Briglia et al. 2026, sections 3.1 and 3.3, appendices F.1 and F.3.
"""

from robustdm.studies.claims import Claim, Ratio, Results
from robustdm.studies.runner import EQUAL_WORK, KNOWN
from robustdm.studies.scales import BLURRED, SHRUNK
from robustdm.studies.study import Study
from robustdm.studies.tradeoff import EqualSignal

SIGMAS = (0.1, 0.2)
READ = (
    "The noise column is what samples carry where clean data have none (of images: the white noise "
    "beyond what the texture of clean images is taken for; negative where samples are smoother). "
    "Signal is their standard deviation over the truth's, 1 is right (of images: along the leading "
    "principal axes of clean ones, noise taken off). Recall, the share of clean data that "
    "lies among the samples, rises with noise and falls with shrinkage; coverage, the share that "
    "has a sample near, falls with both. A method that shrinks everything improves noise and "
    "distance, so read them together.",
    "A verdict rests on the interval of 95 % over the seeds: undecided means that it contains the "
    "limit. Clean data, drawn anew (of images: those held out), show what a distance is at best "
    "with so few samples; training data, what a model ends at that learns everything.",
    "DDPM, shrunk is the strongest baseline without training: the plain DDPM's network, queried as "
    "if the noise had the variance that robust training with this lam makes it assume. DDPM, "
    "noise known ends the chain at the noise of the data, whose strength it is told, and predicts "
    "clean data there. DDPM, equal work is trained for 8/3 of the steps. Equal signal: the shrunk "
    "DDPM is interpolated between its strengths to keep the signal of the arm it stands beside.",
)


class Denoising(Study):
    """A study of what is left of the noise and of the signal."""

    references = True
    contrast = 1.0
    notes = READ

    def against_baselines(self, of: Results, group: str) -> list[Claim]:
        """robust_adv against what a plain DDPM can do without training, which the paper leaves
        out."""
        image = [BLURRED] if self.scale.is_image else []
        known = [KNOWN] if of(group, KNOWN, "frechet") else []  # older records have none
        pairs = [(name, words, measure)
                 for name in (*SHRUNK.values(), *known, *image, EQUAL_WORK)
                 for words, measure in (("distance", "frechet"), ("noise left", "noise"))
                 if measure == "frechet" or name not in SHRUNK.values()]
        return [comparison.claim(of) for comparison in (
            *(Ratio(f"{group}, not in the paper: {words}, {{}} / {{}}", group, "robust_adv", name,
                    measure) for name, words, measure in pairs),
            EqualSignal(group, "robust_adv"))]
