"""Evaluation, attacks and memorisation as commands: on random networks, folders and arrays."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

from robustdm import RunError, UsageError, attack, evaluate, memorise, steps
from robustdm.data.digits import load_digits
from robustdm.evaluation import features, measure
from robustdm.method.baselines import blur
from robustdm.metrics import FeatureStatistics, frechet_distance
from robustdm.reporting.images import save_images
from tests.test_sample import make_run


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROBUSTDM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("digits"), block_channels=(8, 8), objective="ddpm")


@pytest.fixture(scope="module")
def plane_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("plane"), shape=(3,), data="plane", preset="plane",
                    network="mlp", num_points=300)


@pytest.fixture(scope="module")
def digits_npz(tmp_path_factory):
    """The digits, as unclipped samples: one half, and the other with noise."""
    folder = tmp_path_factory.mktemp("arrays")
    x = load_digits()
    noise = 0.3 * torch.randn(x[::2].shape, generator=torch.Generator().manual_seed(0))
    for name, samples in (("clean", x[1::2]), ("noisy", x[::2] + noise)):
        np.savez(folder / f"{name}.npz", samples=samples.numpy())
    return folder


def run(module, out, *flags):
    module.main([*map(str, flags), "--out", str(out)])
    name = {evaluate: "evaluation", attack: "attack", memorise: "memorise",
            steps: "steps"}[module]
    return json.loads((out / f"{name}.json").read_text())


def test_a_run_is_evaluated_against_its_clean_data(digits_run, tmp_path, capsys):
    flags = ("--run", digits_run, "--num", 80, "--steps", 3, "--sampler", "ddim")
    record = run(evaluate, tmp_path / "out", *flags)
    results = record["results"]
    assert set(results) == {"frechet", "kernel", "precision", "recall", "density", "coverage",
                            "sliced_wasserstein", "deviation", "inception_score"}
    assert results["frechet"]["value"] > 10 and results["kernel"]["error"] > 0
    assert record["features"]["name"] == "digits" and len(record["features"]["digest"]) == 64
    assert all(r["samples"] == 80 for r in results.values())
    assert {"samples", "training data", "clean data"} == set(record["measures"])
    printed = capsys.readouterr().out
    # Only Inception's distance is called FID.
    assert "frechet" in printed and "FID" not in printed
    page = (tmp_path / "out/evaluation.html").read_text()
    assert page.count("<img") == 4 and "Nearest clean images" in page
    # The batch size changes nothing.
    again = run(evaluate, tmp_path / "again", *flags, "--batch-size", 7)
    assert again["results"]["frechet"]["value"] == pytest.approx(
        results["frechet"]["value"], rel=1e-3)


def test_samples_that_are_there(digits_npz, tmp_path):
    record = run(evaluate, tmp_path / "noisy", "--samples", digits_npz / "noisy.npz",
                 "--reference", digits_npz / "clean.npz", "--save-reference", tmp_path / "ref.npz")
    noisy = record["results"]
    folder = tmp_path / "pictures"
    folder.mkdir()
    save_images(folder, load_digits()[::2])
    # The statistics saved before serve as the reference, for what needs no more.
    clean = run(evaluate, tmp_path / "clean", "--samples", folder, "--reference",
                tmp_path / "ref.npz")["results"]
    assert set(clean) == {"frechet", "inception_score", "deviation"}
    with pytest.raises(UsageError, match="64 features and the samples 16: .*another extractor"):
        measure.measure(features.Features(torch.zeros(20, 16), None),
                           FeatureStatistics.load(tmp_path / "ref.npz"), ("deviation",))
    assert clean["frechet"]["value"] < 0.4 * noisy["frechet"]["value"]
    assert clean["frechet"]["parts"] == 5
    assert clean["frechet"]["part_mean"] > clean["frechet"]["value"]
    network = features.load_extractor("digits", (1, 8, 8))
    half = load_digits()[::2]
    half = ((half + 1) * 127.5).round() / 127.5 - 1
    wanted = frechet_distance(network(half).features,
                              FeatureStatistics.load(tmp_path / "ref.npz"))
    assert clean["frechet"]["value"] == pytest.approx(wanted, rel=1e-4)
    identical = run(evaluate, tmp_path / "same", "--samples", digits_npz / "clean.npz",
                    "--reference", digits_npz / "clean.npz")["results"]
    assert identical["frechet"]["value"] < 1e-6
    assert identical["precision"]["value"] == identical["coverage"]["value"] == 1


def test_the_batch_size_is_that_of_features_too(digits_npz, tmp_path, monkeypatch):
    """Of the samples that are there and of the reference: an extractor may fill a GPU."""
    extractor_call, sizes, results = features.Extractor.__call__, [], []
    monkeypatch.setattr(features.Extractor, "__call__", lambda self, images: (
        sizes.append(len(images)), extractor_call(self, images))[1])
    for flags in ([], ["--batch-size", 16]):
        monkeypatch.setenv("ROBUSTDM_CACHE", str(tmp_path / f"cache{len(flags)}"))
        results.append(run(evaluate, tmp_path / "out", "--samples", digits_npz / "noisy.npz",
                           "--reference", digits_npz / "clean.npz", "--features", "pixels",
                           *flags)["results"])
    assert sizes == [*3 * [256], 130, *3 * [256], 131, *56 * [16], 2, *56 * [16], 3]
    assert results[0] == results[1]
    bad(evaluate, "batch_size is 0: it must be at least 1", "--samples", digits_npz / "noisy.npz",
        "--reference", digits_npz / "clean.npz", "--batch-size", 0)


def test_baselines_change_the_samples_of_a_run(digits_run, tmp_path):
    def recall(*args):
        evaluate.main(["--run", str(digits_run), "--num", "40", "--steps", "4", "--features",
                       "pixels", "--metrics", "deviation", "--out", str(tmp_path), *args])
        record = json.loads((tmp_path / "evaluation.json").read_text())
        return record["results"]["deviation"]["value"], record["name"]

    plain, _ = recall()
    found = {name: recall("--baseline", name) for name in ("shrink", "known", "blur")}
    assert all(value != plain and label.endswith(name) for name, (value, label) in found.items())
    assert found["blur"][0] < plain
    assert recall("--baseline", "blur", "--baseline-strength", "1")[0] < found["blur"][0]


def test_running_out_of_memory_names_the_remedy(digits_run, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measure, "sample", fail)
    with pytest.raises(RunError, match="out of memory at batch_size 80: try --batch-size 40"):
        run(evaluate, tmp_path / "out", "--run", digits_run, "--num", 80)


def test_points_are_evaluated(plane_run, tmp_path):
    record = run(evaluate, tmp_path / "out", "--run", plane_run, "--num", 40, "--steps", 3)
    assert record["features"]["name"] == "pixels" and "distance" in record["measures"]["samples"]
    assert record["config"]["batch_size"] == 2048, "what was used, where nothing was said"


def test_a_pipeline_is_evaluated(digits_run, digits_npz, tmp_path):
    from robustdm.models.load_run import load_run
    from robustdm.models.pipeline import save_pipeline

    loaded = load_run(digits_run)
    save_pipeline(loaded.model, loaded.schedule, tmp_path / "pipe", clip_sample=False)
    flags = ("--num", 70, "--steps", 3, "--reference", digits_npz / "clean.npz")
    ours = run(evaluate, tmp_path / "a", "--run", digits_run, *flags)["results"]
    theirs = run(evaluate, tmp_path / "b", "--pipeline", tmp_path / "pipe", *flags)["results"]
    assert theirs["frechet"]["value"] == pytest.approx(ours["frechet"]["value"], rel=1e-3)


def test_samples_beyond_those_kept_take_no_memory():
    extractor = features.load_extractor("digits", (1, 8, 8))
    made = [torch.rand(6, 1, 8, 8) for _ in range(3)]
    found, kept = measure.extract(extractor, iter(made), keep=8)
    whole, every = measure.extract(extractor, iter(made))
    assert torch.equal(kept, every[:8]) and torch.equal(every, torch.cat(made))
    assert torch.equal(found.features, whole.features) and len(whole.features) == 18
    assert kept.untyped_storage().nbytes() == 8 * 64 * 4
    # Images of 256 x 256: a thousand and some, not fifty thousand.
    assert measure.affordable((3, 256, 256)) == 1365 and measure.affordable((3,)) > 1e7


def test_kept_features_are_only_found_by_the_same_images_and_extractor(tmp_path):
    x = load_digits()[:30]
    plain = features.load_extractor("digits", (1, 8, 8))
    calls = []

    class Counted:
        identity, name = plain.identity, plain.name

        def __call__(self, images):
            calls.append(len(images))
            return plain(images)

    extractor = Counted()
    first = measure.features_of(extractor, x, tmp_path)
    again = measure.features_of(extractor, x, tmp_path)
    assert sum(calls) == 30 and torch.equal(first.features, again.features)
    assert torch.equal(first.logits, again.logits)
    measure.features_of(extractor, x + 1e-3, tmp_path)
    assert sum(calls) == 60
    extractor.identity = plain.identity | {"quantise": True}
    measure.features_of(extractor, x, tmp_path)
    assert sum(calls) == 90
    for path in tmp_path.iterdir():
        path.write_bytes(b"damaged")
    assert torch.equal(measure.features_of(extractor, x, tmp_path).features, first.features)


def test_extractors(tmp_path):
    x = load_digits()
    digits = features.load_extractor("auto", (1, 8, 8))
    again = features.load_extractor("digits", (1, 8, 8))
    assert digits.digest == again.digest and digits(x[:5]).features.shape == (5, 64)
    from sklearn import datasets

    labels = torch.from_numpy(datasets.load_digits().target)
    assert (digits(x).logits.argmax(1) == labels).double().mean() > 0.98
    pixels = features.load_extractor("pixels", (3,))
    assert torch.equal(pixels(torch.ones(2, 3)).features, torch.ones(2, 3))
    rounded = features.load_extractor("pixels", (1, 2, 2), quantise=True)
    made = rounded(torch.tensor([-2.0, 0.001, 0.5, 3]).view(1, 1, 2, 2)).features[0]
    assert made == pytest.approx([-1, 128 / 127.5 - 1, 191 / 127.5 - 1, 1], abs=1e-6)


class Trap:
    """Unpickled, it would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_cifar_resnet_takes_its_published_weights(tmp_path):
    network = features.CifarResNet(3)
    assert sum(p.numel() for p in network.parameters()) == 269_722  # as published
    state = {f"module.{k}": v for k, v in network.state_dict().items()}
    torch.save({"state_dict": state, "best_prec1": 91.7}, tmp_path / "r20.th")
    made = features.load_extractor("resnet20", (3, 32, 32), tmp_path / "r20.th")
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    assert made(x).features.shape == (2, 64) and made(x).logits.shape == (2, 10)
    torch.save({"state_dict": Trap(tmp_path / "trap")}, tmp_path / "evil.th")
    with pytest.raises(UsageError, match="no weights of resnet20"):
        features.load_extractor("resnet20", (3, 32, 32), tmp_path / "evil.th")
    assert not (tmp_path / "trap").exists()
    with pytest.raises(UsageError, match="no weights of resnet56"):
        features.load_extractor("resnet56", (3, 32, 32), tmp_path / "r20.th")
    with pytest.raises(UsageError, match="weights is not given"):
        features.load_extractor("resnet56", (3, 32, 32))


