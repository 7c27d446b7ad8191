"""The entry point: what it writes, that the batch size does not matter, and one-line errors."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from robustdm.data.noise import noise_of_run
from robustdm.method.baselines import Baseline, blur
from robustdm.method.sampling import sample
from robustdm.models.load_run import load_run
from robustdm.reporting.images import to_uint8
from robustdm.runs.checkpoint import save_checkpoint
from robustdm.runs.config import TrainConfig
from robustdm.sample import main


def make_run(directory, shape=(1, 8, 8), weights=None, **settings):
    """A run directory as training leaves it, with random weights."""
    from robustdm.models import build_model

    torch.manual_seed(0)
    config = TrainConfig(out=directory, ema_rates=(0.5, 0.99), **settings)
    model = build_model(config, shape)
    averages = {f"ema_{rate}": {k: v * scale if weights is None else v * weights
                                for k, v in model.state_dict().items()}
                for rate, scale in ((0.5, 1.0), (0.99, 0.9))}
    save_checkpoint(directory / "checkpoints", 3, averages,
                    {"shape": list(shape), "is_image": len(shape) == 3})
    (directory / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    return directory


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("digits"), block_channels=(8, 8), objective="ddpm")


def call(run, out, *flags):
    main(["--run", str(run), "--out", str(out), "--device", "cpu", *map(str, flags)])
    return np.load(out / "samples.npz")["samples"]


def test_images_are_written(digits_run, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    samples = call(digits_run, out, "--num", 5, "--steps", 3, "--sampler", "ddim", "--eta", 0.5,
                   "--spacing", "trailing", "--seed", 4)
    assert samples.shape == (5, 1, 8, 8) and samples.dtype == np.float32
    names = {path.name for path in out.iterdir()}
    assert names == {"samples.npz", "sample.json", "grid.png", *(f"0000{k}.png" for k in range(5))}
    for k in range(5):
        pixels = np.asarray(Image.open(out / f"0000{k}.png"))
        assert np.array_equal(pixels, to_uint8(samples)[k, ..., 0])

    run = load_run(digits_run)
    expected = sample(run.model, run.schedule, run.shape, num=5, steps=3, sampler="ddim", eta=0.5,
                      spacing="trailing", seed=4)
    # The network runs fused.
    np.testing.assert_allclose(samples, expected.numpy(), rtol=0, atol=1e-5 * np.abs(samples).max())
    # A digit's samples are not clipped: that would hide noise at the edge of the range.
    assert np.abs(samples).max() > 1
    record = json.loads((out / "sample.json").read_text())
    settings = {"num": 5, "steps": 3, "sampler": "ddim", "eta": 0.5, "spacing": "trailing",
                "seed": 4, "checkpoint": 3, "ema": 0.5, "clip": False, "shape": [1, 8, 8],
                "run": str(digits_run)}
    assert {key: record[key] for key in settings} == settings
    assert record["provenance"]["versions"]["torch"] and record["img_per_s"] > 0
    assert record["precision"] == "fp32" and record["compile"] is False and record["off"] == {}
    assert str(out) in capsys.readouterr().out


def test_samples_do_not_depend_on_the_batch_size(digits_run, tmp_path):
    a = call(digits_run, tmp_path / "a", "--num", 5, "--steps", 4)
    b = call(digits_run, tmp_path / "b", "--num", 3, "--steps", 4, "--batch-size", 2)
    scale = np.abs(a).max()
    assert np.abs(a[:3] - b).max() <= 1e-5 * scale


def test_precision(digits_run, tmp_path):
    flags = ("--num", 4, "--steps", 4)
    a = call(digits_run, tmp_path / "a", *flags)
    b = call(digits_run, tmp_path / "b", *flags, "--precision", "bf16")
    assert b.dtype == np.float32 and 0 < np.abs(a - b).max() < 0.05 * np.abs(a).max()
    assert json.loads((tmp_path / "b" / "sample.json").read_text())["precision"] == "bf16"


@pytest.mark.parametrize("reason", [None, "RuntimeError: no compiler"])
def test_compiling_says_what_became_of_it(digits_run, tmp_path, capsys, monkeypatch, reason):
    probed = []

    def compile_network(model, probe):
        probed.append(tuple(probe().shape))
        return reason

    monkeypatch.setattr("robustdm.models.inference.compile_network", compile_network)
    flags = ("--num", 5, "--steps", 2)
    plain = call(digits_run, tmp_path / "plain", *flags)
    capsys.readouterr()
    samples = call(digits_run, tmp_path / "out", *flags, "--batch-size", 3, "--compile")
    np.testing.assert_allclose(samples, plain, rtol=0, atol=1e-5 * np.abs(plain).max())
    out = capsys.readouterr().out
    assert "compiling the network ..." in out and probed == [(3, 1, 8, 8)]
    off = json.loads((tmp_path / "out" / "sample.json").read_text())["off"]
    if reason is None:
        assert "compiled in 0 s" in out and "warning" not in out and off == {}
    else:
        assert f"warning: --compile does not work here, running eagerly ({reason})" in out
        assert "compiled in" not in out and off == {"compile": reason}


def test_wrong_settings_are_found_before_compiling(digits_run, tmp_path, capsys, monkeypatch):
    def compile_network(model, probe):
        pytest.fail("compiled first")

    monkeypatch.setattr("robustdm.models.inference.compile_network", compile_network)
    assert_one_line(["--run", digits_run, "--out", tmp_path / "out", "--compile", "--steps", 2000],
                    2, "steps is 2000", capsys=capsys)


def test_other_average_and_variance(digits_run, tmp_path):
    flags = ("--num", 1, "--steps", 4)
    a = call(digits_run, tmp_path / "a", *flags)
    b = call(digits_run, tmp_path / "b", *flags, "--ema", 0.99)
    c = call(digits_run, tmp_path / "c", *flags, "--variance", "fixed_small")
    assert not np.array_equal(a, b) and not np.array_equal(a, c)


def test_baselines(digits_run, tmp_path):
    """What costs no training: the network queried otherwise, a chain that ends early, a blur."""
    common = ("--num", 3, "--steps", 40)
    plain = call(digits_run, tmp_path / "none", *common)
    run = load_run(digits_run)

    def expected(network, **settings):
        return sample(network, run.schedule, run.shape, num=3, steps=40, **settings).numpy()

    found = {name: call(digits_run, tmp_path / name, *common, "--baseline", name)
             for name in ("shrink", "known", "blur")}
    shrunk = Baseline("shrink", 0.3).network(run.model, run.schedule)
    scale = dict(rtol=0, atol=1e-4 * np.abs(plain).max())
    np.testing.assert_allclose(found["shrink"], expected(shrunk), **scale)
    rms = noise_of_run(digits_run)
    assert rms == pytest.approx(0.9**0.5 * 0.2, rel=0.08), "measured on the run's data"
    corrected = expected(run.model, **Baseline("known", rms).settings)
    np.testing.assert_allclose(found["known"], corrected, **scale)
    np.testing.assert_allclose(found["blur"], blur(torch.from_numpy(plain), 0.5).numpy(), **scale)
    record = json.loads((tmp_path / "blur/sample.json").read_text())
    assert record["baseline"] == "blur"
    less = call(digits_run, tmp_path / "less", *common, "--baseline", "known",
                "--baseline-strength", 0.05)
    assert not np.allclose(less, found["known"])


def test_the_noise_of_a_run(digits_run, tmp_path, capsys):
    """Measured by training and recorded; else measured now; else what the configuration says."""
    run = shutil.copytree(digits_run, tmp_path / "run")
    known = ["--run", run, "--out", tmp_path / "out", "--num", 1, "--steps", 4,
             "--baseline", "known"]
    assert_one_line([*known, "--baseline-strength", 0.5], 2,
                    "baseline_strength is 0.5: the data vary by no more than 0.1", capsys=capsys)
    (run / "noise.json").write_text('{"kind": "gaussian", "rms": 0.6}')
    assert noise_of_run(run) == 0.6
    (run / "noise.json").write_text('{"kind": "clean", "rms": 0.001}')
    assert_one_line(known, 2, "look clean", capsys=capsys)
    (run / "noise.json").write_text("damaged")
    config = yaml.safe_load((run / "config.yaml").read_text())
    gone = config | {"data": "images", "data_dir": str(tmp_path / "gone")}
    (run / "config.yaml").write_text(yaml.safe_dump(gone))
    assert noise_of_run(run) == pytest.approx(0.9**0.5 * 0.2)
    (run / "config.yaml").write_text(yaml.safe_dump(gone | {"corrupt_kind": "jpeg"}))
    assert_one_line(known, 2, "data_dir is", capsys=capsys)


def test_a_robust_run_gets_no_baseline_that_corrects(tmp_path, capsys):
    run = make_run(tmp_path / "run", block_channels=(8, 8), objective="robust_adv")
    assert_one_line(["--run", run, "--out", tmp_path / "out", "--baseline", "known"], 2,
                    "trained with robust_adv, which removes noise itself", capsys=capsys)


def test_runs_that_clip_are_clipped(tmp_path):
    run = make_run(tmp_path / "run", block_channels=(8, 8), clip_samples=True)
    assert np.abs(call(run, tmp_path / "out", "--num", 2, "--steps", 3)).max() <= 1


def test_points(tmp_path):
    run = make_run(tmp_path / "run", shape=(3,), network="mlp", data="plane", mlp_width=8)
    samples = call(run, tmp_path / "out", "--num", 5, "--steps", 3)
    assert samples.shape == (5, 3)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"samples.npz", "sample.json"}


def test_default_folder_and_overwriting(tmp_path):
    run = make_run(tmp_path / "run", block_channels=(8, 8))
    flags = ["--run", str(run), "--steps", "2", "--device", "cpu"]
    main([*flags, "--num", "3"])
    out = run / "generated"
    assert (out / "00002.png").is_file()
    result = guarded([*flags, "--num", "2"])
    assert result.returncode == 2 and "--overwrite" in result.stderr
    main([*flags, "--num", "2", "--overwrite"])
    assert (out / "00001.png").is_file() and not (out / "00002.png").exists()


def guarded(argv):
    return subprocess.run([sys.executable, "-m", "robustdm.sample", *map(str, argv)],
                          capture_output=True, text=True)


def assert_one_line(argv, code, *words, capsys):
    from robustdm.cli import guard

    with pytest.raises(SystemExit) as caught:
        guard(lambda: main(["--device", "cpu", *map(str, argv)]))
    error = capsys.readouterr().err
    assert caught.value.code == code, error
    assert error.count("\n") == 1 and all(word in error for word in words), error


def test_errors_are_one_line(digits_run, tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    assert_one_line(["--run", tmp_path / "none", *out], 2, "none", capsys=capsys)
    run = ("--run", digits_run)
    assert_one_line([*run, *out, "--num", 0], 2, "num is 0", capsys=capsys)
    assert_one_line([*run, *out, "--steps", 2000], 2, "steps is 2000", "1000", capsys=capsys)
    assert_one_line([*run, *out, "--ema", 0.7], 2, "0.7", "0.99", capsys=capsys)
    assert_one_line([*run, *out, "--device", "abacus"], 2, "abacus", capsys=capsys)
    assert_one_line([*run, *out, "--eta", 0.5], 2, "eta", "ddim", capsys=capsys)
    assert not (tmp_path / "out").exists()

    (tmp_path / "file").write_text("")
    assert_one_line([*run, "--out", tmp_path / "file"], 2, "file", capsys=capsys)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "00000.png").write_text("mine")
    assert_one_line([*run, "--out", tmp_path / "mine", "--overwrite"], 2, "mine", capsys=capsys)
    assert (tmp_path / "mine" / "00000.png").read_text() == "mine"


def test_a_diverged_run_is_reported_and_nothing_is_written(tmp_path, capsys):
    run = make_run(tmp_path / "run", block_channels=(8, 8), weights=float("nan"))
    assert_one_line(["--run", run, "--out", tmp_path / "out", "--num", 1, "--steps", 2], 1,
                    "not finite", "the checkpoint before", capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_running_out_of_memory_names_the_remedy(digits_run, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("robustdm.method.sampling.sample", fail)
    assert_one_line(["--run", digits_run, "--out", tmp_path / "out"], 1, "--batch-size 32",
                    capsys=capsys)


def test_a_full_disk_is_one_line(digits_run, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("robustdm.reporting.images.save_images", fail)
    assert_one_line(["--run", digits_run, "--out", tmp_path / "out", "--num", 1, "--steps", 1], 1,
                    "No space left", "--out", capsys=capsys)


def test_help_imports_no_torch():
    code = ("import sys\nsys.argv = ['sample', '--help']\n"
            "import robustdm.sample\n"
            "try: robustdm.sample.main()\nexcept SystemExit: pass\n"
            "assert 'torch' not in sys.modules and 'numpy' not in sys.modules")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and "--sampler" in result.stdout, result.stderr
