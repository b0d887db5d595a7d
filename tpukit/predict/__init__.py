"""Predicts the time of TPU kernels on a machine that has no TPU, by replaying final schedules."""

from tpukit.predict.api import predict
from tpukit.predict.rates import RATES, Constant, Rates
from tpukit.predict.report import GluePrediction, KernelPrediction, Prediction

__all__ = [
    "RATES",
    "Constant",
    "GluePrediction",
    "KernelPrediction",
    "Prediction",
    "Rates",
    "predict",
]
