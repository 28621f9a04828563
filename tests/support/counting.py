"""Numbers of weights of an architecture, without the memory that they would take."""

import math
import threading

import keras

import keras_edifice


def count_weights(name, **options):
    """(trainable, non-trainable) numbers of weights of `build(name, **options)`.

    The model is built where Keras variables have shapes but no values; the seeds of
    dropout layers do not count. A thread of its own keeps the valueless variables
    away from the other models, for Keras initialises what it finds there later on.
    """
    counted = []

    def count():
        with keras.StatelessScope(initialize_variables=False):
            model = keras_edifice.build(name, **options)
        for variables in (model.trainable_variables, model.non_trainable_variables):
            weights = [v for v in variables if "seed_generator" not in v.path]
            counted.append(sum(math.prod(v.shape) for v in weights))

    thread = threading.Thread(target=count)
    thread.start()
    thread.join()
    assert counted, f"{name} was not built; the error is above"
    return tuple(counted)
