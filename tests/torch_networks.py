"""Small speaker networks in PyTorch, of the families that people export, and their ONNX files by torch.onnx.

Each is written as its family's public code is, in the operators that matter: how it pools, splits, masks and attends.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import nn


def conv_bn(inputs, outputs, taps, **more):
    return nn.Sequential(nn.Conv1d(inputs, outputs, taps, **more), nn.BatchNorm1d(outputs), nn.ReLU())


class Xvector(nn.Module):
    """TDNN: convolution, ReLU, batch normalisation (which cannot be folded); statistics; two linear layers."""

    def __init__(self, features=80):
        super().__init__()
        self.frame1, self.frame2 = nn.Conv1d(features, 16, 5), nn.Conv1d(16, 24, 3, dilation=2)
        self.bn1, self.bn2 = nn.BatchNorm1d(16), nn.BatchNorm1d(24)
        self.segment1, self.segment2 = nn.Linear(48, 20), nn.Linear(20, 12)

    def forward(self, x):
        x = self.bn1(torch.relu(self.frame1(x.transpose(1, 2))))
        x = self.bn2(F.leaky_relu(self.frame2(x)))
        pooled = torch.cat([x.mean(-1), x.std(-1)], 1)
        return self.segment2(torch.relu(self.segment1(pooled)))


class Res2Block(nn.Module):
    def __init__(self, channels, scale=4):
        super().__init__()
        self.width = channels // scale
        self.enter, self.leave = conv_bn(channels, channels, 1), conv_bn(channels, channels, 1)
        self.convs = nn.ModuleList(conv_bn(self.width, self.width, 3, dilation=2, padding=2) for _ in range(scale - 1))
        self.se = nn.Sequential(nn.Conv1d(channels, 8, 1), nn.ReLU(), nn.Conv1d(8, channels, 1), nn.Sigmoid())

    def forward(self, x):
        parts = list(torch.split(self.enter(x), self.width, 1))
        for i, conv in enumerate(self.convs):
            parts[i + 1] = conv(parts[i + 1] if i == 0 else parts[i + 1] + parts[i])
        y = self.leave(torch.cat(parts, 1))
        return x + y * self.se(y.mean(2, keepdim=True))


class Ecapa(nn.Module):
    """Res2 blocks with squeeze-and-excitation, all of them aggregated, attention that sees the whole utterance."""

    def __init__(self):
        super().__init__()
        self.stem, self.block1, self.block2 = conv_bn(80, 16, 5, padding=2), Res2Block(16), Res2Block(16)
        self.aggregate = nn.Conv1d(48, 24, 1)
        self.attention = nn.Sequential(nn.Conv1d(72, 8, 1), nn.Tanh(), nn.Conv1d(8, 24, 1))
        self.bn, self.fc = nn.BatchNorm1d(48), nn.Conv1d(48, 12, 1)

    def forward(self, x):
        x1 = self.stem(x.transpose(1, 2))
        x2 = self.block1(x1)
        x3 = self.block2(x1 + x2)
        x = torch.relu(self.aggregate(torch.cat([x1, x2, x3], 1)))
        time = x.size(2)
        seen = torch.cat(
            [x, x.mean(2, keepdim=True).repeat(1, 1, time), x.std(2, keepdim=True).expand(-1, -1, time)], 1
        )
        weight = torch.softmax(self.attention(seen), 2)
        mean = (x * weight).sum(2)
        deviation = ((x**2 * weight).sum(2) - mean**2).clamp(min=1e-4).sqrt()
        return self.fc(self.bn(torch.cat([mean, deviation], 1)).unsqueeze(2)).transpose(1, 2)  # [batch, 1, size]


class CamPlusPlus(nn.Module):
    """2-D stem, densely connected layers with context-aware masks of 100-frame segments."""

    def __init__(self, layers=2, growth=8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, padding=1, stride=(2, 1)), nn.BatchNorm2d(4)
        self.tdnn = conv_bn(160, 16, 5, stride=2, padding=2)
        self.enter, self.local, self.mask1, self.mask2 = (nn.ModuleList() for _ in range(4))
        for n in range(layers):
            channels = 16 + n * growth
            self.enter.append(
                nn.Sequential(nn.BatchNorm1d(channels), nn.ReLU(), nn.Conv1d(channels, 16, 1, bias=False))
            )
            self.local.append(nn.Conv1d(16, growth, 3, padding=1, bias=False))
            self.mask1.append(nn.Conv1d(16, 8, 1))
            self.mask2.append(nn.Conv1d(8, growth, 1))
        self.dense, self.out = nn.Conv1d(2 * (16 + layers * growth), 12, 1), nn.BatchNorm1d(12, affine=False)

    def segments(self, x):
        pooled = F.avg_pool1d(x, kernel_size=100, stride=100, ceil_mode=True)
        shape = pooled.shape
        spread = pooled.unsqueeze(-1).expand(*shape, 100).reshape(*shape[:-1], -1)
        return spread[..., : x.shape[-1]]

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x.permute(0, 2, 1).unsqueeze(1))))
        x = self.tdnn(x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3]))
        for enter, local, mask1, mask2 in zip(self.enter, self.local, self.mask1, self.mask2):
            y = enter(x)
            context = y.mean(-1, keepdim=True) + self.segments(y)
            x = torch.cat([x, local(y) * torch.sigmoid(mask2(torch.relu(mask1(context))))], 1)
        pooled = torch.cat([x.mean(-1), x.std(-1, unbiased=True)], -1)
        return self.out(self.dense(pooled.unsqueeze(-1)).squeeze(-1))


class ReDimNet(nn.Module):
    """Rows turned to maps and back, grouped convolutions, GELU, attention over time, sums by learned weights."""

    def __init__(self, features=80, channels=4):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, channels, 3, padding=1), nn.LayerNorm(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.bn, self.point = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 1)
        size = features * channels
        self.reduce, self.norm = nn.Conv1d(size, 16, 1), nn.LayerNorm(16)
        self.query, self.key, self.value, self.mix = (nn.Linear(16, 16) for _ in range(4))
        self.expand = nn.Conv1d(16, size, 1)
        self.weights = nn.Parameter(torch.randn(1, 3, size, 1))
        self.fc = nn.Linear(2 * size, 12)

    def forward(self, x):
        x = self.stem(x.transpose(1, 2).unsqueeze(1))  # [batch, channel, feature, time]
        x = self.stem_norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        rows = [x.flatten(1, 2)]
        y = x + self.point(F.gelu(self.bn(self.conv(x))))
        rows.append(y.flatten(1, 2))
        z = self.norm(self.reduce(rows[-1]).transpose(1, 2))
        batch, time, size = z.shape
        q, k, v = (
            layer(z).reshape(batch, time, 4, size // 4).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        attended = torch.softmax(q @ k.transpose(-1, -2) / 2.0, -1) @ v
        z = z + self.mix(attended.transpose(1, 2).reshape(batch, time, size))
        rows.append(rows[-1] + self.expand(F.gelu(z, approximate="tanh").transpose(1, 2)))
        x = (torch.stack(rows, 1) * torch.softmax(self.weights, 1)).sum(1)
        mean = x.mean(-1)
        deviation = (x - mean[..., None]).pow(2).mean(-1).add(1e-6).sqrt()
        return self.fc(torch.cat([mean, deviation], 1))


class ResNet(nn.Module):
    """Residual blocks over time and frequency, features first; global average pooling and statistics."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.shortcut = nn.Sequential(nn.Conv2d(4, 8, 1, stride=2, bias=False), nn.BatchNorm2d(8))
        self.fc1, self.fc2, self.embedding = nn.Linear(8, 4), nn.Linear(4, 8), nn.Linear(168, 12)
        self.shift = nn.Parameter(torch.randn(12))

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.bn1(self.conv1(x.unsqueeze(1)))), 3, 2, 1)
        y = self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(x)))))
        gate = torch.sigmoid(self.fc2(F.silu(self.fc1(F.adaptive_avg_pool2d(y, 1).flatten(1)))))
        x = F.hardtanh(y * gate[:, :, None, None] + self.shortcut(x), 0.0, 20.0)
        pooled = torch.cat([x.mean(-1).flatten(1), x.amax((2, 3))], 1)
        return self.embedding(F.normalize(pooled, dim=1)) - self.shift


