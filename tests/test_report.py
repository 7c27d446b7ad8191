"""The report: complete, self-contained, and made of whatever a run has left behind."""

import base64
import io
import json
import subprocess
import sys
import tracemalloc
import zipfile
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from jinja2 import UndefinedError
from PIL import Image

from robustdm.errors import UsageError
from robustdm.method.perturbation import Perturbation
from robustdm.method.schedule import NoiseSchedule
from robustdm.reporting import plots, run_page, webpage
from robustdm.reporting.run_page import measure_columns, write_report
from robustdm.runs import rundir
from robustdm.runs.config import TrainConfig
from robustdm.runs.files import read_metrics, read_run
from robustdm.runs.presets import preset_values

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks nesting while reading; keeps pictures, text and every reference."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.images, self.references, self.tags = [], [], [], set()
        self.text, self.headings, self.title = "", [], ""
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "action", "data"):
                self.references.append(value)
        if tag == "img":
            self.images.append(dict(attributes))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" in self.open:
            assert "url(" not in data and "@import" not in data
            return
        self.text += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self.open and self.open[-1] == "title":
            self.title += data

    def pngs(self) -> list[Image.Image]:
        pictures = []
        for attributes in self.images:
            head, data = attributes["src"].split(",", 1)
            assert head == "data:image/png;base64"
            with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
                assert picture.format == "PNG"
                picture.load()
                pictures.append(picture)
        return pictures


def make_run(path, shape, steps=200, plots=True, **changes):
    """A synthetic run: data of the given sample shape, steps logged every 10; all of it complete.

    Without ``plots`` there are no curves and no ray schedule, which take most of the time.
    """
    if not plots:
        changes["objective"] = "ddpm"
    rng = np.random.default_rng(0)
    preset = "plane" if len(shape) == 1 else "digits"
    values = {**preset_values(preset), "steps": steps, "out": path, **changes}
    config = TrainConfig(**values)
    (path / "samples").mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    (path / "run.json").write_text(json.dumps({
        "data": {"name": preset, "sha256": "5f" * 32}, "network": "tiny", "parameters": 123456,
        "sessions": [{"command": "python -m robustdm.train --lam 0.3", "git": "0123abcd",
                      "versions": {"torch": "2.13.0", "python": "3.12.1"}}],
    }))
    with open(path / "metrics.jsonl", "w") as file:
        for step in range(10, steps + 1, 10) if plots else ():
            fit = 0.05 + np.exp(-step / 60) * rng.uniform(0.8, 1.2)
            row = {"step": step, "time": step * 0.15, "loss": fit * 1.5, "fit": fit,
                   "reg": fit * 0.5, "grad_norm": fit * 3, "lr": 1e-3, "skipped": 0,
                   "img_per_s": 420 + 10 * rng.normal()}
            row.update({f"fit_band{b}": fit / (b + 1) for b in range(4) if rng.random() < 0.9})
            if step % 50 == 0:
                row["heldout_loss"] = fit * 1.6
                row["samples"] = {"noise_rms": 0.4 * np.exp(-step / 90) + 0.07, "spread": 0.41}
            file.write(json.dumps(row) + "\n")
    if len(shape) == 1:
        clean = rng.normal(size=(600, 3)) * [0.3, 0.3, 0.0]
    else:
        clean = np.clip(rng.normal(size=(16, *shape)).cumsum(-1) * 0.3, -1, 1)
    train = clean + 0.2 * rng.normal(size=clean.shape)
    np.savez(path / "samples/reference.npz", train=np.float32(train), clean=np.float32(clean))
    for step in range(50, steps + 1, 50):
        noisy = clean + np.exp(-step / 60) * rng.normal(size=clean.shape)
        np.savez(path / f"samples/step-{step:08d}.npz", samples=np.float32(noisy))
    np.savez(path / "samples/final.npz", samples=np.float32(clean + 0.05))
    (path / "summary.json").write_text(json.dumps({
        "measures": {"samples": {"noise_rms": 0.07031, "spread": 0.412},
                     "training data": {"noise_rms": 0.19852, "spread": 0.447},
                     "clean data": {"noise_rms": 0.01713, "spread": 0.463}},
        "warnings": ["the data look clean"], "time_s": 185.2, "img_per_s": 417.3, "step": steps,
        "device": "cpu", "parameters": 123456,
    }))
    return path


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3,)])
def test_page_is_complete_and_self_contained(tmp_path, shape):
    run = make_run(tmp_path / "run", shape)
    written = write_report(run)
    assert written == run / "report.html"
    text = written.read_text(encoding="utf-8")
    cells = "".join(f'<td class="n">{value}</td>' for value in ("0.07031", "0.1985", "0.01713"))
    assert f'<th scope="row">noise rms</th>{cells}' in text
    page = Page(text)
    assert page.references and all(r.startswith("data:image/png;base64,") for r in page.references)
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert all(attributes["alt"] for attributes in page.images)
    # 3 data panels, 4 previews, 5 curves + 2 measures, 3 panels of the schedule
    assert len(page.pngs()) == 3 + 4 + 7 + 3
    assert page.headings == [
        "Key numbers", "How close to the clean data", "Training data, clean data, samples",
        "Samples over training", "Curves", "The ray schedule", "Commands", "Configuration",
        "Provenance",
    ]
    preset = "plane" if len(shape) == 1 else "digits"
    assert page.title == f"robust_adv on {preset}, 200 steps"
    for expected in ("0.07031", "0.1985", "0.01713", "0.412", "123,456", "417.3", "3 min 05 s",
                     "the data look clean", "2.13.0", "python -m robustdm.train --lam 0.3",
                     "0123abcd", "5f" * 32, "clip_norm", "beta_range", "0.5, 2.0"):
        assert expected in page.text, expected
    for command in (f"robustdm.train --resume --out {run} --steps 400",
                    f"robustdm.sample --run {run} --num 64 --sampler ddim",
                    f"robustdm.report {run}"):
        assert command in page.text
    assert "not finished" not in page.text


