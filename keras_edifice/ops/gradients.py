"""Gradients inside a model: of an energy in its input, of a vector field in its state.

    grad_sum:  ∂ Σ f(x) / ∂x          vjp:  cᵀ ∂f/∂a  for each argument a

Both work in eager code, in `fit` on every backend, inside loops, and can be
differentiated again. `fn` must not change state while it runs: a network with weights
is called by `stateless_call`, and one that should not be trained through gets its
weights by `stop_gradient`.
"""

from keras import ops

from keras_edifice.backends.gradients import backend_vjp


def vjp(fn, args, cotangent):
    """Value of `fn` and the product of a cotangent with its Jacobian.

    Args:
        fn: function of float tensors that gives one tensor.
        args: list of tensors, the arguments of `fn`.
        cotangent: of the shape of the value.

    Returns:
        (fn(*args), list of tensors of the shapes of args); zeros for an argument on
        which the value does not depend.
    """
    args = [ops.convert_to_tensor(x) for x in args]
    return backend_vjp(fn, args, ops.convert_to_tensor(cotangent))


def grad_sum(fn, x):
    """Gradient of the sum of fn(x) in x, a tensor of the shape of x.

    Where each row of fn(x) depends on the same row of x alone, as for the energies of
    a batch, this is the gradient of each row.
    """

    def total(x):
        return ops.sum(ops.cast(fn(x), "float32"))

    return vjp(total, [x], ops.ones((), dtype="float32"))[1][0]
