"""Gradient checks by central differences, eq. 17."""

from torch_bp.autograd.gradient_check.check import gradcheck, gradgradcheck
from torch_bp.autograd.gradient_check.directional import DirectionalReport, DirectionalRow, directional_check
from torch_bp.autograd.gradient_check.report import GradcheckReport, GradcheckRow
