"""Matrices that let a linear state space remember its input, in float64 NumPy.

    x' = A x + B u,    A = V (diag Λ - Σ_r p_r p_r*) V*

Such an A compresses the past of u into coefficients of orthogonal functions; up to
a matrix of low rank it is normal, so that its eigenvectors are well conditioned.

Gu et al. 2020, HiPPO, arXiv:2008.07669; 2021, S4, arXiv:2111.00396; 2022, S4D,
arXiv:2206.11893; 2022, How to Train Your HiPPO, arXiv:2206.12037.
"""

import numpy as np

MEASURES = ("legs", "legt", "fout")
INITS = ("lin", "inv", "legs", "real")


def hippo(measure, size):
    """A (n, n) and B (n,) of x' = A x + B u.

    Args:
        measure: "legs" for Legendre polynomials over the whole past, scaled
            exponentially; "legt" for Legendre polynomials and "fout" for Fourier waves
            over the last unit of time.
        size: number n of states.

    Raises:
        ValueError: unknown measure.
    """
    return _matrices(measure, size)[:2]


def nplr(measure, size):
    """HiPPO as a normal matrix plus one of low rank, in its eigenvectors.

    Args:
        measure: as in `hippo`; the rank r is 2 for "legt", else 1.
        size: number n of states, even.

    Returns:
        (Λ (n,), P (r, n), V* B (n,), V (n, n)) in complex128. The eigenvalues come in
        conjugate pairs; the first half has the negative imaginary parts, increasing.

    Raises:
        ValueError: unknown measure; odd size.
    """
    if size % 2:
        raise ValueError(f"size must be even, for conjugate pairs; received {size}")
    A, B, P = _matrices(measure, size)
    normal = A + P.T @ P  # a multiple of the identity plus a skew matrix
    imaginary, V = np.linalg.eigh(-0.5j * (normal - normal.T))
    still = np.abs(imaginary) <= 1e-9 * np.abs(imaginary).max()
    if still.any():
        V[:, still] = _conjugate_pairs(V[:, still])
    adjoint = V.conj().T
    return np.diag(normal).mean() + 1j * imaginary, P @ V.conj(), adjoint @ B, V


def s4d_init(init, size):
    """One of each two eigenvalues of a diagonal state space, and its input: (n/2,).

    Args:
        init: "lin" for -1/2 + πki, "inv" for -1/2 + i n/π (n/(2k+1) - 1), "legs" for
            the normal part of HiPPO-LegS, "real" for -(k + 1).
        size: number n of states, even.

    Returns:
        Λ and B in complex128; B is one but for "legs".

    Raises:
        ValueError: unknown init.
    """
    k, B = np.arange(size // 2), np.ones(size // 2, "complex128")
    if init == "lin":
        return -0.5 + 1j * np.pi * k, B
    if init == "inv":
        return -0.5 + 1j * size / np.pi * (size / (2 * k + 1) - 1), B
    if init == "legs":
        Lambda, _, B, _ = nplr("legs", size)
        return Lambda[: size // 2], B[: size // 2]
    if init == "real":
        return -(k + 1.0) + 0j, B
    raise ValueError(f"init must be one of {INITS}, received {init!r}")


def truncated_output(Lambda, P, C, dt, length):
    """C̃ = C (I - Ā^length), with which the kernel of `length` taps is a finite sum.

    Ā is the bilinear step of A = diag Λ - Σ_r p_r p_r* with all conjugates; Λ, P and C
    hold one of each two. S4, lemma C.3 and algorithm 1.

    Args:
        Lambda: (..., n/2), complex128.
        P: (r, ..., n/2).
        C: (..., n/2).
        dt: Δ, (...).
        length: number of taps.

    Returns:
        (..., n/2) in complex128.
    """
    Lambda, P, C = (np.concatenate([z, np.conj(z)], axis=-1) for z in (Lambda, P, C))
    identity = np.eye(Lambda.shape[-1])
    A = Lambda[..., None] * identity - np.einsum("r...n,r...m->...nm", P, P.conj())
    half = np.asarray(dt)[..., None, None] / 2 * A
    step = np.linalg.solve(identity - half, identity + half)
    rest = C[..., None, :] @ np.linalg.matrix_power(step, length)
    return (C - rest[..., 0, :])[..., : C.shape[-1] // 2]


def _matrices(measure, size):
    """A, B and the P (r, n) for which A + PᵀP is normal."""
    n = np.arange(size)
    if measure == "legs":  # S4, equation 2
        root = np.sqrt(2 * n + 1.0)
        A = -np.tril(np.outer(root, root), -1) - np.diag(n + 1.0)
        return A, root, np.sqrt(n + 0.5)[None]
    if measure == "legt":  # How to Train Your HiPPO
        root = np.sqrt(2 * n + 1.0)
        sign = np.where(n[:, None] < n, (-1.0) ** (n[:, None] - n), 1.0)
        return -np.outer(root, root) * sign, root, root * (n % 2 == [[0], [1]])
    if measure == "fout":  # the same paper: cosines at even n, sines at odd n
        B = np.where(n % 2, 0.0, np.sqrt(8.0))
        B[:1] = 2.0
        turn = np.where(n % 2, 0.0, np.pi * n)[:-1]
        A = np.diag(turn, -1) - np.diag(turn, 1) - np.outer(B, B) / 2
        return A, B, B[None] / np.sqrt(2.0)
    raise ValueError(f"measure must be one of {MEASURES}, received {measure!r}")


def _conjugate_pairs(vectors):
    """A basis of the same real space, its second half conjugate to the first."""
    projector = (vectors @ vectors.conj().T).real
    real = np.linalg.eigh(projector)[1][:, -vectors.shape[1] :]
    a, b = np.split(real, 2, axis=1)
    return np.concatenate([a - 1j * b, (a + 1j * b)[:, ::-1]], axis=1) / np.sqrt(2.0)
