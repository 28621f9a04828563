import math

import numpy as np
import pytest
from numpy.polynomial import legendre

from keras_edifice.ops.hippo import (
    INITS,
    MEASURES,
    hippo,
    nplr,
    s4d_init,
    truncated_output,
)
from tests.support.close import assert_close

rng = np.random.default_rng(0)


def exponential(A):
    """e^A, by its series after halving A."""
    halvings = math.ceil(math.log2(max(1.0, np.abs(A).sum(1).max()))) + 4
    term = total = np.eye(len(A))
    for k in range(1, 20):
        term = term @ A / 2**halvings / k
        total = total + term
    return np.linalg.matrix_power(total, 2**halvings)


def basis(measure, size, t):
    """Functions whose coefficients the state holds, at the time t ago: e^{tA} B."""
    n = np.arange(size)
    if measure == "fout":
        waves = np.where(n % 2, np.sin(np.pi * (n - 1) * t), np.cos(np.pi * n * t))
        return waves * np.where(n == 0, 1.0, np.sqrt(2.0))
    s = np.exp(-t) if measure == "legs" else 1 - t
    polynomials = [legendre.legval(2 * s - 1, np.eye(size)[k]) for k in n]
    scale = s if measure == "legs" else 1.0
    return scale * np.sqrt(2 * n + 1) * polynomials


def test_matrices_of_the_papers():
    A, B = hippo("legs", 3)
    assert_close(
        A, [[-1, 0, 0], [-(3**0.5), -2, 0], [-(5**0.5), -(15**0.5), -3]], 1e-12
    )
    assert_close(B, [1, 3**0.5, 5**0.5], 1e-12)
    A, B = hippo("legt", 3)
    rows = [
        [-1, 3**0.5, -(5**0.5)],
        [-(3**0.5), -3, 15**0.5],
        [-(5**0.5), -(15**0.5), -5],
    ]
    assert_close(A, rows, 1e-12)
    assert_close(B, [1, 3**0.5, 5**0.5], 1e-12)
    A, B = hippo("fout", 4)
    root, turn = 8**0.5, 2 * np.pi
    rows = [[-2, 0, -root, 0], [0] * 4, [-root, 0, -4, -turn], [0, 0, turn, 0]]
    assert_close(A, rows, 1e-12)
    assert_close(B, [2, 0, root, 0], 1e-12)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 2.5])
def test_legs_remembers_by_warped_legendre_polynomials(t):
    A, B = hippo("legs", 8)
    assert_close(exponential(t * A) @ B, basis("legs", 8, t), 1e-9)


@pytest.mark.parametrize("measure", ["legt", "fout"])
def test_windows_remember_the_last_unit_of_time(measure):
    # The end of the window is found from finitely many functions: hence the 0.1.
    A, B = hippo(measure, 64)
    for t in (0.2, 0.5, 0.8):
        state = exponential(t * A) @ B
        assert_close(state[:4], basis(measure, 4, t), 0.1)
    assert_close((exponential(1.3 * A) @ B)[:4], np.zeros(4), 0.15)


@pytest.mark.parametrize("size", [2, 8, 64])
@pytest.mark.parametrize("measure", MEASURES)
def test_normal_plus_low_rank_is_the_matrix(measure, size):
    A, B = hippo(measure, size)
    Lambda, P, projected, V = nplr(measure, size)
    low = sum(np.outer(p, p.conj()) for p in P)
    assert_close((V @ (np.diag(Lambda) - low) @ V.conj().T).real, A, 1e-10)
    assert_close(np.abs(V.conj().T @ V - np.eye(size)), np.zeros((size, size)), 1e-10)
    assert_close(np.abs(V @ projected - B), np.zeros(size), 1e-10)
    # The second half mirrors the first, P and B included: their products are real.
    half = size // 2
    assert (np.diff(Lambda.imag[:half]) > 0).all()
    assert_close(
        np.abs(Lambda[:half] - Lambda[half:][::-1].conj()), np.zeros(half), 1e-9
    )
    found = np.abs(P[:, :half] * projected[:half].conj())
    mirrored = np.abs(P[:, half:] * projected[half:].conj())[:, ::-1]
    assert_close(found, mirrored, 1e-9)


def test_eigenvalues_of_the_normal_part_of_legs():
    Lambda = nplr("legs", 8)[0]
    assert_close(Lambda.real, np.full(8, -0.5), 1e-12)
    imaginary = [-19.85741037, -5.35420852, -1.95779415, -0.42748871]
    assert_close(Lambda.imag[:4], imaginary, 1e-7)


def test_diagonal_inits_of_the_paper():
    Lambda, B = s4d_init("lin", 4)
    assert_close(Lambda.real, [-0.5, -0.5], 1e-12)
    assert_close(Lambda.imag, [0, np.pi], 1e-12)
    assert (B == 1).all()
    assert_close(s4d_init("inv", 4)[0].imag, [12 / np.pi, 4 / 3 / np.pi], 1e-12)
    assert_close(s4d_init("real", 6)[0].real, [-1, -2, -3], 1e-12)
    assert_close(s4d_init("real", 6)[0].imag, [0, 0, 0], 1e-12)
    Lambda, B = s4d_init("legs", 8)
    assert_close(Lambda.imag, nplr("legs", 8)[0].imag[:4], 1e-12)
    # Both halves have the same share of |B|² = Σ 2n + 1.
    assert_close(2 * (np.abs(B) ** 2).sum(), 64.0, 1e-9)


@pytest.mark.parametrize("measure", ["legs", "legt"])
def test_truncated_output_ends_the_kernel(measure):
    # C̃ Ā^l B̄ = C Ā^l B̄ - C Ā^{l + length} B̄, at any l.
    half, length = 3, 5
    Lambda, P, B, _ = nplr(measure, 2 * half)
    Lambda, P, B = Lambda[:half], P[:, :half], B[:half]
    C = rng.normal(size=half) + 1j * rng.normal(size=half)
    full = [np.concatenate([z, z.conj()], -1) for z in (Lambda, B, C)]
    A = np.diag(full[0]) - sum(
        np.outer(p, p.conj()) for p in np.concatenate([P, P.conj()], -1)
    )
    identity = np.eye(2 * half)
    step = np.linalg.inv(identity - 0.05 * A) @ (identity + 0.05 * A)
    state = np.linalg.inv(identity - 0.05 * A) @ (0.1 * full[1])
    kernel = []
    for _ in range(length + 3):
        kernel.append((full[2] @ state).real)
        state = step @ state
    truncated = truncated_output(Lambda, P, C, 0.1, length)
    state = np.linalg.inv(identity - 0.05 * A) @ (0.1 * full[1])
    for tap in range(3):
        found = 2 * (truncated @ state[:half]).real
        assert_close(found, kernel[tap] - kernel[tap + length], 1e-10)
        state = step @ state


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="measure must be one of .* received 'lagt'"):
        hippo("lagt", 4)
    with pytest.raises(ValueError, match="measure must be one of"):
        nplr("lagt", 4)
    with pytest.raises(ValueError, match="size must be even.* received 5"):
        nplr("legs", 5)
    with pytest.raises(ValueError, match="init must be one of .* received 'log'"):
        s4d_init("log", 4)
    assert len(INITS) == 4
