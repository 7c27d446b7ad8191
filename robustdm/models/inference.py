"""A trained network made fast to call: fused, channels-last, in bf16, compiled, as a CUDA graph.

Compiled code and CUDA graphs are made for one batch size. Smaller batches, such as the last of a
set, are computed at that size too: the rows that are over keep what was in them and are dropped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo

from robustdm.device import cudnn_benchmark as benchmarked
from robustdm.errors import UsageError
from robustdm.host import fastest_threads, threads_are_given
from robustdm.method.predict import predict_noise
from robustdm.models.compilation import compile_network, reason_of
from robustdm.ops import native

Precision = Literal["fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_WARM_UPS = 3  # calls before a capture, so that libraries have chosen their algorithms


def fast_network(
    model: nn.Module,
    *,
    precision: Precision = "fp32",
    compile: bool = False,
    cuda_graph: bool | None = None,
    device: torch.device | str | None = None,
    differentiable: bool = False,
    cudnn_benchmark: bool = True,
) -> FastNetwork:
    """A copy of a network that predicts the same, faster; the model itself stays as it is.

    Residual blocks and group norms of diffusers run fused, images channels-last; both but for eager
    bf16 on a CPU without our C++ library, which is faster as it is.

    Args:
        model: what ``predict_noise`` takes.
        precision: of weights and activations. bf16 needs no autocast, and half the memory; buffers
            keep their precision, since they may be tables of frequencies.
        compile: use torch.compile; where that fails, the network runs eagerly.
        cuda_graph: replay each call as one CUDA graph; by default where ``device`` is a GPU. The
            network must not wait for the GPU or draw random numbers.
        device: where to compute; by default where the model's parameters are.
        differentiable: let gradients flow to x where the caller's grad mode asks for them, as
            attacks need it (never to the weights). Without CUDA graphs.
        cudnn_benchmark: on a GPU, let cuDNN time its algorithms for each convolution at the first
            call of each shape; torch's own setting is as before when a call returns.

    Returns:
        network(x, t) -> prediction, float32 and shaped like x, without gradient unless
        ``differentiable``. Its ``off`` says
        what could not be had.

    Raises:
        UsageError: for a model that is no module, or an option that is unknown or impossible here.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"model is a {type(model).__name__}: give a torch.nn.Module")
    if precision not in _DTYPES:
        raise UsageError(f"precision is {precision!r}: choose one of {', '.join(_DTYPES)}")
    if device is None:
        device = next((p.device for p in model.parameters()), "cpu")
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    if cuda_graph and not on_gpu:
        raise UsageError(f"cuda_graph is True, but device is {str(device)!r}: leave it out, or "
                         "use a CUDA device")
    if cuda_graph and differentiable:
        raise UsageError("cuda_graph is True, but differentiable too: a graph holds no gradient, "
                         "leave one of them out")
    network = copy.deepcopy(model).to(device).eval().requires_grad_(False)
    off = {}
    # Measured: torch's own layers in their own layout are up to a third faster there; with the C++
    # norms the fused ones are a tenth faster.
    as_it_is = precision == "bf16" and not (on_gpu or compile or native.status()["cpu"][0])
    if as_it_is:
        off["fused"] = "eager bf16 on a CPU is faster without, as the C++ library is missing"
    elif not any(isinstance(m, nn.GroupNorm) for m in network.modules()):
        off["fused"] = "the network has no group norm"
    else:
        # Not at the top: diffusers takes seconds to load, and networks for points do without it.
        from robustdm.models.fuse import fuse

        try:
            fuse(network)
        except UsageError as error:  # norms without weights, say
            off["fused"] = str(error)
    if not as_it_is:
        network.to(memory_format=torch.channels_last)
    for p in network.parameters():
        if p.is_floating_point():
            p.data = p.data.to(_DTYPES[precision])
    graph = on_gpu and not differentiable if cuda_graph is None else cuda_graph
    return FastNetwork(network, device, _DTYPES[precision], not as_it_is, compile, graph, off,
                       differentiable, cudnn_benchmark)