def test_two_runs_are_attacked_side_by_side(digits_run, plane_run, tmp_path, capsys):
    record = run(attack, tmp_path / "out", digits_run, "--num", 70, "--steps", 3, "--methods",
                 "random", "fgsm", "--steps-attacked", 0.5, 1.0)
    cells = {(e["method"], e["share"]): e for e in record["entries"]}
    assert set(cells) == {(None, 0.0), ("random", 0.5), ("random", 1.0), ("fgsm", 0.5),
                          ("fgsm", 1.0)}
    assert [cells[c]["steps attacked"] for c in cells] == [0, 2, 3, 2, 3]
    values = {c: e["results"]["frechet"]["value"] for c, e in cells.items()}
    assert len(set(values.values())) == 5
    assert record["objective_raised"][digits_run.name]["fgsm"]["checked"] == 2
    page = (tmp_path / "out/attack.html").read_text()
    assert page.count("<img") == 6
    both = run(attack, tmp_path / "shrunk", digits_run, "--num", 70, "--steps", 3, "--methods",
               "fgsm", "--steps-attacked", 1.0, "--shrink", 0.3)
    kinds = {(e["run"].rsplit("/")[-1], e["what"]): e["results"]["frechet"]["value"]
             for e in both["entries"]}
    assert len(kinds) == 4 and len(set(kinds.values())) == 4
    assert sum("shrunk 0.3" in run for run, _ in kinds) == 2
    assert all(c["fgsm"]["checked"] for c in both["objective_raised"].values())
    with pytest.raises(UsageError, match="baseline_strength is -1"):
        run(attack, tmp_path / "bad", digits_run, "--shrink", "-1")
    run(attack, tmp_path / "both", plane_run, digits_run, "--num", 70, "--steps", 2, "--methods",
        "eot", "--iterations", 2, "--steps-attacked", 1.0)
    assert f"{plane_run.name}, eot 100%" in capsys.readouterr().out
    still = run(attack, tmp_path / "none", digits_run, "--num", 70, "--steps", 3, "--size", 0.0,
                "--methods", "fgsm", "--steps-attacked", 1.0)["entries"]
    assert still[0]["results"] == still[1]["results"]


