"""F7: one odd picture in a folder of good ones."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from robustdm.cli import parse_train
from robustdm.data import __main__ as data
from robustdm.data import images
from robustdm.training import outputs

from .campaign import Found, Trial
from .runs import call, train

SIDE, GOOD = 8, 6
_FLAGS = ("--preset folder --data-dir pictures --resolution 8 --block-channels 8 --norm-groups 4 "
          "--attention-resolutions --steps 3 --batch-size 8 --num-samples 2 --preview-steps 2 "
          "--final-steps 2 --sample-every 0 --holdout 0 --device cpu").split()


@dataclass
class Odd:
    """An odd file and what must become of it.

    Attributes:
        name: the file.
        content: what is in it.
        pixels: (SIDE, SIDE, 3) what training must see of it, None if it is broken.
        tolerance: largest difference in levels of 255.
    """

    name: str | bytes
    content: bytes
    pixels: np.ndarray | None = None
    tolerance: int = 0


# Kinds. What must become of the good ones is computed from the definition, without our reader.


def _noise(rng, *shape: int, top: int = 256) -> np.ndarray:
    return rng.integers(0, top, shape or (SIDE, SIDE, 3))


def _bytes(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None, **options) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels.astype(np.uint8 if pixels.max() < 256 else np.uint16), mode)
    image.save(file, kind, **options)
    return file.getvalue()


def _empty(rng) -> Odd:
    return Odd("odd.png", b"")


def _text(rng) -> Odd:
    return Odd("odd.jpg", b"<!DOCTYPE html><html><body>404 not found</body></html>")


def _cut(kind: str, suffix: str) -> Callable:
    def make(rng) -> Odd:
        content = _bytes(_noise(rng, 24, 24, 3), kind)
        return Odd(f"odd.{suffix}", content[: int(len(content) * rng.uniform(0.3, 0.9))])

    return make


def _wrong_suffix(rng) -> Odd:
    pixels = _noise(rng)
    return Odd(f"odd.{rng.choice(('jpg', 'gif', 'webp', 'ppm', 'tif'))}", _bytes(pixels), pixels)


def _cmyk(rng) -> Odd:
    """Four inks, constant over eight pixels, so that JPEG changes little."""
    inks = _noise(rng, 4, 4, 4)
    paper = 1 - inks / 255
    rgb = (255 * paper[..., :3] * paper[..., 3:]).round()
    content = _bytes(inks.repeat(8, 0).repeat(8, 1), "JPEG", "CMYK", quality=95)
    return Odd("odd.jpg", content, rgb.repeat(2, 0).repeat(2, 1), 10)


def _grey_16(rng) -> Odd:
    values = _noise(rng, SIDE, SIDE, top=65536)
    return Odd("odd.png", _bytes(values), _rgb(values / 257), 1)


def _palette(rng) -> Odd:
    """Sixteen colours, one of them transparent, which is laid on white."""
    colours, index = _noise(rng, 16, 3), _noise(rng, SIDE, SIDE, top=16)
    image = Image.fromarray(index.astype(np.uint8), "P")
    image.putpalette(colours.astype(np.uint8).tobytes())
    file = io.BytesIO()
    image.save(file, "PNG", transparency=3)
    colours[3] = 255
    return Odd("odd.png", file.getvalue(), colours[index])


def _with_alpha(channels: int) -> Callable:
    def make(rng) -> Odd:
        pixels = _noise(rng, SIDE, SIDE, channels + 1)
        alpha = pixels[..., -1:] / 255
        on_white = pixels[..., :-1] * alpha + 255 * (1 - alpha)
        return Odd("odd.png", _bytes(pixels), _rgb(on_white), 1)

    return make


_UPRIGHT = {
    2: lambda p: p[:, ::-1], 3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1), 6: lambda p: p[::-1].swapaxes(0, 1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1), 8: lambda p: p[:, ::-1].swapaxes(0, 1),
}


def _turned(rng) -> Odd:
    """A JPEG that EXIF says how to turn, one and a half times as wide as high or the reverse."""
    orientation = int(rng.integers(2, 9))
    exif = Image.Exif()
    exif[0x0112] = orientation
    height, width = rng.permutation((SIDE, SIDE + 4))
    content = _bytes(_noise(rng, height, width, 3), "JPEG", quality=95, exif=exif)
    stored = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    return Odd("odd.jpg", content, _area(_UPRIGHT[orientation](stored)))


def _animated(rng) -> Odd:
    kind, suffix = (("GIF", "gif"), ("WEBP", "webp"), ("PNG", "png"))[rng.integers(3)]
    colours = _noise(rng, 8, 3)
    frames = [colours[_noise(rng, SIDE, SIDE, top=8)] for _ in range(3)]
    more = [Image.fromarray(frame.astype(np.uint8)) for frame in frames[1:]]
    options = dict(save_all=True, append_images=more, duration=100)
    content = _bytes(frames[0], kind, **options, **({"lossless": True} if kind == "WEBP" else {}))
    return Odd(f"odd.{suffix}", content, frames[0])


def _dot(rng) -> Odd:
    pixels = _noise(rng, 1, 1, 3)
    return Odd("odd.png", _bytes(pixels), pixels.repeat(SIDE, 0).repeat(SIDE, 1))


def _odd_size(rng) -> Odd:
    pixels = _noise(rng, *rng.integers(SIDE, 40, 2), 3)
    return Odd("odd.png", _bytes(pixels), _area(pixels), 2)


def _nan(rng) -> Odd:
    values = rng.random((SIDE, SIDE), np.float32)
    values[rng.integers(SIDE), rng.integers(SIDE)] = rng.choice((np.nan, np.inf, -np.inf))
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF")
    return Odd("odd.tiff", file.getvalue())


def _foreign_name(rng) -> Odd:
    pixels = _noise(rng)
    return Odd(b"odd \xff\xe9\n.png", _bytes(pixels), pixels)


def _foreign_broken(rng) -> Odd:
    return Odd(b"odd \xff\xe9.png", _cut("PNG", "png")(rng).content)


def _plain(rng) -> Odd:
    pixels = _noise(rng)
    return Odd("odd.png", _bytes(pixels), pixels)


def _rgb(values: np.ndarray) -> np.ndarray:
    """Grey levels, (H, W) or (H, W, 1), or colours, as (H, W, 3) whole numbers."""
    values = values[..., None] if values.ndim == 2 else values
    return np.broadcast_to(values.round(), (*values.shape[:2], 3))


def _area(pixels: np.ndarray) -> np.ndarray:
    """The middle square, averaged over areas: a pixel belongs to the one its centre lies in."""
    side = min(pixels.shape[:2])
    places = []
    for length in pixels.shape[:2]:
        twice = 2 * np.arange(length) + 1 - (length - side)  # from the square's edge to the centre
        places.append(-(-twice * SIDE // (2 * side)) - 1)
    return np.array([[pixels[places[0] == row][:, places[1] == column].mean((0, 1)).round()
                      for column in range(SIDE)] for row in range(SIDE)])


KINDS = {
    "0 bytes": _empty,
    "truncated JPEG": _cut("JPEG", "jpg"),
    "truncated PNG": _cut("PNG", "png"),
    "truncated WebP": _cut("WEBP", "webp"),
    "wrong suffix": _wrong_suffix,
    "a web page by the name of a picture": _text,
    "CMYK": _cmyk,
    "16-bit grey": _grey_16,
    "palette with a transparent colour": _palette,
    "grey and alpha": _with_alpha(1),
    "RGB and alpha": _with_alpha(3),
    "EXIF-rotated": _turned,
    "animated": _animated,
    "1x1": _dot,
    "odd size": _odd_size,
    "float TIFF with a value that is no number": _nan,
    "name that is not UTF-8": _foreign_name,
    "broken, name that is not UTF-8": _foreign_broken,
    "vanishing file": _plain,
    "directory by the name of a picture": _plain,
}


def look(trial: Trial) -> Found:
    """F7: every kind, met by ``python -m robustdm.data`` and by a training run."""
    kind = list(KINDS)[trial.number % len(KINDS)]
    rng = np.random.default_rng(trial.random.randrange(2**32))
    odd = KINDS[kind](rng)
    folder = trial.folder / "pictures"
    folder.mkdir()
    good = [_noise(rng) for _ in range(GOOD)]
    for number, pixels in zip(rng.permutation(GOOD), good, strict=True):
        # Names before and after that of the odd one.
        (folder / f"{'az'[number % 2]}{number}.png").write_bytes(_bytes(pixels))
    file = folder / os.fsdecode(odd.name)
    if "directory" in kind:
        file.mkdir()
        (folder / "dangling.png").symlink_to("nowhere")
        odd.pixels = None
    else:
        file.write_bytes(odd.content)
    command = _by_data if trial.number < len(KINDS) else _by_training
    where, seen, passed = command(kind, odd, good, file, trial)
    broken = odd.pixels is None and "directory" not in kind or "vanishing" in kind
    expected = "the good ones used, " + (
        "the odd one left out by name" if broken else "the directory passed over"
        if "directory" in kind else "the odd one with the right pixels")
    return Found(kind, where, expected, seen, passed)


def _by_data(kind: str, odd: Odd, good: list, file: Path, trial: Trial) -> tuple[str, str, bool]:
    def work() -> None:
        if "vanishing" in kind:
            _vanish_after_scan(file)
        data.main(["pictures", "--resolution", str(SIDE), "--corrupt-fraction", "0",
                   "--preview", "preview.png"])

    done = call(work)
    where = "robustdm.data"
    if done.code or not done.clean:
        return where, f"exit code {done.code}: {done.last}", False
    sheet = np.asarray(Image.open("preview.png"))
    pairs = _pairs(sheet)
    agree = np.array_equal(pairs[:, 0], pairs[:, 1])
    broken = 0 if "directory" in kind or odd.pixels is not None and "vanishing" not in kind else 1
    listed = f"broken        {broken}\n" in done.output and (
        not broken or f"\n  {_shown(odd)}: " in done.output)
    odd = odd if not broken else Odd(odd.name, b"")
    right, worst = _compare(pairs[:, 0], good, odd, exact=True)
    seen = (f"{len(pairs)} pictures, {'as they should be' if right else f'off by {worst}'}, "
            f"{broken if listed else 'NOT as many or as named'} broken")
    return where, seen, right and agree and listed


def _by_training(
    kind: str, odd: Odd, good: list, file: Path, trial: Trial
) -> tuple[str, str, bool]:
    streamed = trial.random.random() < 0.5 or "vanishing" in kind
    workers = trial.random.choice(("0", "2"))
    flags = [*_FLAGS, "--workers", workers, *(["--resident-gib", "0"] if streamed else [])]

    def run(*more: str):
        def work() -> int:
            if "vanishing" in kind:
                _vanish_in_training(file)
            return train(parse_train([*flags, *more]))

        return call(work)

    out = trial.folder / "run"
    done = run("--max-bad", "0.5", "--out", str(out))
    where = f"training, {f'read by {workers} workers' if streamed else 'held in memory'}"
    if done.code or not done.clean:
        return where, f"exit code {done.code}: {done.last}", False
    with np.load(out / "samples" / "reference.npz") as reference:
        found = np.rint((reference["train"] + 1) * 127.5).transpose(0, 2, 3, 1)
    broken = odd.pixels is None and "directory" not in kind or "vanishing" in kind
    list_of_broken = out / "quarantine.txt"
    listed = list_of_broken.exists() == broken and (
        not broken or list_of_broken.read_text(encoding="utf-8").startswith(f"{_shown(odd)}\t"))
    # A file that turns out to be broken while it is streamed is replaced by its neighbour.
    right, worst = _compare(found, good, odd, exact=not (streamed and broken))
    seen = (f"{len(found)} pictures, {'as they should be' if right else f'off by {worst}'}, "
            f"quarantine.txt {'right' if listed else 'NOT right'}")
    if not broken:
        return where, seen, right and listed
    if "vanishing" in kind:
        file.write_bytes(odd.content)
    refused = run("--out", str(trial.folder / "second"))
    named = refused.code == 1 and refused.clean and f"{_shown(odd)} (" in refused.last and (
        "--max-bad 0.01" in refused.last)
    seen += f"; without --max-bad {'exit code 1, named' if named else refused.last}"
    return where, seen, right and listed and named


def _shown(odd: Odd) -> str:
    """The name as any terminal can show it."""
    return odd.name if isinstance(odd.name, str) else odd.name.decode("utf-8", "backslashreplace")


def _vanish_after_scan(file: Path) -> None:
    scan = images.scan

    def scan_and_lose(*arguments, **options):
        found = scan(*arguments, **options)
        file.unlink()
        return found

    images.scan = scan_and_lose


def _vanish_in_training(file: Path) -> None:
    write_reference = outputs.Outputs.write_reference

    def write_and_lose(session):
        write_reference(session)
        file.unlink()

    outputs.Outputs.write_reference = write_and_lose


def _pairs(sheet: np.ndarray) -> np.ndarray:
    """The pictures of a preview, each with what training sees of it: (N, 2, SIDE, SIDE, 3).

    Eight are in a row, enlarged to 64 pixels, with gaps of 2; what is left of the last row is
    white.
    """
    cells = np.stack([
        sheet[top : top + 64 : 64 // SIDE, left : left + 64 : 64 // SIDE]
        for top in range(0, len(sheet), 66) for left in range(0, sheet.shape[1], 66)
    ]).astype(int)
    pairs = cells.reshape(-1, 2, SIDE, SIDE, 3)
    return pairs[(pairs != 255).any((1, 2, 3, 4))]


def _compare(found: np.ndarray, good: list, odd: Odd, exact: bool) -> tuple[bool, int]:
    """Whether the pictures found are those that should be, and by how much one is off.

    With ``exact`` each is there once, else at least once.
    """
    wanted = [(pixels, 0) for pixels in good]
    if odd.pixels is not None:
        wanted.append((odd.pixels, odd.tolerance))
    off = np.array([[np.abs(one - pixels).max() for pixels, _ in wanted] for one in found])
    fits = off <= [tolerance for _, tolerance in wanted]
    complete = fits.any(0).all() and fits.any(1).all()
    return bool(complete and (not exact or len(found) == len(wanted))), int(off.min(1).max())