def test_the_sampling_command_fits_a_short_schedule(tmp_path):
    run = make_run(tmp_path / "run", (1, 8, 8), plots=False, timesteps=20)
    page = Page(write_report(run).read_text())
    assert f"robustdm.sample --run {run} --num 64 --sampler ddim --steps 20 " in page.text


@pytest.mark.parametrize("clip, black, white", [(True, 0, 255), (False, 42, 212)])
def test_pictures_show_the_samples_pixel_for_pixel(tmp_path, clip, black, white):
    """At full contrast where samples are clipped, else at two thirds of it."""
    run = make_run(tmp_path / "run", (1, 8, 8), plots=False, clip_samples=clip)
    samples = -np.ones((1, 1, 8, 8), np.float32)
    samples[0, 0, 2, 5] = 1
    np.savez(run / "samples/final.npz", samples=samples)
    page = Page(write_report(run).read_text())
    which = [a["alt"] for a in page.images].index("samples")
    pixels = np.asarray(page.pngs()[which].convert("L"))
    side = len(pixels) // 8
    expected = np.full((8, 8), black)
    expected[2, 5] = white
    assert abs(pixels[side // 2::side, side // 2::side] - expected).max() <= 1
    assert ("two thirds of the contrast" in page.text) == (not clip)


def test_text_from_files_is_escaped(tmp_path):
    run = make_run(tmp_path / "a <b> & 'c'", (1, 8, 8), plots=False)
    (run / "run.json").write_text(json.dumps({"data": "<script>alert(1)</script>"}))
    (run / "summary.json").write_text(json.dumps({
        "step": 200, "warnings": ["<img src=http://x>"],
        "measures": {"samples": {"<i>&amp;": 1.0}},
    }))
    text = write_report(run).read_text()
    page = Page(text)
    assert "script" not in page.tags and "<script" not in text and "<img src=http" not in text
    assert "<script>alert(1)</script>" in page.text and "<i>&amp;" in page.text
    assert "robustdm.report '" in page.text  # the path is quoted for the shell


def test_a_run_named_like_a_script_is_escaped(tmp_path):
    run = make_run(tmp_path / "<script>", (1, 8, 8), plots=False)
    (run / "config.yaml").unlink()  # the name is then the title
    text = write_report(run).read_text()
    page = Page(text)
    assert page.title == "<script>, 200 steps" and "script" not in page.tags
    assert "&lt;script&gt;, 200 steps</h1>" in text


def test_every_part_of_a_page_is_escaped():
    bad = "<script>\"'&"
    png = plots.png_bytes(plots.figure()[0])
    parts = [bad], [[bad, bad], [bad, bad]], [bad]
    text = webpage.page(bad, [
        webpage.Section(bad, *parts[:2], notes=parts[2], code=bad, columns=columns,
                        pictures=[webpage.Picture(png, bad), webpage.Picture(png, alt=bad)])
        for columns in ("", "wide")])
    page = Page(text)
    assert "script" not in page.tags and text.count("&lt;script&gt;") == 2 + 2 * (8 + 3)
    assert page.title == bad and {a["alt"] for a in page.images} == {bad}
    with pytest.raises(UndefinedError):
        webpage.render("page.html.j2", title="no sections")


def test_run_without_samples_or_summary(tmp_path):
    run = make_run(tmp_path / "run", (1, 8, 8))
    for file in (*run.glob("samples/*"), run / "summary.json"):
        file.unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:7]) + "\n" + lines[7][:25])
    page = Page(write_report(run).read_text())
    assert page.title == "robust_adv on digits, 70 of 200 steps"
    assert "The run has not finished: 70 of 200 steps" in page.text
    assert "1 unreadable line(s) of metrics.jsonl" in page.text
    assert "No samples were made during training" in page.text
    assert f"robustdm.train --resume --out {run}" in page.text and "--steps 400" not in page.text
    assert len(page.pngs()) == 7 + 3


