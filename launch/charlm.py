"""The task: a character-level transformer on the text of Python's own standard library. No download.

Shape letters: N batch, L sequence length, E model width, H heads, V characters.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_HELD_OUT_EVERY = 20

NUM_CHARACTERS = 97
"""95 printable ASCII characters, the newline, and one for all others."""


class Corpus:
    """Python's standard library as two texts; every 20th file is held out.

    Attributes: train and heldout, (bytes,) uint8 of 0..96; num_files; sha256 of the training text, for the report.
    """

    def __init__(self) -> None:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(_python_files(root))
        table = bytes(b - 32 if 32 <= b < 127 else 95 if b == 10 else 96 for b in range(256))
        parts: tuple[list[bytes], list[bytes]] = [], []
        for i, path in enumerate(files):
            parts[i % _HELD_OUT_EVERY == 0].append(path.read_bytes().translate(table))
        self.num_files = len(files)
        train, heldout = (bytearray(b"".join(texts)) for texts in parts)
        self.sha256 = hashlib.sha256(train).hexdigest()
        self.train = torch.frombuffer(train, dtype=torch.uint8)
        self.heldout = torch.frombuffer(heldout, dtype=torch.uint8)


def _python_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - _SKIPPED_FOLDERS  # not looked into: most of the files are there
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows and the same moved on by one character. Shapes: -> (N, L) int64 twice."""
    start_N1 = torch.randint(len(text) - length, (count, 1), generator=generator)
    window = text[start_N1 + torch.arange(length + 1)].long()
    return window[:, :-1], window[:, 1:]


class Block(nn.Module):
    """Pre-norm attention and MLP, without biases."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
        )

    def forward(self, x_NLE: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x_NLE)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv, is_causal=True)
        x_NLE = x_NLE + self.proj(attended.transpose(1, 2).flatten(2))
        return x_NLE + self.mlp(self.norm2(x_NLE))


class CharTransformer(nn.Module):
    """A GPT of the given size. Returns the mean cross-entropy in nats per character."""

    def __init__(
        self, width: int, num_layers: int, num_heads: int, length: int, num_characters: int = NUM_CHARACTERS
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_characters, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, num_characters, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("proj.weight", "mlp.2.weight"))
                nn.init.normal_(p, std=0.02 / (2 * num_layers) ** 0.5 if residual else 0.02)

    def forward(self, x_NL: Tensor, target_NL: Tensor) -> Tensor:
        h_NLE = self.blocks(self.embed(x_NL) + self.position[: x_NL.shape[1]])
        return F.cross_entropy(self.head(self.norm(h_NLE)).flatten(0, 1), target_NL.flatten())
