"""Gradient compression for DistributedDataParallel: bundled packed-trit hypervectors instead of dense buckets."""

from vsa_ddp.config import PhaseConfig, VsaConfig
from vsa_ddp.cost import Advice, advise
from vsa_ddp.hook import vsa_hook
from vsa_ddp.phase import Phase, PhaseSchedule
from vsa_ddp.predictor import GradientPredictor
from vsa_ddp.register import learning_rate_factor, register
from vsa_ddp.state import VsaState
from vsa_ddp.stats import CompressionStats, PhaseStats, PredictionQuality
from vsa_ddp.trainer import PhasedTrainer
from vsa_ddp.version import __version__

__all__ = [
    "Advice",
    "CompressionStats",
    "GradientPredictor",
    "Phase",
    "PhaseConfig",
    "PhaseSchedule",
    "PhaseStats",
    "PhasedTrainer",
    "PredictionQuality",
    "VsaConfig",
    "VsaState",
    "__version__",
    "advise",
    "learning_rate_factor",
    "register",
    "vsa_hook",
]
