"""The inception score."""

import torch
from torch import Tensor

from robustdm.metrics.kernel import Estimate


def inception_score(logits: Tensor, splits: int = 10) -> Estimate:
    """``exp(E_x KL(p(y | x) || p(y)))``: 1 at worst, the number of classes at best.

    Called IS only where the classifier is Inception. It says nothing about how close samples are to
    a data set, and little where the classes are not the data's.

    Args:
        logits: (N, classes) of the samples.
        splits: parts, each scored by itself, as usual.

    Returns:
        The mean over the parts, and their standard deviation (divisor ``splits``), as usual.

    Raises:
        ValueError: for fewer samples than parts.

    Source: Salimans et al. 2016, section 4.
    """
    if not 1 <= splits <= len(logits):
        raise ValueError(f"splits is {splits}: there are {len(logits)} samples")
    log_p = logits.double().log_softmax(1)
    scores = []
    for part in range(splits):
        low, high = part * len(log_p) // splits, (part + 1) * len(log_p) // splits
        mine = log_p[low:high]
        marginal = mine.exp().mean(0).log()
        scores.append((mine.exp() * (mine - marginal)).nan_to_num(0).sum(1).mean().exp())
    scores = torch.stack(scores)
    return Estimate(scores.mean().item(), scores.std(correction=0).item())
