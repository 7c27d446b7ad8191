"""The exported pipeline loads in diffusers and is the network that was exported."""

import os
import stat

import numpy as np
import pytest
import torch

import robustdm
from robustdm.errors import UsageError
from robustdm.method.baselines import Baseline
from robustdm.method.sampling import sample, stream_noise
from robustdm.method.schedule import NoiseSchedule
from robustdm.models.pipeline import save_pipeline, scheduler_config

diffusers = pytest.importorskip("diffusers")
CleanPipeline = robustdm.CleanPipeline


def make_unet(channels=1):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, layers_per_block=1,
        block_out_channels=(8, 16), norm_num_groups=8, attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()


@pytest.mark.parametrize("clip", [False, True])
def test_round_trip(tmp_path, clip):
    unet, schedule = make_unet(), NoiseSchedule.linear(1000)
    save_pipeline(unet, schedule, tmp_path / "a" / "pipeline", clip_sample=clip)
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path / "a" / "pipeline",
                                                    use_safetensors=True)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 900])
    with torch.no_grad():
        assert torch.equal(loaded.unet(x, t).sample, unet(x, t).sample)
    config = loaded.scheduler.config
    assert type(loaded.scheduler).__name__ == "DDPMScheduler"
    assert config.clip_sample is clip
    assert config.variance_type == "fixed_large" and config.prediction_type == "epsilon"
    assert config.timestep_spacing == "leading" and config.num_train_timesteps == 1000
    assert torch.allclose(loaded.scheduler.betas.double(), schedule.betas, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_are_as_readable_as_the_umask_says_and_nothing_else_is_left(tmp_path, mask):
    before = os.umask(mask)
    try:
        save_pipeline(make_unet(), NoiseSchedule.linear(10), tmp_path / "pipeline",
                      clip_sample=False)
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
    files = {str(p.relative_to(tmp_path / "pipeline")): stat.S_IMODE(p.stat().st_mode)
             for p in (tmp_path / "pipeline").rglob("*") if p.is_file()}
    assert files == dict.fromkeys(
        ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
         "unet/diffusion_pytorch_model.safetensors"], 0o666 & ~mask)
    assert {stat.S_IMODE(p.stat().st_mode)
            for p in (tmp_path / "pipeline", tmp_path / "pipeline/unet")} == {0o777 & ~mask}


def test_pipeline_samples_as_we_do(tmp_path, monkeypatch):
    import diffusers.pipelines.ddpm.pipeline_ddpm as pipeline_module
    import diffusers.schedulers.scheduling_ddpm as scheduler_module

    unet, schedule = make_unet(3), NoiseSchedule.linear(1000)
    save_pipeline(unet, schedule, tmp_path / "pipeline", clip_sample=True)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(batch_size=2, num_inference_steps=3).images
    assert len(pictures) == 2 and pictures[0].size == (8, 8)

    ours = sample(unet, schedule, (3, 8, 8), num=2, steps=5, spacing="leading", clip=True)
    noise = stream_noise(0, (3, 8, 8))
    draws = [noise(t, range(2)) for t in (None, 800, 600, 400, 200)]
    for module in (pipeline_module, scheduler_module):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: draws.pop(0))
    theirs = pipeline(batch_size=2, num_inference_steps=5, output_type="np").images
    expected = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(theirs - expected).max() < 1e-3


@pytest.mark.parametrize("schedule,named", [
    (NoiseSchedule.linear(1000), "linear"), (NoiseSchedule.linear(50), "linear"),
    (NoiseSchedule.cosine(100), "squaredcos_cap_v2"),
    (NoiseSchedule(torch.linspace(0.1, 0.7, 9) ** 2), None),
    (NoiseSchedule(NoiseSchedule.linear(50).betas ** 1.001), None)])
def test_scheduler_has_the_schedule_s_betas(schedule, named):
    config = scheduler_config(schedule)
    assert config.get("beta_schedule") == named
    betas = diffusers.DDPMScheduler(**config).betas
    torch.testing.assert_close(betas.double(), schedule.betas, rtol=1e-6, atol=0)