class FastNetwork(nn.Module):
    """What `fast_network` returns.

    Attributes:
        device: where it computes.
        off: what was not to be had, "fused", "compile" or "cuda_graph", and why, in one line each.
    """

    def __init__(
        self, network: nn.Module, device: torch.device, dtype: torch.dtype, channels_last: bool,
        compile: bool, cuda_graph: bool, off: dict[str, str], differentiable: bool = False,
        cudnn_benchmark: bool = True,
    ):
        super().__init__()
        self.network = network
        self.device = device
        self.off = off
        self._dtype, self._channels_last = dtype, channels_last
        self._compile, self._graph = compile, cuda_graph
        self._differentiable, self._benchmark = differentiable, cudnn_benchmark
        self._calls: dict[tuple[int, ...], _FixedSize] = {}
        self.training = False

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict the noise of ``x`` (B, ...) at timesteps ``t`` (B,), int64; returns (B, ...).

        A batch larger than any before is prepared for first.
        """
        with (
            torch.set_grad_enabled(self._differentiable and torch.is_grad_enabled()),
            benchmarked(self.device, self._benchmark),
        ):
            if not self._fixed:
                return self._predict(x, t)
            shape = tuple(x.shape[1:])
            if shape not in self._calls or len(x) > len(self._calls[shape].x):
                self.prepare(len(x), shape)
            return self._calls[shape](x, t)

    @torch.no_grad()
    def choose_threads(self, batch_size: int, shape: tuple[int, ...], calls: int) -> None:
        """On a CPU, set the number of threads of this process to the fastest; see
        `robustdm.host.fastest_threads`. Predictions keep their bits.

        Does nothing where OMP_NUM_THREADS or a launcher of several processes decides.

        Args:
            batch_size: samples in a batch.
            shape: shape of one sample.
            calls: calls of the network to come.
        """
        limit = torch.get_num_threads()
        if self.device.type != "cpu" or limit == 1 or threads_are_given():
            return
        x, t = torch.zeros(batch_size, *shape), torch.zeros(batch_size, dtype=torch.int64)
        fastest_threads(lambda: self._predict(x, t), limit, calls)

    @torch.no_grad()
    def prepare(self, batch_size: int, shape: tuple[int, ...]) -> None:
        """Compile and capture, where asked for, as the first call would.

        Args:
            batch_size: samples in the largest batch to come.
            shape: shape of one sample.
        """
        if not self._fixed:
            return
        with benchmarked(self.device, self._benchmark):
            self._prepare(batch_size, shape)

    def _prepare(self, batch_size: int, shape: tuple[int, ...]) -> None:
        call = _FixedSize(self._predict, batch_size, shape, self._dtype, self.device)
        if self._compile:
            # Past its limit dynamo would run eagerly without a word.
            with dynamo.patch(fail_on_recompile_limit_hit=True):
                reason = compile_network(self.network, call.run)
                if reason is None and self._differentiable:
                    with torch.enable_grad():
                        x = call.x.clone().requires_grad_()
                        call(x, call.t).float().sum().backward()
            if reason is not None:
                self._compile = False
                self.off["compile"] = reason
        if self._graph:
            try:
                call.capture()
            except Exception as error:
                # An error that is not the capture's comes back in the first plain call.
                self._graph = False
                self.off["cuda_graph"] = reason_of(error)
        self._calls[tuple(shape)] = call

    @property
    def _fixed(self) -> bool:
        return self._compile or self._graph

    def _predict(self, x: Tensor, t: Tensor) -> Tensor:
        x = x.to(self.device, self._dtype)
        if x.ndim == 4 and self._channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return predict_noise(self.network, x, t).float()


class _FixedSize:
    """A call at one batch size, on buffers that stay where they are, as a CUDA graph needs it."""

    def __init__(
        self, predict: Callable[[Tensor, Tensor], Tensor], batch_size: int,
        shape: tuple[int, ...], dtype: torch.dtype, device: torch.device,
    ):
        layout = torch.channels_last if len(shape) == 3 else torch.contiguous_format
        x = torch.zeros(batch_size, *shape, dtype=dtype, device=device)
        self.x = x.contiguous(memory_format=layout)
        self.t = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._predict = predict
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self) -> Tensor:
        """The prediction for what is in the buffers."""
        return self._predict(self.x, self.t)

    def capture(self) -> None:
        """Record the call; from now on it is replayed."""
        with torch.cuda.device(self.x.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    self.run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._out = self.run()
        self._graph = graph

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        count = len(x)
        if x.requires_grad and torch.is_grad_enabled():  # the buffers cannot carry its gradient
            x = torch.cat([x.to(self.x), self.x[count:]])
            return self._predict(x, torch.cat([t.to(self.t), self.t[count:]]))[:count]
        self.x[:count].copy_(x)
        self.t[:count].copy_(t)
        if self._graph is None:
            return self.run()[:count]
        self._graph.replay()
        return self._out[:count].clone()  # the next replay overwrites it
