"""Feature extractors: images in, features (and class logits, where there are any) out.

``load_extractor("resnet56", weights=path)`` and so on. Each has a name and a digest of its weights,
which every result carries: numbers in different feature spaces never compare, and only a Frechet
distance in Inception's is called FID.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustdm.errors import RunError, UsageError
from robustdm.untrusted import load_pickle

ExtractorName = Literal["auto", "pixels", "digits", "resnet20", "resnet56", "inception", "dinov2"]
_DIGITS_EPOCHS = 15


class Features(NamedTuple):
    """What an extractor makes of a batch: (B, D) features, and (B, classes) logits or None."""

    features: Tensor
    logits: Tensor | None


class Extractor:
    """A frozen network, or none, between images and features.

    Args:
        name: of the feature space.
        network: maps (B, C, H, W) in [-1, 1] to ``Features``.
        digest: hash of what decides the features.
        channels, resolution: what the images must have; None takes any.
        quantise: round and clip images to 8 bits first, as if they had been saved as files.
        device: where to compute.
    """

    def __init__(
        self, name: str, network, digest: str, *, channels: int | None = None,
        resolution: int | None = None, quantise: bool = True,
        device: torch.device | str = "cpu",
    ):
        self.name, self.digest = name, digest
        self.channels, self.resolution, self.quantise = channels, resolution, quantise
        self.device = torch.device(device)
        self._network = network
        if isinstance(network, nn.Module):
            self._network = network.eval().requires_grad_(False).to(self.device)

    @property
    def identity(self) -> dict:
        """Name, digest and quantisation, for records and caches."""
        return {"name": self.name, "digest": self.digest, "quantise": self.quantise}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Features of images (B, C, H, W) in [-1, 1], or of points (B, D) for "pixels".

        Raises:
            UsageError: for images of another shape, or with NaN or infinity.
        """
        shape = tuple(images.shape[1:])
        fits = images.ndim == 4 or self.name == "pixels"
        fits = fits and (self.channels is None or shape[0] == self.channels)
        if not fits or (self.resolution is not None and shape[1:] != 2 * (self.resolution,)):
            side = self.resolution or "any size"
            raise UsageError(f"samples have shape {shape}: {self.name} takes images of "
                             f"{self.channels or 'any number of'} channels and {side}; choose "
                             "another --features")
        if not bool(torch.isfinite(images).all()):
            raise UsageError("the images hold NaN or infinity: remove those, or sample from an "
                             "earlier checkpoint")
        images = images.to(self.device).float()
        if self.quantise and images.ndim == 4:
            images = ((images + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
        return self._network(images)


def load_extractor(
    name: ExtractorName, shape: tuple[int, ...], weights: Path | None = None,
    device: torch.device | str = "cpu", quantise: bool | None = None,
) -> Extractor:
    """An extractor by name.

    Args:
        name: "pixels" is no network: the elements themselves; "digits" a small classifier of
            scikit-learn's digits, trained in seconds and kept; "resnet20", "resnet56" CIFAR-10
            classifiers (github.com/akamaster/pytorch_resnet_cifar10) by ``weights``; "inception"
            torch-fidelity's, the one FID is defined by (extra ``eval``); "dinov2" ViT-B/14 through
            transformers. "auto" is "digits" for 8x8 grey images, else "pixels".
        shape: of one sample.
        weights: file of weights, where the extractor has none of its own.
        device: where to compute.
        quantise: see `Extractor`; by default all but pixels and digits do, since clipping hides
            noise at the edge of the range.

    Raises:
        UsageError: for an unknown name, or weights that are missing or do not fit.
        RunError: if an optional package is missing, or its weights are out of reach.
    """
    if name == "auto":
        name = "digits" if tuple(shape) == (1, 8, 8) else "pixels"
    if name not in ExtractorName.__args__:
        raise UsageError(f"features is {name!r}: choose one of {', '.join(ExtractorName.__args__)}")
    if weights is not None and not Path(weights).is_file():
        raise UsageError(f"weights is {str(weights)!r}: there is no such file")
    common = dict(device=device, quantise=name not in ("pixels", "digits")
                  if quantise is None else quantise)
    if name == "pixels":
        return Extractor(name, lambda x: Features(x.flatten(1), None), "none", **common)
    if name == "digits":
        network = digits_classifier()
        return Extractor(name, network, _digest(network.state_dict()), channels=1, resolution=8,
                         **common)
    if name in ("resnet20", "resnet56"):
        network = CifarResNet(3 if name == "resnet20" else 9)
        _load_resnet(network, name, weights)
        return Extractor(name, network, _digest(network.state_dict()), channels=3, resolution=32,
                         **common)
    network = _inception(weights) if name == "inception" else _dinov2(weights)
    return Extractor(name, network, _digest(network.state_dict()), channels=3, **common)


def _digest(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class DigitsClassifier(nn.Module):
    """Two convolutions and 64 features: 95 % right on 397 digits left out of training."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48 * 16, 64), nn.ReLU(),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Features:
        """(B, 1, 8, 8) to 64 features and 10 logits."""
        h = self.body(x)
        return Features(h, self.head(h))


def train_digits_classifier(images: Tensor, labels: Tensor, seed: int = 0) -> DigitsClassifier:
    """Train the classifier of the "digits" features; the caller's random state is untouched.

    Args:
        images: (N, 1, 8, 8) in [-1, 1].
        labels: (N,) int64.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DigitsClassifier()
        optimizer = torch.optim.Adam(network.parameters(), 2e-3)
        for _ in range(_DIGITS_EPOCHS):
            for batch in torch.randperm(len(images)).split(64):
                loss = F.cross_entropy(network(images[batch]).logits, labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return network.eval()


def cache_directory() -> Path:
    """Where extractors are kept: $ROBUSTDM_CACHE, or robustdm in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    return Path(os.environ.get("ROBUSTDM_CACHE", Path(base) / "robustdm"))


def digits_classifier() -> DigitsClassifier:
    """The trained classifier, from the cache or trained now (seconds)."""
    from safetensors.torch import load_file, save_file
    from sklearn import datasets

    from robustdm.data.digits import load_digits

    path = cache_directory() / f"digits-{_DIGITS_EPOCHS}.safetensors"
    network = DigitsClassifier()
    try:
        network.load_state_dict(load_file(path))
        return network
    except Exception:  # missing or damaged in any of a dozen ways: make it again
        pass
    labels = torch.from_numpy(datasets.load_digits().target).long()
    network = train_digits_classifier(load_digits(), labels)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            save_file(network.state_dict(), made)
            os.replace(made, path)
    except OSError:
        pass  # a cache that cannot be written only costs the seconds again
    return network


class CifarResNet(nn.Module):
    """ResNet-(6n + 2) for CIFAR-10 with parameter-free shortcuts; 64 pooled features.

    Takes (B, 3, 32, 32) in [-1, 1]; normalises as its weights expect it.

    Source: He et al. 2016, section 4.2, option A.
    """

    def __init__(self, blocks: int):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1),
                             persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1),
                             persistent=False)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        for level in (1, 2, 3):
            layers = [
                _BasicBlock(widths[level - 1] if k == 0 else widths[level], widths[level],
                            2 if k == 0 and level > 1 else 1) for k in range(blocks)
            ]
            setattr(self, f"layer{level}", nn.Sequential(*layers))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Features:
        h = F.relu(self.bn1(self.conv1(((x + 1) / 2 - self.mean) / self.std)))
        h = self.layer3(self.layer2(self.layer1(h))).mean((2, 3))
        return Features(h, self.linear(h))


class _BasicBlock(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.stride, self.extra = stride, (outside - inside) // 2

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(h + x)


def _load_resnet(network: nn.Module, name: str, weights: Path | None) -> None:
    if weights is None:
        raise UsageError(f"weights is not given: {name} needs its file, from "
                         "github.com/akamaster/pytorch_resnet_cifar10")
    state = _tensors(weights, name)
    try:
        network.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
    except RuntimeError as error:
        raise _no_weights(weights, name, error) from None


def _tensors(weights: Path, name: str) -> dict[str, Tensor]:
    """The state dict in a file of `torch.save`."""
    try:
        loaded = load_pickle(Path(weights).read_bytes())
        state = loaded.get("state_dict", loaded)
        if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
            raise ValueError("it holds something else than tensors")
    except Exception as error:  # pickle and zip errors alike
        raise _no_weights(weights, name, error) from None
    return state


def _no_weights(weights: Path, name: str, error: Exception) -> UsageError:
    text = " ".join(str(error).split())[:160]
    return UsageError(f"weights is {str(weights)!r}: no weights of {name} ({text})")


class _Inception(nn.Module):
    def __init__(self, weights: str | None):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"],
            feature_extractor_weights_path=weights)

    def forward(self, x: Tensor) -> Features:
        features, logits = self.network(
            ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
        return Features(features, logits)


def _inception(weights: Path | None) -> nn.Module:
    try:
        if weights is None:
            return _Inception(None)
        with tempfile.TemporaryDirectory() as folder:
            # torch-fidelity would run code of the file: it gets a copy that holds tensors alone.
            copied = os.path.join(folder, "weights.pth")
            torch.save(_tensors(weights, "inception"), copied)
            return _Inception(copied)
    except UsageError:
        raise
    except ImportError as error:
        raise RunError("features inception needs torch-fidelity, which is not installed "
                       f"({error}): pip install -e \".[eval]\"") from None
    except Exception as error:
        text = " ".join(str(error).split())[:160]
        raise RunError(f"the weights of inception cannot be had ({text}): download "
                       "weights-inception-2015-12-05-6726825d.pth from torch-fidelity's releases "
                       "and name it as --weights") from None


class _Dinov2(nn.Module):
    def __init__(self, weights: Path | None):
        super().__init__()
        from transformers import AutoModel

        self.network = AutoModel.from_pretrained(
            "facebook/dinov2-base" if weights is None else str(Path(weights).parent),
            use_safetensors=True, trust_remote_code=False)
        for name, values in (("mean", [0.485, 0.456, 0.406]), ("std", [0.229, 0.224, 0.225])):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Features:
        x = F.interpolate(x, size=(224, 224), mode="bicubic", align_corners=False, antialias=True)
        x = (((x + 1) / 2).clamp(0, 1) - self.mean) / self.std
        return Features(self.network(x).last_hidden_state[:, 0], None)


def _dinov2(weights: Path | None) -> nn.Module:
    try:
        return _Dinov2(weights)
    except ImportError as error:
        raise RunError("features dinov2 needs transformers, which is not installed "
                       f"({error}): pip install transformers") from None
    except Exception as error:
        text = " ".join(str(error).split())[:160]
        raise RunError(f"the weights of dinov2 cannot be had ({text}): download "
                       "facebook/dinov2-base and name its model.safetensors as --weights") from None
