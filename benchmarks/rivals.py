"""Other ways of averaging gradients, for ranks in one process: each written from its paper, bytes as it would send.

Every method takes the ranks' gradients and returns the one that all ranks go on with. Matrices are compressed, what has
one dimension travels as it is, as in `vsa_ddp`. What they pack is counted at the density that a good implementation
would reach: 1.6 bits for a ternary value, 1 for a sign. What the network can sum is reduced by a ring, which receives
2 (W - 1) / W of what a rank hands over; all else is gathered from W - 1 ranks.

Shape letters: W ranks, N elements of the gradient, R x C a matrix.
"""

import math

import torch
from torch import Tensor

from benchmarks.lockstep import Shapes
from vsa_ddp.config import VsaConfig
from vsa_ddp.hypervector import rotate
from vsa_ddp.layout import is_compressed


class _Rival:
    """Splits the gradient into parameters."""

    def __init__(self, shapes: Shapes, seed: int = 0) -> None:
        self._shapes = shapes
        self._random = torch.Generator().manual_seed(seed)
        self.sent_bytes = 0.0
        self.received_bytes = 0.0
        self.step = 0

    def average(self, gradient_WN: Tensor) -> Tensor:
        mean_N = torch.empty_like(gradient_WN[0])
        start = 0
        for name, shape in self._shapes:
            end = start + math.prod(shape)
            part = gradient_WN[:, start:end]
            if is_compressed(shape, VsaConfig()):
                mean_N[start:end] = self.average_matrix(name, part.reshape(len(part), shape[0], -1)).flatten()
            else:
                mean_N[start:end] = part.mean(0)
                self.reduced(4 * (end - start), len(part))
            start = end
        self.step += 1
        return mean_N

    def average_matrix(self, name: str, g_WRC: Tensor) -> Tensor:
        """Shapes: (W, R, C) -> (R, C)."""
        raise NotImplementedError

    def reduced(self, num_bytes: float, world_size: int) -> None:
        """Count what the network sums."""
        self.sent_bytes += num_bytes
        self.received_bytes += num_bytes * 2 * (world_size - 1) / world_size

    def gathered(self, num_bytes: float, world_size: int) -> None:
        """Count what every rank gets of every other."""
        self.sent_bytes += num_bytes
        self.received_bytes += num_bytes * (world_size - 1)


class Dense(_Rival):
    """A plain all-reduce."""

    def average_matrix(self, name: str, g_WRC: Tensor) -> Tensor:
        self.reduced(4 * g_WRC[0].numel(), len(g_WRC))
        return g_WRC.mean(0)


class DiLoCo(Dense):
    """What ranks changed in several steps, averaged, is a gradient to Nesterov's momentum. The paper's rate is 0.7 and
    its momentum 0.9, for hundreds of rounds. Source: Douillard et al. 2023, arXiv:2311.08105."""

    lr = 0.7

    def __init__(self, shapes: Shapes, seed: int = 0, momentum: float = 0.9) -> None:
        super().__init__(shapes, seed)
        self._momentum = momentum
        self._velocity = torch.zeros(())

    def average(self, gradient_WN: Tensor) -> Tensor:
        mean_N = super().average(gradient_WN)
        self._velocity = self._momentum * self._velocity + mean_N
        return self.lr * (mean_N + self._momentum * self._velocity)


class Bf16(_Rival):
    """Cast to bfloat16 and summed in it, as torch's hook does."""

    def average_matrix(self, name: str, g_WRC: Tensor) -> Tensor:
        self.reduced(2 * g_WRC[0].numel(), len(g_WRC))
        total = torch.zeros_like(g_WRC[0], dtype=torch.bfloat16)
        for g_RC in g_WRC:
            total += g_RC.bfloat16() / len(g_WRC)
        return total.float()


