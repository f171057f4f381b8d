"""Gradient compression for DistributedDataParallel: bundled packed-trit hypervectors instead of dense buckets."""

from vsa_ddp.accumulate import TernaryGradientAccumulator, calculate_memory_savings
from vsa_ddp.archive import CompressedGradients
from vsa_ddp.averager import VsaModelAverager
from vsa_ddp.compressor import CompressorStats, VSAGradientCompressor
from vsa_ddp.config import PhaseConfig, VsaConfig
from vsa_ddp.cost import Advice, advise
from vsa_ddp.hook import vsa_hook
from vsa_ddp.local_phases import DeterministicPhaseTrainer, DeterministicPredictor, PhaseTrainer
from vsa_ddp.optimizer import OptimizerStats, TernaryOptimizerWrapper
from vsa_ddp.phase import Phase, PhaseSchedule
from vsa_ddp.predictor import GradientPredictor
from vsa_ddp.register import learning_rate_factor, register
from vsa_ddp.state import VsaState
from vsa_ddp.stats import CompressionStats, PhaseStats, PredictionQuality
from vsa_ddp.ternary import Ternary, ternary_quantize_deterministic, ternary_quantize_stochastic
from vsa_ddp.trainer import PhasedTrainer
from vsa_ddp.trits import PackedTritVec, ternary_quantize_packed, vote
from vsa_ddp.version import __version__

__all__ = [
    "Advice",
    "CompressedGradients",
    "CompressionStats",
    "CompressorStats",
    "DeterministicPhaseTrainer",
    "DeterministicPredictor",
    "GradientPredictor",
    "OptimizerStats",
    "PackedTritVec",
    "Phase",
    "PhaseConfig",
    "PhaseSchedule",
    "PhaseStats",
    "PhaseTrainer",
    "PhasedTrainer",
    "PredictionQuality",
    "Ternary",
    "TernaryGradientAccumulator",
    "TernaryOptimizerWrapper",
    "VSAGradientCompressor",
    "VsaConfig",
    "VsaModelAverager",
    "VsaState",
    "__version__",
    "advise",
    "calculate_memory_savings",
    "learning_rate_factor",
    "register",
    "ternary_quantize_deterministic",
    "ternary_quantize_packed",
    "ternary_quantize_stochastic",
    "vote",
    "vsa_hook",
]