def test_fewer_steps(digits_run, plane_run, tmp_path, capsys):
    record = run(steps, tmp_path / "out", digits_run, "--num", 70, "--steps", 4, 2, "--samplers",
                 "ddpm", "ddim", "--spacings", "linspace", "truncate")
    ways = [(e["sampler"], e["spacing"], e["steps"]) for e in record["entries"]]
    assert len(set(ways)) == 8 and ways[:2] == [("ddpm", "linspace", 2), ("ddpm", "linspace", 4)]
    assert len({e["results"]["frechet"]["value"] for e in record["entries"]}) == 8
    assert (tmp_path / "out/steps.png").exists()
    run(steps, tmp_path / "both", plane_run, digits_run, "--num", 70, "--steps", 2)
    assert f"[4/4] {digits_run.name}, ddim 2" in capsys.readouterr().out


def test_memorised_images_are_found(digits_run, digits_npz, tmp_path):
    x = load_digits()
    np.savez(tmp_path / "train.npz", samples=x[:600].numpy())
    np.savez(tmp_path / "copies.npz", samples=x[100:150].numpy())
    np.savez(tmp_path / "heldout.npz", samples=x[600:].numpy())
    record = run(memorise, tmp_path / "out", "--samples", tmp_path / "copies.npz", "--train",
                 tmp_path / "train.npz", "--heldout", tmp_path / "heldout.npz")
    rows = record["rows"]
    assert rows["samples"]["mean"] == pytest.approx(1, abs=1e-5)
    assert rows["held-out images"]["mean"] < 0.999
    assert rows["training images, themselves left out"]["mean"] < 0.999
    assert 0.9 < rows["blurred training images"]["mean"] < 0.999
    made = run(memorise, tmp_path / "run", "--run", digits_run, "--num", 20, "--steps", 2)
    assert made["rows"]["held-out images"]["images"] == 90


