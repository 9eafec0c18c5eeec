"""The singular values of a product of two thin factors, without forming it.

With `Q1 R1 = B` and `Q2 R2 = A^T` the product is `Q1 (R1 R2^T) Q2^T`, and the matrix in the middle is as small as the
factors are thin.
"""

from __future__ import annotations

import torch
from torch import Tensor


def svd_of_product(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`U, S, Vh` of `b @ a` in float64, singular values descending; b: (d_out, R), a: (R, d_in), of any R.

    There are min(R, d_out, d_in) of them.
    """
    left, upper = torch.linalg.qr(b.to(torch.float64))
    right, lower = torch.linalg.qr(a.to(torch.float64).T)
    u, s, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return left @ u, s, vh @ right.T


def square_norm(b: Tensor, a: Tensor) -> float:
    """Square of the Frobenius norm of `b @ a`: `trace((B^T B) (A A^T))`, in float64."""
    b, a = b.to(torch.float64), a.to(torch.float64)
    return float(((b.T @ b) * (a @ a.T)).sum())
