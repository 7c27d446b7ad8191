"""A small UNet with improved-diffusion's state-dict names, to check the conversion against.

Written from the description of the architecture, and by other means than `models.improved.forward`.
"""

import math

import torch
from torch import nn


class Residual(nn.Module):
    def __init__(self, wide_in, wide_out, emb, scale_shift):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, wide_in), nn.SiLU(), nn.Conv2d(wide_in, wide_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, wide_out * (1 + scale_shift)))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, wide_out), nn.SiLU(), nn.Dropout(0.0),
            nn.Conv2d(wide_out, wide_out, 3, padding=1))
        same = wide_in == wide_out
        self.skip_connection = nn.Identity() if same else nn.Conv2d(wide_in, wide_out, 1)
        self.scale_shift = scale_shift

    def forward(self, x, emb):
        h, e = self.in_layers(x), self.emb_layers(emb).view(len(x), -1, 1, 1)
        norm, *rest = self.out_layers
        if self.scale_shift:
            half = e.shape[1] // 2
            h = norm(h) * (1 + e[:, :half]) + e[:, half:]
        else:
            h = norm(h + e)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm = nn.GroupNorm(32, width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)
        self.heads = heads

    def forward(self, x, emb):
        flat = x.flatten(2)
        rows = self.qkv(self.norm(flat))
        done = []
        for one in rows.chunk(self.heads, dim=1):  # rows lie head by head, q, k, v within
            q, k, v = one.chunk(3, dim=1)
            weight = torch.einsum("bct,bcs->bts", q, k) / math.sqrt(q.shape[1])
            done.append(torch.einsum("bts,bcs->bct", weight.softmax(-1), v))
        return (flat + self.proj_out(torch.cat(done, dim=1))).view_as(x)


class Down(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x, emb):
        return self.op(x)


class Up(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x, emb):
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


class First(nn.Conv2d):
    def forward(self, x, emb):
        return super().forward(x)


class ImprovedUNet(nn.Module):
    """Every weight random: the zero-initialised ones would hide mistakes."""

    def __init__(self, width=32, mult=(1, 2), blocks=1, attends=(2,), heads=1, scale_shift=False,
                 learn_sigma=False, channels=3):
        super().__init__()
        emb = 4 * width
        self.width = width
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.input_blocks = nn.ModuleList([nn.ModuleList([First(channels, width, 3, padding=1)])])
        self.output_blocks = nn.ModuleList()
        now, kept, size = width, [width], 1
        for level, m in enumerate(mult):
            for _ in range(blocks):
                parts = [Residual(now, m * width, emb, scale_shift)]
                now = m * width
                if size in attends:
                    parts.append(Attention(now, heads))
                self.input_blocks.append(nn.ModuleList(parts))
                kept.append(now)
            if level < len(mult) - 1:
                self.input_blocks.append(nn.ModuleList([Down(now)]))
                kept.append(now)
                size *= 2
        self.middle_block = nn.ModuleList([
            Residual(now, now, emb, scale_shift), Attention(now, heads),
            Residual(now, now, emb, scale_shift)])
        for level, m in reversed(list(enumerate(mult))):
            for i in range(blocks + 1):
                parts = [Residual(now + kept.pop(), m * width, emb, scale_shift)]
                now = m * width
                if size in attends:
                    parts.append(Attention(now, heads))
                if level and i == blocks:
                    parts.append(Up(now))
                    size //= 2
                self.output_blocks.append(nn.ModuleList(parts))
        last = nn.Conv2d(now, channels * (1 + learn_sigma), 3, padding=1)
        self.out = nn.Sequential(nn.GroupNorm(32, now), nn.SiLU(), last)

    @torch.no_grad()
    def forward(self, x, t):
        half = self.width // 2
        rates = 10_000 ** (-torch.arange(half) / half)
        angle = t.float().view(-1, 1) * rates
        emb = self.time_embed(torch.cat([torch.cos(angle), torch.sin(angle)], dim=1))
        stack = []
        for block in self.input_blocks:
            for part in block:
                x = part(x, emb)
            stack.append(x)
        for part in self.middle_block:
            x = part(x, emb)
        for block in self.output_blocks:
            x = torch.cat([x, stack.pop()], dim=1)
            for part in block:
                x = part(x, emb)
        return self.out(x)


ARCHITECTURES = {
    "multi-head": dict(mult=(1, 2, 2), blocks=2, attends=(2, 4), heads=4),
    "scale-shift": dict(mult=(1, 2), attends=(1, 2), heads=1, scale_shift=True),
    "learned sigma": dict(mult=(1, 2), heads=2, scale_shift=True, learn_sigma=True),
}


def make(name):
    torch.manual_seed(0)
    model = ImprovedUNet(**ARCHITECTURES[name]).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model