def test_blur_keeps_constants_and_spreads_points():
    x = torch.zeros(1, 2, 9, 9)
    x[0, 0, 4, 4] = 1
    made = blur(x, 1.0)
    assert made.sum().item() == pytest.approx(1, abs=1e-3) and not made[0, 1].any()
    at = torch.arange(9.0) - 4
    second = (made[0, 0].sum(0) * at.square()).sum().item()
    assert second == pytest.approx(1, rel=0.03)
    assert torch.allclose(blur(torch.ones(1, 1, 5, 5), 2.0), torch.ones(1, 1, 5, 5))


def bad(module, words, *flags, error=UsageError):
    with pytest.raises(error, match=words) as caught:
        module.main(list(map(str, flags)))
    assert "\n" not in str(caught.value)


def test_a_pipeline_s_own_python_files_are_not_run(digits_run, digits_npz, tmp_path):
    from robustdm.models.load_run import load_run
    from robustdm.models.pipeline import save_pipeline

    loaded, folder = load_run(digits_run), tmp_path / "pipe"
    save_pipeline(loaded.model, loaded.schedule, folder, clip_sample=False)
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["evil", "Evil"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "unet" / "evil.py").write_text(
        f"open({str(tmp_path / 'trap')!r}, 'w')\nfrom diffusers import UNet2DModel as Evil\n")
    measure.open_pipeline(str(folder), "cpu")
    assert not (tmp_path / "trap").exists()
    bad(evaluate, "named by --run", "--pipeline", digits_run, "--reference", digits_npz / "x")