def test_an_older_pipeline_is_replaced_and_anything_else_is_not(tmp_path):
    schedule, directory = NoiseSchedule.linear(10), tmp_path / "pipeline"
    save_pipeline(make_unet(3), schedule, directory, clip_sample=True)
    save_pipeline(make_unet(1), schedule, directory, clip_sample=True)
    assert diffusers.UNet2DModel.from_pretrained(directory / "unet").config.in_channels == 1

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="mine"):
        save_pipeline(make_unet(), schedule, tmp_path / "mine", clip_sample=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_an_interrupted_export_leaves_the_old_pipeline(tmp_path, monkeypatch):
    schedule, directory = NoiseSchedule.linear(10), tmp_path / "pipeline"
    save_pipeline(make_unet(3), schedule, directory, clip_sample=True)

    def fail(self, *args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(diffusers.UNet2DModel, "save_pretrained", fail)
    with pytest.raises(OSError):
        save_pipeline(make_unet(1), schedule, directory, clip_sample=True)
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
    assert (directory / "model_index.json").is_file()


def test_other_networks_are_refused(tmp_path):
    with pytest.raises(UsageError, match="Linear"):
        save_pipeline(torch.nn.Linear(2, 2), NoiseSchedule.linear(10), tmp_path, clip_sample=False)


# The pipeline that corrects its last step.


class Linear(diffusers.UNet2DModel):
    """The optimum for Gaussian images of variance V: the chain is linear in its noise."""

    VARIANCE = 0.09

    def forward(self, x, t, **_):
        abar = NoiseSchedule.linear(1000).alphas_cumprod[int(t)].item()
        eps = (1 - abar) ** 0.5 * x / (abar * self.VARIANCE + 1 - abar)
        return type("Out", (), {"sample": eps})()


def linear_unet():
    return Linear(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1,
                  block_out_channels=(8,), norm_num_groups=8, down_block_types=("DownBlock2D",),
                  up_block_types=("UpBlock2D",))


def draws(pipeline, steps=100, num=64):
    made = pipeline(num, torch.Generator().manual_seed(0), steps, output_type="pt").images
    return made * 2 - 1


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DDIMScheduler",
                                       "DPMSolverMultistepScheduler"])
def test_the_noise_of_the_data_is_gone_whatever_the_sampler(scheduler):
    """All variance is noise: nothing may be left of it."""
    kept = diffusers.DDPMScheduler(1000, clip_sample=False, timestep_spacing="leading").config
    made = getattr(diffusers, scheduler).from_config(kept)
    plain = draws(diffusers.DDPMPipeline(linear_unet(), made))
    assert plain.std() == pytest.approx(0.3, rel=0.15)
    clean = draws(CleanPipeline(linear_unet(), made, data_noise=0.3, safety=1.0))
    assert clean.std() < 1e-3
    some = draws(CleanPipeline(linear_unet(), made, data_noise=0.3))
    assert 0.02 < some.std() < 0.06, "a tenth of the strength is not corrected for: 1 - .9^2 of it"


def test_three_lines_open_what_training_wrote(tmp_path):
    schedule = NoiseSchedule.linear(1000)
    save_pipeline(make_unet(), schedule, tmp_path, clip_sample=False, data_noise=0.19)
    pipeline = robustdm.CleanPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.baseline == Baseline("known", 0.19)
    x0 = draws(pipeline, 10, 2)
    # The states until then are those of the plain pipeline.
    pipeline.save_pretrained(tmp_path / "again")
    again = CleanPipeline.from_pretrained(tmp_path / "again", stop=1.0)
    assert torch.equal(draws(again, 10, 2), x0)
    plain = diffusers.DDPMPipeline.from_pretrained(tmp_path / "again")
    assert not torch.equal(draws(plain, 10, 2), x0)
    assert torch.equal(draws(CleanPipeline(plain.unet, plain.scheduler), 10, 2),
                       draws(plain, 10, 2)), "without noise it is a DDPMPipeline"
    assert len(pipeline(2, num_inference_steps=3).images) == 2


def test_what_a_pipeline_cannot_correct(tmp_path):
    save_pipeline(make_unet(), NoiseSchedule.linear(1000), tmp_path, clip_sample=False)
    with pytest.raises(UsageError, match="data_noise is not given, and .* has no noise.json"):
        CleanPipeline.from_pretrained(tmp_path)
    (tmp_path / "noise.json").write_text('{"rms": -1}')
    with pytest.raises(UsageError, match="baseline_strength is -1"):
        CleanPipeline.from_pretrained(tmp_path)
    pipeline = CleanPipeline.from_pretrained(tmp_path, data_noise=500.0)
    with pytest.raises(UsageError, match="data_noise is 500: no state"):
        pipeline(1, num_inference_steps=4)
    euler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(UsageError, match="scheduler is a EulerDiscreteScheduler"):
        CleanPipeline(pipeline.unet, euler, data_noise=0.1)(1, num_inference_steps=4)