class PowerSGD(_Rival):
    """Rank r, warm start, error feedback, exact for two steps. Torch advises a tenth of a run: rank 4 then loses 3.8 %
    in adamw-char-short, at 7 times fewer bytes, instead of 6.1 % at 20 (two seeds, at a rate of 0.0014). What each rank
    sends can be rounded to bfloat16; the sums are float32's. Source: Vogels et al. 2019, arXiv:1905.13727, as torch's
    powerSGD_hook has it."""

    def __init__(
        self,
        shapes: Shapes,
        seed: int = 0,
        rank: int = 4,
        start_step: int = 2,
        factors: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(shapes, seed)
        self._rank, self._start_step, self._factors = rank, start_step, factors
        self._q: dict[str, Tensor] = {}
        self._error: dict[str, Tensor] = {}

    def average_matrix(self, name: str, g_WRC: Tensor) -> Tensor:
        _, rows, cols = g_WRC.shape
        rank = min(rows, cols, self._rank)
        if self.step < self._start_step or (rows + cols) * rank * 2 > rows * cols:
            self.reduced(4 * rows * cols, len(g_WRC))
            return g_WRC.mean(0)
        m_WRC = g_WRC + self._error[name] if name in self._error else g_WRC
        q_Cr = self._q.get(name)
        if q_Cr is None:
            q_Cr = torch.linalg.qr(torch.randn(cols, rank, generator=self._random)).Q
        p_Rr = torch.linalg.qr((m_WRC @ q_Cr).to(self._factors).float().mean(0)).Q
        q_Cr = (m_WRC.mT @ p_Rr).to(self._factors).float().mean(0)
        self.reduced(self._factors.itemsize * rank * (rows + cols), len(g_WRC))
        self._q[name] = torch.linalg.qr(q_Cr).Q
        mean_RC = p_Rr @ q_Cr.T
        self._error[name] = m_WRC - mean_RC
        return mean_RC

    def forget(self) -> None:
        """What was not sent is lost."""
        self._error.clear()


class TernGrad(_Rival):
    """Stochastic ternary at the greatest magnitude after clipping at 2.5 standard deviations, one scale for all ranks.
    Source: Wen et al. 2017, arXiv:1705.07878."""

    def average_matrix(self, name: str, g_WRC: Tensor) -> Tensor:
        limit_W11 = 2.5 * g_WRC.flatten(1).std(1)[:, None, None]
        clipped = g_WRC.clamp(-limit_W11, limit_W11)
        scale = clipped.abs().max()
        kept = torch.rand(g_WRC.shape, generator=self._random) * scale < clipped.abs()
        self.gathered(0.2 * g_WRC[0].numel() + 4, len(g_WRC))
        return (clipped.sign() * kept).mean(0) * scale


class _ErrorFeedback(_Rival):
    """Keeps what was not sent, on each rank."""

    def __init__(self, shapes: Shapes, seed: int = 0) -> None:
        super().__init__(shapes, seed)
        self._error: dict[str, Tensor] = {}

    def average_matrix(self, name: str, g_WRC: Tensor) -> Tensor:
        wanted = g_WRC + self._error[name] if name in self._error else g_WRC
        sent = self.compress(wanted)
        self._error[name] = wanted - sent
        return sent.mean(0)

    def compress(self, wanted_WRC: Tensor) -> Tensor:
        """What each rank sends, decompressed. Shapes: (W, R, C) -> (W, R, C)."""
        raise NotImplementedError


class ErrorFeedbackSign(_ErrorFeedback):
    """Signs times the mean magnitude of the tensor. Source: Karimireddy et al. 2019, arXiv:1901.09847."""

    def compress(self, wanted_WRC: Tensor) -> Tensor:
        self.gathered(wanted_WRC[0].numel() / 8 + 4, len(wanted_WRC))
        return wanted_WRC.sign() * self.scale(wanted_WRC)

    def scale(self, wanted_WRC: Tensor) -> Tensor:
        """Shapes: (W, R, C) -> (W, 1, 1)."""
        return wanted_WRC.abs().mean((1, 2), keepdim=True)


class _ErrorFeedbackRootMeanSquare(ErrorFeedbackSign):
    """Signs times the root mean square."""

    def scale(self, wanted_WRC: Tensor) -> Tensor:
        return wanted_WRC.square().mean((1, 2), keepdim=True).sqrt()


class TopK(_ErrorFeedback):
    """The largest hundredth of each tensor's elements, each a value of 16 bits and a place of 12, as DeMo's. Source:
    Stich et al. 2018, arXiv:1809.07599."""

    share = 0.01

    def compress(self, wanted_WRC: Tensor) -> Tensor:
        flat = wanted_WRC.flatten(1)
        count = max(1, round(self.share * flat.shape[1]))
        index = flat.abs().topk(count).indices
        self.gathered(3.5 * count, len(wanted_WRC))
        return torch.zeros_like(flat).scatter_(1, index, flat.gather(1, index)).view_as(wanted_WRC)


class OneBitAdam(_Rival):
    """An optimizer rather than a hook: what it returns is for plain SGD to step by. Adam for some steps; after them its
    second moment stays, and momenta are averaged in one bit: signs times a root mean square, from ranks to owners of
    shards and back, each keeping what it did not send. What had no gradient until then is masked, as in its authors'
    implementation. Source: Tang et al. 2021, arXiv:2102.02888.

    Args:
        beta1: of the momentum; beta2 is the paper's, which remembers the whole warm-up.
        warmup_steps: of Adam. The paper's are 15 to 25 % of a run.
    """

    beta2, eps = 0.999, 1e-8

    def __init__(self, shapes: Shapes, seed: int, beta1: float, warmup_steps: int) -> None:
        super().__init__(shapes, seed)
        self._beta1, self._warmup_steps = beta1, warmup_steps
        self._momentum_N = self._square_N = torch.zeros(())
        self._to_owner, self._from_owner = _ErrorFeedbackRootMeanSquare(shapes), _ErrorFeedbackRootMeanSquare(shapes)

    def average(self, gradient_WN: Tensor) -> Tensor:
        momentum_WN = torch.lerp(gradient_WN, self._momentum_N.expand_as(gradient_WN), self._beta1)
        if self.step < self._warmup_steps:
            self.reduced(4 * gradient_WN[0].numel(), len(gradient_WN))
            self._momentum_N = momentum_WN.mean(0)
            self._square_N = torch.lerp(gradient_WN.mean(0).square(), self._square_N, self.beta2)
        else:
            mean_N = self._to_owner.average(momentum_WN)
            self._momentum_N = self._from_owner.average(mean_N[None]) * (self._square_N > 0)
            self.reduced(self._to_owner.sent_bytes, len(gradient_WN))
            self.sent_bytes += self._from_owner.sent_bytes / len(gradient_WN)  # of its shard, to everyone
            self._to_owner.sent_bytes = self._from_owner.sent_bytes = 0.0
        self.step += 1
        steps = min(self.step, self._warmup_steps)
        root_N = (self._square_N / (1 - self.beta2**steps)).sqrt()
        return self._momentum_N / (1 - self._beta1**self.step) / (root_N + self.eps)


class DeMo(_Rival):
    """An optimizer rather than a hook: signs, for plain SGD to step by. Each rank's momentum, which decays by .999,
    keeps all but the k largest of 64 x 64 cosine coefficients of every tile; each is averaged over the ranks that sent
    it. An index takes 12 bits, a value 16. What has one dimension is averaged as it is. Source: Peng et al. 2024,
    arXiv:2411.19870."""

    tile, decay = 64, 0.999

    def __init__(self, shapes: Shapes, seed: int = 0, count: int = 32) -> None:
        super().__init__(shapes, seed)
        self._count = count
        self._momentum: dict[str, Tensor] = {}
        n = torch.arange(self.tile, dtype=torch.float64)
        self._cosines = (torch.cos(math.pi / self.tile * (n + 0.5) * n[:, None]) * (2 / self.tile) ** 0.5).float()
        self._cosines[0] /= 2**0.5

    def average(self, gradient_WN: Tensor) -> Tensor:
        return super().average(gradient_WN).sign_()

    def average_matrix(self, name: str, g_WRC: Tensor) -> Tensor:
        w, rows, cols = g_WRC.shape
        down, across, t = -(-rows // self.tile), -(-cols // self.tile), self.tile
        padded = torch.nn.functional.pad(g_WRC, (0, across * t - cols, 0, down * t - rows))
        momentum = self._momentum.setdefault(name, torch.zeros_like(padded)).mul_(self.decay).add_(padded)
        tiles = momentum.view(w, down, t, across, t).transpose(2, 3)
        spectrum = (self._cosines @ tiles @ self._cosines.T).flatten(3)
        index = spectrum.abs().topk(self._count).indices
        sent = torch.zeros_like(spectrum).scatter_(3, index, spectrum.gather(3, index)).view(tiles.shape)
        self.gathered(3.5 * self._count * down * across, w)
        mean = sent.sum(0) / sent.count_nonzero(0).clamp(min=1)
        momentum -= self._matrix(sent)
        return self._matrix(mean)[:rows, :cols]

    def _matrix(self, spectrum: Tensor) -> Tensor:
        """Shapes: (..., down, across, 64, 64) -> (..., 64 * down, 64 * across)."""
        tiles = self._cosines.T @ spectrum @ self._cosines
        return tiles.transpose(-3, -2).flatten(-4, -3).flatten(-2)


class RotatedSign(_Rival):
    """One bit after a random rotation in blocks of 1024, each rank's own, at the unbiased scale. Source: DRIVE,
    Vargaftik et al. 2021, arXiv:2105.08339."""

    block = 1024

    def average_matrix(self, name: str, g_WRC: Tensor) -> Tensor:
        w, size = len(g_WRC), g_WRC[0].numel()
        padded = torch.nn.functional.pad(g_WRC.flatten(1), (0, -size % self.block)).view(w, -1, self.block)
        total = torch.zeros_like(padded[0])
        for rank_TK in padded:
            signs = torch.randint(0, 2, rank_TK.shape, generator=self._random) * 2.0 - 1
            y_TK = rotate(rank_TK * signs)
            norm_T1 = y_TK.abs().sum(1, keepdim=True)
            scale = torch.where(norm_T1 > 0, y_TK.square().sum(1, keepdim=True) / norm_T1, 0.0)
            total += rotate(y_TK.sign() * scale) * signs
        self.gathered(padded[0].numel() / 8 + 2 * len(total), w)
        return (total / w).flatten()[:size].view_as(g_WRC[0])