def test_bad_input_is_named(digits_run, plane_run, digits_npz, tmp_path):
    clean = digits_npz / "clean.npz"
    bad(evaluate, "one of --run, --samples and --pipeline")
    bad(evaluate, "num is 1", "--samples", clean, "--num", 1)
    bad(evaluate, "reference is not given", "--samples", clean)
    bad(evaluate, "does not exist", "--samples", tmp_path / "nowhere", "--reference", clean)
    bad(evaluate, "40 samples are too few", "--samples", clean, "--reference", clean, "--num", 40)
    bad(evaluate, "metrics has 'fid'", "--samples", clean, "--reference", clean,
        "--metrics", "fid")
    bad(evaluate, "weights is", "--samples", clean, "--reference", clean, "--features", "resnet20",
        "--weights", tmp_path / "no.th")
    bad(evaluate, "resnet20 takes images", "--samples", clean, "--reference", clean, "--features",
        "resnet20", "--weights", _weights(tmp_path))
    bad(evaluate, "pipeline is", "--pipeline", tmp_path / "nothing", "--reference", clean)
    bad(evaluate, "ema is 0.3", "--run", digits_run, "--ema", 0.3)
    np.savez(tmp_path / "larger.npz", samples=np.zeros((80, 1, 16, 16), np.float32))
    bad(evaluate, "bring it to their resolution", "--samples", clean, "--reference",
        tmp_path / "larger.npz")
    broken = np.zeros((80, 1, 8, 8), np.float32)
    broken[3, 0, 2, 2] = np.nan
    np.savez(tmp_path / "nan.npz", samples=broken)
    bad(evaluate, "NaN", "--samples", tmp_path / "nan.npz", "--reference", clean)
    (tmp_path / "empty").mkdir()
    bad(evaluate, "samples is .*no images", "--samples", tmp_path / "empty", "--reference", clean)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    save_images(mixed, np.zeros((1, 1, 8, 8)))
    save_images(mixed, np.zeros((1, 1, 9, 9)), first_index=1)
    bad(evaluate, "differ in size", "--samples", mixed, "--reference", clean)
    bad(evaluate, "needs a network", "--samples", clean, "--reference", clean, "--baseline", "blur")
    bad(evaluate, "without a baseline", "--run", digits_run, "--baseline-strength", 1)
    bad(evaluate, "only --baseline shrink has one", "--run", digits_run, "--baseline", "blur",
        "--baseline-shape", 2, 0.1)
    bad(evaluate, "baseline_strength is -1", "--run", digits_run, "--baseline", "blur",
        "--baseline-strength", -1)
    bad(evaluate, "only images can be blurred", "--run", plane_run, "--baseline", "blur")
    bad(evaluate, "save_reference is", "--samples", clean, "--reference", clean, "--features",
        "pixels", "--save-reference", tmp_path / "no" / "x.npz")
    bad(attack, "runs is empty")
    bad(attack, "steps_attacked is 250", digits_run, "--steps-attacked", 250)
    bad(attack, "phi is 0", digits_run, "--phi", 0.0)
    bad(steps, "runs is empty")
    bad(steps, "steps is 2000: it must be from 1", digits_run, "--steps", 4, 2000)
    bad(memorise, "one of --run and --samples")
    bad(memorise, "train is not given", "--samples", clean)
    bad(memorise, "trained on points", "--run", plane_run)
    bad(memorise, "blur is 0", "--run", digits_run, "--blur", 0)


@pytest.mark.parametrize("module", [evaluate, attack, memorise, steps])
def test_a_place_for_results_is_checked_before_the_work(
    module, digits_run, digits_npz, tmp_path, monkeypatch
):
    def work(*_, **__):
        raise AssertionError("it began to work")

    for name in ("open_run", "features_of", "measure"):
        monkeypatch.setattr(measure, name, work)
    monkeypatch.setattr(features, "load_extractor", work)
    (tmp_path / "file").write_text("x")
    source = (digits_run,) if module in (attack, steps) else ("--run", digits_run)
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        bad(module, "out is .*: .*file is a file, name a folder", *source, "--out", out)
    if module is evaluate:
        bad(module, "metrics has 'fid'", *source, "--metrics", "fid")
        clean = digits_npz / "clean.npz"
        np.savez(tmp_path / "wide.npz", samples=np.zeros((80, 1, 16, 16), np.float32))
        bad(module, "bring it to their resolution", "--samples", clean, "--reference",
            tmp_path / "wide.npz")


def _weights(folder):
    torch.save(features.CifarResNet(3).state_dict(), folder / "w.th")
    return folder / "w.th"


def test_weights_out_of_reach_are_one_line(digits_npz, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    clean = digits_npz / "clean.npz"
    for name, extra in (("inception", "eval"), ("dinov2", "transformers")):
        bad(evaluate, extra, "--samples", clean, "--reference", clean, "--features", name,
            error=RunError)


def test_a_run_without_its_average_is_one_line(tmp_path):
    from robustdm.runs.checkpoint import save_checkpoint

    run_dir = make_run(tmp_path / "run", block_channels=(8, 8))
    shutil.rmtree(run_dir / "checkpoints")
    save_checkpoint(run_dir / "checkpoints", 3, {"weights": {"a": torch.zeros(1)}},
                    {"shape": [1, 8, 8], "is_image": True})
    bad(evaluate, "holds no 'ema_0.5'", "--run", run_dir)