def test_empty_metrics(tmp_path):
    run = make_run(tmp_path / "run", (3,), steps=50, plots=False)
    assert (run / "metrics.jsonl").read_text() == ""
    page = Page(write_report(run).read_text())
    assert "metrics.jsonl holds no lines yet" in page.text and "0.07031" in page.text


def test_damaged_files_cost_only_themselves(tmp_path):
    run = make_run(tmp_path / "run", (1, 8, 8))
    (run / "samples/step-00000100.npz").write_bytes(b"PK\x03\x04 torn")
    (run / "config.yaml").write_text("steps: [1, 2")
    (run / "run.json").write_text("{")
    page = Page(write_report(run).read_text())
    assert "step-00000100.npz cannot be read" in page.text
    assert "The configuration is not known" in page.text and "run.json" in page.text
    assert page.title == "run, 200 steps" and "0.07031" in page.text
    assert "step 50" in page.text and "step 100" not in page.text


def made_without_plots(tmp_path, monkeypatch):
    for name in ("_curves", "_schedule"):
        monkeypatch.setattr(run_page, name, lambda run: [])
    return make_run(tmp_path / "run", (1, 8, 8))


@pytest.mark.parametrize("name, value", [
    ("measures", 5), ("measures", {"samples": None}), ("measures", {"samples": {"noise_rms": "x"}}),
    ("step", "x"), ("step", -1), ("step", True), ("step", 1e300), ("warnings", 3),
    ("time_s", 10**400), ("parameters", 10**400), ("parameters", float("nan")),
])
def test_a_summary_that_only_a_fuzzer_writes(tmp_path, monkeypatch, name, value):
    run = made_without_plots(tmp_path, monkeypatch)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, name: value}))
    assert Page(write_report(run).read_text()).title.endswith("200 steps")


@pytest.mark.parametrize("line", [
    {"step": [1]}, {"step": float("nan")}, {"step": 10**400}, {"step": True}, {"skipped": 10**400},
    [], "[" * 10**5,
])
def test_a_line_of_metrics_that_only_a_fuzzer_writes(tmp_path, monkeypatch, line):
    run = made_without_plots(tmp_path, monkeypatch)
    with open(run / "metrics.jsonl", "a") as file:
        file.write((line if isinstance(line, str) else json.dumps(line)) + "\n")
    (run / "run.json").write_text("[" * 10**5)
    page = Page(write_report(run).read_text())
    assert "1 unreadable line(s)" in page.text and "run.json cannot be read" in page.text
    last = rundir.RunDir(run, -1).truncate_metrics(100)
    assert last["step"] == 100 and last == rundir.read_metrics(run / "metrics.jsonl")[-1]


