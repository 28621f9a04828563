"""Architectures and their numbers of weights, without the memory they would take."""

import math
import threading

import keras

import keras_edifice


def symbolic(name, **options):
    """`build(name, **options)` where Keras variables have shapes but no values.

    A thread of its own keeps the valueless variables away from the other models, for
    Keras initialises what it finds there later on.
    """
    made = []

    def make():
        with keras.StatelessScope(initialize_variables=False):
            made.append(keras_edifice.build(name, **options))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert made, f"{name} was not built; the error is above"
    return made[0]


def count_weights(name, **options):
    """(trainable, non-trainable) numbers of weights of `build(name, **options)`.

    The seeds of dropout layers do not count.
    """
    model, counted = symbolic(name, **options), []
    for variables in (model.trainable_variables, model.non_trainable_variables):
        weights = [v for v in variables if "seed_generator" not in v.path]
        counted.append(sum(math.prod(v.shape) for v in weights))
    return tuple(counted)
