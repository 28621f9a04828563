"""The transposition of a matrix in memory, by PyTorch's fast copy both ways."""

import torch


class Transposed(torch.autograd.Function):
    """(m, n) -> (n, m), contiguous. The gradient too.

    Left to PyTorch, the gradient would be a view that is copied element by element if
    the matrix is the view of a tensor with more axes.
    """

    @staticmethod
    def forward(ctx, matrix):
        return matrix.t().contiguous()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.t().contiguous()