def test_a_bomb_among_the_samples_is_left_out(tmp_path):
    run = make_run(tmp_path / "run", (1, 8, 8), plots=False)
    with zipfile.ZipFile(run / "samples/final.npz", "w") as archive:
        archive.writestr("samples.npy", b"")
        archive.getinfo("samples.npy").file_size = 1 << 30  # as the directory at the end has it
    assert "final.npz cannot be read (ValueError)" in Page(write_report(run).read_text()).text


def test_samples_with_nan_are_counted(tmp_path):
    for name, shape in (("points", (3,)), ("images", (1, 8, 8))):
        run = make_run(tmp_path / name, shape, steps=100, plots=False)
        with np.load(run / "samples/reference.npz") as file:
            samples = file["train"].copy()
        samples[3] = np.nan
        samples[5].flat[0] = np.inf
        np.savez(run / "samples/final.npz", samples=samples)
        assert "(2 with values that are not finite)" in Page(write_report(run).read_text()).text


def test_many_previews_are_thinned_out(tmp_path):
    run = make_run(tmp_path / "run", (1, 8, 8), steps=1500, plots=False)
    page = Page(write_report(run).read_text())
    steps = [a["alt"] for a in page.images if a["alt"].startswith("step ")]
    assert len(steps) == 12 and steps[0] == "step 50" and steps[-1] == "step 1,500"
    assert "12 of 30 previews are shown" in page.text


def test_plain_ddpm_has_no_schedule_figure(tmp_path):
    run = make_run(tmp_path / "run", (1, 8, 8), objective="ddpm")
    page = Page(write_report(run).read_text())
    assert "ddpm uses no perturbation" in page.text and "lambda 0.3, mode" not in page.text
    assert len(page.pngs()) == 3 + 4 + 7


def test_rows_of_a_resumed_run_are_merged(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 10, "loss": 1}\n{"step": 20, "loss": 2}\n{"step": 30, "loss": 3}\n'
                    '{"step": 20, "loss": 5}\n[1]\n{"loss": 7}\n')
    assert [(row["step"], row["loss"]) for row in read_metrics(file, [])] == [
        (10, 1), (20, 5), (30, 3)]


