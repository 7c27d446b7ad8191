"""Attacks on the sampling trajectory: x is perturbed before some of the sampler's steps.

Every attack stays within the l-inf ball of the sampler's own noise, sigma = the standard deviation
that the ancestral step adds. Given to ``sampling.sample`` as ``attack=``, it sees what the sampler
sees: network, chain, state and the step's noise.

Source: Briglia et al. 2026, Algorithms 2, 3 and 4. Their printed formulas drop an index here and
there; what is computed is written out in each function below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robustdm.errors import UsageError
from robustdm.method.predict import predict_noise
from robustdm.method.sampling import Respaced, Variance
from robustdm.ops.stream import Stream, element_index, normal, philox, shuffled

Method = Literal["fgsm", "pgd", "eot", "random"]
Where = Literal["stride", "random", "first", "last"]
AttackObjective = Literal["mu", "eps"]
EotLoss = Literal["corrected", "printed"]


def attacked_steps(steps: int, share: float, where: Where = "stride", seed: int = 0) -> list[bool]:
    """Which steps of a sampler are attacked, the noisiest first.

    Args:
        steps: steps of the sampler.
        share: of them that are attacked, 0 to 1; rounded to whole steps.
        where: "stride" spreads them evenly, "random" draws them without repetition, "first" takes
            the noisiest, "last" the cleanest. The paper says only how many.
        seed: of "random".

    Raises:
        UsageError: for a share outside 0 to 1 or an unknown place.
    """
    if not 0 <= share <= 1:
        raise UsageError(f"steps_attacked is {share}: it is a share of the sampler's {steps} steps "
                         "and must be from 0 to 1; for 250 of 1000 steps give 0.25")
    count = round(share * steps)
    if where == "stride":
        return [(k + 1) * count // steps > k * count // steps for k in range(steps)]
    if where == "random":
        chosen = set(shuffled(seed, 0, steps)[:count].tolist())
    elif where == "first":
        chosen = range(count)
    elif where == "last":
        chosen = range(steps - count, steps)
    else:
        raise UsageError(f"where is {where!r}: choose one of {', '.join(Where.__args__)}")
    return [k in chosen for k in range(steps)]


@dataclass(frozen=True)
class TrajectoryAttack:
    """One attack, ready for ``sample(..., attack=...)``.

    With mu(x) the posterior mean of the step for the network's prediction at x, unclipped, and
    L(d) = ||mu(x) - mu(x + d)||^2:

    ``fgsm``
        d = sigma sign(grad L(d0)), d0 ~ N(0, (phi sigma)^2); d0 itself is dropped. 4 forward
        passes' worth of work instead of 1.
    ``pgd``
        from d0, ``iterations`` times d <- clamp(d + sigma / iterations sign(grad L(d)), +-sigma).
        42 passes for 20 iterations.
    ``eot``
        pgd on the mean gradient over ``draws`` noises z of ||x_prev - (mu(x + d) + sigma z)||^2,
        where x_prev is what the sampler's own noise gives. The noise is added behind the network,
        so the mean gradient is one backward pass from the mean of the cotangents: 42 passes, not
        202. As z does not depend on d, that is pgd's gradient with noise on it, and with a term
        from the sampler's own noise that is the same in every iteration: it drives d to undo that
        noise. ``eot_loss="printed"`` is Algorithm 4 as it stands, ||x - (mu(x + d) + sigma z)||^2:
        away from where the state is, not from where it would have gone.
    ``random``
        control: d = +-sigma with random signs, no gradient.

    Args:
        method: one of these.
        share, where, seed: see ``attacked_steps``; the seed is also that of the random numbers.
        variance: of the sampler: it decides sigma.
        size: factor of sigma in the ball's radius and the step size; 0 is no attack.
        phi: deviation of the random start over sigma. At 0 the gradient is exactly zero.
        objective: what L compares, "mu" or the network's prediction, "eps".
        iterations: steps of pgd and eot.
        draws: noises of eot.
        eot_loss: of eot, see above.
        shared: compute eot's mean gradient in one pass; otherwise one by one, for comparison.

    Raises:
        UsageError: for a value out of range.
    """

    method: Method
    share: float = 1.0
    where: Where = "stride"
    seed: int = 0
    variance: Variance = "fixed_large"
    size: float = 1.0
    phi: float = 1.0
    objective: AttackObjective = "mu"
    iterations: int = 20
    draws: int = 5
    eot_loss: EotLoss = "corrected"
    shared: bool = True

    def __post_init__(self):
        for name, choices in (("method", Method), ("objective", AttackObjective),
                              ("eot_loss", EotLoss)):
            if getattr(self, name) not in choices.__args__:
                raise UsageError(f"{name} is {getattr(self, name)!r}: choose one of "
                                 f"{', '.join(choices.__args__)}")
        attacked_steps(1, self.share, self.where)
        for name in ("iterations", "draws"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.method == "eot" and self.objective != "mu":
            raise UsageError(f"objective is {self.objective!r}: eot compares states, with noise on "
                             "them, and takes 'mu'")
        if not (math.isfinite(self.size) and self.size >= 0):
            raise UsageError(f"size is {self.size}: it must be a finite number, 0 or more")
        if not (math.isfinite(self.phi) and self.phi > 0):
            raise UsageError(f"phi is {self.phi}: it must be above 0, since the gradient vanishes "
                             "without a random start")

    def passes(self) -> int:
        """Work of an attacked step in forward passes; a plain step is 1."""
        if self.method == "eot" and not self.shared:
            return 2 + 2 * self.draws * self.iterations
        return {"random": 1, "fgsm": 4}.get(self.method, 2 + 2 * self.iterations)

    def __call__(
        self, model: Callable, chain: Respaced, k: int, samples: range, x: Tensor,
        noise: Tensor | None,
    ) -> Tensor:
        """The state to go on from: ``x`` where step k is not attacked.

        Args:
            model: what ``predict_noise`` takes; gradients flow to its input alone.
            chain: the sampler's.
            k: step of the chain.
            samples: numbers of the samples; they decide the random start.
            x: (B, ...) state.
            noise: (B, ...) what the sampler will add (times sigma), None if nothing.
        """
        if not attacked_steps(len(chain), self.share, self.where, self.seed)[k]:
            return x
        return x + self.perturbation(model, chain, k, samples, x, noise)

    def perturbation(
        self, model: Callable, chain: Respaced, k: int, samples: range, x: Tensor,
        noise: Tensor | None,
    ) -> Tensor:
        """The attack's d, shaped like x, in units of x."""
        sigma = self.size * chain.std[self.variance][k].item()
        timestep = chain.timesteps[k].item()
        index = element_index(samples.start, tuple(x.shape), x.device)
        words = philox(self.seed, timestep, index, Stream.ATTACK)
        if self.method == "random":
            return sigma * ((words[2] & 1) * 2 - 1).to(x.dtype)
        moved, clean = self._moved(model, chain, k, x)
        start = self.phi * sigma * normal(words[0], words[1], x.dtype)
        if self.method == "fgsm":
            return sigma * _gradient(lambda d: moved(d).square().sum(), start).sign()
        # What eot's loss compares with, from the clean output on.
        if self.method == "eot" and self.eot_loss == "printed":
            target = x - clean
        else:
            target = self._ancestral_noise(chain, k) * (0 if noise is None else noise)
        delta = start
        for n in range(self.iterations):
            if self.method == "pgd":
                gradient = _gradient(lambda d: moved(d).square().sum(), delta)
            else:
                offsets = [
                    self._ancestral_noise(chain, k) * normal(
                        *philox(self.seed, timestep, index, Stream.ATTACK + 256 * (
                            1 + n * self.draws + draw))[:2], x.dtype) - target
                    for draw in range(self.draws)
                ]
                gradient = self._mean_gradient(moved, delta, offsets)
            delta = (delta + sigma / self.iterations * gradient.sign()).clamp(-sigma, sigma)
        return delta

    def measure(
        self, model: Callable, chain: Respaced, k: int, x: Tensor, delta: Tensor
    ) -> Tensor:
        """L(delta) per sample: (B,) float64."""
        with torch.no_grad():
            moved, _ = self._moved(model, chain, k, x)
            return moved(delta).double().square().flatten(1).sum(1)

    def _moved(
        self, model: Callable, chain: Respaced, k: int, x: Tensor
    ) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """d -> how far the output moves when x does by d; and the output at x."""
        with torch.no_grad():
            clean = self._output(model, chain, k, x)
        return lambda delta: self._output(model, chain, k, x + delta) - clean, clean

    def _output(self, model: Callable, chain: Respaced, k: int, x: Tensor) -> Tensor:
        t = torch.full((len(x),), chain.timesteps[k].item(), device=x.device)
        eps = predict_noise(model, x, t).to(x.dtype)
        if self.objective == "eps":
            return eps
        return chain.posterior_mean(k, x, chain.predict_x0(k, x, eps))

    def _ancestral_noise(self, chain: Respaced, k: int) -> float:
        # The last step adds none, though sigma is not zero there.
        return 0.0 if k == len(chain) - 1 else chain.std[self.variance][k].item()

    def _mean_gradient(self, moved: Callable, delta: Tensor, offsets: list[Tensor]) -> Tensor:
        if not self.shared:
            return sum(_gradient(lambda d, z=z: (moved(d) + z).square().sum(), delta)
                       for z in offsets) / len(offsets)
        # The mean of ||m + z||^2 has the cotangent 2 (m + mean z).
        mean = sum(offsets) / len(offsets)
        return _gradient(lambda d: (moved(d) + mean).square().sum(), delta)


def _gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Gradient at a point, whatever the surrounding grad mode; none for the network's weights."""
    with torch.enable_grad():
        at = at.detach().requires_grad_()
        return torch.autograd.grad(function(at), at)[0]
