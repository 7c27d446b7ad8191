"""The sensors of a GPU, through a stand-in for NVML."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import timing  # noqa: E402

CUDA = torch.device("cuda")
READINGS = {"sm_mhz": 1830, "memory_mhz": 3201, "celsius": 41, "watts": 312.5, "joules": 98.765,
            "throttled": ["power cap", "thermal (hardware)"]}
REASONS = [f"nvmlDeviceGetCurrentClocks{word}Reasons" for word in ("Event", "Throttle")]
FUNCTIONS = {
    "nvmlDeviceGetClockInfo": ("sm_mhz", "memory_mhz"), "nvmlDeviceGetTemperature": ("celsius",),
    "nvmlDeviceGetPowerUsage": ("watts",), "nvmlDeviceGetTotalEnergyConsumption": ("joules",),
}


class NVMLError(Exception):
    pass


def hidden(*arguments):
    raise NVMLError("Not Supported")


@pytest.fixture
def nvml(monkeypatch):
    """A GPU at one place on the bus; milliwatts and millijoules, as NVML has them."""
    asked = []
    made = SimpleNamespace(
        NVMLError=NVMLError, NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2, NVML_TEMPERATURE_GPU=0, asked=asked,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByPciBusId=lambda bus: asked.append(bus) or "handle",
        nvmlDeviceGetClockInfo=lambda gpu, kind: {1: 1830, 2: 3201}[kind],
        nvmlDeviceGetTemperature=lambda gpu, kind: 41,
        nvmlDeviceGetPowerUsage=lambda gpu: 312_500,
        nvmlDeviceGetTotalEnergyConsumption=lambda gpu: 98_765,
        nvmlSystemGetDriverVersion=lambda: "580.65.06",
        **{name: lambda gpu: 0x1 | 0x2 | 0x4 | 0x40 | 0x100 for name in REASONS},
    )
    monkeypatch.setitem(sys.modules, "pynvml", made)
    place = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: place)
    return made


def test_readings_have_the_units_that_their_names_say(nvml):
    sensors = timing.Sensors(CUDA)
    assert sensors.why_off == "" and sensors.read() == READINGS
    assert sensors.driver() == "580.65.06" and nvml.asked == [b"00000000:1b:02.0"]


def test_a_driver_version_in_bytes_can_be_recorded(nvml):
    nvml.nvmlSystemGetDriverVersion = lambda: b"535.1"
    assert json.dumps(timing.Sensors(CUDA).driver()) == '"535.1"'


@pytest.mark.parametrize("fault", ["hidden", "missing"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_sensor_that_is_not_there_costs_no_other(nvml, function, fault):
    sensors = timing.Sensors(CUDA)
    assert sensors.read() == READINGS  # one that works first may fail later
    if fault == "hidden":
        setattr(nvml, function, hidden)
    else:
        delattr(nvml, function)
    left = {k: v for k, v in READINGS.items() if k not in FUNCTIONS[function]}
    assert sensors.read() == left


@pytest.mark.parametrize("fault", ["hidden", "missing"])
def test_what_holds_the_clocks_down_has_an_older_name_and_may_stay_unknown(nvml, fault):
    sensors = timing.Sensors(CUDA)
    for name, found in zip(REASONS, (READINGS["throttled"], None), strict=True):
        if fault == "hidden":
            setattr(nvml, name, hidden)
        else:
            delattr(nvml, name)
        assert sensors.read() == READINGS | {"throttled": found}
    assert '"throttled": null' in json.dumps(sensors.read())


def test_an_idle_gpu_and_clocks_that_are_set_are_no_throttling(nvml):
    nvml.nvmlDeviceGetCurrentClocksEventReasons = lambda gpu: 0x1 | 0x2 | 0x100
    assert timing.Sensors(CUDA).read()["throttled"] == []


@pytest.mark.parametrize("fault", ["hidden", "missing"])
def test_a_driver_that_keeps_silent_is_none(nvml, fault):
    sensors = timing.Sensors(CUDA)
    if fault == "hidden":
        nvml.nvmlSystemGetDriverVersion = hidden
    else:
        del nvml.nvmlSystemGetDriverVersion
    assert sensors.driver() is None


@pytest.mark.parametrize("name", ["nvmlInit", "nvmlDeviceGetHandleByPciBusId"])
@pytest.mark.parametrize("fault", [hidden, None])
def test_without_nvml_the_record_says_why(nvml, name, fault):
    if fault is None:
        delattr(nvml, name)
    else:
        setattr(nvml, name, fault)
    sensors = timing.Sensors(CUDA)
    assert sensors.why_off.startswith("NVMLError" if fault else "AttributeError")
    assert sensors.read() == {} and sensors.driver() is None


def test_without_the_package_or_a_gpu_nothing_is_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    sensors = timing.Sensors(CUDA)
    assert "pynvml" in sensors.why_off and sensors.read() == {} and sensors.driver() is None
    assert timing.Sensors(torch.device("cpu")).why_off == "no GPU"