def test_command_line(tmp_path):
    run = make_run(tmp_path / "run", (1, 8, 8), plots=False)
    call = [sys.executable, "-m", "robustdm.report"]
    done = subprocess.run([*call, str(run)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == str(run / "report.html")
    for wrong, word in ((tmp_path / "none", "is not a directory"), (tmp_path, "holds no run")):
        done = subprocess.run([*call, str(wrong)], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert str(wrong) in done.stderr and word in done.stderr


def test_wrong_directory_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="holds no run"):
        write_report(tmp_path)


def test_smoothing_is_a_centred_mean():
    values = np.arange(10.0) ** 2
    smoothed = plots.smooth(values, 2)
    assert smoothed[5] == pytest.approx(values[3:8].mean())
    assert smoothed[0] == pytest.approx(values[:3].mean())
    assert smoothed[9] == pytest.approx(values[7:].mean())


def test_curves_hold_the_values_and_bridge_gaps():
    steps = np.arange(1, 101)
    values = 1.0 / steps
    values[::10] = np.nan
    ax = plots.curves(steps, {"loss": values}, "loss", log=True, levels={"clean": 0.5}).axes[0]
    raw, bold, level = ax.get_lines()
    known = np.isfinite(values)
    assert np.array_equal(raw.get_xdata(), steps[known])
    assert np.array_equal(raw.get_ydata(), values[known])
    assert np.allclose(bold.get_ydata(), plots.smooth(values[known], 3))
    assert set(level.get_ydata()) == {0.5} and ax.get_yscale() == "log"


def test_curves_survive_what_a_log_axis_cannot_show():
    for values in ([0.0, 0.0, 0.0], [np.nan] * 3, [-1.0, 0.0, 2.0], []):
        made = plots.curves(range(len(values)), {"reg": values}, "reg", log=True)
        assert plots.png_bytes(made)[:4] == b"\x89PNG"


def test_schedule_figure_shows_radius_and_lambda():
    # spec values: radius at t = 0 for b = 1 is 3.1473 eps-units, 0.0315 x-units; lambda 51.96
    made = plots.schedule_figure(NoiseSchedule.linear(1000), Perturbation(), lambda_max=60)
    eps, x, weight = (ax.get_lines()[1].get_ydata()[0] for ax in made.axes)
    assert (eps, x, weight) == pytest.approx((3.1473, 0.0315, 51.96), rel=2e-3)
    assert made.axes[2].get_lines()[0].get_ydata()[0] == 60  # 103.9, cut off


def test_point_view_shows_clean_data_edge_on():
    rng = np.random.default_rng(1)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    clean = (rng.normal(size=(500, 3)) * [3, 1, 0]) @ turn + 7
    view = plots.point_view(clean, clean + 0.1 * rng.normal(size=clean.shape))
    edge = view.project(clean, 1)
    assert np.abs(edge[:, 1]).max() < 1e-9 and edge[:, 0].std() == pytest.approx(3, rel=0.1)
    assert view.limits[1][1][1] > 0.15  # but the frame has room for the noise
    axes = plots.point_scatter({"clean": clean, "far": clean + 100}, view).axes
    assert [ax.texts[0].get_text() for ax in axes if ax.texts] == ["500 outside"] * 2
    for plane in view.planes:
        assert np.allclose(plane.T @ plane, np.eye(2))


def test_a_point_view_of_many_points_takes_no_more_memory_than_they_do():
    points = np.random.default_rng(0).normal(size=(4000, 8))
    tracemalloc.start()
    plots.point_view(points)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * points.nbytes


@pytest.mark.parametrize("dims", [1, 2, 32])
def test_points_of_any_dimension_can_be_drawn(dims):
    points = np.random.default_rng(0).normal(size=(5000, dims))
    made = plots.point_scatter({"many": points, "few": points[:100]})
    assert len(made.axes) == 2 * (1 if dims <= 2 else 2)
    assert plots.png_bytes(made)[:4] == b"\x89PNG"


def test_score_field_draws_unit_arrows_coloured_by_magnitude():
    grid = np.array([[0.0, 1], [1, 0], [1, 1], [0, 0]])
    vectors = np.array([[3.0, 4], [0, -0.01], [100, 0], [0, 0]])
    made, axes = plots.figure()
    arrows = plots.score_field(axes[0, 0], grid, vectors)
    lengths = np.hypot(arrows.U, arrows.V)
    assert np.allclose(lengths[:3], 1) and lengths[3] == 0
    assert np.allclose(arrows.get_array()[:3], [5, 0.01, 100])
    assert plots.png_bytes(made)[:4] == b"\x89PNG"


def test_trajectories_follow_the_projection():
    path = np.random.default_rng(0).normal(size=(6, 4, 3))
    matrix = np.eye(3)[:, [2, 0]]
    for projection in ((2, 0), matrix):
        _, axes = plots.figure()
        plots.trajectories(axes[0, 0], path, projection)
        lines, ends = axes[0, 0].collections
        segments = np.array(lines.get_segments())
        assert segments.shape == (5 * 4, 2, 2)
        assert np.allclose(segments[0], path[:2, 0][:, [2, 0]])
        assert np.allclose(ends.get_offsets(), path[-1][:, [2, 0]])
        times = lines.get_array()
        assert times[0] == 0 and times[-1] == 1 and (np.diff(times) >= 0).all()


def test_figures_leave_no_global_state():
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.png_bytes(plots.curves([1, 2], {"loss": [1, 2]}, "loss"))
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or matplotlib.pyplot.get_fignums() == []


def test_measures_over_training_end_with_those_of_the_summary(tmp_path):
    run = read_run(make_run(tmp_path / "run", (1, 8, 8)))
    run.rows[-1].pop("samples")  # as training leaves it: the last samples are the final ones
    (title, series, log, levels), _ = measure_columns(run)
    values = series["samples"][np.isfinite(series["samples"])]
    assert title == "samples: noise rms" and log and len(values) == 4 and values[-1] == 0.07031
    assert levels == {"training data": 0.19852, "clean data": 0.01713}
