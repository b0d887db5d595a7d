"""Predicts the time of TPU kernels on a machine that has no TPU, by replaying final schedules."""

from tpukit.predict.api import predict
from tpukit.predict.links import LINK_RATES, LinkRates
from tpukit.predict.mesh import MeshPrediction, predict_mesh
from tpukit.predict.rates import RATES, Constant, Rates
from tpukit.predict.report import GluePrediction, KernelPrediction, Prediction

__all__ = [
    "LINK_RATES",
    "RATES",
    "Constant",
    "GluePrediction",
    "KernelPrediction",
    "LinkRates",
    "MeshPrediction",
    "Prediction",
    "Rates",
    "predict",
    "predict_mesh",
]