class ERes2Net(nn.Module):
    """Chunks of channels, each fused with the one before by attention."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.fuse = nn.Sequential(
            nn.Conv2d(8, 2, 1), nn.BatchNorm2d(2), nn.SiLU(), nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)
        )
        self.last, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(2 * 8 * 40, 12)

    def forward(self, x):
        x = F.relu6(self.bn1(self.conv1(x.permute(0, 2, 1).unsqueeze(1))))
        one, two = x.chunk(2, 1)
        one = self.convs[0](one)
        gate = 1 + torch.tanh(self.fuse(torch.cat([one, two], 1)))
        two = self.convs[1](one * gate + two * (2 - gate))
        x = x + self.last(torch.cat([one, two], 1))
        x = x.reshape(x.size(0), -1, x.size(-1))
        return self.fc(torch.cat([x.mean(-1), torch.sqrt(torch.var(x, -1) + 1e-8)], 1))


class Titanet(nn.Module):
    """Separable convolutions behind masks of the lengths, which are an input; two outputs, `logits` and `embs`."""

    def __init__(self):
        super().__init__()
        self.depth, self.point, self.bn = (
            nn.Conv1d(80, 80, 7, padding=3, groups=80),
            nn.Conv1d(80, 16, 1),
            nn.BatchNorm1d(16),
        )
        self.attention, self.fc = nn.Conv1d(16, 16, 1), nn.Linear(32, 12)
        self.classes = nn.Linear(12, 5)

    def forward(self, x, length):
        mask = torch.arange(x.size(2))[None, :] < length[:, None]
        x = x.masked_fill(~mask[:, None], 0.0)
        x = F.dropout(F.relu(self.bn(self.point(self.depth(x)))), 0.1, self.training)
        x = x.masked_fill(~mask[:, None], 0.0)
        logits = self.attention(x).masked_fill(mask[:, None] == 0, -float("inf"))
        weight = torch.softmax(logits, 2)
        mean = (x * weight).sum(2)
        deviation = torch.sqrt(((x - mean[:, :, None]) ** 2 * weight).sum(2).clamp(1e-10))
        embedding = self.fc(torch.cat([mean, deviation], 1))
        return self.classes(embedding), embedding


FAMILIES = {
    "xvector": (Xvector, 11),
    "ecapa": (Ecapa, 13),
    "campplus": (CamPlusPlus, 14),
    "redimnet": (ReDimNet, 17),
    "resnet": (ResNet, 18),
    "eres2net": (ERes2Net, 12),
    "titanet": (Titanet, 16),
    "redimnet of set 20": (ReDimNet, 20),
}
"""By name: the network, and the operator set that its file is of."""
FEATURES_FIRST = (ResNet, Titanet)


def make(family):
    """A network whose weights and statistics are random but tame."""
    torch.manual_seed(1)
    network = FAMILIES[family][0]().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
    return network


def inputs(network, features):
    """What the network is called with, of features `[batch, time, 80]`."""
    x = torch.as_tensor(features)
    x = x.transpose(1, 2).contiguous() if isinstance(network, FEATURES_FIRST) else x
    return (x, torch.full((len(x),), features.shape[1])) if isinstance(network, Titanet) else (x,)


def embed(network, features):
    """The embeddings `[batch, size]`."""
    with torch.no_grad():
        found = network(*inputs(network, features))
    return (found[1] if isinstance(network, Titanet) else found).flatten(1).numpy()


def export(family, path, dynamo=False):
    """Writes the network's ONNX file by torch.onnx, batch and time free; `dynamo` by its newer exporter."""
    network, opset = make(family), FAMILIES[family][1]
    names = ["feats", "length"][: len(inputs(network, torch.zeros(2, 150, 80)))]
    time = 2 if isinstance(network, FEATURES_FIRST) else 1
    axes = {"feats": {0: "B", time: "T"}, "length": {0: "B"}, "embs": {0: "B"}, "logits": {0: "B"}}
    outputs = ["logits", "embs"] if isinstance(network, Titanet) else ["embs"]
    settings = {"dynamic_axes": {n: axes[n] for n in names + outputs}, "opset_version": opset}
    if dynamo:
        settings = {"dynamic_shapes": [axes[n] for n in names], "external_data": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, inputs(network, torch.zeros(2, 150, 80)), path, input_names=names, output_names=outputs,
            dynamo=dynamo, **settings,
        )  # fmt: skip
    return network
